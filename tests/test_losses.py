"""What the laws do not reach: the losses that torch's modules compose, and where torch is wrong or has nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph import MOVES_OR_ADDS, nodes
from torch import Tensor
from torch.testing import assert_close

from manualgrad import nn
from manualgrad.meter import saved_bytes
from manualgrad.registry import Maker

ours: Any = nn.functional


def rules(output: Tensor) -> set[str]:
    return {name for name in nodes(output) if name not in MOVES_OR_ADDS}


def test_embedding_bag_by_frequency_is_right_where_torch_is_not() -> None:
    """A row used k times in sums gets k upstreams over k; torch 2.13 divides by the count of another row."""
    index, offset = torch.tensor([0, 0, 0, 0, 1, 2, 2]), torch.tensor([0])
    found = []
    for functional in (ours, F):
        weight = torch.zeros(3, 1, requires_grad=True)
        functional.embedding_bag(index, weight, offset, mode="sum", scale_grad_by_freq=True).sum().backward()
        found.append(weight.grad)
    assert_close(found[0], torch.ones(3, 1))
    assert found[1].flatten().tolist() == [1, 0.25, 0.5]


def test_sparse_embedding_bag() -> None:
    index, offsets = torch.tensor([1, 2, 2, 5]), torch.tensor([0, 3])
    for mode in ("sum", "mean"):
        found = []
        for functional in (ours, F):
            weight = Maker()(6, 2).requires_grad_()
            output = functional.embedding_bag(index, weight, offsets, mode=mode, sparse=True, padding_idx=2)
            output.sin().sum().backward()
            assert weight.grad is not None
            assert weight.grad.is_sparse
            found.append(weight.grad.to_dense())
        assert_close(found[0], found[1])


def test_after_log_softmax_the_gradient_of_ctc_is_the_derivative_to_second_order() -> None:
    """torch has neither its forward mode nor its second derivative."""
    lengths = (torch.tensor([5, 4]), torch.tensor([2, 1]))
    targets = torch.tensor([[1, 1], [2, 0]])

    def loss(x: Tensor) -> Tensor:
        return ours.ctc_loss(x.log_softmax(-1), targets, *lengths)

    x = Maker()(5, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(loss, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, x, check_fwd_over_rev=True)


@pytest.mark.parametrize("cutoffs", [[3], [2, 5]])
def test_adaptive_softmax_calls_ours(cutoffs: list[int]) -> None:
    results = []
    for module in (nn, torch.nn):
        torch.manual_seed(0)
        softmax = module.AdaptiveLogSoftmaxWithLoss(4, 8, cutoffs, div_value=2.0, head_bias=True).double()
        x = Maker()(6, 4).requires_grad_()
        output, loss = softmax(x, torch.tensor([0, 7, 2, 5, 4, 0]))
        gradients = torch.autograd.grad(loss, [x, *softmax.parameters()])
        results.append([output, loss, *gradients, softmax.log_prob(x), softmax.predict(x)])
        if module is nn:
            assert rules(loss) == {f"{name}FunctionBackward" for name in ("Linear", "LogSoftmax")}
            assert rules(softmax.log_prob(x)) == rules(loss)
    assert_close(results[0], results[1], rtol=0, atol=1e-14)


needs_linear_cross_entropy = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch has it since 2.13"
)


def in_pieces(**settings: Any) -> dict[str, Any]:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None, allow_retain_graph=True)
    return {"target": torch.tensor([0, 2, 1, -100, 2]), "options": options, **settings}


@needs_linear_cross_entropy
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_in_pieces(reduction: str) -> None:
    """As torch's, and the whole; torch's second derivative is missing."""
    make = Maker()
    tensors = [make(5, 2).requires_grad_(), make(3, 2).requires_grad_(), make(3).requires_grad_()]
    settings = in_pieces(reduction=reduction, weight=make(3, low=0.5, high=2))

    def loss(x: Tensor, weight: Tensor, bias: Tensor, function: Any = ours, **more: Any) -> Tensor:
        given = settings | more
        return function.linear_cross_entropy(x, weight, given.pop("target"), linear_bias=bias, **given)

    results = []
    for output in (loss(*tensors), loss(*tensors, options=None), loss(*tensors, function=F)):
        results.append([output, *torch.autograd.grad(output.sin().sum(), tensors)])
    assert_close(results[0], results[1])
    assert_close(results[0], results[2])
    assert rules(loss(*tensors)) == {"LinearCrossEntropyLossFunctionBackward"}
    assert torch.autograd.gradcheck(loss, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, tensors, check_fwd_over_rev=True)


@needs_linear_cross_entropy
def test_linear_cross_entropy_in_pieces_keeps_no_scores() -> None:
    make = Maker(torch.float32)
    x, weight, target = make(64, 4).requires_grad_(), make(512, 4).requires_grad_(), make.index(512, 64)

    def kept(**more: Any) -> int:
        return saved_bytes(lambda: ours.linear_cross_entropy(x, weight, target, **more)).everything

    assert kept(options=in_pieces()["options"]) < kept() / 8
