"""Distances and angles between vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manualgrad.ops.elementary import choose, drop_in
from manualgrad.registry import Call, register
from manualgrad.rule import Rule


def _norm_slope(difference: Tensor, norm: Tensor, p: float) -> Tensor:
    r"""The derivative of n = (Σ |d|ᵖ)^(1/p) by each d:   sgn(d) |d/n|^(p-1)

    p = ∞: shared by the largest. p = 0: zero, and zero where n = 0, as torch.
    """
    if p == 0:
        return torch.zeros_like(difference)
    if p == 1:
        return difference.sgn()
    if math.isinf(p):
        size = difference.abs()
        largest = size == size.amax(-1, keepdim=True)  # the norm itself may be rounded
        return difference.sgn() * (largest / largest.sum(-1, keepdim=True))
    ratio = difference / choose(norm != 0, norm, torch.ones_like(norm))
    return ratio if p == 2 else ratio.sgn() * ratio.abs() ** (p - 1)


class PairwiseDistanceFunction(Rule):
    r"""y = n(d),  d = x₁ - x₂ + ε,  n the p-norm along the last axis    ∂L/∂x₁ = g n′(d)    ∂L/∂x₂ = -g n′(d)"""

    autocast = {"cuda": "float32"}
    complex = True

    def forward(input1: Tensor, input2: Tensor, p: float, eps: float, keepdim: bool) -> Tensor:
        return torch.pairwise_distance(input1, input2, p, eps, keepdim)

    def difference(input1: Tensor, input2: Tensor, eps: float) -> Tensor:
        return input1 - input2 + eps

    def grad_input1(grad: Tensor, output: Tensor, difference: Tensor, p: float, keepdim: bool) -> Tensor:
        if not keepdim:
            grad, output = grad.unsqueeze(-1), output.unsqueeze(-1)
        return grad * _norm_slope(difference, output, p)

    def grad_input2(grad_input1: Tensor) -> Tensor:
        return -grad_input1


@drop_in
def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """The p-norm of x1 - x2 + ε along the last axis, as `torch.nn.functional.pairwise_distance`.

    Shapes: (*, d) both, or what broadcasts to it; the result (*), or (*, 1) with `keepdim`.
    """
    a, b = torch.broadcast_tensors(x1, x2)
    return PairwiseDistanceFunction.apply(a, b, p, eps, keepdim)


class CosineSimilarityFunction(Rule):
    r"""y = ⟨u₁, u₂⟩,  u = x / n,  n = max(‖x‖, ε)

    du₁ = (dx₁ - u₁ ⟨u₁, dx₁⟩) / n₁, a projection      ∂L/∂x₁ = g (u₂ - y u₁) / n₁      (where ‖x₁‖ < ε: g u₂ / n₁)
    """

    autocast = {"cuda": "float32"}

    def forward(input1: Tensor, input2: Tensor, dim: int, eps: float) -> Tensor:
        return torch.cosine_similarity(input1, input2, dim, eps)

    def grad_input1(grad: Tensor, input1: Tensor, input2: Tensor, dim: int, eps: float) -> Tensor:
        return _grad_cosine(grad, input1, input2, dim, eps)

    def grad_input2(grad: Tensor, input1: Tensor, input2: Tensor, dim: int, eps: float) -> Tensor:
        return _grad_cosine(grad, input2, input1, dim, eps)


def _grad_cosine(grad: Tensor, of: Tensor, other: Tensor, dim: int, eps: float) -> Tensor:
    norm = _length(of, dim)
    other_unit = other / _length(other, dim).clamp(min=eps)
    unit = of / norm.clamp(min=eps)
    along = choose(norm >= eps, (unit * other_unit).sum(dim, keepdim=True))
    return grad.unsqueeze(dim) * (other_unit - along * unit) / norm.clamp(min=eps)


def _length(tensor: Tensor, dim: int) -> Tensor:
    return tensor.square().sum(dim, keepdim=True).sqrt()


@drop_in
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The cosine of the angle between x1 and x2 along `dim`, as `torch.nn.functional.cosine_similarity`.

    Shapes: both the same, or what broadcasts to it; the result without the axis.
    """
    a, b = torch.broadcast_tensors(x1, x2)
    return CosineSimilarityFunction.apply(a, b, dim, eps)


register(
    pairwise_distance,
    samples=lambda t: [
        Call(t(4, 3), t(4, 3)),
        Call(t(2, 4, 3), t(3), p=3.0, keepdim=True),
        Call(t(4, 3), t(4, 3), p=1.0),
        Call(t(3), t(3), p=math.inf),
    ],
    big=lambda t: Call(t(4096, 256), t(4096, 256)),
    special=False,
    lacks={
        "kept_for_backward": "keeps both inputs where torch keeps their difference: one more tensor, but they are "
        "the caller's"
    },
)

register(
    cosine_similarity,
    samples=lambda t: [Call(t(4, 3), t(4, 3)), Call(t(2, 3, 2), t(3, 1), dim=-2), Call(t(3), t(3), dim=0)],
    big=lambda t: Call(t(4096, 256), t(4096, 256)),
    special=False,
)
