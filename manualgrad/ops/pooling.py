"""Pooling: the largest, the mean or a norm of each window, and the reverse of the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import Numbers, Pointwise, choose, drop_in, each
from manualgrad.ops.padding import pad
from manualgrad.registry import Call, Maker, register
from manualgrad.rule import Rule


@dataclass(frozen=True)
class Pool:
    """Which of torch's functions pools, what it is told besides its tensors, and the sizes that are pooled."""

    name: str
    arguments: tuple[Any, ...]
    sizes: tuple[int, ...]

    def __call__(self, *tensors: Tensor) -> Any:
        return getattr(F, self.name)(*tensors, *self.arguments)


def _pool(axes: int, name: str, input: Tensor, *arguments: Any) -> Pool:
    """A pool over the last axes."""
    plain = tuple(tuple(value) if isinstance(value, list) else value for value in arguments)
    return Pool(name, plain, tuple(input.shape[-axes:]))


def _flat(tensor: Tensor, axes: int) -> Tensor:
    """The last axes as one."""
    pooled = math.prod(tensor.shape[-axes:])
    return tensor.reshape(*tensor.shape[:-axes], pooled)


class MaxPoolFunction(Rule):
    r"""y[i] = max of x over window i = x[j(i)]      j: where the largest stands, a constant statistic

    ⟨g, dy⟩ = Σᵢ g[i] dx[j(i)]:  each x collects the g of every window it was the largest of,
    ∂L/∂x[j] = Σ g[i] over j(i) = j
    """

    statistics = ("indices",)

    def forward(input: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        return pool(input)

    def grad_input(grad: Tensor, indices: Tensor, pool: Pool) -> Tensor:
        axes = len(pool.sizes)
        sent, places = _flat(grad, axes), _flat(indices, axes)
        zeros = grad.new_zeros(*sent.shape[:-1], math.prod(pool.sizes))
        return zeros.scatter_add(-1, places, sent).reshape(*sent.shape[:-1], *pool.sizes)


class Float32MaxPoolFunction(MaxPoolFunction):
    """The ones that autocast widens on the CPU."""

    autocast = {"cpu": "float32"}


class FractionalMaxPoolFunction(Float32MaxPoolFunction):
    """Windows of random places.

    Graham, "Fractional Max-Pooling", 2014.
    """

    def forward(input: Tensor, samples: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        return getattr(F, pool.name)(input, *pool.arguments, _random_samples=samples)


class MaxUnpoolFunction(Rule):
    r"""y[j(i)] = x[i], elsewhere 0      j: indices that a max pool returned

    ⟨g, dy⟩ = Σᵢ g[j(i)] dx[i]      ∂L/∂x[i] = g[j(i)]

    Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014.
    """

    autocast = {"cpu": "float32"}

    def forward(input: Tensor, indices: Tensor, pool: Pool) -> Tensor:
        return pool(input, indices)

    def grad_input(grad: Tensor, indices: Tensor, pool: Pool) -> Tensor:
        axes = len(pool.sizes)
        return _flat(grad, axes).gather(-1, _flat(indices, axes)).reshape(indices.shape)


class Windows(NamedTuple):
    """Those along one axis, and over each place of it."""

    count: Tensor | int  # how many places each window counts
    first: Tensor  # of the windows over each place
    last: Tensor | None  # (None: there is but one)
    overlap: int  # never more than so many


class AveragePool(Rule):
    r"""y[i] = (1/n[i]) Σ x over window i      the rule gives ``windows``, axis by axis

    ⟨g, dy⟩ = Σᵢ (g[i]/n[i]) Σ dx over window i:  each x collects g/n of every window over it. Windows are products
    of intervals, so this is done along one axis after the other.
    """

    def grad_input(grad: Tensor, windows: list[Windows]) -> Tensor:
        for i, along in enumerate(reversed(windows)):
            grad = _returned(grad, -1 - i, along)
        return grad


def _returned(grad: Tensor, axis: int, windows: Windows) -> Tensor:
    """For each place along an axis, the sum of g/n over the windows over it."""
    count, first, last, overlap = windows
    beyond = grad.shape[axis]
    if isinstance(count, Tensor):
        grad = grad / count.reshape(beyond, *[1] * (-1 - axis))
    elif count != 1:
        grad = grad / count
    if last is None:
        return grad.index_select(axis, first)
    grad = pad(grad, (*(0, 0) * (-1 - axis), 0, 1))  # one more window, of zero, where a place has fewer
    total = grad.index_select(axis, torch.where(first <= last, first, beyond))
    for k in range(1, overlap):
        total = total + grad.index_select(axis, torch.where(first + k <= last, first + k, beyond))
    return total


class AvgPoolFunction(AveragePool):
    r"""window i: [s i - p, s i - p + k), of which what lies within the input is summed

    n: what of it lies within the input and its padding, or within the input, or one divisor for all.
    """

    def forward(input: Tensor, pool: Pool) -> Tensor:
        return pool(input)

    def windows(grad: Tensor, pool: Pool) -> list[Windows]:
        kernel, stride, padding, _, include_pad, *divisor = pool.arguments
        axes = len(pool.sizes)
        outputs = grad.shape[-axes:]
        moves = (each(numbers, axes) for numbers in (kernel, stride or kernel, padding))
        found = [
            _regular_windows(n, o, k, s, p, include_pad, grad.device)
            for n, o, k, s, p in zip(pool.sizes, outputs, *moves, strict=True)
        ]
        if divisor and divisor[0]:
            found = [along._replace(count=1) for along in found]
            found[-1] = found[-1]._replace(count=divisor[0])
        return found


def _regular_windows(n: int, o: int, k: int, s: int, p: int, include_pad: bool, device: torch.device) -> Windows:
    place, start = torch.arange(n, device=device) + p, torch.arange(o, device=device) * s - p
    end = (start + k).clamp(max=n + p)
    if not include_pad:
        start, end = start.clamp(min=0), end.clamp(max=n)
    alike = (include_pad or p == 0) and s * (o - 1) + k <= n + 2 * p
    tiled = k == s and p == 0 and s * o >= n
    first, last = ((place - k) // s + 1).clamp(min=0), (place // s).clamp(max=o - 1)
    return Windows(k if alike else end - start, first, None if tiled else last, min(-(-k // s), o))


class Float32AvgPoolFunction(AvgPoolFunction):
    """The one that autocast widens on the CPU."""

    autocast = {"cpu": "float32"}


class AdaptiveAvgPoolFunction(AveragePool):
    r"""window i: [⌊i n / o⌋, ⌈(i + 1) n / o⌉), of n places for o outputs, whose length it divides by"""

    def forward(input: Tensor, pool: Pool) -> Tensor:
        return pool(input)

    def windows(grad: Tensor, pool: Pool) -> list[Windows]:
        outputs = grad.shape[-len(pool.sizes) :]
        return [_adaptive_windows(n, o, grad.device) for n, o in zip(pool.sizes, outputs, strict=True)]


def _adaptive_windows(n: int, o: int, device: torch.device) -> Windows:
    place, window = torch.arange(n, device=device), torch.arange(o, device=device)
    first, last = place * o // n, ((place + 1) * o - 1) // n
    if o and n % o == 0:
        return Windows(n // o, first, None, 1)
    return Windows(((window + 1) * n + o - 1) // o - window * n // o, first, last, (o - 1) // n + 2)


class Float32AdaptiveAvgPoolFunction(AdaptiveAvgPoolFunction):
    """The one that autocast widens on the CPU."""

    autocast = {"cpu": "float32"}


class AbsoluteFunction(Rule):
    r"""y = |x|      dy = Re(s̄ dx),  s = x/|x|:  ∂L/∂x = g s      (at 0: 0, as torch)"""

    complex = True

    def forward(input: Tensor) -> Tensor:
        return input.abs()

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        return grad * input.sgn()


class PowerFunction(Pointwise):
    r"""y = xᵖ      y′ = p xᵖ⁻¹"""

    autocast = {"cuda": "float32"}

    def forward(input: Tensor, exponent: float) -> Tensor:
        return input.pow(exponent)

    def derivative(input: Tensor, exponent: float) -> Tensor:
        return exponent * input.pow(exponent - 1)


class RootFunction(Rule):
    r"""y = (k x)^(1/p)      y′ = (k/p) (k x)^(1/p - 1)      (at 0: 0, as torch, whatever g is)"""

    def forward(input: Tensor, k: int, p: float) -> Tensor:
        return (input.sign() * F.relu(input.abs())).mul(k).pow(1 / p)

    def grad_input(grad: Tensor, input: Tensor, k: int, p: float) -> Tensor:
        nonzero = input != 0
        safe = choose(nonzero, input * k, torch.ones_like(input))
        return choose(nonzero, grad * (k / p) * safe.pow(1 / p - 1))


def _max_pool(
    n: int,
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None,
    padding: Numbers,
    dilation: Numbers,
    ceil_mode: bool,
    return_indices: bool,
) -> Any:
    pool = _pool(n, f"max_pool{n}d_with_indices", input, kernel_size, stride, padding, dilation, ceil_mode)
    rule = Float32MaxPoolFunction if n == 3 and not return_indices else MaxPoolFunction
    return rule.apply(input, pool, with_statistics=return_indices)


@drop_in
def max_pool1d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The largest of each window, and with `return_indices` where it stands, as `torch.nn.functional.max_pool1d`.

    Shapes: input (N, C, L) or (C, L); the result alike.
    """
    if not (input.is_floating_point() or return_indices):  # only torch's kernel that finds indices takes integers
        return _pool(1, "max_pool1d", input, kernel_size, stride, padding, dilation, ceil_mode)(input)
    return _max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@drop_in
def max_pool1d_with_indices(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """`max_pool1d` with its indices, as `torch.nn.functional.max_pool1d_with_indices`."""
    return _max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, True)


@drop_in
def max_pool2d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The largest of each window, and with `return_indices` where it stands, as `torch.nn.functional.max_pool2d`.

    Shapes: input (N, C, H, W) or (C, H, W); the result alike.
    """
    return _max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@drop_in
def max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """`max_pool2d` with its indices, as `torch.nn.functional.max_pool2d_with_indices`."""
    return _max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, True)


@drop_in
def max_pool3d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The largest of each window, and with `return_indices` where it stands, as `torch.nn.functional.max_pool3d`.

    Shapes: input (N, C, D, H, W) or (C, D, H, W); the result alike.
    """
    return _max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@drop_in
def max_pool3d_with_indices(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """`max_pool3d` with its indices, as `torch.nn.functional.max_pool3d_with_indices`."""
    return _max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def _adaptive_max_pool(n: int, input: Tensor, output_size: Numbers, return_indices: bool) -> Any:
    pool = _pool(n, f"adaptive_max_pool{n}d_with_indices", input, output_size)
    rule = Float32MaxPoolFunction if n == 3 else MaxPoolFunction
    return rule.apply(input, pool, with_statistics=return_indices)


@drop_in
def adaptive_max_pool1d(input: Tensor, output_size: Numbers, return_indices: bool = False) -> Any:
    """The largest of each of so many windows, as `torch.nn.functional.adaptive_max_pool1d`.

    Shapes: input (N, C, L) or (C, L); the result alike, of `output_size`.
    """
    return _adaptive_max_pool(1, input, output_size, return_indices)


@drop_in
def adaptive_max_pool1d_with_indices(
    input: Tensor, output_size: Numbers, return_indices: bool = False
) -> tuple[Tensor, Tensor]:
    """`adaptive_max_pool1d` with its indices, as `torch.nn.functional.adaptive_max_pool1d_with_indices`."""
    return _adaptive_max_pool(1, input, output_size, True)


@drop_in
def adaptive_max_pool2d(input: Tensor, output_size: Numbers, return_indices: bool = False) -> Any:
    """The largest of each of so many windows, as `torch.nn.functional.adaptive_max_pool2d`.

    Shapes: input (N, C, H, W) or (C, H, W); the result alike, of `output_size`.
    """
    return _adaptive_max_pool(2, input, output_size, return_indices)


@drop_in
def adaptive_max_pool2d_with_indices(
    input: Tensor, output_size: Numbers, return_indices: bool = False
) -> tuple[Tensor, Tensor]:
    """`adaptive_max_pool2d` with its indices, as `torch.nn.functional.adaptive_max_pool2d_with_indices`."""
    return _adaptive_max_pool(2, input, output_size, True)


@drop_in
def adaptive_max_pool3d(input: Tensor, output_size: Numbers, return_indices: bool = False) -> Any:
    """The largest of each of so many windows, as `torch.nn.functional.adaptive_max_pool3d`.

    Shapes: input (N, C, D, H, W) or (C, D, H, W); the result alike, of `output_size`.
    """
    return _adaptive_max_pool(3, input, output_size, return_indices)


@drop_in
def adaptive_max_pool3d_with_indices(
    input: Tensor, output_size: Numbers, return_indices: bool = False
) -> tuple[Tensor, Tensor]:
    """`adaptive_max_pool3d` with its indices, as `torch.nn.functional.adaptive_max_pool3d_with_indices`."""
    return _adaptive_max_pool(3, input, output_size, True)


def _fractional_max_pool(
    n: int,
    input: Tensor,
    kernel_size: Numbers,
    output_size: Numbers | None,
    output_ratio: float | Sequence[float] | None,
    return_indices: bool,
    samples: Tensor | None,
) -> Any:
    if samples is None:  # drawn as torch draws them
        batch = 1 if input.dim() == n + 1 else input.size(0)
        samples = torch.rand(batch, input.size(-1 - n), n, dtype=input.dtype, device=input.device)
    name = f"fractional_max_pool{n}d_with_indices"
    pool = _pool(n, name, input, kernel_size, output_size, output_ratio)
    return FractionalMaxPoolFunction.apply(input, samples, pool, with_statistics=return_indices)


@drop_in
def fractional_max_pool2d(
    input: Tensor,
    kernel_size: Numbers,
    output_size: Numbers | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """The largest of windows at random places, as `torch.nn.functional.fractional_max_pool2d`.

    Shapes: input (N, C, H, W) or (C, H, W); the result alike, of `output_size`, or of `output_ratio` of the
    input's. Draws the same windows as torch does from the same random state.

    Raises:
        ValueError: neither `output_size` nor `output_ratio` is given.
    """
    return _fractional_max_pool(2, input, kernel_size, output_size, output_ratio, return_indices, _random_samples)


@drop_in
def fractional_max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Numbers,
    output_size: Numbers | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fractional_max_pool2d` with its indices, as `torch.nn.functional.fractional_max_pool2d_with_indices`."""
    return _fractional_max_pool(2, input, kernel_size, output_size, output_ratio, True, _random_samples)


@drop_in
def fractional_max_pool3d(
    input: Tensor,
    kernel_size: Numbers,
    output_size: Numbers | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """The largest of windows at random places, as `torch.nn.functional.fractional_max_pool3d`.

    Shapes: input (N, C, D, H, W) or (C, D, H, W); the result alike, of `output_size`, or of `output_ratio` of the
    input's. Draws the same windows as torch does from the same random state.

    Raises:
        ValueError: neither `output_size` nor `output_ratio` is given.
    """
    return _fractional_max_pool(3, input, kernel_size, output_size, output_ratio, return_indices, _random_samples)


@drop_in
def fractional_max_pool3d_with_indices(
    input: Tensor,
    kernel_size: Numbers,
    output_size: Numbers | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fractional_max_pool3d` with its indices, as `torch.nn.functional.fractional_max_pool3d_with_indices`."""
    return _fractional_max_pool(3, input, kernel_size, output_size, output_ratio, True, _random_samples)


@drop_in
def max_unpool1d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Each value put where `indices` says, elsewhere 0, as `torch.nn.functional.max_unpool1d`.

    Shapes: input and indices (N, C, L) or (C, L); the result alike.
    """
    pool = _pool(1, "max_unpool1d", input, kernel_size, stride, padding, output_size)
    return MaxUnpoolFunction.apply(input, indices, pool)


@drop_in
def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Each value put where `indices` says, elsewhere 0, as `torch.nn.functional.max_unpool2d`.

    Shapes: input and indices (N, C, H, W) or (C, H, W); the result alike.
    """
    pool = _pool(2, "max_unpool2d", input, kernel_size, stride, padding, output_size)
    return MaxUnpoolFunction.apply(input, indices, pool)


@drop_in
def max_unpool3d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Each value put where `indices` says, elsewhere 0, as `torch.nn.functional.max_unpool3d`.

    Shapes: input and indices (N, C, D, H, W) or (C, D, H, W); the result alike.
    """
    pool = _pool(3, "max_unpool3d", input, kernel_size, stride, padding, output_size)
    return MaxUnpoolFunction.apply(input, indices, pool)


@drop_in
def avg_pool1d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of each window, as `torch.nn.functional.avg_pool1d`.

    Shapes: input (N, C, L) or (C, L); the result alike.
    """
    arguments = (kernel_size, stride, padding, ceil_mode, count_include_pad)
    return AvgPoolFunction.apply(input, _pool(1, "avg_pool1d", input, *arguments))


@drop_in
def avg_pool2d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean of each window, as `torch.nn.functional.avg_pool2d`.

    Shapes: input (N, C, H, W) or (C, H, W); the result alike.
    """
    arguments = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return AvgPoolFunction.apply(input, _pool(2, "avg_pool2d", input, *arguments))


@drop_in
def avg_pool3d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean of each window, as `torch.nn.functional.avg_pool3d`.

    Shapes: input (N, C, D, H, W) or (C, D, H, W); the result alike.
    """
    arguments = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return Float32AvgPoolFunction.apply(input, _pool(3, "avg_pool3d", input, *arguments))


@drop_in
def adaptive_avg_pool1d(input: Tensor, output_size: Numbers) -> Tensor:
    """The mean of each of so many windows, as `torch.nn.functional.adaptive_avg_pool1d`.

    Shapes: input (N, C, L) or (C, L); the result alike, of `output_size`.
    """
    return AdaptiveAvgPoolFunction.apply(input, _pool(1, "adaptive_avg_pool1d", input, output_size))


@drop_in
def adaptive_avg_pool2d(input: Tensor, output_size: Numbers) -> Tensor:
    """The mean of each of so many windows, as `torch.nn.functional.adaptive_avg_pool2d`.

    Shapes: input (N, C, H, W) or (C, H, W); the result alike, of `output_size`.
    """
    return AdaptiveAvgPoolFunction.apply(input, _pool(2, "adaptive_avg_pool2d", input, output_size))


@drop_in
def adaptive_avg_pool3d(input: Tensor, output_size: Numbers) -> Tensor:
    """The mean of each of so many windows, as `torch.nn.functional.adaptive_avg_pool3d`.

    Shapes: input (N, C, D, H, W) or (C, D, H, W); the result alike, of `output_size`.
    """
    return Float32AdaptiveAvgPoolFunction.apply(input, _pool(3, "adaptive_avg_pool3d", input, output_size))


def _lp_pool(
    n: int, input: Tensor, norm_type: float, kernel_size: Numbers, stride: Numbers | None, ceil_mode: bool
) -> Tensor:
    largest, mean = _POOLS[n]
    if norm_type == math.inf:
        return largest(AbsoluteFunction.apply(input), kernel_size, stride, 0, 1, ceil_mode)
    if norm_type == -math.inf:
        return -largest(-AbsoluteFunction.apply(input), kernel_size, stride, 0, 1, ceil_mode)
    powers = mean(PowerFunction.apply(input, norm_type), kernel_size, stride, 0, ceil_mode)
    return RootFunction.apply(powers, math.prod(each(kernel_size, n)), norm_type)


_POOLS = {1: (max_pool1d, avg_pool1d), 2: (max_pool2d, avg_pool2d), 3: (max_pool3d, avg_pool3d)}


@drop_in
def lp_pool1d(
    input: Tensor,
    norm_type: int | float,
    kernel_size: int,
    stride: Numbers | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """(Σ xᵖ)^(1/p) of each window, p the `norm_type`, as `torch.nn.functional.lp_pool1d`.

    Shapes: input (N, C, L) or (C, L); the result alike.
    """
    return _lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode)


@drop_in
def lp_pool2d(
    input: Tensor,
    norm_type: int | float,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """(Σ xᵖ)^(1/p) of each window, p the `norm_type`, as `torch.nn.functional.lp_pool2d`.

    Shapes: input (N, C, H, W) or (C, H, W); the result alike.
    """
    return _lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode)


@drop_in
def lp_pool3d(
    input: Tensor,
    norm_type: int | float,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """(Σ xᵖ)^(1/p) of each window, p the `norm_type`, as `torch.nn.functional.lp_pool3d`.

    Shapes: input (N, C, D, H, W) or (C, D, H, W); the result alike.
    """
    return _lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode)


_SIDES = {1: (6,), 2: (4, 5), 3: (2, 3, 4)}
_BIG = {1: (16, 64, 4096), 2: (16, 64, 56, 56), 3: (4, 32, 8, 28, 28)}


def _places(t: Maker, *shape: int) -> Tensor:
    """What a max pool of 2 finds in each window, in a tensor of twice these sides."""
    axes = len(shape) - 2
    wide = t(*shape[:2], *(2 * side for side in shape[2:]))
    return _max_pool(axes, wide, 2, None, 0, 1, False, True)[1]


for _n in (1, 2, 3):
    _max, _adaptive_max, _unpool, _avg, _adaptive_avg, _lp = (
        globals()[f"{name}{_n}d"]
        for name in ("max_pool", "adaptive_max_pool", "max_unpool", "avg_pool", "adaptive_avg_pool", "lp_pool")
    )
    register(
        _max,
        samples=lambda t, n=_n: [
            Call(t(2, 1, *_SIDES[n]), 2),
            Call(t(2, *_SIDES[n]), 2, 1, 1, (1,) * (n - 1) + (2,), ceil_mode=True),
        ],
        big=lambda t, n=_n: Call(t(*_BIG[n]), 3, 2, 1),
    )
    register(
        _adaptive_max,
        samples=lambda t, n=_n: [Call(t(2, 1, *_SIDES[n]), 2), Call(t(2, *_SIDES[n]), (1,) * (n - 1) + (3,))],
        big=lambda t, n=_n: Call(t(*_BIG[n]), 7),
    )
    register(
        _avg,
        samples=lambda t, n=_n: (
            [
                Call(t(2, 1, *_SIDES[n]), 2),
                Call(t(2, 1, *_SIDES[n]), (2, 3, 3)[-n:], 2, 1, ceil_mode=True, count_include_pad=False),
                Call(t(2, *_SIDES[n]), (2,) * n, (1,) * n, 1, ceil_mode=True),
            ]
            + ([] if n == 1 else [Call(t(2, 1, *_SIDES[n]), 2, 3, divisor_override=3)])
        ),
        big=lambda t, n=_n: Call(t(*_BIG[n]), 2),
    )
    register(
        _adaptive_avg,
        samples=lambda t, n=_n: [
            Call(t(2, 1, *_SIDES[n]), 2),
            Call(t(2, *_SIDES[n]), (1,) * (n - 1) + (4,)),
        ],
        big=lambda t, n=_n: Call(t(*_BIG[n]), 7),
    )
    register(
        _unpool,
        samples=lambda t, n=_n: [
            Call(t(2, 1, *_SIDES[n]), _places(t, 2, 1, *_SIDES[n]), 2),
            Call(t(2, *_SIDES[n]), _places(t, 1, 2, *_SIDES[n])[0], 2, 2, 0, [2 * side + 1 for side in _SIDES[n]]),
        ],
        big=lambda t, n=_n: Call(t(*_BIG[n]), _places(t, *_BIG[n]), 2),
    )
    register(
        _lp,
        samples=lambda t, n=_n: [
            Call(t(2, 1, *_SIDES[n]), 2, 2),
            Call(t(2, *_SIDES[n], low=0.5, high=2), 3.0, 2, 1, ceil_mode=True),
            Call(t(1, 1, *_SIDES[n]), math.inf, 2),
        ],
        big=lambda t, n=_n: Call(t(*_BIG[n]), 2, 2),
    )

for _n, _fractional in ((2, fractional_max_pool2d), (3, fractional_max_pool3d)):
    register(
        _fractional,
        samples=lambda t, n=_n: [
            Call(t(2, 1, *_SIDES[n]), (1, 2, 2)[-n:], output_size=(1, 2, 3)[-n:]),
            Call(t(2, *_SIDES[n]), 1, output_ratio=(0.5,) * n),
        ],
        big=lambda t, n=_n: Call(t(*_BIG[n]), 2, output_ratio=(0.5,) * n),
        random=True,
    )
