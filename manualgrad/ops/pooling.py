"""Pooling: the largest, the mean or a norm of each window, and the reverse of the first.

The rules stand for torch's kernels. What comes before one (checks, defaults, the choice by ``return_indices``,
the random places of fractional windows) is torch's own Python, which calls them.
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

from manualgrad.ops.elementary import (
    AbsoluteFunction,
    Numbers,
    PowerFunction,
    added,
    channels_last,
    choose,
    drop_in,
    each,
    of_dimensions,
    stands_for,
)
from manualgrad.ops.padding import pad
from manualgrad.registry import Call, Maker, register, stand_ins
from manualgrad.rule import Rule
from manualgrad.saving import large

kernels: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]


class Along(NamedTuple):
    """Windows along one axis: window i from s i - p on, k long; what it counts may lie in the padding."""

    k: int
    s: int
    p: int
    counts_padding: bool

    def counts(self, n: int, o: int, device: torch.device) -> Tensor | int:
        """How many places each of o windows counts, of n; a number where that is the same for all."""
        beyond = self.p if self.counts_padding else 0
        if self.p <= beyond and self.s * (o - 1) - self.p + self.k <= n + beyond:
            return self.k
        starts = self.s * torch.arange(o, device=device) - self.p
        return (starts + self.k).clamp(max=n + beyond) - starts.clamp(min=-beyond)


@dataclass(frozen=True)
class Pool:
    """The kernel of torch's that pools, what it is told besides its tensors, and the sizes that are pooled.

    Of a mean also its windows, unless they adapt to the sizes, and what it divides by, if not by their counts.
    """

    kernel: str  # its name, which torch.compile can write down
    settings: tuple[Any, ...]
    sizes: tuple[int, ...]
    windows: tuple[Along, ...] = ()
    divisor: int | None = None

    def __call__(self, *tensors: Tensor | None) -> Any:
        input, *more = tensors
        kernel = getattr(kernels, self.kernel, None) or getattr(torch, self.kernel)
        return kernel(input, *self.settings, *(x for x in more if x is not None))


def _pool(n: int, kernel: str, input: Tensor, settings: Sequence[Any], *more: Any) -> Pool:
    """A pool of the last n axes."""
    plain = tuple(tuple(x) if isinstance(x, Sequence) else x for x in settings)
    return Pool(kernel, plain, tuple(input.shape[-n:]), *more)


@stands_for(_list_with_default)
def _given_or_default(sizes: Any, defaults: list[int]) -> Any:
    """Output sizes, None for the input's. (torch.compile does not look into torch's.)"""
    if isinstance(sizes, (int, torch.SymInt)):
        return sizes
    if len(defaults) <= len(sizes):
        raise ValueError(f"Input dimension should be at least {len(sizes) + 1}")
    return [d if v is None else v for v, d in zip(sizes, defaults[-len(sizes) :], strict=False)]


# --- the largest ---


class MaxPoolFunction(Rule):
    r"""y[i] = max of x over window i = x[j(i)]      j: where the largest stands, a constant statistic

    ⟨g, dy⟩ = Σᵢ g[i] dx[j(i)]:  each x collects the g of every window it was the largest of,
    ∂L/∂x[j] = Σ g[i] over j(i) = j

    The windows are regular, or adapt to the sizes, or lie where the `samples` in [0, 1) put them (Graham,
    "Fractional Max-Pooling", 2014).
    """

    statistics = ("indices",)
    keeps = ("places",)

    def forward(input: Tensor, samples: Tensor | None, pool: Pool) -> tuple[Tensor, Tensor]:
        if input.dim() == len(pool.sizes) + 1:  # torch takes volumes without a batch for images, by their strides
            input = input.contiguous()
        return pool(input, samples)

    def places(indices: Tensor, pool: Pool) -> Tensor:
        """j: of many, as few bytes as say it."""
        return _within_windows(indices, pool) if large(indices) else indices

    def grad_input(grad: Tensor, places: Tensor, pool: Pool) -> Tensor:
        n = len(pool.sizes)
        indices = _from_windows(places, pool)
        form = grad.dim() == n + 2 and channels_last(grad)
        sent, at = _flat(grad, n, form), _flat(indices, n, form)
        axis = 1 if form else -1
        shape = list(sent.shape)
        shape[axis] = math.prod(pool.sizes)
        found = added(sent.new_zeros(shape), axis, at, sent)
        if form:
            return found.reshape(len(found), *pool.sizes, found.shape[-1]).movedim(-1, 1)
        return found.reshape(*sent.shape[:-1], *pool.sizes)


def _within_windows(indices: Tensor, pool: Pool) -> Tensor:
    """Of regular windows which place of its window each index is, a byte; else the index, in four if it fits."""
    if pool.kernel.startswith("max_pool"):
        kernel, *_ = _regular(pool)
        if math.prod(kernel) <= 256:
            _, place = _table(pool, indices.device)
            return _looked_up(place, indices - _origins(pool, indices))
    return indices.int() if math.prod(pool.sizes) < 2**31 else indices


def _from_windows(places: Tensor, pool: Pool) -> Tensor:
    if places.dtype == torch.uint8:
        ahead, _ = _table(pool, places.device)
        return _looked_up(ahead, places.int()).add_(_origins(pool, places))
    return places.long()


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index], in a third of its time."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


def _regular(pool: Pool) -> list[tuple[int, ...]]:
    """Kernel, stride, padding and dilation of each axis."""
    n = len(pool.sizes)
    kernel, stride, padding, dilation, *_ = pool.settings
    return [each(x, n) for x in (kernel, stride if stride != () else kernel, padding, dilation)]


def _origins(pool: Pool, windows: Tensor) -> Tensor:
    """The index at which each window begins; of one that begins in the padding, where it would be."""
    n, device = len(pool.sizes), windows.device
    _, stride, padding, _ = _regular(pool)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for size, s, p, o in zip(pool.sizes, stride, padding, windows.shape[-n:], strict=True):
        start = torch.arange(-p, -p + s * o, s, device=device)
        total = total.unsqueeze(-1) * size + start
    return total


@functools.lru_cache(maxsize=64)
def _table(pool: Pool, device: torch.device) -> tuple[Tensor, Tensor]:
    """How far from its window's origin each place of a window is, and which place is so far."""
    kernel, _, _, dilation = _regular(pool)
    ahead = torch.zeros(1, dtype=torch.int64)
    for size, k, d in zip(pool.sizes, kernel, dilation, strict=True):
        ahead = (ahead.unsqueeze(-1) * size + torch.arange(0, k * d, d)).reshape(-1)
    place = torch.zeros(int(ahead.max()) + 1, dtype=torch.uint8)
    place[ahead] = torch.arange(len(ahead)).to(torch.uint8)
    return ahead.to(device), place.to(device)


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
        return _flat(grad, n).gather(-1, _flat(indices, n)).reshape(indices.shape)


def _flat(tensor: Tensor, n: int, channels_last: bool = False) -> Tensor:
    """The last n axes as one; the channels behind it if that is how they lie in memory."""
    if channels_last:
        return tensor.movedim(1, -1).reshape(len(tensor), -1, tensor.shape[1])
    return tensor.reshape(*tensor.shape[:-n], math.prod(tensor.shape[-n:]))


def _max_pool(
    n: int,
    stood_for: Callable[..., Any],
    kernel: Callable[..., Any],
    rule: type[Rule] = MaxPoolFunction,
    fractional: bool = False,
) -> None:
    """Enter our max pool of the last n axes: with indices, if what it stands for is the kernel that finds them."""

    @stands_for(stood_for)
    def max_pool(input: Tensor, *settings: Any) -> Any:
        if not input.is_floating_point():
            return stood_for(input, *settings)
        *told, samples = settings if fractional else (*settings, None)
        pool = _pool(n, kernel.__name__, input, told)
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
    @stands_for(kernel)
    def max_unpool(input: Tensor, indices: Tensor, *settings: Any) -> Tensor:
        return MaxUnpoolFunction.apply(input, indices, _pool(n, kernel.__name__, input, settings))


_max_unpool(2, kernels.max_unpool2d)
_max_unpool(3, kernels.max_unpool3d)


# --- the mean ---


class AvgPoolFunction(Rule):
    r"""y[i] = (1/n[i]) Σ x over window i      n: how many places it counts, or one divisor for all

    ⟨g, dy⟩ = Σᵢ (g[i]/n[i]) Σ dx over window i:  each x collects g/n of every window over it. Windows are products
    of intervals, so this is done along one axis after the other.
    """

    def forward(input: Tensor, pool: Pool) -> Tensor:
        return pool(input)

    def grad_input(grad: Tensor, pool: Pool) -> Tensor:
        dims = len(pool.sizes)
        if 0 in grad.shape:
            return grad.new_zeros(*grad.shape[:-dims], *pool.sizes)
        form = grad.dim() == dims + 2 and channels_last(grad)
        total = grad.movedim(1, -1) if form else grad  # as it lies in memory
        total = total / pool.divisor if pool.divisor else total
        for place, n in reversed([*enumerate(pool.sizes)]):
            axis = total.dim() - dims - form + place
            o = total.shape[axis]
            along = (
                pool.windows[place] if pool.windows else Along(n // o, n // o, 0, False) if n % o == 0 else None
            )
            if not pool.divisor:
                of = along.counts if along else _adaptive_counts
                total = _divided(total, axis, of(n, o, total.device))
            total = _collected(total, axis, n, along) if along else _collected_adaptively(total, axis, n)
        total = total.contiguous()
        return total.movedim(-1, 1) if form else total


class Float32AvgPoolFunction(AvgPoolFunction):
    """The ones that autocast widens on the CPU."""

    autocast = {"cpu": "float32"}


def _divided(tensor: Tensor, axis: int, counts: Tensor | int) -> Tensor:
    if isinstance(counts, Tensor):
        return tensor / counts.to(tensor.dtype).reshape(-1, *[1] * (tensor.dim() - 1 - axis))
    return tensor if counts == 1 else tensor / counts


def _collected(sent: Tensor, axis: int, n: int, along: Along) -> Tensor:
    """For each of n places along an axis, the sum of what the windows over it sent.

    Place s q + r - p (0 ≤ r < s) lies in the windows q, q - 1, ... as far as they reach: in m = ⌈k/s⌉ of them if
    r < k - (m - 1) s, else in m - 1. So two sums do for all places: of m windows, and of m - 1.
    """
    k, s, p, _ = along
    m, q = -(-k // s), -(-(n + p) // s)
    if m > 1 or q > sent.shape[axis]:  # windows of nothing, before and after
        sent = pad(sent, (*(0, 0) * (sent.dim() - 1 - axis), m - 1, q - sent.shape[axis]))
    *others, farthest = (sent.narrow(axis, m - 1 - j, q) for j in range(m))
    fewer = functools.reduce(torch.add, others) if others else None
    every = farthest if fewer is None else fewer + farthest
    parts = [_repeated(every, axis, k - (m - 1) * s)]
    if m * s > k:
        parts.append(_repeated(torch.zeros_like(every) if fewer is None else fewer, axis, m * s - k))
    places = torch.cat(parts, axis + 1) if len(parts) > 1 else parts[0]
    places = places.reshape(*every.shape[:axis], q * s, *every.shape[axis + 1 :])
    return places.narrow(axis, p, n)


def _repeated(tensor: Tensor, axis: int, times: int) -> Tensor:
    """Each entry along an axis so many times, along a new axis behind it."""
    return tensor.unsqueeze(axis + 1).expand(*tensor.shape[: axis + 1], times, *tensor.shape[axis + 1 :])


def _adaptive_windows(n: int, o: int) -> list[tuple[int, int]]:
    """From where to where each of o windows reaches over n places: ⌊i n / o⌋ and ⌈(i + 1) n / o⌉."""
    return [(i * n // o, -(-(i + 1) * n // o)) for i in range(o)]


def _adaptive_counts(n: int, o: int, device: torch.device) -> Tensor:
    """How many places each of o windows counts, of n."""
    return torch.tensor([end - start for start, end in _adaptive_windows(int(n), int(o))], device=device)


def _collected_adaptively(sent: Tensor, axis: int, n: int) -> Tensor:
    """The same for adaptive windows: between two edges all places lie in the same ones."""
    n, o, pieces = int(n), int(sent.shape[axis]), []  # torch.compile fixes what it counts
    edges = sorted({edge for window in _adaptive_windows(n, o) for edge in window})
    for start, end in itertools.pairwise(edges):
        first, last = start * o // n, ((start + 1) * o - 1) // n
        over = functools.reduce(torch.add, (sent.narrow(axis, i, 1) for i in range(first, last + 1)))
        pieces.append(over.expand(*sent.shape[:axis], end - start, *sent.shape[axis + 1 :]))
    return torch.cat(pieces, axis)


def _mean(n: int, rule: type[Rule], input: Tensor, settings: Sequence[Any]) -> Tensor:
    kernel_size, stride, padding, _, include_pad, *divisor = settings
    moves = (each(numbers, n) for numbers in (kernel_size, stride or kernel_size, padding))
    windows = tuple(Along(k, s, p, include_pad) for k, s, p in zip(*moves, strict=True))
    pool = _pool(n, f"avg_pool{n}d", input, settings, windows, *divisor)
    return rule.apply(input, pool)


@drop_in
def avg_pool1d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of each window, as `torch.nn.functional.avg_pool1d`. Shapes: (N, C, L) or (C, L)."""
    return _mean(1, AvgPoolFunction, input, (kernel_size, stride, padding, ceil_mode, count_include_pad))


def _avg_pool(n: int) -> Callable[..., Tensor]:
    rule = Float32AvgPoolFunction if n == 3 else AvgPoolFunction

    def avg_pool(
        input: Tensor,
        kernel_size: Numbers,
        stride: Numbers | None = None,
        padding: Numbers = 0,
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


avg_pool2d, avg_pool3d = of_dimensions(_avg_pool, (2, 3))


@drop_in
def adaptive_avg_pool1d(input: Tensor, output_size: Numbers) -> Tensor:
    """The mean of each of so many windows, as `torch.nn.functional.adaptive_avg_pool1d`: (N, C, L) or (C, L)."""
    return AvgPoolFunction.apply(input, _pool(1, "adaptive_avg_pool1d", input, (output_size,)))


def _adaptive_avg_pool(n: int, kernel: Callable[..., Any], rule: type[Rule]) -> None:
    @stands_for(kernel)
    def adaptive_avg_pool(input: Tensor, output_size: Numbers) -> Tensor:
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
        safe = choose(nonzero, input * k, torch.ones_like(input))
        return choose(nonzero, grad * (k / p) * safe.pow(1 / p - 1))


def _takes_infinity(n: int) -> bool:
    """torch's own handles an infinite norm. Older ones (2.11) take its power like another's: 1 everywhere, and nan
    for gradients; so does ours there."""
    return f"max_pool{n}d" in getattr(torch.nn.functional, f"lp_pool{n}d").__code__.co_names


def _lp_pool(n: int) -> Callable[..., Tensor]:
    largest = stand_ins[getattr(torch, f"max_pool{n}d")]
    mean = (avg_pool1d, avg_pool2d, avg_pool3d)[n - 1]
    takes_infinity = _takes_infinity(n)

    def lp_pool(
        input: Tensor,
        norm_type: int | float,
        kernel_size: Numbers,
        stride: Numbers | None = None,
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
        return RootFunction.apply(powers, math.prod(each(kernel_size, n)), norm_type)

    return lp_pool


lp_pool1d, lp_pool2d, lp_pool3d = of_dimensions(_lp_pool)


# --- the table ---


def _sizes(n: int) -> tuple[int, ...]:
    return ((6,), (4, 5), (2, 3, 4))[n - 1]


def _big(n: int, *args: Any, **kwargs: Any) -> Callable[[Maker], Call]:
    shape = ((16, 64, 4096), (16, 64, 56, 56), (4, 32, 8, 28, 28))[n - 1]
    return lambda t: Call(t(*shape), *args, **kwargs)


def _places(t: Maker, n: int, *shape: int) -> Tensor:
    """What a max pool of 2 finds in each window, in a tensor of twice these sides."""
    wide = t(*shape[:-n], *(2 * side for side in shape[-n:]))
    return getattr(torch.nn.functional, f"max_pool{n}d")(wide, 2, return_indices=True)[1]


def _register(n: int) -> None:
    sizes, ones = _sizes(n), (1,) * (n - 1)
    register(
        f"max_pool{n}d",
        samples=lambda t: [
            Call(t(2, 1, *sizes), 2, 1, 0, (*ones, 2)),
            Call(t(2, *sizes), 3, 2, 1, ceil_mode=True),
        ],
        big=_big(n, 3, 2, 1),
    )
    register(
        f"adaptive_max_pool{n}d",
        samples=lambda t: [Call(t(2, 1, *sizes), 2), Call(t(2, *sizes), (*ones, 3))],
        big=_big(n, 7),
    )
    register(
        f"max_unpool{n}d",
        samples=lambda t: [
            Call(t(2, 1, *sizes), _places(t, n, 2, 1, *sizes), 2),
            Call(t(2, *sizes), _places(t, n, 2, *sizes), 2, 2, 0, [2 * side + 1 for side in sizes]),
        ],
        big=lambda t: Call(*(big := _big(n)(t)).args, _places(t, n, *big[0].shape), 2),
        lacks={"compile_dynamic-0": "torch.compile does not trace torch's check of the output size"},
    )
    register(
        (avg_pool1d, avg_pool2d, avg_pool3d)[n - 1],
        samples=lambda t: [
            Call(t(2, 1, *sizes), (2, 3, 3)[-n:], 2, 1, ceil_mode=True, count_include_pad=False),
            Call(t(2, *sizes), (2,) * n, (1,) * n, 1, ceil_mode=True),
            *([] if n == 1 else [Call(t(2, 1, *sizes), 2, 3, divisor_override=3)]),
        ],
        big=_big(n, 2),
    )
    register(
        adaptive_avg_pool1d if n == 1 else f"adaptive_avg_pool{n}d",
        samples=lambda t: [Call(t(2, 1, *sizes), 2), Call(t(2, *sizes), (*ones, 4))],
        big=_big(n, 7),
    )
    register(
        (lp_pool1d, lp_pool2d, lp_pool3d)[n - 1],
        samples=lambda t: [
            Call(t(2, 1, *sizes), 2, 2),
            Call(t(2, *sizes, low=0.5, high=2), 3.0, 2, 1, ceil_mode=True),
            *([Call(t(1, 1, *sizes), -math.inf, 2)] if _takes_infinity(n) else []),
        ],
        big=_big(n, 2, 2),
    )
    if n > 1:
        register(
            f"fractional_max_pool{n}d",
            samples=lambda t: [
                Call(t(2, 1, *sizes), (1, 2, 2)[-n:], output_size=(1, 1, 2)[-n:]),
                Call(t(2, *sizes), 1, output_ratio=(0.5,) * n),
            ],
            big=_big(n, 2, output_ratio=(0.5,) * n),
            random=True,
        )


for _n in (1, 2, 3):
    _register(_n)
