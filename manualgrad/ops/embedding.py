"""Embedding: rows of a table, and sums of them."""

from __future__ import annotations

import torch
from torch import Tensor

from manualgrad.ops.elementary import choose, stands_for
from manualgrad.registry import Call, register
from manualgrad.rule import Rule, nothing_looks_on

# torch.sparse_coo_tensor without its checks, nor torch 2.11's warning of them: the forward has checked the indices
_sparse = torch.ops.aten._sparse_coo_tensor_unsafe


class EmbeddingFunction(Rule):
    r"""yᵢ = W[tᵢ]        W: (count, d)   t: (*) of indices   y: (*, d)

    ⟨g, dy⟩ = Σᵢ ⟨gᵢ, dW[tᵢ]⟩:  each row of W collects the g of every place it was used at,
    ∂L/∂W[r] = Σ gᵢ over tᵢ = r      (left out for the padding index; by frequency: divided by how many)
    """

    def forward(
        weight: Tensor, index: Tensor, count: int, padding: int, by_frequency: bool, sparse: bool
    ) -> Tensor:
        return torch.embedding(weight, index, padding, by_frequency, sparse)

    def grad_weight(
        grad: Tensor, index: Tensor, count: int, padding: int, by_frequency: bool, sparse: bool
    ) -> Tensor:
        sent = grad.reshape(index.numel(), grad.shape[-1])
        return _collected(sent, index.reshape(-1), count, padding, by_frequency, sparse)


def _collected(sent: Tensor, index: Tensor, count: int, padding: int, by_frequency: bool, sparse: bool) -> Tensor:
    """The table of `count` rows in which each has the sum of what was sent to it."""
    if sparse:
        if padding >= 0:
            kept = index != padding
            index, sent = index[kept], sent[kept]
        return _sparse(index.unsqueeze(0), sent, (count, sent.shape[-1]))
    if by_frequency:
        sent = sent / torch.bincount(index, minlength=count)[index].unsqueeze(-1)
    if padding >= 0:
        sent = choose((index != padding).unsqueeze(-1).expand_as(sent), sent)
    table = sent.new_zeros(count, sent.shape[-1])
    return table.index_add_(0, index, sent) if nothing_looks_on(table, sent) else table.index_add(0, index, sent)


@stands_for(torch.embedding)
def embedding(
    weight: Tensor, index: Tensor, padding: int = -1, by_frequency: bool = False, sparse: bool = False
) -> Tensor:
    return EmbeddingFunction.apply(weight, index, weight.size(0), padding, by_frequency, sparse)


register(
    "embedding",
    samples=lambda t: [
        Call(t.index(6, 4, 3), t(6, 2)),
        Call(t.index(6, 7), t(6, 2), padding_idx=-2).with_gradient_by_definition(),
        Call(t.index(3, 7), t(3, 2), scale_grad_by_freq=True, padding_idx=1).with_gradient_by_definition(),
    ],
    big=lambda t: Call(t.index(8192, 4096), t(8192, 512)),
)

_SUM, _MEAN, _MAX = range(3)  # torch's numbers for the modes


class EmbeddingBagFunction(Rule):
    r"""y_b = Σ cᵢ W[tᵢ] over the places i of bag b      c: the weight sᵢ, or 1; of a mean, by the size of the bag

    ∂L/∂W[r] = Σ cᵢ g_b(i) over tᵢ = r            ∂L/∂sᵢ = ⟨W[tᵢ], g_b(i)⟩
    A bag begins at its offset; the padding index belongs to none.
    """

    def forward(
        weight: Tensor,
        index: Tensor,
        offsets: Tensor,
        factor: Tensor | None,
        count: int,
        mode: int,
        padding: int,
        by_frequency: bool,
        sparse: bool,
        with_last: bool,
    ) -> Tensor:
        return torch.embedding_bag(
            weight, index, offsets, by_frequency, mode, sparse, factor, with_last, None if padding < 0 else padding
        )[0]

    def bag(index: Tensor, offsets: Tensor) -> Tensor:
        """Of each place, its bag."""
        places = torch.arange(len(index), device=index.device, dtype=offsets.dtype)
        return torch.searchsorted(offsets.contiguous(), places, right=True) - 1

    def sent(grad: Tensor, index: Tensor, bag: Tensor, mode: int, padding: int) -> Tensor:
        """What each place is sent."""
        if mode == _MEAN:
            size = torch.zeros_like(grad[:, 0]).index_add(0, bag, (index != padding).to(grad.dtype))
            grad = grad / size.clamp(min=1).unsqueeze(-1)
        return grad[bag]

    def grad_weight(
        sent: Tensor,
        index: Tensor,
        factor: Tensor | None,
        count: int,
        padding: int,
        by_frequency: bool,
        sparse: bool,
    ) -> Tensor:
        sent = sent if factor is None else sent * factor.unsqueeze(-1)
        return _collected(sent, index, count, padding, by_frequency, sparse)

    def grad_factor(sent: Tensor, weight: Tensor, index: Tensor, padding: int) -> Tensor:
        return choose(index != padding, (weight[index] * sent).sum(-1))


class EmbeddingBagMaxFunction(Rule):
    r"""y_bk = max W[tᵢ]_k over the places i of bag b, at the row r_bk      ∂L/∂W[r]_k = Σ g_bk over r_bk = r"""

    statistics = ("row", "size")

    def forward(
        weight: Tensor, index: Tensor, offsets: Tensor, count: int, padding: int, with_last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, _, size, row = _bags(weight, index, offsets, False, _MAX, False, None, with_last, padding)
        return output, row, size

    def grad_weight(grad: Tensor, row: Tensor, size: Tensor, count: int) -> Tensor:
        filled = (size > 0).unsqueeze(-1).expand_as(grad)
        return grad.new_zeros(count, grad.shape[1]).scatter_add(0, row, choose(filled, grad))


_bags = torch.ops.aten._embedding_bag


@stands_for(torch.embedding_bag)
def embedding_bag(
    weight: Tensor,
    index: Tensor,
    offsets: Tensor,
    by_frequency: bool,
    mode: int,
    sparse: bool,
    factor: Tensor | None,
    with_last: bool,
    padding: int | None,
) -> tuple[Tensor, None, None, None]:
    count = weight.size(0)
    if padding is not None and not -count <= padding < count:
        raise RuntimeError(f"the padding index {padding} is none of the {count} rows")
    padding = -1 if padding is None else padding % count
    if mode == _MAX:
        output = EmbeddingBagMaxFunction.apply(weight, index, offsets, count, padding, with_last)
    else:
        output = EmbeddingBagFunction.apply(
            weight, index, offsets, factor, count, mode, padding, by_frequency, sparse, with_last
        )
    return output, None, None, None


register(
    "embedding_bag",
    samples=lambda t: [
        Call(t.index(6, 4, 3), t(6, 2)),
        Call(
            *(t.index(6, 7), t(6, 2), torch.tensor([0, 2, 2, 7]).to(t.device)),
            mode="sum",
            per_sample_weights=t(7),
            include_last_offset=True,
            padding_idx=1,
        ),
        Call(t.index(3, 4, 3), t(3, 2), mode="max", padding_idx=-2),
    ],
    big=lambda t: Call(t.index(8192, 512, 8), t(8192, 512)),
)
