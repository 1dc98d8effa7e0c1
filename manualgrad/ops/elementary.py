"""What several areas share: sums over rows, a choice between two tensors, pointwise functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.fallback import Misfit as Misfit
from manualgrad.fallback import with_torchs_say
from manualgrad.registry import register_kernel
from manualgrad.rule import FLOAT32, Rule, nothing_looks_on
from manualgrad.saving import recipe_of

Wrapped = TypeVar("Wrapped", bound=Callable[..., object])


def drop_in(function: Wrapped) -> Wrapped:
    """A function of torch.nn.functional by ours. Bad input is refused with torch's type of error and words."""
    return refusing_as(getattr(F, function.__name__, None) or getattr(torch, function.__name__), function)


def refusing_as(reference: Callable[..., object], function: Wrapped) -> Wrapped:
    """The same of a function with another name than torch's (see `fallback`)."""
    return with_torchs_say(reference, function)  # type: ignore[return-value]


def stands_for(kernel: Callable[..., object]) -> Callable[[Wrapped], Wrapped]:
    """What follows, a rule or a function, is what torch's functions, bound, call in place of this operation."""

    def enter(ours: Wrapped) -> Wrapped:
        # a rule is called by its apply, and so is a Function
        register_kernel(kernel, refusing_as(getattr(kernel, "apply", kernel), getattr(ours, "apply", ours)))
        return ours

    return enter


def of_dimensions(make: Callable[[int], Wrapped], dimensions: Iterable[int] = (1, 2, 3)) -> list[Wrapped]:
    """One function that torch.nn.functional has for several numbers of dimensions: ``f`` as f1d, f2d, f3d."""
    found = []
    for n in dimensions:
        function = make(n)
        function.__name__ = function.__qualname__ = f"{function.__name__}{n}d"
        function.__doc__ = (function.__doc__ or "").replace("{n}", str(n))
        found.append(drop_in(function))
    return found


Numbers = int | Sequence[int]


def each(numbers: Numbers, n: int) -> tuple[int, ...]:
    """One for each of n dimensions; torch lets one stand for all."""
    if isinstance(numbers, int):
        return (numbers,) * n
    if len(numbers) not in (1, n):
        raise RuntimeError(f"expected one number or {n}, but got {tuple(numbers)}")
    return tuple(numbers) * n if len(numbers) == 1 else tuple(numbers)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def rows(tensor: Tensor, k: int = 1) -> Tensor:
    """All axes but the last k as one."""
    if tensor.dim() == k + 1:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[: tensor.dim() - k]), *tensor.shape[tensor.dim() - k :])


def channels_last(tensor: Tensor) -> bool:
    """It is an image (or a volume) whose channels lie innermost in memory, and nothing looks on."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if form is None or not nothing_looks_on(tensor) or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=form)


def in_format_of(other: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, channels_last if `other` is."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last(other) else tensor


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


def indicator(compare: Callable[..., Tensor], a: Tensor, b: float) -> Tensor:
    """1 where compare(a, b), else 0, in a's dtype. On the CPU a comparison that writes numbers is vectorized, and
    one that writes booleans is not."""
    if a.is_cpu and nothing_looks_on(a):
        return compare(a, b, out=torch.empty_like(a))
    return compare(a, b).to(a.dtype)


def choose(mask: Tensor, a: Tensor | None, b: Tensor | None = None) -> Tensor:
    """`a` where `mask`, else `b` (None: zero). Unlike a product with the mask, exact for inf and nan.

    The mask: booleans, or an `indicator` of a's dtype, which may be written over.
    """
    one = b if a is None else a
    assert one is not None
    if mask.is_cpu and one.is_floating_point() and nothing_looks_on(mask, one):
        # torch.where is scalar on the CPU (10 times the memory's speed is lost). Integer arithmetic on the bits is
        # vectorized and as exact: whatever is not chosen, infinities and nan too, leaves no trace.
        bits = _INTEGERS[one.element_size()]
        if mask.dtype == torch.bool:
            chosen = (mask.logical_not() if a is None else mask).to(bits)
        else:
            chosen = mask.view(bits).eq_(0) if a is None else mask.view(bits).ne_(0)
        if a is None or b is None:
            return chosen.mul_(one.view(bits)).view(one.dtype)
        return chosen.mul_(a.view(bits) - b.view(bits)).add_(b.view(bits)).view(a.dtype)
    mask = mask.bool()
    return ChooseFunction.apply(mask.logical_not(), b, None) if a is None else ChooseFunction.apply(mask, a, b)


def times(temporary: Tensor, factor: Tensor | float) -> Tensor:
    """temporary · factor, written over `temporary`, which the caller has just made, where nothing looks on.

    On the CPU the pages of one more fresh tensor cost as much as the product.
    """
    if isinstance(factor, Tensor):
        writes = temporary.dtype == factor.dtype and nothing_looks_on(temporary, factor)
    else:
        writes = nothing_looks_on(temporary)
    return temporary.mul_(factor) if writes else temporary * factor


def added(temporary: Tensor, dim: int, index: Tensor, addends: Tensor) -> Tensor:
    """`temporary` with the addends added along `dim` where `index` says, written over it likewise."""
    if temporary.dtype == addends.dtype and nothing_looks_on(temporary, addends):
        return temporary.scatter_add_(dim, index, addends)
    return temporary.scatter_add(dim, index, addends)


def plus(temporary: Tensor, term: Tensor, factor: Tensor | None = None) -> Tensor:
    """temporary + term · factor, written over `temporary` likewise."""
    if temporary.dtype == term.dtype and nothing_looks_on(temporary, term):
        return temporary.add_(term) if factor is None else temporary.addcmul_(term, factor)
    return temporary + (term if factor is None else term * factor)


class Elementwise(Rule):
    """Each number of the output comes from the numbers in its place alone: cheap, and any of them apart."""

    cheap = True

    def independent(grad: Tensor) -> int:
        return grad.dim()


class Pointwise(Elementwise):
    r"""yᵢ = f(xᵢ)      the rule gives ``derivative``, f′, as a tensor of its own

    dyᵢ = f′(xᵢ) dxᵢ,  a diagonal map, its own transpose:      ∂L/∂x = g f′(x)      (complex: conjugate)
    """

    def grad_input(grad: Tensor, derivative: Tensor) -> Tensor:
        return times(derivative.conj(), grad)


def scaled(tensor: Tensor, scale: complex) -> Tensor:
    return tensor if scale == 1 else tensor * scale


@stands_for(torch.abs)
class AbsoluteFunction(Rule):
    r"""y = |x|      ∂L/∂x = g sign x      (at 0: 0; for complex x: sign x = x / |x|)"""

    complex = True

    def forward(input: Tensor) -> Tensor:
        return torch.abs(input)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        return times(input.sgn(), grad)


@stands_for(torch.pow)
class PowerFunction(Pointwise):
    r"""y = xⁿ      y′ = n xⁿ⁻¹      n: a number"""

    autocast = {"cuda": "float32"}
    complex = True

    def forward(input: Tensor, exponent: float) -> Tensor:
        return torch.pow(input, exponent)

    def derivative(input: Tensor, exponent: float) -> Tensor:
        # 0 everywhere for n = 0, and not 0 · 0⁻¹ at 0
        return exponent * input ** (exponent - 1) if exponent else torch.zeros_like(input)


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


class ElementwiseProductFunction(Elementwise):
    r"""y = a b, of tensors of one shape      ∂L/∂a = g b      ∂L/∂b = g a

    torch's own product does the same; this one keeps its factors, and is itself kept, by their recipes.
    """

    complex = True

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def grad_a(grad: Tensor, b: Tensor) -> Tensor:
        return grad * b.conj()

    def grad_b(grad: Tensor, a: Tensor) -> Tensor:
        return grad * a.conj()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a · b, by the rule if that keeps less."""
    return ElementwiseProductFunction.apply(a, b) if spares(a, b) else a * b


def spares(a: Any, b: Any) -> bool:
    """One of the factors, an activation say, need not be kept (a compiled graph settles that itself)."""
    if torch.compiler.is_compiling():
        return False
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return recipe_of(a) is not None or recipe_of(b) is not None


def broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors at the one shape that they broadcast to."""
    if all(x.size() == tensors[0].size() for x in tensors):
        return tensors
    return tuple(torch.broadcast_tensors(*tensors))
