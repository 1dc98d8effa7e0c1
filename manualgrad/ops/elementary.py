"""What several areas share: sums over rows, a choice, pointwise functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.fallback import ShapeMismatchError as ShapeMismatchError
from manualgrad.fallback import with_torch_fallback
from manualgrad.recomputation import find_recipe
from manualgrad.registry import register_kernel
from manualgrad.rule import FLOAT32, Rule

Wrapped = TypeVar("Wrapped", bound=Callable[..., object])


def with_torch_errors(function: Wrapped) -> Wrapped:
    """A function of torch.nn.functional by ours. Bad input is refused with torch's type of error and words."""
    return with_errors_of(getattr(F, function.__name__, None) or getattr(torch, function.__name__), function)


def with_errors_of(reference: Callable[..., object], function: Wrapped) -> Wrapped:
    """The same of a function with another name than torch's (see `fallback`)."""
    return with_torch_fallback(reference, function)  # type: ignore[return-value]


def implements(kernel: Callable[..., object]) -> Callable[[Wrapped], Wrapped]:
    """What follows, a rule or a function, is what torch's functions, bound, call in place of this operation."""

    def enter(ours: Wrapped) -> Wrapped:
        # a rule is called by its apply, and so is a Function
        register_kernel(kernel, with_errors_of(getattr(kernel, "apply", kernel), getattr(ours, "apply", ours)))
        return ours

    return enter


def of_dimensions(make: Callable[[int], Wrapped], dimensions: Iterable[int] = (1, 2, 3)) -> list[Wrapped]:
    """One function that torch.nn.functional has for several numbers of dimensions: ``f`` as f1d, f2d, f3d."""
    found = []
    for n in dimensions:
        function = make(n)
        function.__name__ = function.__qualname__ = f"{function.__name__}{n}d"
        function.__doc__ = (function.__doc__ or "").replace("{n}", str(n))
        found.append(with_torch_errors(function))
    return found


Numbers = int | Sequence[int]


def each(numbers: Numbers, n: int) -> tuple[int, ...]:
    """One for each of n dimensions; torch lets one stand for all."""
    if isinstance(numbers, int):
        return (numbers,) * n
    if len(numbers) not in (1, n):
        raise RuntimeError(f"expected one number or {n}, but got {tuple(numbers)}")
    return tuple(numbers) * n if len(numbers) == 1 else tuple(numbers)


def rows(tensor: Tensor, k: int = 1) -> Tensor:
    """All axes but the last k as one."""
    if tensor.dim() == k + 1:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[: tensor.dim() - k]), *tensor.shape[tensor.dim() - k :])


def flatten(tensor: Tensor, first: int = 0, last: int = -1) -> Tensor:
    """`torch.flatten`, which the older vmap (of gradcheck) does not support. Also of no numbers at all."""
    first, last = first % tensor.dim(), last % tensor.dim()
    shape = tensor.shape
    return tensor.reshape(*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :])


def unflatten(tensor: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
    """`torch.unflatten` likewise."""
    axis = axis % tensor.dim()
    return tensor.reshape(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])


class ChooseFunction(Rule):
    r"""y = a where m, else 0      m: a mask of booleans of a's shape      ∂L/∂a = g where m, else 0"""

    def forward(mask: Tensor, a: Tensor) -> Tensor:
        return torch.where(mask, a, 0)

    def grad_a(grad: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, grad, 0)


class Elementwise(Rule):
    """Each number of the output comes from the numbers in its place alone: cheap, and any of them apart."""

    recomputable = True

    def batch_dims(grad: Tensor) -> int:
        return grad.dim()


class Pointwise(Elementwise):
    r"""yᵢ = f(xᵢ)      the rule gives ``derivative``, f′, as a tensor of its own

    dyᵢ = f′(xᵢ) dxᵢ,  a diagonal map, its own transpose:      ∂L/∂x = g f′(x)      (complex: conjugate)
    """

    def grad_input(grad: Tensor, derivative: Tensor) -> Tensor:
        return grad * derivative.conj()


@implements(torch.abs)
class AbsoluteFunction(Rule):
    r"""y = |x|      ∂L/∂x = g sign x      (at 0: 0; for complex x: sign x = x / |x|)"""

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
        return exponent * input ** (exponent - 1) if exponent else torch.zeros_like(input)  # not 0 · 0⁻¹ at 0


class DifferenceFunction(Rule):
    r"""y = a - b      ∂L/∂a = g,   ∂L/∂b = -g      (keeps nothing)"""

    autocast = FLOAT32
    supports_complex = True

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

    supports_complex = True

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
    return find_recipe(a) is not None or find_recipe(b) is not None


def broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors at the one shape that they broadcast to."""
    if all(x.size() == tensors[0].size() for x in tensors):
        return tensors
    return tuple(torch.broadcast_tensors(*tensors))
