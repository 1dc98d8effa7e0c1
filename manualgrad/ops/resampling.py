"""Resampling: interpolation, grid sampling, patches of an image, and shuffles of pixels and channels."""

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
from manualgrad.ops.shapes import IntOrInts, flatten, to_tuple, unflatten, with_size
from manualgrad.registry import SampleInput, register
from manualgrad.rule import LOWER_PRECISION, Rule, autocast_inputs, replaces, with_reuse
from manualgrad.torch_internals import is_vmapped

Pair = tuple[int, int]


class InterpolateFunction(Rule):
    r"""y = (A₁ ⊗ … ⊗ Aₖ) x      Aᵢ: (out, in), the weights along spatial axis i, the same for every line along it

    dy = (A₁ ⊗ … ⊗ Aₖ) dx:      ∂L/∂x = (A₁ᵀ ⊗ … ⊗ Aₖᵀ) g,  one axis after the other
    Column j of Aᵢ is the interpolation of the j-th unit vector.
    """

    autocast = {"cuda": "float32"}
    preserve_memory_format = ("grad_input",)

    def forward(
        input: Tensor,
        shape: tuple[int, ...],
        size: tuple[int, ...] | None,
        scale: tuple[float, ...] | None,
        mode: str,
        align_corners: bool | None,
        antialias: bool,
    ) -> Tensor:
        return F.interpolate(input, size, scale, mode, align_corners, antialias=antialias)

    def grad_input(
        grad: Tensor,
        shape: tuple[int, ...],
        size: tuple[int, ...] | None,
        scale: tuple[float, ...] | None,
        mode: str,
        align_corners: bool | None,
        antialias: bool,
    ) -> Tensor:
        k = len(shape)
        for axis, n in zip(range(-k, 0), shape, strict=True):
            units = torch.eye(n, dtype=grad.dtype, device=grad.device).reshape(1, n, *[1] * (k - 1), n)
            size_of_axis = None if size is None else [*[1] * (k - 1), size[axis]]
            scale_of_axis = None if scale is None else [*[1.0] * (k - 1), scale[axis]]
            columns = F.interpolate(units, size_of_axis, scale_of_axis, mode, align_corners, antialias=antialias)
            A_transposed = columns.reshape(n, grad.shape[axis])
            grad = multiply_along_axis(A_transposed, grad, axis)
        return grad


class AreaInterpolateFunction(InterpolateFunction):
    """Adaptive average pooling, which autocast does not cast."""

    autocast = {}


def multiply_along_axis(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """The product of a matrix (out, in) with every line along an axis."""
    lines = tensor.reshape(*tensor.shape[:axis], matrix.shape[1], math.prod(tensor.shape[axis:][1:]))
    return (matrix @ lines).reshape(with_size(tensor.shape, axis, matrix.shape[0]))


_ROWS_PER_BAND = 64


@replaces(multiply_along_axis)
def _multiply_bands_along_axis(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """The same for a matrix that is zero except near its diagonal: each band of rows skips columns of zeros."""
    if is_channels_last(tensor):
        return _multiply_bands_along_axis(matrix, tensor.movedim(1, -1), axis - 1).movedim(-1, 1)
    n, m = matrix.shape
    half_width = 4 * n / max(min(n, m), 1) + 2  # nonzero rows above and below the diagonal, at most
    products = []
    for first in range(0, n, _ROWS_PER_BAND):
        low = max(math.floor((first - half_width) * m / n), 0) if n > _ROWS_PER_BAND else 0
        high = min(math.ceil((first + _ROWS_PER_BAND + half_width) * m / n), m)
        band, part = matrix[first : first + _ROWS_PER_BAND, low:high], tensor.narrow(axis, low, high - low)
        products.append(part @ band.mT if axis == -1 else multiply_along_axis(band, part, axis))
    return products[0] if len(products) == 1 else torch.cat(products, axis)


class NearestInterpolateFunction(Rule):
    r"""y[p] = x[i(p)]      i(p): the source pixel of p, along each axis independently

    ⟨g, dy⟩ = Σ g[p] dx[i(p)], so each pixel receives the sum of g over the output pixels that it is copied to:
    ∂L/∂x[j] = Σ g[p] over i(p) = j,  one axis after the other
    """

    autocast = {"cuda": "float32"}
    preserve_memory_format = ("grad_input",)

    def forward(input: Tensor, kernel: NearestKernel) -> Tensor:
        return kernel(input)

    def grad_input(grad: Tensor, kernel: NearestKernel) -> Tensor:
        k, n = len(kernel.shape), kernel.shape
        factors = [kernel.exact_factor(axis, grad.shape[axis]) for axis in range(-k, 0)]
        i: Any = None if all(factors) else source_pixels(kernel, grad.device)
        for axis in range(-1, -k - 1, -1):
            if factors[axis]:  # i(p) = ⌊p / factor⌋: each pixel is copied to neighbouring pixels
                copies = unflatten(grad, axis, (n[axis], factors[axis])).unbind(axis)
                grad = functools.reduce(torch.add, copies)
            else:
                grad = sum_by_source(grad, axis, i[axis], n[axis])
        return grad


@dataclass(frozen=True)
class NearestKernel:
    """One of torch's kernels for the modes "nearest" and "nearest-exact".

    The kernels round differently, so they copy different pixels, even of small images. torch selects one by the
    fields of this class. (Of the channels it matters whether there are more than 3.) So `source_pixels` does not
    compute i(p): it calls the kernel.
    """

    mode: str
    shape: tuple[int, ...]
    size: tuple[int, ...] | None
    scale: tuple[float, ...] | None
    channels: int
    channels_last: bool
    dtype: torch.dtype

    def __call__(self, input: Tensor) -> Tensor:
        if is_vmapped(input):
            input = input.contiguous()
        return F.interpolate(input, self.size, self.scale, self.mode)

    def exact_factor(self, axis: int, n: int) -> int:
        """How often each pixel is repeated along an axis of output size n, if it is a power of 2, else 0.

        For a power of 2, no kernel rounds.
        """
        factor, rest = n // max(self.shape[axis], 1), n % max(self.shape[axis], 1)
        exact = rest == 0 and factor in (1, 2, 4, 8, 16) and n <= 2**24
        return factor if exact and (self.scale is None or self.scale[axis] == factor) else 0


def source_pixels(kernel: NearestKernel, device: torch.device) -> list[Tensor]:
    """i(p) along each axis: the kernel's output for images in which each pixel holds its own index."""
    k = len(kernel.shape)
    indices = torch.meshgrid([torch.arange(n, device=device) for n in kernel.shape], indexing="ij")
    digits = to_digits(torch.stack(indices), max(kernel.shape))
    images = flatten(digits, 0, 1).to(kernel.dtype)  # one for each digit and axis
    input = images.unsqueeze(1).repeat(1, kernel.channels, *[1] * k)
    if kernel.channels_last:
        input = input.contiguous(memory_format=CHANNELS_LAST[input.dim()])
    sources = from_digits(kernel(input)[:, 0].unflatten(0, (len(digits), k)))
    return [source.movedim(axis, -1)[(0,) * (k - 1)] for axis, source in zip(range(-k, 0), sources, strict=True)]


replaces(source_pixels)(functools.lru_cache(maxsize=64)(source_pixels))


def to_digits(number: Tensor, largest: int) -> Tensor:
    """Integers up to ``largest`` as digits of 8 bits, which every dtype holds exactly, along a new first axis."""
    shifts = [8 * n for n in range(8) if n == 0 or largest >= 2 ** (8 * n)]
    return torch.stack([number >> shift & 255 for shift in shifts])


def from_digits(digits: Tensor) -> Tensor:
    """The integers of these digits."""
    return torch.stack([digit << (8 * n) for n, digit in enumerate(digits.long())]).sum(0)


def sum_by_source(g: Tensor, axis: int, i: Tensor, n: int) -> Tensor:
    """Σ g[p] over i(p) = j, along one axis of n pixels."""
    return g.new_zeros(with_size(g.shape, axis, n)).index_add(axis, i, g)


@replaces(sum_by_source)
def _sum_by_source_in_channels_last(g: Tensor, axis: int, i: Tensor, n: int) -> Tensor:
    """The same in the memory format of g."""
    if is_channels_last(g):
        return _sum_by_source_in_channels_last(g.movedim(1, -1), axis - 1, i, n).movedim(-1, 1)
    return with_reuse(sum_by_source)(g, axis, i, n)


def _cast_and_select_kernel(
    input: Tensor, size: tuple[int, ...] | None, scale: tuple[float, ...] | None, mode: str
) -> tuple[Tensor, NearestKernel]:
    """The input in the dtype that autocast gives it, and the kernel that torch selects for it."""
    shape = tuple(input.shape[2:])
    (input,) = autocast_inputs(NearestInterpolateFunction, (input,))
    form = CHANNELS_LAST.get(input.dim())
    eager = not torch.compiler.is_compiling()  # compiled code does not depend on the memory format
    channels_last = (
        eager and form is not None and not is_vmapped(input) and input.is_contiguous(memory_format=form)
    )
    kernel = NearestKernel(mode, shape, size, scale, min(input.shape[1], 4), channels_last, input.dtype)
    return input, kernel


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

    Shapes: input (N, C, ...) with 1 to 3 spatial axes, the result (N, C, *size). Modes: "nearest",
    "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area", "lanczos".

    Raises:
        ValueError: size and scale_factor are both given or both missing, or the mode does not support an option.
        NotImplementedError: the mode does not support this number of axes.
    """
    sizes, scales = _for_each_axis(size, input), _for_each_axis(scale_factor, input)
    if scales is not None and sizes is None and (recompute_scale_factor or mode == "area"):
        sizes, scales = tuple(int(n * scale) for n, scale in zip(input.shape[2:], scales, strict=True)), None
        recompute_scale_factor = None
    if recompute_scale_factor or (align_corners is not None and mode in ("nearest", "nearest-exact", "area")):
        raise ValueError(
            "recompute_scale_factor needs a scale_factor, and align_corners a mode with weights (linear, cubic)"
        )
    if mode in ("nearest", "nearest-exact") and not antialias:
        return NearestInterpolateFunction.apply(*_cast_and_select_kernel(input, sizes, scales, mode))
    rule = AreaInterpolateFunction if mode == "area" else InterpolateFunction
    return rule.apply(input, tuple(input.shape[2:]), sizes, scales, mode, align_corners, antialias)


def _for_each_axis(setting: Any, input: Tensor) -> tuple[Any, ...] | None:
    """The setting as a tuple with one number for each spatial axis."""
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
    supports_special_values=False,  # a matrix product spreads inf and nan along a line
)

for _name, _mode in (("upsample", {"mode": "bilinear"}), ("upsample_bilinear", {}), ("upsample_nearest", {})):
    register(
        _name,
        sample_inputs=lambda t, mode=_mode: [SampleInput(t(1, 2, 3, 2), scale_factor=2, **mode)],
        benchmark_input=lambda t, mode=_mode: SampleInput(t(4, 32, 64, 64), scale_factor=2, **mode),
        expected_failures=dict.fromkeys(
            ("compile", "compile_dynamic"),
            "torch.compile does not trace its deprecation warning",
        ),
    )


class GridSampleFunction(Rule):
    r"""y[p] = Σₖ wₖ x[iₖ]      over the pixels iₖ around the position p in [-1, 1]² or [-1, 1]³

    Along each axis, p is scaled to pixels, and padding moves it into the image. This gives a first pixel i and the
    distance t to it. The weights of the pixels i, i + 1, ... are functions of t. wₖ is the product of the weights
    along all axes.

    ∂L/∂x[i] = Σ wₖ g   over all p and k with iₖ = i            ∂L/∂p = Σₖ ⟨g, x[iₖ]⟩ ∂wₖ/∂p

    Jaderberg, Simonyan, Zisserman and Kavukcuoglu, "Spatial Transformer Networks", 2015. Keys, "Cubic Convolution
    Interpolation for Digital Image Processing", 1981.
    """

    autocast = {"cpu": "float32", "cuda": "promote"}

    def forward(
        input: Tensor, grid: Tensor, shape: tuple[int, ...], mode: int, padding: int, align_corners: bool
    ) -> Tensor:
        return torch.grid_sampler(input, grid, mode, padding, align_corners)

    def neighbors(grid: Tensor, shape: tuple[int, ...], mode: int, padding: int, align_corners: bool) -> Neighbors:
        return find_neighbors(grid, shape, mode, padding, align_corners)

    def g(grad: Tensor) -> Tensor:
        return pixels(grad)

    def grad_input(g: Tensor, neighbors: Neighbors, shape: tuple[int, ...]) -> Tensor:
        n, size = shape[0], math.prod(shape[2:])
        total = weighted_sum_by_pixel(g, neighbors.index, neighbors.weight, n * size)
        return total.reshape(n, size, shape[1]).mT.reshape(shape).contiguous()

    def grad_grid(g: Tensor, input: Tensor, grid: Tensor, neighbors: Neighbors) -> Tensor:
        x = pixels(input)
        return grad_positions(g, x, neighbors.index, neighbors.weight_derivatives).reshape(grid.shape)


class Neighbors(NamedTuple):
    """For each pixel k around each position p: iₖ, wₖ, and ∂wₖ/∂p for each axis."""

    index: Tensor  # (k, p), counted through all images of the batch
    weight: Tensor  # (k, p)
    weight_derivatives: list[Tensor]  # each (k, p)


def weighted_sum_by_pixel(g: Tensor, index: Tensor, weight: Tensor, count: int) -> Tensor:
    """Σ wₖ g over all p and k with iₖ = i, for each of ``count`` pixels i."""
    weighted = weight.unsqueeze(-1) * g
    return g.new_zeros(count, g.shape[-1]).index_add(0, flatten(index), flatten(weighted, 0, 1))


@replaces(weighted_sum_by_pixel)
def _weighted_sum_by_pixel_for_each_k(g: Tensor, index: Tensor, weight: Tensor, count: int) -> Tensor:
    """The same for one k after the other, which takes less memory."""
    total, weighted = g.new_zeros(count, g.shape[-1]), torch.empty_like(g)
    for i, w in zip(index, weight, strict=True):
        total.index_add_(0, i, torch.mul(w.unsqueeze(-1), g, out=weighted))
    return total


def grad_positions(g: Tensor, x: Tensor, index: Tensor, weight_derivatives: list[Tensor]) -> Tensor:
    """Σₖ ⟨g, x[iₖ]⟩ ∂wₖ/∂p, (p, axis)"""
    products = (x.index_select(0, flatten(index)).reshape(*index.shape, x.shape[-1]) * g).sum(-1)
    return torch.stack([(products * dw).sum(0) for dw in weight_derivatives], -1)


@replaces(grad_positions)
def _grad_positions_by_embedding_bag(
    g: Tensor, x: Tensor, index: Tensor, weight_derivatives: list[Tensor]
) -> Tensor:
    """The same as ⟨g, Σₖ x[iₖ] ∂wₖ/∂p⟩, where torch's embedding bag computes the sum."""
    bags = index.mT.contiguous()
    sums = [
        F.embedding_bag(bags, x, mode="sum", per_sample_weights=dw.mT.contiguous()) for dw in weight_derivatives
    ]
    return torch.stack([total.mul_(g).sum(-1) for total in sums], -1)


def pixels(image: Tensor) -> Tensor:
    """(N, C, *size) as (number of all pixels, C)."""
    return flatten(image, 2).mT.reshape(-1, image.shape[1])


@replaces(pixels)
def _pixels_by_image(image: Tensor) -> Tensor:
    """The same. For large images, torch copies one transposed matrix after the other faster than all together."""
    n, c, size = len(image), image.shape[1], math.prod(image.shape[2:])
    result = image.new_empty(n, size, c)
    if n * 256 > size:
        return result.copy_(image.reshape(n, c, size).mT).reshape(-1, c)
    for target, source in zip(result, image.reshape(n, c, size), strict=True):
        target.copy_(source.mT)
    return result.reshape(-1, c)


_LINEAR, _NEAREST, _CUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)


def find_neighbors(
    grid: Tensor, shape: tuple[int, ...], mode: int, padding: int, align_corners: bool
) -> Neighbors:
    """All combinations of the neighbors along each axis."""
    n, _, *sizes = shape
    coordinates = grid.reshape(n, math.prod(grid.shape[1:-1]), len(sizes)).unbind(-1)
    positions = coordinates[::-1]  # the coordinates are (x, y[, z]), the sizes ([D,] H, W)
    axes = [
        neighbors_along_axis(p, size, mode, padding, align_corners)
        for p, size in zip(positions, sizes, strict=True)
    ]
    image = torch.arange(n, device=grid.device).unsqueeze(1)
    index, weight, derivatives = image * sizes[0] + axes[0][0], axes[0][1], [axes[0][2]]
    for size, (i, w, dw) in zip(sizes[1:], axes[1:], strict=True):
        index = flatten((index * size).unsqueeze(1) + i, 0, 1)
        # the weight is a product, in each derivative of which one factor is replaced by its derivative
        derivatives = [*(pairwise_products(x, w) for x in derivatives), pairwise_products(weight, dw)]
        weight = pairwise_products(weight, w)
    return Neighbors(flatten(index, 1), flatten(weight, 1), [flatten(x, 1) for x in reversed(derivatives)])


def pairwise_products(a: Tensor, b: Tensor) -> Tensor:
    """aₖ bₗ for all k and l, along the first axis."""
    return flatten(a.unsqueeze(1) * b, 0, 1)


def neighbors_along_axis(
    p: Tensor, n: int, mode: int, padding: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """iₖ, wₖ and ∂wₖ/∂p for positions p from -1 to 1 along an axis of n pixels."""
    scale = (n - 1) / 2 if align_corners else n / 2
    position = (p + 1) * scale - (0 if align_corners else 0.5)
    if mode == _CUBIC:  # padding moves each pixel, not the position
        first = position.floor()
        weight, derivative = cubic_weights(position - first)
        pixel, _ = apply_padding(first + _range(-1, 3, p), n, padding, align_corners)
        return drop_outside(pixel, n, weight, derivative * scale)
    position, sign = apply_padding(position, n, padding, align_corners)
    first = position.floor()
    weight, derivative = linear_weights(position - first)
    return drop_outside(first + _range(0, 2, p), n, weight, derivative * (sign * scale))


def _range(start: int, end: int, p: Tensor) -> Tensor:
    """start, ..., end - 1 along a new axis before those of p."""
    return torch.arange(start, end, dtype=p.dtype, device=p.device).reshape(-1, 1, 1)


def drop_outside(pixel: Tensor, n: int, weight: Tensor, derivative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments with pixel 0, weight 0 and derivative 0 where the pixel is outside of the image, or nan."""
    inside = (pixel > -1) & (pixel < n)
    return torch.where(inside, pixel, 0).long(), torch.where(inside, weight, 0), torch.where(inside, derivative, 0)


def apply_padding(position: Tensor, n: int, padding: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """The position moved into the image, and the derivative of this map: 1, 0 or -1."""
    sign = torch.ones_like(position)
    if padding == _REFLECTION:
        low, span = (0, n - 1) if align_corners else (-0.5, n)
        wave = torch.remainder(position - low + span, 2 * span) - span if span else torch.zeros_like(position)
        position, sign = low + wave.abs(), wave.sgn()
    if padding != _ZEROS:
        sign = torch.where((position > 0) & (position < n - 1), sign, 0)
        position = position.clamp(0, n - 1)
    return position, sign


def linear_weights(t: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the two pixels around, and their derivatives by t."""
    one = torch.ones_like(t)
    return torch.stack([1 - t, t]), torch.stack([-one, one])


def cubic_weights(t: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of four pixels, at the distances t + 1, t, 1 - t and 2 - t, and their derivatives by t."""
    w0, d0 = _cubic_beyond_1(t + 1)
    w1, d1 = _cubic_within_1(t)
    w2, d2 = _cubic_within_1(1 - t)
    w3, d3 = _cubic_beyond_1(2 - t)
    return torch.stack([w0, w1, w2, w3]), torch.stack([d0, d1, -d2, -d3])


_A = -0.75  # the parameter a of Keys' kernel


def _cubic_within_1(t: Tensor) -> tuple[Tensor, Tensor]:
    """Keys' kernel (a + 2) t³ - (a + 3) t² + 1 at distance t ≤ 1, and its derivative."""
    return ((_A + 2) * t - (_A + 3)) * t * t + 1, (3 * (_A + 2) * t - 2 * (_A + 3)) * t


def _cubic_beyond_1(t: Tensor) -> tuple[Tensor, Tensor]:
    """Keys' kernel a t³ - 5a t² + 8a t - 4a at distance 1 ≤ t ≤ 2, and its derivative."""
    return ((_A * t - 5 * _A) * t + 8 * _A) * t - 4 * _A, (3 * _A * t - 10 * _A) * t + 8 * _A


class GridSampleNearestFunction(Rule):
    r"""y[p] = x[i(p)]      i(p): the pixel nearest to the position p, or none

    ∂L/∂x[j] = Σ g[p] over i(p) = j            ∂L/∂p = 0
    """

    autocast = {"cpu": "float32", "cuda": "promote"}

    def forward(
        input: Tensor, grid: Tensor, shape: tuple[int, ...], dtype: torch.dtype, padding: int, align_corners: bool
    ) -> Tensor:
        return torch.grid_sampler(input, grid, _NEAREST, padding, align_corners)

    def i(grid: Tensor, shape: tuple[int, ...], dtype: torch.dtype, padding: int, align_corners: bool) -> Tensor:
        """i, counted from 1, 0 for none: the kernel's output for an image in which each pixel holds its number.

        The kernel is called because rounding decides between two pixels, and each kernel rounds differently.
        """
        size = math.prod(shape[2:])
        digits = to_digits(torch.arange(1, size + 1, device=grid.device), size)
        image = digits.to(dtype).reshape(len(digits), *shape[2:])  # one channel for each digit
        images = image.expand(shape[0], *image.shape)
        output = torch.grid_sampler(images, grid.detach().to(dtype), _NEAREST, padding, align_corners)
        return from_digits(output.movedim(1, 0))

    def grad_input(grad: Tensor, i: Tensor, shape: tuple[int, ...]) -> Tensor:
        zeros = grad.new_zeros(*shape[:2], math.prod(shape[2:]) + 1)
        index = flatten(i, 1).unsqueeze(1).expand(-1, shape[1], -1)
        total = zeros.scatter_add(-1, index, flatten(grad, 2))
        return total[..., 1:].reshape(shape).contiguous()

    def grad_grid(grid: Tensor) -> Tensor:
        return torch.zeros_like(grid)


@implements(torch.grid_sampler)
def grid_sampler(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    """The image at the positions of a grid, as `torch.grid_sampler`, which `grid_sample` calls.

    Shapes: input (N, C, H, W) or (N, C, D, H, W), grid (N, *out, 2) or (N, *out, 3); the result (N, C, *out).
    """
    shape = tuple(input.shape)
    if interpolation_mode == _NEAREST:
        input, grid = autocast_inputs(GridSampleNearestFunction, (input, grid))
        return GridSampleNearestFunction.apply(input, grid, shape, input.dtype, padding_mode, align_corners)
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
    supports_special_values=False,  # weights of 0 multiply inf and nan
    expected_failures={
        "vmap": "torch's batching rule uses a wrong size if input and grid are batched along different axes"
    },
)


class AffineGridFunction(Rule):
    r"""y[p] = θ (p, 1)      p: the centers of pixels that cover [-1, 1]ᵏ; with ``align_corners``, from -1 to 1

    dy[p] = dθ (p, 1)      ∂L/∂θ = Σₚ g[p] (p, 1)ᵀ
    """

    autocast = LOWER_PRECISION

    def forward(theta: Tensor, size: tuple[int, ...], align_corners: bool) -> Tensor:
        return torch.affine_grid_generator(theta, size, align_corners)

    def grad_theta(grad: Tensor, size: tuple[int, ...], align_corners: bool) -> Tensor:
        axes = [_pixel_positions(n, align_corners).to(grad) for n in size[2:]]
        p = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1).reshape(-1, len(axes))  # (x, y[, z])
        return grad.reshape(size[0], -1, len(axes)).mT @ F.pad(p, (0, 1), value=1)


def _pixel_positions(n: int, align_corners: bool) -> Tensor:
    """The positions of n pixels along an axis from -1 to 1."""
    if n == 1:
        return torch.zeros(1)
    return torch.linspace(-1, 1, n, dtype=torch.float64) * (1 if align_corners else (n - 1) / n)


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
    r"""y[(c, k), p] = x[c, i(k, p)]      i(k, p): pixel k of the patch at p; outside of the image 0

    Each pixel of x is copied to every patch that contains it:  ∂L/∂x = fold(g), the sum over the copies.
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
    r"""x[c, i] = Σ y[(c, k), p] over i(k, p) = i:  the transpose of unfold      ∂L/∂y = unfold(g)"""

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
    r"""y[c, r h + i, r w + j] = x[c r² + r i + j, h, w]:  a permutation, so ∂L/∂x is the inverse, applied to g.

    Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional
    Neural Network", 2016.
    """

    supports_complex = True

    def forward(input: Tensor, factor: int) -> Tensor:
        return F.pixel_shuffle(input, factor)

    def grad_input(grad: Tensor, factor: int) -> Tensor:
        unshuffled = PixelUnshuffleFunction.apply(grad, factor)
        return unshuffled.reshape(unshuffled_shape(grad, factor))  # torch does not divide sizes of empty tensors


def unshuffled_shape(y: Tensor, factor: int) -> tuple[int, ...]:
    *batch, c, h, w = y.shape
    return (*batch, c * factor**2, h // factor, w // factor)


class PixelUnshuffleFunction(Rule):
    r"""x[c r² + r i + j, h, w] = y[c, r h + i, r w + j]:  the inverse and the transpose of the pixel shuffle"""

    supports_complex = True

    def forward(input: Tensor, factor: int) -> Tensor:
        return F.pixel_unshuffle(input, factor)

    def grad_input(grad: Tensor, factor: int) -> Tensor:
        return grad if 0 in grad.shape else PixelShuffleFunction.apply(grad, factor)


class ChannelShuffleFunction(Rule):
    r"""y[i G + j] = x[j n + i],  n = C/G:  the channels are transposed as a matrix (G, n).

    ∂L/∂x is the inverse, applied to g: the shuffle with n groups.

    Zhang, Zhou, Lin and Sun, "ShuffleNet", 2018.
    """

    supports_complex = True

    def forward(input: Tensor, groups: int) -> Tensor:
        return F.channel_shuffle(input, groups)

    def grad_input(grad: Tensor, groups: int) -> Tensor:
        return ChannelShuffleFunction.apply(grad, grad.shape[1] // groups)


@with_torch_errors
def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """Channels to pixels, (*, C r², H, W) to (*, C, r H, r W), as `torch.nn.functional.pixel_shuffle`."""
    return PixelShuffleFunction.apply(input, upscale_factor)


@with_torch_errors
def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """Pixels to channels, (*, C, r H, r W) to (*, C r², H, W), as `torch.nn.functional.pixel_unshuffle`."""
    return PixelUnshuffleFunction.apply(input, downscale_factor)


@implements(F.native_channel_shuffle)
@with_torch_errors
def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """One channel of each group in turn, as `torch.nn.functional.channel_shuffle`. Shape (N, C, ...)."""
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
