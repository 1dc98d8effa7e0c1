"""Convolutions and their transposes, of one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from manualgrad.ops.elementary import Numbers, each, of_dimensions, rows, unflatten, with_torch_errors
from manualgrad.ops.padding import pad
from manualgrad.registry import SampleInput, TensorFactory, register
from manualgrad.rule import LOWER_PRECISION, Rule, replaces


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over the larger of two sides, the one that a convolution reads and its transpose writes.

    A number for each dimension: size + 2 padding = stride (windows - 1) + dilation (kernel - 1) + 1 + rest
    """

    kernel: tuple[int, ...]
    windows: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    rest: tuple[int, ...]  # what no window reaches (to a transposed convolution: output_padding)
    groups: int
    transposed: bool = False

    def transpose(self) -> Geometry:
        return replace(self, transposed=not self.transposed)

    def exchanged(self) -> Geometry:
        """Windows for kernel and kernel for windows, over the same side."""
        return Geometry(
            self.windows, self.kernel, self.dilation, self.padding, self.stride, self.rest, self.groups
        )


def _weight_by_kernel(grad: Tensor, input: Tensor, geometry: Geometry) -> Tensor | None:
    """The gradient of the weight by oneDNN, cuDNN or what else torch has."""
    at = geometry
    # with a longer rest the kernel would count more windows than the convolution has
    fits = at.transposed or all(rest < step for rest, step in zip(at.rest, at.stride, strict=True))
    if not (fits and grad.is_floating_point()):
        return None
    rows, columns = (input, grad) if at.transposed else (grad, input)
    weight = grad.new_empty((rows.shape[1], columns.shape[1] // at.groups, *at.kernel))  # only its shape is read
    beyond = at.rest if at.transposed else (0,) * len(at.kernel)
    how = (at.stride, at.padding, at.dilation, at.transposed, beyond, at.groups)
    return torch.ops.aten.convolution_backward(grad, input, weight, None, *how, (False, True, False))[1]


class ConvolutionFunction(Rule):
    r"""y[n, o, i] = Σ_c Σ_k x[n, c, s i + d k - p] W[o, c, k] + b[o]      i, k: a number for each dimension

    It is linear in x and linear in W. Write C for x ↦ y without b, and Cᵀ for its transpose, the transposed
    convolution, which adds W[k] y[i] to x[s i + d k - p].

    differential      dy = C dx + Σ x dW + db
    pair with g       ⟨g, C dx⟩ = ⟨Cᵀ g, dx⟩                                     ∂L/∂x = Cᵀ g
                      Σ g[n, o, i] x[n, c, s i + d k - p] dW[o, c, k]            ∂L/∂W: see `correlation`
                      Σ g[n, o, i] db[o]                                         ∂L/∂b = Σ g
    For a transposed convolution, y = Cᵀ x + b, the same with C for Cᵀ, and g for x in ∂L/∂W.
    (For complex numbers ⟨a, b⟩ = Σ ā b, which conjugates W and x.)

    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016.
    """

    autocast = LOWER_PRECISION
    upcast_gradients = False  # products accumulate in float32 as they are
    supports_complex = True
    vendor_kernels = {"grad_weight": _weight_by_kernel}
    preserve_memory_format = ("grad_weight",)

    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        n, at = len(geometry.kernel), geometry
        if at.transposed:
            operation = getattr(torch, f"conv_transpose{n}d")
            return operation(input, weight, bias, at.stride, at.padding, at.rest, at.groups, at.dilation)
        operation = getattr(torch, f"conv{n}d")
        output = operation(input, weight, bias, at.stride, at.padding, at.dilation, at.groups)
        if output.shape[2:] != at.windows:  # the rest has room for more
            output = output[(..., *map(slice, at.windows))].clone()
        return output

    def grad_input(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return ConvolutionFunction.apply(grad, weight.conj(), None, geometry.transpose())

    def grad_weight(grad: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
        x = input.conj()
        large, small = (grad, x) if geometry.transposed else (x, grad)
        return correlation(large, small, geometry)

    def grad_bias(grad: Tensor) -> Tensor:
        return grad.sum([axis for axis in range(grad.dim()) if axis != 1])


def correlation(large: Tensor, small: Tensor, geometry: Geometry) -> Tensor:
    r"""W[o, c, k] = Σ_n Σ_i large[n, c, s i + d k - p] small[n, o, i]

    Read with k as the window and i as an index into the kernel, this is a convolution again: stride and dilation
    have changed places, and so have batch and channels.
    """
    n, c, groups = len(large), large.shape[1] // geometry.groups, geometry.groups
    if n == 0:
        return large.new_zeros(small.shape[1], c, *geometry.kernel)
    channels = unflatten(large, 1, (groups, c)).transpose(0, 2).reshape(c, groups * n, *large.shape[2:])
    found = ConvolutionFunction.apply(channels, small.transpose(0, 1), None, geometry.exchanged())
    return found.transpose(0, 1).contiguous()


@replaces(correlation)
def _correlation_by_shape(large: Tensor, small: Tensor, geometry: Geometry) -> Tensor:
    """The fastest of three ways to the same sum. In low precision only the convolution rounds once."""
    samples, channels = large.shape[:2]
    if samples == 0 or large.element_size() < 4:
        return correlation(large, small, geometry)
    if channels == geometry.groups:  # depthwise: a group for each sample, so that fewer products are summed
        separate = replace(geometry, groups=samples * channels)
        large, small = (x.reshape(1, -1, *x.shape[2:]) for x in (large, small))
        found = correlation(large, small, separate)
        return found.reshape(samples, -1, *found.shape[1:]).sum(0)
    if len(geometry.kernel) == 1 or math.prod(geometry.kernel) <= 9:
        return _unfolded(large, small, geometry)
    return correlation(large, small, geometry)


_BLOCK = 2**18
"""Elements that are unfolded at a time, so that they stay in the cache."""


def _unfolded(large: Tensor, small: Tensor, geometry: Geometry) -> Tensor:
    """With each window written out as a column, (c k, n i), the correlation is a product of matrices.

    Chellapilla, Puri and Simard, "High performance convolutional neural networks for document processing", 2006.
    """
    at, n, (count, channels) = geometry, len(geometry.kernel), large.shape[:2]
    if at.groups > 1:  # in channels_last the channels of a group lie apart, and so would the columns
        large, small = large.contiguous(), small.contiguous()
    windows = pad(large, [size for p in reversed(at.padding) for size in (p, p)]) if any(at.padding) else large
    for axis, (k, s, d, o) in enumerate(zip(at.kernel, at.stride, at.dilation, at.windows, strict=True), 2):
        windows = windows.unfold(axis, d * (k - 1) + 1, s).narrow(axis, 0, o)
        windows = windows[..., ::d] if d > 1 else windows
    windows = windows.reshape(count, at.groups, -1, *windows.shape[2:])  # (n, group, c, *i, *k)
    windows = windows.permute(1, 2, *range(3 + n, 3 + 2 * n), 0, *range(3, 3 + n))
    small = small.reshape(count, at.groups, -1, *at.windows).permute(1, 2, 0, *range(3, 3 + n))
    step = max(1, _BLOCK // math.prod((channels, *at.kernel, *at.windows)))
    total: Tensor | None = None
    for few, fit in zip(small.split(step, 2), windows.split(step, 2 + n), strict=True):
        a = few.reshape(at.groups, -1, math.prod(few.shape[2:]))
        b = fit.reshape(at.groups, math.prod(fit.shape[1 : 2 + n]), -1).mT
        total = a @ b if total is None else total.baddbmm_(a, b)
    assert total is not None
    return total.reshape(-1, channels // at.groups, *at.kernel)


def _conv(n: int) -> Callable[..., Tensor]:
    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Numbers = 1,
        padding: Numbers | str = 0,
        dilation: Numbers = 1,
        groups: int = 1,
    ) -> Tensor:
        """Convolution along the last {n} axes, as `torch.nn.functional.conv{n}d`.

        Shapes: input (N, C, *sizes) or (C, *sizes), weight (O, C / groups, *kernel), bias (O); the result
        (N, O, *windows) or (O, *windows). The padding may be "same" or "valid".
        """
        if _without_batch(n, input, weight):
            return conv(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
        stride, dilation, kernel = each(stride, n), each(dilation, n), tuple(weight.shape[2:])
        if padding == "same":
            if any(s != 1 for s in stride):
                raise RuntimeError("padding='same' is not supported for strided convolutions")
            spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = tuple(span // 2 for span in spans)
            if any(span % 2 for span in spans):  # one more at the end
                input = pad(input, [size for span in reversed(spans) for size in (0, span % 2)])
        elif padding == "valid":
            padding = 0
        elif isinstance(padding, str):
            raise RuntimeError(f"padding must be a number, 'same' or 'valid', but is {padding!r}")
        padding = each(padding, n)
        spare = [  # behind the first window; by // and %, as torch.compile has no divmod of a size that varies
            size + 2 * p - d * (k - 1) - 1
            for size, k, p, d in zip(input.shape[2:], kernel, padding, dilation, strict=True)
        ]
        windows = tuple(n // s + 1 for n, s in zip(spare, stride, strict=True))
        rest = tuple(n % s for n, s in zip(spare, stride, strict=True))
        geometry = Geometry(kernel, windows, stride, padding, dilation, rest, groups)
        return ConvolutionFunction.apply(input, weight, bias, geometry)

    return conv


def _conv_transpose(n: int) -> Callable[..., Tensor]:
    def conv_transpose(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Numbers = 1,
        padding: Numbers = 0,
        output_padding: Numbers = 0,
        groups: int = 1,
        dilation: Numbers = 1,
    ) -> Tensor:
        """Transposed convolution along the last {n} axes, as `torch.nn.functional.conv_transpose{n}d`.

        Shapes: input (N, C, *windows) or (C, *windows), weight (C, O / groups, *kernel), bias (O); the result
        (N, O, *sizes) or (O, *sizes).
        """
        if _without_batch(n, input, weight):
            batch = input.unsqueeze(0)
            return conv_transpose(batch, weight, bias, stride, padding, output_padding, groups, dilation).squeeze(
                0
            )
        kernel, windows = tuple(weight.shape[2:]), tuple(input.shape[2:])
        stride, padding, dilation, rest = (each(x, n) for x in (stride, padding, dilation, output_padding))
        geometry = Geometry(kernel, windows, stride, padding, dilation, rest, groups, transposed=True)
        return ConvolutionFunction.apply(input, weight, bias, geometry)

    return conv_transpose


def _without_batch(n: int, input: Tensor, weight: Tensor) -> bool:
    if weight.dim() != n + 2:  # the number of axes tells which of torch's convolutions the rule takes
        raise RuntimeError(f"expected a weight of {n + 2} axes, but it has shape {list(weight.shape)}")
    return input.dim() == n + 1


conv1d, conv2d, conv3d = of_dimensions(_conv)
conv_transpose1d, conv_transpose2d, conv_transpose3d = of_dimensions(_conv_transpose)


class TimeBatchChannelsFunction(Rule):
    r"""y[t, n, o] = Σ_c Σ_k x[t + k - p, n, c] W[k, c, o] + b[o]

    pair with g       Σ g[t, n, o] dx[t + k - p, n, c] W[k, c, o]
    ∂L/∂x[t] = Σ_k g[t - k + p] W[k]ᵀ:  such a convolution of g again, with the kernel reversed
    ∂L/∂W[k] = Σ x[t + k - p]ᵀ g[t]      over all t for which there is such an x, and n
    ∂L/∂b = Σ g
    """

    autocast = LOWER_PRECISION

    def forward(input: Tensor, weight: Tensor, bias: Tensor, pad: int) -> Tensor:
        return torch.conv_tbc(input.contiguous(), weight, bias, pad)

    def grad_input(grad: Tensor, weight: Tensor, pad: int) -> Tensor:
        before = len(weight) - 1 - pad
        g = grad[-before:before] if before < 0 else grad  # no x is so far out
        bias = weight.new_zeros(weight.shape[1])
        return TimeBatchChannelsFunction.apply(g, weight.flip(0).mT, bias, max(before, 0))

    def grad_weight(grad: Tensor, input: Tensor, weight: Tensor, pad: int) -> Tensor:
        return torch.stack([correlation_in_time(input, grad, shift - pad) for shift in range(len(weight))])

    def grad_bias(grad: Tensor) -> Tensor:
        return rows(grad).sum(0)


def correlation_in_time(x: Tensor, g: Tensor, shift: int) -> Tensor:
    """Σ x[t + shift]ᵀ g[t]"""
    first = max(0, -shift)
    end = max(first, min(len(g), len(x) - shift))
    return rows(x[first + shift : end + shift]).mT @ rows(g[first:end])


@with_torch_errors
def conv_tbc(input: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """Convolution along the first axis, as `torch.nn.functional.conv_tbc`.

    Shapes: input (T, N, C), weight (k, C, O), bias (O); the result (T + 2 pad - k + 1, N, O).
    """
    return TimeBatchChannelsFunction.apply(input, weight, bias, pad)


def _samples(t: TensorFactory, n: int) -> list[SampleInput]:
    sides, small, k = ((6,), (5, 4), (3, 2, 2))[n - 1], ((4,), (3, 4), (2, 2, 3))[n - 1], (2, 1, 3)[-n:]
    ones = (1,) * (n - 1)
    return [
        SampleInput(t(2, 2, *sides), t(3, 2, *k), t(3), stride=2, padding=1),
        SampleInput(t(2, 3, *small), t(3, 1, *k), t(3), 1, (1,) * n, (*ones, 2), groups=3),
        SampleInput(t(2, *small), t(1, 2, *(3,) * n), padding="same", dilation=2),
    ]


def _transposed_samples(t: TensorFactory, n: int) -> list[SampleInput]:
    sides, k = ((3,), (3, 2), (2, 2, 2))[n - 1], (2, 1, 3)[-n:]
    ones = (1,) * (n - 1)
    return [
        SampleInput(t(2, 1, *sides), t(1, 3, *k), t(3), stride=2, padding=1, output_padding=1),
        SampleInput(t(2, 3, *sides), t(3, 1, *k), t(3), 1, (1, 0, 1)[-n:], 0, 3, (*ones, 2)),
        SampleInput(t(2, *sides), t(2, 1, *k)),
    ]


def _big(t: TensorFactory, n: int) -> SampleInput:
    shape = ((8, 64, 1024), (8, 64, 28, 28), (2, 16, 16, 28, 28))[n - 1]
    width = shape[1]
    return SampleInput(t(*shape), t(width, width, *(3,) * n), t(width), padding=1)


for _n, _plain, _transposed in (
    (1, conv1d, conv_transpose1d),
    (2, conv2d, conv_transpose2d),
    (3, conv3d, conv_transpose3d),
):
    _of_size = partial(_big, n=_n)
    register(_plain, sample_inputs=partial(_samples, n=_n), benchmark_input=_of_size)
    register(_transposed, sample_inputs=partial(_transposed_samples, n=_n), benchmark_input=_of_size)

register(
    conv_tbc,
    sample_inputs=lambda t: [
        SampleInput(t(4, 2, 3), t(2, 3, 2), t(2), 2),
        SampleInput(t(5, 1, 2), t(3, 2, 1), t(1)),
    ],
    benchmark_input=lambda t: SampleInput(t(256, 8, 64), t(3, 64, 64), t(64), 1),
)
