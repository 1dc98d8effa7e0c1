"""Linear and bilinear maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import implements, rows, with_torch_errors
from manualgrad.registry import SampleInput, register
from manualgrad.rule import LOWER_PRECISION, Rule


class LinearFunction(Rule):
    r"""y = x Wᵀ + b        x: (*, in)   W: (out, in)   b: (out)   y: (*, out)

    differential      dy = dx Wᵀ + x dWᵀ + db
    pair with g       ⟨g, dx Wᵀ⟩ = ⟨g W, dx⟩            ∂L/∂x = g W
                      ⟨g, x dWᵀ⟩ = ⟨gᵀ x, dW⟩           ∂L/∂W = gᵀ x      (rows of all leading axes)
                      ⟨g, db⟩    = ⟨Σ g, db⟩            ∂L/∂b = Σ g
    (For complex numbers ⟨a, b⟩ = Σ ā b, which conjugates W and x.)
    """

    autocast = LOWER_PRECISION
    upcast_gradients = False  # products accumulate in float32 as they are
    supports_complex = True

    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)

    def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight.conj()

    def grad_weight(grad: Tensor, input: Tensor) -> Tensor:
        return rows(grad).mT @ rows(input).conj()

    def grad_bias(grad: Tensor) -> Tensor:
        return rows(grad).sum(0)


@with_torch_errors
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""y = x Wᵀ + b, as `torch.nn.functional.linear`.

    Shapes: input (*, in), weight (out, in) or (in), bias (out); the result (*, out) or (*).
    """
    if weight.dim() == 1 or (bias is not None and (bias.dim() != 1 or bias.size(0) != weight.size(0))):
        return _linear_of_unusual_shape(input, weight, bias)
    return LinearFunction.apply(input, weight, bias)


def _linear_of_unusual_shape(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What torch takes besides: a weight of a single row, a bias that broadcasts."""
    with torch.no_grad():
        expected = F.linear(input, weight, bias)
    output = LinearFunction.apply(input, torch.atleast_2d(weight), None)
    if bias is not None:
        output = output + bias.to(expected.dtype)
    return output.reshape(expected.shape)


register(
    linear,
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t(4, 3), t(4)),
        SampleInput(t(2, 5, 3), t(4, 3), t(4)),
        SampleInput(t(5, 3), t(3)),
        SampleInput(t(5, 3), t(4, 3), t(1)),
    ],
    benchmark_input=lambda t: SampleInput(t(512, 1024), t(1024, 1024), t(1024)),
)


class BilinearFunction(Rule):
    r"""yₖ = u Wₖ vᵀ + bₖ     u: (*, m)   v: (*, n)   W: (o, m, n)   b: (o)   y: (*, o)

    differential      dyₖ = du Wₖ vᵀ + u Wₖ dvᵀ + u dWₖ vᵀ + dbₖ
    pair with g       ∂L/∂u = Σₖ gₖ (v Wₖᵀ)      ∂L/∂v = Σₖ gₖ (u Wₖ)      ∂L/∂Wₖ = Σ gₖ uᵀ v      ∂L/∂b = Σ g
    (sums without an index run over the leading axes)
    """

    autocast = {"cuda": "promote"}

    def forward(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.bilinear(input1, input2, weight, bias)

    def grad_input1(grad: Tensor, input2: Tensor, weight: Tensor) -> Tensor:
        return _mixed(grad, input2 @ rows(weight).mT, weight.shape[1])

    def grad_input2(grad: Tensor, input1: Tensor, weight: Tensor) -> Tensor:
        return _mixed(grad, input1 @ rows(weight.mT).mT, weight.shape[2])

    def grad_weight(grad: Tensor, input1: Tensor, input2: Tensor) -> Tensor:
        flat = rows(grad).mT @ rows(_outer(input1, input2))
        return flat.reshape(grad.shape[-1], input1.shape[-1], input2.shape[-1])

    def grad_bias(grad: Tensor) -> Tensor:
        return rows(grad).sum(0)


def _mixed(grad: Tensor, images: Tensor, size: int) -> Tensor:
    """Σₖ gₖ zₖ of the images z under each Wₖ, which stand side by side: (*, o), (*, o size) -> (*, size)."""
    return (grad.unsqueeze(-2) @ images.reshape(*grad.shape, size)).squeeze(-2)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """All products of a row of `a` with the same row of `b`: (*, m), (*, n) -> (*, m n)."""
    products = a.unsqueeze(-1) * b.unsqueeze(-2)
    return products.reshape(*products.shape[:-2], a.shape[-1] * b.shape[-1])


@with_torch_errors
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""yₖ = u Wₖ vᵀ + bₖ, as `torch.nn.functional.bilinear`.

    Shapes: input1 (*, m), input2 (*, n), weight (out, m, n), bias (out); the result (*, out).
    """
    return BilinearFunction.apply(input1, input2, weight, bias)


register(
    bilinear,
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t(5, 2), t(4, 3, 2), t(4)),
        SampleInput(t(2, 3, 3), t(2, 3, 2), t(1, 3, 2)),
        SampleInput(t(3), t(2), t(4, 3, 2), t(4)),
    ],
    benchmark_input=lambda t: SampleInput(t(256, 64), t(256, 64), t(64, 64, 64), t(64)),
)


class ProductFunction(Rule):
    r"""Y = A B, of each matrix of a batch      ∂L/∂A = g Bᴴ      ∂L/∂B = Aᴴ g"""

    autocast = LOWER_PRECISION
    upcast_gradients = False  # products accumulate in float32 as they are
    supports_complex = True

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)

    def grad_a(grad: Tensor, b: Tensor) -> Tensor:
        return grad @ b.mH

    def grad_b(grad: Tensor, a: Tensor) -> Tensor:
        return a.mH @ grad


class ProductAndSumFunction(Rule):
    r"""Y = α A B + β C, of each matrix of a batch      ∂L/∂A = ᾱ g Bᴴ      ∂L/∂B = ᾱ Aᴴ g      ∂L/∂C = β̄ g"""

    autocast = LOWER_PRECISION
    upcast_gradients = False  # products accumulate in float32 as they are
    supports_complex = True

    def forward(a: Tensor, b: Tensor, c: Tensor, alpha: complex, beta: complex) -> Tensor:
        return torch.baddbmm(c, a, b, alpha=alpha, beta=beta)

    def grad_a(grad: Tensor, b: Tensor, alpha: complex) -> Tensor:
        return alpha.conjugate() * (grad @ b.mH)

    def grad_b(grad: Tensor, a: Tensor, alpha: complex) -> Tensor:
        return alpha.conjugate() * (a.mH @ grad)

    def grad_c(grad: Tensor, beta: complex) -> Tensor:
        return beta.conjugate() * grad


@with_torch_errors
def bmm(input: Tensor, mat2: Tensor) -> Tensor:
    """A B of each matrix of a batch, (N, l, m) and (N, m, n), as `torch.bmm`."""
    return ProductFunction.apply(input, mat2)


@with_torch_errors
def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Tensor:
    """β C + α A B of each matrix of a batch, as `torch.baddbmm`. C broadcasts; α and β may be complex."""
    whole = input.expand(*batch1.shape[:2], batch2.shape[2])
    return ProductAndSumFunction.apply(batch1, batch2, whole, alpha, beta)


register(
    bmm,
    sample_inputs=lambda t: [SampleInput(t(2, 3, 4), t(2, 4, 2))],
    benchmark_input=lambda t: SampleInput(t(16, 128, 128), t(16, 128, 128)),
)
register(
    baddbmm,
    sample_inputs=lambda t: [
        SampleInput(t(2, 3, 2), t(2, 3, 4), t(2, 4, 2)),
        SampleInput(t(3, 1), t(2, 3, 4), t(2, 4, 2), beta=0.5, alpha=2.0),
    ],
    benchmark_input=lambda t: SampleInput(t(16, 128, 128), t(16, 128, 128), t(16, 128, 128)),
)


class GroupedProductFunction(Rule):
    r"""Y_g = A_g B_g, of each group g      a tensor of three axes has a matrix for each group; of one of two axes
    ``ends`` says which rows, columns or, of both, which part of the common axis belong to each

    differential      dY_g = dA_g B_g + A_g dB_g
    pair with G       ∂L/∂A_g = G_g B_gᵀ            ∂L/∂B_g = A_gᵀ G_g
    Both are grouped products of the same groups. What lies behind the last group has the gradient 0.

    Gale, Narayanan, Young and Zaharia, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2023.
    """

    upcast_gradients = False  # products accumulate in float32 as they are

    def forward(
        a: Tensor, b: Tensor, ends: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None
    ) -> Tensor:
        return F.grouped_mm(a, b, offs=ends, bias=bias, out_dtype=out_dtype)

    def grad_a(grad: Tensor, a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
        product = _grouped(grad, b.mT, ends)
        return _zero_behind(product, ends, (1 if b.dim() == 2 else 0) if a.dim() == 2 else None)

    def grad_b(grad: Tensor, a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
        product = _grouped(a.mT, grad, ends)
        return _zero_behind(product, ends, (0 if a.dim() == 2 else 1) if b.dim() == 2 else None)


def _grouped(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """Laid out as the kernel takes it: rows of the first, columns of the second."""
    return GroupedProductFunction.apply(a.contiguous(), b.mT.contiguous().mT, ends, None, None)


def _zero_behind(tensor: Tensor, ends: Tensor | None, axis: int | None) -> Tensor:
    """Zero behind the last group along the axis, where the kernel leaves the memory as it is."""
    if ends is None or axis is None:
        return tensor
    inside = torch.arange(tensor.shape[axis], device=tensor.device) < ends[-1]
    return torch.where(inside.unsqueeze(1) if axis == 0 else inside, tensor, 0)


@implements(F.grouped_mm)
def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A product of matrices for each group, as `torch.nn.functional.grouped_mm`, in float32 and lower.

    Shapes: with R rows of all groups, (R, k) and (groups, k, n), the result (R, n); (groups, m, k) and (k, C), the
    result (m, C); (m, R) and (R, n), or (groups, m, k) and (groups, k, n), the result (groups, m, n).
    """
    return GroupedProductFunction.apply(mat_a, mat_b, offs, bias, out_dtype)
