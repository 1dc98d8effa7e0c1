"""Embedding: rows of a table, and sums of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manualgrad.ops.elementary import implements
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule, replaces
from manualgrad.torch_internals import in_forward_mode_or_transform

# torch.sparse_coo_tensor without its checks, nor torch 2.11's warning of them: the forward has checked the indices
_sparse = torch.ops.aten._sparse_coo_tensor_unsafe


class EmbeddingFunction(Rule):
    r"""yᵢ = W[tᵢ]        W: (count, d)   t: (*) of indices   y: (*, d)

    ⟨g, dy⟩ = Σᵢ ⟨gᵢ, dW[tᵢ]⟩:  each row of W receives the sum of g over the places that read it,
    ∂L/∂W[r] = Σ gᵢ over tᵢ = r      (for the padding index 0; by frequency: divided by the number of them)
    """

    def forward(
        weight: Tensor, index: Tensor, count: int, padding: int, by_frequency: bool, sparse: bool
    ) -> Tensor:
        return torch.embedding(weight, index, padding, by_frequency, sparse)

    def grad_weight(
        grad: Tensor, index: Tensor, count: int, padding: int, by_frequency: bool, sparse: bool
    ) -> Tensor:
        t = index.reshape(-1)
        g = grad.reshape(len(t), grad.shape[-1])
        return rows_summed(g, t, count, padding, by_frequency, sparse)


def rows_summed(g: Tensor, t: Tensor, count: int, padding: int, by_frequency: bool, sparse: bool) -> Tensor:
    """The table of `count` rows, of which row r is Σ gᵢ over tᵢ = r."""
    if sparse:
        counted = t != padding if padding >= 0 else slice(None)
        return _sparse(t[counted].long().unsqueeze(0), g[counted], (count, g.shape[-1]))
    if by_frequency:
        g = g / torch.bincount(t, minlength=count).index_select(0, t).unsqueeze(-1)
    return rows_added(g, t, count, padding)


def rows_added(g: Tensor, t: Tensor, count: int, padding: int) -> Tensor:
    counted = g if padding < 0 else torch.where((t != padding).unsqueeze(-1), g, 0)
    return g.new_zeros(count, g.shape[-1]).index_add(0, t, counted)


@replaces(rows_added)
def _rows_added_then_padded(g: Tensor, t: Tensor, count: int, padding: int) -> Tensor:
    table = g.new_zeros(count, g.shape[-1]).index_add_(0, t, g)
    if padding >= 0:
        table[padding] = 0
    return table


@implements(torch.embedding)
def embedding(
    weight: Tensor, index: Tensor, padding: int = -1, by_frequency: bool = False, sparse: bool = False
) -> Tensor:
    return EmbeddingFunction.apply(weight, index, weight.size(0), padding, by_frequency, sparse)


register(
    "embedding",
    sample_inputs=lambda t: [
        SampleInput(t.index(6, 4, 3), t(6, 2)),
        SampleInput(t.index(6, 7), t(6, 2), padding_idx=-2).with_gradient_by_definition(),
        SampleInput(t.index(3, 7), t(3, 2), scale_grad_by_freq=True, padding_idx=1).with_gradient_by_definition(),
    ],
    benchmark_input=lambda t: SampleInput(t.index(8192, 4096), t(8192, 512)),
)

_SUM, _MEAN, _MAX = range(3)  # torch's numbers for the modes


@dataclass(frozen=True)
class BagKernel:
    """What torch chooses a kernel for sums of rows by.

    With `include_last_offset` there may be indices after the last offset. Most kernels add their rows to the last
    bag. The fastest one leaves them out of the sum, but still divides a mean by their number.
    """

    dtype: torch.dtype
    mode: int
    rows_are_dense: bool
    factors_are_dense: bool | None
    has_padding: bool

    def adds_the_rest(self, device: torch.device) -> Tensor:
        """Whether it adds the rows after the last offset: its sum of a bag with a row 0, and a row 1 after it."""
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
        has_rest: bool,
        kernel: BagKernel,
    ) -> Tensor:
        padded = padding if kernel.has_padding else None
        return torch.embedding_bag(
            weight, index, offsets, by_frequency, kernel.mode, sparse, factor, with_last, padded
        )[0]

    def places(index: Tensor, offsets: Tensor) -> Tensor:
        return torch.arange(len(index), device=index.device, dtype=offsets.dtype)

    def bag(places: Tensor, offsets: Tensor, with_last: bool) -> Tensor:
        """b(i)"""
        begins = offsets[:-1] if with_last else offsets
        return torch.searchsorted(begins.contiguous(), places, right=True) - 1

    def counted(
        index: Tensor, places: Tensor, offsets: Tensor, padding: int, has_rest: bool, kernel: BagKernel
    ) -> Tensor | None:
        """Which places the value counts, None for all."""
        inside = index != padding if kernel.has_padding else None
        return places_before(inside, places, offsets[-1], kernel) if has_rest else inside

    def t(index: Tensor, counted: Tensor | None, has_rest: bool) -> Tensor:
        """tᵢ; 0 after the last offset, where the index may be any number."""
        return index * counted if has_rest and counted is not None else index

    def g(grad: Tensor, index: Tensor, bag: Tensor, padding: int, kernel: BagKernel) -> Tensor:
        """cᵢ g_b(i), without sᵢ"""
        return of_bags(grad, index, bag, padding, kernel.mode)

    def grad_weight(
        g: Tensor,
        t: Tensor,
        counted: Tensor | None,
        factor: Tensor | None,
        count: int,
        padding: int,
        by_frequency: bool,
        sparse: bool,
        has_rest: bool,
    ) -> Tensor:
        weighted = g if factor is None else g * factor.unsqueeze(-1)
        return rows_summed(
            torch.where(counted.unsqueeze(-1), weighted, 0) if has_rest and counted is not None else weighted,
            *(t, count, padding, by_frequency, sparse),
        )

    def grad_factor(g: Tensor, weight: Tensor, t: Tensor, counted: Tensor | None) -> Tensor:
        products = (weight.index_select(0, t) * g).sum(-1)
        return products if counted is None else torch.where(counted, products, 0)


def places_before(inside: Tensor | None, places: Tensor, end: Tensor, kernel: BagKernel) -> Tensor:
    """Of the places inside, those before the end, or all if the kernel adds the rest."""
    before = (places < end) | kernel.adds_the_rest(places.device)[0, 0]
    return before if inside is None else inside & before


def of_bags(grad: Tensor, index: Tensor, bag: Tensor, padding: int, mode: int) -> Tensor:
    if len(grad) == 0:
        return grad.new_zeros(len(index), grad.shape[1])
    if mode == _MEAN:
        size = torch.zeros_like(grad[:, 0]).index_add(0, bag, (index != padding).to(grad.dtype))
        grad = grad / size.clamp(min=1).unsqueeze(-1)
    return grad.index_select(0, bag)


class EmbeddingBagMaxFunction(Rule):
    r"""y_bk = max W[tᵢ]_k over the places i of bag b, at the row r_bk      ∂L/∂W[r]_k = Σ g_bk over r_bk = r"""

    statistics = ("row", "size")

    def forward(
        weight: Tensor, index: Tensor, offsets: Tensor, count: int, padding: int, with_last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, _, size, row = _bags(weight, index, offsets, False, _MAX, False, None, with_last, padding)
        return output, row, size

    def grad_weight(grad: Tensor, row: Tensor, size: Tensor, count: int) -> Tensor:
        filled = (size > 0).unsqueeze(-1)
        return grad.new_zeros(count, grad.shape[1]).scatter_add(0, row, torch.where(filled, grad, 0))


_bags = torch.ops.aten._embedding_bag


def _reaches_the_end(offsets: Tensor, index: Tensor) -> bool:
    """The last offset is known, without waiting for another device, to be the number of indices."""
    if torch.compiler.is_compiling() or in_forward_mode_or_transform() or type(offsets) is not Tensor:
        return False
    return offsets.is_cpu and int(offsets[-1]) == len(index)


@implements(torch.embedding_bag)
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
        has_rest = with_last and not _reaches_the_end(offsets, index)
        output = EmbeddingBagFunction.apply(
            weight, index, offsets, factor, count, padding, by_frequency, sparse, with_last, has_rest, kernel
        )
    return output, None, None, None


register(
    "embedding_bag",
    sample_inputs=lambda t: [
        SampleInput(t.index(6, 4, 3), t(6, 2)),
        SampleInput(
            *(t.index(6, 7), t(6, 2), torch.tensor([0, 2, 2, 7]).to(t.device)),
            mode="sum",
            per_sample_weights=t(7),
            include_last_offset=True,
            padding_idx=1,
        ),
        SampleInput(t.index(3, 4, 3), t(3, 2), mode="max", padding_idx=-2),
    ],
    benchmark_input=lambda t: SampleInput(t.index(8192, 512, 8), t(8192, 512)),
)
