"""What several areas share: sums over rows, a choice between two tensors, pointwise functions and losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.rule import FLOAT32, Rule, nothing_looks_on

_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
Wrapped = TypeVar("Wrapped", bound=Callable[..., object])


def drop_in(function: Wrapped) -> Wrapped:
    """A function of torch.nn.functional by ours. Where ours fails torch's own is called, for its error.

    So bad input is refused with torch's type of error and words, whatever stumbled over it here.
    """
    reference = getattr(F, function.__name__, None) or getattr(torch, function.__name__)

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        try:
            return function(*args, **kwargs)
        except _REFUSALS:
            reference(*args, **kwargs)
            raise

    return run  # type: ignore[return-value]


def written(input: Tensor, output: Tensor, inplace: bool) -> Tensor:
    """`output`, or with ``inplace`` the input that it was written into."""
    return input.copy_(output) if inplace else output


Numbers = int | Sequence[int]


def each(numbers: Numbers, n: int) -> tuple[int, ...]:
    """One for each of n dimensions; torch lets one stand for all."""
    if isinstance(numbers, int):
        return (numbers,) * n
    return tuple(numbers) * n if len(numbers) == 1 else tuple(numbers)


_INTEGERS = {1: Tensor.byte, 2: Tensor.short, 4: Tensor.int, 8: Tensor.long}  # by size in bytes


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
        return torch.where(mask, a, 0 if b is None else b)

    def grad_a(grad: Tensor, mask: Tensor) -> Tensor:
        return choose(mask, grad)

    def grad_b(grad: Tensor, mask: Tensor) -> Tensor:
        return choose(mask.logical_not(), grad)


def choose(mask: Tensor, a: Tensor, b: Tensor | None = None) -> Tensor:
    """`a` where `mask`, else `b` (None: zero). Unlike a product with the mask, exact for inf and nan."""
    if mask.is_cpu and a.is_floating_point() and nothing_looks_on(mask, a):
        # torch.where is scalar on the CPU (10 times the memory's speed is lost). Integer arithmetic on the bits is
        # vectorized and as exact: whatever is not chosen, infinities and nan too, leaves no trace.
        chosen = _INTEGERS[a.element_size()](mask)
        bits = chosen.dtype
        if b is None:
            return chosen.mul_(a.view(bits)).view(a.dtype)
        return chosen.mul_(a.view(bits) - b.view(bits)).add_(b.view(bits)).view(a.dtype)
    return ChooseFunction.apply(mask, a, b)


def times(temporary: Tensor, factor: Tensor) -> Tensor:
    """temporary · factor, written over `temporary`, which the caller has just made, where nothing looks on.

    On the CPU the pages of one more fresh tensor cost as much as the product.
    """
    if temporary.dtype == factor.dtype and nothing_looks_on(temporary, factor):
        return temporary.mul_(factor)
    return temporary * factor


def plus(temporary: Tensor, term: Tensor, factor: Tensor | None = None) -> Tensor:
    """temporary + term · factor, written over `temporary` likewise."""
    if temporary.dtype == term.dtype and nothing_looks_on(temporary, term):
        return temporary.add_(term) if factor is None else temporary.addcmul_(term, factor)
    return temporary + (term if factor is None else term * factor)


_BLOCK = 2**17


def product_blocks(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """a · b, where nothing looks on in blocks of the first axis that stay in the CPU's cache, each to be used, or
    written over, before the next: fresh memory for the whole would cost more than the arithmetic."""
    size = max(1, len(a) * _BLOCK // max(1, a.numel()))
    if not a.is_cpu or size >= len(a) or a.dtype != b.dtype or not nothing_looks_on(a, b):
        yield a * b
        return
    block = a.new_empty(size, *a.shape[1:])
    for x, y in zip(a.split(size), b.split(size), strict=True):
        yield torch.mul(x, y, out=block[: len(x)])


class Pointwise(Rule):
    r"""yᵢ = f(xᵢ)      the rule gives ``derivative``, f′, as a tensor of its own

    dyᵢ = f′(xᵢ) dxᵢ,  a diagonal map: its own transpose (for complex x, f holomorphic: conjugate).
    """

    def grad_input(grad: Tensor, derivative: Tensor) -> Tensor:
        return times(derivative.conj(), grad)


class PointwiseLoss(Rule):
    r"""L = reduction of ℓᵢ = ℓ(xᵢ, tᵢ)      the rule gives ``slope``, ∂ℓ/∂x, as a tensor of its own

    reduction   "none": Lᵢ = ℓᵢ     "sum": L = Σ ℓᵢ     "mean": L = (1/n) Σ ℓᵢ
    scale              1                   1                    1/n
    ∂L/∂xᵢ = scale · g · ∂ℓ/∂xᵢ      (g: gᵢ without a reduction)
    """

    def scale(input: Tensor, reduction: str) -> float:
        return mean_scale(input, reduction)

    def grad_input(grad: Tensor, slope: Tensor, scale: float) -> Tensor:
        return times(slope, scaled(grad, scale))


def mean_scale(losses: Tensor, reduction: str) -> float:
    return 1 / max(losses.numel(), 1) if reduction == "mean" else 1.0


def scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor * scale


class DifferenceLoss(PointwiseLoss):
    """A loss of d = x - t alone: ∂ℓ/∂t = -∂ℓ/∂x."""

    def difference(input: Tensor, target: Tensor) -> Tensor:
        return input - target

    def grad_target(grad_input: Tensor) -> Tensor:
        return -grad_input


class DifferenceFunction(Rule):
    r"""y = a - b      ∂L/∂a = g,   ∂L/∂b = -g      (keeps nothing)"""

    autocast = FLOAT32
    complex = True

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a - b

    def grad_a(grad: Tensor) -> Tensor:
        return grad

    def grad_b(grad: Tensor) -> Tensor:
        return -grad


class PlainDifferenceFunction(DifferenceFunction):
    """The same where torch's operation is a composition, whose subtraction autocast leaves alone."""

    autocast = {}


def broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors at the one shape that they broadcast to."""
    if all(x.size() == tensors[0].size() for x in tensors):
        return tensors
    return tuple(torch.broadcast_tensors(*tensors))


def reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses
