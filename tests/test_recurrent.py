"""Recurrent modules compared with torch: what the sample inputs leave out, mainly packed sequences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from manualgrad import nn

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
KINDS = ("RNN", "GRU", "LSTM")


def results(namespace: Any, name: str, input: Any, dtype: torch.dtype, **settings: Any) -> tuple[Any, Any, Any]:
    """Outputs, gradients, and gradients of these."""
    torch.manual_seed(0)
    module = getattr(namespace, name)(3, 4, dtype=dtype, **settings)
    torch.manual_seed(1)
    outputs = [x for x in tree_leaves(module(input)) if isinstance(x, Tensor) and x.is_floating_point()]
    parameters = list(module.parameters())
    twice = dtype == torch.float64  # oneDNN's kernel has no second derivative
    loss = sum((x.sin().sum() for x in outputs), torch.zeros((), dtype=dtype))
    first = torch.autograd.grad(loss, parameters, create_graph=twice)
    if not twice:
        return outputs, first, None
    moved = sum((x.square().sum() for x in first), torch.zeros((), dtype=dtype))
    return outputs, first, torch.autograd.grad(moved, parameters)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", [(2, 4, 1), (2, 2)])
@pytest.mark.parametrize("name", KINDS)
def test_packed_sequences(name: str, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """To the last bit in both directions, though torch begins with the longest sequence when it goes back."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 3, dtype=dtype, generator=generator) for n in lengths]
    packed = pack_sequence(parts, enforce_sorted=False)
    for layers, both, bias in itertools.product((1, 2), (False, True), (False, True)):
        settings = {"num_layers": layers, "bidirectional": both, "bias": bias, "dropout": 0.5 * (layers - 1)}
        manual, expected = (results(space, name, packed, dtype, **settings) for space in (nn, torch.nn))
        assert_close(manual[0], expected[0], rtol=0, atol=0)
        assert_close(manual[1:], expected[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"proj_size": 2}, {"bidirectional": True}, {"batch_first": True}])
@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 3)])
def test_lstm(shape: tuple[int, ...], settings: dict[str, Any], dtype: torch.dtype) -> None:
    input = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    manual, expected = (results(space, "LSTM", input, dtype, **settings) for space in (nn, torch.nn))
    assert_close(manual[0], expected[0], rtol=0, atol=0)
    assert_close(manual[1:], expected[1:])


@pytest.mark.parametrize("grad", [True, False])
def test_values_of_an_lstm_for_training_and_for_inference(grad: bool) -> None:
    """oneDNN's kernels for the two differ in the last bits."""
    for steps, n, width in ((27, 1, 24), (16, 1, 28), (4, 38, 32)):
        outputs = []
        for space in (nn, torch.nn):
            torch.manual_seed(steps)
            module, input = space.LSTM(width, 32), torch.randn(steps, n, width)
            with torch.set_grad_enabled(grad):
                outputs.append(module(input)[0].detach())
        assert torch.equal(*outputs)


@pytest.mark.parametrize("name", KINDS)
def test_what_does_not_fit_is_refused(name: str) -> None:
    """Where torch's LSTM in float32 reads past the end, or kills the process."""
    module, input = getattr(nn, name)(3, 4), torch.randn(5, 2, 3)
    for weight in list(module.parameters()):
        whole = weight.data
        weight.data = whole[:-1]
        with pytest.raises(RuntimeError):
            module(input)
        weight.data = whole
    function = {"RNN": nn.RNN.forward.__globals__["_VF"].rnn_tanh}.get(name)
    run = function or getattr(nn.LSTM.forward.__globals__["_VF"], name.lower())
    hx = torch.zeros(1, 1, 4)
    with pytest.raises(RuntimeError):
        run(input, [hx, hx] if name == "LSTM" else hx, module._flat_weights, True, 1, 0.0, True, False, False)


def test_output_may_be_overwritten() -> None:
    for name in KINDS:
        module, input = getattr(nn, name)(3, 4, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
        found = [
            torch.autograd.grad(activation(module(input)[0]).sum(), list(module.parameters()))
            for activation in (nn.ReLU(inplace=True), nn.ReLU())
        ]
        assert_close(*found)
