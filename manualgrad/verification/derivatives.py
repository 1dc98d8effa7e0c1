"""Derivatives of any order, in any mixture of forward and reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, jvp

Scalar = Callable[[Tensor], Tensor]


def along_line(
    function: Callable[..., Tensor],
    primals: Sequence[Tensor],
    directions: Sequence[Tensor],
    reduce: Callable[[Tensor], Tensor],
) -> Scalar:
    """t -> reduce(function(primals + t · directions)). Along a line every derivative is one number."""
    return lambda t: reduce(function(*[x + t * v for x, v in zip(primals, directions, strict=True)]))


def derivative(function: Scalar, modes: str, at: float = 0.0) -> float:
    """The derivative of order len(modes), in float64.

    Args:
        function: maps a scalar tensor to a scalar tensor.
        modes: "r" for reverse and "f" for forward mode, the innermost first: "rf" is forward over reverse.
        at: where.
    """
    for mode in modes:
        function = grad(function) if mode == "r" else _pushforward(function)
    return function(torch.tensor(at, dtype=torch.float64)).item()


_STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))


def difference_quotient(function: Scalar, modes: str, step: float = 1e-4) -> tuple[float, float]:
    """The difference quotient at 0 of the derivative of these modes, and the size of the numbers in it."""
    values = [derivative(function, modes, at=k * step) for k, _ in _STENCIL]
    quotient = sum(weight * value for (_, weight), value in zip(_STENCIL, values, strict=True)) / step
    return quotient, max(abs(quotient), *map(abs, values), 1)


def _pushforward(function: Scalar) -> Scalar:
    return lambda t: jvp(function, (t,), (torch.ones_like(t),))[1]
