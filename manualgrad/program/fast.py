"""The variant of a program that `Program.module` runs: the same operations, without what makes the text readable.

all modules in one function       tensors are passed by position
temporaries are written into      where the program made an operand and reads it for the last time
tensors are freed                 after the last line that reads them
vendor kernels                    compute the gradients that they compute in eager mode
"""

from __future__ import annotations

import ast
import itertools
import linecache
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from manualgrad.program.backward import Backward
from manualgrad.program.capture import Graph
from manualgrad.program.text import Writer, operator_name
from manualgrad.program.trace import Call, Variable
from manualgrad.rule import inplace

_UNARY = frozenset(
    ("neg", "exp", "log", "sqrt", "rsqrt", "sigmoid", "tanh", "erf", "square", "reciprocal", "sin", "cos")
)
_BINARY = frozenset(("add", "sub", "mul", "div"))
_counter = itertools.count()


class FastProgram:
    """Two functions of positional arguments.

    Attributes:
        state: the parameters and buffers that ``forward`` takes, before the inputs.
        forward: (*state, *inputs) -> (outputs, saved)
        backward: (saved, *grad_outputs) -> a gradient or None for each argument of ``forward``. It empties the
            list ``saved``.
    """

    def __init__(
        self,
        graph: Graph,
        outputs: Sequence[Variable],
        min_elements: int,
        vendor_kernels: bool,
        reuse: bool = True,
        differentiable: bool = False,
    ) -> None:
        self.graph, self.outputs = graph, outputs
        backward = Backward(
            graph.trace, graph.steps, outputs, vendor_kernels=vendor_kernels, differentiable=differentiable
        )
        constants = set(graph.constants)
        backward.recompute({*constants, *graph.state.values()}, min_elements)
        saved = backward.find_saved(constants)
        forward_calls = [call for step in graph.steps for call in step.calls]
        read = {x for call in forward_calls for x in call.reads}
        self.state = [path for path, x in graph.state.items() if x in read]
        arguments = [*(graph.state[path] for path in self.state), *graph.inputs]
        writer = _PositionalWriter(constants, graph.symbols)
        self.forward_source = writer.function("forward", arguments, forward_calls, outputs, saved)
        calls = [call for section in backward.sections for call in section.calls]
        gradients = [backward.gradients.get(x) if x.needs_grad else None for x in arguments]
        results = [x for x in gradients if x is not None]
        if reuse:
            calls = reuse_temporaries(use_fast_masks(calls), results)
        writer.keep(saved)
        grads = [backward.output_gradients.get(x) for x in outputs]
        self.backward_source = writer.backward(saved, grads, calls, gradients)
        scope = {
            "_where": inplace.where,
            "_indicator": inplace._indicator,
            "torch": torch,
            "F": F,
            "math": math,
            **{x.name: value for x, value in graph.constants.items()},
        }
        self.forward = _compile(self.forward_source, "forward", scope)
        self.backward = _compile(self.backward_source, "backward", scope)


def _compile(source: str, name: str, scope: dict[str, Any]) -> Callable[..., Any]:
    path = f"<{name} of a program {next(_counter)}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    namespace = dict(scope)
    exec(compile(source, path, "exec"), namespace)
    return namespace[name]


class _PositionalWriter:
    def __init__(self, constants: Iterable[Variable], symbols: dict[str, str]) -> None:
        self.writer = Writer(width=10**6)
        self.writer.symbols = symbols
        for x in constants:
            self.writer.expressions[x] = ast.Name(x.name, ast.Load())

    def keep(self, variables: Iterable[Variable]) -> None:
        """Start a new function in which these variables have the names that they have now."""
        names = {x: self.writer.name(x) for x in variables}
        constants, symbols = self.writer.expressions, self.writer.symbols
        self.writer = Writer(width=10**6)
        self.writer.expressions, self.writer.symbols = constants, symbols
        self.writer.names = names
        self.writer._holders = {name: x for x, name in names.items()}

    def _name(self, variable: Variable) -> str:
        if variable in self.writer.expressions:
            return variable.name
        if variable.path is not None and variable not in self.writer.names:
            path, variable.path = variable.path, None
            name = self.writer.name(variable)
            variable.path = path
            self.writer.expressions[variable] = ast.Name(name, ast.Load())
            return name
        return self.writer.name(variable)

    def function(
        self,
        name: str,
        arguments: Sequence[Variable],
        calls: Sequence[Call],
        outputs: Sequence[Variable],
        saved: Sequence[Variable],
    ) -> str:
        names = [self._name(x) for x in arguments]
        lines = self._lines(calls, {*outputs, *saved}, {*outputs, *saved, *arguments})
        lines[:0] = self.writer.size_lines(arguments)
        result = ", ".join(self._name(x) for x in outputs)
        result = result if len(outputs) == 1 else f"({result},)"
        lines.append(f"return {result}, ({''.join(f'{self._name(x)}, ' for x in saved)})")
        return _join(f"def {name}({', '.join(names)}):", lines)

    def backward(
        self,
        saved: Sequence[Variable],
        grads: Sequence[Variable | None],
        calls: Sequence[Call],
        gradients: Sequence[Variable | None],
    ) -> str:
        parameters = ["saved", *(f"_{i}" if x is None else self._name(x) for i, x in enumerate(grads))]
        head = [f"{''.join(f'{self._name(x)}, ' for x in saved)} = saved", "saved.clear()"] if saved else []
        results = {x for x in gradients if x is not None}
        lines = self._lines(calls, results, results)
        head += self.writer.size_lines([*saved, *(x for x in grads if x is not None)])
        values = ["None" if x is None else self._name(x) for x in gradients]
        return _join(f"def backward({', '.join(parameters)}):", [*head, *lines, f"return ({', '.join(values)},)"])

    def _lines(self, calls: Sequence[Call], kept: set[Variable], alive: set[Variable]) -> list[str]:
        """The lines. Each variable is deleted after its last use."""
        last: dict[Variable, int] = {}
        for i, call in enumerate(calls):
            for x in (*call.reads, *call.writes):
                last[x] = i
        found: list[str] = []
        for i, call in enumerate(calls):
            later = {x for x in last if last[x] > i}
            found += self.writer.lines([call], kept | later)
            dead = sorted(
                self.writer.names[x]
                for x in {*call.reads, *call.writes}
                if last[x] == i and x not in alive and x in self.writer.names and x not in self.writer.expressions
            )
            if dead and found:
                found[-1] += f"; del {', '.join(dead)}"
        return found


def _join(head: str, lines: Iterable[str]) -> str:
    return "\n".join([head, *(f"    {x}" for x in lines), ""])


def storage(variable: Variable) -> int:
    return variable.tensor.untyped_storage()._cdata


def reuse_temporaries(calls: Sequence[Call], results: Iterable[Variable]) -> list[Call]:
    """The calls with ``out=`` where an operand may be overwritten.

    Args:
        results: variables that are read after the calls.
    """
    last_read: dict[int, float] = {}
    for i, call in enumerate(calls):
        for x in call.reads:
            last_read[storage(x)] = i
    for x in results:
        last_read[storage(x)] = math.inf
    made: set[int] = set()
    memory: dict[int, int] = {}
    """By the storage of a fake tensor: the storage that holds its values now."""

    def where(x: Variable) -> int:
        found = storage(x)
        while found in memory:
            found = memory[found]
        return found

    # the last read of a memory is that of all the tensors that will be written into it
    found = []
    for i, call in enumerate(calls):
        target = None
        for x in _candidates(call):
            if where(x) in made and last_read.get(where(x), -1) == i and call.reads.count(x) == 1:
                target = x
                break
        for x in call.writes:
            if storage(x) not in {storage(y) for y in call.reads}:
                made.add(storage(x))
        if target is None:
            found.append(call)
            continue
        output: Any = call.outputs
        memory[storage(output)] = where(target)
        last_read[where(target)] = last_read.get(storage(output), i)
        function = getattr(torch, operator_name(call.function))
        args = call.args[::-1] if _is_reflected(call) else call.args
        found.append(Call(function, tuple(args), {"out": target}, output))
    return found


def use_fast_masks(calls: Sequence[Call]) -> list[Call]:
    """Replace `torch.where` and the comparisons that only it reads by faster functions (see rule/inplace.py)."""
    readers: dict[Variable, list[Call]] = {}
    for call in calls:
        for x in call.reads:
            readers.setdefault(x, []).append(call)
    found = []
    for call in calls:
        name = operator_name(call.function)
        output = call.outputs
        if call.function is torch.where and len(call.args) == 3:
            call = Call(FastFunction("_where", inplace.where), call.args, {}, output)
        elif name in (*_COMPARISONS, "bool") and isinstance(output, Variable) and not call.kwargs:
            by_where = all(x.function is torch.where and x.args[0] is output for x in readers.get(output, ()))
            if by_where and len(readers.get(output, ())) == 1:
                args = ("ne", call.args[0], 0) if name == "bool" else (name, *call.args)
                call = Call(FastFunction("_indicator", inplace._indicator), args, {}, output)
        found.append(call)
    return found


_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")


class FastFunction:
    """A function of manualgrad in a fast program."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.__name__, self.function = name, function


def _is_reflected(call: Call) -> bool:
    return (
        getattr(call.function, "__name__", "").startswith("__r")
        and getattr(call.function, "__name__", "") != "__rshift__"
    )


def _candidates(call: Call) -> list[Variable]:
    """The operands with the shape, dtype and layout of the output, for operations that may write into them."""
    name = operator_name(call.function)
    if call.kwargs or name not in _BINARY | _UNARY or not isinstance(call.outputs, Variable):
        return []
    if not isinstance((call.args[::-1] if _is_reflected(call) else call.args)[0], Variable):
        return []
    output = call.outputs.tensor
    return [
        x
        for x in call.args
        if isinstance(x, Variable)
        and x.tensor.shape == output.shape
        and x.tensor.dtype == output.dtype
        and x.tensor.stride() == output.stride()
        and x.tensor.untyped_storage().nbytes() == x.tensor.numel() * x.tensor.element_size()
    ]
