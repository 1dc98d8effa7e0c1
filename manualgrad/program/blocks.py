"""Find modules that a model repeats, so that the program has one pair of functions for all of them.

Two modules are the same block if their calls are the same: the same torch functions with the same constants,
shapes and dtypes, on the same parameters by their names inside the module. A `Unit` is what becomes a pair of
functions: the model itself, or one of the modules that repeat. A `BlockCall` calls the functions of a unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils import _pytree as pytree

from manualgrad.program.capture import Graph, Step
from manualgrad.program.trace import Variable, variables

MIN_STEPS = 3
"""Modules with fewer steps are written out."""


@dataclass(eq=False)
class Unit:
    """What becomes a pair of functions, with the variables of its first occurrence."""

    name: str
    """Empty for the model itself."""
    path: str
    steps: list[Step]
    inputs: list[Variable]
    outputs: list[Variable]
    items: list[Step | BlockCall] = field(default_factory=list)


@dataclass(eq=False)
class BlockCall:
    """A module that the functions of a unit compute."""

    unit: Unit
    path: str
    inputs: list[Variable]
    outputs: list[Variable]

    @property
    def needs_grad(self) -> bool:
        return any(x.needs_grad for x in self.outputs)


class Occurrence:
    """A module with its steps, and what they read and write."""

    def __init__(self, path: str, steps: list[Step], read_outside: set[Variable]) -> None:
        self.path, self.steps = path, steps
        calls = [call for step in steps for call in step.calls]
        written = dict.fromkeys(x for call in calls for x in call.writes)
        self.inputs = list(
            dict.fromkeys(
                x
                for call in calls
                for x in call.reads
                if x not in written and not (x.path or "").startswith(f"{path}.")
            )
        )
        self.outputs = [x for x in written if x in read_outside and x.path is None]
        self.signature = self._signature(written)

    def _signature(self, written: dict[Variable, None]) -> Any:
        tokens: dict[Variable, Any] = {x: ("input", i) for i, x in enumerate(self.inputs)}
        tokens |= {x: ("local", i) for i, x in enumerate(written) if x not in tokens}

        def token(value: Any) -> Any:
            if not isinstance(value, Variable):
                return repr(value)
            name = tokens.get(value) or ("state", (value.path or "").removeprefix(f"{self.path}."))
            return (*name, tuple(value.tensor.shape), value.tensor.dtype, value.needs_grad)

        rules = [
            (step.rule, step.module.removeprefix(self.path), *map(token, pytree.tree_leaves(step.inputs)))
            for step in self.steps
        ]
        calls = [
            (call.function, *map(token, pytree.tree_leaves((call.args, call.kwargs, call.outputs))))
            for step in self.steps
            for call in step.calls
        ]
        return str((rules, calls, [tokens[x] for x in self.outputs]))


def find_units(graph: Graph) -> list[Unit]:
    """The units of a model. Each comes after those that it calls; the model itself is the last."""
    outputs = [x for x in dict.fromkeys(graph.outputs) if isinstance(x, Variable)]
    root = Unit("", "", graph.steps, graph.inputs, outputs)
    occurrences = _occurrences(graph)
    units: dict[str, Unit] = {}
    names: Counter[str] = Counter()
    while True:
        counts: Counter[str] = Counter()
        for unit in (root, *units.values()):
            counts.update(x.signature for x in _modules_in_text(unit, occurrences, units))
        repeated = [x for x in occurrences.values() if counts[x.signature] > 1]
        if not repeated:
            break
        first = min(repeated, key=lambda x: x.path.count("."))  # what it contains may then occur only once
        kind = graph.modules[first.path]
        names[kind] += 1
        name = kind if names[kind] == 1 else f"{kind}{names[kind]}"
        units[first.signature] = Unit(name, first.path, first.steps, first.inputs, first.outputs)
    ordered: list[Unit] = []

    def visit(unit: Unit) -> None:
        unit.items = [*_items(unit, occurrences, units)]
        for item in unit.items:
            if isinstance(item, BlockCall) and item.unit not in ordered:
                visit(item.unit)
        ordered.append(unit)

    visit(root)
    return ordered


def _occurrences(graph: Graph) -> dict[str, Occurrence]:
    """By path: the modules with consecutive steps, outermost first."""
    found: dict[str, Occurrence] = {}
    readers: dict[Variable, list[int]] = {}
    for i, step in enumerate(graph.steps):
        for x in (x for call in step.calls for x in call.reads):
            readers.setdefault(x, []).append(i)
    for x in variables(graph.outputs):
        readers.setdefault(x, []).append(len(graph.steps))
    paths = sorted({path for step in graph.steps for path in _parents(step.module)}, key=lambda x: x.count("."))
    for path in paths:
        positions = [i for i, step in enumerate(graph.steps) if _is_inside(step.module, path)]
        if len(positions) < MIN_STEPS or positions[-1] - positions[0] != len(positions) - 1:
            continue
        steps = graph.steps[positions[0] : positions[-1] + 1]
        written = {x for step in steps for call in step.calls for x in call.writes}
        outside = {x for x in written if any(not positions[0] <= i <= positions[-1] for i in readers.get(x, ()))}
        found[path] = Occurrence(path, steps, outside)
    return found


def _parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _is_inside(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


def _modules_in_text(
    unit: Unit, occurrences: dict[str, Occurrence], units: dict[str, Unit]
) -> Iterator[Occurrence]:
    """The modules that the functions of a unit write out: those that are not in a block of it."""
    blocks = [x.path for x in _blocks(unit, occurrences, units)]
    for path, occurrence in occurrences.items():
        if _is_below(path, unit.path) and not any(_is_inside(path, x) for x in blocks):
            yield occurrence


def _blocks(unit: Unit, occurrences: dict[str, Occurrence], units: dict[str, Unit]) -> list[Occurrence]:
    """The outermost modules inside a unit that are units themselves."""
    found: list[Occurrence] = []
    for path, occurrence in occurrences.items():
        is_new = _is_below(path, unit.path) and not any(_is_inside(path, x.path) for x in found)
        if is_new and occurrence.signature in units:
            found.append(occurrence)
    return found


def _is_below(path: str, parent: str) -> bool:
    return path != parent and (not parent or path.startswith(f"{parent}."))


def _items(unit: Unit, occurrences: dict[str, Occurrence], units: dict[str, Unit]) -> Iterator[Step | BlockCall]:
    """The steps of a unit, with a `BlockCall` for those of each block."""
    blocks = {id(x.steps[0]): x for x in _blocks(unit, occurrences, units)}
    skip = 0
    for step in unit.steps:
        if skip:
            skip -= 1
        elif (block := blocks.get(id(step))) is not None:
            skip = len(block.steps) - 1
            yield BlockCall(units[block.signature], block.path, block.inputs, block.outputs)
        else:
            yield step
