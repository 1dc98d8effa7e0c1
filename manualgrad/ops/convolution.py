"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manualgrad.ops.padding import pad
from manualgrad.ops.registration import for_1d_2d_3d, with_torch_errors
from manualgrad.ops.shapes import IntOrInts, rows, to_tuple, unflatten
from manualgrad.registry import SampleInput, TensorFactory, register
from manualgrad.rule import LOWER_PRECISION, Rule, replaces


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over the image: the input of a convolution, the output of a transposed convolution.

    Per dimension: size + 2 padding = stride (windows - 1) + dilation (kernel - 1) + 1 + rest
    """

    kernel: tuple[int, ...]
    windows: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    rest: tuple[int, ...]  # the positions after the last window (a transposed convolution's output_padding)
    groups: int
    transposed: bool = False

    def transpose(self) -> Geometry:
        return replace(self, transposed=not self.transposed)

    def swapped(self) -> Geometry:
        """Windows and kernel swapped, for the same image."""
        return Geometry(
            self.windows, self.kernel, self.dilation, self.padding, self.stride, self.rest, self.groups
        )


def _vendor_gradients(
    needed: tuple[bool, bool], grad: Tensor, input: Tensor | None, weight: Tensor | None, geometry: Geometry
) -> tuple[Tensor | None, Tensor | None] | None:
    """∂L/∂x and ∂L/∂W by the vendor's kernel (oneDNN, cuDNN)."""
    geo = geometry
    # with a larger rest the kernel would count more windows than the convolution has
    fits = geo.transposed or all(rest < stride for rest, stride in zip(geo.rest, geo.stride, strict=True))
    if not (fits and grad.is_floating_point()):
        return None
    if weight is None:
        assert input is not None
        small, image = (input, grad) if geo.transposed else (grad, input)
        weight = grad.new_empty((small.shape[1], image.shape[1] // geo.groups, *geo.kernel))  # only for its shape
    output_padding = geo.rest if geo.transposed else (0,) * len(geo.kernel)
    settings = (geo.stride, geo.padding, geo.dilation, geo.transposed, output_padding, geo.groups)
    return torch.ops.aten.convolution_backward(grad, input, weight, None, *settings, (*needed, False))[:2]


def _vendor_grad_weight(grad: Tensor, input: Tensor, geometry: Geometry) -> Tensor | None:
    found = _vendor_gradients((False, True), grad, input, None, geometry)
    return None if found is None else found[1]


def _vendor_both_gradients(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Any:
    return _vendor_gradients((True, True), grad, input, weight, geometry)


class ConvolutionFunction(Rule):
    r"""y[n, o, i] = Σ_c Σ_k x[n, c, s i + d k - p] W[o, c, k] + b[o]      i, k: one number per dimension

    s: stride   d: dilation   p: padding. y is linear in x and linear in W. C is the map from x to y without b. Its
    transpose Cᵀ is the transposed convolution, which adds W[k] y[i] to x[s i + d k - p].

    differential      dy = C dx + Σ x dW + db
    pair with g       ⟨g, C dx⟩ = ⟨Cᵀ g, dx⟩                                     ∂L/∂x = Cᵀ g
                      Σ g[n, o, i] x[n, c, s i + d k - p] dW[o, c, k]            ∂L/∂W: see `correlation`
                      Σ g[n, o, i] db[o]                                         ∂L/∂b = Σ g
    For a transposed convolution, y = Cᵀ x + b, C and Cᵀ are exchanged, and x and g in ∂L/∂W.
    Complex numbers: ⟨a, b⟩ = Σ ā b, so W and x are conjugated.

    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016.
    """

    autocast = LOWER_PRECISION
    upcast_gradients = False  # matrix products accumulate in float32 already
    supports_complex = True
    vendor_kernels = {
        ("grad_input", "grad_weight"): _vendor_both_gradients,
        ("grad_weight",): _vendor_grad_weight,
    }
    preserve_memory_format = ("grad_weight",)

    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        n, geo = len(geometry.kernel), geometry
        if geo.transposed:
            operation = getattr(torch, f"conv_transpose{n}d")
            return operation(input, weight, bias, geo.stride, geo.padding, geo.rest, geo.groups, geo.dilation)
        operation = getattr(torch, f"conv{n}d")
        output = operation(input, weight, bias, geo.stride, geo.padding, geo.dilation, geo.groups)
        if output.shape[2:] != geo.windows:  # more windows fit into the rest
            output = output[(..., *map(slice, geo.windows))].clone()
        return output

    def grad_input(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return ConvolutionFunction.apply(grad, weight.conj(), None, geometry.transpose())

    def grad_weight(grad: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
        x = input.conj()
        image, small = (grad, x) if geometry.transposed else (x, grad)
        return correlation(image, small, geometry)

    def grad_bias(grad: Tensor) -> Tensor:
        return grad.sum([axis for axis in range(grad.dim()) if axis != 1])


def correlation(image: Tensor, small: Tensor, geometry: Geometry) -> Tensor:
    r"""W[o, c, k] = Σ_n Σ_i image[n, c, s i + d k - p] small[n, o, i]

    This is a convolution of `image` with the kernel `small`: k is the window and i the index into the kernel, so
    stride and dilation are swapped. Its samples are the c and its channels the n. With groups, c is in one group.
    """
    n, c, groups = len(image), image.shape[1] // geometry.groups, geometry.groups
    if n == 0:
        return image.new_zeros(small.shape[1], c, *geometry.kernel)
    image = unflatten(image, 1, (groups, c)).transpose(0, 2).reshape(c, groups * n, *image.shape[2:])
    weight = ConvolutionFunction.apply(image, small.transpose(0, 1), None, geometry.swapped())
    return weight.transpose(0, 1).contiguous()


@replaces(correlation)
def _correlation_by_shape(image: Tensor, small: Tensor, geometry: Geometry) -> Tensor:
    """The fastest of three computations of the same sum. Two of them round each partial sum, so low precision uses
    `correlation`.
    """
    samples, channels = image.shape[:2]
    if samples == 0 or image.element_size() < 4:
        return correlation(image, small, geometry)
    if channels == geometry.groups:  # depthwise: a group for each sample and channel, then the sum over samples
        separate = replace(geometry, groups=samples * channels)
        image, small = (x.reshape(1, -1, *x.shape[2:]) for x in (image, small))
        weight = correlation(image, small, separate)
        return weight.reshape(samples, -1, *weight.shape[1:]).sum(0)
    if len(geometry.kernel) == 1 or math.prod(geometry.kernel) <= 9:
        return _correlation_by_unfolding(image, small, geometry)
    return correlation(image, small, geometry)


_UNFOLDED_ELEMENTS = 2**18
"""Elements unfolded per step, few enough to fit in the cache."""


def _correlation_by_unfolding(image: Tensor, small: Tensor, geometry: Geometry) -> Tensor:
    """The matrix product of `small`, (o, n i), with the unfolded windows, (n i, c k), for each group.

    Chellapilla, Puri and Simard, "High performance convolutional neural networks for document processing", 2006.
    """
    geo, dims, (samples, channels) = geometry, len(geometry.kernel), image.shape[:2]
    if geo.groups > 1:  # in channels_last a group's channels are not contiguous, so its columns would not be
        image, small = image.contiguous(), small.contiguous()
    windows = pad(image, [size for p in reversed(geo.padding) for size in (p, p)]) if any(geo.padding) else image
    for axis, (k, s, d, size) in enumerate(zip(geo.kernel, geo.stride, geo.dilation, geo.windows, strict=True), 2):
        windows = windows.unfold(axis, d * (k - 1) + 1, s).narrow(axis, 0, size)
        windows = windows[..., ::d] if d > 1 else windows
    i_axes, k_axes = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    windows = windows.reshape(samples, geo.groups, -1, *windows.shape[2:])  # (n, group, c, *i, *k)
    windows = windows.permute(1, 2, *k_axes, 0, *i_axes)  # (group, c, *k, n, *i)
    small = small.reshape(samples, geo.groups, -1, *geo.windows).permute(1, 2, 0, *i_axes)  # (group, o, n, *i)
    step = max(1, _UNFOLDED_ELEMENTS // math.prod((channels, *geo.kernel, *geo.windows)))  # samples
    total: Tensor | None = None
    for small_part, windows_part in zip(small.split(step, 2), windows.split(step, 2 + dims), strict=True):
        a = small_part.reshape(geo.groups, -1, math.prod(small_part.shape[2:]))
        b = windows_part.reshape(geo.groups, math.prod(windows_part.shape[1 : 2 + dims]), -1).mT
        total = a @ b if total is None else total.baddbmm_(a, b)
    assert total is not None
    return total.reshape(-1, channels // geo.groups, *geo.kernel)


def _conv(n: int) -> Callable[..., Tensor]:
    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: IntOrInts = 1,
        padding: IntOrInts | str = 0,
        dilation: IntOrInts = 1,
        groups: int = 1,
    ) -> Tensor:
        """Convolution along the last {n} axes, as `torch.nn.functional.conv{n}d`.

        Shapes: input (N, C, *sizes) or (C, *sizes), weight (O, C / groups, *kernel), bias (O); the result
        (N, O, *windows) or (O, *windows). The padding may be "same" or "valid".
        """
        if _is_unbatched(n, input, weight):
            return conv(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
        stride, dilation, kernel = to_tuple(stride, n), to_tuple(dilation, n), tuple(weight.shape[2:])
        if padding == "same":
            if any(s != 1 for s in stride):
                raise RuntimeError("padding='same' is not supported for strided convolutions")
            spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = tuple(span // 2 for span in spans)
            if any(span % 2 for span in spans):  # pad one more at the end
                input = pad(input, [size for span in reversed(spans) for size in (0, span % 2)])
        elif padding == "valid":
            padding = 0
        elif isinstance(padding, str):
            raise RuntimeError(f"padding must be an int, a tuple, 'same' or 'valid', but is {padding!r}")
        padding = to_tuple(padding, n)
        spare = [  # the positions after the first window
            size + 2 * p - d * (k - 1) - 1
            for size, k, p, d in zip(input.shape[2:], kernel, padding, dilation, strict=True)
        ]
        # not divmod: torch.compile does not support it for dynamic sizes
        windows = tuple(size // s + 1 for size, s in zip(spare, stride, strict=True))
        rest = tuple(size % s for size, s in zip(spare, stride, strict=True))
        geometry = Geometry(kernel, windows, stride, padding, dilation, rest, groups)
        return ConvolutionFunction.apply(input, weight, bias, geometry)

    return conv


def _conv_transpose(n: int) -> Callable[..., Tensor]:
    def conv_transpose(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: IntOrInts = 1,
        padding: IntOrInts = 0,
        output_padding: IntOrInts = 0,
        groups: int = 1,
        dilation: IntOrInts = 1,
    ) -> Tensor:
        """Transposed convolution along the last {n} axes, as `torch.nn.functional.conv_transpose{n}d`.

        Shapes: input (N, C, *windows) or (C, *windows), weight (C, O / groups, *kernel), bias (O); the result
        (N, O, *sizes) or (O, *sizes).
        """
        if _is_unbatched(n, input, weight):
            batch = input.unsqueeze(0)
            return conv_transpose(batch, weight, bias, stride, padding, output_padding, groups, dilation).squeeze(
                0
            )
        kernel, windows = tuple(weight.shape[2:]), tuple(input.shape[2:])
        stride, padding, dilation, rest = (to_tuple(x, n) for x in (stride, padding, dilation, output_padding))
        geometry = Geometry(kernel, windows, stride, padding, dilation, rest, groups, transposed=True)
        return ConvolutionFunction.apply(input, weight, bias, geometry)

    return conv_transpose


def _is_unbatched(n: int, input: Tensor, weight: Tensor) -> bool:
    if weight.dim() != n + 2:  # the rule chooses torch's convolution by the number of axes
        raise RuntimeError(f"weight must have {n + 2} axes, but has shape {list(weight.shape)}")
    return input.dim() == n + 1


conv1d, conv2d, conv3d = for_1d_2d_3d(_conv)
conv_transpose1d, conv_transpose2d, conv_transpose3d = for_1d_2d_3d(_conv_transpose)


class ConvTBCFunction(Rule):
    r"""y[t, n, o] = Σ_c Σ_k x[t + k - p, n, c] W[k, c, o] + b[o]

    pair with g       Σ g[t, n, o] dx[t + k - p, n, c] W[k, c, o]
    ∂L/∂x[t] = Σ_k g[t - k + p] W[k]ᵀ,  a convolution of g with the reversed kernel, padded by K - 1 - p  (K terms)
    ∂L/∂W[k] = Σ x[t + k - p]ᵀ g[t]      over all n, and all t for which x[t + k - p] exists
    ∂L/∂b = Σ g
    """

    autocast = LOWER_PRECISION

    def forward(input: Tensor, weight: Tensor, bias: Tensor, pad: int) -> Tensor:
        return torch.conv_tbc(input.contiguous(), weight, bias, pad)

    def grad_input(grad: Tensor, weight: Tensor, pad: int) -> Tensor:
        padding = len(weight) - 1 - pad
        g = grad[-padding:padding] if padding < 0 else grad  # the outputs at the ends do not depend on x
        bias = weight.new_zeros(weight.shape[1])
        return ConvTBCFunction.apply(g, weight.flip(0).mT, bias, max(padding, 0))

    def grad_weight(grad: Tensor, input: Tensor, weight: Tensor, pad: int) -> Tensor:
        return torch.stack([time_correlation(input, grad, shift - pad) for shift in range(len(weight))])

    def grad_bias(grad: Tensor) -> Tensor:
        return rows(grad).sum(0)


def time_correlation(x: Tensor, g: Tensor, shift: int) -> Tensor:
    """Σ x[t + shift]ᵀ g[t] over all t for which both exist."""
    first = max(0, -shift)
    end = max(first, min(len(g), len(x) - shift))
    return rows(x[first + shift : end + shift]).mT @ rows(g[first:end])


@with_torch_errors
def conv_tbc(input: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """Convolution along the first axis, as `torch.nn.functional.conv_tbc`.

    Shapes: input (T, N, C), weight (k, C, O), bias (O); the result (T + 2 pad - k + 1, N, O).
    """
    return ConvTBCFunction.apply(input, weight, bias, pad)


def _samples(t: TensorFactory, n: int) -> list[SampleInput]:
    sizes, small, k = ((6,), (5, 4), (3, 2, 2))[n - 1], ((4,), (3, 4), (2, 2, 3))[n - 1], (2, 1, 3)[-n:]
    ones = (1,) * (n - 1)
    return [
        SampleInput(t(2, 2, *sizes), t(3, 2, *k), t(3), stride=2, padding=1),
        SampleInput(t(2, 3, *small), t(3, 1, *k), t(3), 1, (1,) * n, (*ones, 2), groups=3),
        SampleInput(t(2, *small), t(1, 2, *(3,) * n), padding="same", dilation=2),
    ]


def _transposed_samples(t: TensorFactory, n: int) -> list[SampleInput]:
    sizes, k = ((3,), (3, 2), (2, 2, 2))[n - 1], (2, 1, 3)[-n:]
    ones = (1,) * (n - 1)
    return [
        SampleInput(t(2, 1, *sizes), t(1, 3, *k), t(3), stride=2, padding=1, output_padding=1),
        SampleInput(t(2, 3, *sizes), t(3, 1, *k), t(3), 1, (1, 0, 1)[-n:], 0, 3, (*ones, 2)),
        SampleInput(t(2, *sizes), t(2, 1, *k)),
    ]


def _benchmark_input(t: TensorFactory, n: int) -> SampleInput:
    shape = ((8, 64, 1024), (8, 64, 28, 28), (2, 16, 16, 28, 28))[n - 1]
    width = shape[1]
    return SampleInput(t(*shape), t(width, width, *(3,) * n), t(width), padding=1)


for _n, _conv_n, _conv_transpose_n in (
    (1, conv1d, conv_transpose1d),
    (2, conv2d, conv_transpose2d),
    (3, conv3d, conv_transpose3d),
):
    _benchmark = partial(_benchmark_input, n=_n)
    register(_conv_n, sample_inputs=partial(_samples, n=_n), benchmark_input=_benchmark)
    register(_conv_transpose_n, sample_inputs=partial(_transposed_samples, n=_n), benchmark_input=_benchmark)

register(
    conv_tbc,
    sample_inputs=lambda t: [
        SampleInput(t(4, 2, 3), t(2, 3, 2), t(2), 2),
        SampleInput(t(5, 1, 2), t(3, 2, 1), t(1)),
    ],
    benchmark_input=lambda t: SampleInput(t(256, 8, 64), t(3, 64, 64), t(64), 1),
)
