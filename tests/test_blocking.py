"""Blocks of rows give the same gradients as whole tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import manualgrad.nn.functional as F
from manualgrad import blocking
from manualgrad.ops import attention
from manualgrad.rule import function as rule_function


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "block_size", 6)
    monkeypatch.setattr(rule_function, "MIN_ELEMENTS_FOR_REUSE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def pointwise(input: Tensor, slope: float, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad * slope * input.cos(), None


def normalized(input: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A normalization along the last axis, with one statistic per row."""
    z = input.reshape(-1, input.shape[-1]) * rstd
    h = grad.reshape(-1, grad.shape[-1])
    along = (h * z * weight).mean(-1, keepdim=True)
    return ((h * weight - z * along) * rstd).reshape(grad.shape), (h * z).sum(0), None


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(100,), (1, 50), (7, 9), (3, 2, 5, 4)])
def test_elementwise_formula(shape: tuple[int, ...], form: torch.memory_format) -> None:
    if len(shape) != 4 and form is torch.channels_last:
        pytest.skip("channels_last needs 4 axes")
    input, grad = (torch.randn(shape).to(memory_format=form) for _ in range(2))
    sizes: list[int] = []

    def compute(*args: Any) -> tuple[Tensor | None, ...]:
        sizes.append(args[-1].numel())
        return pointwise(*args)

    assert blocking.is_worthwhile(grad)
    found = blocking.compute_in_blocks(compute, (input, 0.5, grad), grad.dim())
    expected = pointwise(input, 0.5, grad)
    assert found is not None
    assert found[0] is not None
    assert found[0].stride() == grad.stride()
    assert_close(found, expected, rtol=0, atol=0)
    assert len(sizes) > 1
    assert max(sizes) <= 12


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(30, 4), (2, 5, 4), (1, 2, 9, 4), (5, 1, 40)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_formula_of_rows_with_sums(shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    input, grad, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    rstd = torch.rand(input.numel() // shape[-1], 1)
    dtypes = None if dtype is None else (dtype, dtype, None)
    found = blocking.compute_in_blocks(normalized, (input, weight, rstd, grad), grad.dim() - 1, {2}, dtypes)
    expected = normalized(input, weight, rstd, grad)
    assert found is not None
    assert_close(found, tuple(x if x is None or dtype is None else x.to(dtype) for x in expected))


@pytest.mark.usefixtures("small_blocks")
def test_sum_is_rounded_once() -> None:
    grad = torch.full((4000,), 1.0)
    found = blocking.compute_in_blocks(
        lambda grad: (None, grad.sum(0)), (grad[:, None],), 1, (), (None, torch.bfloat16)
    )
    assert found is not None
    assert found[1] is not None
    assert found[1].tolist() == [4000.0]  # a sum in bfloat16 stops at 256


@pytest.mark.usefixtures("small_blocks")
def test_weight_with_as_many_elements_as_rows_is_shared() -> None:
    input, grad, weight, rstd = torch.randn(9, 9), torch.randn(9, 9), torch.randn(9), torch.rand(9, 1)
    found = blocking.compute_in_blocks(normalized, (input, weight, rstd, grad), 1, {2})
    assert found is not None
    assert_close(found, normalized(input, weight, rstd, grad))


@pytest.mark.usefixtures("small_blocks")
def test_unsuitable_layouts_are_not_split() -> None:
    grad = torch.randn(8, 6)
    for args, batch_dims in [
        ((torch.randn(6, 8).mT, 1.0, grad), 2),  # not contiguous
        ((grad, 1.0, torch.randn(()).expand(8, 6)), 2),
        ((torch.randn(8, 1), 1.0, grad), 2),
        ((torch.randn(6), 1.0, grad), 2),
        ((grad, 1.0, grad), 0),  # no rows
    ]:
        assert blocking.compute_in_blocks(pointwise, args, batch_dims) is None


def test_small_tensors_and_gpu_tensors_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not blocking.is_worthwhile(torch.zeros(1000))
    assert not blocking.is_worthwhile(torch.empty(2**30, device="meta"))
    monkeypatch.setattr(blocking, "block_size", 6)
    assert blocking.is_worthwhile(torch.zeros(1000))
    monkeypatch.setattr(blocking, "block_size", None)
    assert not blocking.is_worthwhile(torch.zeros(1000))


ATTENTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 5, 4), (2, 3, 7, 4), {}),
    ((2, 3, 9, 4), (2, 3, 5, 4), {"is_causal": True}),
    ((2, 3, 5, 4), (2, 3, 9, 4), {"is_causal": True}),
    ((3, 5, 4), (3, 7, 4), {"scale": 0.3}),
    ((2, 1, 3, 5, 4), (2, 1, 3, 7, 4), {"dropout_p": 0.4}),
    ((2, 4, 5, 4), (2, 2, 7, 4), {"enable_gqa": True}),
    ((2, 3, 5, 4), (2, 3, 7, 4), {"attn_mask": torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool().expand(2, 1, 1, 7)}),
    ((2, 3, 5, 4), (2, 3, 7, 4), {"attn_mask": torch.eye(5, 7).bool().logical_not()}),
    ((2, 3, 5, 4), (2, 3, 7, 4), {"attn_mask": torch.eye(5, 7).bool() & (torch.arange(5) != 3)[:, None]}),
    ((2, 3, 5, 4), (2, 3, 7, 4), {"attn_mask": torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7)}),
]


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_in_blocks(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, other, settings = case
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, other, other)
    )
    upstream = torch.randn(shape, dtype=torch.float64)

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        output = F.scaled_dot_product_attention(query, key, value, **settings)
        return torch.autograd.grad(output, (query, key, value), upstream)

    expected = gradients()
    blocks: list[int] = []
    weights = attention._scores_backward_into
    monkeypatch.setattr(blocking, "block_size", 10)
    monkeypatch.setattr(rule_function, "MIN_ELEMENTS_FOR_REUSE", 0)
    monkeypatch.setattr(attention, "_CAUSAL_BLOCK_ROWS", 2)
    monkeypatch.setattr(attention, "_scores_backward_into", lambda *args: blocks.append(1) or weights(*args))
    assert_close(gradients(), expected)
    assert len(blocks) > 1


def test_attention_with_broadcasting_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = (
        torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 5, 4), (1, 3, 7, 4))
    )
    expected = torch.autograd.grad(F.scaled_dot_product_attention(query, key, key).sum(), (query, key))
    monkeypatch.setattr(blocking, "block_size", 10)
    monkeypatch.setattr(rule_function, "MIN_ELEMENTS_FOR_REUSE", 0)
    found = torch.autograd.grad(F.scaled_dot_product_attention(query, key, key).sum(), (query, key))
    assert_close(found, expected)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["gelu", "hardswish", "layer_norm", "rms_norm", "softmax"])
def test_rules_in_blocks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"layer_norm": {"normalized_shape": (9,)}, "rms_norm": {"normalized_shape": (9,)}}
    settings["softmax"] = {"dim": 2}
    function = partial(getattr(F, name), **settings.get(name, {}))
    input, upstream, weight = (torch.randn(size).to(dtype) for size in ((20, 5, 9), (20, 5, 9), (9,)))
    leaves = [input.requires_grad_(), *([weight.requires_grad_()] if "norm" in name else [])]

    def gradients() -> tuple[Tensor, ...]:
        output = function(input, weight=weight) if "norm" in name else function(input)
        return torch.autograd.grad(output, leaves, upstream)

    was_split: list[bool] = []
    compute_in_blocks = blocking.compute_in_blocks

    def recorded(*args: Any) -> Any:
        found = compute_in_blocks(*args)
        was_split.append(found is not None)
        return found

    monkeypatch.setattr(blocking, "compute_in_blocks", recorded)
    found = gradients()
    assert was_split == [True]
    monkeypatch.setattr(blocking, "block_size", None)
    assert_close(found, gradients())
    assert was_split == [True]
