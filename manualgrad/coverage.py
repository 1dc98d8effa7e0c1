"""What is derived by hand, name by name: the page that ``python -m manualgrad coverage`` prints.

Everything in it is measured when it is asked for, on the samples of the table: in which orders derivatives are
right, ours and torch's, and what is kept for backward. A public name of torch.nn or torch.nn.functional that is
neither ours nor declared to have nothing to derive is missing, and fails a test.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from manualgrad import nn
from manualgrad.meter import saved_bytes
from manualgrad.registry import Op, SampleInput, TensorFactory, kernel_replacements, ops
from manualgrad.verification.derivatives import along_line, derivative, difference_quotient
from manualgrad.verification.function_under_test import FunctionUnderTest, random_grad_output

NOTHING_TO_DERIVE = {
    "one_hot": "its result is integers",
    "scaled_mm": "torch has no derivative of it: float8 for inference",
    "scaled_grouped_mm": "torch has no derivative of it: float8 for inference",
    "scaled_addmm": "torch (2.15) has no derivative of it",
    **dict.fromkeys(("assert_int_or_pair", "boolean_dispatch", "handle_torch_function"), "a helper of torch's"),
    **dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), "a helper of torch's"
    ),
    **dict.fromkeys(("Module", "Identity", "Container", "RNNBase", "RNNCellBase", "DataParallel"), "a frame"),
    **dict.fromkeys(("Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"), "a container"),
    **dict.fromkeys(("Flatten", "Unflatten"), "a view"),
    **dict.fromkeys(("TransformerEncoder", "TransformerDecoder"), "calls the layers that it is given"),
}
"""Public names that stay torch's own, each with the reason."""


def missing() -> list[str]:
    """Public names whose derivative torch would take."""
    derived = ops().keys() | NOTHING_TO_DERIVE.keys()
    functions = [
        name
        for name, value in vars(F).items()
        if callable(value)
        and not inspect.isclass(value)
        and not name.startswith("_")
        and value not in kernel_replacements
        if (getattr(value, "__module__", None) or "torch").startswith("torch")
    ]
    return [
        *(f"functional.{name}" for name in functions if derived.isdisjoint((name, _stem(name)))),
        *(
            name
            for name, value in _modules(torch.nn).items()
            if name not in derived and (getattr(nn, name) is value or not called(getattr(nn, name)) & derived)
        ),
    ]


def _stem(name: str) -> str:
    """The function that one is a variant of: written over its input, or with its indices."""
    return name.removesuffix("_").removesuffix("_with_indices")


def _modules(space: ModuleType) -> dict[str, type[torch.nn.Module]]:
    found = {
        name: value for name, value in vars(space).items() if not name.startswith("_") and inspect.isclass(value)
    }
    return {name: value for name, value in found.items() if issubclass(value, torch.nn.Module)}


@cache
def called(module: type[torch.nn.Module]) -> set[str]:
    """Names of the functions that a module's methods call, by themselves or through a namespace."""
    names: set[str] = set()
    for function in (value for base in module.__mro__ for value in vars(base).values()):
        if isinstance(function, FunctionType) and "torch.nn.modules.module" not in str(function.__module__):
            steps = [(step.opname, step.argval) for step in dis.get_instructions(function)]
            for (before, space), (opname, name) in itertools.pairwise([("", ""), *steps]):
                through = before == "LOAD_GLOBAL" and space in ("F", "torch", "_VF")
                if opname == "LOAD_GLOBAL" or (through and opname in ("LOAD_ATTR", "LOAD_METHOD")):
                    names.add(name.removeprefix("_"))
    return names


RIGHT, WRONG, REFUSED = "✓", "✗", "–"
MIXTURES = (
    ("r", "f"),
    ("rr", "rf", "fr", "ff"),
    tuple(map("".join, itertools.product("rf", repeat=3))),
    ("rrrr", "ffff", "rfrf", "frfr"),
)
"""The modes in which derivatives of orders 1 to 4 are taken ("rf": forward over reverse)."""


def orders(op: Op) -> tuple[str, str]:
    """For orders 1 to 4 a mark each, ours and torch's: right in every mixture of modes, silently wrong in one, or
    refused, on the first sample whose gradient is the derivative.

    Along a line a derivative is one number. The truth is the difference quotient of our own, one order lower,
    which the laws have held against the order below in turn.
    """
    call = next(call for call in op.sample_inputs(TensorFactory()) if call.gradient_is_derivative or call.after)
    args, kwargs = call.marked()
    lines = [_along(_of_what_precedes(f, call), args, kwargs) for f in (op.function, op.reference)]
    marks = ["", ""]
    for n, mixtures in enumerate(MIXTURES):
        truth, scale = difference_quotient(lines[0], "r" * n)
        marks = [
            mark + _mark(along, mixtures, truth, 1e-7 * scale) for mark, along in zip(marks, lines, strict=True)
        ]
    return marks[0], marks[1]


def _of_what_precedes(function: Callable[..., Any], call: SampleInput) -> Callable[..., Any]:
    after = call.after
    return function if after is None else lambda x, *args, **kwargs: function(after(x), *args, **kwargs)


_worse = (RIGHT, REFUSED, WRONG).index


def _along(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    subject = FunctionUnderTest(function, args, kwargs)
    assert subject.output_indices  # found out before any transform is on
    directions = [random_grad_output(x, 41 + k) for k, x in enumerate(subject.primals)]
    return along_line(subject.scalar_loss, subject.primals, directions, lambda y: y)


def _mark(along: Callable[..., Any], mixtures: Sequence[str], truth: float, tolerance: float) -> str:
    mark = RIGHT
    for modes in mixtures:
        try:
            found = derivative(along, modes)
        except (NotImplementedError, RuntimeError):
            mark = max(mark, REFUSED, key=_worse)
        else:
            if not abs(found - truth) <= tolerance:
                return WRONG
    return mark


class Row(NamedTuple):
    """What is known of one name."""

    name: str
    modules: list[str]
    file: str
    orders: str
    orders_of_torch: str
    kept: float
    kept_by_torch: float
    expected_failures: dict[str, str]

    def __str__(self) -> str:
        modules = ", ".join(f"`{name}`" for name in self.modules)
        laws: dict[str, list[str]] = {}
        for law, reason in self.expected_failures.items():
            laws.setdefault(reason, []).append(law)
        failures = "; ".join(f"`{'`, `'.join(names)}`: {reason}" for reason, names in laws.items())
        return (
            f"| `{self.name}` | {modules} | {self.file} | {self.orders} | {self.orders_of_torch} | "
            f"{self.kept:.3g} | {self.kept_by_torch:.3g} | {failures} |"
        )


HEAD = """\
| function | modules | derived in | orders 1-4 | torch's | bytes kept | torch | what it lacks, and why |
|---|---|---|---|---|---|---|---|"""


def row(op: Op) -> Row:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        ours, torch_s = orders(op)
        kept, kept_by_torch = (_kept(op, function) for function in (op.function, op.reference))
    return Row(
        op.name, modules_of(op), f"`{op.area}.py`", ours, torch_s, kept, kept_by_torch, dict(op.expected_failures)
    )


def _kept(op: Op, function: Callable[..., Any]) -> float:
    """Bytes kept for backward at the big sample in float32, for each number of the first differentiable tensor."""
    call: SampleInput = op.benchmark_input(TensorFactory(torch.float32))
    args, kwargs = call.marked()
    return saved_bytes(function, *args, **kwargs).grand_total / call[call.differentiable()[0]].numel()


def modules_of(op: Op) -> list[str]:
    return sorted(name for name, value in _modules(nn).items() if op.name in called(value))


def summary(marks: Sequence[tuple[str, str]]) -> str:
    """How many operations are right at each order, from their marks, ours and torch's."""
    lines = ["| order | ours: right | torch: right | refused | silently wrong |", "|---|---|---|---|---|"]
    for n in range(4):
        ours = sum(mark[n] == RIGHT for mark, _ in marks)
        counts = [sum(theirs[n] == mark for _, theirs in marks) for mark in (RIGHT, REFUSED, WRONG)]
        lines.append(f"| {n + 1} | {ours} of {len(marks)} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)
