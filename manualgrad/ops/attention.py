"""Attention. The multi-head attention of transformers uses it."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad import blocking
from manualgrad.ops.dropout import dropout_scale
from manualgrad.ops.registration import with_torch_errors
from manualgrad.ops.shapes import unflatten
from manualgrad.registry import SampleInput, TensorFactory, register
from manualgrad.rule import LOWER_PRECISION, Rule, replaces

QKVGradients = tuple[Tensor, Tensor, Tensor]
"""∂L/∂Q, ∂L/∂K and ∂L/∂V"""
DropoutFactor = tuple[Tensor | None, float]
"""k as a mask and a scale: k ∘ x = scale · x where the mask is true, else 0. If the mask is None: no dropout."""


class AttentionFunction(Rule):
    r"""y = P V,   P = softmax(S) along rows,   S = Q Kᵀ + M,   Q = σ query

    Q: (*, L, E)   K: (*, C, E)   V: (*, C, F)      K and V repeat each head of key and value n times

    dy = dP V + P dV                          ∂L/∂V = Pᵀ g            ∂L/∂P = g Vᵀ
    dP = P ∘ (dS - Σ P dS)                    ∂L/∂S = P ∘ (∂L/∂P - δ),   δ = Σ P ∘ ∂L/∂P  (of each row)
    dS = dQ Kᵀ + Q dKᵀ + dM                   ∂L/∂Q = (∂L/∂S) K       ∂L/∂K = (∂L/∂S)ᵀ Q         ∂L/∂M = ∂L/∂S

    A row in which M is -∞ everywhere has y = 0 and gradient 0: there g and M are replaced by 0.

    The backward recomputes P. δ equals Σ g y, but the rule does not save y: a caller may modify y in place, as
    torch allows where it calls no fused kernel.

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
        enable_gqa: bool,
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=enable_gqa
        )

    def sigma(query: Tensor, scale: float | None) -> float:
        return 1 / math.sqrt(query.shape[-1]) if scale is None else scale

    def n(query: Tensor, key: Tensor, enable_gqa: bool) -> int:
        """The number of query heads per key and value head."""
        return query.shape[-3] // key.shape[-3] if enable_gqa else 1

    def Q(query: Tensor, sigma: float) -> Tensor:
        return query * sigma

    def K(key: Tensor, n: int) -> Tensor:
        return _repeat_heads(key, n)

    def V(value: Tensor, n: int) -> Tensor:
        return _repeat_heads(value, n)

    def bias(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
        """M, with the rows that are -∞ everywhere."""
        return _to_additive(_causal(query, key) if causal else mask, query)

    def has_columns(bias: Tensor | None, causal: bool) -> Tensor | None:
        """The rows that attend to at least one column. None: all of them."""
        return None if bias is None or causal else (bias > -math.inf).any(-1, keepdim=True)

    def M(bias: Tensor | None, has_columns: Tensor | None) -> Tensor | None:
        return bias if bias is None or has_columns is None else torch.where(has_columns, bias, 0)

    def g(grad: Tensor, has_columns: Tensor | None) -> Tensor:
        return grad if has_columns is None else torch.where(has_columns, grad, 0)

    def k() -> DropoutFactor:
        """No dropout."""
        return None, 1.0

    def gradients(
        Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None, k: DropoutFactor, g: Tensor, causal: bool
    ) -> QKVGradients:
        return qkv_gradients(Q, K, V, M, k, g, causal)

    def grad_query(gradients: QKVGradients, query: Tensor, sigma: float) -> Tensor:
        return (gradients[0] * sigma).sum_to_size(query.shape)

    def grad_key(gradients: QKVGradients, key: Tensor, n: int) -> Tensor:
        return _sum_heads(gradients[1], n).sum_to_size(key.shape)

    def grad_value(gradients: QKVGradients, value: Tensor, n: int) -> Tensor:
        return _sum_heads(gradients[2], n).sum_to_size(value.shape)

    def grad_mask(Q: Tensor, K: Tensor, V: Tensor, M: Tensor, k: DropoutFactor, g: Tensor, mask: Tensor) -> Tensor:
        """Not part of `gradients`, which needs S only in blocks: ∂L/∂M may be as large as S."""
        return scores_backward(Q, K, V, M, k, g)[1].sum_to_size(mask.shape).to(mask.dtype)


class AttentionDropoutFunction(AttentionFunction):
    r"""y = (k ∘ P) V,   k: 1 / (1 - p) with probability 1 - p, else 0        (random, a constant in the backward)

    ∂L/∂V = (k ∘ P)ᵀ g            ∂L/∂P = k ∘ (g Vᵀ)
    """

    statistics = ("dropout_mask",)

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        enable_gqa: bool,
        p: float,
    ) -> tuple[Tensor, Tensor]:
        bias = _to_additive(mask, query)  # this kernel would add a mask of booleans as numbers
        output, weight = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, bias, p, causal, None, scale=scale, enable_gqa=enable_gqa
        )
        return output, weight.bool()  # weight = k ∘ P. Where P is 0, k does not matter

    def k(dropout_mask: Tensor, p: float) -> tuple[Tensor, float]:
        return dropout_mask, dropout_scale(p)


def scores_backward(
    Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None, k: DropoutFactor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """k ∘ P and ∂L/∂S"""
    S = Q @ K.mT if M is None else Q @ K.mT + M
    P = torch.softmax(S, -1)
    grad_P = apply_dropout(g @ V.mT, k)
    delta = (P * grad_P).sum(-1, keepdim=True)
    return apply_dropout(P, k), P * (grad_P - delta)


def apply_dropout(x: Tensor, k: DropoutFactor) -> Tensor:
    """k ∘ x"""
    return x if k[0] is None else x * k[0] * k[1]


def qkv_gradients(
    Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None, k: DropoutFactor, g: Tensor, causal: bool
) -> QKVGradients:
    """(∂L/∂S) K,  (∂L/∂S)ᵀ Q  and  (k ∘ P)ᵀ g"""
    kP, grad_S = scores_backward(Q, K, V, M, k, g)
    return grad_S @ K, grad_S.mT @ Q, kP.mT @ g


@replaces(scores_backward)
def _scores_backward_into(
    Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None, k: DropoutFactor, g: Tensor, out: Any = (None, None)
) -> tuple[Tensor, Tensor]:
    """The same, written into two tensors: `out`, or new ones."""
    S = torch.matmul(Q, K.mT, out=out[0])
    if M is not None:
        S = S + M if out[0] is None else S.add_(M)  # without `out`, M may have more axes than S
    P = torch.softmax(S, -1, out=out[0])
    grad_P = torch.matmul(g, V.mT, out=out[1])
    factor = None if k[0] is None else k[0].to(P.dtype) * k[1]
    grad_P = grad_P if factor is None else grad_P.mul_(factor)
    grad_S = grad_P.mul_(P)
    grad_S = grad_S.addcmul_(P, grad_S.sum(-1, keepdim=True), value=-1)
    return P if factor is None else P.mul_(factor), grad_S


@replaces(qkv_gradients)
def _qkv_gradients_in_blocks(
    Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None, k: DropoutFactor, g: Tensor, causal: bool
) -> QKVGradients:
    """The same in blocks of heads and rows, where that is faster: the scores of a block fit in the cache."""
    if not _blocks_are_faster(Q, K, V, M):
        kP, grad_S = _scores_backward_into(Q, K, V, M, k, g)
        return grad_S @ K, grad_S.mT @ Q, kP.mT @ g
    batch, (length, columns) = Q.shape[:-2], (Q.shape[-2], K.shape[-2])
    rows = min(_CAUSAL_BLOCK_ROWS, length) if causal else length
    heads = min(batch[-1], max(1, (blocking.elements_per_block() or 0) // (rows * columns)))
    grad_Q, grad_K, grad_V = torch.empty_like(Q), torch.zeros_like(K), torch.zeros_like(V)
    buffer = Q.new_empty(2, heads * rows * columns)  # k ∘ P and ∂L/∂S of one block
    masks = [None if x is None else x.expand(*batch, length, columns) for x in (M, k[0])]
    for example in product(*map(range, batch[:-1])):
        for head, row in product(range(0, batch[-1], heads), range(0, length, rows)):
            kv_block = (*example, slice(head, head + heads))
            q_block = (*kv_block, slice(row, row + rows))
            if causal:  # the rows of this block do not attend to later columns
                kv_block = (*kv_block, slice(row + rows))
            q, key, value, grad = Q[q_block], K[kv_block], V[kv_block], g[q_block]
            shape = (*q.shape[:2], key.shape[1])
            bias, dropout_mask = (None if x is None else x[(*q_block, slice(shape[2]))] for x in masks)
            out = buffer[:, : math.prod(shape)].view(2, *shape).unbind()
            kP, grad_S = _scores_backward_into(q, key, value, bias, (dropout_mask, k[1]), grad, out)
            torch.bmm(grad_S, key, out=grad_Q[q_block])
            grad_K[kv_block].baddbmm_(grad_S.mT, q)
            grad_V[kv_block].baddbmm_(kP.mT, grad)
    return grad_Q, grad_K, grad_V


_CAUSAL_BLOCK_ROWS = 128
"""Rows per block of causal attention. Smaller blocks skip more of the scores above the diagonal."""


def _blocks_are_faster(Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None) -> bool:
    """There are several blocks, none is tiny, no head or example broadcasts, and M has rows."""
    size = blocking.elements_per_block()
    scores = Q.shape[-3:-1].numel() * K.shape[-2]  # per example
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
    """The mask of booleans in which row i attends to the columns up to i."""
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()


def _to_additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask of booleans as M: 0 where true, else -∞. A mask of numbers is M already."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -math.inf)


def _repeat_heads(tensor: Tensor, n: int) -> Tensor:
    """Repeat each head of a tensor (*, H, S, E) n times."""
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

    Shapes: query (*, L, E), key (*, S, E), value (*, S, F), attn_mask broadcastable to (*, L, S); the result
    (*, L, F). The mask holds booleans (true: attend) or numbers that are added to the scores. With `enable_gqa`
    several query heads (axis -3) share a head of keys and values.

    Raises:
        RuntimeError: the shapes or the mask's dtype do not match, or there are both a mask and `is_causal`.
    """
    if dropout_p < 0:
        with torch.no_grad():  # some of torch's kernels raise an error, the others use no dropout
            F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    if dropout_p > 0:
        if not isinstance(is_causal, bool) or not isinstance(enable_gqa, bool):  # the kernel does not check these
            raise TypeError("is_causal and enable_gqa must be bool")
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise RuntimeError(f"attn_mask must be bool, float32 or {query.dtype}, but is {attn_mask.dtype}")
        return AttentionDropoutFunction.apply(
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
        SampleInput(
            t(2, 3, 2),
            t(2, 3, 2),
            t(2, 3, 2),
            torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool(),
            dropout_p=0.4,
        ),
        SampleInput(t(2, 1, 3, 2), t(2, 1, 4, 2), t(2, 1, 4, 2), dropout_p=0.4, is_causal=True),
    ],
    benchmark_input=lambda t: SampleInput(t(2, 8, 256, 64), t(2, 8, 256, 64), t(2, 8, 256, 64), is_causal=True),
    random=True,
    supports_special_values=False,  # a column without weight is multiplied by 0: 0 · ∞ = nan
    expected_failures=dict.fromkeys(
        ("special_values-0", "special_values-2", "special_values-3"),
        "an infinite query or key gets the weight 0, and the backward computes 0 · ∞ = nan",
    ),
)


def _multi_head(
    t: TensorFactory,
    query: Tensor,
    key: Tensor,
    *,
    heads: int = 2,
    separate: bool = False,
    bias: bool = True,
    **options: Any,
) -> SampleInput:
    """A call with weights that match query and key, one for all inputs or ``separate``, and without dropout."""
    e, k = query.shape[-1], key.shape[-1]
    if separate:
        options |= {"q_proj_weight": t(e, e), "k_proj_weight": t(e, k), "v_proj_weight": t(e, k)}
    in_proj = (None if separate else t(3 * e, e), t(3 * e) if bias else None)
    no_extra_keys = (None, None, False)  # bias_k, bias_v, add_zero_attn
    out_proj = (t(e, e), t(e) if bias else None)
    options["use_separate_proj_weight"] = separate
    return SampleInput(query, key, key, e, heads, *in_proj, *no_extra_keys, 0.0, *out_proj, **options)


register(
    "multi_head_attention_forward",
    sample_inputs=lambda t: [
        _multi_head(t, t(2, 1, 2), t(3, 1, 2), heads=1),
        _multi_head(t, t(4, 2), t(3, 3), separate=True, bias=False, need_weights=False),
        _multi_head(t, t(4, 2), t(3, 2), attn_mask=t.no_grad(4, 3), average_attn_weights=False, bias=False),
    ],
    benchmark_input=lambda t: _multi_head(t, t(128, 8, 256), t(128, 8, 256), heads=8, need_weights=False),
)
