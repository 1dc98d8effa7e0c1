"""Derivatives of any order, in any mixture of forward and reverse mode, to hold a rule against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, jvp

Scalar = Callable[[Tensor], Tensor]


def line(
    function: Callable[..., Tensor],
    points: Sequence[Tensor],
    directions: Sequence[Tensor],
    combine: Callable[[Tensor], Tensor],
) -> Scalar:
    """t -> combine(function(points + t · directions)): along a line every derivative is one number."""
    return lambda t: combine(function(*[x + t * v for x, v in zip(points, directions, strict=True)]))


def derivative(function: Scalar, modes: str, at: float = 0.0) -> float:
    """The derivative of order len(modes) at a point, in float64.

    Args:
        function: from a scalar tensor to a scalar tensor.
        modes: "r" for reverse and "f" for forward mode, the innermost first: "rf" is forward over reverse.
    """
    for mode in modes:
        function = grad(function) if mode == "r" else _pushed_forward(function)
    return function(torch.tensor(at, dtype=torch.float64)).item()


_FOUR_POINTS = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))


def quotient(function: Scalar, modes: str, step: float = 1e-4) -> tuple[float, float]:
    """The difference quotient at 0 of the derivative of these modes, and the size of the numbers that it tells."""
    values = [derivative(function, modes, at=k * step) for k, _ in _FOUR_POINTS]
    found = sum(weight * value for (_, weight), value in zip(_FOUR_POINTS, values, strict=True)) / step
    return found, max(abs(found), *map(abs, values), 1)


def _pushed_forward(function: Scalar) -> Scalar:
    return lambda t: jvp(function, (t,), (torch.ones_like(t),))[1]
