"""Convolutions and their transposes, of one, two and three dimensions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manualgrad.ops.elementary import Numbers, drop_in, each
from manualgrad.ops.padding import pad
from manualgrad.registry import Call, Maker, register
from manualgrad.rule import LOWER, Rule


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


class ConvolutionFunction(Rule):
    r"""y[n, o, i] = Σ_c Σ_k x[n, c, s i + d k - p] W[o, c, k] + b[o]      i, k: a number for each dimension

    It is linear in x and linear in W. Write C for x ↦ y without b, and Cᵀ for its transpose, which sends each y[i]
    back to where it came from, x[s i + d k - p] += W[k] y[i]: the transposed convolution.

    differential      dy = C dx + Σ x dW + db
    pair with g       ⟨g, C dx⟩ = ⟨Cᵀ g, dx⟩                                     ∂L/∂x = Cᵀ g
                      Σ g[n, o, i] x[n, c, s i + d k - p] dW[o, c, k]            ∂L/∂W: see `correlation`
                      Σ g[n, o, i] db[o]                                         ∂L/∂b = Σ g
    For a transposed convolution, y = Cᵀ x + b, the same with C for Cᵀ, and g for x in ∂L/∂W.
    (For complex numbers ⟨a, b⟩ = Σ ā b, which conjugates W and x.)

    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016.
    """

    autocast = LOWER
    in_float32 = False  # products accumulate in float32 as they are
    complex = True

    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        n, at = len(geometry.kernel), geometry
        if at.transposed:
            return _TRANSPOSED[n](input, weight, bias, at.stride, at.padding, at.rest, at.groups, at.dilation)
        output = _PLAIN[n](input, weight, bias, at.stride, at.padding, at.dilation, at.groups)
        if output.shape[2:] != at.windows:  # the rest has room for more
            output = output[(..., *map(slice, at.windows))].clone()
        return output

    def grad_input(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return ConvolutionFunction.apply(grad, weight.conj(), None, geometry.transpose())

    def grad_weight(grad: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
        input = input.conj()
        return correlation(grad, input, geometry) if geometry.transposed else correlation(input, grad, geometry)

    def grad_bias(grad: Tensor) -> Tensor:
        return grad.sum([axis for axis in range(grad.dim()) if axis != 1])


_PLAIN = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
_TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


def correlation(large: Tensor, small: Tensor, geometry: Geometry) -> Tensor:
    r"""W[o, c, k] = Σ_n Σ_i large[n, c, s i + d k - p] small[n, o, i]

    Read with k as the window and i as an index into the kernel, this is a convolution again: stride and dilation
    have changed places, and so have batch and channels.
    """
    n, c, *sizes = large.shape
    groups = geometry.groups
    if n == 0:
        return large.new_zeros(small.shape[1], c // groups, *geometry.kernel)
    grouped = large.reshape(n, groups, c // groups, *sizes).transpose(0, 2)
    channels = grouped.reshape(c // groups, groups * n, *sizes)
    return ConvolutionFunction.apply(channels, small.transpose(0, 1), None, geometry.exchanged()).transpose(0, 1)


def _check_weight(n: int, weight: Tensor) -> None:
    """The number of axes tells which of torch's convolutions the rule takes."""
    if weight.dim() != n + 2:
        raise RuntimeError(f"expected a weight of {n + 2} axes, but it has shape {list(weight.shape)}")


def _convolution(
    n: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers | str,
    dilation: Numbers,
    groups: int,
) -> Tensor:
    _check_weight(n, weight)
    if input.dim() == n + 1:  # without a batch
        batch = input.unsqueeze(0)
        return _convolution(n, batch, weight, bias, stride, padding, dilation, groups).squeeze(0)
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
    steps = [
        divmod(size + 2 * p - d * (k - 1) - 1, s)
        for size, k, s, p, d in zip(input.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    windows, rest = tuple(step + 1 for step, _ in steps), tuple(rest for _, rest in steps)
    geometry = Geometry(kernel, windows, stride, padding, dilation, rest, groups)
    return ConvolutionFunction.apply(input, weight, bias, geometry)


@drop_in
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution along one axis, as `torch.nn.functional.conv1d`.

    Shapes: input (N, C, L) or (C, L), weight (O, C / groups, k), bias (O); the result (N, O, ...) or (O, ...).
    """
    return _convolution(1, input, weight, bias, stride, padding, dilation, groups)


@drop_in
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution along two axes, as `torch.nn.functional.conv2d`.

    Shapes: input (N, C, H, W) or (C, H, W), weight (O, C / groups, k, k), bias (O); the result (N, O, ...) or
    (O, ...).
    """
    return _convolution(2, input, weight, bias, stride, padding, dilation, groups)


@drop_in
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution along three axes, as `torch.nn.functional.conv3d`.

    Shapes: input (N, C, D, H, W) or (C, D, H, W), weight (O, C / groups, k, k, k), bias (O); the result
    (N, O, ...) or (O, ...).
    """
    return _convolution(3, input, weight, bias, stride, padding, dilation, groups)


def _transposed_convolution(
    n: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers,
    output_padding: Numbers,
    groups: int,
    dilation: Numbers,
) -> Tensor:
    _check_weight(n, weight)
    if input.dim() == n + 1:
        batch = input.unsqueeze(0)
        return _transposed_convolution(
            n, batch, weight, bias, stride, padding, output_padding, groups, dilation
        ).squeeze(0)
    kernel, windows = tuple(weight.shape[2:]), tuple(input.shape[2:])
    stride, padding, dilation, rest = (each(x, n) for x in (stride, padding, dilation, output_padding))
    geometry = Geometry(kernel, windows, stride, padding, dilation, rest, groups, transposed=True)
    return ConvolutionFunction.apply(input, weight, bias, geometry)


@drop_in
def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """Transposed convolution along one axis, as `torch.nn.functional.conv_transpose1d`.

    Shapes: input (N, C, L) or (C, L), weight (C, O / groups, k), bias (O); the result (N, O, ...) or (O, ...).
    """
    return _transposed_convolution(1, input, weight, bias, stride, padding, output_padding, groups, dilation)


@drop_in
def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """Transposed convolution along two axes, as `torch.nn.functional.conv_transpose2d`.

    Shapes: input (N, C, H, W) or (C, H, W), weight (C, O / groups, k, k), bias (O); the result (N, O, ...) or
    (O, ...).
    """
    return _transposed_convolution(2, input, weight, bias, stride, padding, output_padding, groups, dilation)


@drop_in
def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """Transposed convolution along three axes, as `torch.nn.functional.conv_transpose3d`.

    Shapes: input (N, C, D, H, W) or (C, D, H, W), weight (C, O / groups, k, k, k), bias (O); the result
    (N, O, ...) or (O, ...).
    """
    return _transposed_convolution(3, input, weight, bias, stride, padding, output_padding, groups, dilation)


_FUNCTIONS = {1: conv1d, 2: conv2d, 3: conv3d}


_TRANSPOSED_FUNCTIONS = {1: conv_transpose1d, 2: conv_transpose2d, 3: conv_transpose3d}


def _samples(t: Maker, n: int) -> list[Call]:
    sides, small, k = ((6,), (5, 4), (3, 2, 2))[n - 1], ((4,), (3, 4), (2, 2, 3))[n - 1], (2, 1, 3)[-n:]
    ones = (1,) * (n - 1)
    return [
        Call(t(2, 2, *sides), t(3, 2, *k), t(3), stride=2, padding=1),
        Call(t(2, 3, *small), t(3, 1, *k), t(3), 1, (1,) * n, (*ones, 2), groups=3),
        Call(t(2, *small), t(1, 2, *(3,) * n), padding="same", dilation=2),
    ]


def _transposed_samples(t: Maker, n: int) -> list[Call]:
    sides, k = ((3,), (3, 2), (2, 2, 2))[n - 1], (2, 1, 3)[-n:]
    ones = (1,) * (n - 1)
    return [
        Call(t(2, 1, *sides), t(1, 3, *k), t(3), stride=2, padding=1, output_padding=1),
        Call(t(2, 3, *sides), t(3, 1, *k), t(3), 1, (1, 0, 1)[-n:], 0, 3, (*ones, 2)),
        Call(t(2, *sides), t(2, 1, *k)),
    ]


_BIG = {1: (8, 64, 1024), 2: (8, 64, 28, 28), 3: (2, 16, 16, 28, 28)}

for _n in (1, 2, 3):
    _width = _BIG[_n][1]
    register(
        _FUNCTIONS[_n],
        samples=lambda t, n=_n: _samples(t, n),
        big=lambda t, n=_n, c=_width: Call(t(*_BIG[n]), t(c, c, *(3,) * n), t(c), padding=1),
    )
    register(
        _TRANSPOSED_FUNCTIONS[_n],
        samples=lambda t, n=_n: _transposed_samples(t, n),
        big=lambda t, n=_n, c=_width: Call(t(*_BIG[n]), t(c, c, *(3,) * n), t(c), padding=1),
    )
