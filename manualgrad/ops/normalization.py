"""Normalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import drop_in, last, rows, times
from manualgrad.registry import Call, register
from manualgrad.rule import Rule, cuda_autocasts


class LayerNormFunction(Rule):
    r"""y = z w + b,   z = (x - μ) r,   μ = E x,   r = (E (x-μ)² + ε)^-½      (E: mean over the last k axes)

    d(x - μ) = dx - E dx
    dr       = -r³ E[(x-μ) dx] = -r² E[z dx]
    dz       = r (dx - E dx) + (x-μ) dr = r (dx - E dx - z E[z dx]) =: P dx,   and P is symmetric, so
    ∂L/∂x    = P (w g)            ∂L/∂w = Σ g z            ∂L/∂b = Σ g

    Ba, Kiros and Hinton, "Layer Normalization", 2016. μ and r move with x: a derivative of this gradient must
    differentiate them too. (torch 2.13 takes its kept r as a constant there, and gets it wrong.)
    """

    autocast = {"cuda": "float32"}
    statistics = ("mean", "rstd")

    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(input, input.shape[input.dim() - k :], weight, bias, eps)

    def mean(input: Tensor, k: int) -> Tensor:
        return input.mean(last(k), keepdim=True)

    def rstd(input: Tensor, k: int, eps: float) -> Tensor:
        return (input.var(last(k), correction=0, keepdim=True) + eps).rsqrt()

    def normalized(input: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        return times(input - mean, rstd)

    def grad_input(grad: Tensor, weight: Tensor | None, normalized: Tensor, rstd: Tensor, k: int) -> Tensor:
        g = grad if weight is None else grad * weight
        along = (g * normalized).mean(last(k), keepdim=True)
        centered = g - g.mean(last(k), keepdim=True)
        return times(centered.addcmul(normalized, along, value=-1), rstd)

    def grad_weight(grad: Tensor, normalized: Tensor, k: int) -> Tensor:
        return rows(grad * normalized, k).sum(0)

    def grad_bias(grad: Tensor, k: int) -> Tensor:
        return rows(grad, k).sum(0)


@drop_in
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / √(var + ε) · w + b over the trailing axes, as `torch.nn.functional.layer_norm`.

    Shapes: input (*, normalized_shape), weight and bias normalized_shape; the result as the input.
    """
    _check_shape(input, normalized_shape, "layer_norm")
    return LayerNormFunction.apply(input, weight, bias, len(normalized_shape), eps)


def _check_shape(input: Tensor, normalized_shape: Sequence[int], name: str) -> None:
    """The rule is told only how many axes there are, so their sizes are compared here."""
    k = len(normalized_shape)
    if k == 0 or tuple(input.shape[input.dim() - k :]) != tuple(normalized_shape) or input.dim() < k:
        raise RuntimeError(
            f"{name}: the input's trailing axes must be normalized_shape={list(normalized_shape)} (at least one "
            f"axis), but the input has shape {list(input.shape)}"
        )


class LayerNorm(torch.nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


register(
    layer_norm,
    LayerNorm,
    samples=lambda t: [
        Call(t(5, 4), (4,), t(4), t(4)),
        Call(t(2, 3, 4), (3, 4), t(3, 4)),
        Call(t(5, 4), (4,), eps=0.1),
        Call(t(4), (4,), t(4), t(4)),
    ],
    big=lambda t: Call(t(2048, 512), (512,), t(512), t(512)),
)


class RMSNormFunction(Rule):
    r"""y = z w,   z = x r,   r = (E x² + ε)^-½      (E: mean over the last k axes)

    dr    = -r³ E[x dx] = -r² E[z dx]
    dz    = r dx + x dr = r (dx - z E[z dx]) =: P dx,   and P is symmetric, so
    ∂L/∂x = P (w g)            ∂L/∂w = Σ g z

    (For complex numbers P is symmetric, not Hermitian, so its adjoint conjugates z and r.)
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    autocast = {"cuda": "float32"} if cuda_autocasts("rms_norm") else {}  # torch 2.11 leaves it alone
    complex = True

    def forward(input: Tensor, weight: Tensor | None, k: int, eps: float | None) -> Tensor:
        return F.rms_norm(input, input.shape[input.dim() - k :], weight, eps)

    def rstd(input: Tensor, k: int, eps: float | None) -> Tensor:
        if eps is None:
            eps = torch.finfo(input.dtype).eps
        return (input.square().mean(last(k), keepdim=True) + eps).rsqrt()

    def normalized(input: Tensor, rstd: Tensor) -> Tensor:
        return input * rstd

    def grad_input(grad: Tensor, weight: Tensor | None, normalized: Tensor, rstd: Tensor, k: int) -> Tensor:
        g = grad if weight is None else grad * weight.conj()
        z = normalized.conj()
        return rstd.conj() * (g - z * (g * z).mean(last(k), keepdim=True))

    def grad_weight(grad: Tensor, normalized: Tensor, k: int) -> Tensor:
        return rows(grad * normalized.conj(), k).sum(0)


@drop_in
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """x / √(mean x² + ε) · w over the trailing axes, as `torch.nn.functional.rms_norm`.

    Shapes: input (*, normalized_shape), weight normalized_shape; the result as the input.
    """
    _check_shape(input, normalized_shape, "rms_norm")
    return RMSNormFunction.apply(input, weight, len(normalized_shape), eps)


class RMSNorm(torch.nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


register(
    rms_norm,
    RMSNorm,
    samples=lambda t: [
        Call(t(5, 4), (4,), t(4)),
        Call(t(2, 3, 4), (3, 4), t(3, 4), eps=0.1),
        Call(t(5, 4), (4,)),
        Call(t(4), (4,), t(4)),
    ],
    big=lambda t: Call(t(2048, 512), (512,), t(512)),
)
