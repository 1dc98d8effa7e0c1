"""One formula in several ways: the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import manualgrad.nn.functional as F
from manualgrad.ops import attention

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
    weights = attention._weights
    monkeypatch.setattr(attention, "_SCORES", 20)
    monkeypatch.setattr(attention, "_ROWS", 2)
    monkeypatch.setattr(attention, "_weights", lambda *args: blocks.append(1) or weights(*args))
    assert_close(gradients(), expected)
    assert len(blocks) > 1


def test_attention_that_broadcasts_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = (
        torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 5, 4), (1, 3, 7, 4))
    )
    expected = torch.autograd.grad(F.scaled_dot_product_attention(query, key, key).sum(), (query, key))
    monkeypatch.setattr(attention, "_SCORES", 20)
    found = torch.autograd.grad(F.scaled_dot_product_attention(query, key, key).sum(), (query, key))
    assert_close(found, expected, rtol=0, atol=0)
