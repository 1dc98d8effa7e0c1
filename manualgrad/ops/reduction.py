"""Operators of whole-model programs that reduce or accumulate along axes: sums, means, extrema, variance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manualgrad.ops.elementwise import div, square, sub  # type: ignore[attr-defined]
from manualgrad.ops.indexing import gather
from manualgrad.ops.shapes import IntOrInts, Shape, nonnegative_axes
from manualgrad.ops.views import squeeze, to_dtype
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule

Axes = IntOrInts | None


def _kept(input: Tensor, axes: Shape) -> Shape:
    """The shape of the result with keepdim."""
    return tuple(1 if axis in axes else size for axis, size in enumerate(input.shape))


def _count(input: Tensor, axes: Shape) -> int:
    """The number of elements along some axes. (torch.compile does not trace math.prod of a generator.)"""
    n = 1
    for axis in axes:
        n = n * input.shape[axis]
    return n


class SumFunction(Rule):
    r"""y = Σ x over some axes      ∂L/∂x = g, repeated along them"""

    supports_complex = True

    def forward(input: Tensor, axes: Shape, keepdim: bool, kept: Shape, input_shape: Shape) -> Tensor:
        return input.sum(axes, keepdim)

    def grad_input(grad: Tensor, kept: Shape, input_shape: Shape) -> Tensor:
        return grad.reshape(kept).expand(input_shape)


class MeanFunction(Rule):
    r"""y = Σ x / n over some axes, which have n elements      ∂L/∂x = g / n, repeated along them"""

    supports_complex = True

    def forward(input: Tensor, axes: Shape, keepdim: bool, kept: Shape, input_shape: Shape, n: int) -> Tensor:
        return input.mean(axes, keepdim)

    def grad_input(grad: Tensor, kept: Shape, input_shape: Shape, n: int) -> Tensor:
        return (grad / n).reshape(kept).expand(input_shape)


def sum(input: Tensor, dim: Axes = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.sum`."""
    axes = nonnegative_axes(dim, input.dim())
    input = input if dtype is None or dtype == input.dtype else to_dtype(input, dtype)
    return SumFunction.apply(input, axes, keepdim, _kept(input, axes), tuple(input.shape))


def mean(input: Tensor, dim: Axes = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.mean`."""
    axes = nonnegative_axes(dim, input.dim())
    input = input if dtype is None or dtype == input.dtype else to_dtype(input, dtype)
    n = _count(input, axes)
    return MeanFunction.apply(input, axes, keepdim, _kept(input, axes), tuple(input.shape), n)


class AmaxFunction(Rule):
    r"""y = max x over some axes      ∂L/∂x = g, in equal parts to the elements that are equal to y"""

    def forward(input: Tensor, axes: Shape, keepdim: bool, kept: Shape) -> Tensor:
        return input.amax(axes, keepdim)

    def largest(input: Tensor, output: Tensor, kept: Shape) -> Tensor:
        return (input == output.reshape(kept)).to(input.dtype)

    def grad_input(grad: Tensor, largest: Tensor, axes: Shape, kept: Shape) -> Tensor:
        return largest * grad.reshape(kept) / largest.sum(axes, True)


class AminFunction(AmaxFunction):
    r"""y = min x over some axes      ∂L/∂x as for the maximum"""

    def forward(input: Tensor, axes: Shape, keepdim: bool, kept: Shape) -> Tensor:
        return input.amin(axes, keepdim)


def amax(input: Tensor, dim: Axes = None, keepdim: bool = False) -> Tensor:
    """`torch.amax`."""
    axes = nonnegative_axes(dim, input.dim())
    return AmaxFunction.apply(input, axes, keepdim, _kept(input, axes))


def amin(input: Tensor, dim: Axes = None, keepdim: bool = False) -> Tensor:
    """`torch.amin`."""
    axes = nonnegative_axes(dim, input.dim())
    return AminFunction.apply(input, axes, keepdim, _kept(input, axes))


def _extremum(find: Callable[..., Any], input: Tensor, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The extrema along an axis, gathered at their indices, so that the gradient goes to one element."""
    with torch.no_grad():
        indices = find(input, dim, True)[1]
    values = gather(input, dim, indices)
    return (values, indices) if keepdim else (squeeze(values, dim), indices.squeeze(dim))


def max(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """`torch.max`: of all elements, or values and indices along an axis."""
    return amax(input) if dim is None else _extremum(torch.max, input, dim, keepdim)


def min(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """`torch.min`: of all elements, or values and indices along an axis."""
    return amin(input) if dim is None else _extremum(torch.min, input, dim, keepdim)


def var(
    input: Tensor,
    dim: Axes = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Tensor:
    """`torch.var`: Σ (x - mean)² / (n - correction)."""
    axes = nonnegative_axes(dim, input.dim())
    n = _count(input, axes)
    offset = (1 if unbiased else 0) if correction is None else correction
    return div(sum(square(sub(input, mean(input, axes, True))), axes, keepdim), n - offset)


class RootOfVarianceFunction(Rule):
    r"""y = √x      ∂L/∂x = g / (2 y),  0 where y = 0      (as torch: there the root of a variance has a kink)"""

    def forward(input: Tensor) -> Tensor:
        return torch.sqrt(input)

    def grad_input(grad: Tensor, output: Tensor) -> Tensor:
        return torch.where(output == 0, 0, grad / (2 * output))


def std(
    input: Tensor,
    dim: Axes = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Tensor:
    """`torch.std`: the root of the variance."""
    return RootOfVarianceFunction.apply(var(input, dim, unbiased, keepdim, correction=correction))


class LogsumexpFunction(Rule):
    r"""y = ln Σ eˣ over some axes      ∂y/∂x = e^(x - y)      ∂L/∂x = g e^(x - y)"""

    def forward(input: Tensor, axes: Shape, keepdim: bool, kept: Shape) -> Tensor:
        return torch.logsumexp(input, axes, keepdim)

    def grad_input(grad: Tensor, input: Tensor, output: Tensor, kept: Shape) -> Tensor:
        return grad.reshape(kept) * torch.exp(input - output.reshape(kept))


def logsumexp(input: Tensor, dim: IntOrInts, keepdim: bool = False) -> Tensor:
    """`torch.logsumexp`."""
    axes = nonnegative_axes(dim, input.dim())
    return LogsumexpFunction.apply(input, axes, keepdim, _kept(input, axes))


class CumsumFunction(Rule):
    r"""y[i] = Σ x[j] over j ≤ i, along an axis      ∂L/∂x[j] = Σ g[i] over i ≥ j"""

    supports_complex = True

    def forward(input: Tensor, axis: int) -> Tensor:
        return input.cumsum(axis)

    def grad_input(grad: Tensor, axis: int) -> Tensor:
        return grad.flip(axis).cumsum(axis).flip(axis)


def cumsum(input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.cumsum`."""
    input = input if dtype is None or dtype == input.dtype else to_dtype(input, dtype)
    return CumsumFunction.apply(input, dim)


def _register(
    function: Callable[..., Any], samples: Callable[[Any], Sequence[SampleInput]], **options: Any
) -> None:
    register(
        function,
        sample_inputs=samples,
        benchmark_input=lambda t: samples(t)[0],
        in_graphs_only=True,
        **options,
    )


_register(sum, lambda t: [SampleInput(t(2, 3, 4), (0, -1)), SampleInput(t(2, 3)), SampleInput(t(2, 3), 1, True)])
_register(mean, lambda t: [SampleInput(t(2, 3, 4), (0, -1)), SampleInput(t(2, 3)), SampleInput(t(2, 3), 1, True)])
_register(
    amax,
    lambda t: [SampleInput(t(2, 3, 4), (0, -1)), SampleInput(t(2, 3), 1, True)],
    supports_special_values=False,
)
_register(
    amin,
    lambda t: [SampleInput(t(2, 3, 4), (0, -1)), SampleInput(t(2, 3), 1, True)],
    supports_special_values=False,
)
_register(max, lambda t: [SampleInput(t(2, 3), 1), SampleInput(t(2, 3))], supports_special_values=False)
_register(min, lambda t: [SampleInput(t(2, 3), 0, True)], supports_special_values=False)
_register(
    var,
    lambda t: [SampleInput(t(2, 3), 1), SampleInput(t(2, 3), correction=0)],
    supports_special_values=False,  # infinities have no mean
)
_register(
    std,
    lambda t: [SampleInput(t(2, 3), 1), SampleInput(t(2, 3), correction=0)],
    supports_special_values=False,  # infinities have no mean
)
_register(
    logsumexp,
    lambda t: [SampleInput(t(2, 3), 1), SampleInput(t(2, 3), (0, 1), True)],
    supports_special_values=False,
)
_register(cumsum, lambda t: [SampleInput(t(2, 3), 1)])
