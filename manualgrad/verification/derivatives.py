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


def _pushed_forward(function: Scalar) -> Scalar:
    return lambda t: jvp(function, (t,), (torch.ones_like(t),))[1]
