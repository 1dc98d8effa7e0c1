"""The one table of operations. The laws in tests, the coverage page and the benchmarks all read it.

An operation registers itself where it is defined, with the inputs it is to be tried on:

    register(gelu, GELU, samples=lambda t: [Call(t(5, 3)), Call(t(5, 3), approximate="tanh")])

torch's counterpart is found by name, so a table entry never repeats what torch already says.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor


class Call:
    """The arguments of one call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.gradient_is_derivative = True

    def with_gradient_by_definition(self) -> Call:
        """The gradient is what torch defines it to be, not the derivative: no finite difference shows it."""
        self.gradient_is_derivative = False
        return self

    def differentiable(self) -> list[int | str]:
        """Where the tensors stand that have a gradient."""
        return [place for place in self._floating() if not hasattr(self[place], "fixed")]

    def fixed(self) -> list[int | str]:
        """Where the tensors of numbers stand that have no gradient."""
        return [place for place in self._floating() if hasattr(self[place], "fixed")]

    def marked(self) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, those tensors requiring a gradient that have one."""
        places = self.differentiable()
        leaves = self.replace(places, [self[place].detach().clone().requires_grad_() for place in places])
        return list(leaves.args), leaves.kwargs

    def _floating(self) -> list[int | str]:
        places = [*enumerate(self.args), *self.kwargs.items()]
        return [
            place
            for place, value in places
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        ]

    def __getitem__(self, place: int | str) -> Any:
        return self.args[place] if isinstance(place, int) else self.kwargs[place]

    def replace(self, places: Iterable[int | str], values: Iterable[Any]) -> Call:
        """The same call with other arguments at some places."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for place, value in zip(places, values, strict=True):
            if hasattr(self[place], "fixed") and isinstance(value, Tensor):
                value.fixed = True  # type: ignore[attr-defined]
            if isinstance(place, int):
                args[place] = value
            else:
                kwargs[place] = value
        return Call(*args, **kwargs)

    def __repr__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, Tensor):
                return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
            return repr(value)

        named = [f"{name}={show(value)}" for name, value in self.kwargs.items()]
        return ", ".join([*map(show, self.args), *named])


@dataclass
class Maker:
    """Makes the tensors of a sample: random, of one dtype and device, the same for the same seed."""

    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __call__(self, *shape: int, low: float | None = None, high: float | None = None) -> Tensor:
        """Standard normal, or uniform on [low, high)."""
        if low is None or high is None:
            drawn = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        else:
            drawn = torch.rand(shape, dtype=torch.float64, generator=self.generator) * (high - low) + low
        return drawn.to(self.dtype).to(self.device)

    def fixed(self, *shape: int, low: float | None = None, high: float | None = None) -> Tensor:
        """The same, for an argument that has no gradient (as in torch)."""
        tensor = self(*shape, low=low, high=high)
        tensor.fixed = True  # type: ignore[attr-defined]
        return tensor

    def index(self, below: int, *shape: int) -> Tensor:
        """Integers in [0, below)."""
        return torch.randint(below, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Op:
    """One function of torch.nn.functional (and its module) with what is needed to try it."""

    written: FunctionType | str
    stands_for: tuple[Any, ...]
    samples: Callable[[Maker], Iterable[Call]]
    big: Callable[[Maker], Call]
    random: bool
    special: bool
    lacks: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.written if isinstance(self.written, str) else self.written.__name__

    @property
    def function(self) -> Callable[..., Any]:
        """Ours."""
        if isinstance(self.written, str):
            return getattr(importlib.import_module("manualgrad.nn.functional"), self.name)
        return self.written

    @property
    def reference(self) -> Callable[..., Any]:
        """torch's own function of this name, or the `torch.autograd.Function` that it stands for."""
        named = getattr(torch.nn.functional, self.name, None) or getattr(torch, self.name, None)
        return named or self.stands_for[0].apply

    def __repr__(self) -> str:
        return self.name


_table: dict[str, Op] = {}
stand_ins: dict[Any, FunctionType] = {}
"""Ours for what torch's modules call, where it takes more than one process to try it: no entry of the table."""


def register(
    function: Any,
    *,
    stands_for: tuple[Any, ...] = (),
    samples: Callable[[Maker], Iterable[Call]],
    big: Callable[[Maker], Call],
    random: bool = False,
    special: bool = True,
    lacks: Mapping[str, str] | None = None,
) -> None:
    """Enter an operation into the table.

    Args:
        function: ours, named as in torch.nn.functional, or if it is not there, in torch; the name alone of one
            that calls ours and is torch's own otherwise.
        stands_for: under what else torch's modules call it.
        samples: small inputs, away from kinks, on which every law is tried.
        big: an input of the size that real models have, for the benchmark.
        random: the result depends on the random state.
        special: ±0, ±inf, nan and the kinks may stand in its floating inputs.
        lacks: laws that do not hold for it, each with the reason (shown to users; a stale one fails a test).
    """
    op = Op(function, stands_for, samples, big, random, special, lacks or {})
    _table[op.name] = op


def stand_in(theirs: Any, ours: Any) -> None:
    """Let `ours` be called for `theirs` by torch's modules."""
    stand_ins[theirs] = ours


def _areas() -> list[ModuleType]:
    package = importlib.import_module("manualgrad.ops")
    return [
        importlib.import_module(area.name) for area in pkgutil.iter_modules(package.__path__, "manualgrad.ops.")
    ]


def ops() -> dict[str, Op]:
    """Every operation by its name in torch.nn.functional, in alphabetical order."""
    _areas()
    return dict(sorted(_table.items()))


def markdown() -> str:
    """The table as the README shows it (`python -m manualgrad coverage`)."""
    rows = ["| function | module | derived in | what it lacks, and why |", "|---|---|---|---|"]
    for op in ops().values():
        where = f"{op.function.__module__.rpartition('.')[2]}.py"
        lacks = "; ".join(f"`{law}`: {reason}" for law, reason in op.lacks.items())
        rows.append(f"| `{op.name}` | `{op.module.__name__ if op.module else ''}` | `ops/{where}` | {lacks} |")
    return "\n".join(rows)
