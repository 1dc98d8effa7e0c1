"""Write recorded calls as Python text: names, expressions, lines."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.program.trace import Call, Variable, function_name, is_inplace

WIDTH = 115
_INLINE_WIDTH = 92

_BINARY: dict[str, type[ast.operator]] = {
    "add": ast.Add,
    "sub": ast.Sub,
    "mul": ast.Mult,
    "div": ast.Div,
    "matmul": ast.MatMult,
    "pow": ast.Pow,
    "bitwise_and": ast.BitAnd,
    "bitwise_or": ast.BitOr,
    "__and__": ast.BitAnd,
    "__or__": ast.BitOr,
    "floor_divide": ast.FloorDiv,
    "remainder": ast.Mod,
    "true_divide": ast.Div,
    "logical_and": ast.BitAnd,
}
_REFLECTED: dict[str, type[ast.operator]] = {
    "__radd__": ast.Add,
    "__rsub__": ast.Sub,
    "__rmul__": ast.Mult,
    "__rdiv__": ast.Div,
    "__rtruediv__": ast.Div,
    "__rpow__": ast.Pow,
    "__rmatmul__": ast.MatMult,
    "rsub": ast.Sub,
}
_COMPARISONS: dict[str, type[ast.cmpop]] = {
    "gt": ast.Gt,
    "ge": ast.GtE,
    "lt": ast.Lt,
    "le": ast.LtE,
    "eq": ast.Eq,
    "ne": ast.NotEq,
}
_UNARY: dict[str, type[ast.unaryop]] = {"neg": ast.USub, "__neg__": ast.USub, "__invert__": ast.Invert}
_SPACES = ((F, "F"), (torch, "torch"), (torch.special, "torch.special"), (torch.linalg, "torch.linalg"))
_RESERVED = frozenset(dir(__builtins__) if not isinstance(__builtins__, dict) else __builtins__) | frozenset(
    [
        "torch",
        "F",
        "math",
        "state",
        "saved",
        "grads",
        "forward",
        "backward",
        "run",
        "substate",
        "and",
        "as",
        "assert",
        "break",
        "class",
        "continue",
        "def",
        "del",
        "elif",
        "else",
        "except",
        "finally",
        "for",
        "from",
        "global",
        "if",
        "import",
        "in",
        "is",
        "lambda",
        "None",
        "nonlocal",
        "not",
        "or",
        "pass",
        "raise",
        "return",
        "True",
        "False",
        "try",
        "while",
        "with",
        "yield",
    ]
)
_MAY_SHADOW = frozenset(
    ("input", "hash", "iter", "max", "min", "sum", "abs", "pow", "round", "filter", "map", "slice")
)


class Writer:
    """Turns the calls of one function into lines.

    Args:
        reserved: the names that are taken from the start.
    """

    def __init__(self, reserved: Iterable[str] = (), width: int = WIDTH) -> None:
        self.width = width
        self.names: dict[Variable, str] = {}
        self.inlined: dict[Variable, ast.expr] = {}
        self._operands: dict[Variable, set[Variable]] = {}
        """By an inlined variable: the variables in its expression."""
        self.imports: set[str] = set()
        self._holders: dict[str, Variable | None] = dict.fromkeys(reserved)
        self.last_read: dict[Variable, float] = {}
        self.expressions: dict[Variable, ast.expr] = {}
        """For a variable that is no local name: how it is written."""
        self.symbols: dict[str, str] = {}
        self.used_sizes: set[str] = set()
        self.unit_path = ""

    # --- names ---

    def name(self, variable: Variable, position: float = -1, rebind: bool = False) -> str:
        """The name of a variable. A new variable gets one.

        Args:
            rebind: the name of a variable that no later line reads may be used again.
        """
        if variable in self.names:
            return self.names[variable]
        base = variable.name
        if base in _RESERVED and base not in _MAY_SHADOW:
            base += "_"
        name, n = base, 1
        while not self._is_free(name, position, rebind):
            n += 1
            name = f"{base}_{n}"
        self._holders[name] = variable
        self.names[variable] = name
        return name

    def _is_free(self, name: str, position: float, rebind: bool) -> bool:
        if name not in self._holders:
            return True
        holder = self._holders[name]
        return rebind and holder is not None and self.last_read.get(holder, math.inf) <= position

    # --- lines ---

    def lines(
        self, calls: Sequence[Call], kept: Iterable[Variable], start: int = 0, rebind: bool = False
    ) -> list[str]:
        """The lines of these calls.

        Args:
            kept: variables that something after these calls reads.
            start: the position of the first call in the whole function.
        """
        kept = set(kept)
        reads = Counter(variable for call in calls for variable in call.reads)
        written_inplace = {
            call.outputs for call in calls if call.is_inplace and isinstance(call.outputs, Variable)
        }
        positions = {id(call): start + i for i, call in enumerate(calls)}
        found: list[str] = []
        for i, call in enumerate(calls):
            output = call.outputs
            position = positions[id(call)]
            expression = self.expression(call)
            while self._is_too_long(call, expression) and (operand := self._longest_operand(call)) is not None:
                found += self._own_line(operand, position, rebind)
                expression = self.expression(call)
            if call.is_inplace:
                found += render(
                    ast.Expr(expression) if isinstance(expression, ast.expr) else expression, self.width
                )
                continue
            if (
                isinstance(output, Variable)
                and reads[output] == 1
                and output not in kept
                and output not in written_inplace
                and not output.is_named
                and self._may_inline(calls, i, output)
                and len(ast.unparse(expression)) <= _INLINE_WIDTH
            ):
                self.inlined[output] = expression
                self._extend_reads(call, output)
                continue
            used = {variable for variable in call.writes if reads[variable] or variable in kept}
            if not used and not has_effect(call):
                continue
            if hasattr(call.function, "block"):
                found += self._block_lines(call, expression, used, position, rebind)
                continue
            target = self._target(output, used, position, rebind)
            found += render(ast.Assign([target], expression), self.width)
        return found

    def _extend_reads(self, call: Call, output: Variable) -> None:
        """The line that reads `output` will read the operands of the call."""
        operands: set[Variable] = set()
        for x in call.reads:
            operands |= self._operands.get(x, {x})
        self._operands[output] = operands
        for x in operands:
            if x in self.last_read:
                self.last_read[x] = max(self.last_read[x], self.last_read.get(output, math.inf))

    def _is_too_long(self, call: Call, expression: ast.expr) -> bool:
        """The statement needs several lines, or those of a call would be long."""
        if self.width != WIDTH:
            return False
        target = call.outputs
        name = ast.unparse(self.value(target)) if target in self.expressions else getattr(target, "name", "")
        if len(name) + 3 + _length(expression) <= WIDTH - 6:
            return False
        return not _is_plain_call(expression) or any(
            _length(x) > _INLINE_WIDTH
            for x in expression.args  # pyright: ignore[reportAttributeAccessIssue]
        )

    def _longest_operand(self, call: Call) -> Variable | None:
        """The operand with the longest expression."""
        operands = [x for x in call.reads if x in self.inlined]
        return max(operands, key=lambda x: _length(self.inlined[x]), default=None)

    def _own_line(self, variable: Variable, position: float, rebind: bool) -> list[str]:
        """The line of a variable that was to be part of a longer expression."""
        expression = self.inlined.pop(variable)
        self._operands.pop(variable, None)
        name = self.name(variable, position - 0.5, rebind)  # the line at this position still reads its operands
        return render(ast.Assign([ast.Name(name, ast.Store())], expression), self.width)

    def _block_lines(
        self, call: Call, expression: ast.expr, used: set[Variable], position: float, rebind: bool
    ) -> list[str]:
        if call.function.direction == "forward":
            return render(ast.Assign([self._target(call.outputs, used, position, rebind)], expression))
        block = call.function.block
        path = path_of(block, self.unit_path)
        targets = [self._target(x, used, position, rebind) for x in call.outputs]
        first = ast.Assign([ast.Tuple([ast.Name("layer_grads", ast.Store()), *targets], ast.Store())], expression)
        if not targets:
            first = ast.Assign([ast.Name("layer_grads", ast.Store())], expression)
        add = ast.parse(f"add_grads(grads, {path!r}, layer_grads)").body[0]
        return [*render(first), *render(add)]

    def _may_inline(self, calls: Sequence[Call], i: int, output: Variable) -> bool:
        """No call between the call and its reader writes in place or draws random numbers."""
        for call in calls[i + 1 :]:
            if output in call.reads:
                return not call.is_inplace
            if call.is_inplace or has_effect(call):
                return False
        return False

    def _target(self, outputs: Any, used: set[Variable], position: float, rebind: bool) -> ast.expr:
        if isinstance(outputs, Variable):
            if outputs in self.expressions:
                return self.expressions[outputs]
            if outputs not in used:
                return ast.Name("_", ast.Store())
            return ast.Name(self.name(outputs, position, rebind), ast.Store())
        if isinstance(outputs, (tuple, list)):
            targets = [self._target(x, used, position, rebind) for x in outputs]
            return ast.Tuple(targets, ast.Store())
        return ast.Name("_", ast.Store())

    # --- expressions ---

    def value(self, value: Any) -> ast.expr:
        """The expression of an argument."""
        if isinstance(value, Variable):
            if value in self.inlined:
                return self.inlined[value]
            if value in self.expressions:
                return self.expressions[value]
            if value.path is not None:
                return ast.Subscript(ast.Name("state", ast.Load()), ast.Constant(value.path), ast.Load())
            return ast.Name(self.name(value), ast.Load())
        if isinstance(value, torch.Size) or type(value) is tuple:
            return ast.Tuple([self.value(x) for x in value], ast.Load())
        if isinstance(value, list):
            return ast.List([self.value(x) for x in value], ast.Load())
        if isinstance(value, slice):
            return ast.Call(
                ast.Name("slice", ast.Load()), [self.value(x) for x in (value.start, value.stop, value.step)], []
            )
        if isinstance(value, float) and not math.isfinite(value):
            self.imports.add("import math")
            text = "math.nan" if math.isnan(value) else "math.inf" if value > 0 else "-math.inf"
            return ast.parse(text, mode="eval").body
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return ast.parse(str(value), mode="eval").body
        if isinstance(value, torch.device):
            return ast.Constant(str(value))
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._symbolic(value)
        if isinstance(value, (bool, int, float, str, complex)) or value is None or value is Ellipsis:
            return ast.Constant(value)
        raise NotImplementedError(f"an argument of type {type(value).__name__} cannot be written: {value!r}")

    def _symbolic(self, value: Any) -> ast.expr:
        tree = ast.parse(str(value.node.expr), mode="eval").body
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                node.id = self.symbols.get(node.id) or f"size_{node.id}"
                self.used_sizes.add(node.id)
        return tree

    def size_lines(self, variables: Iterable[Variable]) -> list[str]:
        """The lines that read the dynamic sizes from the shapes of these variables."""
        found: dict[str, str] = {}
        for x in variables:
            for axis, size in enumerate(x.tensor.shape):
                if isinstance(size, torch.SymInt):
                    symbol = str(size.node.expr)
                    name = self.symbols.get(symbol) or f"size_{symbol}"
                    if name in self.used_sizes and symbol.isidentifier():
                        found.setdefault(name, f"{name} = {ast.unparse(self.value(x))}.shape[{axis}]")
        return list(found.values())

    def expression(self, call: Call) -> Any:
        name = function_name(call.function)
        args = list(call.args)
        if hasattr(call.function, "block"):
            return self._block_call(call)
        kwargs = _without_defaults(call.function, call.kwargs)
        if name == "__setitem__":
            target = ast.Subscript(self.value(args[0]), self._index(args[1]), ast.Store())
            return ast.Assign([target], self.value(args[2]))
        if name == "__getitem__":
            return ast.Subscript(self.value(args[0]), self._index(args[1]), ast.Load())
        if not kwargs and _is_operator(call.function):
            if len(args) == 2 and name in _BINARY:
                return ast.BinOp(self.value(args[0]), _BINARY[name](), self.value(args[1]))
            if len(args) == 2 and name in _REFLECTED:
                return ast.BinOp(self.value(args[1]), _REFLECTED[name](), self.value(args[0]))
            if len(args) == 2 and name in _COMPARISONS:
                return ast.Compare(self.value(args[0]), [_COMPARISONS[name]()], [self.value(args[1])])
            if len(args) == 1 and name in _UNARY:
                return ast.UnaryOp(_UNARY[name](), self.value(args[0]))
        keywords = [ast.keyword(key, self.value(value)) for key, value in kwargs.items()]
        if getattr(call.function, "__name__", "") == "__get__":
            return ast.Attribute(self.value(args[0]), name, ast.Load())
        if isinstance(call.function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            args, kwargs = _without_schema_defaults(call.function, args, kwargs)
            keywords = [ast.keyword(key, self.value(value)) for key, value in kwargs.items()]
        path = self._path(call.function, name)
        if path is None:
            function: ast.expr = ast.Attribute(self.value(args[0]), name, ast.Load())
            args = args[1:]
        else:
            function = ast.parse(path, mode="eval").body
        if path is not None and path.startswith("F."):
            self.imports.add("import torch.nn.functional as F")
        return ast.Call(function, [self.value(x) for x in args], keywords)

    def _block_call(self, call: Call) -> ast.expr:
        block = call.function.block
        path = path_of(block, self.unit_path)
        state = ast.Call(ast.Name("substate", ast.Load()), [ast.Name("state", ast.Load()), ast.Constant(path)], [])
        args = [state, *map(self.value, call.args)]
        return ast.Call(ast.Name(call.function.__name__, ast.Load()), args, [])

    def _index(self, index: Any) -> ast.expr:
        if isinstance(index, slice):
            parts = [None if x is None else self.value(x) for x in (index.start, index.stop, index.step)]
            return ast.Slice(*parts)
        if isinstance(index, tuple) and len(index) == 1:
            return self._index(index[0])
        if isinstance(index, tuple):
            return ast.Tuple([self._index(x) for x in index], ast.Load())
        return self.value(index)

    def _path(self, function: Any, name: str) -> str | None:
        """The dotted path of a function of torch. None for a method of Tensor."""
        if name in ("_where", "_indicator"):
            return name
        if isinstance(function, torch._ops.OpOverload):
            return f"torch.ops.aten.{name}.{function._overloadname}"
        if isinstance(function, torch._ops.OpOverloadPacket):
            return f"torch.ops.aten.{name}"
        if getattr(Tensor, name, None) is function or _is_tensor_method(function):
            return None
        for space, path in _SPACES:
            if getattr(space, name, None) is function:
                return f"{path}.{name}"
            short = name.removeprefix(f"{path.rpartition('.')[2]}_")
            if getattr(space, short, None) is function:
                return f"{path}.{short}"
        if getattr(torch._C._nn, name, None) is function:  # type: ignore[attr-defined]
            return f"torch._C._nn.{name}"
        if getattr(torch.ops.aten, name, None) is not None and "torch._ops" in str(
            getattr(function, "__module__", "")
        ):
            return f"torch.ops.aten.{name}"
        raise NotImplementedError(f"{function} has no path that can be written")


def operator_name(function: Any) -> str:
    """The name of the torch function that an operator, method or function calls: "mul" for ``a * b``."""
    name = function_name(function)
    return {"rdiv": "div", "rtruediv": "div", "truediv": "div"}.get(
        short := name.strip("_"), short.removeprefix("r") if name.startswith("__r") else short
    )


def path_of(block: Any, unit_path: str) -> str:
    """The path of a block in its unit."""
    return block.path.removeprefix(f"{unit_path}.") if unit_path else block.path


def _is_plain_call(expression: Any) -> bool:
    """A call like ``torch.where(...)``, which may have its arguments on lines of their own."""
    return isinstance(expression, ast.Call) and not any(
        isinstance(x, (ast.Call, ast.Subscript, ast.BinOp)) for x in ast.walk(expression.func)
    )


def _length(expression: Any) -> int:
    return len(ast.unparse(expression))


def _is_tensor_method(function: Any) -> bool:
    return getattr(function, "__qualname__", "").partition(".")[0] in ("Tensor", "TensorBase")


def _is_operator(function: Any) -> bool:
    name = function_name(function)
    if _is_tensor_method(function):
        return True
    return getattr(Tensor, name, None) is function or getattr(torch, name, None) is function


def has_effect(call: Call) -> bool:
    """The call draws random numbers or writes into a tensor, so its position matters."""
    name = function_name(call.function)
    if hasattr(call.function, "block"):
        return True
    if name in _UPDATES_BUFFERS:
        return call.args[5] is not False  # in evaluation mode it does not
    return is_inplace(call.function) or name in RANDOM


RANDOM = frozenset(
    [
        "dropout",
        "native_dropout",
        "bernoulli",
        "rand",
        "randn",
        "rand_like",
        "randn_like",
        "randint",
        "randint_like",
        "normal",
        "multinomial",
        "randperm",
        "rrelu",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
        "_scaled_dot_product_attention_math",
    ]
)
_UPDATES_BUFFERS = frozenset(("_batch_norm_impl_index", "batch_norm", "native_batch_norm", "instance_norm"))


_FACTORY_DEFAULTS = (
    ("pin_memory", False),
    ("pin_memory", None),
    ("layout", None),
    ("device", None),
    ("dtype", None),
)


def _without_defaults(function: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(function, FunctionType):
        return {name: value for name, value in kwargs.items() if (name, value) not in _FACTORY_DEFAULTS}
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a method of C++ with a wrapper
        return kwargs
    return {
        name: value
        for name, value in kwargs.items()
        if isinstance(value, Variable) or name not in parameters or parameters[name].default is not value
    }


def _without_schema_defaults(
    function: Any, args: list[Any], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of an operator of torch without those that have their default."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        if len(function.overloads()) > 1:
            return args, kwargs
        function = getattr(function, function.overloads()[0])
    defaults = {x.name: x.default_value for x in function._schema.arguments if x.has_default_value()}
    names = [x.name for x in function._schema.arguments]

    def is_default(name: str, value: Any) -> bool:
        return name in defaults and not isinstance(value, Variable) and value == defaults[name]

    kwargs = {name: value for name, value in kwargs.items() if not is_default(name, value)}
    args = list(args)
    while args and is_default(names[len(args) - 1], args[-1]):
        args.pop()
    return args, kwargs


# --- layout ---


def render(statement: ast.stmt, width: int = WIDTH, indent: int = 4) -> list[str]:
    """The lines of a statement, laid out as ruff does, for a function body indented by `indent`."""
    text = _format_numbers(ast.unparse(ast.fix_missing_locations(statement)))
    text = text.replace("'", '"') if "'" in text and '"' not in text else text
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Tuple):
        head, _, tail = text.partition(" = ")
        text = f"{_without_parentheses(head)} = {tail}"
    head, _, value = text.partition(" = ")
    if (
        len(text) > width - indent
        and isinstance(statement, ast.Assign)
        and (not _is_plain_call(statement.value) or len(head) + len(value.partition("(")[0]) > width - indent - 4)
    ):
        return [f"{head} = (", *(f"    {x}" for x in split_line(value, width - indent - 4)), ")"]
    return split_line(text, width - indent)


def _without_parentheses(text: str) -> str:
    """A tuple without the parentheses around it."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1]


def _format_numbers(text: str) -> str:
    """Powers of simple operands without spaces, exponents without a plus."""
    text = re.sub(r"(?<=[\w.\]]) \*\* (?=-?[\w.]+)", "**", text)
    return re.sub(r"(?<=\d)e\+(?=\d)", "e", text)


def wrap(text: str) -> str:
    """The text with its long lines broken."""
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()))
        lines += [indent + x for x in split_line(line.lstrip(), WIDTH - len(indent))]
    return "\n".join(lines)


def split_line(text: str, width: int) -> list[str]:
    """Break a long line inside its last outer bracket."""
    if len(text) <= width:
        return [text]
    start, end = _outer_bracket(text)
    if start is None or end is None:
        return [text]
    head, body, tail = text[: start + 1], text[start + 1 : end], text[end:]
    indented = "    "
    is_call = start > 0 and (text[start - 1].isalnum() or text[start - 1] in "_])")
    if is_call and len(indented + body) <= width and not body.rstrip().endswith(","):
        return [head, indented + body, *split_line(tail, width)]
    parts = _split_at_commas(body)
    if len(parts) == 1:
        return [head, *(indented + x for x in split_line(body, width - 4)), *split_line(tail, width)]
    lines = [x for part in parts for x in _with_comma(split_line(part, width - 5))]
    return [head, *(indented + x for x in lines), *split_line(tail, width)]


def _with_comma(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1] + ","]


def _outer_bracket(text: str) -> tuple[int | None, int | None]:
    """The positions of the last bracket pair at depth 0 that is not empty."""
    depth, start, found = 0, 0, (None, None)
    for i, character in _outside_strings(text):
        if character in "([{":
            if depth == 0:
                start = i
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0 and i > start + 1:
                found = (start, i)
    return found


def _split_at_commas(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, character in _outside_strings(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [x for x in parts if x]


def _outside_strings(text: str) -> Iterator[tuple[int, str]]:
    quote = ""
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            yield i, character
