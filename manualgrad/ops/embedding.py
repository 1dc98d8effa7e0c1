"""Embedding: rows of a table, and sums of them."""

from __future__ import annotations

from dataclasses import dataclass

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
        index = index.reshape(-1)
        sent = grad.reshape(index.numel(), grad.shape[-1])
        counted = index != padding if padding >= 0 else None
        return _collected(sent, index, counted, count, by_frequency, sparse)


def _collected(
    sent: Tensor, index: Tensor, counted: Tensor | None, count: int, by_frequency: bool, sparse: bool
) -> Tensor:
    """The table of `count` rows in which each has the sum of what was sent to it, from the places counted."""
    if sparse:
        if counted is not None:
            index, sent = index[counted], sent[counted]
        return _sparse(index.long().unsqueeze(0), sent, (count, sent.shape[-1]))
    if by_frequency:
        sent = sent / torch.bincount(index, minlength=count)[index].unsqueeze(-1)
    if counted is not None:
        sent = choose(counted.unsqueeze(-1).expand_as(sent), sent)
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


@dataclass(frozen=True)
class BagKernel:
    """What torch goes by when it chooses a kernel for sums of rows.

    With `include_last_offset` the last offset may stand before the end of the indices. What comes behind it, most
    kernels add to the last bag. The fastest one leaves it out (of the sum: a mean is divided by its number all the
    same).
    """

    dtype: torch.dtype
    mode: int
    rows_are_dense: bool
    factors_are_dense: bool | None
    has_padding: bool

    def adds_the_rest(self, device: torch.device) -> Tensor:
        """Whether it adds what comes behind the last offset: asked of it, with a bag of a 0, and a 1 behind."""
        values = torch.tensor([0, 1, 0], dtype=self.dtype, device=device)
        table = values.unsqueeze(1).repeat(1, 2) if self.rows_are_dense else values.repeat(2, 1).T
        factor, offsets = torch.ones(4, dtype=self.dtype, device=device), torch.arange(2, device=device)
        factor = None if self.factors_are_dense is None else factor[:2] if self.factors_are_dense else factor[::2]
        padding = 2 if self.has_padding else None
        return torch.embedding_bag(table, offsets, offsets, False, self.mode, False, factor, True, padding)[0] != 0


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
        padding: int,
        by_frequency: bool,
        sparse: bool,
        with_last: bool,
        kernel: BagKernel,
    ) -> Tensor:
        padded = padding if kernel.has_padding else None
        return torch.embedding_bag(
            weight, index, offsets, by_frequency, kernel.mode, sparse, factor, with_last, padded
        )[0]

    def places(index: Tensor, offsets: Tensor) -> Tensor:
        return torch.arange(len(index), device=index.device, dtype=offsets.dtype)

    def bag(places: Tensor, offsets: Tensor, with_last: bool) -> Tensor:
        """Of each place, its bag."""
        begins = offsets[:-1] if with_last else offsets
        return torch.searchsorted(begins.contiguous(), places, right=True) - 1

    def counted(
        index: Tensor, places: Tensor, offsets: Tensor, padding: int, with_last: bool, kernel: BagKernel
    ) -> Tensor | None:
        """The places that the value counts, unless all."""
        inside = index != padding if kernel.has_padding else None
        seen = index.is_cpu and nothing_looks_on(index, offsets)  # without a wait for another device
        if not with_last or (seen and int(offsets[-1]) == len(index)):
            return inside
        before = (places < offsets[-1]) | kernel.adds_the_rest(index.device)[0, 0]
        return before if inside is None else inside & before

    def rows(index: Tensor, counted: Tensor | None) -> Tensor:
        """t, 0 at places that are not counted: any number may stand there."""
        return index if counted is None else index * counted

    def sent(grad: Tensor, index: Tensor, bag: Tensor, padding: int, kernel: BagKernel) -> Tensor:
        """What each place is sent."""
        if len(grad) == 0:
            return grad.new_zeros(len(index), grad.shape[1])
        if kernel.mode == _MEAN:
            size = torch.zeros_like(grad[:, 0]).index_add(0, bag, (index != padding).to(grad.dtype))
            grad = grad / size.clamp(min=1).unsqueeze(-1)
        return grad[bag]

    def grad_weight(
        sent: Tensor,
        rows: Tensor,
        counted: Tensor | None,
        factor: Tensor | None,
        count: int,
        by_frequency: bool,
        sparse: bool,
    ) -> Tensor:
        sent = sent if factor is None else sent * factor.unsqueeze(-1)
        return _collected(sent, rows, counted, count, by_frequency, sparse)

    def grad_factor(sent: Tensor, weight: Tensor, rows: Tensor, counted: Tensor | None) -> Tensor:
        products = (weight[rows] * sent).sum(-1)
        return products if counted is None else choose(counted, products)


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
        dense = None if factor is None else factor.stride(0) == 1
        kernel = BagKernel(weight.dtype, mode, weight.stride(1) == 1, dense, padding >= 0)
        output = EmbeddingBagFunction.apply(
            weight, index, offsets, factor, count, padding, by_frequency, sparse, with_last, kernel
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
