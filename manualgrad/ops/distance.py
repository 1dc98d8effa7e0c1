"""Norms, and the distances and angles between vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import PlainDifferenceFunction, broadcast, choose, drop_in
from manualgrad.registry import Call, register
from manualgrad.rule import Rule

Axes = int | tuple[int, ...]


class VectorNormFunction(Rule):
    r"""n = ‖x‖ = (Σ |x|ᵖ)^(1/p)      along one axis or several

    n^(p-1) dn = Σ |x|^(p-1) ⟨sgn x, dx⟩      ∂L/∂x = g n′,   n′ = sgn(x) |x/n|^(p-1)
    """

    autocast = {"cuda": "float32"}
    complex = True

    def forward(input: Tensor, p: float, dim: Axes, keepdim: bool) -> Tensor:
        return torch.linalg.vector_norm(input, p, dim, keepdim)

    def grad_input(grad: Tensor, input: Tensor, output: Tensor, p: float, dim: Axes, keepdim: bool) -> Tensor:
        if not keepdim:
            grad, output = _with_axes(grad, dim), _with_axes(output, dim)
        return grad * _slope(input / choose(output != 0, output, torch.ones_like(output)), p, dim)


def _with_axes(tensor: Tensor, dim: Axes) -> Tensor:
    """The reduced axes again, of length 1."""
    axes = (dim,) if isinstance(dim, int) else dim
    for axis in sorted(axis % (tensor.dim() + len(axes)) for axis in axes):
        tensor = tensor.unsqueeze(axis)
    return tensor


def _slope(unit: Tensor, p: float, dim: Axes) -> Tensor:
    r"""n′ = sgn(u) |u|^(p-1) of u = x/n      (p = ∞: shared by the largest; p = 0 or x = 0: 0, as torch)"""
    if p == 2:
        return unit
    if p == 0:
        return torch.zeros_like(unit)
    if p == 1:
        return unit.sgn()
    size = unit.abs()
    if math.isinf(p):
        extreme = size.amax(dim, keepdim=True) if p > 0 else size.amin(dim, keepdim=True)
        among = size == extreme
        return unit.sgn() * (among / among.sum(dim, keepdim=True))
    if p < 1:
        size = choose(size != 0, size, torch.ones_like(size))
    return unit.sgn() * size ** (p - 1)


def norm(input: Tensor, p: float, dim: Axes = -1, keepdim: bool = False) -> Tensor:
    """(Σ |x|ᵖ)^(1/p) along `dim`."""
    return VectorNormFunction.apply(input, p, dim, keepdim)


@drop_in
def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """The p-norm of x1 - x2 + ε along the last axis, as `torch.nn.functional.pairwise_distance`.

    Shapes: (*, d) both, or what broadcasts to it; the result (*), or (*, 1) with `keepdim`.
    """
    return norm(PlainDifferenceFunction.apply(*broadcast(x1, x2)) + eps, p, -1, keepdim)


register(
    pairwise_distance,
    samples=lambda t: [
        Call(t(4, 3), t(4, 3)),
        Call(t(2, 4, 3), t(3), p=3.0, keepdim=True),
        Call(t(3), t(3), p=math.inf),
    ],
    big=lambda t: Call(t(4096, 256), t(4096, 256)),
    special=False,  # between infinities which is the largest is for each to say
)


class PdistFunction(Rule):
    r"""yᵢⱼ = ‖xᵢ - xⱼ‖ for i < j      ∂L/∂xᵢ = Σⱼ gᵢⱼ n′(xᵢ - xⱼ),   g and y as symmetric matrices

    p = 2:  n′ = (xᵢ - xⱼ) / yᵢⱼ,  so with W = g / y  ∂L/∂x = (diag(W 1) - W) x,  the Laplacian of the graph of
    weights W. It takes no notice of the mean of x, which is left out of the sums.
    """

    autocast = {"cuda": "float32"}

    def forward(input: Tensor, p: float) -> Tensor:
        return torch.pdist(input, p)

    def grad_input(grad: Tensor, input: Tensor, output: Tensor, p: float) -> Tensor:
        n = len(input)
        length = choose(output != 0, output, torch.ones_like(output))
        if p == 2:
            weights, x = _symmetric(grad / length, n), input - input.mean(0)
            return weights.sum(1, keepdim=True) * x - weights @ x
        some = max(1, 2**18 // max(input.numel(), 1))  # rows at once: all differences are never there together
        parts = (
            z.split(some) for z in (input, _symmetric(grad, n), _symmetric(length, n) + torch.eye(n).to(input))
        )
        found = []
        for x, g, y in zip(*parts, strict=True):
            unit = (x.unsqueeze(1) - input) / y.unsqueeze(2)
            found.append((g.unsqueeze(2) * _slope(unit, p, -1)).sum(1))
        return torch.cat(found)


def _symmetric(pairs: Tensor, n: int) -> Tensor:
    """A number for each i < j as a matrix (n, n), 0 on the diagonal."""
    i, j = torch.triu_indices(n, n, 1, device=pairs.device)
    upper = pairs.new_zeros(n, n).index_put((i, j), pairs)
    return upper + upper.mT


@drop_in
def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """The p-norms of the differences of each two rows, as `torch.nn.functional.pdist`.

    Shapes: input (n, d); the result (n (n - 1) / 2), pairs in the order (0, 1), (0, 2), ..., (1, 2), ...
    """
    return PdistFunction.apply(input, p)


register(
    pdist,
    samples=lambda t: [Call(t(4, 3)), Call(t(4, 2), p=3.0)],
    big=lambda t: Call(t(256, 64)),
    special=False,  # 0 · ∞ in the sums over pairs
    lacks={"torchs_zero_size": "torch's gradient of no rows at all kills the process"},
)


class NormalizeFunction(Rule):
    r"""u = x / n,   n = max(‖x‖, ε)

    du = (dx - u dn) / n,   dn = Σ ⟨n′, dx⟩ where ‖x‖ > ε, else 0      ∂L/∂x = (g - n′ Σ ⟨u, g⟩) / n
    """

    autocast = {"cuda": "float32"}
    complex = True
    statistics = ("n",)

    def n(input: Tensor, p: float, dim: Axes, eps: float) -> Tensor:
        return _length(input, p, dim, eps)

    def forward(input: Tensor, p: float, dim: Axes, eps: float) -> tuple[Tensor, Tensor]:
        n = _length(input, p, dim, eps)
        return input / n, n

    def grad_input(grad: Tensor, input: Tensor, n: Tensor, p: float, dim: Axes, eps: float) -> Tensor:
        return _through_normalize(grad, input / n, n, p, dim, eps)


def _length(input: Tensor, p: float, dim: Axes, eps: float) -> Tensor:
    return norm(input, p, dim, keepdim=True).clamp(min=eps)


def _through_normalize(grad: Tensor, unit: Tensor, n: Tensor, p: float, dim: Axes, eps: float) -> Tensor:
    along = choose(n > eps, (unit.conj() * grad).real.sum(dim, keepdim=True))
    return (grad - along * _slope(unit, p, dim)) / n


@drop_in
def normalize(
    input: Tensor, p: float = 2.0, dim: Axes = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """x / max(‖x‖, ε) along `dim`, as `torch.nn.functional.normalize`. Any shape."""
    if out is not None:
        return F.normalize(input, p, dim, eps, out)  # pyright: ignore[reportArgumentType]
    return NormalizeFunction.apply(input, p, dim, eps)


register(
    normalize,
    samples=lambda t: [Call(t(4, 3)), Call(t(2, 3, 2), p=3.0, dim=-1), Call(t(2, 3, 2), p=1.0, dim=(0, 2))],
    big=lambda t: Call(t(4096, 256)),
)


class CosineSimilarityFunction(Rule):
    r"""y = ⟨u₁, u₂⟩,   u = x / n,   n = max(‖x‖, ε)

    dy = ⟨du₁, u₂⟩ + ⟨u₁, du₂⟩:   ∂L/∂x₁ is what normalize makes of g u₂, that is g (u₂ - y u₁) / n₁
    """

    autocast = {"cuda": "float32"}

    def forward(input1: Tensor, input2: Tensor, dim: int, eps: float) -> Tensor:
        return torch.cosine_similarity(input1, input2, dim, eps)

    def n1(input1: Tensor, dim: int, eps: float) -> Tensor:
        return _length(input1, 2, dim, eps)

    def n2(input2: Tensor, dim: int, eps: float) -> Tensor:
        return _length(input2, 2, dim, eps)

    def unit1(input1: Tensor, n1: Tensor) -> Tensor:
        return input1 / n1

    def unit2(input2: Tensor, n2: Tensor) -> Tensor:
        return input2 / n2

    def grad_input1(grad: Tensor, unit1: Tensor, unit2: Tensor, n1: Tensor, dim: int, eps: float) -> Tensor:
        return _through_normalize(grad.unsqueeze(dim) * unit2, unit1, n1, 2, dim, eps)

    def grad_input2(grad: Tensor, unit1: Tensor, unit2: Tensor, n2: Tensor, dim: int, eps: float) -> Tensor:
        return _through_normalize(grad.unsqueeze(dim) * unit1, unit2, n2, 2, dim, eps)


@drop_in
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The cosine of the angle between x1 and x2 along `dim`, as `torch.nn.functional.cosine_similarity`.

    Shapes: both the same, or what broadcasts to it; the result without the axis.
    """
    return CosineSimilarityFunction.apply(*broadcast(*torch.atleast_1d(x1, x2)), dim, eps)


register(
    cosine_similarity,
    samples=lambda t: [Call(t(4, 3), t(4, 3)), Call(t(2, 3, 2), t(3, 1), dim=-2)],
    big=lambda t: Call(t(4096, 256), t(4096, 256)),
)
