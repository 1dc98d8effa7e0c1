"""Pooling: the largest, the mean or a norm of each window, and max unpooling.

The rules replace torch's kernels. torch's own Python code calls them. It checks the arguments, sets defaults,
reads ``return_indices`` and draws the random places of fractional windows.
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
from manualgrad.ops.shapes import IntOrInts, flatten, to_tuple
from manualgrad.recomputation import is_large
from manualgrad.registry import SampleInput, TensorFactory, kernel_replacements, register
from manualgrad.rule import Rule, replaces, with_reuse
from manualgrad.torch_internals import UNPOOL_CHECK_IS_NOT_TRACED

kernels: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]


class Along(NamedTuple):
    """Windows along one axis: window i begins at s i - p and is k long. It may count places in the padding."""

    k: int
    s: int
    p: int
    counts_padding: bool

    def counts(self, n: int, o: int, device: torch.device) -> Tensor | int:
        """The number of places, of n, that each of o windows counts; a number if it is the same for all."""
        beyond = self.p if self.counts_padding else 0
        if self.p <= beyond and self.s * (o - 1) - self.p + self.k <= n + beyond:
            return self.k
        starts = self.s * torch.arange(o, device=device) - self.p
        return (starts + self.k).clamp(max=n + beyond) - starts.clamp(min=-beyond)


@dataclass(frozen=True)
class Pool:
    """torch's kernel that pools, its arguments besides the tensors, and the sizes that are pooled.

    For a mean also its windows, unless they adapt to the sizes, and its divisor, if it is not the windows' counts.
    """

    kernel: str  # its name, which torch.compile can write down
    settings: tuple[Any, ...]
    sizes: tuple[int, ...]
    windows: tuple[Along, ...] = ()
    divisor: int | None = None
    compact: bool = False  # save the indices of the largest in as few bytes as possible

    def __call__(self, *tensors: Tensor | None) -> Any:
        input, *more = tensors
        kernel = getattr(kernels, self.kernel, None) or getattr(torch, self.kernel)
        return kernel(input, *self.settings, *(x for x in more if x is not None))


def _pool(n: int, kernel: str, input: Tensor, settings: Sequence[Any], **more: Any) -> Pool:
    """A pool of the last n axes."""
    plain = tuple(tuple(x) if isinstance(x, Sequence) else x for x in settings)
    return Pool(kernel, plain, tuple(input.shape[-n:]), **more)


@implements(_list_with_default)
def _given_or_default(sizes: Any, defaults: list[int]) -> Any:
    """Output sizes, None for the input's. (torch.compile does not look into torch's.)"""
    if isinstance(sizes, (int, torch.SymInt)):
        return sizes
    if len(defaults) <= len(sizes):
        raise ValueError(f"Input dimension should be at least {len(sizes) + 1}")
    return [d if v is None else v for v, d in zip(sizes, defaults[-len(sizes) :], strict=False)]


# --- the largest ---


class MaxPoolFunction(Rule):
    r"""y[i] = max of x over window i = x[j(i)]      j(i): the index of the largest, a constant statistic

    ⟨g, dy⟩ = Σᵢ g[i] dx[j(i)]:  each x receives the sum of g over the windows in which it is the largest,
    ∂L/∂x[j] = Σ g[i] over j(i) = j

    The windows are regular, or adapt to the sizes, or the `samples` in [0, 1) give their places (Graham,
    "Fractional Max-Pooling", 2014).
    """

    statistics = ("indices",)
    save_instead = ("compact_indices",)
    preserve_memory_format = ("grad_input",)

    def forward(input: Tensor, samples: Tensor | None, pool: Pool) -> tuple[Tensor, Tensor]:
        if input.dim() == len(pool.sizes) + 1:  # torch takes volumes without a batch for images, by their strides
            input = input.contiguous()
        return pool(input, samples)

    def compact_indices(indices: Tensor, pool: Pool) -> Tensor:
        """j, relative to the window if that takes fewer bytes."""
        return compacted(indices, pool)

    def grad_input(grad: Tensor, compact_indices: Tensor, pool: Pool) -> Tensor:
        j = restored(compact_indices, pool)
        return sum_over_windows(grad, j, pool.sizes)


def sum_over_windows(g: Tensor, j: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Σ g[i] over j(i) = j"""
    n = len(sizes)
    zeros = g.new_zeros(*g.shape[:-n], math.prod(sizes))
    return zeros.scatter_add(-1, flatten(j, -n), flatten(g, -n)).reshape(*g.shape[:-n], *sizes)


@replaces(sum_over_windows)
def _sum_in_channels_last(g: Tensor, j: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The same in the memory format of g."""
    n = len(sizes)
    if g.dim() == n + 2 and is_channels_last(g):
        g, j = (x.movedim(1, -1).flatten(1, -2) for x in (g, j))
        total = g.new_zeros(len(g), math.prod(sizes), g.shape[-1]).scatter_add_(1, j, g)
        return total.unflatten(1, sizes).movedim(-1, 1)
    return with_reuse(sum_over_windows)(g, j, sizes)


def compacted(indices: Tensor, pool: Pool) -> Tensor:
    """For regular windows the number of the index within its window, one byte; else the index, in four bytes."""
    if not pool.compact:
        return indices
    if has_small_windows(pool):
        return within_windows(indices, pool)
    return indices.int() if math.prod(pool.sizes) < 2**31 else indices


def within_windows(indices: Tensor, pool: Pool) -> Tensor:
    _, numbers = _table(pool, indices.device)
    return looked_up(numbers, indices - origins(pool, indices))


def restored(compact: Tensor, pool: Pool) -> Tensor:
    """The indices of `compacted`."""
    if pool.compact and has_small_windows(pool):
        return from_windows(compact, pool)
    return compact.long()


def from_windows(numbers: Tensor, pool: Pool) -> Tensor:
    ahead, _ = _table(pool, numbers.device)
    return looked_up(ahead, numbers.int()) + origins(pool, numbers)


def has_small_windows(pool: Pool) -> bool:
    """The windows are regular, and a byte numbers the places of each."""
    return pool.kernel.startswith("max_pool") and math.prod(_regular(pool)[0]) <= 256


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    return table[index]


@replaces(looked_up)
def _looked_up_in_order_of_memory(table: Tensor, index: Tensor) -> Tensor:
    """In a third of the time."""
    if is_channels_last(index):
        return _looked_up_in_order_of_memory(table, index.movedim(1, -1)).movedim(-1, 1)
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


def _regular(pool: Pool) -> list[tuple[int, ...]]:
    """Kernel, stride, padding and dilation of each axis."""
    n = len(pool.sizes)
    kernel, stride, padding, dilation, *_ = pool.settings
    return [to_tuple(x, n) for x in (kernel, stride if stride != () else kernel, padding, dilation)]


def origins(pool: Pool, windows: Tensor) -> Tensor:
    """The index of each window's first place; of one that begins in the padding, the index that it would have."""
    n, device = len(pool.sizes), windows.device
    _, stride, padding, _ = _regular(pool)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for size, s, p, o in zip(pool.sizes, stride, padding, windows.shape[-n:], strict=True):
        total = total.unsqueeze(-1) * size + torch.arange(-p, -p + s * o, s, device=device)
    return total


@functools.lru_cache(maxsize=64)
def _table(pool: Pool, device: torch.device) -> tuple[Tensor, Tensor]:
    """By the number of a place within its window its distance from the origin, and by the distance the number."""
    kernel, _, _, dilation = _regular(pool)
    ahead = torch.zeros(1, dtype=torch.int64)
    for size, k, d in zip(pool.sizes, kernel, dilation, strict=True):
        ahead = (ahead.unsqueeze(-1) * size + torch.arange(0, k * d, d)).reshape(-1)
    number = torch.arange(len(ahead), dtype=torch.uint8)
    number = torch.zeros(int(ahead.max()) + 1, dtype=torch.uint8).scatter(0, ahead, number)
    return ahead.to(device), number.to(device)


class Float32MaxPoolFunction(MaxPoolFunction):
    """The ones that autocast widens on the CPU."""

    autocast = {"cpu": "float32"}


class MaxUnpoolFunction(Rule):
    r"""y[j(i)] = x[i], elsewhere 0      j: indices that a max pool returned

    ⟨g, dy⟩ = Σᵢ g[j(i)] dx[i]      ∂L/∂x[i] = g[j(i)]

    Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014.
    """

    autocast = {"cpu": "float32"}

    def forward(input: Tensor, indices: Tensor, pool: Pool) -> Tensor:
        return getattr(kernels, pool.kernel)(input, indices, *pool.settings)

    def grad_input(grad: Tensor, indices: Tensor, pool: Pool) -> Tensor:
        n = len(pool.sizes)
        return flatten(grad, -n).gather(-1, flatten(indices, -n)).reshape(indices.shape)


def _max_pool(
    n: int,
    stood_for: Callable[..., Any],
    kernel: Callable[..., Any],
    rule: type[Rule] = MaxPoolFunction,
    fractional: bool = False,
) -> None:
    """Enter our max pool of the last n axes. It returns indices if it replaces the kernel that returns them."""

    @implements(stood_for)
    def max_pool(input: Tensor, *settings: Any) -> Any:
        if not input.is_floating_point():
            return stood_for(input, *settings)
        *given, samples = settings if fractional else (*settings, None)
        compact = is_large(input) and not torch.compiler.is_compiling()
        pool = _pool(n, kernel.__name__, input, given, compact=compact)
        return rule.apply(input, samples, pool, with_statistics=stood_for is kernel)


for _n, _values, _indices, _adaptive, _wide in (
    (1, torch.max_pool1d, torch.max_pool1d_with_indices, torch.adaptive_max_pool1d, MaxPoolFunction),
    (2, torch.max_pool2d, kernels.max_pool2d_with_indices, kernels.adaptive_max_pool2d, MaxPoolFunction),
    (3, torch.max_pool3d, kernels.max_pool3d_with_indices, kernels.adaptive_max_pool3d, Float32MaxPoolFunction),
):
    _max_pool(_n, _values, _indices, _wide)
    _max_pool(_n, _indices, _indices)
    _max_pool(_n, _adaptive, _adaptive, _wide)
for _n, _kernel in ((2, kernels.fractional_max_pool2d), (3, kernels.fractional_max_pool3d)):
    _max_pool(_n, _kernel, _kernel, Float32MaxPoolFunction, fractional=True)


def _max_unpool(n: int, kernel: Callable[..., Any]) -> None:
    @implements(kernel)
    def max_unpool(input: Tensor, indices: Tensor, *settings: Any) -> Tensor:
        return MaxUnpoolFunction.apply(input, indices, _pool(n, kernel.__name__, input, settings))


_max_unpool(2, kernels.max_unpool2d)
_max_unpool(3, kernels.max_unpool3d)


# --- the mean ---


class AvgPoolFunction(Rule):
    r"""y[i] = (1/n[i]) Σ x over window i      n: how many places it counts, or one divisor for all

    ⟨g, dy⟩ = Σᵢ (g[i]/n[i]) Σ dx over window i,
    ∂L/∂x[j] = Σ g[i]/n[i] over the windows i that j lies in

    Windows are products of intervals, and n is a product of their lengths: one axis after the other.
    """

    preserve_memory_format = ("grad_input",)

    def forward(input: Tensor, pool: Pool) -> Tensor:
        return pool(input)

    def grad_input(grad: Tensor, pool: Pool) -> Tensor:
        g = grad / pool.divisor if pool.divisor else grad
        return sum_over_means(g, pool, -1)


def sum_over_means(g: Tensor, pool: Pool, last: int) -> Tensor:
    """Σ g[i]/n[i] over the windows i that j lies in, over all axes up to the last one."""
    dims = len(pool.sizes)
    if 0 in g.shape:
        return g.new_zeros(*g.shape[: last - dims + 1], *pool.sizes, *g.shape[last:][1:])
    for axis in range(last, last - dims, -1):
        n, o = pool.sizes[axis - last - 1], g.shape[axis]
        windows = pool.windows[axis - last - 1] if pool.windows else _even_windows(n, o)
        if not pool.divisor:
            counts = windows.counts(n, o, g.device) if windows else _adaptive_counts(n, o, g.device)
            g = _divided(g, axis, counts)
        g = _sum_over_windows(g, axis, n, windows) if windows else _sum_over_adaptive_windows(g, axis, n)
    return g.contiguous()


@replaces(sum_over_means)
def _means_in_channels_last(g: Tensor, pool: Pool, last: int) -> Tensor:
    """The same in the memory format of g."""
    if g.dim() == len(pool.sizes) + 2 and is_channels_last(g):
        return sum_over_means(g.movedim(1, -1), pool, last - 1).movedim(-1, 1)
    return sum_over_means(g, pool, last)


def _even_windows(n: int, o: int) -> Along | None:
    """o adaptive windows over n places if they are regular."""
    return Along(n // o, n // o, 0, False) if n % o == 0 else None


class Float32AvgPoolFunction(AvgPoolFunction):
    """The ones that autocast widens on the CPU."""

    autocast = {"cpu": "float32"}


def _divided(tensor: Tensor, axis: int, counts: Tensor | int) -> Tensor:
    if isinstance(counts, Tensor):
        return tensor / counts.to(tensor.dtype).reshape(-1, *[1] * (-1 - axis))
    return tensor if counts == 1 else tensor / counts


def _sum_over_windows(g: Tensor, axis: int, n: int, windows: Along) -> Tensor:
    """For each of n places along an axis, the sum of g over the windows that it lies in.

    Place s q + r - p (0 ≤ r < s) lies in the windows q, q - 1, ... as far as they reach: in m = ⌈k/s⌉ of them if
    r < k - (m - 1) s, else in m - 1. So two sums serve all places: of m windows, and of m - 1.
    """
    k, s, p, _ = windows
    m, q = -(-k // s), -(-(n + p) // s)
    if m > 1 or q > g.shape[axis]:  # windows with g = 0, before and after
        g = pad(g, (*(0, 0) * (-1 - axis), m - 1, q - g.shape[axis]))
    *others, farthest = (g.narrow(axis, m - 1 - j, q) for j in range(m))
    fewer = functools.reduce(torch.add, others) if others else None
    every = farthest if fewer is None else fewer + farthest
    parts = [_repeated(every, axis, k - (m - 1) * s)]
    if m * s > k:
        parts.append(_repeated(torch.zeros_like(every) if fewer is None else fewer, axis, m * s - k))
    places = torch.cat(parts, axis) if len(parts) > 1 else parts[0]
    return flatten(places, axis - 1, axis).narrow(axis, p, n)


def _repeated(tensor: Tensor, axis: int, times: int) -> Tensor:
    """Each entry along an axis so many times, along a new axis behind it."""
    repeated = tensor.unsqueeze(axis)
    return repeated.expand(*[-1] * (repeated.dim() + axis), times, *[-1] * (-1 - axis))


def _adaptive_windows(n: int, o: int) -> list[tuple[int, int]]:
    """The first place of each of o windows over n places, and the end: ⌊i n / o⌋ and ⌈(i + 1) n / o⌉."""
    return [(i * n // o, -(-(i + 1) * n // o)) for i in range(o)]


def _adaptive_counts(n: int, o: int, device: torch.device) -> Tensor:
    """The number of places of each of o windows over n."""
    return torch.tensor([end - start for start, end in _adaptive_windows(int(n), int(o))], device=device)


def _sum_over_adaptive_windows(g: Tensor, axis: int, n: int) -> Tensor:
    """The same for adaptive windows: between two edges all places lie in the same windows."""
    n, o, pieces = int(n), int(g.shape[axis]), []  # torch.compile fixes what it counts
    edges = sorted({edge for window in _adaptive_windows(n, o) for edge in window})
    for start, end in itertools.pairwise(edges):
        first, last = start * o // n, ((start + 1) * o - 1) // n
        total = functools.reduce(torch.add, (g.narrow(axis, i, 1) for i in range(first, last + 1)))
        pieces.append(total.expand(*g.shape[:axis], end - start, *g.shape[axis:][1:]))
    return torch.cat(pieces, axis)


def _mean(n: int, rule: type[Rule], input: Tensor, settings: Sequence[Any]) -> Tensor:
    kernel_size, stride, padding, _, include_pad, *divisor = settings
    moves = (to_tuple(numbers, n) for numbers in (kernel_size, stride or kernel_size, padding))
    windows = tuple(Along(k, s, p, include_pad) for k, s, p in zip(*moves, strict=True))
    pool = _pool(n, f"avg_pool{n}d", input, settings, windows=windows, divisor=divisor[0] if divisor else None)
    return rule.apply(input, pool)


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
    return _mean(1, AvgPoolFunction, input, (kernel_size, stride, padding, ceil_mode, count_include_pad))


def _avg_pool(n: int) -> Callable[..., Tensor]:
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
        return _mean(n, rule, input, settings)

    return avg_pool


avg_pool2d, avg_pool3d = for_1d_2d_3d(_avg_pool, (2, 3))


@with_torch_errors
def adaptive_avg_pool1d(input: Tensor, output_size: IntOrInts) -> Tensor:
    """The mean of each of so many windows, as `torch.nn.functional.adaptive_avg_pool1d`: (N, C, L) or (C, L)."""
    return AvgPoolFunction.apply(input, _pool(1, "adaptive_avg_pool1d", input, (output_size,)))


def _adaptive_avg_pool(n: int, kernel: Callable[..., Any], rule: type[Rule]) -> None:
    @implements(kernel)
    def adaptive_avg_pool(input: Tensor, output_size: IntOrInts) -> Tensor:
        return rule.apply(input, _pool(n, kernel.__name__, input, (output_size,)))


_adaptive_avg_pool(2, kernels.adaptive_avg_pool2d, AvgPoolFunction)
_adaptive_avg_pool(3, kernels.adaptive_avg_pool3d, Float32AvgPoolFunction)


# --- the norm ---


class RootFunction(Rule):
    r"""y = (k x)^(1/p)      y′ = (k/p) (k x)^(1/p - 1)      (at 0: 0, as torch, whatever g is)"""

    def forward(input: Tensor, k: int, p: float) -> Tensor:
        return (input.sign() * input.abs()).mul(k).pow(1 / p)

    def grad_input(grad: Tensor, input: Tensor, k: int, p: float) -> Tensor:
        nonzero = input != 0
        x = torch.where(nonzero, input, 1)
        return torch.where(nonzero, grad * (k / p) * (k * x) ** (1 / p - 1), 0)


def _takes_infinity(n: int) -> bool:
    """torch's own handles an infinite norm. Older ones (2.11) take its power like another's: 1 everywhere, and nan
    for gradients; so does ours there."""
    return f"max_pool{n}d" in getattr(torch.nn.functional, f"lp_pool{n}d").__code__.co_names


def _lp_pool(n: int) -> Callable[..., Tensor]:
    largest = kernel_replacements[getattr(torch, f"max_pool{n}d")]
    mean = (avg_pool1d, avg_pool2d, avg_pool3d)[n - 1]
    takes_infinity = _takes_infinity(n)

    def lp_pool(
        input: Tensor,
        norm_type: int | float,
        kernel_size: IntOrInts,
        stride: IntOrInts | None = None,
        ceil_mode: bool = False,
    ) -> Tensor:
        """(Σ xᵖ)^(1/p) of each window of the last {n} axes, as `torch.nn.functional.lp_pool{n}d`.

        Shapes: (N, C, *sizes) or (C, *sizes). p is the `norm_type`; infinite: the largest or least |x|, where
        torch's own gives that.
        """
        if takes_infinity and norm_type in (math.inf, -math.inf):
            sign = 1 if norm_type > 0 else -1
            found = largest(sign * AbsoluteFunction.apply(input), kernel_size, stride or (), 0, 1, ceil_mode)
            return sign * found
        powers = mean(PowerFunction.apply(input, norm_type), kernel_size, stride, 0, ceil_mode)
        return RootFunction.apply(powers, math.prod(to_tuple(kernel_size, n)), norm_type)

    return lp_pool


lp_pool1d, lp_pool2d, lp_pool3d = for_1d_2d_3d(_lp_pool)


# --- the table ---


def _sizes(n: int) -> tuple[int, ...]:
    return ((6,), (4, 5), (2, 3, 4))[n - 1]


def _big(n: int, *args: Any, **kwargs: Any) -> Callable[[TensorFactory], SampleInput]:
    shape = ((16, 64, 4096), (16, 64, 56, 56), (4, 32, 8, 28, 28))[n - 1]
    return lambda t: SampleInput(t(*shape), *args, **kwargs)


def _places(t: TensorFactory, n: int, *shape: int) -> Tensor:
    """What a max pool of 2 finds in each window, in a tensor of twice these sides."""
    wide = t(*shape[:-n], *(2 * side for side in shape[-n:]))
    return getattr(torch.nn.functional, f"max_pool{n}d")(wide, 2, return_indices=True)[1]


def _register(n: int) -> None:
    sizes, ones = _sizes(n), (1,) * (n - 1)
    register(
        f"max_pool{n}d",
        sample_inputs=lambda t: [
            SampleInput(t(2, 1, *sizes), 2, 1, 0, (*ones, 2)),
            SampleInput(t(2, *sizes), 3, 2, 1, ceil_mode=True),
        ],
        benchmark_input=_big(n, 3, 2, 1),
    )
    register(
        f"adaptive_max_pool{n}d",
        sample_inputs=lambda t: [SampleInput(t(2, 1, *sizes), 2), SampleInput(t(2, *sizes), (*ones, 3))],
        benchmark_input=_big(n, 7),
    )
    register(
        f"max_unpool{n}d",
        sample_inputs=lambda t: [
            SampleInput(t(2, 1, *sizes), _places(t, n, 2, 1, *sizes), 2),
            SampleInput(t(2, *sizes), _places(t, n, 2, *sizes), 2, 2, 0, [2 * side + 1 for side in sizes]),
        ],
        benchmark_input=lambda t: SampleInput(*(big := _big(n)(t)).args, _places(t, n, *big[0].shape), 2),
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
        benchmark_input=_big(n, 2),
    )
    register(
        adaptive_avg_pool1d if n == 1 else f"adaptive_avg_pool{n}d",
        sample_inputs=lambda t: [SampleInput(t(2, 1, *sizes), 2), SampleInput(t(2, *sizes), (*ones, 4))],
        benchmark_input=_big(n, 7),
    )
    register(
        (lp_pool1d, lp_pool2d, lp_pool3d)[n - 1],
        sample_inputs=lambda t: [
            SampleInput(t(2, 1, *sizes), 2, 2),
            SampleInput(t(2, *sizes, low=0.5, high=2), 3.0, 2, 1, ceil_mode=True),
            *([SampleInput(t(1, 1, *sizes), -math.inf, 2)] if _takes_infinity(n) else []),
        ],
        benchmark_input=_big(n, 2, 2),
    )
    if n > 1:
        register(
            f"fractional_max_pool{n}d",
            sample_inputs=lambda t: [
                SampleInput(t(2, 1, *sizes), (1, 2, 2)[-n:], output_size=(1, 1, 2)[-n:]),
                SampleInput(t(2, *sizes), 1, output_ratio=(0.5,) * n),
            ],
            benchmark_input=_big(n, 2, output_ratio=(0.5,) * n),
            random=True,
        )


for _n in (1, 2, 3):
    _register(_n)
