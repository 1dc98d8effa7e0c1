"""The gradient flows to the elements that the forward selected, even if rounding or the kernel decides which.

The oracle is the forward itself: its output for an input in which each element is its own index, or its Jacobian
if it is linear.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import manualgrad.nn.functional as F


def expected_gradient(select: Callable[[Tensor], Tensor], input: Tensor, upstream: Tensor) -> Tensor:
    """For each element of the input, the sum of the upstream gradients of the outputs that select it.

    Each index passes through `select` in digits that every dtype represents. Index 0 stands for no element.
    """
    indices = torch.arange(1, input.numel() + 1).reshape(input.shape)
    selected = torch.zeros(upstream.shape, dtype=torch.int64)
    for shift in (0, 8, 16):
        digit = torch.empty_like(input).copy_(indices >> shift & 255)
        selected += select(digit).long() << shift
    sums = torch.zeros(input.numel() + 1, dtype=torch.float64)
    return sums.index_add(0, selected.flatten(), upstream.double().flatten())[1:].reshape(input.shape)


def assert_gradient_matches_selection(
    function: Callable[..., Tensor], reference: Callable[[Tensor], Tensor], input: Tensor
) -> None:
    output = function(input.requires_grad_())
    upstream = torch.randint(-8, 9, output.shape).to(output.dtype)  # sums of these are exact
    (found,) = torch.autograd.grad(output, input, upstream)
    assert torch.equal(found.double(), expected_gradient(reference, input.detach(), upstream))


NEAREST: list[tuple[Any, ...]] = [
    (torch.float32, (1, 1, 64, 12), {"scale_factor": 2.01}),  # to twice the size, but the factor is not 2
    (torch.float32, (1, 3, 104, 65), {"scale_factor": (1.001, 1.17)}),  # to the same size
    (torch.float64, (1, 1, 48, 55), {"size": (76, 125)}),
    (torch.float64, (1, 1, 26, 109), {"size": (88, 113)}),
    (torch.float64, (1, 5, 26, 109), {"size": (88, 113)}),  # channels_last uses another kernel
    (torch.float64, (2, 4, 48, 55), {"size": (76, 50)}),
    (torch.float64, (2, 2, 611), {"scale_factor": 1.37}),
    (torch.float64, (1, 5, 20, 15, 26), {"size": (24, 19, 88)}),
    (torch.float32, (1, 2, 9, 40), {"scale_factor": (2, 1.61), "recompute_scale_factor": True}),
    (torch.bfloat16, (1, 2, 300, 7), {"scale_factor": (0.83, 3)}),
    (torch.float16, (1, 1, 40, 60), {"scale_factor": 1 / 3}),
]


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize(("dtype", "shape", "settings"), NEAREST)
def test_interpolate(dtype: torch.dtype, shape: tuple[int, ...], settings: dict[str, Any], mode: str) -> None:
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
    for layout in {torch.contiguous_format, form}:
        input = torch.randn(shape).to(dtype).contiguous(memory_format=layout)

        def resize(x: Tensor, function: Callable[..., Tensor] = torch.nn.functional.interpolate) -> Tensor:
            return function(x, mode=mode, **settings)

        assert_gradient_matches_selection(lambda x: resize(x, F.interpolate), resize, input)


def test_interpolate_compiled() -> None:
    """A compiled forward selects other pixels than the kernel. Its gradient flows to those."""
    compiled = torch.compile(lambda x: F.interpolate(x, (88, 113)), backend="aot_eager", fullgraph=True)
    assert_gradient_matches_selection(compiled, compiled, torch.randn(1, 1, 26, 109, dtype=torch.float64))


def test_interpolate_under_vmap() -> None:
    batched = torch.vmap(lambda x: F.interpolate(x, (88, 113)), 3, 1)
    assert_gradient_matches_selection(batched, batched, torch.randn(1, 5, 26, 2, 109, dtype=torch.float64))


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_sample(padding: str, aligned: bool, axes: int) -> None:
    """These grids often have points in the middle between two pixels."""
    for dtype, scale, n in itertools.product((torch.float32, torch.float64), (1, 0.5, -1.5), (2, 7)):
        theta = scale * torch.eye(axes, axes + 1, dtype=dtype).unsqueeze(0)
        grid = F.affine_grid(theta, [1, 1, 12, 9, 5][: axes + 2], align_corners=not aligned)
        settings: dict[str, Any] = {"mode": "nearest", "padding_mode": padding, "align_corners": aligned}
        assert_gradient_matches_selection(
            lambda x, grid=grid, settings=settings: F.grid_sample(x, grid, **settings),
            lambda x, grid=grid, settings=settings: torch.nn.functional.grid_sample(x, grid, **settings),
            torch.randn((1, 2, n, 13, 4)[: axes + 2], dtype=dtype),
        )


BAGS = [[0, 2, 5], [0, 2, 2, 5], [0, 2, 5, 5], [0, 0, 0], [0, 2, 7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False)])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "strided"])
@pytest.mark.parametrize("padding", [None, 9])
def test_embedding_bag_after_the_last_offset(
    dtype: torch.dtype, mode: str, weighted: bool, dense: bool, padding: int | None
) -> None:
    """Some kernels add these entries to the last bag, one ignores them. The gradient agrees with the value."""
    index = torch.tensor([2, 1, 4, 3, 2, 9, 7])
    rows = torch.eye(10, dtype=dtype) if dense else torch.eye(10, dtype=dtype).T
    scale = torch.tensor([1.0, 2, 4, 1, 2, 4, 8], dtype=dtype) if weighted else None
    rounding = 8 * torch.finfo(dtype).eps
    for bags, sparse in itertools.product(BAGS, (False, True)):
        offsets = torch.tensor(bags)

        def summed(rows: Tensor, scale: Tensor | None, sparse: bool, offsets: Tensor = offsets) -> Tensor:
            settings: dict[str, Any] = {"include_last_offset": True, "padding_idx": padding}
            return F.embedding_bag(
                index, rows, offsets, mode=mode, sparse=sparse, per_sample_weights=scale, **settings
            )

        with torch.no_grad():  # linear in both: with an identity matrix, the value is the Jacobian
            jacobian = summed(rows, scale, False)
            scale_jacobian = [summed(rows, one, False) for one in torch.eye(7, dtype=dtype)] if weighted else []
        leaves = [x for x in (rows, scale) if x is not None]
        leaves = [x.clone().requires_grad_() for x in leaves]
        output = summed(leaves[0], leaves[1] if weighted else None, sparse)
        upstream = torch.randint(-8, 9, output.shape).to(dtype)
        found = torch.autograd.grad(output, leaves, upstream)
        assert_close(found[0].to_dense(), jacobian.mT @ upstream, rtol=rounding, atol=rounding)
        if weighted:
            assert_close(found[1], torch.stack([(one * upstream).sum() for one in scale_jacobian]))


def test_embedding_bag_with_invalid_indices_after_the_last_offset() -> None:
    """An entry that the value ignores may be an invalid index. (torch's backward writes out of bounds.)"""
    weight = torch.randn(10, 4, requires_grad=True)
    index, offsets = torch.tensor([2, 1, 4, 99, -1]), torch.tensor([0, 2, 3])
    scale = torch.ones(5, requires_grad=True)
    output = F.embedding_bag(
        index, weight, offsets, mode="sum", per_sample_weights=scale, include_last_offset=True
    )
    found = torch.autograd.grad(output.sum(), (weight, scale))
    assert found[0].sum(1).tolist() == [0, 4, 4, 0, 4, 0, 0, 0, 0, 0]
    assert_close(found[1][:3], weight.detach()[index[:3]].sum(1))
    assert found[1][3:].tolist() == [0, 0]


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 0, 2])
def test_scale_grad_by_freq_counts_each_row(mode: str, padding: int | None) -> None:
    """``scale_grad_by_freq`` divides each row by its number of occurrences. (torch before 2.14 counts another
    row.)"""
    index = torch.tensor([[0, 2, 2, 1], [3, 2, 0, 0]])
    gradients = []
    for scaled in (True, False):
        weight = torch.arange(12, dtype=torch.float64).reshape(4, 3).requires_grad_()
        output = F.embedding_bag(index, weight, mode=mode, scale_grad_by_freq=scaled, padding_idx=padding)
        gradients += torch.autograd.grad(output.sum(), weight)
    counts = torch.bincount(index.flatten()).unsqueeze(1)
    assert_close(gradients[0], gradients[1] / counts)
