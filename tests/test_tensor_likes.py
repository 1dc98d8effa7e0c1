"""Nested, sparse and other tensor-likes get torch's functions. Tools work, or their error says what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph import nodes
from torch import Tensor, nn
from torch.testing import assert_close

import manualgrad
import manualgrad.nn as manual_nn
from manualgrad import convert, override_torch_functions, record_fallbacks


def jagged(features: int = 8) -> Tensor:
    torch.manual_seed(0)
    rows = [torch.randn(2, features), torch.randn(3, features)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


LAYERS: dict[str, Callable[[Any], nn.Module]] = {
    "Linear": lambda lib: lib.Linear(8, 8),
    "LayerNorm": lambda lib: lib.LayerNorm(8),
    "RMSNorm": lambda lib: lib.RMSNorm(8),
    "GELU": lambda lib: lib.GELU(),
    "SiLU": lambda lib: lib.SiLU(),
    "Tanh": lambda lib: lib.Tanh(),
    "Softmax": lambda lib: lib.Softmax(-1),
    "ReLU": lambda lib: lib.ReLU(),
    "Dropout": lambda lib: lib.Dropout(0.5),
    "MLP": lambda lib: lib.Sequential(lib.Linear(8, 8), lib.ReLU(), lib.LayerNorm(8), lib.Linear(8, 2)),
}


def build(make: Callable[[Any], nn.Module], lib: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(lib)


def output_and_gradients(layer: nn.Module) -> tuple[Tensor, ...]:
    x = jagged()
    torch.manual_seed(1)
    output = layer(x)
    found = torch.autograd.grad(output.values().square().sum(), (x, *layer.parameters()))
    return output.values(), found[0].values(), *found[1:]


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_jagged_tensors(layer: str) -> None:
    expected = output_and_gradients(build(LAYERS[layer], nn))
    with record_fallbacks() as fallbacks:
        assert_close(output_and_gradients(build(LAYERS[layer], manual_nn)), expected, rtol=0, atol=0)
    assert {found.reason for found in fallbacks} == {"a torch.nested._internal.nested_tensor.NestedTensor"}
    converted = convert(build(LAYERS[layer], nn), functional=True)
    assert_close(output_and_gradients(converted), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_jagged_functions() -> None:
    query = torch.nested.nested_tensor([torch.randn(2, 4, 8), torch.randn(3, 4, 8)], layout=torch.jagged)
    query = query.transpose(1, 2).detach().requires_grad_()
    index = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([0])], layout=torch.jagged)
    weight = torch.randn(3, 4, requires_grad=True)
    for lib in (F, manual_nn.functional):
        attended = lib.scaled_dot_product_attention(query, query, query)
        assert torch.autograd.grad(attended.values().sum(), query)[0].is_nested
        assert torch.autograd.grad(lib.embedding(index, weight).values().sum(), weight)[0].shape == weight.shape


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_the_encoder_uses_its_fast_path_for_padded_batches() -> None:
    def make(lib: Any) -> Any:
        torch.manual_seed(0)
        layer = lib.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return lib.TransformerEncoder(layer, 2).eval()

    x, padded = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        expected = make(nn)(x, src_key_padding_mask=padded)
        assert_close(make(manual_nn)(x, src_key_padding_mask=padded), expected)
        assert_close(convert(make(nn))(x, src_key_padding_mask=padded), expected)


class Recorder:
    """Not a tensor, but with ``__torch_function__``."""

    called: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> str:
        cls.called.append(func)
        return "handled"


class RecordingTensor(Tensor):
    """A subclass with ``__torch_function__``, which calls the function."""

    called: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.called.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class PlainTensor(Tensor):
    """A subclass with Tensor's ``__torch_function__``."""


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "linear": lambda lib, x: lib.linear(x, torch.ones(4, 4)),  # a function of manualgrad's
    "relu": lambda lib, x: lib.relu(x),
    "leaky_relu": lambda lib, x: lib.leaky_relu(x, 0.1, True),
    "mse_loss": lambda lib, x: lib.mse_loss(x, torch.zeros(2, 4)),  # torch's function with manualgrad's kernel
    "mse_loss of a target": lambda lib, x: lib.mse_loss(input=torch.zeros(2, 4), target=x),
    "cross_entropy": lambda lib, x: lib.cross_entropy(x, torch.tensor([1, 2])),
    "max_pool1d": lambda lib, x: lib.max_pool1d(x, 2),
    "max_pool1d with indices": lambda lib, x: lib.max_pool1d(x, 2, return_indices=True),
    "layer_norm": lambda lib, x: lib.layer_norm(x, (4,)),
    "softmax": lambda lib, x: lib.softmax(x, -1),
    "pad": lambda lib, x: lib.pad(x, (1, 1)),
    "gelu of a keyword": lambda lib, x: lib.gelu(input=x),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [Recorder, lambda: torch.randn(2, 4).as_subclass(RecordingTensor)])
def test_torch_function_receives_torchs_function(call: str, make: Callable[[], Any]) -> None:
    x = make()
    called: list[list[Any]] = []
    for lib in (F, manual_nn.functional):
        type(x).called = []
        CALLS[call](lib, x)
        called.append(type(x).called)
    assert called[0]
    assert called[1] == called[0]


@pytest.mark.parametrize("call", CALLS)
def test_a_plain_subclass_has_manual_gradients(call: str) -> None:
    base, libraries = torch.randn(2, 4, requires_grad=True), (manual_nn.functional, F)
    with record_fallbacks(error=True):
        found, expected = (CALLS[call](lib, (base * 1).as_subclass(PlainTensor)) for lib in libraries)
    parts = [x if isinstance(x, tuple) else (x,) for x in (found, expected)]
    assert [type(x) for x in parts[0]] == [type(x) for x in parts[1]] == [PlainTensor] * len(parts[0])
    assert "FunctionBackward" in " ".join(nodes(parts[0][0]))
    grads = [torch.autograd.grad(x[0].sum(), base)[0].as_subclass(Tensor) for x in parts]
    assert_close(*grads)


def test_a_mode_keeps_manual_gradients() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    with torch.device("cpu"), record_fallbacks(error=True):
        for call in CALLS.values():
            output = call(manual_nn.functional, x * 1)
            assert "FunctionBackward" in " ".join(nodes(output[0] if isinstance(output, tuple) else output))


SPARSE: dict[str, Callable[[Any], Tensor]] = {
    "a CSR weight": lambda lib: lib.linear(torch.ones(2, 3), torch.eye(3).to_sparse_csr()),
    "relu": lambda lib: lib.relu(torch.eye(3).to_sparse()),
    "quantized": lambda lib: lib.max_pool2d(
        torch.quantize_per_tensor(torch.ones(1, 1, 4, 4), 1.0, 0, torch.quint8), 2
    ),
    "nested": lambda lib: lib.relu(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "mkldnn": lambda lib: lib.relu(torch.ones(2, 3).to_mkldnn()),
}


@pytest.mark.filterwarnings("ignore:.*(beta|prototype|deprecated|quantize|nested)")
@pytest.mark.parametrize("case", SPARSE)
def test_other_layouts_fall_back(case: str) -> None:
    def dense(x: Tensor) -> Any:
        if x.is_nested:
            return [*x.unbind()]
        return x.dequantize() if x.is_quantized else x.to_dense()

    with record_fallbacks() as fallbacks:
        found = SPARSE[case](manual_nn.functional)
    expected = SPARSE[case](F)
    assert (found.layout, found.dtype) == (expected.layout, expected.dtype)
    assert_close(dense(found), dense(expected))
    assert fallbacks or case == "quantized"


# --- tools ---


def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    return nn.Sequential(*parts)


class CallsFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(F.relu(self.layers(input)), -1)


def step(model: nn.Module) -> list[Tensor | None]:
    model.zero_grad()
    torch.manual_seed(1)
    output: Tensor = model(torch.randn(3, 1, 8, 8))
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("make", [network, CallsFunctions])
@pytest.mark.parametrize("training", [False, True])
def test_fx_traces_a_converted_model(make: Callable[[], nn.Module], training: bool) -> None:
    model = make().train(training)
    expected = step(copy.deepcopy(model))
    traced = torch.fx.symbolic_trace(convert(model, functional=True))
    assert {type(module) for module in traced.modules()} > {
        manual_nn.Conv2d,
        manual_nn.BatchNorm2d,
    }  # fx calls these layers
    assert_close(step(copy.deepcopy(traced)), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("functional", [False, True])
def test_jit_trace_records_torchs_functions(functional: bool) -> None:
    model = CallsFunctions().eval()
    expected = step(copy.deepcopy(model))
    with record_fallbacks() as fallbacks:
        traced: Any = torch.jit.trace(convert(model, functional=functional), torch.randn(3, 1, 8, 8))
    assert any("jit.trace" in found.reason for found in fallbacks)
    assert_close(step(traced), expected)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return manual_nn.functional.dropout(manual_nn.functional.linear(manual_nn.functional.relu(x * w), w), 0.0)

    traced = torch.jit.trace(function, (torch.ones(2), torch.ones(2, requires_grad=True)))
    assert_close(traced(-torch.ones(2), torch.ones(2)), torch.tensor(0.0))


def test_export() -> None:
    model, x = convert(CallsFunctions().eval(), functional=True), torch.randn(3, 1, 8, 8)
    assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*is deprecated:FutureWarning", "ignore:Please use", "ignore:torch.quan"
)
def test_tools_that_need_torchs_classes_say_what_to_do() -> None:
    from torch.ao import quantization
    from torch.ao.quantization.quantize_fx import prepare_fx

    def prepare(model: nn.Module) -> nn.Module:
        mapping = quantization.get_default_qconfig_mapping("x86")
        return prepare_fx(model, mapping, (torch.randn(1, 1, 8, 8),))

    for tool in (torch.jit.script, quantization.quantize_dynamic, prepare):
        model = convert(network().eval())
        with pytest.raises(RuntimeError, match=r"manualgrad.revert\(model\) first"):
            tool(model)
        tool(manualgrad.revert(model))
    with pytest.raises(RuntimeError, match="script supports"):
        torch.jit.script(convert(CallsFunctions(), functional=True))


def test_inside_the_override() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    with override_torch_functions(), record_fallbacks() as fallbacks:
        assert type(torch.softmax(x.as_subclass(PlainTensor), -1)) is PlainTensor
        assert not fallbacks
        RecordingTensor.called = []
        torch.softmax(x.as_subclass(RecordingTensor), -1)
        assert torch.softmax in RecordingTensor.called
        x.pow(x)
    assert sorted(found.function for found in fallbacks) == ["pow", "softmax"]
