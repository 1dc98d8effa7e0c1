"""Attention, and the transformers made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad import fuse
from manualgrad.ops.dropout import kept_scale
from manualgrad.ops.elementary import choose, drop_in, plus, times
from manualgrad.registry import Call, Maker, register
from manualgrad.rule import LOWER, Rule, nothing_looks_on


class Part(NamedTuple):
    """What some heads and rows of an attention give and are sent."""

    query: Tensor  # σ Q
    key: Tensor
    value: Tensor
    grad: Tensor
    added: Tensor | None  # M
    drawn: Tensor | None  # where k is not 0
    factor: float  # what k is there


class AttentionFunction(Rule):
    r"""y = P V,   P = softmax(S) along rows,   S = σ Q Kᵀ + M        Q: (*, L, E)   K: (*, S, E)   V: (*, S, F)

    dy = dP V + P dV                          ∂L/∂V = Pᵀ g            ∂L/∂P = g Vᵀ
    dP = P ∘ (dS - Σ P dS)                    ∂L/∂S = P ∘ (g Vᵀ - δ),   δ = Σ P ∘ (g Vᵀ)  (of each row)
    dS = σ dQ Kᵀ + σ Q dKᵀ + dM               ∂L/∂Q = σ (∂L/∂S) K     ∂L/∂K = σ (∂L/∂S)ᵀ Q    ∂L/∂M = ∂L/∂S

    P is not kept but computed anew, on the CPU for some heads and rows at a time, which stay in the cache. A row
    that M excludes altogether has y = 0, and sends nothing. (Also δ = Σ g y. But then y would be kept, and nobody
    could write into it, which torch allows wherever it calls no fused kernel.)

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

    def dropped() -> tuple[Tensor | None, float]:
        return None, 1.0

    def part(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        added: Tensor | None,
        attended: Tensor | None,
        dropped: tuple[Tensor | None, float],
        heads: int,
        sigma: float,
    ) -> Part:
        """The whole."""
        if added is not None and attended is not None:
            added, grad = (choose(attended.expand_as(x), x) for x in (added, grad))
        return Part(query * sigma, _each(key, heads), _each(value, heads), grad, added, *dropped)

    def products(part: Part, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(∂L/∂S) K,  (∂L/∂S)ᵀ σ Q  and  (k ∘ P)ᵀ g:  together, as one P serves them all."""
        if _in_blocks(part):
            return _by_blocks(part, causal)
        weight, sent = _weights(part)
        return sent @ part.key, sent.mT @ part.query, weight.mT @ part.grad

    def grad_query(products: tuple[Tensor, Tensor, Tensor], query: Tensor, sigma: float) -> Tensor:
        return _summed(times(products[0], sigma), query.shape)

    def grad_key(products: tuple[Tensor, Tensor, Tensor], key: Tensor, heads: int) -> Tensor:
        return _gathered(products[1], heads, key.shape)

    def grad_value(products: tuple[Tensor, Tensor, Tensor], value: Tensor, heads: int) -> Tensor:
        return _gathered(products[2], heads, value.shape)

    def grad_mask(part: Part, mask: Tensor) -> Tensor:
        """By itself, as it may be as large as all scores."""
        return _summed(_weights(part)[1], mask.shape).to(mask.dtype)


def _weights(part: Part, room: Sequence[Tensor | None] = (None, None)) -> tuple[Tensor, Tensor]:
    """k ∘ P, and ∂L/∂S, in this room if some is given."""
    query, key, value, grad, added, drawn, factor = part
    scores = torch.matmul(query, key.mT, out=room[0])
    probability = torch.softmax(scores if added is None else plus(scores, added), -1, out=room[0])
    along, kept = torch.matmul(grad, value.mT, out=room[1]), None
    if drawn is not None:
        kept = drawn.to(probability.dtype) * factor
        along = times(along, kept)
    sent = times(along, probability)
    sent = plus(sent, probability, -sent.sum(-1, keepdim=True))
    return probability if kept is None else times(probability, kept), sent


_ROWS = 128
"""How many rows are in a block where a row attends to those before it alone: half of all scores are not needed."""


def _in_blocks(part: Part) -> bool:
    """Blocks are worth while (there are several, none of them tiny) and allowed (one batch, nothing looks on)."""
    query, key, value, grad, added, *_ = part
    size = fuse.size()
    scores = query.shape[-3:-1].numel() * key.shape[-2]  # of one example
    return (
        size is not None
        and query.is_cpu
        and query.dim() > 2
        and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        and scores >= size // 2
        and query.shape[:-3].numel() * scores > 2 * size
        and (added is None or added.dim() > 1)
        and nothing_looks_on(query, key, value, grad)
    )


def _by_blocks(part: Part, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, grad, added, drawn, factor = part
    batch, (length, columns) = query.shape[:-2], (query.shape[-2], key.shape[-2])
    rows = min(_ROWS, length) if causal else length
    heads = min(batch[-1], max(1, (fuse.size() or 0) // (rows * columns)))
    to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    room = query.new_empty(2, heads * rows * columns)
    masks = [x if x is None else x.expand(*batch, length, columns) for x in (added, drawn)]
    for example in product(*map(range, batch[:-1])):
        for head, row in product(range(0, batch[-1], heads), range(0, length, rows)):
            across = (*example, slice(head, head + heads))
            down = (*across, slice(row, row + rows))
            if causal:  # what comes later is not attended to
                across = (*across, slice(row + rows))
            few, seen = query[down], key[across]
            shape = (*few.shape[:2], seen.shape[1])
            added, drawn = (x if x is None else x[(*down, slice(shape[2]))] for x in masks)
            part = Part(few, seen, value[across], grad[down], added, drawn, factor)
            weight, sent = _weights(part, room[:, : math.prod(shape)].view(2, *shape).unbind())
            torch.bmm(sent, part.key, out=to_query[down])
            to_key[across].baddbmm_(sent.mT, part.query)
            to_value[across].baddbmm_(weight.mT, part.grad)
    return to_query, to_key, to_value


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

    ∂L/∂V = (k ∘ P)ᵀ g            ∂L/∂P = k ∘ (g Vᵀ)
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
        return output, weight.bool()  # where P itself is 0, k counts for nothing

    def dropped(drawn: Tensor, p: float) -> tuple[Tensor, float]:
        return drawn, kept_scale(p)


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
