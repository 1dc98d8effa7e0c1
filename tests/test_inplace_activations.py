"""In-place activations save no more than torch's, and give torch's gradients and errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_recomputation import ROWS, WIDTH, run, saved_size
from torch import Tensor

import manualgrad.nn.functional as F
from manualgrad import convert, override_torch_functions, recomputation, revert
from manualgrad.registry import Op, TensorFactory


@pytest.fixture(autouse=True)
def _recompute_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputation, "MIN_ELEMENTS", 0)


SIDE = 16
ACTIVATIONS: dict[str, Callable[[bool], torch.nn.Module]] = {
    "relu": lambda inplace: torch.nn.ReLU(inplace),
    "leaky relu": lambda inplace: torch.nn.LeakyReLU(0.1, inplace),
    "elu": lambda inplace: torch.nn.ELU(0.7, inplace),
    "celu": lambda inplace: torch.nn.CELU(0.7, inplace),
    "selu": lambda inplace: torch.nn.SELU(inplace),
    "relu6": lambda inplace: torch.nn.ReLU6(inplace),
    "hardtanh": lambda inplace: torch.nn.Hardtanh(-0.5, 0.7, inplace),
    "threshold": lambda inplace: torch.nn.Threshold(0.1, 7.0, inplace),
    "rrelu": lambda inplace: torch.nn.RReLU(inplace=inplace),
    "rrelu in eval mode": lambda inplace: torch.nn.RReLU(inplace=inplace).eval(),
    "silu": lambda inplace: torch.nn.SiLU(inplace),
    "mish": lambda inplace: torch.nn.Mish(inplace),
    "hardswish": lambda inplace: torch.nn.Hardswish(inplace),
    "hardsigmoid": lambda inplace: torch.nn.Hardsigmoid(inplace),
    "dropout": lambda inplace: torch.nn.Dropout(0.3, inplace),
    "dropout2d": lambda inplace: torch.nn.Dropout2d(0.3, inplace),
    "alpha dropout": lambda inplace: torch.nn.AlphaDropout(0.3, inplace),
    "feature alpha dropout": lambda inplace: torch.nn.FeatureAlphaDropout(0.3, inplace),
}


class Doubled(torch.nn.Module):
    """A residual connection."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.detach()


BEFORE: dict[str, Callable[[], torch.nn.Module]] = {
    "nothing": torch.nn.Identity,
    "batch norm": lambda: torch.nn.BatchNorm2d(4),
    "batch norm in eval mode": lambda: torch.nn.BatchNorm2d(4).eval(),
    "group norm": lambda: torch.nn.GroupNorm(2, 4),
    "instance norm": lambda: torch.nn.InstanceNorm2d(4, affine=True),
    "layer norm": lambda: torch.nn.LayerNorm(SIDE),
    "sum": lambda: torch.nn.Sequential(torch.nn.BatchNorm2d(4), Doubled()),
    "gelu": torch.nn.GELU,
}
AFTER = {"convolution": lambda: torch.nn.Conv2d(4, 2, 1), "linear": lambda: torch.nn.Linear(SIDE, 2)}


def network(before: str, activation: str, after: str, inplace: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 4, 1), BEFORE[before](), ACTIVATIONS[activation](inplace), AFTER[after]()]
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saves_no_more(activation: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves no more than torch in place and than manualgrad out of place. The gradients are torch's."""
    monkeypatch.setattr(recomputation, "MIN_ELEMENTS", 2**40 if small else 0)
    x = torch.randn(2, 2, SIDE, SIDE)
    for before in BEFORE:
        for after in AFTER:
            torch_model = network(before, activation, after, inplace=True)
            manual_model = convert(copy.deepcopy(torch_model))
            size = saved_size(manual_model, x)
            assert size <= saved_size(torch_model, x), (before, after)
            assert size <= saved_size(convert(network(before, activation, after, inplace=False)), x), (
                before,
                after,
            )
            if after == "linear":
                continue
            found, expected = [
                torch.autograd.grad(run(model, x).sin().sum(), list(model.parameters()))
                for model in (manual_model, torch_model)
            ]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "leaky relu"])
def test_before_a_pool(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool saves nothing of its input, so a bit mask is enough."""
    monkeypatch.setattr(recomputation, "MIN_ELEMENTS", 0)
    x = torch.randn(2, 2, SIDE, SIDE)

    def network(inplace: bool) -> torch.nn.Module:
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(2, 4, 1), ACTIVATIONS[activation](inplace), torch.nn.MaxPool2d(2)]
        return torch.nn.Sequential(*layers, torch.nn.Conv2d(4, 2, 1))

    torch_model, out_of_place = network(True), convert(network(False))
    manual_model = convert(convert(copy.deepcopy(torch_model)))
    assert saved_size(manual_model, x) == saved_size(out_of_place, x) < saved_size(torch_model, x) / 2
    found, expected = [
        torch.autograd.grad(run(model, x).sin().sum(), list(model.parameters()))
        for model in (manual_model, torch_model)
    ]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    kinds = [type(layer) for layer in manual_model.children()]
    assert [type(layer) for layer in pickle.loads(pickle.dumps(manual_model)).children()] == kinds
    assert [type(layer) for layer in revert(manual_model).children()] == [
        type(layer) for layer in torch_model.children()
    ]


def test_bfloat16_and_channels_last() -> None:
    x = torch.randn(2, 2, SIDE, SIDE).bfloat16().contiguous(memory_format=torch.channels_last)
    for activation in ACTIVATIONS:
        torch_model = network("batch norm", activation, "convolution", inplace=True).bfloat16()
        assert saved_size(convert(copy.deepcopy(torch_model)), x) <= saved_size(torch_model, x), activation


@pytest.mark.parametrize("name", ["sigmoid_", "tanh_", "relu_"])
def test_inplace_methods_save_only_their_output(name: str) -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with override_torch_functions():
        assert saved_size(lambda: getattr(x * 2, name)().square()) == x.nbytes  # both save the same tensor
        (found,) = torch.autograd.grad(getattr(x * 2, name)().sin().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(getattr(x * 2, name)().sin().sum(), x)[0])


def write_into_view(use_torch: bool, activation: str, view: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """Apply an activation in place to a view. Returns the output and its derivatives, or the error message."""
    whole = x * 1
    try:
        torch.manual_seed(0)
        module = ACTIVATIONS[activation](True)
        at = view(x if view is itself else whole)
        output = module(at) if use_torch else convert(module)(at)
        (first,) = torch.autograd.grad(whole.sin().sum() + output.cos().sum(), x, create_graph=True)
        return output is at, output.detach().clone(), first, *torch.autograd.grad(first.square().sum(), x)
    except RuntimeError as error:
        return str(error)


def itself(x: Tensor) -> Tensor:
    return x


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x.view_as(x),
    "some rows": lambda x: x[1:3],
    "flat": lambda x: x.flatten(1).unflatten(1, x.shape[1:]),
    "transposed": lambda x: x.transpose(1, 2),
    "chunk": lambda x: x.chunk(2)[0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "view made in no_grad": torch.no_grad()(lambda x: x[1:3]),
    "a leaf": itself,
}


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of the view changes too. Errors are torch's, and then nothing is written."""
    monkeypatch.setattr(recomputation, "MIN_ELEMENTS", 2**40 if small else 0)
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    unchanged = x.detach().clone()
    for activation in ACTIVATIONS:
        if activation == "hardsigmoid":  # torch has no second derivative
            continue
        found, expected = (write_into_view(use_torch, activation, VIEWS[view], x) for use_torch in (False, True))
        if isinstance(expected, str):
            assert found == expected, activation
        else:
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(x.detach(), unchanged, rtol=0, atol=0)


def test_write_to_the_output_raises_as_in_torch() -> None:
    """It raises if the gradient needs the output."""
    for activation, make in ACTIVATIONS.items():
        found = []
        for model in (make(True), convert(make(True))):
            x = torch.randn(4, 2, 3, 3, requires_grad=True)
            output = model(x * 1).add_(1)
            try:
                output.sum().backward()
                found.append("computed")
            except RuntimeError as error:
                found.append("raised" if "modified by an inplace operation" in str(error) else str(error))
        if not activation.startswith("rrelu"):  # saves only its slopes in training mode
            assert found[0] == found[1], activation


def test_settings_for_which_the_output_does_not_determine_the_gradient() -> None:
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    calls: list[Callable[..., Tensor]] = [
        lambda functional, x, inplace: functional.leaky_relu(x, -0.5, inplace),
        lambda functional, x, inplace: functional.elu(x, -0.5, inplace),
        lambda functional, x, inplace: functional.celu(x, -0.5, inplace),
        lambda functional, x, inplace: functional.threshold(x, 0.1, 7.0, inplace),
    ]
    for call in calls:  # torch does not differentiate some of them in place
        (expected,) = torch.autograd.grad(call(torch.nn.functional, x * 1, False).sin().sum(), x)
        for inplace in (False, True):
            (found,) = torch.autograd.grad(call(F, x * 1, inplace).sin().sum(), x)
            torch.testing.assert_close(found, expected)


def test_every_output_can_be_overwritten(op: Op, number: int) -> None:
    """autograd forbids writes into a view that a custom Function returns, so no rule returns one."""
    args, kwargs = list(op.sample_inputs(TensorFactory()))[number].with_requires_grad()
    output = op.function(*args, **kwargs)
    for tensor in output if isinstance(output, tuple) else (output,):
        if isinstance(tensor, Tensor) and not tensor.is_leaf:
            tensor.mul_(2)
