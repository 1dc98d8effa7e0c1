"""Attention, and the transformers made of it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import choose, drop_in, plus, times
from manualgrad.registry import Call, Maker, register
from manualgrad.rule import LOWER, Rule


class AttentionFunction(Rule):
    r"""y = P V,   P = softmax(S) along rows,   S = σ Q Kᵀ + M        Q: (*, L, E)   K: (*, S, E)   V: (*, S, F)

    dy = dP V + P dV                          ∂L/∂V = Pᵀ g            ∂L/∂P = g Vᵀ
    dP = P ∘ (dS - Σ P dS)                    ∂L/∂S = P ∘ (g Vᵀ - δ),   δ = Σ P ∘ (g Vᵀ) = Σ g y  (of each row)
    dS = σ dQ Kᵀ + σ Q dKᵀ + dM               ∂L/∂Q = σ (∂L/∂S) K     ∂L/∂K = σ (∂L/∂S)ᵀ Q    ∂L/∂M = ∂L/∂S

    P is not kept but computed anew. A row that M excludes altogether has y = 0, and sends nothing.

    Vaswani et al., "Attention Is All You Need", 2017; Dao et al., "FlashAttention", 2022.
    """

    autocast = LOWER

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        shared: bool,
    ) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=shared)

    def heads(query: Tensor, key: Tensor, shared: bool) -> int:
        """How many heads of queries each head of keys and values serves."""
        return query.shape[-3] // key.shape[-3] if shared else 1

    def keys(key: Tensor, heads: int) -> Tensor:
        return _each(key, heads)

    def values(value: Tensor, heads: int) -> Tensor:
        return _each(value, heads)

    def sigma(query: Tensor, scale: float | None) -> float:
        return 1 / math.sqrt(query.shape[-1]) if scale is None else scale

    def added(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
        """M: 0 where attended, -∞ where not."""
        if causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if mask is None or mask.is_floating_point():
            return mask
        return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -math.inf)

    def attended(added: Tensor | None, causal: bool) -> Tensor | None:
        """The rows that attend to anything, unless all do."""
        return None if added is None or causal else (added > -math.inf).any(-1, keepdim=True)

    def probability(
        query: Tensor, keys: Tensor, sigma: float, added: Tensor | None, attended: Tensor | None
    ) -> Tensor:
        scores = (query * sigma) @ keys.mT
        if added is not None:
            scores = plus(scores, added if attended is None else choose(attended.expand_as(added), added))
        return torch.softmax(scores, -1)

    def kept() -> Tensor | None:
        return None

    def sent(grad: Tensor, attended: Tensor | None) -> Tensor:
        return grad if attended is None else choose(attended.expand_as(grad), grad)

    def sent_to_scores(
        sent: Tensor, output: Tensor, values: Tensor, probability: Tensor, kept: Tensor | None
    ) -> Tensor:
        along = sent @ values.mT if kept is None else kept * (sent @ values.mT)
        return times(along - (sent * output).sum(-1, keepdim=True), probability)

    def grad_query(sent_to_scores: Tensor, query: Tensor, keys: Tensor, sigma: float) -> Tensor:
        return _summed(sent_to_scores @ keys * sigma, query.shape)

    def grad_key(sent_to_scores: Tensor, query: Tensor, key: Tensor, heads: int, sigma: float) -> Tensor:
        return _gathered(sent_to_scores.mT @ (query * sigma), heads, key.shape)

    def grad_value(sent: Tensor, value: Tensor, probability: Tensor, kept: Tensor | None, heads: int) -> Tensor:
        weight = probability if kept is None else kept * probability
        return _gathered(weight.mT @ sent, heads, value.shape)

    def grad_mask(sent_to_scores: Tensor, mask: Tensor) -> Tensor:
        return _summed(sent_to_scores, mask.shape).to(mask.dtype)


def _each(tensor: Tensor, heads: int) -> Tensor:
    """Each head of a tensor (*, H, S, E) so many times over."""
    if heads == 1:
        return tensor
    repeated = tensor.unsqueeze(-3).expand(*tensor.shape[:-2], heads, *tensor.shape[-2:])
    return repeated.reshape(*tensor.shape[:-3], tensor.shape[-3] * heads, *tensor.shape[-2:])


def _gathered(tensor: Tensor, heads: int, shape: torch.Size) -> Tensor:
    """The adjoint of `_each`."""
    if heads > 1:
        tensor = tensor.reshape(*tensor.shape[:-3], tensor.shape[-3] // heads, heads, *tensor.shape[-2:]).sum(-3)
    return _summed(tensor, shape)


def _summed(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The adjoint of broadcasting from a shape."""
    extra = tensor.dim() - len(shape)
    axes = [i for i, n in enumerate(tensor.shape) if i < extra or (shape[i - extra] == 1 and n != 1)]
    return tensor.sum(axes, keepdim=True).reshape(shape) if axes else tensor


class DroppedAttentionFunction(AttentionFunction):
    r"""y = (k ∘ P) V,   k: 1 / (1 - p) with probability 1 - p, else 0        (drawn in the forward: a constant)

    ∂L/∂V = (k ∘ P)ᵀ g            ∂L/∂P = k ∘ (g Vᵀ),  and again  δ = Σ g y
    """

    statistics = ("drawn",)

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        shared: bool,
        p: float,
    ) -> tuple[Tensor, Tensor]:
        output, weight = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, mask, p, causal, None, scale=scale, enable_gqa=shared
        )
        return output, weight != 0  # where P itself is 0, k counts for nothing

    def kept(drawn: Tensor, probability: Tensor, p: float) -> Tensor:
        return drawn.to(probability.dtype) * (0 if p == 1 else 1 / (1 - p))


@drop_in
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ / √E + M) V, as `torch.nn.functional.scaled_dot_product_attention`.

    Shapes: query (*, L, E), key (*, S, E), value (*, S, F), attn_mask broadcastable to (*, L, S), of booleans
    (true: attend) or numbers to add; the result (*, L, F). With `enable_gqa` heads of keys and values (axis -3)
    serve several heads of queries.

    Raises:
        RuntimeError: tensors that do not fit, both a mask and `is_causal`, or a negative probability.
    """
    if dropout_p < 0:
        raise RuntimeError(f"dropout probability must be between 0 and 1, but is {dropout_p}")
    if dropout_p > 0:
        return DroppedAttentionFunction.apply(
            query, key, value, attn_mask, is_causal, scale, enable_gqa, dropout_p
        )
    return AttentionFunction.apply(query, key, value, attn_mask, is_causal, scale, enable_gqa)


register(
    scaled_dot_product_attention,
    samples=lambda t: [
        Call(t(2, 1, 3, 2), t(2, 1, 4, 2), t(2, 1, 4, 2), is_causal=True),
        Call(t(2, 3, 2), t(2, 4, 2), t(2, 4, 3), t(3, 4), scale=0.5),
        Call(t(1, 4, 3, 2), t(1, 2, 3, 2), t(1, 2, 3, 2), enable_gqa=True),
        Call(t(2, 3, 2), t(2, 3, 2), t(2, 3, 2), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()),
    ],
    big=lambda t: Call(t(2, 8, 256, 64), t(2, 8, 256, 64), t(2, 8, 256, 64), is_causal=True),
    special=False,  # a row that nothing attends to still multiplies what it holds by 0
    lacks=dict.fromkeys(
        ("special_values-0", "special_values-2", "special_values-3"),
        "an infinite query or key has weight 0 at last, and products with it are 0 · ∞ = nan",
    ),
)


def _multi_head(
    t: Maker, query: Tensor, key: Tensor, *, separate: bool = False, bias: bool = True, **more: Any
) -> Call:
    """A call with weights of the sizes that query and key ask for."""
    e, k = query.shape[-1], key.shape[-1]
    if separate:
        more |= {"q_proj_weight": t(e, e), "k_proj_weight": t(e, k), "v_proj_weight": t(e, k)}
    affine = (None if separate else t(3 * e, e), t(3 * e) if bias else None)
    extra = (t(1, 1, e), t(1, 1, e), True) if more.pop("extra", False) else (None, None, False)
    out = (t(e, e), t(e) if bias else None)
    more["use_separate_proj_weight"] = separate
    return Call(query, key, key, e, more.pop("heads", 2), *affine, *extra, 0.0, *out, **more)


register(
    "multi_head_attention_forward",
    samples=lambda t: [
        _multi_head(t, t(2, 1, 2), t(3, 1, 2), heads=1),
        _multi_head(t, t(4, 2), t(3, 3), separate=True, bias=False, need_weights=False),
        _multi_head(t, t(4, 2), t(3, 2), attn_mask=t.fixed(4, 3), average_attn_weights=False, bias=False),
    ],
    big=lambda t: _multi_head(t, t(128, 8, 256), t(128, 8, 256), heads=8, need_weights=False),
    special=False,  # as above
)
