"""The coverage page, ops/COVERAGE.md: ``python -m manualgrad coverage`` measures and prints it.

For each operation it shows in which orders derivatives are correct (manualgrad's and torch's), how much memory is
saved for backward, and the expected failures. A public name of torch.nn without a manual gradient fails a test,
unless it is listed in `NOTHING_TO_DERIVE`.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from manualgrad import nn
from manualgrad.meter import saved_bytes
from manualgrad.registry import Op, SampleInput, TensorFactory, graph_ops, kernel_replacements, ops
from manualgrad.verification.derivatives import along_line, derivative, difference_quotient
from manualgrad.verification.function_under_test import FunctionUnderTest, random_grad_output

NOTHING_TO_DERIVE = {
    "one_hot": "the result is an integer tensor",
    "scaled_mm": "torch has no derivative for it: float8 inference",
    "scaled_grouped_mm": "torch has no derivative for it: float8 inference",
    "scaled_addmm": "torch (2.15) has no derivative for it",
    **dict.fromkeys(
        (
            *("assert_int_or_pair", "boolean_dispatch", "handle_torch_function"),
            *("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
        ),
        "a helper function of torch",
    ),
    **dict.fromkeys(("Module", "Identity", "Container", "RNNBase", "RNNCellBase", "DataParallel"), "a base class"),
    **dict.fromkeys(("Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"), "a container"),
    **dict.fromkeys(("Flatten", "Unflatten"), "a view"),
    **dict.fromkeys(("TransformerEncoder", "TransformerDecoder"), "calls the layers that it is given"),
}
"""By a public name that stays torch's own, the reason."""


# --- names ---


def missing_names() -> list[str]:
    """Public names of torch.nn and torch.nn.functional that would use torch's derivative."""
    covered = ops().keys() | NOTHING_TO_DERIVE.keys()
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
        *(f"functional.{name}" for name in functions if covered.isdisjoint((name, _without_suffix(name)))),
        *(
            name
            for name, value in _modules(torch.nn).items()
            if name not in covered
            and (getattr(nn, name) is value or not called_functions(getattr(nn, name)) & covered)
        ),
    ]


def _without_suffix(name: str) -> str:
    """The function that this one is a variant of: in-place, or with indices."""
    return name.removesuffix("_").removesuffix("_with_indices")


def _modules(namespace: ModuleType) -> dict[str, type[torch.nn.Module]]:
    classes = {name: x for name, x in vars(namespace).items() if not name.startswith("_") and inspect.isclass(x)}
    return {name: x for name, x in classes.items() if issubclass(x, torch.nn.Module)}


@cache
def called_functions(module: type[torch.nn.Module]) -> set[str]:
    """Names of the functions that a module's methods call, directly or as an attribute of ``F`` or ``torch``."""
    names: set[str] = set()
    for function in (value for base in module.__mro__ for value in vars(base).values()):
        if isinstance(function, FunctionType) and "torch.nn.modules.module" not in str(function.__module__):
            instructions = [(x.opname, x.argval) for x in dis.get_instructions(function)]
            for (previous, namespace), (opname, name) in itertools.pairwise([("", ""), *instructions]):
                is_attribute = previous == "LOAD_GLOBAL" and namespace in ("F", "torch", "_VF")
                if opname == "LOAD_GLOBAL" or (is_attribute and opname in ("LOAD_ATTR", "LOAD_METHOD")):
                    names.add(name.removeprefix("_"))
    return names


def modules_calling(op: Op) -> list[str]:
    return sorted(name for name, value in _modules(nn).items() if op.name in called_functions(value))


# --- orders of derivatives ---

CORRECT, WRONG, UNSUPPORTED = "✓", "✗", "–"
_worst_last = (CORRECT, UNSUPPORTED, WRONG).index
MIXTURES = (
    ("r", "f"),
    ("rr", "rf", "fr", "ff"),
    tuple(map("".join, itertools.product("rf", repeat=3))),
    ("rrrr", "ffff", "rfrf", "frfr"),
)
"""Per order, the modes in which derivatives are taken: r for reverse, f for forward, the last one first ("rf" is
forward over reverse)."""


def orders(op: Op) -> tuple[str, str]:
    """A mark for each of orders 1 to 4, manualgrad's and torch's, on the first sample that has a derivative.

    Along a line a derivative is one number. The truth is the difference quotient of manualgrad's derivative of one
    order less, which the laws have compared with the order below it, and so on.
    """
    samples = op.sample_inputs(TensorFactory())
    sample = next(x for x in samples if x.gradient_is_derivative or x.derivative_after)
    args, kwargs = sample.with_requires_grad()
    functions = [_restricted(_composed(f, sample), args, kwargs) for f in (op.function, op.reference)]
    marks = ["", ""]
    for n, mixtures in enumerate(MIXTURES):
        truth, scale = difference_quotient(functions[0], "r" * n)
        tolerance = 1e-7 * scale
        marks = [x + _mark(f, mixtures, truth, tolerance) for x, f in zip(marks, functions, strict=True)]
    return marks[0], marks[1]


def _composed(function: Callable[..., Any], sample: SampleInput) -> Callable[..., Any]:
    first = sample.derivative_after
    return function if first is None else lambda x, *args, **kwargs: function(first(x), *args, **kwargs)


def _restricted(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The function along a line through its inputs."""
    subject = FunctionUnderTest(function, args, kwargs)
    assert subject.output_indices  # cached here, because it cannot be computed under a transform
    directions = [random_grad_output(x, 41 + k) for k, x in enumerate(subject.primals)]
    return along_line(subject.scalar_loss, subject.primals, directions, lambda y: y)


def _mark(function: Callable[..., Any], mixtures: Sequence[str], truth: float, tolerance: float) -> str:
    mark = CORRECT
    for modes in mixtures:
        try:
            value = derivative(function, modes)
        except (NotImplementedError, RuntimeError):
            mark = max(mark, UNSUPPORTED, key=_worst_last)
        else:
            if not abs(value - truth) <= tolerance:
                return WRONG
    return mark


# --- the page ---


class Row(NamedTuple):
    """One operation."""

    name: str
    modules: list[str]
    file: str
    orders: str
    torch_orders: str
    saved: float
    torch_saved: float
    expected_failures: dict[str, str]

    def __str__(self) -> str:
        modules = ", ".join(f"`{name}`" for name in self.modules)
        laws: dict[str, list[str]] = {}
        for law, reason in self.expected_failures.items():
            laws.setdefault(reason, []).append(law)
        failures = "; ".join(f"`{'`, `'.join(names)}`: {reason}" for reason, names in laws.items())
        return (
            f"| `{self.name}` | {modules} | {self.file} | {self.orders} | {self.torch_orders} | "
            f"{self.saved:.3g} | {self.torch_saved:.3g} | {failures} |"
        )


HEADER = """\
| function | called by | file | orders 1-4 | torch: orders 1-4 | saved | torch: saved | expected failures |
|---|---|---|---|---|---|---|---|"""


def row(op: Op) -> Row:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        marks, torch_marks = orders(op)
        saved, torch_saved = (_saved(op, function) for function in (op.function, op.reference))
    failures = {**op.expected_failures, **op.skips}
    return Row(op.name, modules_calling(op), f"`{op.file}.py`", marks, torch_marks, saved, torch_saved, failures)


def _saved(op: Op, function: Callable[..., Any]) -> float:
    """Bytes saved for backward on the benchmark input in float32, per element of the first differentiable one."""
    sample: SampleInput = op.benchmark_input(TensorFactory(torch.float32))
    args, kwargs = sample.with_requires_grad()
    return saved_bytes(function, *args, **kwargs).grand_total / sample[sample.differentiable_paths()[0]].numel()


def summary(marks: Sequence[tuple[str, str]]) -> str:
    """The number of operations that are correct at each order, from the marks of manualgrad and torch."""
    header = "| order | manualgrad: correct | torch: correct | torch: unsupported | torch: wrong |"
    table = [header, "|---|---|---|---|---|"]
    for n in range(4):
        correct = sum(x[n] == CORRECT for x, _ in marks)
        counts = [sum(x[n] == mark for _, x in marks) for mark in (CORRECT, UNSUPPORTED, WRONG)]
        table.append(f"| {n + 1} | {correct} of {len(marks)} | {' | '.join(map(str, counts))} |")
    return "\n".join(table)


_INTRODUCTION = """\
# Coverage

The functions with a manual gradient, measured with torch {version} on the CPU. To update this page, run
`python -m manualgrad coverage > manualgrad/ops/COVERAGE.md`. `tests/test_coverage.py` compares it with new
measurements, and fails on a public name of `torch.nn` that is not covered.

- **orders 1-4**: derivatives of this order are ✓ correct in all combinations of forward and reverse mode, – not
  supported in some (an error), or ✗ wrong in some (without an error). Measured on the first sample input.
- **saved**: bytes saved for backward, on the benchmark input in float32, per element of the first differentiable
  input.
- **expected failures**: laws and tests that do not hold, with the reason. A test fails if one holds after all.

Operations with correct derivatives:
"""


_GRAPH_OPERATORS = """\
## Operators of whole-model programs

`manualgrad.export` needs a rule for every operator between the layers. These rules are under the same laws, but
never take the place of torch's functions in eager mode.
"""


def graph_table() -> str:
    lines = ["| operator | file | orders 1-4 | expected failures |", "|---|---|---|---|"]
    for op in graph_ops().values():
        laws: dict[str, list[str]] = {}
        for law, reason in op.expected_failures.items():
            laws.setdefault(reason, []).append(law)
        failures = "; ".join(f"`{'`, `'.join(names)}`: {reason}" for reason, names in laws.items())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            marks = orders(op)[0]
        lines.append(f"| `{op.name}` | `{op.file}.py` | {marks} | {failures} |")
    return "\n".join(lines)


def main(names: Sequence[str] = ()) -> int:
    """Print the page, or only the rows of some operations. Return the exit status."""
    for name in set(names) - ops().keys():
        print(f"no operation is called {name!r}", file=sys.stderr)
        return 2
    rows = [row(op) for op in ops().values() if not names or op.name in names]
    if not names:
        print(_INTRODUCTION.format(version=torch.__version__.partition("+")[0]))
        print(f"{summary([(x.orders, x.torch_orders) for x in rows])}\n")
    print("\n".join([HEADER, *map(str, rows)]))
    if not names:
        print(f"\n{_GRAPH_OPERATORS}\n{graph_table()}")
    if missing := missing_names():
        print(f"\nNot covered: {', '.join(missing)}")
    return 1 if missing else 0
