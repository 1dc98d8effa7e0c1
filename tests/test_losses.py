"""What the laws do not reach: the losses that torch's modules compose, and where torch is wrong or has nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph import STRUCTURAL_NODES, nodes
from torch import Tensor
from torch.testing import assert_close
from torch.torch_version import TorchVersion

from manualgrad import nn
from manualgrad.ops.linear import baddbmm
from manualgrad.registry import TensorFactory

manual_functional: Any = nn.functional


def rules(output: Tensor) -> set[str]:
    return {name for name in nodes(output) if name not in STRUCTURAL_NODES}


def test_embedding_bag_by_frequency_is_right_where_torch_is_not() -> None:
    """A row used k times in sums gets k upstreams over k; torch before 2.14 divides by another row's count."""
    index, offset = torch.tensor([0, 0, 0, 0, 1, 2, 2]), torch.tensor([0])
    found = []
    for functional in (manual_functional, F):
        weight = torch.zeros(3, 1, requires_grad=True)
        functional.embedding_bag(index, weight, offset, mode="sum", scale_grad_by_freq=True).sum().backward()
        found.append(weight.grad)
    assert_close(found[0], torch.ones(3, 1))
    wrong = torch.__version__ < TorchVersion("2.14")
    assert found[1].flatten().tolist() == ([1, 0.25, 0.5] if wrong else [1, 1, 1])


def test_sparse_embedding_bag() -> None:
    index, offsets = torch.tensor([1, 2, 2, 5]), torch.tensor([0, 3])
    for mode in ("sum", "mean"):
        found = []
        for functional in (manual_functional, F):
            weight = TensorFactory()(6, 2).requires_grad_()
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
        return manual_functional.ctc_loss(x.log_softmax(-1), targets, *lengths)

    x = TensorFactory()(5, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(loss, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, x, check_fwd_over_rev=True)


@pytest.mark.parametrize("cutoffs", [[3], [2, 5]])
def test_adaptive_softmax_calls_ours(cutoffs: list[int]) -> None:
    results = []
    for module in (nn, torch.nn):
        torch.manual_seed(0)
        softmax = module.AdaptiveLogSoftmaxWithLoss(4, 8, cutoffs, div_value=2.0, head_bias=True).double()
        x = TensorFactory()(6, 4).requires_grad_()
        output, loss = softmax(x, torch.tensor([0, 7, 2, 5, 4, 0]))
        gradients = torch.autograd.grad(loss, [x, *softmax.parameters()])
        results.append([output, loss, *gradients, softmax.log_prob(x), softmax.predict(x)])
        if module is nn:
            assert rules(loss) == {f"{name}FunctionBackward" for name in ("Linear", "LogSoftmax")}
            assert rules(softmax.log_prob(x)) == rules(loss)
    assert_close(results[0], results[1], rtol=0, atol=1e-14)


def test_l1_loss_of_a_real_and_a_complex_tensor() -> None:
    """The real one is sent the real part, whichever it is."""
    real = torch.randn(4, dtype=torch.float64, requires_grad=True)
    pair = (real, torch.randn(4, dtype=torch.complex128, requires_grad=True))
    for a, b in (pair, pair[::-1]):
        found, expected = (torch.autograd.grad(f.l1_loss(a, b), pair) for f in (manual_functional, F))
        assert_close(found, expected)


def test_baddbmm_by_complex_numbers() -> None:
    """Their conjugates carry the gradient back."""
    tensors = [torch.randn(2, 3, 3, dtype=torch.complex128, requires_grad=True) for _ in range(3)]
    torch.autograd.gradcheck(lambda c, a, b: baddbmm(c, a, b, beta=0.5 + 1j, alpha=2 - 1j), tensors)
