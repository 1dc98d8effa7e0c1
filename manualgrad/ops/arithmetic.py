"""Arithmetic: the rules that several files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manualgrad.ops.registration import implements
from manualgrad.recomputation import find_recipe
from manualgrad.rule import FLOAT32, Rule


class Elementwise(Rule):
    """Each element of the output depends only on the elements of the inputs at the same index."""

    recomputable = True

    def batch_dims(grad: Tensor) -> int:
        return grad.dim()  # each element is a row


class Pointwise(Elementwise):
    r"""yᵢ = f(xᵢ)      the rule defines ``derivative``, the tensor f′(x)

    dyᵢ = f′(xᵢ) dxᵢ,  a diagonal map, its own transpose:      ∂L/∂x = g f′(x)    (complex: conjugate)
    """

    def grad_input(grad: Tensor, derivative: Tensor) -> Tensor:
        return grad * derivative.conj()


@implements(torch.abs)
class AbsoluteFunction(Rule):
    r"""y = |x|      ∂L/∂x = g sgn x      (at 0: 0; for complex x: sgn x = x / |x|)"""

    supports_complex = True

    def forward(input: Tensor) -> Tensor:
        return torch.abs(input)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        return grad * input.sgn()


@implements(torch.pow)
class PowerFunction(Pointwise):
    r"""y = xⁿ      y′ = n xⁿ⁻¹      n: a number"""

    autocast = {"cuda": "float32"}
    supports_complex = True

    def forward(input: Tensor, exponent: float) -> Tensor:
        return torch.pow(input, exponent)

    def derivative(input: Tensor, exponent: float) -> Tensor:
        return exponent * input ** (exponent - 1) if exponent else torch.zeros_like(input)  # 0 · 0⁻¹ would be nan


class DifferenceFunction(Rule):
    r"""y = a - b      ∂L/∂a = g,   ∂L/∂b = -g      (saves nothing)"""

    autocast = FLOAT32
    supports_complex = True

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a - b

    def grad_a(grad: Tensor) -> Tensor:
        return grad

    def grad_b(grad: Tensor) -> Tensor:
        return -grad


class DifferenceWithoutAutocastFunction(DifferenceFunction):
    """For functions such as `pairwise_distance`, which subtract before autocast casts. It casts the difference."""

    autocast = {}


class WhereFunction(Rule):
    r"""y = a where m, else 0      m: a mask of booleans of a's shape      ∂L/∂a = g where m, else 0"""

    def forward(mask: Tensor, a: Tensor) -> Tensor:
        return torch.where(mask, a, 0)

    def grad_a(grad: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, grad, 0)


class MultiplyFunction(Elementwise):
    r"""y = a b, of tensors of one shape      ∂L/∂a = g b      ∂L/∂b = g a

    torch's product has the same gradients. This rule can recompute its factors, and its output can be recomputed.
    """

    supports_complex = True

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def grad_a(grad: Tensor, b: Tensor) -> Tensor:
        return grad * b.conj()

    def grad_b(grad: Tensor, a: Tensor) -> Tensor:
        return grad * a.conj()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a · b, by `MultiplyFunction` if that saves less memory."""
    return MultiplyFunction.apply(a, b) if has_recomputable_factor(a, b) else a * b


def has_recomputable_factor(a: Any, b: Any) -> bool:
    """At least one factor can be recomputed (an activation, for example), so it does not have to be saved.

    False under torch.compile, which decides itself what to save.
    """
    if torch.compiler.is_compiling():
        return False
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return find_recipe(a) is not None or find_recipe(b) is not None
