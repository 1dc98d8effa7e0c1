"""Linear and bilinear maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.registration import implements, with_torch_errors
from manualgrad.ops.shapes import rows
from manualgrad.registry import SampleInput, register
from manualgrad.rule import LOWER_PRECISION, Rule


class LinearFunction(Rule):
    r"""y = x Wᵀ + b        x: (*, in)   W: (out, in)   b: (out)   y: (*, out)

    differential      dy = dx Wᵀ + x dWᵀ + db
    pair with g       ⟨g, dx Wᵀ⟩ = ⟨g W, dx⟩            ∂L/∂x = g W
                      ⟨g, x dWᵀ⟩ = ⟨gᵀ x, dW⟩           ∂L/∂W = gᵀ x      (Σ, gᵀ x: over leading axes)
                      ⟨g, db⟩    = ⟨Σ g, db⟩            ∂L/∂b = Σ g
    Complex numbers: ⟨a, b⟩ = Σ ā b, so W and x are conjugated.
    """

    autocast = LOWER_PRECISION
    upcast_gradients = False  # matrix products accumulate in float32 already
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
    if weight.dim() == 1 or (bias is not None and bias.shape != weight.shape[:1]):
        return _linear_with_broadcasting(input, weight, bias)
    return LinearFunction.apply(input, weight, bias)


def _linear_with_broadcasting(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with a weight (in) or a bias that broadcasts, which torch accepts too."""
    with torch.no_grad():
        expected = F.linear(input, weight, bias)  # its shape and dtype, and torch's errors
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
    Σ without an index sums over the leading axes.
    """

    autocast = {"cuda": "promote"}

    def forward(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.bilinear(input1, input2, weight, bias)

    def vW(input2: Tensor, weight: Tensor) -> Tensor:
        """v Wₖᵀ for each k, (*, o, m)"""
        return (input2 @ rows(weight).mT).reshape(*input2.shape[:-1], *weight.shape[:2])

    def uW(input1: Tensor, weight: Tensor) -> Tensor:
        """u Wₖ for each k, (*, o, n)"""
        return (input1 @ rows(weight.mT).mT).reshape(*input1.shape[:-1], *weight.mT.shape[:2])

    def grad_input1(grad: Tensor, vW: Tensor) -> Tensor:
        return (grad.unsqueeze(-2) @ vW).squeeze(-2)

    def grad_input2(grad: Tensor, uW: Tensor) -> Tensor:
        return (grad.unsqueeze(-2) @ uW).squeeze(-2)

    def grad_weight(grad: Tensor, input1: Tensor, input2: Tensor) -> Tensor:
        outer = rows(input1).unsqueeze(-1) * rows(input2).unsqueeze(-2)
        count, m, n = outer.shape
        return (rows(grad).mT @ outer.reshape(count, m * n)).reshape(grad.shape[-1], m, n)

    def grad_bias(grad: Tensor) -> Tensor:
        return rows(grad).sum(0)


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


class BmmFunction(Rule):
    r"""Y = A B, for each matrix of a batch      ∂L/∂A = g Bᴴ      ∂L/∂B = Aᴴ g"""

    autocast = LOWER_PRECISION
    upcast_gradients = False  # matrix products accumulate in float32 already
    supports_complex = True

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)

    def grad_a(grad: Tensor, b: Tensor) -> Tensor:
        return grad @ b.mH

    def grad_b(grad: Tensor, a: Tensor) -> Tensor:
        return a.mH @ grad


@with_torch_errors
def bmm(input: Tensor, mat2: Tensor) -> Tensor:
    """A B for each matrix of a batch, (N, l, m) and (N, m, n), as `torch.bmm`."""
    return BmmFunction.apply(input, mat2)


register(
    bmm,
    sample_inputs=lambda t: [SampleInput(t(2, 3, 4), t(2, 4, 2))],
    benchmark_input=lambda t: SampleInput(t(16, 128, 128), t(16, 128, 128)),
)


class BaddbmmFunction(Rule):
    r"""Y = α A B + β C, for each matrix of a batch      ∂L/∂A = ᾱ g Bᴴ      ∂L/∂B = ᾱ Aᴴ g      ∂L/∂C = β̄ g"""

    autocast = LOWER_PRECISION
    upcast_gradients = False  # matrix products accumulate in float32 already
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
def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Tensor:
    """β C + α A B for each matrix of a batch, as `torch.baddbmm`. C broadcasts; α and β may be complex."""
    c = input.expand(*batch1.shape[:2], batch2.shape[2])
    return BaddbmmFunction.apply(batch1, batch2, c, alpha, beta)


register(
    baddbmm,
    sample_inputs=lambda t: [
        SampleInput(t(2, 3, 2), t(2, 3, 4), t(2, 4, 2)),
        SampleInput(t(3, 1), t(2, 3, 4), t(2, 4, 2), beta=0.5, alpha=2.0),
    ],
    benchmark_input=lambda t: SampleInput(t(16, 128, 128), t(16, 128, 128), t(16, 128, 128)),
)


class GroupedMMFunction(Rule):
    r"""Y_i = A_i B_i for each group i, where A and B have three axes (a matrix for each group) or two

    A tensor with two axes holds the matrices of all groups next to each other along one axis. ``ends`` has the end
    of each group on it: on the rows of A, the columns of B, or, if both have two axes, the axis that they share.

    differential      dY_i = dA_i B_i + A_i dB_i
    pair with g       ∂L/∂A_i = g_i B_iᵀ            ∂L/∂B_i = A_iᵀ g_i
    Both are grouped products with the same ends. Entries after the last end are in no group: their gradient is 0.

    Gale, Narayanan, Young and Zaharia, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2023.
    """

    upcast_gradients = False  # matrix products accumulate in float32 already

    def forward(
        a: Tensor, b: Tensor, ends: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None
    ) -> Tensor:
        return F.grouped_mm(a, b, offs=ends, bias=bias, out_dtype=out_dtype)

    def grad_a(grad: Tensor, a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
        grouped_axis = None if a.dim() == 3 else 0 if b.dim() == 3 else 1
        return _zero_after_last_end(_grouped_product(grad, b.mT, ends), ends, grouped_axis)

    def grad_b(grad: Tensor, a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
        grouped_axis = None if b.dim() == 3 else 1 if a.dim() == 3 else 0
        return _zero_after_last_end(_grouped_product(a.mT, grad, ends), ends, grouped_axis)


def _grouped_product(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """Y. The kernel needs contiguous rows of A and contiguous columns of B."""
    return GroupedMMFunction.apply(a.contiguous(), b.mT.contiguous().mT, ends, None, None)


def _zero_after_last_end(tensor: Tensor, ends: Tensor | None, grouped_axis: int | None) -> Tensor:
    """The tensor with 0 after the last end along the grouped axis, where the kernel writes nothing."""
    if ends is None or grouped_axis is None:
        return tensor
    in_a_group = torch.arange(tensor.shape[grouped_axis], device=tensor.device) < ends[-1]
    return torch.where(in_a_group.unsqueeze(1) if grouped_axis == 0 else in_a_group, tensor, 0)


@implements(F.grouped_mm)
def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A matrix product for each of G groups, as `torch.nn.functional.grouped_mm`, in float32 and lower.

    Shapes: (R, k) and (G, k, n), the result (R, n);       (G, m, k) and (k, R), the result (m, R);
            (m, R) and (R, n), the result (G, m, n);       (G, m, k) and (G, k, n), the result (G, m, n).
    R is the size that ``offs`` divides among the groups.
    """
    return GroupedMMFunction.apply(mat_a, mat_b, offs, bias, out_dtype)
