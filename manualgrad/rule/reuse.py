"""Write a variant of a program that reuses its temporaries.

A new tensor of a few MiB costs as much time as the operation that fills it. In this variant of a `Program`, an
operation writes its result into an operand if

    the program created the operand         it is not an argument, nor a view of one
    no later line reads the operand         nor a view of the same memory
    the result has its shape and dtype      this is checked at run time (see inplace.py)

Each operation gets its own line and binds a new name. A name is deleted after its last use. Some functions are
replaced by faster ones with the same result up to rounding (see `replaces`). The steps of the work:

    _Flattener                  splits each line of the program into single operations
    _fuse_products              computes a ± b c in one operation
    _find_masks_as_numbers      finds masks that need not be booleans
    _rewrite_step               chooses the operand that an operation writes into, and tracks shared memory
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from manualgrad.rule import inplace
from manualgrad.rule.formulas import Formula, Program, compile_source, syntax_tree

_BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
_COMPARISONS = {ast.Gt: "gt", ast.GtE: "ge", ast.Lt: "lt", ast.LtE: "le", ast.Eq: "eq", ast.NotEq: "ne"}

_POINTWISE = """
    abs acos asin atan ceil cos cosh digamma erf erfc erfinv exp exp2 expm1 floor log log10 log1p log2 neg
    reciprocal round rsqrt sgn sigmoid sign sin sinh sqrt square tan tanh trunc
"""
_HAS_INPLACE_VARIANT = """
    addcdiv addcmul addmm baddbmm clamp clamp_max clamp_min index_add index_put lerp masked_fill nan_to_num pow
    scatter_add
"""
_RETURNS_NEW_TENSOR = """
    all amax amin any arange argmax argmin argsort bincount bmm cat clone cumsum diff eye flip full full_like
    gather index_select isinf isnan linear log_softmax logaddexp logical_not logsigmoid logsumexp matmul maximum
    mean minimum mm new_empty new_full new_ones new_tensor new_zeros norm ones ones_like outer polygamma prod
    remainder repeat roll softmax softplus stack std sum take tril triu var where zeros zeros_like
"""
_MAY_RETURN_VIEW = """
    T as_strided bfloat16 bool chunk conj contiguous detach diagonal double flatten float half imag int long mH mT
    movedim narrow permute real reshape select split squeeze swapaxes to transpose type unbind unflatten unfold
    unsqueeze view view_as
"""
_RETURNS_NO_TENSOR = "device dim dtype element_size is_complex is_floating_point ndim numel shape size"

POINTWISE = frozenset(_POINTWISE.split())
"""Methods without arguments that have an in-place variant."""

HAS_INPLACE_VARIANT = POINTWISE | frozenset(_HAS_INPLACE_VARIANT.split())
"""Methods that have an in-place variant. The result has the shape and dtype of the tensor."""

RETURNS_NEW_TENSOR = HAS_INPLACE_VARIANT | frozenset(_RETURNS_NEW_TENSOR.split())
"""Methods and functions that return new memory."""

MAY_RETURN_VIEW = frozenset(_MAY_RETURN_VIEW.split())
"""Attributes and methods that may return a view of the tensor, but of no other memory."""

RETURNS_NO_TENSOR = frozenset(_RETURNS_NO_TENSOR.split())
"""Attributes and methods that return no tensor."""


@dataclass
class Step:
    """One operation: ``targets = node``. Its operands are names and constants."""

    targets: tuple[str, ...]
    node: ast.expr
    line: int
    """The index of the program's line that it belongs to."""
    reads: tuple[str, ...] = ()
    """The local names that the operation reads."""


class _Flattener:
    """Splits the lines of a program into steps."""

    def __init__(self, program: Program) -> None:
        self.scope = dict(program.scope)
        self.parameters = program.parameters
        self.steps: list[Step] = []
        self.captured: set[str] = set()
        """Names that a lambda or generator reads. As it may run later, they are never overwritten."""
        self._line = 0
        for i, line in enumerate(program.lines):
            self._line = i
            target = line.statement.targets[0]
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            names = [x.id for x in parts if isinstance(x, ast.Name)]
            if len(names) < len(parts):  # nested, or starred
                raise Unsupported
            self._add(tuple(names), self._operation(line.statement.value))

    def _add(self, targets: tuple[str, ...], node: ast.expr) -> ast.Name:
        """Add a step. Returns its first target."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.Lambda | ast.GeneratorExp):
                self.captured |= set(_names(inner))
        self.steps.append(Step(targets, node, self._line))
        return ast.Name(targets[0], ast.Load())

    def _operand(self, node: ast.expr) -> ast.expr:
        """Add the steps of the expression. Returns the name or constant that holds its value."""
        if isinstance(node, ast.Constant | ast.Name) or self.is_global(node):
            return node
        if isinstance(node, ast.Starred):
            return ast.Starred(self._operand(node.value), node.ctx)
        if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            return node
        operation = self._operation(node)
        return self._add((f"t{len(self.steps)}_",), operation)

    def _operation(self, node: ast.expr) -> ast.expr:
        """Add the steps of the operands. Returns the operation with names and constants as operands."""
        match node:
            case ast.BinOp(left, op, right):
                left = self._operand(left)
                return ast.BinOp(left, op, self._operand(right))
            case ast.UnaryOp(ast.USub() | ast.Invert() as op, operand):
                return ast.UnaryOp(op, self._operand(operand))
            case ast.Compare(left, [op], [right]) if type(op) in _COMPARISONS:
                left = self._operand(left)
                return ast.Compare(left, [op], [self._operand(right)])
            case ast.Call(func, args, keywords):
                if isinstance(func, ast.Attribute) and not self.is_global(func):
                    func = ast.Attribute(self._operand(func.value), func.attr, ast.Load())
                args = [self._operand(x) for x in args]
                return ast.Call(func, args, [ast.keyword(x.arg, self._operand(x.value)) for x in keywords])
            case ast.Attribute(value, attr, ctx) if not self.is_global(node):
                return ast.Attribute(self._operand(value), attr, ctx)
            case ast.Tuple(elts, ctx):
                return ast.Tuple([self._operand(x) for x in elts], ctx)
            case ast.List(elts, ctx):
                return ast.List([self._operand(x) for x in elts], ctx)
            case ast.Subscript(value, index, ctx):
                return ast.Subscript(self._operand(value), index, ctx)
        return node  # other expressions stay one step, for example a conditional expression or a comprehension

    def is_global(self, node: ast.expr) -> bool:
        """The expression is a global name, or an attribute of one."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self.scope

    def value(self, node: ast.expr) -> Any:
        """The value of a global name, or of an attribute of one."""
        if isinstance(node, ast.Attribute):
            return getattr(self.value(node.value), node.attr, None)
        return self.scope.get(node.id) if isinstance(node, ast.Name) else None


class Unsupported(Exception):
    """The program has a statement that cannot be rewritten."""


def _names(node: ast.AST) -> tuple[str, ...]:
    return tuple(x.id for x in ast.walk(node) if isinstance(x, ast.Name))


class ReusingProgram:
    """A program that reuses its temporaries.

    Raises:
        Unsupported: the program has a statement that cannot be rewritten.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        found = _Flattener(program)
        self.scope, self.steps, self.is_global, self.value = found.scope, found.steps, found.is_global, found.value
        self.read_at_end = {name for name in program.results if name is not None} | found.captured
        self._count_reads()
        self._fuse_products()
        self._count_reads()  # again, because the products are gone
        self.masks_as_numbers = self._find_masks_as_numbers()
        self.allocations: dict[str, frozenset[str]] = dict.fromkeys(program.parameters, frozenset("*"))
        """For each name, the steps that may have allocated its memory. Names with a common step may share memory.
        "*" stands for memory that the program did not allocate."""
        self.is_rewritten = False
        """An operation writes into an operand, or is replaced by a faster one."""
        self.text = [self._rewrite_step(i, step) for i, step in enumerate(self.steps)]

    @property
    def source(self) -> str:
        return self.program.render(self.text)

    def compile(self) -> Callable[..., tuple[Any, ...]]:
        locations = [self.program.locations[step.line] for step in self.steps]
        return compile_source(self.source, self.program.name, {**inplace.NAMESPACE, **self.scope}, locations)

    def _count_reads(self) -> None:
        self.last_read: dict[str, int] = {}
        self.read_count: dict[str, int] = {}
        for i, step in enumerate(self.steps):
            step.reads = tuple(x for x in _names(step.node) if x not in self.scope)
            for name in step.reads:
                self.last_read[name] = i
                self.read_count[name] = self.read_count.get(name, 0) + 1
        for name in self.read_at_end:
            self.last_read[name] = len(self.steps)
            self.read_count[name] = self.read_count.get(name, 0) + 1

    def _fuse_products(self) -> None:
        """Compute a + b c and a - b c in one step."""
        producers = {step.targets[0]: step for step in self.steps}
        fused: set[str] = set()
        for step in self.steps:
            match step.node:
                case ast.BinOp(left, ast.Add() | ast.Sub() as op, right):
                    sign = 1 if isinstance(op, ast.Add) else -1
                    orders = [(left, right), (right, left)] if sign > 0 else [(left, right)]
                    for term, product in orders:
                        factors = self._product_factors(producers, product)
                        if factors is not None:
                            fused.add(_name_of(product))
                            step.node = _call("_addcmul", term, *factors, ast.Constant(sign))
                            break
        self.steps[:] = [step for step in self.steps if step.targets[0] not in fused]

    def _product_factors(self, producers: dict[str, Step], node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
        """The factors of a product that is read once. None if the node is no such product."""
        if isinstance(node, ast.Name) and node.id in producers and self.read_count.get(node.id) == 1:
            match producers[node.id].node:
                case ast.BinOp(left, ast.Mult(), right):
                    return left, right
        return None

    def _find_masks_as_numbers(self) -> set[str]:
        """Masks that only `torch.where` reads. As indicators (see inplace.py) they are faster than as booleans."""
        producers = {step.targets[0]: step.node for step in self.steps}

        def with_operands(name: str) -> set[str]:
            """The mask and the masks that it is computed from. Empty if one of them is read elsewhere."""
            if self.read_count.get(name) != 1 or name not in producers:
                return set()
            match producers[name]:
                case ast.Compare():
                    return {name}
                case ast.BinOp(ast.Name(left), ast.BitAnd() | ast.BitOr(), ast.Name(right)):
                    a, b = with_operands(left), with_operands(right)
                    return {name} | a | b if a and b else set()
                case ast.UnaryOp(ast.Invert(), ast.Name(operand)) if a := with_operands(operand):
                    return {name} | a
            return set()

        found: set[str] = set()
        for step in self.steps:
            match step.node:
                case ast.Call(func, [ast.Name(mask), *_]) if self.value(func) is torch.where:
                    found |= with_operands(mask)
        return found

    # --- which operands may be overwritten ---

    def _rewrite_step(self, i: int, step: Step) -> str:
        """The source line of a step. Records the memory of its targets in `allocations`."""
        node, written = self._rewrite(step.node, i)
        self.is_rewritten = self.is_rewritten or node is not step.node
        if written is not None:
            allocations = self.allocations[written]
        elif self._returns_new_tensor(step.node):
            allocations = frozenset({f"{i}"})
        else:
            allocations = self._shared_allocations(step)
        self.allocations |= dict.fromkeys(step.targets, allocations)
        text = f"{', '.join(step.targets)} = {ast.unparse(ast.fix_missing_locations(node))}"
        read_last = {x for x in step.reads if self.last_read[x] == i and x in self.allocations}
        dead = sorted(read_last - {*self.program.parameters})
        return f"{text}; del {', '.join(dead)}" if dead else text

    def _shared_allocations(self, step: Step) -> frozenset[str]:
        """The allocations of a step that may return a view of what it reads."""
        node = step.node
        found = frozenset[str]().union(*(self.allocations.get(x, frozenset("*")) for x in step.reads))
        match node:
            case ast.Attribute(_, attr) | ast.Call(ast.Attribute(_, attr)) if attr in RETURNS_NO_TENSOR:
                return frozenset()
            case ast.Attribute(_, attr) | ast.Call(ast.Attribute(_, attr)) if attr in MAY_RETURN_VIEW:
                return found
            case ast.Tuple() | ast.List() | ast.Subscript():
                return found
        return found | {"*"}

    def _returns_new_tensor(self, node: ast.expr) -> bool:
        match node:
            case ast.BinOp() | ast.UnaryOp() | ast.Compare() | ast.Call(ast.Name("_addcmul")):
                return True
            case ast.Call(func):
                if self.is_global(func):
                    return returns_new_tensor(self.value(func))
                return isinstance(func, ast.Attribute) and func.attr in RETURNS_NEW_TENSOR
        return False

    def _is_writable(self, node: ast.expr, i: int, times: int = 1) -> bool:
        """Step i may write into this operand: the program allocated it, and no later step reads its memory.

        Step i reads the operand this number of times (2 for a square), otherwise False.
        """
        if not isinstance(node, ast.Name):
            return False
        allocations = self.allocations.get(node.id, frozenset())
        if not allocations or "*" in allocations:
            return False
        if self.last_read[node.id] != i or self.steps[i].reads.count(node.id) != times:
            return False
        return not any(
            name != node.id and self.last_read.get(name, -1) >= i and others & allocations
            for name, others in self.allocations.items()
        )

    # --- how an operation is rewritten ---

    def _rewrite(self, node: ast.expr, i: int) -> tuple[ast.expr, str | None]:
        """The operation of step i, rewritten if possible, and the name of the operand that it may write into."""
        name = self.steps[i].targets[0]
        match node:
            case ast.BinOp(left, op, right) if type(op) in _BINARY:
                return self._rewrite_binary(_BINARY[type(op)], left, right, i) or (node, None)
            case ast.BinOp(left, op, right) if name in self.masks_as_numbers:
                return _call("_and" if isinstance(op, ast.BitAnd) else "_or", left, right), _name_of(left)
            case ast.UnaryOp(ast.Invert(), operand) if name in self.masks_as_numbers:
                return _call("_not", operand), _name_of(operand)
            case ast.UnaryOp(ast.USub(), operand) if self._is_writable(operand, i):
                return _call("_neg_into", operand), _name_of(operand)
            case ast.Compare(left, [op], [right]):
                how = "_indicator" if name in self.masks_as_numbers else "_compare"
                return _call(how, ast.Constant(_COMPARISONS[type(op)]), left, right), None
            case ast.Call(ast.Name("_addcmul"), [a, b, c, sign]):
                return self._rewrite_sum_with_product(a, b, c, sign, i) or (node, None)
            case ast.Call(func) if self.is_global(func):
                return self._rewrite_call(node, i)
            case ast.Call(ast.Attribute(value, attr), args, keywords) if attr in HAS_INPLACE_VARIANT:
                if self._is_writable(value, i):
                    return _call_into(attr, value, *args, keywords=keywords), _name_of(value)
        return node, None

    def _rewrite_binary(self, name: str, left: ast.expr, right: ast.expr, i: int) -> tuple[ast.expr, str] | None:
        if self._is_writable(left, i) or (_are_same_name(left, right) and self._is_writable(left, i, 2)):
            return _call(f"_{name}_into_left", left, right), _name_of(left)
        if self._is_writable(right, i):
            return _call(f"_{name}_into_right", left, right), _name_of(right)
        return None

    def _rewrite_sum_with_product(
        self, a: ast.expr, b: ast.expr, c: ast.expr, sign: ast.expr, i: int
    ) -> tuple[ast.expr, str] | None:
        if self._is_writable(a, i):
            return _call("_addcmul_into_term", a, b, c, sign), _name_of(a)
        for one, other in ((b, c), (c, b)):
            if self._is_writable(one, i) or (_are_same_name(one, other) and self._is_writable(one, i, 2)):
                return _call("_addcmul_into_factor", a, one, other, sign), _name_of(one)
        return None

    def _rewrite_call(self, node: ast.Call, i: int) -> tuple[ast.expr, str | None]:
        function = self.value(node.func)
        method = _POINTWISE_FUNCTIONS.get(function) if isinstance(function, Hashable) else None
        if method and len(node.args) == 1 and not node.keywords and self._is_writable(node.args[0], i):
            return _call_into(method, node.args[0]), _name_of(node.args[0])
        faster = fast_version(function)
        if faster is function:
            return node, None
        name = f"_fast_{ast.unparse(node.func).replace('.', '_')}"
        self.scope[name] = faster
        return ast.Call(ast.Name(name, ast.Load()), node.args, node.keywords), None


_POINTWISE_FUNCTIONS: dict[Any, str] = {getattr(torch, x): x for x in POINTWISE if hasattr(torch, x)}
"""Functions of torch -> methods of the same name."""


def _are_same_name(a: ast.expr, b: ast.expr) -> bool:
    return isinstance(a, ast.Name) and isinstance(b, ast.Name) and a.id == b.id


def _name_of(node: ast.expr) -> str:
    assert isinstance(node, ast.Name)
    return node.id


def _call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(args), [])


def _call_into(method: str, *args: ast.expr, keywords: list[ast.keyword] | None = None) -> ast.Call:
    """A call of `inplace._into`, which calls the in-place variant of the method."""
    return ast.Call(ast.Name("_into", ast.Load()), [ast.Constant(f"{method}_"), *args], keywords or [])


# --- functions that formulas call ---

_replacements: dict[Any, Callable[..., Any]] = {torch.where: inplace.where}
"""Functions -> faster implementations that were written by hand."""

# caches of `_rewrite_helper` and `with_reuse`
_helper_programs: dict[FunctionType, ReusingProgram | None] = {}
_helpers_with_reuse: dict[FunctionType, Callable[..., Any]] = {}


def replaces(function: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a faster implementation of a function that formulas call.

    Its result must be the same up to rounding. It runs where `inplace_is_safe` holds, and may write into tensors
    that it creates, but not into its arguments.
    """

    def register(faster: Callable[..., Any]) -> Callable[..., Any]:
        _replacements[function] = faster
        return faster

    return register


def fast_version(function: Any) -> Any:
    """The function that a program with reused temporaries calls in place of this function. It may be the same."""
    if not isinstance(function, Hashable):
        return function
    return _replacements[function] if function in _replacements else with_reuse(function)


def with_reuse(function: Any) -> Any:
    """A helper function of manualgrad.ops in its variant that reuses temporaries. Any other function as it is."""
    if not _is_helper(function):
        return function
    if function not in _helpers_with_reuse:
        _helpers_with_reuse[function] = function  # a recursive function finds this entry
        program = _rewrite_helper(function)
        if program is None:
            _helpers_with_reuse[function] = _with_fast_callees(function)
        elif program.is_rewritten:
            compute = program.compile()
            _helpers_with_reuse[function] = lambda *args: compute(*args)[0]  # a program returns a tuple
    return _helpers_with_reuse[function]


def _is_helper(function: Any) -> bool:
    return isinstance(function, FunctionType) and str(function.__module__).startswith("manualgrad.ops.")


def _with_fast_callees(function: FunctionType) -> FunctionType:
    """The same function, calling faster implementations of the functions that have one."""
    others = {name: function.__globals__.get(name) for name in _names_in(function.__code__)}
    faster = {name: fast_version(value) for name, value in others.items() if isinstance(value, FunctionType)}
    faster = {name: value for name, value in faster.items() if value is not others[name]}
    if not faster:
        return function
    scope = {**function.__globals__, **faster}
    found = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    found.__kwdefaults__ = function.__kwdefaults__
    return found


def uses_scatter(function: Any, seen: frozenset[Any] = frozenset()) -> bool:
    """The function, or a helper that it calls, scatters into a new tensor, which may be far larger than all
    arguments.

    Args:
        seen: the callers. They are not searched again.
    """
    if not isinstance(function, FunctionType) or function in seen:
        return False
    names = _names_in(function.__code__)
    if names & {"scatter_add", "index_add", "index_put"}:
        return True
    callees = [function.__globals__.get(name) for name in names]
    return any(uses_scatter(x, seen | {function}) for x in callees if _is_helper(x))


def _names_in(code: CodeType) -> set[str]:
    """The global names and attributes that the code and its inner functions read."""
    inner = [x for x in code.co_consts if isinstance(x, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def returns_new_tensor(function: Any) -> bool:
    """The function returns memory that it allocates, so its caller may write into it."""
    if not isinstance(function, Hashable):
        return False
    if function in _replacements:
        return True
    if isinstance(function, FunctionType) and function.__module__.startswith("manualgrad."):
        program = _rewrite_helper(function)
        allocations = frozenset("*") if program is None else program.allocations[_result_of(function)]
        return bool(allocations) and "*" not in allocations
    name = getattr(function, "__name__", "")
    return (
        name in RETURNS_NEW_TENSOR
        and name not in MAY_RETURN_VIEW
        and function in (getattr(torch, name, None), getattr(F, name, None))
    )


def _result_of(function: FunctionType) -> str:
    """The name of the result in the program of a helper function."""
    return f"{function.__name__}_result"


def _rewrite_helper(function: Any) -> ReusingProgram | None:
    """A helper function of manualgrad.ops as a program that reuses temporaries. None if it cannot be rewritten."""
    if not _is_helper(function):
        return None
    if function not in _helper_programs:
        _helper_programs[function] = None  # a recursive function finds this entry
        tree = syntax_tree(function)
        if tree is None or hasattr(function, "__wrapped__"):
            return None
        args = tree.args
        if args.defaults or args.kwonlyargs or args.vararg or args.kwarg:
            return None
        formula = Formula.from_function(_result_of(function), function)
        if formula.statements is not None:
            program = Program(function.__name__, [formula], formula.parameters, [formula.target])
            with suppress(Unsupported):
                _helper_programs[function] = ReusingProgram(program)
    return _helper_programs[function]
