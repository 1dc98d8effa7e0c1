"""Norms, distances and cosine similarity of vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.arithmetic import DifferenceWithoutAutocastFunction
from manualgrad.ops.registration import with_torch_errors
from manualgrad.ops.shapes import broadcast
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule

Axes = int | tuple[int, ...]


class VectorNormFunction(Rule):
    r"""n = ‖x‖ = (Σ |x|ᵖ)^(1/p)      along one axis or several

    n^(p-1) dn = Σ |x|^(p-1) ⟨sgn x, dx⟩      ∂L/∂x = g n′,   n′ = sgn(u) |u|^(p-1),  u = x/n
    """

    autocast = {"cuda": "float32"}
    supports_complex = True

    def forward(input: Tensor, p: float, dim: Axes, keepdim: bool) -> Tensor:
        return torch.linalg.vector_norm(input, p, dim, keepdim)

    def grad_input(grad: Tensor, input: Tensor, output: Tensor, p: float, dim: Axes, keepdim: bool) -> Tensor:
        g, n = (grad, output) if keepdim else (_unreduce(grad, dim), _unreduce(output, dim))
        return g * norm_gradient(input / torch.where(n != 0, n, 1), p, dim)


def _unreduce(tensor: Tensor, dim: Axes) -> Tensor:
    """Restore the reduced axes, with size 1."""
    axes = (dim,) if isinstance(dim, int) else dim
    for axis in sorted(axis % (tensor.dim() + len(axes)) for axis in axes):
        tensor = tensor.unsqueeze(axis)
    return tensor


def norm_gradient(u: Tensor, p: float, dim: Axes) -> Tensor:
    r"""n′ = sgn(u) |u|^(p-1) of u = x/n      (p = ∞: divided among the largest; p = 0 or x = 0: 0, as torch)"""
    if p == 2:
        return u
    if p == 0:
        return torch.zeros_like(u)
    if p == 1:
        return u.sgn()
    size = u.abs()
    if math.isinf(p):
        extreme = size.amax(dim, keepdim=True) if p > 0 else size.amin(dim, keepdim=True)
        is_extreme = size == extreme
        return u.sgn() * (is_extreme / is_extreme.sum(dim, keepdim=True))
    if p < 1:
        size = torch.where(size != 0, size, 1)  # sgn 0 · 0^(p-1) = 0 · ∞ would be nan
    return u.sgn() * size ** (p - 1)


def norm(input: Tensor, p: float, dim: Axes = -1, keepdim: bool = False) -> Tensor:
    """(Σ |x|ᵖ)^(1/p) along `dim`."""
    return VectorNormFunction.apply(input, p, dim, keepdim)


@with_torch_errors
def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """The p-norm of x1 - x2 + ε along the last axis, as `torch.nn.functional.pairwise_distance`.

    Shapes: both (*, d), after broadcasting; the result (*), or (*, 1) with `keepdim`.
    """
    return norm(DifferenceWithoutAutocastFunction.apply(*broadcast(x1, x2)) + eps, p, -1, keepdim)


register(
    pairwise_distance,
    sample_inputs=lambda t: [
        SampleInput(t(4, 3), t(4, 3)),
        SampleInput(t(2, 4, 3), t(3), p=3.0, keepdim=True),
        SampleInput(t(3), t(3), p=math.inf),
    ],
    benchmark_input=lambda t: SampleInput(t(4096, 256), t(4096, 256)),
    supports_special_values=False,  # the gradient of a maximum over several infinities is not defined
)


class PdistFunction(Rule):
    r"""yᵢⱼ = ‖xᵢ - xⱼ‖ for i < j      ∂L/∂xᵢ = Σⱼ gᵢⱼ n′(xᵢ - xⱼ),   g and y as symmetric matrices

    p = 2:  n′ = (xᵢ - xⱼ) / yᵢⱼ,  so with W = g / y  ∂L/∂x = (diag(W 1) - W) x,  where diag(W 1) - W is a graph
    Laplacian. The result does not depend on the mean of x, which is subtracted for accuracy.
    """

    autocast = {"cuda": "float32"}

    def forward(input: Tensor, p: float) -> Tensor:
        return torch.pdist(input, p)

    def grad_input(grad: Tensor, input: Tensor, output: Tensor, p: float) -> Tensor:
        y = torch.where(output != 0, output, 1)
        return _laplacian_product(grad / y, input) if p == 2 else _pair_sums(grad, input, y, p)


def _laplacian_product(w: Tensor, input: Tensor) -> Tensor:
    """(diag(W 1) - W) x"""
    W, x = _symmetric(w, len(input)), input - input.mean(0)
    return W.sum(1, keepdim=True) * x - W @ x


def _pair_sums(grad: Tensor, input: Tensor, y: Tensor, p: float) -> Tensor:
    """Σⱼ gᵢⱼ n′(xᵢ - xⱼ), in chunks of i: the differences of all pairs would take too much memory."""
    n = len(input)
    chunk_size = max(1, 2**18 // max(input.numel(), 1))
    chunks = zip(
        input.split(chunk_size),
        _symmetric(grad, n).split(chunk_size),
        (_symmetric(y, n) + torch.eye(n).to(input)).split(chunk_size),  # y = 1 for i = j, where xᵢ - xⱼ = 0
        strict=True,
    )
    return torch.cat([_pair_sums_of_chunk(x, g, y, input, p) for x, g, y in chunks])


def _pair_sums_of_chunk(x: Tensor, g: Tensor, y: Tensor, input: Tensor, p: float) -> Tensor:
    u = (x.unsqueeze(1) - input) / y.unsqueeze(2)
    return (g.unsqueeze(2) * norm_gradient(u, p, -1)).sum(1)


def _symmetric(pairs: Tensor, n: int) -> Tensor:
    """The symmetric matrix (n, n) of the numbers for i < j, with diagonal 0."""
    i, j = torch.triu_indices(n, n, 1, device=pairs.device)
    upper = pairs.new_zeros(n, n).index_put((i, j), pairs)
    return upper + upper.mT


@with_torch_errors
def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """The p-norms of the differences of all pairs of rows, as `torch.nn.functional.pdist`.

    Shapes: input (n, d); the result (n (n - 1) / 2), of pairs in the order (0, 1), (0, 2), ..., (1, 2), ...
    """
    return PdistFunction.apply(input, p)


register(
    pdist,
    sample_inputs=lambda t: [SampleInput(t(4, 3)), SampleInput(t(4, 2), p=3.0)],
    benchmark_input=lambda t: SampleInput(t(256, 64)),
    supports_special_values=False,  # the sums over pairs contain 0 · ∞
    skips={"zero_size_matches_torch": "torch's gradient of an input without rows crashes the process"},
)


class NormalizeFunction(Rule):
    r"""u = x / n,   n = max(‖x‖, ε)

    du = (dx - u dn) / n,   dn = Σ ⟨n′, dx⟩ where ‖x‖ > ε, else 0
    ∂L/∂x = (g - s n′) / n,   s = Σ ⟨u, g⟩ where ‖x‖ > ε, else 0
    """

    autocast = {"cuda": "float32"}
    supports_complex = True
    statistics = ("n",)

    def n(input: Tensor, p: float, dim: Axes, eps: float) -> Tensor:
        return _bounded_norm(input, p, dim, eps)

    def forward(input: Tensor, p: float, dim: Axes, eps: float) -> tuple[Tensor, Tensor]:
        n = _bounded_norm(input, p, dim, eps)
        return input / n, n

    def grad_input(grad: Tensor, input: Tensor, n: Tensor, p: float, dim: Axes, eps: float) -> Tensor:
        return normalize_gradient(grad, input / n, n, p, dim, eps)


def _bounded_norm(input: Tensor, p: float, dim: Axes, eps: float) -> Tensor:
    """max(‖x‖, ε)"""
    return norm(input, p, dim, keepdim=True).clamp(min=eps)


def normalize_gradient(grad: Tensor, u: Tensor, n: Tensor, p: float, dim: Axes, eps: float) -> Tensor:
    """(g - s n′) / n"""
    s = torch.where(n > eps, (u.conj() * grad).real.sum(dim, keepdim=True), 0)
    return (grad - s * norm_gradient(u, p, dim)) / n


@with_torch_errors
def normalize(
    input: Tensor, p: float = 2.0, dim: Axes = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """x / max(‖x‖, ε) along `dim`, as `torch.nn.functional.normalize`. Any shape."""
    if out is not None:
        return F.normalize(input, p, dim, eps, out)  # pyright: ignore[reportArgumentType]
    return NormalizeFunction.apply(input, p, dim, eps)


register(
    normalize,
    sample_inputs=lambda t: [
        SampleInput(t(4, 3)),
        SampleInput(t(2, 3, 2), p=3.0, dim=-1),
        SampleInput(t(2, 3, 2), p=1.0, dim=(0, 2)),
    ],
    benchmark_input=lambda t: SampleInput(t(4096, 256)),
)


class CosineSimilarityFunction(Rule):
    r"""y = ⟨u₁, u₂⟩,   u = x / n,   n = max(‖x‖, ε)

    dy = ⟨du₁, u₂⟩ + ⟨u₁, du₂⟩:   ∂L/∂u₁ = g u₂,  and through normalize ∂L/∂x₁ = g (u₂ - y u₁) / n₁
    """

    autocast = {"cuda": "float32"}

    def forward(input1: Tensor, input2: Tensor, dim: int, eps: float) -> Tensor:
        return torch.cosine_similarity(input1, input2, dim, eps)

    def n1(input1: Tensor, dim: int, eps: float) -> Tensor:
        return _bounded_norm(input1, 2, dim, eps)

    def n2(input2: Tensor, dim: int, eps: float) -> Tensor:
        return _bounded_norm(input2, 2, dim, eps)

    def u1(input1: Tensor, n1: Tensor) -> Tensor:
        return input1 / n1

    def u2(input2: Tensor, n2: Tensor) -> Tensor:
        return input2 / n2

    def grad_input1(grad: Tensor, u1: Tensor, u2: Tensor, n1: Tensor, dim: int, eps: float) -> Tensor:
        return normalize_gradient(grad.unsqueeze(dim) * u2, u1, n1, 2, dim, eps)

    def grad_input2(grad: Tensor, u1: Tensor, u2: Tensor, n2: Tensor, dim: int, eps: float) -> Tensor:
        return normalize_gradient(grad.unsqueeze(dim) * u1, u2, n2, 2, dim, eps)


@with_torch_errors
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The cosine of the angle between x1 and x2 along `dim`, as `torch.nn.functional.cosine_similarity`.

    Shapes: both the same, after broadcasting; the result without the axis `dim`.
    """
    return CosineSimilarityFunction.apply(*broadcast(*torch.atleast_1d(x1, x2)), dim, eps)


register(
    cosine_similarity,
    sample_inputs=lambda t: [SampleInput(t(4, 3), t(4, 3)), SampleInput(t(2, 3, 2), t(3, 1), dim=-2)],
    benchmark_input=lambda t: SampleInput(t(4096, 256), t(4096, 256)),
)
