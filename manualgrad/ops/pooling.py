"""Pooling: the maximum, the mean or a norm of each window, and max unpooling.

The rules replace torch's kernels. torch's Python functions call them after they have checked the arguments, set
defaults, read ``return_indices`` and drawn the random positions of fractional windows.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.utils import _list_with_default

from manualgrad.memory_format import is_channels_last
from manualgrad.ops.arithmetic import AbsoluteFunction, PowerFunction
from manualgrad.ops.padding import pad
from manualgrad.ops.registration import for_1d_2d_3d, implements, with_torch_errors
from manualgrad.ops.shapes import IntOrInts, flatten, to_tuple, with_size
from manualgrad.recomputation import is_large
from manualgrad.registry import SampleInput, TensorFactory, kernel_replacements, register
from manualgrad.rule import Rule, replaces, with_reuse
from manualgrad.torch_internals import UNPOOL_CHECK_IS_NOT_TRACED

kernels: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class Pooling:
    """A call of a pooling kernel of torch, without the tensors."""

    kernel: str  # the name, because torch.compile cannot write the kernel into its code
    settings: tuple[Any, ...]  # the arguments that are not tensors
    sizes: tuple[int, ...]  # of the pooled axes, which are the last axes of the input
    windows: tuple[RegularWindows, ...] = ()  # of a mean: one for each pooled axis, or () if they are adaptive
    divisor: int | None = None  # of a mean: divides every sum, instead of the number of positions
    compress_indices: bool = False  # of a maximum: save the indices in few bytes

    def __call__(self, *tensors: Tensor | None) -> Any:
        input, *more = tensors
        kernel = getattr(kernels, self.kernel, None) or getattr(torch, self.kernel)
        return kernel(input, *self.settings, *(x for x in more if x is not None))


def _make_pooling(n: int, kernel: str, input: Tensor, settings: Sequence[Any], **more: Any) -> Pooling:
    """The pooling of the last n axes."""
    hashable = tuple(tuple(x) if isinstance(x, Sequence) else x for x in settings)
    return Pooling(kernel, hashable, tuple(input.shape[-n:]), **more)


@implements(_list_with_default)
def _output_sizes(sizes: Any, input_sizes: list[int]) -> Any:
    """The output sizes, with the input's size for None. (torch.compile does not trace torch's function.)"""
    if isinstance(sizes, (int, torch.SymInt)):
        return sizes
    if len(input_sizes) <= len(sizes):
        raise ValueError(f"Input dimension should be at least {len(sizes) + 1}")
    return [n if size is None else size for size, n in zip(sizes, input_sizes[-len(sizes) :], strict=False)]


# --- the maximum ---


class MaxPoolFunction(Rule):
    r"""y[i] = max of x over window i = x[j(i)]      j(i): the index of the maximum, a constant statistic

    ⟨g, dy⟩ = Σᵢ g[i] dx[j(i)], so each element of x receives the sum of g over the windows where it is largest:
    ∂L/∂x[j] = Σ g[i] over j(i) = j

    Windows are regular, or adaptive, or at random positions given by ``samples`` in [0, 1) (Graham, "Fractional
    Max-Pooling", 2014).
    """

    statistics = ("indices",)
    save_instead = ("compressed_indices",)
    preserve_memory_format = ("grad_input",)

    def forward(input: Tensor, samples: Tensor | None, pooling: Pooling) -> tuple[Tensor, Tensor]:
        if input.dim() == len(pooling.sizes) + 1:
            input = input.contiguous()  # else torch may take a volume (C, D, H, W) for images in channels_last
        return pooling(input, samples)

    def compressed_indices(indices: Tensor, pooling: Pooling) -> Tensor:
        return compress_indices(indices, pooling)

    def grad_input(grad: Tensor, compressed_indices: Tensor, pooling: Pooling) -> Tensor:
        j = decompress_indices(compressed_indices, pooling)
        return sum_by_index(grad, j, pooling.sizes)


class Float32MaxPoolFunction(MaxPoolFunction):
    """For the kernels that CPU autocast computes in float32."""

    autocast = {"cpu": "float32"}


def sum_by_index(g: Tensor, j: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Σ g[i] over j(i) = j"""
    n = len(sizes)
    zeros = g.new_zeros(*g.shape[:-n], math.prod(sizes))
    return zeros.scatter_add(-1, flatten(j, -n), flatten(g, -n)).reshape(*g.shape[:-n], *sizes)


@replaces(sum_by_index)
def _sum_by_index_in_channels_last(g: Tensor, j: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The same in the memory format of g."""
    n = len(sizes)
    if g.dim() == n + 2 and is_channels_last(g):
        g, j = (x.movedim(1, -1).flatten(1, -2) for x in (g, j))
        total = g.new_zeros(len(g), math.prod(sizes), g.shape[-1]).scatter_add_(1, j, g)
        return total.unflatten(1, sizes).movedim(-1, 1)
    return with_reuse(sum_by_index)(g, j, sizes)


# Compressed indices: for regular windows the position of the maximum in its window, in one byte; else the index in
# four bytes. The position k of a window with origin o has the index o + offset[k].


def compress_indices(indices: Tensor, pooling: Pooling) -> Tensor:
    if not pooling.compress_indices:
        return indices
    if _position_fits_in_byte(pooling):
        return positions_in_windows(indices, pooling)
    return indices.int() if math.prod(pooling.sizes) < 2**31 else indices


def decompress_indices(compressed: Tensor, pooling: Pooling) -> Tensor:
    if pooling.compress_indices and _position_fits_in_byte(pooling):
        return indices_of_positions(compressed, pooling)
    return compressed.long()


def positions_in_windows(indices: Tensor, pooling: Pooling) -> Tensor:
    _, position_of_offset = _offset_tables(pooling, indices.device)
    return lookup(position_of_offset, indices - window_origins(pooling, indices))


def indices_of_positions(positions: Tensor, pooling: Pooling) -> Tensor:
    offset_of_position, _ = _offset_tables(pooling, positions.device)
    return window_origins(pooling, positions) + lookup(offset_of_position, positions.int())


def lookup(table: Tensor, index: Tensor) -> Tensor:
    return table[index]


@replaces(lookup)
def _lookup_in_memory_order(table: Tensor, index: Tensor) -> Tensor:
    """The same in a third of the time."""
    if is_channels_last(index):
        return _lookup_in_memory_order(table, index.movedim(1, -1)).movedim(-1, 1)
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


def window_origins(pooling: Pooling, windows: Tensor) -> Tensor:
    """The index of each window's first position, extrapolated where a window begins in the padding."""
    n, device = len(pooling.sizes), windows.device
    _, stride, padding, _ = _window_geometry(pooling)
    origins = torch.zeros((), dtype=torch.int64, device=device)
    for size, s, p, o in zip(pooling.sizes, stride, padding, windows.shape[-n:], strict=True):
        origins = origins.unsqueeze(-1) * size + torch.arange(-p, -p + s * o, s, device=device)
    return origins


@functools.lru_cache(maxsize=64)
def _offset_tables(pooling: Pooling, device: torch.device) -> tuple[Tensor, Tensor]:
    """offset[k] for each position k in a window, and its inverse: the position for each offset."""
    kernel, _, _, dilation = _window_geometry(pooling)
    offset = torch.zeros(1, dtype=torch.int64)
    for size, k, d in zip(pooling.sizes, kernel, dilation, strict=True):
        offset = (offset.unsqueeze(-1) * size + torch.arange(0, k * d, d)).reshape(-1)
    position = torch.arange(len(offset), dtype=torch.uint8)
    position_of_offset = torch.zeros(int(offset.max()) + 1, dtype=torch.uint8).scatter(0, offset, position)
    return offset.to(device), position_of_offset.to(device)


def _position_fits_in_byte(pooling: Pooling) -> bool:
    """The windows are regular, and have at most 256 positions."""
    return pooling.kernel.startswith("max_pool") and math.prod(_window_geometry(pooling)[0]) <= 256


def _window_geometry(pooling: Pooling) -> list[tuple[int, ...]]:
    """Kernel size, stride, padding and dilation, each for all axes."""
    n = len(pooling.sizes)
    kernel_size, stride, padding, dilation, *_ = pooling.settings
    return [to_tuple(x, n) for x in (kernel_size, stride if stride != () else kernel_size, padding, dilation)]


def _implement_max_pool(
    n: int,
    replaced: Callable[..., Any],
    kernel: Callable[..., Any],
    rule: type[Rule] = MaxPoolFunction,
    fractional: bool = False,
) -> None:
    """Replace a max pool of the last n axes: the kernel, or a function that calls it and returns no indices."""

    @implements(replaced)
    def max_pool(input: Tensor, *settings: Any) -> Any:
        if not input.is_floating_point():  # integers have no gradient
            return replaced(input, *settings)
        *arguments, samples = settings if fractional else (*settings, None)
        compress = is_large(input) and not torch.compiler.is_compiling()
        pooling = _make_pooling(n, kernel.__name__, input, arguments, compress_indices=compress)
        return rule.apply(input, samples, pooling, with_statistics=replaced is kernel)


for _n, _values, _indices, _adaptive, _rule in (
    (1, torch.max_pool1d, torch.max_pool1d_with_indices, torch.adaptive_max_pool1d, MaxPoolFunction),
    (2, torch.max_pool2d, kernels.max_pool2d_with_indices, kernels.adaptive_max_pool2d, MaxPoolFunction),
    (3, torch.max_pool3d, kernels.max_pool3d_with_indices, kernels.adaptive_max_pool3d, Float32MaxPoolFunction),
):
    _implement_max_pool(_n, _values, _indices, _rule)
    _implement_max_pool(_n, _indices, _indices)
    _implement_max_pool(_n, _adaptive, _adaptive, _rule)
for _n, _kernel in ((2, kernels.fractional_max_pool2d), (3, kernels.fractional_max_pool3d)):
    _implement_max_pool(_n, _kernel, _kernel, Float32MaxPoolFunction, fractional=True)


class MaxUnpoolFunction(Rule):
    r"""y[j(i)] = x[i], elsewhere 0      j: the indices that a max pool returned

    ⟨g, dy⟩ = Σᵢ g[j(i)] dx[i]      ∂L/∂x[i] = g[j(i)]

    Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014.
    """

    autocast = {"cpu": "float32"}

    def forward(input: Tensor, indices: Tensor, pooling: Pooling) -> Tensor:
        return getattr(kernels, pooling.kernel)(input, indices, *pooling.settings)

    def grad_input(grad: Tensor, indices: Tensor, pooling: Pooling) -> Tensor:
        n = len(pooling.sizes)
        return flatten(grad, -n).gather(-1, flatten(indices, -n)).reshape(indices.shape)


def _implement_max_unpool(n: int, kernel: Callable[..., Any]) -> None:
    @implements(kernel)
    def max_unpool(input: Tensor, indices: Tensor, *settings: Any) -> Tensor:
        return MaxUnpoolFunction.apply(input, indices, _make_pooling(n, kernel.__name__, input, settings))


_implement_max_unpool(2, kernels.max_unpool2d)
_implement_max_unpool(3, kernels.max_unpool3d)


# --- the mean ---


class AvgPoolFunction(Rule):
    r"""y[i] = (1/n[i]) Σ x over window i      n[i]: the number of positions in window i, or one divisor for all

    ⟨g, dy⟩ = Σᵢ (g[i]/n[i]) Σ dx over window i:
    ∂L/∂x[j] = Σ g[i]/n[i] over the windows i that contain j

    A window is a product of one interval along each axis, and n[i] is the product of their lengths. So the
    division and the sum are computed along one axis after the other.
    """

    preserve_memory_format = ("grad_input",)

    def forward(input: Tensor, pooling: Pooling) -> Tensor:
        return pooling(input)

    def grad_input(grad: Tensor, pooling: Pooling) -> Tensor:
        g = grad / pooling.divisor if pooling.divisor else grad
        return sum_over_windows(g, pooling, -1)


class Float32AvgPoolFunction(AvgPoolFunction):
    """For the kernels that CPU autocast computes in float32."""

    autocast = {"cpu": "float32"}


class RegularWindows(NamedTuple):
    """Windows along one axis: window i has k positions from s i - p on. Some may lie in the padding."""

    k: int  # kernel size
    s: int  # stride
    p: int  # padding
    count_include_pad: bool

    def counts(self, n: int, o: int, device: torch.device) -> Tensor | int:
        """n[i] of each of o windows over n positions. One number if all are equal."""
        counted = self.p if self.count_include_pad else 0  # this much of the padding on each side
        if self.p <= counted and self.s * (o - 1) - self.p + self.k <= n + counted:
            return self.k  # no window has positions that do not count
        starts = self.s * torch.arange(o, device=device) - self.p
        return (starts + self.k).clamp(max=n + counted) - starts.clamp(min=-counted)


def sum_over_windows(g: Tensor, pooling: Pooling, last: int) -> Tensor:
    """Σ g[i]/n[i] over the windows i that contain j. ``last`` is the last pooled axis.

    If the pooling has a divisor, g is divided by it already, and n[i] is 1.
    """
    dims = len(pooling.sizes)
    if 0 in g.shape:
        return g.new_zeros(*g.shape[: last - dims + 1], *pooling.sizes, *g.shape[last:][1:])
    for axis in range(last, last - dims, -1):
        n, o = pooling.sizes[axis - last - 1], g.shape[axis]
        windows = pooling.windows[axis - last - 1] if pooling.windows else _regular_if_adaptive(n, o)
        if not pooling.divisor:
            counts = windows.counts(n, o, g.device) if windows else _adaptive_counts(n, o, g.device)
            g = _divide_along_axis(g, axis, counts)
        g = _sum_over_regular_windows(g, axis, n, windows) if windows else _sum_over_adaptive_windows(g, axis, n)
    return g.contiguous()


@replaces(sum_over_windows)
def _sum_over_windows_in_channels_last(g: Tensor, pooling: Pooling, last: int) -> Tensor:
    """The same in the memory format of g."""
    if g.dim() == len(pooling.sizes) + 2 and is_channels_last(g):
        return sum_over_windows(g.movedim(1, -1), pooling, last - 1).movedim(-1, 1)
    return sum_over_windows(g, pooling, last)


def _divide_along_axis(tensor: Tensor, axis: int, counts: Tensor | int) -> Tensor:
    if isinstance(counts, Tensor):
        return tensor / counts.to(tensor.dtype).reshape(-1, *[1] * (-1 - axis))
    return tensor if counts == 1 else tensor / counts


def _sum_over_regular_windows(g: Tensor, axis: int, n: int, windows: RegularWindows) -> Tensor:
    """For each of n positions along an axis, the sum of g over the windows that contain it.

    Position s q + r - p, with 0 ≤ r < s, is in the windows q, q - 1, ..., q - m + 1 with m = ⌈k/s⌉, except for the
    last of these if r ≥ k - (m - 1) s. So two sums for each q are enough: over m windows, and over m - 1.
    """
    k, s, p, _ = windows
    m, count = -(-k // s), -(-(n + p) // s)  # q < count
    if m > 1 or count > g.shape[axis]:  # windows before the first and after the last have g = 0
        g = pad(g, [*[0, 0] * (-1 - axis), m - 1, count - g.shape[axis]])
    *nearest, farthest = (g.narrow(axis, m - 1 - i, count) for i in range(m))
    sum_of_fewer = functools.reduce(torch.add, nearest) if nearest else None
    sum_of_m = farthest if sum_of_fewer is None else sum_of_fewer + farthest
    parts = [_repeat_entries(sum_of_m, axis, k - (m - 1) * s)]
    if m * s > k:
        rest = torch.zeros_like(sum_of_m) if sum_of_fewer is None else sum_of_fewer
        parts.append(_repeat_entries(rest, axis, m * s - k))
    positions = torch.cat(parts, axis) if len(parts) > 1 else parts[0]
    return flatten(positions, axis - 1, axis).narrow(axis, p, n)


def _repeat_entries(tensor: Tensor, axis: int, times: int) -> Tensor:
    """Each entry along an axis repeated. The repetitions form a new axis after it."""
    repeated = tensor.unsqueeze(axis)
    return repeated.expand(*[-1] * (repeated.dim() + axis), times, *[-1] * (-1 - axis))


def _regular_if_adaptive(n: int, o: int) -> RegularWindows | None:
    """o adaptive windows over n positions, if all have the same size."""
    return RegularWindows(n // o, n // o, 0, False) if n % o == 0 else None


def _adaptive_windows(n: int, o: int) -> list[tuple[int, int]]:
    """The first position and the end of each of o windows over n positions: ⌊i n / o⌋ and ⌈(i + 1) n / o⌉."""
    return [(i * n // o, -(-(i + 1) * n // o)) for i in range(o)]


def _adaptive_counts(n: int, o: int, device: torch.device) -> Tensor:
    """The number of positions in each of o windows over n positions."""
    return torch.tensor([end - start for start, end in _adaptive_windows(int(n), int(o))], device=device)


def _sum_over_adaptive_windows(g: Tensor, axis: int, n: int) -> Tensor:
    """The same for adaptive windows. All positions between two neighbouring edges are in the same windows."""
    n, o, sums = int(n), int(g.shape[axis]), []  # int, because torch.compile cannot iterate over symbolic sizes
    edges = sorted({edge for window in _adaptive_windows(n, o) for edge in window})
    for start, end in itertools.pairwise(edges):
        first, last = start * o // n, ((start + 1) * o - 1) // n
        total = functools.reduce(torch.add, (g.narrow(axis, i, 1) for i in range(first, last + 1)))
        sums.append(total.expand(with_size(g.shape, axis, end - start)))
    return torch.cat(sums, axis)


def _avg_pool(n: int, rule: type[Rule], input: Tensor, settings: Sequence[Any]) -> Tensor:
    """The mean of each window of the last n axes."""
    kernel_size, stride, padding, _, count_include_pad, *divisor = settings
    geometry = (to_tuple(numbers, n) for numbers in (kernel_size, stride or kernel_size, padding))
    windows = tuple(RegularWindows(k, s, p, count_include_pad) for k, s, p in zip(*geometry, strict=True))
    divisor = divisor[0] if divisor else None
    return rule.apply(input, _make_pooling(n, f"avg_pool{n}d", input, settings, windows=windows, divisor=divisor))


@with_torch_errors
def avg_pool1d(
    input: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts | None = None,
    padding: IntOrInts = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of each window, as `torch.nn.functional.avg_pool1d`. Shapes: (N, C, L) or (C, L)."""
    return _avg_pool(1, AvgPoolFunction, input, (kernel_size, stride, padding, ceil_mode, count_include_pad))


def _make_avg_pool(n: int) -> Callable[..., Tensor]:
    rule = Float32AvgPoolFunction if n == 3 else AvgPoolFunction

    def avg_pool(
        input: Tensor,
        kernel_size: IntOrInts,
        stride: IntOrInts | None = None,
        padding: IntOrInts = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        """The mean of each window of the last {n} axes, as `torch.nn.functional.avg_pool{n}d`.

        Shapes: (N, C, *sizes) or (C, *sizes).
        """
        settings = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return _avg_pool(n, rule, input, settings)

    return avg_pool


avg_pool2d, avg_pool3d = for_1d_2d_3d(_make_avg_pool, (2, 3))


@with_torch_errors
def adaptive_avg_pool1d(input: Tensor, output_size: IntOrInts) -> Tensor:
    """The means of ``output_size`` windows, as `torch.nn.functional.adaptive_avg_pool1d`: (N, C, L) or (C, L)."""
    return AvgPoolFunction.apply(input, _make_pooling(1, "adaptive_avg_pool1d", input, (output_size,)))


def _implement_adaptive_avg_pool(n: int, kernel: Callable[..., Any], rule: type[Rule]) -> None:
    @implements(kernel)
    def adaptive_avg_pool(input: Tensor, output_size: IntOrInts) -> Tensor:
        return rule.apply(input, _make_pooling(n, kernel.__name__, input, (output_size,)))


_implement_adaptive_avg_pool(2, kernels.adaptive_avg_pool2d, AvgPoolFunction)
_implement_adaptive_avg_pool(3, kernels.adaptive_avg_pool3d, Float32AvgPoolFunction)


# --- the norm ---


class RootFunction(Rule):
    r"""y = (k x)^(1/p)      x: a mean of k powers

    ∂L/∂x = g (k/p) (k x)^(1/p - 1),  0 where x = 0, as in torch
    """

    def forward(input: Tensor, k: int, p: float) -> Tensor:
        return (input.sign() * input.abs()).mul(k).pow(1 / p)  # as torch: the sign makes -0 to 0

    def grad_input(grad: Tensor, input: Tensor, k: int, p: float) -> Tensor:
        nonzero = input != 0
        x = torch.where(nonzero, input, 1)
        return torch.where(nonzero, grad * (k / p) * (k * x) ** (1 / p - 1), 0)


def _torch_supports_infinite_norm(n: int) -> bool:
    """torch 2.11 does not: for p = ∞ it computes powers too (values 1, gradients nan), and so does manualgrad."""
    return f"max_pool{n}d" in getattr(torch.nn.functional, f"lp_pool{n}d").__code__.co_names


def _make_lp_pool(n: int) -> Callable[..., Tensor]:
    max_pool = kernel_replacements[getattr(torch, f"max_pool{n}d")]
    avg_pool = (avg_pool1d, avg_pool2d, avg_pool3d)[n - 1]
    supports_infinity = _torch_supports_infinite_norm(n)

    def lp_pool(
        input: Tensor,
        norm_type: int | float,
        kernel_size: IntOrInts,
        stride: IntOrInts | None = None,
        ceil_mode: bool = False,
    ) -> Tensor:
        """(Σ xᵖ)^(1/p) of each window of the last {n} axes, as `torch.nn.functional.lp_pool{n}d`.

        Shapes: (N, C, *sizes) or (C, *sizes). p is ``norm_type``. The norm for p = ∞ is the largest |x|, and
        for p = -∞ the smallest, if the installed torch supports them.
        """
        if supports_infinity and norm_type in (math.inf, -math.inf):
            sign = 1 if norm_type > 0 else -1
            return sign * max_pool(
                sign * AbsoluteFunction.apply(input), kernel_size, stride or (), 0, 1, ceil_mode
            )
        means = avg_pool(PowerFunction.apply(input, norm_type), kernel_size, stride, 0, ceil_mode)
        return RootFunction.apply(means, math.prod(to_tuple(kernel_size, n)), norm_type)

    return lp_pool


lp_pool1d, lp_pool2d, lp_pool3d = for_1d_2d_3d(_make_lp_pool)


# --- the registrations, for n pooled axes ---


def _sample_sizes(n: int) -> tuple[int, ...]:
    return ((6,), (4, 5), (2, 3, 4))[n - 1]


def _benchmark_input(n: int, *args: Any, **kwargs: Any) -> Callable[[TensorFactory], SampleInput]:
    shape = ((16, 64, 4096), (16, 64, 56, 56), (4, 32, 8, 28, 28))[n - 1]
    return lambda t: SampleInput(t(*shape), *args, **kwargs)


def _max_indices(t: TensorFactory, n: int, *shape: int) -> Tensor:
    """The indices of a max pool with kernel size 2 and an output of this shape."""
    input = t(*shape[:-n], *(2 * size for size in shape[-n:]))
    return getattr(torch.nn.functional, f"max_pool{n}d")(input, 2, return_indices=True)[1]


def _register(n: int) -> None:
    sizes, ones = _sample_sizes(n), (1,) * (n - 1)
    register(
        f"max_pool{n}d",
        sample_inputs=lambda t: [
            SampleInput(t(2, 1, *sizes), 2, 1, 0, (*ones, 2)),
            SampleInput(t(2, *sizes), 3, 2, 1, ceil_mode=True),
        ],
        benchmark_input=_benchmark_input(n, 3, 2, 1),
    )
    register(
        f"adaptive_max_pool{n}d",
        sample_inputs=lambda t: [SampleInput(t(2, 1, *sizes), 2), SampleInput(t(2, *sizes), (*ones, 3))],
        benchmark_input=_benchmark_input(n, 7),
    )
    register(
        f"max_unpool{n}d",
        sample_inputs=lambda t: [
            SampleInput(t(2, 1, *sizes), _max_indices(t, n, 2, 1, *sizes), 2),
            SampleInput(t(2, *sizes), _max_indices(t, n, 2, *sizes), 2, 2, 0, [2 * size + 1 for size in sizes]),
        ],
        benchmark_input=lambda t: SampleInput(
            (x := _benchmark_input(n)(t).args[0]), _max_indices(t, n, *x.shape), 2
        ),
        expected_failures={"compile_dynamic-0": "torch.compile does not trace torch's check of the output size"}
        if UNPOOL_CHECK_IS_NOT_TRACED
        else {},
    )
    register(
        (avg_pool1d, avg_pool2d, avg_pool3d)[n - 1],
        sample_inputs=lambda t: [
            SampleInput(t(2, 1, *sizes), (2, 3, 3)[-n:], 2, 1, ceil_mode=True, count_include_pad=False),
            SampleInput(t(2, *sizes), (2,) * n, (1,) * n, 1, ceil_mode=True),
            *([] if n == 1 else [SampleInput(t(2, 1, *sizes), 2, 3, divisor_override=3)]),
        ],
        benchmark_input=_benchmark_input(n, 2),
    )
    register(
        adaptive_avg_pool1d if n == 1 else f"adaptive_avg_pool{n}d",
        sample_inputs=lambda t: [SampleInput(t(2, 1, *sizes), 2), SampleInput(t(2, *sizes), (*ones, 4))],
        benchmark_input=_benchmark_input(n, 7),
    )
    register(
        (lp_pool1d, lp_pool2d, lp_pool3d)[n - 1],
        sample_inputs=lambda t: [
            SampleInput(t(2, 1, *sizes), 2, 2),
            SampleInput(t(2, *sizes, low=0.5, high=2), 3.0, 2, 1, ceil_mode=True),
            *([SampleInput(t(1, 1, *sizes), -math.inf, 2)] if _torch_supports_infinite_norm(n) else []),
        ],
        benchmark_input=_benchmark_input(n, 2, 2),
    )
    if n > 1:
        register(
            f"fractional_max_pool{n}d",
            sample_inputs=lambda t: [
                SampleInput(t(2, 1, *sizes), (1, 2, 2)[-n:], output_size=(1, 1, 2)[-n:]),
                SampleInput(t(2, *sizes), 1, output_ratio=(0.5,) * n),
            ],
            benchmark_input=_benchmark_input(n, 2, output_ratio=(0.5,) * n),
            random=True,
        )


for _n in (1, 2, 3):
    _register(_n)
