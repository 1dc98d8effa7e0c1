"""What several areas share: sums over rows, a choice between two tensors, pointwise functions and losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.rule import Rule, is_plain

_REFUSALS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)
Function = TypeVar("Function", bound=Callable[..., Tensor])


def drop_in(function: Function) -> Function:
    """A function of torch.nn.functional by ours. Where ours fails torch's own is called, for its error.

    So bad input is refused with torch's type of error and words, whatever stumbled over it here.
    """
    reference = getattr(F, function.__name__)

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> Tensor:
        try:
            return function(*args, **kwargs)
        except _REFUSALS:
            reference(*args, **kwargs)
            raise

    return run  # type: ignore[return-value]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def rows(tensor: Tensor, k: int = 1) -> Tensor:
    """All axes but the last k as one."""
    if tensor.dim() == k + 1:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[: tensor.dim() - k]), *tensor.shape[tensor.dim() - k :])


def last(k: int) -> tuple[int, ...]:
    """The last k axes."""
    return tuple(range(-k, 0))


class ChooseFunction(Rule):
    r"""y = a where m, else b      m: a mask of booleans; a, b: tensors of its shape (b may be None: zero)

    dy = m da + (1 - m) db,  so  ∂L/∂a = g where m, else 0,  and  ∂L/∂b = 0 where m, else g.
    """

    def forward(mask: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
        if mask.is_cpu and a.is_floating_point() and is_plain(mask, a, mask if b is None else b):
            # torch.where is scalar on the CPU (10 times the memory's speed is lost). Integer arithmetic on the
            # bits is vectorized and as exact: whatever is not chosen, infinities and nan too, leaves no trace.
            bits = _BITS[a.element_size()]
            chosen = mask.to(bits)
            if b is None:
                return chosen.mul_(a.view(bits)).view(a.dtype)
            return chosen.mul_(a.view(bits) - b.view(bits)).add_(b.view(bits)).view(a.dtype)
        return torch.where(mask, a, 0 if b is None else b)

    def grad_a(grad: Tensor, mask: Tensor) -> Tensor:
        return choose(mask, grad)

    def grad_b(grad: Tensor, mask: Tensor) -> Tensor:
        return choose(mask.logical_not(), grad)


def choose(mask: Tensor, a: Tensor, b: Tensor | None = None) -> Tensor:
    """`a` where `mask`, else `b` (None: zero). Unlike a product with the mask, exact for inf and nan."""
    return ChooseFunction.apply(mask, a, b)


class Pointwise(Rule):
    r"""yᵢ = f(xᵢ)      the rule gives ``derivative``, f′

    dyᵢ = f′(xᵢ) dxᵢ,  a diagonal map: its own transpose (for complex x, f holomorphic: conjugate).
    """

    def grad_input(grad: Tensor, derivative: Tensor) -> Tensor:
        return grad * derivative.conj()


class PointwiseLoss(Rule):
    r"""L = reduction of ℓᵢ = ℓ(xᵢ, tᵢ)      the rule gives ``slope``, ∂ℓ/∂x

    reduction   "none": Lᵢ = ℓᵢ     "sum": L = Σ ℓᵢ     "mean": L = (1/n) Σ ℓᵢ
    each element is sent          g       or gᵢ          g/n                      =: spread
    ∂L/∂xᵢ = spread · ∂ℓ/∂xᵢ
    """

    def spread(grad: Tensor, input: Tensor, reduction: str) -> Tensor:
        return grad / input.numel() if reduction == "mean" else grad

    def grad_input(spread: Tensor, slope: Tensor) -> Tensor:
        return spread * slope


class DifferenceLoss(PointwiseLoss):
    """A loss of d = x - t alone: ∂ℓ/∂t = -∂ℓ/∂x."""

    def difference(input: Tensor, target: Tensor) -> Tensor:
        return input - target

    def grad_target(grad_input: Tensor) -> Tensor:
        return -grad_input
