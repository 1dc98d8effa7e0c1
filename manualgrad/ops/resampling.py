"""Resampling: an image on another grid, its patches, its pixels shuffled between space and channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import drop_in
from manualgrad.registry import Call, register
from manualgrad.rule import Rule

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
        for axis in range(-1, -k - 1, -1):
            n = shape[axis]
            units = torch.eye(n, dtype=grad.dtype, device=grad.device).reshape(1, n, *[1] * (k - 1), n)
            to = None if size is None else [*[1] * (k - 1), size[axis]]
            by = None if scale is None else [*[1.0] * (k - 1), scale[axis]]
            images = F.interpolate(units, to, by, mode, aligned, antialias=antialias)
            grad = _through(images.reshape(n, grad.shape[axis]), grad, axis)
        return grad


class AreaFunction(InterpolateFunction):
    """Adaptive average pooling, which autocast leaves alone."""

    autocast = {}


def _through(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """A matrix (out, in) applied to every line along an axis."""
    if axis == -1:
        return tensor @ matrix.mT
    before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
    flat = tensor.reshape(*before, tensor.shape[axis], math.prod(after))
    return (matrix @ flat).reshape(*before, matrix.shape[0], *after)


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
        Call(t(2, 1, 3), scale_factor=1.7),
        Call(t(1, 2, 3, 2), size=(5, 3), mode="bilinear"),
        Call(t(1, 1, 3, 4), scale_factor=(1.5, 0.8), mode="bicubic", align_corners=True),
        Call(t(1, 1, 2, 3, 2), scale_factor=1.6, mode="trilinear", recompute_scale_factor=True),
        Call(t(1, 2, 5), scale_factor=0.7, mode="area"),
        Call(t(1, 1, 5, 4), size=3, mode="bicubic", antialias=True),
    ],
    big=lambda t: Call(t(4, 32, 64, 64), scale_factor=2, mode="bilinear"),
    special=False,  # a matrix product spreads what is not finite along its line
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


def _pair(setting: int | Sequence[int]) -> Any:
    return tuple(setting) if isinstance(setting, (list, tuple)) else (setting, setting)


@drop_in
def unfold(
    input: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """The patches of an image as columns, as `torch.nn.functional.unfold`.

    Shapes: input ([N,] C, H, W); the result ([N,] C · the kernel's size, number of patches).
    """
    settings = [_pair(x) for x in (kernel_size, dilation, padding, stride)]
    return UnfoldFunction.apply(input, tuple(input.shape[-2:]), *settings)


@drop_in
def fold(
    input: Tensor,
    output_size: int | Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """The sum of patches into an image, as `torch.nn.functional.fold`.

    Shapes: input ([N,] C · the kernel's size, number of patches); the result ([N,] C, *output_size).
    """
    settings = [_pair(x) for x in (output_size, kernel_size, dilation, padding, stride)]
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
        return PixelShuffleFunction.apply(grad, factor)


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
