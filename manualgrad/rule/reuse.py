"""The same program with its temporaries reused.

A fresh tensor of a few MiB costs as much as the operation that fills it. So in this variant of a `Program` an
operation writes into an operand, if

    the program made the operand itself       and not, through a view, an argument of it
    no later line reads it                    nor any other view of the same memory
    the shape and the dtype are the result's  (known when it runs: see `operations`)

Every operation gets a line of its own, which binds a new name, and names are deleted after their last use. Some
operations are replaced by a faster one with the same result to rounding (see `replaces`).
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

from manualgrad.rule import operations
from manualgrad.rule.formulas import Formula, Program, compile_source, tree_of

_BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
_COMPARISONS = {ast.Gt: "gt", ast.GtE: "ge", ast.Lt: "lt", ast.LtE: "le", ast.Eq: "eq", ast.NotEq: "ne"}

_POINTWISE = """
    abs acos asin atan ceil cos cosh digamma erf erfc erfinv exp exp2 expm1 floor log log10 log1p log2 neg
    reciprocal round rsqrt sgn sigmoid sign sin sinh sqrt square tan tanh trunc
"""
_INTO_SELF = """
    addcdiv addcmul addmm baddbmm clamp clamp_max clamp_min index_add index_put lerp masked_fill nan_to_num pow
    scatter_add
"""
_FRESH = """
    all amax amin any arange argmax argmin argsort bincount bmm cat clone cumsum diff eye flip full full_like
    gather index_select isinf isnan linear log_softmax logaddexp logical_not logsigmoid logsumexp matmul maximum
    mean minimum mm new_empty new_full new_ones new_tensor new_zeros norm ones ones_like outer polygamma prod
    remainder repeat roll softmax softplus stack std sum take tril triu var where zeros zeros_like
"""
_VIEWS = """
    T as_strided bfloat16 bool chunk conj contiguous detach diagonal double flatten float half imag int long mH mT
    movedim narrow permute real reshape select split squeeze swapaxes to transpose type unbind unflatten unfold
    unsqueeze view view_as
"""
_NO_TENSOR = "device dim dtype element_size is_complex is_floating_point ndim numel shape size"

POINTWISE = frozenset(_POINTWISE.split())
"""Methods without arguments that have a variant in place."""

INTO_SELF = POINTWISE | frozenset(_INTO_SELF.split())
"""Methods that have a variant in place, with the same shape and dtype."""

FRESH = INTO_SELF | frozenset(_FRESH.split())
"""Methods and functions that return a new tensor."""

VIEWS = frozenset(_VIEWS.split())
"""Attributes and methods that may return a view of the tensor, and share no other memory."""

NO_TENSOR = frozenset(_NO_TENSOR.split())
"""Attributes and methods that return no tensor."""


@dataclass
class Step:
    """One operation: ``targets = node``, whose operands are names and constants."""

    targets: tuple[str, ...]
    node: ast.expr
    line: int
    """The line of the program that it is a part of."""
    reads: tuple[str, ...] = ()


class _Steps:
    """The lines of a program as steps."""

    def __init__(self, program: Program) -> None:
        self.scope = dict(program.scope)
        self.parameters = program.parameters
        self.steps: list[Step] = []
        self.captured: set[str] = set()
        """Names that a function inside an expression reads, whenever it is called."""
        for self.line, line in enumerate(program.lines):
            target = line.statement.targets[0]
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            names = [x.id for x in parts if isinstance(x, ast.Name)]
            if len(names) < len(parts):  # nested, or starred
                raise Unsupported
            self._add(tuple(names), self._operation(line.statement.value))

    def _add(self, targets: tuple[str, ...], node: ast.expr) -> ast.Name:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Lambda | ast.GeneratorExp):
                self.captured |= set(_names(inner))
        self.steps.append(Step(targets, node, self.line))
        return ast.Name(targets[0], ast.Load())

    def _atom(self, node: ast.expr) -> ast.expr:
        """The expression as a name or a constant, after the steps that it takes."""
        if isinstance(node, ast.Constant | ast.Name) or self.is_global(node):
            return node
        if isinstance(node, ast.Starred):
            return ast.Starred(self._atom(node.value), node.ctx)
        if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            return node
        operation = self._operation(node)
        return self._add((f"t{len(self.steps)}_",), operation)

    def _operation(self, node: ast.expr) -> ast.expr:
        """The expression with atoms for operands, after the steps that these take."""
        match node:
            case ast.BinOp(left, op, right):
                left = self._atom(left)
                return ast.BinOp(left, op, self._atom(right))
            case ast.UnaryOp(ast.USub() | ast.Invert() as op, operand):
                return ast.UnaryOp(op, self._atom(operand))
            case ast.Compare(left, [op], [right]) if type(op) in _COMPARISONS:
                left = self._atom(left)
                return ast.Compare(left, [op], [self._atom(right)])
            case ast.Call(func, args, keywords):
                if isinstance(func, ast.Attribute) and not self.is_global(func):
                    func = ast.Attribute(self._atom(func.value), func.attr, ast.Load())
                args = [self._atom(x) for x in args]
                return ast.Call(func, args, [ast.keyword(x.arg, self._atom(x.value)) for x in keywords])
            case ast.Attribute(value, attr, ctx) if not self.is_global(node):
                return ast.Attribute(self._atom(value), attr, ctx)
            case ast.Tuple(elts, ctx):
                return ast.Tuple([self._atom(x) for x in elts], ctx)
            case ast.List(elts, ctx):
                return ast.List([self._atom(x) for x in elts], ctx)
            case ast.Subscript(value, index, ctx):
                return ast.Subscript(self._atom(value), index, ctx)
        return node  # a condition, a comprehension: evaluated as written

    def is_global(self, node: ast.expr) -> bool:
        """A global name, or an attribute of one: a function or a constant."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self.scope

    def value(self, node: ast.expr) -> Any:
        """What a global name, or an attribute of one, stands for."""
        if isinstance(node, ast.Attribute):
            return getattr(self.value(node.value), node.attr, None)
        return self.scope.get(node.id) if isinstance(node, ast.Name) else None


class Unsupported(Exception):
    """The program has a statement that is not rewritten."""


def _names(node: ast.AST) -> tuple[str, ...]:
    return tuple(x.id for x in ast.walk(node) if isinstance(x, ast.Name))


class Reusing:
    """A program whose temporaries are reused.

    Raises:
        Unsupported: the program has a statement that is not rewritten.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        found = _Steps(program)
        self.scope, self.steps, self.is_global, self.value = found.scope, found.steps, found.is_global, found.value
        self.results = {name for name in program.results if name is not None}
        self.captured = found.captured
        self._count_reads()
        self._join_products()
        self._count_reads()
        self.indicators = self._find_indicators()
        self.roots: dict[str, frozenset[str]] = dict.fromkeys(program.parameters, frozenset("*"))
        """For each name so far the steps that made its memory; "*" for memory that the program did not make."""
        self.differs = False
        self.text = [self._rewritten_step(i, step) for i, step in enumerate(self.steps)]

    @property
    def source(self) -> str:
        return self.program.text(self.text)

    def compiled(self) -> Callable[..., tuple[Any, ...]]:
        places = [self.program.places[step.line] for step in self.steps]
        return compile_source(self.source, self.program.name, {**operations.SCOPE, **self.scope}, places)

    def _count_reads(self) -> None:
        self.last: dict[str, int] = {}
        self.count: dict[str, int] = {}
        for i, step in enumerate(self.steps):
            step.reads = tuple(x for x in _names(step.node) if x not in self.scope)
            for name in step.reads:
                self.last[name] = i
                self.count[name] = self.count.get(name, 0) + 1
        for name in (*self.results, *self.captured):
            self.last[name] = len(self.steps)
            self.count[name] = self.count.get(name, 0) + 1

    def _join_products(self) -> None:
        """a + b c and a - b c as one step."""
        made = {step.targets[0]: step for step in self.steps}
        gone: set[str] = set()
        for step in self.steps:
            match step.node:
                case ast.BinOp(left, ast.Add() | ast.Sub() as op, right):
                    sign = 1 if isinstance(op, ast.Add) else -1
                    for term, product in ((left, right), (right, left))[: 1 if sign < 0 else 2]:
                        factors = self._factors(made, product)
                        if factors is not None:
                            gone.add(_id(product))
                            step.node = _call("_addcmul", term, *factors, ast.Constant(sign))
                            break
        self.steps[:] = [step for step in self.steps if step.targets[0] not in gone]

    def _factors(self, made: dict[str, Step], node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
        if isinstance(node, ast.Name) and node.id in made and self.count.get(node.id) == 1:
            match made[node.id].node:
                case ast.BinOp(left, ast.Mult(), right):
                    return left, right
        return None

    def _find_indicators(self) -> set[str]:
        """Masks that only a choice reads: made as numbers, 1 and 0, which is faster."""
        made = {step.targets[0]: step.node for step in self.steps}

        def possible(name: str) -> set[str]:
            if self.count.get(name) != 1 or name not in made:
                return set()
            match made[name]:
                case ast.Compare():
                    return {name}
                case ast.BinOp(ast.Name(left), ast.BitAnd() | ast.BitOr(), ast.Name(right)):
                    both = possible(left), possible(right)
                    return {name} | both[0] | both[1] if all(both) else set()
                case ast.UnaryOp(ast.Invert(), ast.Name(operand)) if found := possible(operand):
                    return {name} | found
            return set()

        found: set[str] = set()
        for step in self.steps:
            match step.node:
                case ast.Call(func, [ast.Name(mask), *_]) if self.value(func) is torch.where:
                    found |= possible(mask)
        return found

    # --- what may be written into ---

    def _rewritten_step(self, i: int, step: Step) -> str:
        node, written = self._rewritten(step.node, i)
        self.differs = self.differs or node is not step.node
        if written is not None:
            roots = self.roots[written]  # the same memory
        else:
            roots = frozenset({f"{i}"}) if self._is_fresh(step.node) else self._shared(step)
        self.roots |= dict.fromkeys(step.targets, roots)
        text = f"{', '.join(step.targets)} = {ast.unparse(ast.fix_missing_locations(node))}"
        dead = sorted(
            {x for x in step.reads if self.last[x] == i and x in self.roots} - {*self.program.parameters}
        )
        return f"{text}; del {', '.join(dead)}" if dead else text

    def _shared(self, step: Step) -> frozenset[str]:
        """The roots of a step that may return a view of what it reads."""
        node = step.node
        found = frozenset[str]().union(*(self.roots.get(x, frozenset("*")) for x in step.reads))
        match node:
            case ast.Attribute(_, attr) | ast.Call(ast.Attribute(_, attr)) if attr in NO_TENSOR:
                return frozenset()
            case ast.Attribute(_, attr) | ast.Call(ast.Attribute(_, attr)) if attr in VIEWS:
                return found
            case ast.Tuple() | ast.List() | ast.Subscript():
                return found
        return found | {"*"}

    def _is_fresh(self, node: ast.expr) -> bool:
        match node:
            case ast.BinOp() | ast.UnaryOp() | ast.Compare() | ast.Call(ast.Name("_addcmul")):
                return True
            case ast.Call(func):
                if self.is_global(func):
                    return returns_fresh(self.value(func))
                return isinstance(func, ast.Attribute) and func.attr in FRESH
        return False

    def _is_writable(self, node: ast.expr, i: int, times: int = 1) -> bool:
        """Step i may write into this operand, which it reads so many times."""
        if not isinstance(node, ast.Name):
            return False
        roots = self.roots.get(node.id, frozenset())
        if not roots or "*" in roots or self.last[node.id] != i or self.steps[i].reads.count(node.id) != times:
            return False
        return not any(
            name != node.id and self.last.get(name, -1) >= i and others & roots
            for name, others in self.roots.items()
        )

    # --- what is written in place of an operation ---

    def _rewritten(self, node: ast.expr, i: int) -> tuple[ast.expr, str | None]:
        """The operation, and the name of the operand that it may write into."""
        name = self.steps[i].targets[0]
        match node:
            case ast.BinOp(left, op, right) if type(op) in _BINARY:
                return self._binary(_BINARY[type(op)], left, right, i) or (node, None)
            case ast.BinOp(left, op, right) if name in self.indicators:
                return _call("_and" if isinstance(op, ast.BitAnd) else "_or", left, right), _id(left)
            case ast.UnaryOp(ast.Invert(), operand) if name in self.indicators:
                return _call("_not", operand), _id(operand)
            case ast.UnaryOp(ast.USub(), operand) if self._is_writable(operand, i):
                return _call("_neg_into", operand), _id(operand)
            case ast.Compare(left, [op], [right]):
                how = "_indicator" if name in self.indicators else "_compare"
                return _call(how, ast.Constant(_COMPARISONS[type(op)]), left, right), None
            case ast.Call(ast.Name("_addcmul"), [a, b, c, sign]):
                return self._sum_with_product(a, b, c, sign, i) or (node, None)
            case ast.Call(func) if self.is_global(func):
                return self._function(node, i)
            case ast.Call(ast.Attribute(value, attr), args, keywords) if attr in INTO_SELF:
                if self._is_writable(value, i):
                    into = _into(attr, value, *args)
                    into.keywords = keywords
                    return into, _id(value)
        return node, None

    def _binary(self, name: str, left: ast.expr, right: ast.expr, i: int) -> tuple[ast.expr, str] | None:
        if self._is_writable(left, i) or (_is_same(left, right) and self._is_writable(left, i, 2)):
            return _call(f"_{name}_into_left", left, right), _id(left)
        if self._is_writable(right, i):
            return _call(f"_{name}_into_right", left, right), _id(right)
        return None

    def _sum_with_product(
        self, a: ast.expr, b: ast.expr, c: ast.expr, sign: ast.expr, i: int
    ) -> tuple[ast.expr, str] | None:
        if self._is_writable(a, i):
            return _call("_addcmul_into_term", a, b, c, sign), _id(a)
        for one, other in ((b, c), (c, b)):
            if self._is_writable(one, i) or (_is_same(one, other) and self._is_writable(one, i, 2)):
                return _call("_addcmul_into_factor", a, one, other, sign), _id(one)
        return None

    def _function(self, node: ast.Call, i: int) -> tuple[ast.expr, str | None]:
        function = self.value(node.func)
        into = _POINTWISE_FUNCTIONS.get(function) if isinstance(function, Hashable) else None
        if into and len(node.args) == 1 and not node.keywords and self._is_writable(node.args[0], i):
            return _into(into, node.args[0]), _id(node.args[0])
        faster = fast(function)
        if faster is function:
            return node, None
        name = f"_fast_{ast.unparse(node.func).replace('.', '_')}"
        self.scope[name] = faster
        return ast.Call(ast.Name(name, ast.Load()), node.args, node.keywords), None


_POINTWISE_FUNCTIONS: dict[Any, str] = {getattr(torch, x): x for x in POINTWISE if hasattr(torch, x)}


def _is_same(a: ast.expr, b: ast.expr) -> bool:
    return isinstance(a, ast.Name) and isinstance(b, ast.Name) and a.id == b.id


def _id(node: ast.expr) -> str:
    assert isinstance(node, ast.Name)
    return node.id


def _call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(args), [])


def _into(method: str, *args: ast.expr) -> ast.Call:
    return _call("_into", ast.Constant(f"{method}_"), *args)


# --- functions that formulas call ---

_replacements: dict[Any, Callable[..., Any]] = {torch.where: operations.where}
_rewritten: dict[FunctionType, Reusing | None] = {}
_fast: dict[FunctionType, Callable[..., Any]] = {}


def replaces(function: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What follows has the same result to rounding as the function, and is faster for large tensors.

    It is called where nothing observes the computation, and may write into what it makes, never into an argument.
    """

    def enter(faster: Callable[..., Any]) -> Callable[..., Any]:
        _replacements[function] = faster
        return faster

    return enter


def fast(function: Any) -> Any:
    """The function as a program with reuse calls it."""
    if not isinstance(function, Hashable):
        return function
    return _replacements[function] if function in _replacements else reusing(function)


def reusing(function: Any) -> Any:
    """A function of ours that formulas call, with its temporaries reused."""
    if not isinstance(function, FunctionType) or not function.__module__.startswith("manualgrad.ops."):
        return function
    if function not in _fast:
        _fast[function] = function  # while it is made: it may call itself
        found = _rewritten_helper(function)
        if found is None:
            _fast[function] = _with_fast_callees(function)
        elif found.differs:
            compute = found.compiled()
            _fast[function] = lambda *args: compute(*args)[0]
    return _fast[function]


def _with_fast_callees(function: FunctionType) -> FunctionType:
    """A function that is not written as a formula is, but calls some that have a faster one."""
    others = {name: function.__globals__.get(name) for name in _names_in(function.__code__)}
    faster = {name: fast(value) for name, value in others.items() if isinstance(value, FunctionType)}
    faster = {name: value for name, value in faster.items() if value is not others[name]}
    if not faster:
        return function
    scope = {**function.__globals__, **faster}
    found = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    found.__kwdefaults__ = function.__kwdefaults__
    return found


def makes_tables(function: Any, seen: frozenset[Any] = frozenset()) -> bool:
    """The function adds into a tensor that it makes, which may be far larger than all that it is given."""
    if not isinstance(function, FunctionType) or function in seen:
        return False
    names = _names_in(function.__code__)
    if names & {"scatter_add", "index_add", "index_put"}:
        return True
    helpers = [function.__globals__.get(name) for name in names]
    ours = [x for x in helpers if str(getattr(x, "__module__", "")).startswith("manualgrad.ops.")]
    return any(makes_tables(x, seen | {function}) for x in ours)


def _names_in(code: CodeType) -> set[str]:
    inner = [x for x in code.co_consts if isinstance(x, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def returns_fresh(function: Any) -> bool:
    """The function returns memory of its own."""
    if not isinstance(function, Hashable):
        return False
    if function in _replacements:
        return True
    if isinstance(function, FunctionType) and function.__module__.startswith("manualgrad."):
        reusing = _rewritten_helper(function)
        roots = frozenset("*") if reusing is None else reusing.roots[_result_of(function)]
        return bool(roots) and "*" not in roots
    name = getattr(function, "__name__", "")
    return name in FRESH and name not in VIEWS and function in (getattr(torch, name, None), getattr(F, name, None))


def _result_of(function: FunctionType) -> str:
    return f"{function.__name__}_result"


def _rewritten_helper(function: Any) -> Reusing | None:
    """A function of ours that formulas call, written as a formula is."""
    if not isinstance(function, FunctionType) or not function.__module__.startswith("manualgrad.ops."):
        return None
    if function not in _rewritten:
        _rewritten[function] = None  # while it is looked at: it may call itself
        tree = tree_of(function)
        args = None if tree is None else tree.args
        if (
            args is None
            or args.defaults
            or args.kwonlyargs
            or args.vararg
            or args.kwarg
            or hasattr(function, "__wrapped__")
        ):
            return None
        formula = Formula.of(_result_of(function), function)
        if formula.statements is not None:
            program = Program(function.__name__, [formula], formula.names, [formula.target])
            with suppress(Unsupported):
                _rewritten[function] = Reusing(program)
    return _rewritten[function]
