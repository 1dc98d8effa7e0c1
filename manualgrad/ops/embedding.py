"""Embedding: rows of a table."""

from __future__ import annotations

import torch
from torch import Tensor

from manualgrad.ops.elementary import choose, drop_in
from manualgrad.registry import Call, register
from manualgrad.rule import Rule

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
        flat, sent = index.reshape(-1), grad.reshape(index.numel(), grad.shape[-1])
        if sparse:
            if padding >= 0:
                kept = flat != padding
                flat, sent = flat[kept], sent[kept]
            return _sparse(flat.unsqueeze(0), sent, (count, sent.shape[-1]))
        table = torch.zeros(count, sent.shape[-1], dtype=grad.dtype, device=grad.device)
        if by_frequency:
            sent = sent / torch.bincount(flat, minlength=count)[flat].unsqueeze(-1)
        if padding >= 0:
            sent = choose((flat != padding).unsqueeze(-1).expand_as(sent), sent)
        return table.index_add(0, flat, sent)


@drop_in
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """The rows of `weight` that `input` names, as `torch.nn.functional.embedding`.

    Shapes: input (*) of integers, weight (count, d); the result (*, d). With `max_norm` the rows used are
    first scaled down, in place; with `sparse` the gradient of `weight` is a sparse tensor.

    Raises:
        AssertionError: `padding_idx` is not a row of `weight`.
    """
    if padding_idx is not None:
        if not -weight.size(0) <= padding_idx < weight.size(0):
            raise AssertionError("Padding_idx must be within num_embeddings")
        padding_idx %= weight.size(0)
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(weight, input.contiguous(), max_norm, norm_type)
    padding = -1 if padding_idx is None else padding_idx
    return EmbeddingFunction.apply(weight, input, weight.size(0), padding, scale_grad_by_freq, sparse)


register(
    embedding,
    samples=lambda t: [
        Call(t.index(6, 4, 3), t(6, 2)),
        Call(t.index(6, 7), t(6, 2), padding_idx=-2).with_gradient_by_definition(),
        Call(t.index(3, 7), t(3, 2), scale_grad_by_freq=True, padding_idx=1).with_gradient_by_definition(),
        Call(t.index(6), t(6, 2)),
    ],
    big=lambda t: Call(t.index(8192, 4096), t(8192, 512)),
)
