"""Helpers for shapes, and for settings with one number per dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IntOrInts = int | Sequence[int]
Shape = tuple[int, ...]


def to_tuple(value: IntOrInts, n: int) -> tuple[int, ...]:
    """One number per dimension. An int, or a sequence of one, applies to all n dimensions."""
    if isinstance(value, int):
        return (value,) * n
    if len(value) not in (1, n):
        raise RuntimeError(f"expected one number or {n}, but got {tuple(value)}")
    return tuple(value) * n if len(value) == 1 else tuple(value)


def rows(tensor: Tensor, k: int = 1) -> Tensor:
    """Flatten all axes but the last k into one."""
    if tensor.dim() == k + 1:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[: tensor.dim() - k]), *tensor.shape[tensor.dim() - k :])


def flatten(tensor: Tensor, first: int = 0, last: int = -1) -> Tensor:
    """`torch.flatten` that also works for empty tensors and in gradcheck's vmap."""
    first, last = first % tensor.dim(), last % tensor.dim()
    shape = tensor.shape
    return tensor.reshape(*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :])


def unflatten(tensor: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
    """`torch.unflatten` that works in the same cases."""
    axis = axis % tensor.dim()
    return tensor.reshape(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])


def with_size(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    """The shape with another size of one axis, counted from the end (-1 is the last)."""
    return (*shape[:axis], size, *shape[axis:][1:])


def broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`torch.broadcast_tensors`. Tensors of one shape are returned unchanged."""
    if all(x.size() == tensors[0].size() for x in tensors):
        return tensors
    return tuple(torch.broadcast_tensors(*tensors))


def sum_to_shape(tensor: Tensor, shape: Shape) -> Tensor:
    """The sum over the axes along which a tensor of this shape was broadcast: the adjoint of broadcasting."""
    return tensor if tensor.shape == shape else tensor.sum_to_size(shape)


def shape_of(value: Tensor | complex) -> Shape:
    """The shape of a tensor; () for a number."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def nonnegative_axes(axes: IntOrInts | None, n: int) -> tuple[int, ...]:
    """The axes of a tensor with n axes, counted from the first. None or no axis: all."""
    if axes is None or (not isinstance(axes, int) and len(axes) == 0):
        return tuple(range(n))
    axes = (axes,) if isinstance(axes, int) else axes
    for axis in axes:
        if not -max(n, 1) <= axis < max(n, 1):
            raise IndexError(
                f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {axis})"
            )
    return tuple(axis % n if n else 0 for axis in axes)
