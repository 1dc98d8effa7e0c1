"""Operators of whole-model programs that move or copy numbers: views, slices, repetitions, casts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manualgrad.ops.shapes import Shape, nonnegative_axes, sum_to_shape
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule


def _sizes(sizes: Sequence[Any]) -> Shape:
    """The sizes of a call ``f(2, 3)`` or ``f((2, 3))``."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else tuple(sizes)


class ViewFunction(Rule):
    r"""y has the numbers of x in another shape      ∂L/∂x = g in the shape of x"""

    supports_complex = True

    def forward(input: Tensor, shape: Shape, input_shape: Shape) -> Tensor:
        return input.view(shape)

    def grad_input(grad: Tensor, input_shape: Shape) -> Tensor:
        return grad.reshape(input_shape)


class ReshapeFunction(ViewFunction):
    r"""The same. It copies the numbers if the memory layout of x needs it."""

    def forward(input: Tensor, shape: Shape, input_shape: Shape) -> Tensor:
        return input.reshape(shape)


def view(input: Tensor, *shape: Any) -> Tensor:
    """`torch.Tensor.view`, to a shape."""
    return ViewFunction.apply(input, _sizes(shape), tuple(input.shape))


def reshape(input: Tensor, *shape: Any) -> Tensor:
    """`torch.Tensor.reshape`."""
    return ReshapeFunction.apply(input, _sizes(shape), tuple(input.shape))


def flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """`torch.flatten`."""
    if input.dim() == 0:
        return reshape(input, 1)
    first, last = nonnegative_axes((start_dim, end_dim), input.dim())
    sizes = input.shape
    return reshape(input, (*sizes[:first], math.prod(sizes[first : last + 1]), *sizes[last + 1 :]))


def unflatten(input: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """`torch.unflatten`."""
    (axis,) = nonnegative_axes(dim, input.dim())
    return view(input, (*input.shape[:axis], *sizes, *input.shape[axis + 1 :]))


class UnsqueezeFunction(Rule):
    r"""y = x with an axis of size 1      ∂L/∂x = g without it"""

    supports_complex = True

    def forward(input: Tensor, axis: int) -> Tensor:
        return input.unsqueeze(axis)

    def grad_input(grad: Tensor, axis: int) -> Tensor:
        return grad.squeeze(axis)


class SqueezeFunction(ViewFunction):
    r"""y = x without some axes of size 1      ∂L/∂x = g in the shape of x"""

    def forward(input: Tensor, axes: Shape, input_shape: Shape) -> Tensor:
        return input.squeeze(axes)


def unsqueeze(input: Tensor, dim: int) -> Tensor:
    """`torch.unsqueeze`."""
    return UnsqueezeFunction.apply(input, dim)


def squeeze(input: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """`torch.squeeze`."""
    if dim is None:
        axes = tuple(axis for axis, size in enumerate(input.shape) if size == 1)
    else:
        axes = (dim,) if isinstance(dim, int) else tuple(dim)
    return SqueezeFunction.apply(input, axes, tuple(input.shape))


class TransposeFunction(Rule):
    r"""Two axes are exchanged. The map is its own inverse, and so its own transpose:      ∂L/∂x = g, likewise"""

    supports_complex = True

    def forward(input: Tensor, dim0: int, dim1: int) -> Tensor:
        return input.transpose(dim0, dim1)

    def grad_input(grad: Tensor, dim0: int, dim1: int) -> Tensor:
        return grad.transpose(dim0, dim1)


class PermuteFunction(Rule):
    r"""Axis i of y is axis p(i) of x      ∂L/∂x = g with its axes in the order of p⁻¹"""

    supports_complex = True

    def forward(input: Tensor, p: Shape, inverse: Shape) -> Tensor:
        return input.permute(p)

    def grad_input(grad: Tensor, inverse: Shape) -> Tensor:
        return grad.permute(inverse)


def transpose(input: Tensor, dim0: int, dim1: int) -> Tensor:
    """`torch.transpose`."""
    return TransposeFunction.apply(input, dim0, dim1)


def t(input: Tensor) -> Tensor:
    """`torch.t`: the transposed matrix; a tensor with fewer axes is returned unchanged."""
    if input.dim() > 2:
        raise RuntimeError(f"t() expects a tensor with <= 2 dimensions, but self is {input.dim()}D")
    return TransposeFunction.apply(input, 0, 1) if input.dim() == 2 else view(input, input.shape)


def permute(input: Tensor, *dims: Any) -> Tensor:
    """`torch.permute`."""
    p = _sizes(dims)
    axes = nonnegative_axes(p, input.dim()) if p else ()
    return PermuteFunction.apply(input, p, tuple(sorted(range(len(axes)), key=axes.__getitem__)))


def movedim(input: Tensor, source: int | Sequence[int], destination: int | Sequence[int]) -> Tensor:
    """`torch.movedim`."""
    sources, places = nonnegative_axes(source, input.dim()), nonnegative_axes(destination, input.dim())
    others = iter(axis for axis in range(input.dim()) if axis not in sources)
    moved = dict(zip(places, sources, strict=True))
    return permute(input, [moved[i] if i in moved else next(others) for i in range(input.dim())])


class ExpandFunction(Rule):
    r"""y = x, repeated along axes of size 1 and new axes      ∂L/∂x = Σ g over the repetitions"""

    supports_complex = True

    def forward(input: Tensor, shape: Shape, input_shape: Shape) -> Tensor:
        return input.expand(shape)

    def grad_input(grad: Tensor, input_shape: Shape) -> Tensor:
        return sum_to_shape(grad, input_shape)


def expand(input: Tensor, *shape: Any, implicit: bool = False) -> Tensor:
    """`torch.Tensor.expand`."""
    return ExpandFunction.apply(input, _sizes(shape), tuple(input.shape))


def expand_as(input: Tensor, other: Tensor) -> Tensor:
    """`torch.Tensor.expand_as`."""
    return expand(input, other.shape)


def broadcast_tensors(*tensors: Any) -> tuple[Tensor, ...]:
    """`torch.broadcast_tensors`. A tensor that has the common shape is returned unchanged."""
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    shape = torch.broadcast_shapes(*(x.shape for x in given))
    return tuple(x if x.shape == shape else expand(x, shape) for x in given)


class RepeatFunction(Rule):
    r"""y[r, i] = x[i] for r < n, along each axis      ∂L/∂x[i] = Σ g[r, i] over r      (r, i: one axis of y)"""

    supports_complex = True

    def forward(input: Tensor, n: Shape, split_shape: Shape, input_shape: Shape) -> Tensor:
        return input.repeat(n)

    def grad_input(grad: Tensor, n: Shape, split_shape: Shape, input_shape: Shape) -> Tensor:
        return grad.reshape(split_shape).sum(tuple(range(0, 2 * len(n), 2))).reshape(input_shape)


def repeat(input: Tensor, *repeats: Any) -> Tensor:
    """`torch.Tensor.repeat`."""
    n = _sizes(repeats)
    sizes = (*[1] * (len(n) - input.dim()), *input.shape)
    split_shape = tuple(size for pair in zip(n, sizes, strict=False) for size in pair)
    return RepeatFunction.apply(input, n, split_shape, tuple(input.shape))


def repeat_interleave(input: Tensor, repeats: int, dim: int | None = None) -> Tensor:
    """`torch.repeat_interleave`, with one number: each slice along an axis, repeated."""
    input, axis = (flatten(input), 0) if dim is None else (input, nonnegative_axes(dim, input.dim())[0])
    sizes = tuple(input.shape)
    expanded = expand(unsqueeze(input, axis + 1), (*sizes[: axis + 1], repeats, *sizes[axis + 1 :]))
    return reshape(expanded, (*sizes[:axis], sizes[axis] * repeats, *sizes[axis + 1 :]))


class SelectFunction(Rule):
    r"""y = x at one index of an axis      ∂L/∂x = g there, 0 elsewhere"""

    supports_complex = True

    def forward(input: Tensor, axis: int, index: int, input_shape: Shape) -> Tensor:
        return input.select(axis, index)

    def grad_input(grad: Tensor, axis: int, index: int, input_shape: Shape) -> Tensor:
        return torch.select_scatter(grad.new_zeros(input_shape), grad, axis, index)


class SliceFunction(Rule):
    r"""y = x at the indices start, start + step, ... < end of an axis      ∂L/∂x = g there, 0 elsewhere"""

    supports_complex = True

    def forward(input: Tensor, axis: int, start: int, end: int, step: int, input_shape: Shape) -> Tensor:
        return input[(*[slice(None)] * axis, slice(start, end, step if step > 1 else None))]

    def grad_input(grad: Tensor, axis: int, start: int, end: int, step: int, input_shape: Shape) -> Tensor:
        return torch.slice_scatter(grad.new_zeros(input_shape), grad, axis, start, end, step)


def select(input: Tensor, dim: int, index: int) -> Tensor:
    """`torch.select`."""
    (axis,) = nonnegative_axes(dim, input.dim())
    return SelectFunction.apply(input, axis, index, tuple(input.shape))


def slice_axis(
    input: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """The operator aten.slice: ``input[start:end:step]`` along an axis."""
    (axis,) = nonnegative_axes(dim, input.dim())
    size = input.shape[axis]
    first = 0 if start is None else min(start + size if start < 0 else start, size)
    last = size if end is None else min(end + size if end < 0 else end, size)
    return SliceFunction.apply(input, axis, max(first, 0), max(last, first, 0), step, tuple(input.shape))


def narrow(input: Tensor, dim: int, start: int, length: int) -> Tensor:
    """`torch.narrow`."""
    return slice_axis(input, dim, start, (start + input.shape[dim] if start < 0 else start) + length)


def split(input: Tensor, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """`torch.split`."""
    size = input.shape[dim]
    if isinstance(split_size_or_sections, int):
        step = split_size_or_sections
        return tuple(slice_axis(input, dim, i, i + step) for i in range(0, size, step))
    found, start = [], 0
    for length in split_size_or_sections:
        found.append(slice_axis(input, dim, start, start + length))
        start += length
    return tuple(found)


def split_with_sizes(input: Tensor, split_sizes: Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """`torch.split_with_sizes`."""
    return split(input, list(split_sizes), dim)


def chunk(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """`torch.chunk`."""
    return split(input, -(-input.shape[dim] // chunks), dim)


def unbind(input: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """`torch.unbind`."""
    return tuple(select(input, dim, i) for i in range(input.shape[dim]))


class FlipFunction(Rule):
    r"""The order along some axes is reversed. The map is its own transpose:      ∂L/∂x = g, likewise"""

    supports_complex = True

    def forward(input: Tensor, axes: Shape) -> Tensor:
        return input.flip(axes)

    def grad_input(grad: Tensor, axes: Shape) -> Tensor:
        return grad.flip(axes)


class RollFunction(Rule):
    r"""y[i] = x[i - s mod n]      ∂L/∂x[i] = g[i + s mod n]"""

    supports_complex = True

    def forward(input: Tensor, shifts: Shape, axes: Shape) -> Tensor:
        return input.roll(shifts, axes)

    def grad_input(grad: Tensor, shifts: Shape, axes: Shape) -> Tensor:
        return grad.roll([-s for s in shifts], axes)


def flip(input: Tensor, dims: Sequence[int]) -> Tensor:
    """`torch.flip`."""
    return FlipFunction.apply(input, tuple(dims))


def roll(input: Tensor, shifts: int | Sequence[int], dims: int | Sequence[int] = ()) -> Tensor:
    """`torch.roll`."""
    shifts, axes = ((x,) if isinstance(x, int) else tuple(x) for x in (shifts, dims))
    return RollFunction.apply(input, shifts, axes)


class TrilFunction(Rule):
    r"""y = x on and below a diagonal, else 0      ∂L/∂x = g there, else 0"""

    supports_complex = True

    def forward(input: Tensor, diagonal: int) -> Tensor:
        return input.tril(diagonal)

    def grad_input(grad: Tensor, diagonal: int) -> Tensor:
        return grad.tril(diagonal)


class TriuFunction(Rule):
    r"""y = x on and above a diagonal, else 0      ∂L/∂x = g there, else 0"""

    supports_complex = True

    def forward(input: Tensor, diagonal: int) -> Tensor:
        return input.triu(diagonal)

    def grad_input(grad: Tensor, diagonal: int) -> Tensor:
        return grad.triu(diagonal)


def tril(input: Tensor, diagonal: int = 0) -> Tensor:
    """`torch.tril`."""
    return TrilFunction.apply(input, diagonal)


def triu(input: Tensor, diagonal: int = 0) -> Tensor:
    """`torch.triu`."""
    return TriuFunction.apply(input, diagonal)


class ContiguousFunction(Rule):
    r"""y = x, in contiguous memory      ∂L/∂x = g"""

    supports_complex = True

    def forward(input: Tensor, memory_format: torch.memory_format) -> Tensor:
        return input.contiguous(memory_format=memory_format)

    def grad_input(grad: Tensor) -> Tensor:
        return grad


class CloneFunction(Rule):
    r"""y = x      ∂L/∂x = g"""

    supports_complex = True

    def forward(input: Tensor) -> Tensor:
        return input.clone()

    def grad_input(grad: Tensor) -> Tensor:
        return grad


class ToFunction(Rule):
    r"""y = x in another dtype      ∂L/∂x = g in the dtype of x"""

    upcast_gradients = False

    def forward(input: Tensor, dtype: torch.dtype, input_dtype: torch.dtype) -> Tensor:
        return input.to(dtype)

    def grad_input(grad: Tensor, input_dtype: torch.dtype) -> Tensor:
        return grad.to(input_dtype)


def contiguous(input: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """`torch.Tensor.contiguous`."""
    return ContiguousFunction.apply(input, memory_format)


def clone(input: Tensor, *, memory_format: torch.memory_format | None = None) -> Tensor:
    """`torch.clone`."""
    return CloneFunction.apply(input)


def to_dtype(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.Tensor.to`, for a dtype."""
    dtype = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), input.dtype)
    return ToFunction.apply(input, dtype, input.dtype) if dtype != input.dtype else CloneFunction.apply(input)


def copy_values(input: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What `torch.Tensor.copy_` writes into the input: the source in its dtype and shape."""
    source = source if source.dtype == input.dtype else to_dtype(source, input.dtype)
    return source if source.shape == input.shape else expand(source, input.shape)


def type_as(input: Tensor, other: Tensor) -> Tensor:
    """`torch.Tensor.type_as`."""
    return to_dtype(input, other.dtype)


_EXPECTED_FAILURES = {
    **{
        name: {
            "jacobians_and_hessians": "torch computes forward mode inside a transform wrongly if the output of a "
            "Function is a view"
        }
        for name in ("select", "unbind")
    },
    "view": {"noncontiguous_inputs-0": "as in torch: view does not copy, so it raises an error for such strides"},
    **dict.fromkeys(
        ("expand", "expand_as", "broadcast_tensors", "repeat_interleave"),
        dict.fromkeys(
            (
                "forward_mode",
                "jvp_matches_backward",
                "forward_over_reverse",
                "reverse_over_forward",
                "forward_over_forward",
                "second_order",
                "third_order",
                "fourth_order",
                "jacobians_and_hessians",
            ),
            "if its output is a view, a Function must not return a tangent with repeated memory",
        ),
    ),
}

for _function, _samples in {
    view: lambda t: [SampleInput(t(2, 6), (3, 4)), SampleInput(t(4), 2, -1)],
    reshape: lambda t: [SampleInput(t(2, 6), (3, 4)), SampleInput(t(3, 2).mT.detach(), (6,))],
    flatten: lambda t: [SampleInput(t(2, 3, 2), 1), SampleInput(t(2, 3))],
    unflatten: lambda t: [SampleInput(t(2, 6), -1, (3, 2))],
    unsqueeze: lambda t: [SampleInput(t(2, 3), 1), SampleInput(t(2, 3), -1)],
    squeeze: lambda t: [SampleInput(t(2, 1, 3), 1), SampleInput(t(2, 1, 1)), SampleInput(t(1, 2, 1), (0, 2))],
    transpose: lambda t: [SampleInput(t(2, 3, 4), 0, -1)],
    t: lambda t: [SampleInput(t(2, 3)), SampleInput(t(3))],
    permute: lambda t: [SampleInput(t(2, 3, 4), (2, 0, 1)), SampleInput(t(2, 3), (-1, 0))],
    movedim: lambda t: [SampleInput(t(2, 3, 4), 0, -1)],
    expand: lambda t: [SampleInput(t(2, 1), (3, 2, 4)), SampleInput(t(3, 1), (-1, 2))],
    expand_as: lambda t: [SampleInput(t(2, 1), torch.zeros(2, 3))],
    broadcast_tensors: lambda t: [SampleInput(t(2, 1), t(1, 3))],
    repeat: lambda t: [SampleInput(t(2, 3), (2, 1, 2))],
    repeat_interleave: lambda t: [SampleInput(t(2, 3), 2, 1), SampleInput(t(2, 3), 2)],
    select: lambda t: [SampleInput(t(2, 3, 4), 1, -1)],
    narrow: lambda t: [SampleInput(t(5, 3), 0, 1, 3)],
    split: lambda t: [SampleInput(t(5, 3), 2), SampleInput(t(3, 5), [1, 4], 1)],
    split_with_sizes: lambda t: [SampleInput(t(5, 3), [2, 3])],
    chunk: lambda t: [SampleInput(t(5, 3), 2)],
    unbind: lambda t: [SampleInput(t(2, 3), 1)],
    flip: lambda t: [SampleInput(t(2, 3), (0, 1))],
    roll: lambda t: [SampleInput(t(2, 3), 1, 1), SampleInput(t(3, 2), (1, -1), (0, 1))],
    tril: lambda t: [SampleInput(t(3, 4)), SampleInput(t(2, 3, 3), -1)],
    triu: lambda t: [SampleInput(t(3, 4), 1)],
    contiguous: lambda t: [SampleInput(t(3, 2).mT.detach())],
    clone: lambda t: [SampleInput(t(3, 2))],
    type_as: lambda t: [SampleInput(t(3, 2), torch.zeros(1, dtype=torch.float64))],
}.items():
    register(
        _function,
        reference=getattr(torch, _function.__name__, None) or getattr(Tensor, _function.__name__),
        sample_inputs=_samples,
        benchmark_input=lambda t, samples=_samples: samples(t)[0],
        expected_failures=_EXPECTED_FAILURES.get(_function.__name__),
        in_graphs_only=True,
    )

to_dtype.__name__ = "to"
register(
    to_dtype,
    reference=Tensor.to,
    sample_inputs=lambda t: [SampleInput(t(3, 2), torch.float64)],
    benchmark_input=lambda t: SampleInput(t(512, 512), torch.float32),
    in_graphs_only=True,
)
