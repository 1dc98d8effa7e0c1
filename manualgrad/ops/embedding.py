"""Embedding: rows of a table, and sums, means and maxima of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manualgrad.ops.registration import implements
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule, replaces
from manualgrad.torch_internals import in_forward_mode_or_transform

# torch.sparse_coo_tensor without its checks, about which torch 2.11 warns. The forward has checked the indices
_sparse_tensor = torch.ops.aten._sparse_coo_tensor_unsafe
_embedding_bag = torch.ops.aten._embedding_bag


class EmbeddingFunction(Rule):
    r"""yᵢ = W[tᵢ]        W: (count, d)   t: (*) of indices   y: (*, d)

    ⟨g, dy⟩ = Σᵢ ⟨gᵢ, dW[tᵢ]⟩:      ∂L/∂W[r] = Σ gᵢ over all i with tᵢ = r
    The padding index has gradient 0. With `by_frequency` the sum is divided by the number of its terms.
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
        return sum_by_row(g, t, count, padding, by_frequency, sparse)


def sum_by_row(g: Tensor, t: Tensor, count: int, padding: int, by_frequency: bool, sparse: bool) -> Tensor:
    """The table of `count` rows in which row r is Σ gᵢ over all i with tᵢ = r."""
    if sparse:
        no_padding = t != padding if padding >= 0 else slice(None)
        return _sparse_tensor(t[no_padding].long().unsqueeze(0), g[no_padding], (count, g.shape[-1]))
    if by_frequency:
        g = g / torch.bincount(t, minlength=count).index_select(0, t).unsqueeze(-1)
    return add_by_row(g, t, count, padding)


def add_by_row(g: Tensor, t: Tensor, count: int, padding: int) -> Tensor:
    """`sum_by_row` as a dense tensor, without division."""
    g = g if padding < 0 else torch.where((t != padding).unsqueeze(-1), g, 0)
    return g.new_zeros(count, g.shape[-1]).index_add(0, t, g)


@replaces(add_by_row)
def _add_by_row_inplace(g: Tensor, t: Tensor, count: int, padding: int) -> Tensor:
    table = g.new_zeros(count, g.shape[-1]).index_add_(0, t, g)
    if padding >= 0:
        table[padding] = 0
    return table


@implements(torch.embedding)
def embedding(
    weight: Tensor, index: Tensor, padding: int = -1, by_frequency: bool = False, sparse: bool = False
) -> Tensor:
    """The rows of the table at the indices, as `torch.embedding`."""
    return EmbeddingFunction.apply(weight, index, weight.size(0), padding, by_frequency, sparse)


register(
    "embedding",
    sample_inputs=lambda t: [
        SampleInput(t.index(6, 4, 3), t(6, 2)),
        SampleInput(t.index(6, 7), t(6, 2), padding_idx=-2).with_surrogate_gradient(),
        SampleInput(t.index(3, 7), t(3, 2), scale_grad_by_freq=True, padding_idx=1).with_surrogate_gradient(),
    ],
    benchmark_input=lambda t: SampleInput(t.index(8192, 4096), t(8192, 512)),
)

_SUM, _MEAN, _MAX = range(3)  # the mode of torch.embedding_bag


@dataclass(frozen=True)
class BagKernel:
    """The properties by which torch chooses its kernel for sums of rows.

    With `include_last_offset` there may be indices after the last offset. Most kernels add their rows to the last
    bag. The fastest kernel does not, but it counts them in the size of the last bag, by which a mean is divided.
    """

    dtype: torch.dtype
    mode: int
    rows_are_dense: bool  # stride 1
    factors_are_dense: bool | None  # None: no factors
    has_padding: bool

    def adds_rows_after_last_offset(self, device: torch.device) -> Tensor:
        """Call the kernel for one bag with a row of zeros, and a row of ones after the last offset."""
        values = torch.tensor([0, 1, 0], dtype=self.dtype, device=device)  # of the rows; the last is the padding
        table = values.unsqueeze(1).repeat(1, 2) if self.rows_are_dense else values.repeat(2, 1).T
        index = offsets = torch.arange(2, device=device)
        ones = torch.ones(4, dtype=self.dtype, device=device)
        factor = None if self.factors_are_dense is None else ones[:2] if self.factors_are_dense else ones[::2]
        padding = 2 if self.has_padding else None
        bags = torch.embedding_bag(table, index, offsets, False, self.mode, False, factor, True, padding)[0]
        return bags[0, 0] != 0


class EmbeddingBagFunction(Rule):
    r"""y_b = m_b Σ sᵢ W[tᵢ] over the positions i in bag b      s: the factor, or 1   m: for a mean 1 / size, or 1

    ∂L/∂W[r] = Σ sᵢ gᵢ over all i with tᵢ = r      ∂L/∂sᵢ = ⟨W[tᵢ], gᵢ⟩      gᵢ = m_b ∂L/∂y_b for the bag b of i
    A bag begins at its offset. Positions with the padding index are in no bag.
    ``has_tail``: there may be positions after the last offset.
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
        include_last_offset: bool,
        has_tail: bool,
        kernel: BagKernel,
    ) -> Tensor:
        padded = padding if kernel.has_padding else None
        return torch.embedding_bag(
            weight, index, offsets, by_frequency, kernel.mode, sparse, factor, include_last_offset, padded
        )[0]

    def positions(index: Tensor, offsets: Tensor) -> Tensor:
        return torch.arange(len(index), device=index.device, dtype=offsets.dtype)

    def bag(positions: Tensor, offsets: Tensor, include_last_offset: bool) -> Tensor:
        """The bag of each position."""
        begins = offsets[:-1] if include_last_offset else offsets
        return torch.searchsorted(begins.contiguous(), positions, right=True) - 1

    def is_used(
        index: Tensor, positions: Tensor, offsets: Tensor, padding: int, has_tail: bool, kernel: BagKernel
    ) -> Tensor | None:
        """The positions that the forward uses. None: all positions."""
        is_in_bag = index != padding if kernel.has_padding else None
        return positions_before(is_in_bag, positions, offsets[-1], kernel) if has_tail else is_in_bag

    def t(index: Tensor, is_used: Tensor | None, has_tail: bool) -> Tensor:
        """tᵢ; 0 after the last offset, where the index may be out of range."""
        return index * is_used if has_tail and is_used is not None else index

    def g(grad: Tensor, index: Tensor, bag: Tensor, padding: int, kernel: BagKernel) -> Tensor:
        """gᵢ"""
        return grad_of_positions(grad, index, bag, padding, kernel.mode)

    def grad_weight(
        g: Tensor,
        t: Tensor,
        is_used: Tensor | None,
        factor: Tensor | None,
        count: int,
        padding: int,
        by_frequency: bool,
        sparse: bool,
        has_tail: bool,
    ) -> Tensor:
        sg = g if factor is None else g * factor.unsqueeze(-1)
        sg = torch.where(is_used.unsqueeze(-1), sg, 0) if has_tail and is_used is not None else sg
        return sum_by_row(sg, t, count, padding, by_frequency, sparse)

    def grad_factor(g: Tensor, weight: Tensor, t: Tensor, is_used: Tensor | None) -> Tensor:
        products = (weight.index_select(0, t) * g).sum(-1)
        return products if is_used is None else torch.where(is_used, products, 0)


def positions_before(is_in_bag: Tensor | None, positions: Tensor, end: Tensor, kernel: BagKernel) -> Tensor:
    """The positions in bags that are before `end`, or all of them if the kernel adds the others too."""
    before = (positions < end) | kernel.adds_rows_after_last_offset(positions.device)
    return before if is_in_bag is None else is_in_bag & before


def grad_of_positions(grad: Tensor, index: Tensor, bag: Tensor, padding: int, mode: int) -> Tensor:
    """gᵢ = m_b ∂L/∂y_b for each position i"""
    if len(grad) == 0:
        return grad.new_zeros(len(index), grad.shape[1])
    if mode == _MEAN:
        size = torch.zeros_like(grad[:, 0]).index_add(0, bag, (index != padding).to(grad.dtype))
        grad = grad / size.clamp(min=1).unsqueeze(-1)
    return grad.index_select(0, bag)


class EmbeddingBagMaxFunction(Rule):
    r"""y_bk = max W[tᵢ]_k over the positions i in bag b, in row r_bk      ∂L/∂W[r]_k = Σ_b g_bk where r_bk = r"""

    statistics = ("row", "size")

    def forward(
        weight: Tensor, index: Tensor, offsets: Tensor, count: int, padding: int, include_last_offset: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, _, size, row = _embedding_bag(
            weight, index, offsets, False, _MAX, False, None, include_last_offset, padding
        )
        return output, row, size

    def grad_weight(grad: Tensor, row: Tensor, size: Tensor, count: int) -> Tensor:
        is_filled = (size > 0).unsqueeze(-1)
        return grad.new_zeros(count, grad.shape[1]).scatter_add(0, row, torch.where(is_filled, grad, 0))


def _ends_at_last_index(offsets: Tensor, index: Tensor) -> bool:
    """The last offset is the number of indices. False if that cannot be read without a device synchronization."""
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
    include_last_offset: bool,
    padding: int | None,
) -> tuple[Tensor, None, None, None]:
    """`torch.embedding_bag`. Of its four results, `torch.nn.functional.embedding_bag` reads only the first."""
    count = weight.size(0)
    if padding is not None and not -count <= padding < count:
        raise RuntimeError(f"padding_idx must be one of the {count} rows, but is {padding}")
    padding = -1 if padding is None else padding % count
    if mode == _MAX:
        output = EmbeddingBagMaxFunction.apply(weight, index, offsets, count, padding, include_last_offset)
    else:
        factors_are_dense = None if factor is None else factor.stride(0) == 1
        kernel = BagKernel(weight.dtype, mode, weight.stride(1) == 1, factors_are_dense, padding >= 0)
        has_tail = include_last_offset and not _ends_at_last_index(offsets, index)
        output = EmbeddingBagFunction.apply(
            weight,
            index,
            offsets,
            factor,
            count,
            padding,
            by_frequency,
            sparse,
            include_last_offset,
            has_tail,
            kernel,
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
