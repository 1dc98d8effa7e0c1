"""The table of operations, which the tests, the coverage page and the benchmarks read.

Each file in `manualgrad.ops` registers its operations, with the inputs to test them on:

    register(
        gelu,
        sample_inputs=lambda t: [SampleInput(t(5, 3))],
        benchmark_input=lambda t: SampleInput(t(1024, 1024)),
    )

torch's function is found by its name. This file is data only: it imports nothing of manualgrad.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

ArgumentPath = int | str | tuple[int | str, int]
"""The position or keyword of an argument; for a tensor in a list, the list's and the index in it."""


class SampleInput:
    """The arguments of one call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.gradient_is_derivative = True
        self.derivative_after: Callable[[Tensor], Tensor] | None = None

    def with_surrogate_gradient(self, derivative_after: Callable[[Tensor], Tensor] | None = None) -> SampleInput:
        """Declare that torch defines the gradient differently from the derivative.

        Finite differences do not apply then. With `derivative_after` they apply to the composition: the gradient
        is the derivative if the first argument is an output of that function.
        """
        self.gradient_is_derivative = False
        self.derivative_after = derivative_after
        return self

    def differentiable_paths(self) -> list[ArgumentPath]:
        """The tensors that have a gradient."""
        return [path for path in self._floating_paths() if not hasattr(self[path], "no_grad")]

    def no_grad_paths(self) -> list[ArgumentPath]:
        """The floating-point tensors that have no gradient."""
        return [path for path in self._floating_paths() if hasattr(self[path], "no_grad")]

    def with_requires_grad(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments, in which differentiable tensors are new leaves that require grad."""
        paths = self.differentiable_paths()
        leaves = self.replace(paths, [self[path].detach().clone().requires_grad_() for path in paths])
        return list(leaves.args), leaves.kwargs

    def tensor_paths(self) -> list[ArgumentPath]:
        found: list[ArgumentPath] = []
        for path, value in [*enumerate(self.args), *self.kwargs.items()]:
            if isinstance(value, Tensor):
                found.append(path)
            elif isinstance(value, list):
                found += [(path, i) for i, x in enumerate(value) if isinstance(x, Tensor)]
        return found

    def _floating_paths(self) -> list[ArgumentPath]:
        return [path for path in self.tensor_paths() if self[path].is_floating_point() or self[path].is_complex()]

    def __getitem__(self, path: ArgumentPath) -> Any:
        if isinstance(path, tuple):
            return self[path[0]][path[1]]
        return self.args[path] if isinstance(path, int) else self.kwargs[path]

    def replace(self, paths: Iterable[ArgumentPath], values: Iterable[Any]) -> SampleInput:
        """A copy with other values at these paths."""
        args, kwargs = map(_copy_list, self.args), {name: _copy_list(value) for name, value in self.kwargs.items()}
        other = SampleInput(*args, **kwargs)
        for path, value in zip(paths, values, strict=True):
            if hasattr(self[path], "no_grad") and isinstance(value, Tensor):
                value.no_grad = True  # type: ignore[attr-defined]
            if isinstance(path, tuple):
                other[path[0]][path[1]] = value
            elif isinstance(path, int):
                other.args = (*other.args[:path], value, *other.args[path + 1 :])
            else:
                other.kwargs[path] = value
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


def _copy_list(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


@dataclass
class TensorFactory:
    """Makes random tensors of one dtype and device. The same seed gives the same tensors."""

    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __call__(self, *shape: int, low: float | None = None, high: float | None = None) -> Tensor:
        """Standard normal, or uniform on [low, high)."""
        if low is None or high is None:
            values = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        else:
            values = torch.rand(shape, dtype=torch.float64, generator=self.generator) * (high - low) + low
        return values.to(self.dtype).to(self.device)

    def no_grad(self, *shape: int, low: float | None = None, high: float | None = None) -> Tensor:
        """The same, for an argument that has no gradient in torch."""
        tensor = self(*shape, low=low, high=high)
        tensor.no_grad = True  # type: ignore[attr-defined]
        return tensor

    def index(self, below: int, *shape: int) -> Tensor:
        """Integers in [0, below)."""
        return torch.randint(below, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Op:
    """A function of torch.nn.functional or torch, with the inputs to test it on. See `register`."""

    implementation: FunctionType | str
    reference: Callable[..., Any]
    """torch's function."""
    file: str
    """The file in manualgrad/ops, without ".py"."""
    sample_inputs: Callable[[TensorFactory], Iterable[SampleInput]]
    benchmark_input: Callable[[TensorFactory], SampleInput]
    random: bool
    supports_special_values: bool
    expected_failures: Mapping[str, str]
    skips: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.implementation if isinstance(self.implementation, str) else self.implementation.__name__

    @property
    def function(self) -> Callable[..., Any]:
        """manualgrad's function."""
        if isinstance(self.implementation, str):
            return functional_namespace[self.implementation]
        return self.implementation

    def __repr__(self) -> str:
        return self.name


_table: dict[str, Op] = {}
_graph_table: dict[str, Op] = {}
kernel_replacements: dict[Any, Callable[..., Any]] = {}
"""By a kernel of torch, which torch's functions call: the rule or function that replaces it (see
`manualgrad.ops.registration.implements`). The rest of torch's function (checks, warnings, broadcasting) is used
unchanged."""
functional_namespace: dict[str, Any] = {}
"""The namespace of `manualgrad.nn.functional`. That module sets it."""
registration_hooks: list[Callable[[Any], None]] = []
"""Called with torch's function after each registration that follows the import of manualgrad. A hook may raise an
error, which undoes the registration."""


def _add(table: dict[Any, Any], key: Any, value: Any, reference: Any) -> None:
    if key in table:
        raise ValueError(f"{getattr(key, '__name__', key)} is registered already")
    table[key] = value
    try:
        for hook in registration_hooks:
            hook(reference)
    except BaseException:
        del table[key]
        raise


def register_kernel_replacement(kernel: Any, replacement: Callable[..., Any]) -> None:
    """Register a function that replaces a kernel of torch.

    Raises:
        ValueError: the kernel is registered already, or torch.nn calls it and manualgrad is imported already.
    """
    _add(kernel_replacements, kernel, replacement, kernel)


def register(
    function: Any,
    *,
    reference: Callable[..., Any] | None = None,
    sample_inputs: Callable[[TensorFactory], Iterable[SampleInput]],
    benchmark_input: Callable[[TensorFactory], SampleInput],
    random: bool = False,
    supports_special_values: bool = True,
    expected_failures: Mapping[str, str] | None = None,
    skips: Mapping[str, str] | None = None,
    in_graphs_only: bool = False,
) -> None:
    """Register an operation.

    Args:
        function: manualgrad's function, named as in torch.nn.functional or torch. If torch's own function is used
            and only the kernels that it calls are replaced: its name.
        reference: torch's function, if it is in neither namespace.
        sample_inputs: small inputs, away from kinks. Every law is checked on each of them.
        benchmark_input: an input as large as in real models.
        random: the result depends on the random state.
        supports_special_values: the floating-point inputs may hold ±0, ±inf, nan and the kinks.
        expected_failures: the reason by the name of a law that does not hold, or "law-2" for the third sample
            only. The coverage page prints the reasons. A law that holds nevertheless fails a test.
        skips: the same for tests that are not run.
        in_graphs_only: an operator that only programs of whole models need (see `manualgrad.program`). It never
            takes the place of torch's function, and is in `graph_ops` instead of `ops`.

    Raises:
        ValueError: the name is registered already, or torch.nn calls the function and manualgrad is imported
            already.
    """
    name = function if isinstance(function, str) else function.__name__
    torch_function = reference or getattr(torch.nn.functional, name, None) or getattr(torch, name)
    op = Op(
        implementation=function,
        reference=torch_function,
        file=sys._getframe(1).f_globals["__name__"].rpartition(".")[2],
        sample_inputs=sample_inputs,
        benchmark_input=benchmark_input,
        random=random,
        supports_special_values=supports_special_values,
        expected_failures=expected_failures or {},
        skips=skips or {},
    )
    if in_graphs_only:
        _graph_table[op.name] = op
    else:
        _add(_table, op.name, op, torch_function)


def ops() -> dict[str, Op]:
    """The operations of torch.nn by name, in alphabetical order."""
    return dict(sorted(_table.items()))


def graph_ops() -> dict[str, Op]:
    """The operators that only programs of whole models need, likewise."""
    return dict(sorted(_graph_table.items()))
