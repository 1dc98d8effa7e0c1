"""`override_torch_functions`: which calls it overrides. Values and errors stay torch's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph import nodes, torch_derivatives
from test_pytorchs_inputs import DTYPE, FunctionInput, assert_same_results, op_db, run_and_differentiate
from torch import Tensor
from torch.testing import assert_close

import manualgrad
from manualgrad import override_torch_functions
from manualgrad.override import find_override


def _variants(info: Any) -> list[Callable[..., Any]]:
    """The function, the method and the in-place method of an operation."""
    found = [info.op, info.method_variant]
    if (inplace := info.inplace_variant) is not None:
        found.append(lambda input, *args, **kwargs: inplace(input.clone(), *args, **kwargs))
    return [function for function in found if function is not None]


OVERRIDDEN = {name for space in (manualgrad.registry.ops(), vars(manualgrad.nn.functional)) for name in space} | {
    "abs",
    "pow",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "info",
    [
        pytest.param(info, id="-".join(filter(None, (info.name, info.variant_test_name))))
        for info in op_db
        if DTYPE in info.supported_dtypes("cpu") and info.name.rpartition(".")[2] in OVERRIDDEN
    ],
)
def test_every_variant_of_an_operation(info: Any) -> None:
    for function in _variants(info):
        for sample in info.sample_inputs("cpu", DTYPE, requires_grad=True):
            arguments = FunctionInput(sample.input, *sample.args, **sample.kwargs)
            try:
                expected = run_and_differentiate(function, arguments)
            except RuntimeError:  # this sample cannot be written in place
                continue
            with override_torch_functions():
                found = run_and_differentiate(function, arguments)
            assert_same_results(found, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.relu(x),
        lambda x: torch.relu(x),
        lambda x: x.relu(),
        lambda x: x.clone().relu_(),
        lambda x: F.relu(x.clone(), inplace=True),
        lambda x: x.softmax(-1),
        lambda x: torch.softmax(x, dim=1),
        lambda x: torch.softmax(input=x, dim=1),
        lambda x: torch.special.log_softmax(x, -1, dtype=torch.float64),
        lambda x: x.sigmoid(),
        lambda x: x.clone().tanh_(),
        lambda x: torch.layer_norm(x, (4,), None, None, 1e-5, False),
        lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        lambda x: F.max_pool1d(x, 2, return_indices=True)[0],
        lambda x: torch.bmm(x[None], x.mT[None]),
        lambda x: torch.embedding(x, indices=torch.tensor([0, 2])),
        lambda x: x.abs(),
        lambda x: F.mse_loss(x, x.detach()),
    ],
)
def test_overridden_calls(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True)
    with override_torch_functions():
        found = call(x)
    assert any(name.endswith("FunctionBackward") for name in nodes(found))
    assert not torch_derivatives(found)
    assert_close(found, call(x))
    assert torch_derivatives(call(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.pow(x.detach().abs()),  # another overload
        lambda x: torch.pow(2.0, x),
        lambda x: x.detach().relu(),
        lambda x: torch.tanh(x.detach(), out=torch.empty_like(x)),
        lambda x: x.detach().int().relu(),
        lambda x: x.detach().to_sparse().relu(),
        lambda x: torch.relu(x.to("meta")),
        lambda x: torch.relu(torch.quantize_per_tensor(x.detach().float(), 0.1, 0, torch.qint8)).dequantize(),
        lambda x: torch.nested.nested_tensor([x.detach()], layout=torch.jagged, requires_grad=True).relu().sum(),
        lambda x: x.unfold(0, 2, 1),  # not F.unfold
        lambda x: x.detach().char().abs(),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*deprecated:DeprecationWarning")
def test_calls_that_stay_torchs(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True)
    with override_torch_functions():
        found = call(x)
    assert not any(name.endswith("FunctionBackward") for name in nodes(found))
    if not found.is_meta:
        assert_close(found, call(x), equal_nan=True)


class Tagged(Tensor):
    """A subclass that records the functions that it is called with."""

    seen: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_with_torch_function_is_called() -> None:
    x = torch.randn(3).as_subclass(Tagged).requires_grad_()
    with override_torch_functions():
        assert type(F.gelu(x)) is Tagged
    assert F.gelu in Tagged.seen


def test_without_a_gradient_torch_computes() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert find_override(F.relu, (), (x,), {}) is not None
    with torch.no_grad():
        assert find_override(F.relu, (), (x,), {}) is None
    assert find_override(F.relu, (), (x.detach(),), {}) is None
    assert find_override(torch.add, (), (x, x), {}) is None


def test_nested_after_an_error_and_as_a_decorator() -> None:
    x = torch.randn(3, requires_grad=True)

    @override_torch_functions()
    def function(x: Tensor) -> Tensor:
        with override_torch_functions():
            inner = F.relu(x)
        return F.relu(inner)

    assert nodes(function(x)) == {"ReLUFunctionBackward", "AccumulateGrad"}
    assert nodes(function(x)) == {"ReLUFunctionBackward", "AccumulateGrad"}
    with pytest.raises(ZeroDivisionError), override_torch_functions():
        raise ZeroDivisionError
    assert nodes(F.relu(x)) == {"ReluBackward0", "AccumulateGrad"}


@pytest.mark.parametrize("exponent", [0, 1, 2, 0.5, -1])
def test_powers_at_zero(exponent: float) -> None:
    x = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    (expected,) = torch.autograd.grad(x.pow(exponent).sum(), x)
    with override_torch_functions():
        output = x.pow(exponent)
    assert nodes(output) == {"PowerFunctionBackward", "AccumulateGrad"}
    assert_close(torch.autograd.grad(output.sum(), x)[0], expected)


def test_other_threads_are_not_overridden() -> None:
    x = torch.randn(3, requires_grad=True)
    found: list[set[str]] = []
    with override_torch_functions():
        thread = threading.Thread(target=lambda: found.append(nodes(F.relu(x))))
        thread.start()
        thread.join()
    assert found == [{"ReluBackward0", "AccumulateGrad"}]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.linear(x, torch.randn(2, 5, dtype=x.dtype)),
        lambda x: x.softmax(7),
        lambda x: F.gelu(x, approximate="no"),
        lambda x: F.relu(x, nonsense=1),  # pyright: ignore[reportCallIssue]
        lambda x: x.relu_(),  # a leaf
        lambda x: F.cross_entropy(x, torch.tensor([1, 2, 9])),
    ],
)
def test_errors_are_torchs(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call(x)
    with pytest.raises(type(expected.value)) as found, override_torch_functions():
        call(x)
    assert str(found.value) == str(expected.value)


def test_transforms_forward_mode_and_second_derivatives() -> None:
    def function(x: Tensor) -> Tensor:
        return F.layer_norm(torch.tanh(x).softmax(-1), (4,)).pow(3).sum()

    x, v = torch.randn(2, 3, 4, dtype=DTYPE)
    for transformed in (
        lambda: torch.func.grad(function)(x),
        lambda: torch.func.vmap(torch.func.grad(function))(x),
        lambda: torch.func.jvp(function, (x,), (v,))[1],
        lambda: torch.func.hessian(function)(x),
        lambda: torch.autograd.functional.hvp(function, x, v)[1],
    ):
        expected = transformed()
        with override_torch_functions():
            assert_close(transformed(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 8, 8, requires_grad=True)
    results = []
    for context in (override_torch_functions(), nullcontext()):
        with context, torch.autocast("cpu", dtype=dtype):
            output = F.layer_norm(F.linear(x, w).softmax(-1), (8,))
        results.append((output, torch.autograd.grad(output.float().pow(3).sum(), x)[0]))
    assert results[0][0].dtype == results[1][0].dtype
    assert_close(*results, rtol=0.05, atol=0.05)


def test_backward_inside_the_context() -> None:
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True)
    with override_torch_functions():
        (g,) = torch.autograd.grad(x.sigmoid().pow(2).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), x)
    (g0,) = torch.autograd.grad(x.sigmoid().pow(2).sum(), x, create_graph=True)
    assert_close(h, torch.autograd.grad(g0.sum(), x)[0])
