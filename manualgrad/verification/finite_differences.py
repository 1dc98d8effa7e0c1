"""Derivatives of a function under test from its values only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from manualgrad.verification.gradients import random_grad_output
from manualgrad.verification.tensors import real_vector

if TYPE_CHECKING:
    from manualgrad.verification.function_under_test import FunctionUnderTest

MAX_ELEMENTS = 32
"""A larger input is tested at this many random elements, and along one line through all elements."""

_STEPS = {torch.float64: (1e-3, 1e-4, 1e-5), torch.float32: (3e-2, 1e-2, 3e-3)}
_STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))


class JacobianRows(NamedTuple):
    """Rows of the transposed Jacobian: for some elements of one input, the derivative of every output."""

    indices: list[int]
    values: Tensor
    errors: Tensor


def jacobian_rows(fn: FunctionUnderTest, k: int) -> JacobianRows:
    """∂y/∂x for the elements of input `k`."""
    x = real_vector(fn.primals[k])
    indices = list(range(x.numel()))
    if len(indices) > MAX_ELEMENTS:
        shuffled = torch.randperm(len(indices), generator=torch.Generator().manual_seed(1))
        indices = sorted(shuffled[:MAX_ELEMENTS].tolist())
    rows = []
    for index in indices:
        direction = torch.zeros_like(x)
        direction[index] = 1
        # In low precision a step must exceed the rounding of the value. In float64 it stays small: a sine may
        # turn within a step that grows with the value.
        scale = 1.0 if fn.dtype == torch.float64 else max(1.0, abs(x[index].item()))
        rows.append(finite_difference(fn, {k: direction}, scale))
    if not rows:
        empty = torch.zeros(0, 0, dtype=torch.float64)
        return JacobianRows(indices, empty, empty)
    values, errors = (torch.stack(part) for part in zip(*rows, strict=True))
    return JacobianRows(indices, values, errors)


def finite_difference(
    fn: FunctionUnderTest,
    directions: dict[int, Tensor],
    scale: float = 1.0,
    of: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The derivative along a direction, and an estimate of its error.

    Each step size gives one estimate. The result is the estimate closest to that of the previous step size, and
    their difference is its error.

    Args:
        fn: the function under test.
        directions: for each input that moves, a direction.
        scale: a factor for the step sizes.
        of: what to differentiate, as a function of the primals: by default all outputs as one vector.
    """
    of = of or fn.output_vector
    best: tuple[Tensor, Tensor] | None = None
    previous: Tensor | None = None
    steps = _STEPS[torch.float64 if fn.dtype == torch.float64 else torch.float32]
    if fn.compute_dtype in (torch.float16, torch.bfloat16):
        steps = ()  # values this coarse have no meaningful differences
    for step in steps:
        h = step * scale
        try:
            value = sum(
                (of(fn.perturbed(directions, n * h)) * (w / h) for n, w in _STENCIL), torch.zeros(()).double()
            )
        except Exception:  # outside of the function's domain: try a smaller step
            continue
        if previous is not None:
            error = (value - previous).abs().nan_to_num(math.inf, math.inf, math.inf)
            if best is None:
                best = value, error
            else:
                better = error < best[1]
                best = torch.where(better, value, best[0]), torch.where(better, error, best[1])
            if not best[1].numel() or best[1].amax() <= 1e-9 * (1 + value.abs().amax()):
                break
        previous = value
    if best is None:
        value = of(fn.primals)
        best = torch.full_like(value, math.nan), torch.full_like(value, math.inf)
    return best


def loses_float64_precision(fn: FunctionUnderTest) -> bool:
    """Whether fourth differences of the outputs exceed float64's rounding: some operation has fewer digits."""
    directions = {
        k: real_vector(x) * random_grad_output(real_vector(x), 61 + k).sigmoid() for k, x in enumerate(fn.primals)
    }
    values = [fn.output_vector(fn.perturbed(directions, 1e-4 * n)) for n in range(5)]
    fourth = sum((w * v for w, v in zip((1, -4, 6, -4, 1), values, strict=True)), torch.zeros(()))
    size = values[0].abs().nan_to_num(0, 0, 0).amax() if values[0].numel() else torch.zeros(())
    constant = all(torch.equal(v, values[0]) for v in values[1:])
    return constant or bool((fourth.abs() > 1e-10 * size).any())
