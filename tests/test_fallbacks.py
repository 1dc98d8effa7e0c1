"""Fallbacks to torch are counted, and errors do not cause fallbacks."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import manualgrad.nn as manual_nn
from manualgrad import FallbackError, Rule, convert, override, override_torch_functions, record_fallbacks, registry
from manualgrad.fallback import Fallbacks
from manualgrad.ops import activation, dropout, normalization
from manualgrad.registry import SampleInput, register

ERRORS = (
    *(torch.OutOfMemoryError("out of memory"), KeyboardInterrupt(), RuntimeError("a bug in manualgrad")),
    *(AttributeError("a bug in manualgrad"), RuntimeError("CUDA error: an illegal memory access")),
)


@pytest.fixture(params=ERRORS, ids=[type(error).__name__ for error in ERRORS])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BaseException:
    """The rules of ReLU, dropout and batch norm raise an error, dropout after it has drawn random numbers."""

    def fail(rule: Any, after: Any = None) -> None:
        def apply(*args: Any, **kwargs: Any) -> Any:
            if after is not None:
                after(*args)
            raise request.param

        monkeypatch.setattr(rule, "apply", apply)

    fail(activation.ReLUFunction)
    fail(dropout.DropoutFunction, lambda *_: torch.rand(()))
    fail(normalization.BatchNormFunction)
    return request.param


@pytest.mark.parametrize("overridden", [False, True])
def test_error_in_a_rule_is_raised_unchanged(
    failing: BaseException, overridden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("relu", "dropout"):
        torch_function: Any = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda x, *a, f=torch_function, **k: (x.is_meta or called.append("run"), f(x, *a, **k))[1]
        )
    x = torch.randn(3, 4, requires_grad=True)
    lib = F if overridden else manual_nn.functional
    mean = torch.zeros(4)
    for call in (
        lambda: lib.relu(x),
        lambda: lib.dropout(x, 0.5, True),
        lambda: lib.batch_norm(x, mean, torch.ones(4), training=True),
    ):
        torch.manual_seed(0)
        context = override_torch_functions() if overridden else nullcontext()
        with record_fallbacks() as fallbacks, pytest.raises(type(failing)) as caught, context:
            call()
        assert caught.value is failing
        assert not fallbacks
    assert not called, "torch's forward ran after the error"
    assert_close(mean, torch.zeros(4))


def test_random_numbers_are_drawn_once(failing: BaseException) -> None:
    torch.manual_seed(0)
    torch.rand(())
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    with pytest.raises(type(failing)):
        manual_nn.functional.dropout(torch.ones(3), 0.5, True)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("overridden", [False, True])
def test_user_function_is_called_once(overridden: bool) -> None:
    calls: list[int] = []

    def distance(a: Tensor, b: Tensor) -> Tensor:
        calls.append(1)
        raise ZeroDivisionError("a bug in user code")

    tensors = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    lib = F if overridden else manual_nn.functional
    with pytest.raises(ZeroDivisionError), override_torch_functions() if overridden else record_fallbacks():
        lib.triplet_margin_with_distance_loss(*tensors, distance_function=distance)
    assert len(calls) == 1


@pytest.mark.parametrize("overridden", [False, True])
def test_bad_input_raises_torch_errors_and_changes_nothing(overridden: bool) -> None:
    mean, x = torch.zeros(4), torch.randn(3, 5, requires_grad=True)
    state = torch.get_rng_state()

    def calls(lib: Any) -> list[Any]:
        return [
            lambda: lib.batch_norm(x, mean, mean, training=True),
            lambda: lib.dropout(x, 2.0),
            lambda: lib.linear(x, torch.ones(2, 3)),
            lambda: lib.cross_entropy(x, torch.tensor([0, 9, 1])),
            lambda: lib.gelu(x, approximate="unknown"),
            lambda: lib.layer_norm(x, (3,)),
        ]

    for call, torch_call in zip(calls(F if overridden else manual_nn.functional), calls(F), strict=True):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as expected:
            torch_call()
        with (
            pytest.raises(type(expected.value)) as found,
            override_torch_functions() if overridden else record_fallbacks(),
        ):
            call()
        assert type(found.value) is type(expected.value)
        assert str(found.value) == str(expected.value)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(mean, torch.zeros(4))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_counts_and_error() -> None:
    x = torch.randn(3, requires_grad=True)
    with record_fallbacks() as outer:
        with override_torch_functions(), record_fallbacks() as fallbacks:
            x.pow(x)
            torch.dropout(x, 0.5, True)  # F.dropout has a rule
            torch.pow(x, 2)  # so has this
            (2**x).sum().backward()
            with torch.no_grad():
                x.pow(x)  # no gradient is needed
        manual_nn.functional.relu(torch.eye(2).to_sparse())
    assert {found.function: n for found, n in fallbacks.items()} == {"pow": 1, "dropout": 1}
    assert all("no overload" in found.reason for found in fallbacks)
    assert outer.total() == fallbacks.total() + 1
    assert "    1 pow " in str(fallbacks)
    assert "relu" not in str(fallbacks)
    assert "layout sparse_coo" in str(outer)
    assert str(Fallbacks()) == "no fallbacks to torch's functions"
    with (
        pytest.raises(FallbackError, match=r"pow: .*no overload"),
        record_fallbacks(error=True),
        override_torch_functions(),
    ):
        x.pow(x)
    with pytest.raises(FallbackError, match="linear: a tensor of layout sparse_csr"), record_fallbacks(error=True):
        convert(nn.Linear(2, 2))(torch.eye(2).to_sparse_csr())


# --- operations registered late ---


class ErfFunction(Rule):
    """∂L/∂x = g 2/√π exp(-x²)"""

    def forward(input: Tensor) -> Tensor:
        return torch.erf(input)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        return grad * (2 / math.sqrt(math.pi)) * torch.exp(-(input**2))


def erf(input: Tensor) -> Tensor:
    return ErfFunction.apply(input)


INPUTS: Any = {"sample_inputs": lambda t: [SampleInput(t(3))], "benchmark_input": lambda t: SampleInput(t(9))}


class Net(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return torch.erf(input) + input.erf()


def test_late_registration_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convert(Net(), functional=True), torch.randn(3, requires_grad=True)
    assert "ErfFunction" not in str(model(x).grad_fn.next_functions)
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    monkeypatch.setattr(override, "_overrides", dict(override._overrides))
    register(erf, **INPUTS)
    assert registry.ops()["erf"].function is erf
    assert str(model(x).grad_fn.next_functions).count("ErfFunction") == 2
    with pytest.raises(ValueError, match="erf is registered already"):
        register(erf, **INPUTS)


def test_late_registration_of_a_function_that_torch_nn_calls() -> None:
    def cat(tensors: list[Tensor]) -> Tensor:
        return tensors[0]

    before = dict(registry._table)
    with pytest.raises(ValueError, match=r"cat is called by torch\.nn.*register it in a file"):
        register(cat, **INPUTS)
    with pytest.raises(ValueError, match="relu is registered already"):
        register(manual_nn.functional.relu, **INPUTS)
    assert registry._table == before
