"""Resampling: an image on another grid, its patches, its pixels shuffled between space and channels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.memory_format import CHANNELS_LAST, is_channels_last
from manualgrad.ops.registration import implements, with_torch_errors
from manualgrad.ops.shapes import IntOrInts, flatten, to_tuple, unflatten
from manualgrad.registry import SampleInput, register
from manualgrad.rule import LOWER_PRECISION, Rule, autocast_inputs, replaces, with_reuse
from manualgrad.torch_internals import is_vmapped

Pair = tuple[int, int]


class InterpolateFunction(Rule):
    r"""y = (A₁ ⊗ … ⊗ Aₖ) x      Aᵢ: (out, in), the weights along an axis of space, the same for every line of it

    dy = (A₁ ⊗ … ⊗ Aₖ) dx,  so  ∂L/∂x = (A₁ᵀ ⊗ … ⊗ Aₖᵀ) g:  each axis by itself, with the transpose of its weights.
    The columns of Aᵢ are what interpolation makes of the unit vectors.
    """

    autocast = {"cuda": "float32"}
    preserve_memory_format = ("grad_input",)

    def forward(
        input: Tensor,
        shape: tuple[int, ...],
        size: tuple[int, ...] | None,
        scale: tuple[float, ...] | None,
        mode: str,
        aligned: bool | None,
        antialias: bool,
    ) -> Tensor:
        return F.interpolate(input, size, scale, mode, aligned, antialias=antialias)

    def grad_input(
        grad: Tensor,
        shape: tuple[int, ...],
        size: tuple[int, ...] | None,
        scale: tuple[float, ...] | None,
        mode: str,
        aligned: bool | None,
        antialias: bool,
    ) -> Tensor:
        k = len(shape)
        for axis, n in zip(range(-k, 0), shape, strict=True):
            units = torch.eye(n, dtype=grad.dtype, device=grad.device).reshape(1, n, *[1] * (k - 1), n)
            to = None if size is None else [*[1] * (k - 1), size[axis]]
            by = None if scale is None else [*[1.0] * (k - 1), scale[axis]]
            images = F.interpolate(units, to, by, mode, aligned, antialias=antialias)
            grad = along_axis(images.reshape(n, grad.shape[axis]), grad, axis)
        return grad


def along_axis(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """A matrix (out, in) applied to every line along an axis."""
    before, after = tensor.shape[:axis], tensor.shape[axis:][1:]
    lines = tensor.reshape(*before, matrix.shape[1], math.prod(after))
    return (matrix @ lines).reshape(*before, matrix.shape[0], *after)


_BAND = 64


@replaces(along_axis)
def _along_axis_by_bands(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """The same of a matrix that is zero except near its diagonal, by bands of rows."""
    if is_channels_last(tensor):
        return _along_axis_by_bands(matrix, tensor.movedim(1, -1), axis - 1).movedim(-1, 1)
    n, m = matrix.shape
    reach = 4 * n / max(min(n, m), 1) + 2  # of the widest kernel, in rows
    found = []
    for first in range(0, n, _BAND):
        low = max(math.floor((first - reach) * m / n), 0) if n > _BAND else 0
        high = min(math.ceil((first + _BAND + reach) * m / n), m)
        band, part = matrix[first : first + _BAND, low:high], tensor.narrow(axis, low, high - low)
        found.append(part @ band.mT if axis == -1 else along_axis(band, part, axis))
    return found[0] if len(found) == 1 else torch.cat(found, axis)


class AreaFunction(InterpolateFunction):
    """Adaptive average pooling, which autocast does not cast."""

    autocast = {}


@dataclass(frozen=True)
class Nearest:
    """One of torch's kernels that take the nearest pixel, and what torch chooses it by.

    torch has several. They round differently, so they take different pixels, even of small images. Which one torch
    calls depends on the mode, the sizes, the dtype, whether the channels are innermost in memory, and whether
    there are more than 3 of them. So `pixels_taken` computes no places: it calls the kernel.
    """

    mode: str
    shape: tuple[int, ...]
    size: tuple[int, ...] | None
    scale: tuple[float, ...] | None
    channels: int
    innermost: bool  # the channels, in memory
    dtype: torch.dtype

    def __call__(self, input: Tensor) -> Tensor:
        if is_vmapped(input):
            input = input.contiguous()
        return F.interpolate(input, self.size, self.scale, self.mode)

    def repeats(self, axis: int, n: int) -> int:
        """The number of times that each pixel is taken, if it is a power of 2, which no kernel rounds; else 0."""
        times, rest = n // max(self.shape[axis], 1), n % max(self.shape[axis], 1)
        exact = rest == 0 and times in (1, 2, 4, 8, 16) and n <= 2**24
        return times if exact and (self.scale is None or self.scale[axis] == times) else 0


def pixels_taken(nearest: Nearest, device: torch.device) -> list[Tensor]:
    """i(p) along each axis: what the kernel makes of images that show at each pixel its place.

    A place is shown by its digits, an image for each, which every dtype holds exactly.
    """
    k = len(nearest.shape)
    digits = 1 if nearest.dtype.itemsize > 2 else 3
    places = torch.meshgrid([torch.arange(n, device=device) for n in nearest.shape], indexing="ij")
    images = [place >> (8 * i) & 255 if digits > 1 else place for place in places for i in range(digits)]
    shown = torch.stack(images).to(nearest.dtype).unsqueeze(1).repeat(1, nearest.channels, *[1] * k)
    if nearest.innermost:
        shown = shown.contiguous(memory_format=CHANNELS_LAST[shown.dim()])
    found = nearest(shown)[:, 0].unflatten(0, (k, digits)).long()
    shift = 8 * torch.arange(digits, device=device).reshape(digits, *[1] * k)
    taken = (found << shift).sum(1).unbind()
    return [place.movedim(axis, -1)[(0,) * (k - 1)] for axis, place in zip(range(-k, 0), taken, strict=True)]


replaces(pixels_taken)(functools.lru_cache(maxsize=64)(pixels_taken))


class NearestFunction(Rule):
    r"""y[p] = x[i(p)]      i: the pixel that is taken for p, along each axis by itself

    ⟨g, dy⟩ = Σ g[p] dx[i(p)]:  each pixel receives the sum of g over the places that it is taken for,
    ∂L/∂x[j] = Σ g[p] over i(p) = j,  axis by axis
    """

    autocast = {"cuda": "float32"}
    preserve_memory_format = ("grad_input",)

    def forward(input: Tensor, nearest: Nearest) -> Tensor:
        return nearest(input)

    def grad_input(grad: Tensor, nearest: Nearest) -> Tensor:
        k, n = len(nearest.shape), nearest.shape
        repeats = [nearest.repeats(axis, grad.shape[axis]) for axis in range(-k, 0)]
        i: Any = None if all(repeats) else pixels_taken(nearest, grad.device)
        for axis in range(-1, -k - 1, -1):
            if repeats[axis]:  # i(p) = ⌊p / repeats⌋
                parts = unflatten(grad, axis, (n[axis], repeats[axis])).unbind(axis)
                grad = functools.reduce(torch.add, parts)
            else:
                grad = sum_over_places(grad, axis, i[axis], n[axis])
        return grad


def sum_over_places(g: Tensor, axis: int, i: Tensor, n: int) -> Tensor:
    """Σ g[p] over i(p) = j, along one axis of n pixels."""
    return g.new_zeros(*g.shape[:axis], n, *g.shape[axis:][1:]).index_add(axis, i, g)


@replaces(sum_over_places)
def _sum_over_places(g: Tensor, axis: int, i: Tensor, n: int) -> Tensor:
    """The same in the memory format of g."""
    if is_channels_last(g):
        return _sum_over_places(g.movedim(1, -1), axis - 1, i, n).movedim(-1, 1)
    return with_reuse(sum_over_places)(g, axis, i, n)


def _with_kernel(
    input: Tensor, size: tuple[int, ...] | None, scale: tuple[float, ...] | None, mode: str
) -> tuple[Tensor, Nearest]:
    """The input in the dtype that autocast gives it, and the kernel for it."""
    shape = tuple(input.shape[2:])
    (input,) = autocast_inputs(NearestFunction, (input,))
    form = CHANNELS_LAST.get(input.dim())
    eager = not torch.compiler.is_compiling()  # torch.compile's replacement of a kernel depends on no layout
    innermost = eager and form is not None and not is_vmapped(input) and input.is_contiguous(memory_format=form)
    return input, Nearest(mode, shape, size, scale, min(input.shape[1], 4), innermost, input.dtype)


@with_torch_errors
def interpolate(
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """The input on a grid of another size, as `torch.nn.functional.interpolate`.

    Shapes: input (N, C, ...) with 1 to 3 axes of space; the result (N, C, *size). Modes: "nearest",
    "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area", "lanczos".

    Raises:
        ValueError: both or neither of size and scale_factor, or options that the mode does not have.
        NotImplementedError: a mode that is not for so many axes.
    """
    to, by = _for_each_axis(size, input), _for_each_axis(scale_factor, input)
    if by is not None and to is None and (recompute_scale_factor or mode == "area"):
        to, by = tuple(int(n * scale) for n, scale in zip(input.shape[2:], by, strict=True)), None
        recompute_scale_factor = None
    if recompute_scale_factor or (align_corners is not None and mode in ("nearest", "nearest-exact", "area")):
        raise ValueError(
            "recompute_scale_factor is for a scale_factor, align_corners for a mode that interpolates"
        )
    if mode in ("nearest", "nearest-exact") and not antialias:
        return NearestFunction.apply(*_with_kernel(input, to, by, mode))
    rule = AreaFunction if mode == "area" else InterpolateFunction
    return rule.apply(input, tuple(input.shape[2:]), to, by, mode, align_corners, antialias)


def _for_each_axis(setting: Any, input: Tensor) -> tuple[Any, ...] | None:
    """One number, for each axis of space: the same for all."""
    if setting is None:
        return None
    return tuple(setting) if isinstance(setting, (list, tuple)) else (setting,) * (input.dim() - 2)


register(
    interpolate,
    sample_inputs=lambda t: [
        SampleInput(t(1, 2, 3, 2), scale_factor=(2, 1.7)),
        SampleInput(t(1, 1, 3, 4), scale_factor=(1.5, 0.8), mode="bicubic", align_corners=True),
        SampleInput(t(1, 1, 2, 3, 2), scale_factor=1.6, mode="trilinear", recompute_scale_factor=True),
        SampleInput(t(1, 2, 5), scale_factor=0.7, mode="area"),
    ],
    benchmark_input=lambda t: SampleInput(t(4, 32, 64, 64), scale_factor=2, mode="bilinear"),
    supports_special_values=False,  # a matrix product spreads what is not finite along its line
)

for _name, _mode in (("upsample", {"mode": "bilinear"}), ("upsample_bilinear", {}), ("upsample_nearest", {})):
    register(
        _name,
        sample_inputs=lambda t, mode=_mode: [SampleInput(t(1, 2, 3, 2), scale_factor=2, **mode)],
        benchmark_input=lambda t, mode=_mode: SampleInput(t(4, 32, 64, 64), scale_factor=2, **mode),
        expected_failures=dict.fromkeys(
            ("compile", "compile_dynamic"),
            "it warns that its name is deprecated, which torch.compile does not trace",
        ),
    )


class GridSampleFunction(Rule):
    r"""y[p] = Σₖ wₖ x[iₖ]      over the pixels iₖ around the place p = (x, y[, z]), from -1 to 1

    Along each axis p is a place in pixels, which padding moves into the image: a pixel i and the distance t from
    it. The weights of the pixels i, i + 1, ... are functions of t, and those of several axes are multiplied.

    ∂L/∂x[i] = Σ wₖ g   over all p and k with iₖ = i            ∂L/∂p = Σₖ ⟨g, x[iₖ]⟩ ∂wₖ/∂p

    Jaderberg, Simonyan, Zisserman and Kavukcuoglu, "Spatial Transformer Networks", 2015. Keys, "Cubic Convolution
    Interpolation for Digital Image Processing", 1981.
    """

    autocast = {"cpu": "float32", "cuda": "promote"}

    def forward(
        input: Tensor, grid: Tensor, shape: tuple[int, ...], mode: int, padding: int, aligned: bool
    ) -> Tensor:
        return torch.grid_sampler(input, grid, mode, padding, aligned)

    def around(grid: Tensor, shape: tuple[int, ...], mode: int, padding: int, aligned: bool) -> Around:
        return pixels_around(grid, shape, mode, padding, aligned)

    def g(grad: Tensor) -> Tensor:
        return pixels(grad)

    def grad_input(g: Tensor, around: Around, shape: tuple[int, ...]) -> Tensor:
        n, size = shape[0], math.prod(shape[2:])
        total = weighted_sum_over_places(g, around.index, around.weight, n * size)
        return total.reshape(n, size, shape[1]).mT.reshape(shape).contiguous()

    def grad_grid(g: Tensor, input: Tensor, grid: Tensor, around: Around) -> Tensor:
        x = pixels(input)
        return sum_of_slopes(g, x, around.index, around.slopes).reshape(grid.shape)


class Around(NamedTuple):
    """For each place p and the pixels k around it: iₖ, numbered through the batch, wₖ, and ∂wₖ/∂p by axis."""

    index: Tensor  # (k, p)
    weight: Tensor
    slopes: list[Tensor]


def weighted_sum_over_places(g: Tensor, index: Tensor, weight: Tensor, count: int) -> Tensor:
    """Σ wₖ g over all p and k with iₖ = i, for each of so many pixels i."""
    weighted = weight.unsqueeze(-1) * g
    return g.new_zeros(count, g.shape[-1]).index_add(0, flatten(index), flatten(weighted, 0, 1))


@replaces(weighted_sum_over_places)
def _weighted_sum_by_k(g: Tensor, index: Tensor, weight: Tensor, count: int) -> Tensor:
    """One k after the other, which takes less memory."""
    total, weighted = g.new_zeros(count, g.shape[-1]), torch.empty_like(g)
    for i, w in zip(index, weight, strict=True):
        total.index_add_(0, i, torch.mul(w.unsqueeze(-1), g, out=weighted))
    return total


def sum_of_slopes(g: Tensor, x: Tensor, index: Tensor, slopes: list[Tensor]) -> Tensor:
    """Σₖ ⟨g, x[iₖ]⟩ ∂wₖ/∂p, (p, axis)"""
    products = (x.index_select(0, flatten(index)).reshape(*index.shape, x.shape[-1]) * g).sum(-1)
    return torch.stack([(products * slope).sum(0) for slope in slopes], -1)


@replaces(sum_of_slopes)
def _sum_of_slopes_by_bags(g: Tensor, x: Tensor, index: Tensor, slopes: list[Tensor]) -> Tensor:
    """⟨g, Σₖ x[iₖ] ∂wₖ/∂p⟩"""
    bags = index.mT.contiguous()
    found = [F.embedding_bag(bags, x, mode="sum", per_sample_weights=slope.mT.contiguous()) for slope in slopes]
    return torch.stack([moved.mul_(g).sum(-1) for moved in found], -1)


def pixels(image: Tensor) -> Tensor:
    """(N, C, *size) as (number of all pixels, C)."""
    return flatten(image, 2).mT.reshape(-1, image.shape[1])


@replaces(pixels)
def _pixels_by_image(image: Tensor) -> Tensor:
    """torch transposes a matrix faster than many."""
    n, c, size = len(image), image.shape[1], math.prod(image.shape[2:])
    found = image.new_empty(n, size, c)
    if n * 256 > size:
        return found.copy_(image.reshape(n, c, size).mT).reshape(-1, c)
    for target, source in zip(found, image.reshape(n, c, size), strict=True):
        target.copy_(source.mT)
    return found.reshape(-1, c)


class GridNearestFunction(Rule):
    r"""y[p] = x[i(p)]      i(p): the pixel nearest to the place p, or none

    ∂L/∂x[j] = Σ g[p] over i(p) = j            ∂L/∂p = 0
    """

    autocast = {"cpu": "float32", "cuda": "promote"}

    def forward(
        input: Tensor, grid: Tensor, shape: tuple[int, ...], dtype: torch.dtype, padding: int, aligned: bool
    ) -> Tensor:
        return torch.grid_sampler(input, grid, _NEAREST, padding, aligned)

    def i(grid: Tensor, shape: tuple[int, ...], dtype: torch.dtype, padding: int, aligned: bool) -> Tensor:
        """i, from 1 on, 0 for none: what the forward's kernel makes of an image that shows each pixel's number.

        Rounding decides between two pixels, and each kernel rounds differently. A number is shown by its digits, a
        channel for each, which every dtype holds exactly.
        """
        n, size = shape[0], math.prod(shape[2:])
        bits = 8 if dtype.itemsize < 4 else 24
        shifts = [bits * digit for digit in range(8) if digit == 0 or size >= 2 ** (bits * digit)]
        number = torch.arange(1, size + 1, device=grid.device)
        digits = torch.stack([number >> shift & (2**bits - 1) for shift in shifts]).to(dtype)
        images = digits.reshape(1, len(shifts), *shape[2:]).expand(n, len(shifts), *shape[2:])
        shown = torch.grid_sampler(images, grid.detach().to(dtype), _NEAREST, padding, aligned).long()
        return torch.stack([shown[:, digit] << shift for digit, shift in enumerate(shifts)]).sum(0)

    def grad_input(grad: Tensor, i: Tensor, shape: tuple[int, ...]) -> Tensor:
        zeros = grad.new_zeros(*shape[:2], math.prod(shape[2:]) + 1)
        index = flatten(i, 1).unsqueeze(1).expand(-1, shape[1], -1)
        total = zeros.scatter_add(-1, index, flatten(grad, 2))
        return total[..., 1:].reshape(shape).contiguous()

    def grad_grid(grid: Tensor) -> Tensor:
        return torch.zeros_like(grid)


_LINEAR, _NEAREST, _CUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)


def pixels_around(grid: Tensor, shape: tuple[int, ...], mode: int, padding: int, aligned: bool) -> Around:
    """The pixels around each place: all combinations of those along each axis."""
    n, _, *sizes = shape
    places = grid.reshape(n, math.prod(grid.shape[1:-1]), len(sizes)).unbind(-1)[::-1]
    axes = [along_an_axis(p, size, mode, padding, aligned) for p, size in zip(places, sizes, strict=True)]
    image = torch.arange(n, device=grid.device).unsqueeze(1)
    index, weight, slopes = image * sizes[0] + axes[0][0], axes[0][1], [axes[0][2]]
    for size, (i, w, slope) in zip(sizes[1:], axes[1:], strict=True):
        index = flatten((index * size).unsqueeze(1) + i, 0, 1)
        slopes = [*(combined(x, w) for x in slopes), combined(weight, slope)]
        weight = combined(weight, w)
    return Around(flatten(index, 1), flatten(weight, 1), [flatten(x, 1) for x in reversed(slopes)])


def combined(a: Tensor, b: Tensor) -> Tensor:
    """The product of each with each."""
    return flatten(a.unsqueeze(1) * b, 0, 1)


def along_an_axis(p: Tensor, n: int, mode: int, padding: int, aligned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels around p, from -1 to 1, along an axis of n pixels, with ∂wₖ/∂p."""
    scale = (n - 1) / 2 if aligned else n / 2
    place = (p + 1) * scale - (0 if aligned else 0.5)
    if mode == _CUBIC:
        first = place.floor()
        weight, slope = cubic(place - first)
        pixel, _ = padded(first + offsets(-1, 3, p), n, padding, aligned)
        return only_inside(pixel, n, weight, slope * scale)
    place, sign = padded(place, n, padding, aligned)
    first = place.floor()
    weight, slope = linear(place - first)
    return only_inside(first + offsets(0, 2, p), n, weight, slope * (sign * scale))


def offsets(start: int, end: int, p: Tensor) -> Tensor:
    return torch.arange(start, end, dtype=p.dtype, device=p.device).reshape(-1, 1, 1)


def only_inside(pixel: Tensor, n: int, weight: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel 0 with weight 0 in place of the pixels outside, also of nan, which padding may have made."""
    inside = (pixel > -1) & (pixel < n)
    return torch.where(inside, pixel, 0).long(), torch.where(inside, weight, 0), torch.where(inside, slope, 0)


def padded(place: Tensor, n: int, padding: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """The place moved into the image, and the derivative of this: 1, 0 or -1."""
    sign = torch.ones_like(place)
    if padding == _REFLECTION:
        low, span = (0, n - 1) if aligned else (-0.5, n)
        wave = torch.remainder(place - low + span, 2 * span) - span if span else torch.zeros_like(place)
        place, sign = low + wave.abs(), wave.sgn()
    if padding != _ZEROS:
        sign = torch.where((place > 0) & (place < n - 1), sign, 0)
        place = place.clamp(0, n - 1)
    return place, sign


def linear(t: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the two pixels around, and their derivatives."""
    one = torch.ones_like(t)
    return torch.stack([1 - t, t]), torch.stack([-one, one])


def cubic(t: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the four pixels around, and their derivatives."""
    w0, s0 = _far(t + 1)
    w1, s1 = _near(t)
    w2, s2 = _near(1 - t)
    w3, s3 = _far(2 - t)
    return torch.stack([w0, w1, w2, w3]), torch.stack([s0, s1, -s2, -s3])


_A = -0.75


def _near(t: Tensor) -> tuple[Tensor, Tensor]:
    return ((_A + 2) * t - (_A + 3)) * t * t + 1, (3 * (_A + 2) * t - 2 * (_A + 3)) * t


def _far(t: Tensor) -> tuple[Tensor, Tensor]:
    return ((_A * t - 5 * _A) * t + 8 * _A) * t - 4 * _A, (3 * _A * t - 10 * _A) * t + 8 * _A


@implements(torch.grid_sampler)
def grid_sampler(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    """The image at the places of a grid, as `torch.grid_sampler`, which `grid_sample` calls.

    Shapes: input (N, C, H, W) or (N, C, D, H, W), grid (N, *out, 2) or (N, *out, 3); the result (N, C, *out).
    """
    shape = tuple(input.shape)
    if interpolation_mode == _NEAREST:
        input, grid = autocast_inputs(GridNearestFunction, (input, grid))
        return GridNearestFunction.apply(input, grid, shape, input.dtype, padding_mode, align_corners)
    return GridSampleFunction.apply(input, grid, shape, interpolation_mode, padding_mode, align_corners)


register(
    "grid_sample",
    sample_inputs=lambda t: [
        SampleInput(t(2, 2, 4, 3), t(2, 2, 2, 2), align_corners=False),
        SampleInput(t(1, 2, 3, 2, 3), t(1, 2, 1, 2, 3), padding_mode="border", align_corners=True),
        SampleInput(t(1, 1, 4, 3), t(1, 3, 1, 2), "bicubic", "reflection", align_corners=False),
        SampleInput(t(1, 1, 4, 3), t(1, 3, 2, 2), "nearest", align_corners=True),
    ],
    benchmark_input=lambda t: SampleInput(t(4, 32, 64, 64), t(4, 64, 64, 2, low=-1, high=1), align_corners=False),
    supports_special_values=False,  # weights of 0 multiply what is not finite
    expected_failures={
        "vmap": "where input and grid are batched along different axes, torch's own batching takes a wrong size"
    },
)


class AffineGridFunction(Rule):
    r"""y[p] = θ (p, 1)      p: the centres of the pixels (or with corners aligned, of the corners) in [-1, 1]

    dy[p] = dθ (p, 1)      ∂L/∂θ = Σₚ g[p] (p, 1)ᵀ
    """

    autocast = LOWER_PRECISION

    def forward(theta: Tensor, size: tuple[int, ...], aligned: bool) -> Tensor:
        return torch.affine_grid_generator(theta, size, aligned)

    def grad_theta(grad: Tensor, size: tuple[int, ...], aligned: bool) -> Tensor:
        axes = [_centres(n, aligned).to(grad) for n in size[:1:-1]]
        places = torch.stack(torch.meshgrid(*axes[::-1], indexing="ij")[::-1], -1).reshape(-1, len(axes))
        return grad.reshape(size[0], -1, len(axes)).mT @ F.pad(places, (0, 1), value=1)


def _centres(n: int, aligned: bool) -> Tensor:
    """n places from -1 to 1."""
    if n == 1:
        return torch.zeros(1)
    return torch.linspace(-1, 1, n, dtype=torch.float64) * (1 if aligned else (n - 1) / n)


@implements(torch.affine_grid_generator)
def affine_grid_generator(theta: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """The grid for `grid_sample` of an affine map, as `torch.affine_grid_generator`, which `affine_grid` calls.

    Shapes: theta (N, 2, 3), size (N, C, H, W), the result (N, H, W, 2); or theta (N, 3, 4), size
    (N, C, D, H, W), the result (N, D, H, W, 3).
    """
    return AffineGridFunction.apply(theta, tuple(size), align_corners)


register(
    "affine_grid",
    sample_inputs=lambda t: [
        SampleInput(t(2, 2, 3), (2, 1, 3, 4), align_corners=False),
        SampleInput(t(1, 3, 4), (1, 1, 2, 3, 2), align_corners=True),
    ],
    benchmark_input=lambda t: SampleInput(t(32, 2, 3), (32, 3, 128, 128), align_corners=False),
)


class UnfoldFunction(Rule):
    r"""y[c k, p] = x[c, place(k, p)]      number k of the patch at p; outside of the image 0

    Each number of x is copied to every patch that contains it:  ∂L/∂x = fold(g), the sum over the copies.
    """

    supports_complex = True

    def forward(
        input: Tensor, shape: Pair, kernel_size: Pair, dilation: Pair, padding: Pair, stride: Pair
    ) -> Tensor:
        return F.unfold(input, kernel_size, dilation, padding, stride)

    def grad_input(
        grad: Tensor, shape: Pair, kernel_size: Pair, dilation: Pair, padding: Pair, stride: Pair
    ) -> Tensor:
        return FoldFunction.apply(grad, shape, kernel_size, dilation, padding, stride)


class FoldFunction(Rule):
    r"""x[c, i] = Σ y[c k, p] over the places (k, p) that show i:  unfold transposed      ∂L/∂y = unfold(g)"""

    supports_complex = True

    def forward(
        input: Tensor, shape: Pair, kernel_size: Pair, dilation: Pair, padding: Pair, stride: Pair
    ) -> Tensor:
        return F.fold(input, shape, kernel_size, dilation, padding, stride)

    def grad_input(
        grad: Tensor, shape: Pair, kernel_size: Pair, dilation: Pair, padding: Pair, stride: Pair
    ) -> Tensor:
        return UnfoldFunction.apply(grad, shape, kernel_size, dilation, padding, stride)


@with_torch_errors
def unfold(
    input: Tensor,
    kernel_size: IntOrInts,
    dilation: IntOrInts = 1,
    padding: IntOrInts = 0,
    stride: IntOrInts = 1,
) -> Tensor:
    """The patches of an image as columns, as `torch.nn.functional.unfold`.

    Shapes: input ([N,] C, H, W); the result ([N,] C · the kernel's size, number of patches).
    """
    settings = [to_tuple(x, 2) for x in (kernel_size, dilation, padding, stride)]
    return UnfoldFunction.apply(input, tuple(input.shape[-2:]), *settings)


@with_torch_errors
def fold(
    input: Tensor,
    output_size: IntOrInts,
    kernel_size: IntOrInts,
    dilation: IntOrInts = 1,
    padding: IntOrInts = 0,
    stride: IntOrInts = 1,
) -> Tensor:
    """The sum of patches into an image, as `torch.nn.functional.fold`.

    Shapes: input ([N,] C · the kernel's size, number of patches); the result ([N,] C, *output_size).
    """
    settings = [to_tuple(x, 2) for x in (output_size, kernel_size, dilation, padding, stride)]
    return FoldFunction.apply(input, *settings)


register(
    unfold,
    sample_inputs=lambda t: [
        SampleInput(t(2, 1, 4, 3), 2),
        SampleInput(t(2, 4, 5), (2, 3), dilation=(1, 2), padding=(0, 1), stride=(2, 1)),
    ],
    benchmark_input=lambda t: SampleInput(t(8, 32, 64, 64), 3, padding=1),
)

register(
    fold,
    sample_inputs=lambda t: [
        SampleInput(t(2, 4, 6), (4, 3), 2),
        SampleInput(t(12, 6), (4, 5), (2, 3), dilation=(1, 2), padding=(0, 1), stride=(2, 1)),
    ],
    benchmark_input=lambda t: SampleInput(t(8, 32 * 9, 64 * 64), 64, 3, padding=1),
)


class PixelShuffleFunction(Rule):
    r"""y[c, r h + i, r w + j] = x[c r² + r i + j, h, w]:  a permutation. Its transpose is its inverse.

    Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional
    Neural Network", 2016.
    """

    supports_complex = True

    def forward(input: Tensor, factor: int) -> Tensor:
        return F.pixel_shuffle(input, factor)

    def grad_input(grad: Tensor, factor: int) -> Tensor:
        unshuffled = PixelUnshuffleFunction.apply(grad, factor)
        return unshuffled.reshape(unshuffled_shape(grad, factor))  # which torch does not give to an empty tensor


def unshuffled_shape(y: Tensor, factor: int) -> tuple[int, ...]:
    *batch, c, h, w = y.shape
    return (*batch, c * factor**2, h // factor, w // factor)


class PixelUnshuffleFunction(Rule):
    r"""The inverse of the pixel shuffle, and its transpose."""

    supports_complex = True

    def forward(input: Tensor, factor: int) -> Tensor:
        return F.pixel_unshuffle(input, factor)

    def grad_input(grad: Tensor, factor: int) -> Tensor:
        return grad if 0 in grad.shape else PixelShuffleFunction.apply(grad, factor)


class ChannelShuffleFunction(Rule):
    r"""y[i G + g] = x[g n + i],  n = C/G:  the channels as a matrix (G, n), transposed. n groups bring them back.

    Zhang, Zhou, Lin and Sun, "ShuffleNet", 2018.
    """

    supports_complex = True

    def forward(input: Tensor, groups: int) -> Tensor:
        return F.channel_shuffle(input, groups)

    def grad_input(grad: Tensor, groups: int) -> Tensor:
        return ChannelShuffleFunction.apply(grad, grad.shape[1] // groups)


@with_torch_errors
def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """Channels spread over space, (*, C r², H, W) to (*, C, r H, r W), as `torch.nn.functional.pixel_shuffle`."""
    return PixelShuffleFunction.apply(input, upscale_factor)


@with_torch_errors
def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """Space into channels, (*, C, r H, r W) to (*, C r², H, W), as `torch.nn.functional.pixel_unshuffle`."""
    return PixelUnshuffleFunction.apply(input, downscale_factor)


@implements(F.native_channel_shuffle)
@with_torch_errors
def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """The channels of all groups in turn, as `torch.nn.functional.channel_shuffle`. Shape (N, C, ...)."""
    return ChannelShuffleFunction.apply(input, groups)


for _function, _shapes in (
    (pixel_shuffle, [(2, 4, 2, 1), (4, 1, 2)]),
    (pixel_unshuffle, [(2, 1, 4, 2), (2, 2, 2)]),
    (channel_shuffle, [(2, 6, 2), (1, 4, 1, 2)]),
):
    register(
        _function,
        sample_inputs=lambda t, shapes=_shapes: [SampleInput(t(*shape), 2) for shape in shapes],
        benchmark_input=lambda t: SampleInput(t(8, 64, 64, 64), 2),
    )
