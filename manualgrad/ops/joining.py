"""Operators of whole-model programs that join tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from manualgrad.ops.shapes import nonnegative_axes
from manualgrad.ops.views import to_dtype, unsqueeze
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule


class CatFunction(Rule):
    r"""y = a, then b along an axis      ∂L/∂a = the first n indices of g,   ∂L/∂b = the others

    n, m: the sizes of a and b along the axis
    """

    supports_complex = True

    def forward(a: Tensor, b: Tensor, axis: int, n: int, m: int) -> Tensor:
        return torch.cat([a, b], axis)

    def grad_a(grad: Tensor, axis: int, n: int) -> Tensor:
        return grad.narrow(axis, 0, n)

    def grad_b(grad: Tensor, axis: int, n: int, m: int) -> Tensor:
        return grad.narrow(axis, n, m)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, one tensor after the other. Other dtypes than the result's are cast first."""
    axis = nonnegative_axes(dim, tensors[0].dim())[0]
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    found, *others = (x if x.dtype == dtype else to_dtype(x, dtype) for x in tensors)
    for x in others:
        found = CatFunction.apply(found, x, axis, found.shape[axis], x.shape[axis])
    return found


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.stack`."""
    axis = nonnegative_axes(dim, tensors[0].dim() + 1)[0]
    return cat([unsqueeze(x, axis) for x in tensors], axis)


register(
    cat,
    sample_inputs=lambda t: [SampleInput([t(2, 3), t(4, 3)]), SampleInput([t(2, 3), t(2, 1), t(2, 2)], -1)],
    benchmark_input=lambda t: SampleInput([t(512, 512), t(512, 512)]),
    in_graphs_only=True,
)
register(
    stack,
    sample_inputs=lambda t: [SampleInput([t(2, 3), t(2, 3)], 1)],
    benchmark_input=lambda t: SampleInput([t(512, 512), t(512, 512)]),
    in_graphs_only=True,
)
