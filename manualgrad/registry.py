"""The one table of operations. The laws in tests, the coverage page and the benchmarks all read it.

An operation registers itself where it is defined, with the inputs it is to be tried on:

    register(
        gelu,
        sample_inputs=lambda t: [SampleInput(t(5, 3))],
        benchmark_input=lambda t: SampleInput(t(1024, 1024)),
    )

torch's counterpart is found by name, so a table entry never repeats what torch already says.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

Place = int | str | tuple[int | str, int]
"""Where an argument stands; of one in a list of tensors, where the list stands and where it stands in the list."""


class SampleInput:
    """The arguments of one call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.gradient_is_derivative = True
        self.after: Callable[[Tensor], Tensor] | None = None

    def with_gradient_by_definition(self, after: Callable[[Tensor], Tensor] | None = None) -> SampleInput:
        """The gradient is what torch defines it to be, not the derivative: no finite difference shows it.

        It may be the derivative of the whole, if the first argument has come through the function `after`.
        """
        self.gradient_is_derivative = False
        self.after = after
        return self

    def differentiable(self) -> list[Place]:
        """Where the tensors stand that have a gradient."""
        return [place for place in self._floating() if not hasattr(self[place], "fixed")]

    def fixed(self) -> list[Place]:
        """Where the tensors of numbers stand that have no gradient."""
        return [place for place in self._floating() if hasattr(self[place], "fixed")]

    def marked(self) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, those tensors requiring a gradient that have one."""
        places = self.differentiable()
        leaves = self.replace(places, [self[place].detach().clone().requires_grad_() for place in places])
        return list(leaves.args), leaves.kwargs

    def tensors(self) -> list[Place]:
        """Where tensors stand."""
        found: list[Place] = []
        for place, value in [*enumerate(self.args), *self.kwargs.items()]:
            if isinstance(value, Tensor):
                found.append(place)
            elif isinstance(value, list):
                found += [(place, i) for i, x in enumerate(value) if isinstance(x, Tensor)]
        return found

    def _floating(self) -> list[Place]:
        return [place for place in self.tensors() if self[place].is_floating_point() or self[place].is_complex()]

    def __getitem__(self, place: Place) -> Any:
        if isinstance(place, tuple):
            return self[place[0]][place[1]]
        return self.args[place] if isinstance(place, int) else self.kwargs[place]

    def replace(self, places: Iterable[Place], values: Iterable[Any]) -> SampleInput:
        """The same call with other arguments at some places."""
        args, kwargs = map(_copied, self.args), {name: _copied(value) for name, value in self.kwargs.items()}
        other = SampleInput(*args, **kwargs)
        for place, value in zip(places, values, strict=True):
            if hasattr(self[place], "fixed") and isinstance(value, Tensor):
                value.fixed = True  # type: ignore[attr-defined]
            if isinstance(place, tuple):
                other[place[0]][place[1]] = value
            elif isinstance(place, int):
                other.args = (*other.args[:place], value, *other.args[place + 1 :])
            else:
                other.kwargs[place] = value
        return other

    def __repr__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, Tensor):
                return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
            if isinstance(value, list):
                return f"[{', '.join(map(show, value))}]"
            return repr(value)

        named = [f"{name}={show(value)}" for name, value in self.kwargs.items()]
        return ", ".join([*map(show, self.args), *named])


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


@dataclass
class TensorFactory:
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
    """One function of torch.nn.functional with what is needed to try it."""

    implementation: FunctionType | str
    reference: Callable[..., Any]
    """torch's own."""
    area: str
    sample_inputs: Callable[[TensorFactory], Iterable[SampleInput]]
    benchmark_input: Callable[[TensorFactory], SampleInput]
    random: bool
    supports_special_values: bool
    expected_failures: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.implementation if isinstance(self.implementation, str) else self.implementation.__name__

    @property
    def function(self) -> Callable[..., Any]:
        """Ours."""
        if isinstance(self.implementation, str):
            return getattr(importlib.import_module("manualgrad.nn.functional"), self.name)
        return self.implementation

    def __repr__(self) -> str:
        return self.name


_table: dict[str, Op] = {}
kernel_replacements: dict[Any, Callable[..., Any]] = {}
"""Ours for operations that torch's functions call, and call in ours once bound (see `elementary.implements`). What
torch's function checks, warns of and broadcasts before it calls them needs no copy."""
observers: list[Callable[[Any], None]] = []
"""Called with torch's function whenever one has been entered after manualgrad was imported. One may refuse."""


def _enter(table: dict[Any, Any], key: Any, value: Any, torchs: Any) -> None:
    if key in table:
        raise ValueError(f"{getattr(key, '__name__', key)} is registered already")
    table[key] = value
    try:
        for observe in observers:
            observe(torchs)
    except BaseException:
        del table[key]
        raise


def register_kernel(kernel: Any, ours: Callable[..., Any]) -> None:
    """Enter ours for an operation that torch's functions call.

    Raises:
        ValueError: it is registered already, or torch.nn calls it and has been bound to ours already.
    """
    _enter(kernel_replacements, kernel, ours, kernel)


def register(
    function: Any,
    *,
    reference: Callable[..., Any] | None = None,
    sample_inputs: Callable[[TensorFactory], Iterable[SampleInput]],
    benchmark_input: Callable[[TensorFactory], SampleInput],
    random: bool = False,
    supports_special_values: bool = True,
    expected_failures: Mapping[str, str] | None = None,
) -> None:
    """Enter an operation into the table.

    Args:
        function: ours, named as in torch.nn.functional, or if it is not there, in torch; the name alone of one
            that calls ours and is torch's own otherwise.
        reference: torch's own, where it stands in neither.
        sample_inputs: small inputs, away from kinks, on which every law is tried.
        benchmark_input: an input of the size that real models have, for the benchmark.
        random: the result depends on the random state.
        supports_special_values: ±0, ±inf, nan and the kinks may stand in its floating inputs.
        expected_failures: laws that do not hold for it ("law-2": on its third sample), each with the reason,
            which users see. A law that holds after all fails a test.

    Raises:
        ValueError: one of this name is registered already; or torch.nn calls it, and the modules were bound to our
            functions when manualgrad was imported.
    """
    name = function if isinstance(function, str) else function.__name__
    theirs = reference or getattr(torch.nn.functional, name, None) or getattr(torch, name)
    area = sys._getframe(1).f_globals["__name__"].rpartition(".")[2]
    op = Op(
        implementation=function,
        reference=theirs,
        area=area,
        sample_inputs=sample_inputs,
        benchmark_input=benchmark_input,
        random=random,
        supports_special_values=supports_special_values,
        expected_failures=expected_failures or {},
    )
    _enter(_table, op.name, op, theirs)


def _areas() -> list[ModuleType]:
    package = importlib.import_module("manualgrad.ops")
    return [
        importlib.import_module(area.name) for area in pkgutil.iter_modules(package.__path__, "manualgrad.ops.")
    ]


def ops() -> dict[str, Op]:
    """Every operation by its name in torch.nn.functional, in alphabetical order."""
    _areas()
    return dict(sorted(_table.items()))
