"""Operators of whole-model programs that read or write at indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manualgrad.ops.shapes import Shape, sum_to_shape
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule


class GatherFunction(Rule):
    r"""y[i] = x[k(i)] along an axis      ∂L/∂x[j] = Σ g[i] over k(i) = j"""

    supports_complex = True

    def forward(input: Tensor, axis: int, index: Tensor, input_shape: Shape) -> Tensor:
        return torch.gather(input, axis, index)

    def grad_input(grad: Tensor, axis: int, index: Tensor, input_shape: Shape) -> Tensor:
        return grad.new_zeros(input_shape).scatter_add(axis, index, grad)


class IndexSelectFunction(Rule):
    r"""y[i] = x[k(i)] for slices along an axis      ∂L/∂x[j] = Σ g[i] over k(i) = j"""

    supports_complex = True

    def forward(input: Tensor, axis: int, index: Tensor, input_shape: Shape) -> Tensor:
        return torch.index_select(input, axis, index)

    def grad_input(grad: Tensor, axis: int, index: Tensor, input_shape: Shape) -> Tensor:
        return grad.new_zeros(input_shape).index_add(axis, index, grad)


class IndexFunction(Rule):
    r"""y[i] = x[k(i), l(i), ...] with tensors of indices      ∂L/∂x[j] = Σ g[i] over (k(i), l(i), ...) = j

    Axis 1, ... may have no index: ``present`` has the axes that have one. Then whole slices are taken.
    """

    supports_complex = True

    def forward(
        input: Tensor,
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        present: Shape,
        input_shape: Shape,
    ) -> Tensor:
        return input[_subscript(first, second, third, present)]

    def grad_input(
        grad: Tensor,
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        present: Shape,
        input_shape: Shape,
    ) -> Tensor:
        indices = _indices(first, second, third, present)
        return torch.ops.aten.index_put(grad.new_zeros(input_shape), indices, grad, True)


def _indices(first: Tensor, second: Tensor | None, third: Tensor | None, present: Shape) -> list[Tensor | None]:
    """The tensor or None for each axis."""
    given = iter((first, second, third))
    return [next(given) if axis in present else None for axis in range(present[-1] + 1)]


def _subscript(first: Tensor, second: Tensor | None, third: Tensor | None, present: Shape) -> tuple[Any, ...]:
    return tuple(slice(None) if x is None else x for x in _indices(first, second, third, present))


class ScatterFunction(Rule):
    r"""y = x, but y[k(i)] = s[i] along an axis      ∂L/∂x = g, 0 at each k(i)      ∂L/∂s[i] = g[k(i)]

    The indices must differ: torch does not define which of several values is written.
    """

    supports_complex = True

    def forward(input: Tensor, axis: int, index: Tensor, source: Tensor) -> Tensor:
        return torch.scatter(input, axis, index, source)

    def grad_input(grad: Tensor, axis: int, index: Tensor) -> Tensor:
        return torch.scatter(grad, axis, index, 0)

    def grad_source(grad: Tensor, axis: int, index: Tensor) -> Tensor:
        return torch.gather(grad, axis, index)


class ScatterAddFunction(Rule):
    r"""y[j] = x[j] + Σ s[i] over k(i) = j, along an axis      ∂L/∂x = g      ∂L/∂s[i] = g[k(i)]"""

    supports_complex = True

    def forward(input: Tensor, axis: int, index: Tensor, source: Tensor) -> Tensor:
        return torch.scatter_add(input, axis, index, source)

    def grad_input(grad: Tensor) -> Tensor:
        return grad

    def grad_source(grad: Tensor, axis: int, index: Tensor) -> Tensor:
        return torch.gather(grad, axis, index)


class IndexAddFunction(Rule):
    r"""y[j] = x[j] + Σ s[i] over k(i) = j, for slices along an axis      ∂L/∂x = g      ∂L/∂s[i] = g[k(i)]"""

    supports_complex = True

    def forward(input: Tensor, axis: int, index: Tensor, source: Tensor) -> Tensor:
        return torch.index_add(input, axis, index, source)

    def grad_input(grad: Tensor) -> Tensor:
        return grad

    def grad_source(grad: Tensor, axis: int, index: Tensor) -> Tensor:
        return torch.index_select(grad, axis, index)


class IndexPutFunction(Rule):
    r"""y = x, but y[k(i), l(i), ...] = v[i]      ∂L/∂x = g, 0 at each index      ∂L/∂v[i] = g[k(i), l(i), ...]

    The indices must differ: torch does not define which of several values is written.
    """

    supports_complex = True

    def forward(
        input: Tensor,
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        values: Tensor,
        present: Shape,
        values_shape: Shape,
    ) -> Tensor:
        return torch.ops.aten.index_put(input, _indices(first, second, third, present), values)

    def grad_input(
        grad: Tensor, first: Tensor, second: Tensor | None, third: Tensor | None, present: Shape
    ) -> Tensor:
        return torch.ops.aten.index_put(grad, _indices(first, second, third, present), grad.new_zeros(()))

    def grad_values(
        grad: Tensor,
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        present: Shape,
        values_shape: Shape,
    ) -> Tensor:
        return sum_to_shape(grad[_subscript(first, second, third, present)], values_shape)


class IndexPutAddFunction(IndexPutFunction):
    r"""y[j] = x[j] + Σ v[i] over (k(i), l(i), ...) = j      ∂L/∂x = g      ∂L/∂v[i] = g[k(i), l(i), ...]"""

    def forward(
        input: Tensor,
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        values: Tensor,
        present: Shape,
        values_shape: Shape,
    ) -> Tensor:
        return torch.ops.aten.index_put(input, _indices(first, second, third, present), values, True)

    def grad_input(grad: Tensor) -> Tensor:
        return grad


class SelectScatterFunction(Rule):
    r"""y = x, but s at one index of an axis      ∂L/∂x = g, 0 there      ∂L/∂s = g there"""

    supports_complex = True

    def forward(input: Tensor, source: Tensor, axis: int, index: int, source_shape: Shape) -> Tensor:
        return torch.select_scatter(input, source, axis, index)

    def grad_input(grad: Tensor, axis: int, index: int, source_shape: Shape) -> Tensor:
        return torch.select_scatter(grad, grad.new_zeros(source_shape), axis, index)

    def grad_source(grad: Tensor, axis: int, index: int) -> Tensor:
        return grad.select(axis, index)


class SliceScatterFunction(Rule):
    r"""y = x, but s at the indices start, start + step, ... < end      ∂L/∂x = g, 0 there      ∂L/∂s = g there"""

    supports_complex = True

    def forward(
        input: Tensor,
        source: Tensor,
        axis: int,
        start: int | None,
        end: int | None,
        step: int,
        source_shape: Shape,
    ) -> Tensor:
        return torch.slice_scatter(input, source, axis, start, end, step)

    def grad_input(
        grad: Tensor, axis: int, start: int | None, end: int | None, step: int, source_shape: Shape
    ) -> Tensor:
        return torch.slice_scatter(grad, grad.new_zeros(source_shape), axis, start, end, step)

    def grad_source(grad: Tensor, axis: int, start: int | None, end: int | None, step: int) -> Tensor:
        return torch.ops.aten.slice(grad, axis, start, end, step)


def gather(input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """`torch.gather`."""
    return GatherFunction.apply(input, dim, index, tuple(input.shape))


def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """`torch.index_select`."""
    return IndexSelectFunction.apply(input, dim, index, tuple(input.shape))


def index(input: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """The operator aten.index: ``input[indices]`` with up to three tensors of integers or booleans."""
    given = [x for x in indices if x is not None]
    if len(given) > 3:
        raise NotImplementedError("indexing with more than three tensors")
    present = tuple(axis for axis, x in enumerate(indices) if x is not None)
    return IndexFunction.apply(input, *given, *[None] * (3 - len(given)), present, tuple(input.shape))


def index_put(input: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """`torch.index_put`, with up to three tensors of integers or booleans."""
    given = [x for x in indices if x is not None]
    if len(given) > 3:
        raise NotImplementedError("indexing with more than three tensors")
    present = tuple(axis for axis, x in enumerate(indices) if x is not None)
    rule = IndexPutAddFunction if accumulate else IndexPutFunction
    return rule.apply(input, *given, *[None] * (3 - len(given)), values, present, tuple(values.shape))


def take_along_dim(input: Tensor, indices: Tensor, dim: int) -> Tensor:
    """`torch.take_along_dim`, with indices that have the shape of the input except along the axis."""
    return gather(input, dim, indices)


def scatter(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """`torch.scatter`, of a tensor with as many elements as the index."""
    return ScatterFunction.apply(input, dim, index, src)


def scatter_add(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """`torch.scatter_add`, of a tensor with as many elements as the index."""
    return ScatterAddFunction.apply(input, dim, index, src)


def index_add(input: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """`torch.index_add`."""
    return IndexAddFunction.apply(input, dim, index, source)


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """`torch.select_scatter`."""
    return SelectScatterFunction.apply(input, src, dim, index, tuple(src.shape))


def slice_scatter(
    input: Tensor, src: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """`torch.slice_scatter`."""
    return SliceScatterFunction.apply(input, src, dim, start, end, step, tuple(src.shape))


def _register(
    function: Callable[..., Any], samples: Callable[[Any], Sequence[SampleInput]], **options: Any
) -> None:
    register(
        function,
        sample_inputs=samples,
        benchmark_input=lambda t: samples(t)[0],
        in_graphs_only=True,
        **options,
    )


_register(gather, lambda t: [SampleInput(t(3, 4), 1, t.index(4, 3, 2)), SampleInput(t(3, 4), 0, t.index(3, 5, 4))])
_register(index_select, lambda t: [SampleInput(t(3, 4), 1, t.index(4, 6))])
_register(
    index,
    lambda t: [
        SampleInput(t(3, 4), [t.index(3, 5)]),
        SampleInput(t(3, 4, 2), [None, t.index(4, 5), t.index(2, 5)]),
    ],
    reference=torch.ops.aten.index,
)
_register(
    index_put,
    lambda t: [
        SampleInput(t(3, 4), [torch.tensor([2, 0])], t(2, 4)),
        SampleInput(t(3, 4, 2), [None, torch.tensor([1, 3, 0]), torch.tensor([0, 0, 1])], t(3)),
        SampleInput(t(3, 4), [t.index(3, 5), t.index(4, 5)], t(5), True),
    ],
    reference=torch.ops.aten.index_put,
)
_register(take_along_dim, lambda t: [SampleInput(t(3, 4), t.index(4, 3, 2), 1)])
_register(scatter, lambda t: [SampleInput(t(3, 4), 1, torch.tensor([[0, 2], [1, 3], [3, 0]]), t(3, 2))])
_register(scatter_add, lambda t: [SampleInput(t(3, 4), 1, t.index(4, 3, 2), t(3, 2))])
_register(index_add, lambda t: [SampleInput(t(3, 4), 1, t.index(4, 2), t(3, 2))])
_register(select_scatter, lambda t: [SampleInput(t(3, 4), t(3), 1, 2)])
_register(slice_scatter, lambda t: [SampleInput(t(3, 4), t(3, 2), 1, 1, 3)])
