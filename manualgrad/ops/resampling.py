"""Resampling: an image on another grid, its patches, its pixels shuffled between space and channels."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from manualgrad.ops.elementary import Numbers, added, channels_last, choose, drop_in, each, stands_for, times
from manualgrad.registry import Call, register
from manualgrad.rule import LOWER, Rule, cast, is_batched, nothing_looks_on

Pair = tuple[int, int]


class InterpolateFunction(Rule):
    r"""y = (A₁ ⊗ … ⊗ Aₖ) x      Aᵢ: (out, in), the weights along an axis of space, the same for every line of it

    dy = (A₁ ⊗ … ⊗ Aₖ) dx,  so  ∂L/∂x = (A₁ᵀ ⊗ … ⊗ Aₖᵀ) g:  each axis by itself, with the transpose of its weights.
    The columns of Aᵢ are what interpolation makes of the unit vectors.
    """

    autocast = {"cuda": "float32"}

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
        layout = suggest_memory_format(grad) if nothing_looks_on(grad) else None
        for axis, n in zip(range(-k, 0), shape, strict=True):
            units = torch.eye(n, dtype=grad.dtype, device=grad.device).reshape(1, n, *[1] * (k - 1), n)
            to = None if size is None else [*[1] * (k - 1), size[axis]]
            by = None if scale is None else [*[1.0] * (k - 1), scale[axis]]
            images = F.interpolate(units, to, by, mode, aligned, antialias=antialias)
            grad = _through(images.reshape(n, grad.shape[axis]), grad, axis)
        return grad if layout is None else grad.contiguous(memory_format=layout)


class AreaFunction(InterpolateFunction):
    """Adaptive average pooling, which autocast leaves alone."""

    autocast = {}


@dataclass(frozen=True)
class Nearest:
    """One of torch's kernels that take the nearest pixel, and what it goes by.

    torch has several. They round differently, so they take other pixels, at sizes that no image is too small for.
    Which one it calls depends on the mode, the sizes, the dtype, whether the channels lie innermost in memory, and
    whether there are more than 3 of them. So nothing is computed here: `taken` asks the kernel itself.
    """

    mode: str
    shape: tuple[int, ...]
    size: tuple[int, ...] | None
    scale: tuple[float, ...] | None
    channels: int
    channels_last: bool
    dtype: torch.dtype

    def __call__(self, input: Tensor) -> Tensor:
        if is_batched(input):
            input = input.contiguous()
        return F.interpolate(input, self.size, self.scale, self.mode)

    def repeats(self, axis: int, n: int) -> int:
        """How many times each pixel is taken, if that is a power of 2, which no kernel rounds; else 0."""
        times, rest = n // max(self.shape[axis], 1), n % max(self.shape[axis], 1)
        exact = rest == 0 and times in (1, 2, 4, 8, 16) and n <= 2**24
        return times if exact and (self.scale is None or self.scale[axis] == times) else 0

    def taken(self, device: torch.device) -> list[Tensor]:
        """i(p) along each axis: what the kernel makes of images that show at each pixel where it is.

        A place is shown by its digits, an image each, which every dtype holds exactly.
        """
        k = len(self.shape)
        digits = 1 if self.dtype.itemsize > 2 else 3
        images = []
        for axis, n in zip(range(-k, 0), self.shape, strict=True):
            place = torch.arange(n, device=device).reshape(n, *[1] * (-axis - 1))
            images += [(place >> (8 * i) & 255 if digits > 1 else place).expand(self.shape) for i in range(digits)]
        shown = torch.stack(images).to(self.dtype).unsqueeze(1).repeat(1, self.channels, *[1] * k)
        if self.channels_last:
            shown = shown.contiguous(memory_format=_CHANNELS_LAST[k])
        found = self(shown)[:, 0].unflatten(0, (k, digits)).long()
        shift = 8 * torch.arange(digits, device=device).reshape(digits, *[1] * k)
        places = (found << shift).sum(1).unbind()
        return [_along(place, axis) for axis, place in zip(range(-k, 0), places, strict=True)]


_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
_taken = functools.lru_cache(maxsize=64)(Nearest.taken)
"""The same, once for all calls that are alike."""


def _along(tensor: Tensor, axis: int) -> Tensor:
    """What a tensor shows along an axis, the same in every line of it."""
    return tensor.movedim(axis, -1)[(0,) * (tensor.dim() - 1)]


class NearestFunction(Rule):
    r"""y[p] = x[i(p)]      i: the pixel that is taken for p, along each axis by itself

    ⟨g, dy⟩ = Σ g[p] dx[i(p)]:  each pixel collects the g of every place it was taken for,
    ∂L/∂x[j] = Σ g[p] over i(p) = j,  axis by axis
    """

    autocast = {"cuda": "float32"}

    def forward(input: Tensor, nearest: Nearest) -> Tensor:
        return nearest(input)

    def grad_input(grad: Tensor, nearest: Nearest) -> Tensor:
        plain = nothing_looks_on(grad)
        layout = suggest_memory_format(grad) if plain else None
        axes = range(-1, -len(nearest.shape) - 1, -1)
        repeats = {axis: nearest.repeats(axis, grad.shape[axis]) for axis in axes}
        places: list[Tensor] = []
        if not all(repeats.values()):
            places = (_taken if plain else Nearest.taken)(nearest, grad.device)
            if channels_last(grad):
                return _collected_pixels(grad, nearest.shape, places)
        for axis, count in repeats.items():
            n = nearest.shape[axis]
            if count:
                before, after = grad.shape[:axis], grad.shape[grad.dim() + axis + 1 :]
                parts = grad.reshape(*before, n, count, *after).unbind(axis)
                grad = functools.reduce(torch.add, parts)
            else:
                grad = _collected(grad, axis, n, places[axis])
        return grad if layout is None else grad.contiguous(memory_format=layout)


def _with_kernel(
    input: Tensor, size: tuple[int, ...] | None, scale: tuple[float, ...] | None, mode: str
) -> tuple[Tensor, Nearest]:
    """The input as autocast has it, and the kernel that takes it."""
    shape = tuple(input.shape[2:])
    (input,) = cast(NearestFunction, (input,))
    form = _CHANNELS_LAST.get(len(shape))
    eager = not torch.compiler.is_compiling()  # what torch.compile puts in place of a kernel knows no layouts
    innermost = eager and form is not None and not is_batched(input) and input.is_contiguous(memory_format=form)
    return input, Nearest(mode, shape, size, scale, min(input.shape[1], 4), innermost, input.dtype)


def _collected(tensor: Tensor, axis: int, n: int, places: Tensor) -> Tensor:
    """Along an axis each of n places has the sum of what was sent to it."""
    shape = list(tensor.shape)
    shape[axis] = n
    add = torch.Tensor.index_add_ if nothing_looks_on(tensor) else torch.Tensor.index_add
    return add(tensor.new_zeros(shape), axis, places, tensor)


def _collected_pixels(image: Tensor, sizes: tuple[int, ...], places: list[Tensor]) -> Tensor:
    """The same along all axes in one step, of pixels whose channels lie together."""
    n, c = image.shape[:2]
    index = torch.arange(n, device=image.device)
    for size, along in zip(sizes, places, strict=True):
        index = index.unsqueeze(-1) * size + along
    sent = image.movedim(1, -1).reshape(-1, c)
    found = added(sent.new_zeros(n * math.prod(sizes), c), 0, index.reshape(-1, 1).expand(-1, c), sent)
    return found.reshape(n, *sizes, c).movedim(-1, 1)


_BAND = 64


def _through(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """A matrix (out, in), zero but near its diagonal, applied to every line along an axis, by bands of rows."""
    n, m = matrix.shape
    reach = 4 * n / max(min(n, m), 1) + 2  # of the widest kernel, in rows
    found = []
    for first in range(0, n, _BAND):
        low = max(math.floor((first - reach) * m / n), 0) if n > _BAND else 0
        high = min(math.ceil((first + _BAND + reach) * m / n), m)
        band, part = matrix[first : first + _BAND, low:high], tensor.narrow(axis, low, high - low)
        if axis == -1:
            found.append(part @ band.mT)
        else:
            flat = part.reshape(*part.shape[: axis + 1], math.prod(part.shape[axis + 1 :]))
            found.append((band @ flat).reshape(*part.shape[:axis], len(band), *part.shape[axis + 1 :]))
    return found[0] if len(found) == 1 else torch.cat(found, axis)


@drop_in
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
    samples=lambda t: [
        Call(t(1, 2, 3, 2), scale_factor=(2, 1.7)),
        Call(t(1, 1, 3, 4), scale_factor=(1.5, 0.8), mode="bicubic", align_corners=True),
        Call(t(1, 1, 2, 3, 2), scale_factor=1.6, mode="trilinear", recompute_scale_factor=True),
        Call(t(1, 2, 5), scale_factor=0.7, mode="area"),
    ],
    big=lambda t: Call(t(4, 32, 64, 64), scale_factor=2, mode="bilinear"),
    special=False,  # a matrix product spreads what is not finite along its line
)

for _name, _mode in (("upsample", {"mode": "bilinear"}), ("upsample_bilinear", {}), ("upsample_nearest", {})):
    register(
        _name,
        samples=lambda t, mode=_mode: [Call(t(1, 2, 3, 2), scale_factor=2, **mode)],
        big=lambda t, mode=_mode: Call(t(4, 32, 64, 64), scale_factor=2, **mode),
        lacks=dict.fromkeys(
            ("compile", "compile_dynamic"),
            "it warns that its name is deprecated, which torch.compile does not trace",
        ),
    )


class GridSampleFunction(Rule):
    r"""y[p] = Σₖ wₖ(t) x[iₖ]      over the pixels iₖ around the place p = (x, y[, z]), from -1 to 1

    Along each axis p is a place in pixels, which padding moves into the image, and that is a pixel i and the way t
    from it. The weights of the pixels i, i + 1, ... are functions of t, and those of several axes are multiplied.

    ∂L/∂x[i] = Σ wₖ g   over all p and k with iₖ = i            ∂L/∂p = Σₖ ⟨g, x[iₖ]⟩ ∂wₖ/∂p

    Jaderberg, Simonyan, Zisserman and Kavukcuoglu, "Spatial Transformer Networks", 2015. Keys, "Cubic Convolution
    Interpolation for Digital Image Processing", 1981.
    """

    autocast = {"cpu": "float32", "cuda": "promote"}

    def forward(
        input: Tensor, grid: Tensor, shape: tuple[int, ...], mode: int, padding: int, aligned: bool
    ) -> Tensor:
        return torch.grid_sampler(input, grid, mode, padding, aligned)

    def taps(grid: Tensor, shape: tuple[int, ...], mode: int, padding: int, aligned: bool) -> list[Tap]:
        """The pixels, numbered through the batch, with their weights and these weights' slopes along each axis."""
        n, _, *sizes = shape
        images = torch.arange(n, device=grid.device).unsqueeze(1)
        places = grid.reshape(n, math.prod(grid.shape[1:-1]), len(sizes)).unbind(-1)[::-1]
        axes = [_taps(place, size, mode, padding, aligned) for place, size in zip(places, sizes, strict=True)]
        taps = []
        for chosen in itertools.product(*axes):
            index = images
            for size, tap in zip(sizes, chosen, strict=True):
                index = index * size + tap.index
            weights = [tap.weight for tap in chosen]
            slopes = [
                math.prod([*weights[:axis], *weights[axis + 1 :]], start=tap.slopes[0])
                for axis, tap in enumerate(chosen)
            ]
            taps.append(Tap(index.reshape(-1), math.prod(weights[1:], start=weights[0]), slopes))
        return taps

    def upstream(grad: Tensor) -> Tensor:
        return _pixels(grad)

    def grad_input(upstream: Tensor, taps: list[Tap], shape: tuple[int, ...]) -> Tensor:
        n, c, *sizes = shape
        found = upstream.new_zeros(n * math.prod(sizes), c)
        for tap in taps:
            part = (tap.weight.unsqueeze(2) * upstream).reshape(-1, c)
            add = found.scatter_add_ if nothing_looks_on(found, part) else found.scatter_add
            found = add(0, tap.index.unsqueeze(1).expand(-1, c), part)
        return found.reshape(n, math.prod(sizes), c).mT.reshape(shape).contiguous()

    def grad_grid(upstream: Tensor, input: Tensor, grid: Tensor, taps: list[Tap]) -> Tensor:
        pixels = _pixels(input).reshape(-1, input.shape[1])
        found = [torch.zeros_like(upstream[..., 0])] * grid.shape[-1]
        for tap in taps:
            along = times(pixels.index_select(0, tap.index).reshape(upstream.shape), upstream).sum(2)
            found = [sum + along * slope for sum, slope in zip(found, tap.slopes, strict=True)]
        return torch.stack(found[::-1], -1).reshape(grid.shape)


class GridNearestFunction(Rule):
    r"""y[p] = x[i(p)]      i(p): the pixel nearest to the place p, or none

    ∂L/∂x[j] = Σ g[p] over i(p) = j            ∂L/∂p = 0
    """

    autocast = {"cpu": "float32", "cuda": "promote"}

    def forward(
        input: Tensor, grid: Tensor, shape: tuple[int, ...], dtype: torch.dtype, padding: int, aligned: bool
    ) -> Tensor:
        return torch.grid_sampler(input, grid, _NEAREST, padding, aligned)

    def taken(grid: Tensor, shape: tuple[int, ...], dtype: torch.dtype, padding: int, aligned: bool) -> Tensor:
        """i, from 1 on, 0 for none: what the forward's kernel makes of an image that shows each pixel's number.

        Between two pixels rounding decides, which is another for each kernel. A number is shown by its digits, a
        channel each, which every dtype holds exactly.
        """
        n, _, *sizes = shape
        digits, bits = (4, 8) if dtype.itemsize < 4 else (2, 20)
        number = torch.arange(1, math.prod(sizes) + 1, device=grid.device)
        images = torch.stack([number >> (bits * i) & (2**bits - 1) for i in range(digits)]).to(dtype)
        images = images.reshape(1, digits, *sizes).expand(n, digits, *sizes)
        shown = torch.grid_sampler(images, grid.detach().to(dtype), _NEAREST, padding, aligned).long()
        return torch.stack([shown[:, i] << (bits * i) for i in range(digits)]).sum(0)

    def grad_input(grad: Tensor, taken: Tensor, shape: tuple[int, ...]) -> Tensor:
        n, c, *sizes = shape
        pixels = math.prod(sizes) + 1  # and none
        index = torch.arange(n, device=grad.device).unsqueeze(1) * pixels + taken.flatten(1)
        sent = _pixels(grad).reshape(-1, c)
        found = added(sent.new_zeros(n * pixels, c), 0, index.reshape(-1, 1).expand(-1, c), sent)
        return found.reshape(n, pixels, c)[:, 1:].mT.reshape(shape).contiguous()

    def grad_grid(grid: Tensor) -> Tensor:
        return torch.zeros_like(grid)


def _pixels(image: Tensor) -> Tensor:
    """(N, C, *size) as (N, number of pixels, C)."""
    return image.reshape(*image.shape[:2], math.prod(image.shape[2:])).mT.contiguous()


class Tap(NamedTuple):
    """A pixel for each place, its weight, and the slopes of the weight along each axis."""

    index: Tensor
    weight: Tensor
    slopes: list[Tensor]


_LINEAR, _NEAREST, _CUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)


def _taps(p: Tensor, n: int, mode: int, padding: int, aligned: bool) -> list[Tap]:
    """What p, from -1 to 1, names along an axis of n pixels."""
    scale = (n - 1) / 2 if aligned else n / 2
    place = (p + 1) * scale - (0 if aligned else 0.5)
    slope = torch.full_like(place, scale)
    if mode != _CUBIC:  # which pads each pixel
        place, sign = _padded(place, n, padding, aligned)
        slope = slope * sign
    first = place.floor().detach()
    kernel = (_cubic if mode == _CUBIC else _linear)(place - first)
    taps = []
    for offset, weight, weight_slope in kernel:
        pixel = first + offset
        if mode == _CUBIC:
            pixel = _padded(pixel, n, padding, aligned)[0]
        inside = (pixel > -1) & (pixel < n)  # not even where padding has made nan
        index = choose(inside, pixel).long()
        taps.append(Tap(index, choose(inside, weight), [choose(inside, weight_slope * slope)]))
    return taps


def _padded(place: Tensor, n: int, padding: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """The place in the image that one outside of it stands for, and how that moves with it: 1, 0 or -1."""
    sign = torch.ones_like(place)
    if padding == _REFLECTION:
        low, span = (0, n - 1) if aligned else (-0.5, n)
        wave = torch.remainder(place - low + span, 2 * span) - span if span else torch.zeros_like(place)
        place, sign = low + wave.abs(), wave.sgn()
    if padding != _ZEROS:
        sign = choose((place > 0) & (place < n - 1), sign)
        place = place.clamp(0, n - 1)
    return place, sign


Kernel = list[tuple[int, Tensor, Tensor]]
"""For each pixel around: how many after the first, its weight, and the slope of that."""


def _linear(t: Tensor) -> Kernel:
    return [(0, 1 - t, -torch.ones_like(t)), (1, t, torch.ones_like(t))]


def _cubic(t: Tensor) -> Kernel:
    a = -0.75

    def near(t: Tensor) -> tuple[Tensor, Tensor]:
        return ((a + 2) * t - (a + 3)) * t * t + 1, (3 * (a + 2) * t - 2 * (a + 3)) * t

    def far(t: Tensor) -> tuple[Tensor, Tensor]:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a, (3 * a * t - 10 * a) * t + 8 * a

    (w0, s0), (w1, s1), (w2, s2), (w3, s3) = far(t + 1), near(t), near(1 - t), far(2 - t)
    return [(-1, w0, s0), (0, w1, s1), (1, w2, -s2), (2, w3, -s3)]


@stands_for(torch.grid_sampler)
def grid_sampler(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    """The image at the places that a grid names, as `torch.grid_sampler`, which `grid_sample` calls.

    Shapes: input (N, C, H, W) or (N, C, D, H, W), grid (N, *out, 2) or (N, *out, 3); the result (N, C, *out).
    """
    shape = tuple(input.shape)
    if interpolation_mode == _NEAREST:
        input, grid = cast(GridNearestFunction, (input, grid))
        return GridNearestFunction.apply(input, grid, shape, input.dtype, padding_mode, align_corners)
    return GridSampleFunction.apply(input, grid, shape, interpolation_mode, padding_mode, align_corners)


register(
    "grid_sample",
    samples=lambda t: [
        Call(t(2, 2, 4, 3), t(2, 2, 2, 2), align_corners=False),
        Call(t(1, 2, 3, 2, 3), t(1, 2, 1, 2, 3), padding_mode="border", align_corners=True),
        Call(t(1, 1, 4, 3), t(1, 3, 1, 2), "bicubic", "reflection", align_corners=False),
        Call(t(1, 1, 4, 3), t(1, 3, 2, 2), "nearest", align_corners=True),
    ],
    big=lambda t: Call(t(4, 32, 64, 64), t(4, 64, 64, 2, low=-1, high=1), align_corners=False),
    special=False,  # weights of 0 multiply what is not finite
    lacks={
        "vmap": "where input and grid are batched along different axes, torch's own batching takes a wrong size"
    },
)


class AffineGridFunction(Rule):
    r"""y[p] = θ (p, 1)      p: the centres of the pixels (or with corners aligned, of the corners) in [-1, 1]

    dy[p] = dθ (p, 1)      ∂L/∂θ = Σₚ g[p] (p, 1)ᵀ
    """

    autocast = LOWER

    def forward(theta: Tensor, size: tuple[int, ...], aligned: bool) -> Tensor:
        return torch.affine_grid_generator(theta, size, aligned)

    def grad_theta(grad: Tensor, size: tuple[int, ...], aligned: bool) -> Tensor:
        axes = [_centres(n, aligned).to(grad) for n in size[:1:-1]]
        places = torch.stack(torch.meshgrid(*axes[::-1], indexing="ij")[::-1], -1).flatten(0, -2)
        return grad.reshape(size[0], -1, len(axes)).mT @ F.pad(places, (0, 1), value=1)


def _centres(n: int, aligned: bool) -> Tensor:
    """n places from -1 to 1."""
    if n == 1:
        return torch.zeros(1)
    return torch.linspace(-1, 1, n, dtype=torch.float64) * (1 if aligned else (n - 1) / n)


@stands_for(torch.affine_grid_generator)
def affine_grid_generator(theta: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """The grid for `grid_sample` of an affine map, as `torch.affine_grid_generator`, which `affine_grid` calls.

    Shapes: theta (N, 2, 3), size (N, C, H, W), the result (N, H, W, 2); or theta (N, 3, 4), size
    (N, C, D, H, W), the result (N, D, H, W, 3).
    """
    return AffineGridFunction.apply(theta, tuple(size), align_corners)


register(
    "affine_grid",
    samples=lambda t: [
        Call(t(2, 2, 3), (2, 1, 3, 4), align_corners=False),
        Call(t(1, 3, 4), (1, 1, 2, 3, 2), align_corners=True),
    ],
    big=lambda t: Call(t(32, 2, 3), (32, 3, 128, 128), align_corners=False),
)


class UnfoldFunction(Rule):
    r"""y[c k, p] = x[c, place(k, p)]      number k of the patch at p; outside of the image 0

    Each number of x goes to every patch that it lies in:  ∂L/∂x = fold(g), the sum over these.
    """

    complex = True

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

    complex = True

    def forward(
        input: Tensor, shape: Pair, kernel_size: Pair, dilation: Pair, padding: Pair, stride: Pair
    ) -> Tensor:
        return F.fold(input, shape, kernel_size, dilation, padding, stride)

    def grad_input(
        grad: Tensor, shape: Pair, kernel_size: Pair, dilation: Pair, padding: Pair, stride: Pair
    ) -> Tensor:
        return UnfoldFunction.apply(grad, shape, kernel_size, dilation, padding, stride)


@drop_in
def unfold(
    input: Tensor,
    kernel_size: Numbers,
    dilation: Numbers = 1,
    padding: Numbers = 0,
    stride: Numbers = 1,
) -> Tensor:
    """The patches of an image as columns, as `torch.nn.functional.unfold`.

    Shapes: input ([N,] C, H, W); the result ([N,] C · the kernel's size, number of patches).
    """
    settings = [each(x, 2) for x in (kernel_size, dilation, padding, stride)]
    return UnfoldFunction.apply(input, tuple(input.shape[-2:]), *settings)


@drop_in
def fold(
    input: Tensor,
    output_size: Numbers,
    kernel_size: Numbers,
    dilation: Numbers = 1,
    padding: Numbers = 0,
    stride: Numbers = 1,
) -> Tensor:
    """The sum of patches into an image, as `torch.nn.functional.fold`.

    Shapes: input ([N,] C · the kernel's size, number of patches); the result ([N,] C, *output_size).
    """
    settings = [each(x, 2) for x in (output_size, kernel_size, dilation, padding, stride)]
    return FoldFunction.apply(input, *settings)


register(
    unfold,
    samples=lambda t: [
        Call(t(2, 1, 4, 3), 2),
        Call(t(2, 4, 5), (2, 3), dilation=(1, 2), padding=(0, 1), stride=(2, 1)),
    ],
    big=lambda t: Call(t(8, 32, 64, 64), 3, padding=1),
)

register(
    fold,
    samples=lambda t: [
        Call(t(2, 4, 6), (4, 3), 2),
        Call(t(12, 6), (4, 5), (2, 3), dilation=(1, 2), padding=(0, 1), stride=(2, 1)),
    ],
    big=lambda t: Call(t(8, 32 * 9, 64 * 64), 64, 3, padding=1),
)


class PixelShuffleFunction(Rule):
    r"""y[c, r h + i, r w + j] = x[c r² + r i + j, h, w]:  a permutation, whose transpose is its inverse

    Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional
    Neural Network", 2016.
    """

    complex = True

    def forward(input: Tensor, factor: int) -> Tensor:
        return F.pixel_shuffle(input, factor)

    def grad_input(grad: Tensor, factor: int) -> Tensor:
        if grad.numel():
            return PixelUnshuffleFunction.apply(grad, factor)
        *batch, c, h, w = grad.shape  # torch's pixel_unshuffle leaves an empty tensor in its shape
        return grad.reshape(*batch, c * factor**2, h // factor, w // factor)


class PixelUnshuffleFunction(Rule):
    r"""The inverse of the pixel shuffle, and its transpose."""

    complex = True

    def forward(input: Tensor, factor: int) -> Tensor:
        return F.pixel_unshuffle(input, factor)

    def grad_input(grad: Tensor, factor: int) -> Tensor:
        return PixelShuffleFunction.apply(grad, factor) if grad.numel() else grad


class ChannelShuffleFunction(Rule):
    r"""y[i G + g] = x[g n + i],  n = C/G:  the channels as a matrix (G, n), transposed. n groups bring them back.

    Zhang, Zhou, Lin and Sun, "ShuffleNet", 2018.
    """

    complex = True

    def forward(input: Tensor, groups: int) -> Tensor:
        return F.channel_shuffle(input, groups)

    def grad_input(grad: Tensor, groups: int) -> Tensor:
        return ChannelShuffleFunction.apply(grad, grad.shape[1] // groups)


@drop_in
def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """Channels spread over space, (*, C r², H, W) to (*, C, r H, r W), as `torch.nn.functional.pixel_shuffle`."""
    return PixelShuffleFunction.apply(input, upscale_factor)


@drop_in
def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """Space into channels, (*, C, r H, r W) to (*, C r², H, W), as `torch.nn.functional.pixel_unshuffle`."""
    return PixelUnshuffleFunction.apply(input, downscale_factor)


@stands_for(F.native_channel_shuffle)
@drop_in
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
        samples=lambda t, shapes=_shapes: [Call(t(*shape), 2) for shape in shapes],
        big=lambda t: Call(t(8, 64, 64, 64), 2),
    )
