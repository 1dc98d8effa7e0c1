"""Attention, and the transformers made of it."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad import blocking
from manualgrad.ops.dropout import kept_scale
from manualgrad.ops.elementary import unflatten, with_torch_errors
from manualgrad.registry import SampleInput, TensorFactory, register
from manualgrad.rule import LOWER_PRECISION, Rule, replaces

Products = tuple[Tensor, Tensor, Tensor]
Dropout = tuple[Tensor | None, float]
"""What k ∘ x is: x where the mask is true (None: everywhere), else 0, times the factor."""


class AttentionFunction(Rule):
    r"""y = P V,   P = softmax(S) along rows,   S = σ Q Kᵀ + M        Q: (*, L, E)   K: (*, S, E)   V: (*, S, F)

    dy = dP V + P dV                          ∂L/∂V = Pᵀ g            ∂L/∂P = g Vᵀ
    dP = P ∘ (dS - Σ P dS)                    ∂L/∂S = P ∘ (∂L/∂P - δ),   δ = Σ P ∘ ∂L/∂P  (of each row)
    dS = σ dQ Kᵀ + σ Q dKᵀ + dM               ∂L/∂Q = σ (∂L/∂S) K     ∂L/∂K = (∂L/∂S)ᵀ (σ Q)     ∂L/∂M = ∂L/∂S

    A row that M excludes completely has y = 0, so its gradient is 0: for it g and M are replaced by 0.

    P is not saved: the backward computes it again. (δ is also Σ g y. But if y were saved, no operation could write
    into it, which torch allows where it calls no fused kernel.)

    Vaswani et al., "Attention Is All You Need", 2017; Dao et al., "FlashAttention", 2022.
    """

    autocast = LOWER_PRECISION

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

    def sigma(query: Tensor, scale: float | None) -> float:
        return 1 / math.sqrt(query.shape[-1]) if scale is None else scale

    def n(query: Tensor, key: Tensor, shared: bool) -> int:
        """How many heads of queries share a head of keys and values."""
        return query.shape[-3] // key.shape[-3] if shared else 1

    def Q(query: Tensor, sigma: float) -> Tensor:
        """σ Q"""
        return query * sigma

    def K(key: Tensor, n: int) -> Tensor:
        return _repeat_heads(key, n)

    def V(value: Tensor, n: int) -> Tensor:
        return _repeat_heads(value, n)

    def added(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
        return _additive(_causal(query, key) if causal else mask, query)

    def attended(added: Tensor | None, causal: bool) -> Tensor | None:
        """The rows that attend to anything, None for all."""
        return None if added is None or causal else (added > -math.inf).any(-1, keepdim=True)

    def M(added: Tensor | None, attended: Tensor | None) -> Tensor | None:
        return added if added is None or attended is None else torch.where(attended, added, 0)

    def g(grad: Tensor, attended: Tensor | None) -> Tensor:
        return grad if attended is None else torch.where(attended, grad, 0)

    def k() -> Dropout:
        return None, 1.0

    def products(
        Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None, k: Dropout, g: Tensor, causal: bool
    ) -> Products:
        return products(Q, K, V, M, k, g, causal)

    def grad_query(products: Products, query: Tensor, sigma: float) -> Tensor:
        return (products[0] * sigma).sum_to_size(query.shape)

    def grad_key(products: Products, key: Tensor, n: int) -> Tensor:
        return _sum_heads(products[1], n).sum_to_size(key.shape)

    def grad_value(products: Products, value: Tensor, n: int) -> Tensor:
        return _sum_heads(products[2], n).sum_to_size(value.shape)

    def grad_mask(Q: Tensor, K: Tensor, V: Tensor, M: Tensor, k: Dropout, g: Tensor, mask: Tensor) -> Tensor:
        """By itself: it may be as large as all scores."""
        return weights(Q, K, V, M, k, g)[1].sum_to_size(mask.shape).to(mask.dtype)


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
        return output, weight.bool()  # where P itself is 0, k has no influence

    def k(drawn: Tensor, p: float) -> tuple[Tensor, float]:
        return drawn, kept_scale(p)


def weights(Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None, k: Dropout, g: Tensor) -> tuple[Tensor, Tensor]:
    """k ∘ P and ∂L/∂S"""
    S = Q @ K.mT if M is None else Q @ K.mT + M
    P = torch.softmax(S, -1)
    grad_P = dropped(g @ V.mT, k)
    delta = (P * grad_P).sum(-1, keepdim=True)
    return dropped(P, k), P * (grad_P - delta)


def dropped(x: Tensor, k: Dropout) -> Tensor:
    """k ∘ x"""
    return x if k[0] is None else x * k[0] * k[1]


def products(Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None, k: Dropout, g: Tensor, causal: bool) -> Products:
    """(∂L/∂S) K,  (∂L/∂S)ᵀ Q  and  (k ∘ P)ᵀ g"""
    kP, grad_S = weights(Q, K, V, M, k, g)
    return grad_S @ K, grad_S.mT @ Q, kP.mT @ g


@replaces(weights)
def _weights_in(
    Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None, k: Dropout, g: Tensor, space: Any = (None, None)
) -> tuple[Tensor, Tensor]:
    """The same, written into two tensors, new ones unless given."""
    S = torch.matmul(Q, K.mT, out=space[0])
    P = torch.softmax(S if M is None else S + M if space[0] is None else S.add_(M), -1, out=space[0])
    grad_P = torch.matmul(g, V.mT, out=space[1])
    kept = None if k[0] is None else k[0].to(P.dtype) * k[1]
    grad_P = grad_P if kept is None else grad_P.mul_(kept)
    grad_S = grad_P.mul_(P)
    grad_S = grad_S.addcmul_(P, grad_S.sum(-1, keepdim=True), value=-1)
    return P if kept is None else P.mul_(kept), grad_S


@replaces(products)
def _products_by_blocks(
    Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None, k: Dropout, g: Tensor, causal: bool
) -> Products:
    """The same for some heads and rows at a time, if that pays: their scores stay in the cache."""
    if not _pays(Q, K, V, M):
        kP, grad_S = _weights_in(Q, K, V, M, k, g)
        return grad_S @ K, grad_S.mT @ Q, kP.mT @ g
    batch, (length, columns) = Q.shape[:-2], (Q.shape[-2], K.shape[-2])
    rows = min(_ROWS, length) if causal else length
    heads = min(batch[-1], max(1, (blocking.elements_per_block() or 0) // (rows * columns)))
    of_query, of_key, of_value = torch.empty_like(Q), torch.zeros_like(K), torch.zeros_like(V)
    space = Q.new_empty(2, heads * rows * columns)
    masks = [x if x is None else x.expand(*batch, length, columns) for x in (M, k[0])]
    for example in product(*map(range, batch[:-1])):
        for head, row in product(range(0, batch[-1], heads), range(0, length, rows)):
            across = (*example, slice(head, head + heads))
            down = (*across, slice(row, row + rows))
            if causal:  # no row attends to later columns
                across = (*across, slice(row + rows))
            q, key = Q[down], K[across]
            shape = (*q.shape[:2], key.shape[1])
            mask, drawn = (x if x is None else x[(*down, slice(shape[2]))] for x in masks)
            two = space[:, : math.prod(shape)].view(2, *shape).unbind()
            kP, grad_S = _weights_in(q, key, V[across], mask, (drawn, k[1]), g[down], two)
            torch.bmm(grad_S, key, out=of_query[down])
            of_key[across].baddbmm_(grad_S.mT, q)
            of_value[across].baddbmm_(kP.mT, g[down])
    return of_query, of_key, of_value


_ROWS = 128
"""How many rows a block has if each row attends only to those before it: half of all scores are not needed."""


def _pays(Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None) -> bool:
    """Blocks are faster (there are several, and none is tiny) and possible (no head or example broadcasts)."""
    size = blocking.elements_per_block()
    scores = Q.shape[-3:-1].numel() * K.shape[-2]  # of one example
    return (
        size is not None
        and Q.is_cpu
        and Q.dim() > 2
        and Q.shape[:-2] == K.shape[:-2] == V.shape[:-2]
        and scores >= size // 2
        and Q.shape[:-3].numel() * scores > 2 * size
        and (M is None or M.dim() > 1)
    )


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """Each row attends to the columns up to its own number."""
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """M of a mask: 0 where attended, -∞ where not."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -math.inf)


def _repeat_heads(tensor: Tensor, n: int) -> Tensor:
    """Each head of a tensor (*, H, S, E) n times."""
    return tensor if n == 1 else tensor.repeat_interleave(n, -3)


def _sum_heads(tensor: Tensor, n: int) -> Tensor:
    """The adjoint of `_repeat_heads`."""
    return tensor if n == 1 else unflatten(tensor, -3, (tensor.shape[-3] // n, n)).sum(-3)


@with_torch_errors
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
    sample_inputs=lambda t: [
        SampleInput(t(2, 1, 3, 2), t(2, 1, 4, 2), t(2, 1, 4, 2), is_causal=True),
        SampleInput(t(2, 3, 2), t(2, 4, 2), t(2, 4, 3), t(3, 4), scale=0.5),
        SampleInput(t(1, 4, 3, 2), t(1, 2, 3, 2), t(1, 2, 3, 2), enable_gqa=True),
        SampleInput(t(2, 3, 2), t(2, 3, 2), t(2, 3, 2), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()),
    ],
    benchmark_input=lambda t: SampleInput(t(2, 8, 256, 64), t(2, 8, 256, 64), t(2, 8, 256, 64), is_causal=True),
    supports_special_values=False,  # a row that nothing attends to still multiplies what it holds by 0
    expected_failures=dict.fromkeys(
        ("special_values-0", "special_values-2", "special_values-3"),
        "an infinite query or key has weight 0 at last, and products with it are 0 · ∞ = nan",
    ),
)


def _multi_head(
    t: TensorFactory, query: Tensor, key: Tensor, *, separate: bool = False, bias: bool = True, **more: Any
) -> SampleInput:
    """A call with weights of the sizes that query and key ask for."""
    e, k = query.shape[-1], key.shape[-1]
    if separate:
        more |= {"q_proj_weight": t(e, e), "k_proj_weight": t(e, k), "v_proj_weight": t(e, k)}
    affine = (None if separate else t(3 * e, e), t(3 * e) if bias else None)
    extra = (t(1, 1, e), t(1, 1, e), True) if more.pop("extra", False) else (None, None, False)
    out = (t(e, e), t(e) if bias else None)
    more["use_separate_proj_weight"] = separate
    return SampleInput(query, key, key, e, more.pop("heads", 2), *affine, *extra, 0.0, *out, **more)


register(
    "multi_head_attention_forward",
    sample_inputs=lambda t: [
        _multi_head(t, t(2, 1, 2), t(3, 1, 2), heads=1),
        _multi_head(t, t(4, 2), t(3, 3), separate=True, bias=False, need_weights=False),
        _multi_head(t, t(4, 2), t(3, 2), attn_mask=t.fixed(4, 3), average_attn_weights=False, bias=False),
    ],
    benchmark_input=lambda t: _multi_head(t, t(128, 8, 256), t(128, 8, 256), heads=8, need_weights=False),
)
