"""Models of `transformers` with random weights: conversion keeps their loss and gradients, and can be reverted."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graph import nodes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import manualgrad
from manualgrad import convert, revert
from manualgrad.adapters import find_adapter

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
IDS = torch.arange(14).remainder(11).reshape(2, 7)
IMAGE = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).sin().reshape(2, 3, 32, 32)


def factory(name: str, model: str | None = None, /, **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        if "vocab_size" not in config and name not in ("ViT", "ResNet", "ConvNext"):
            config["vocab_size"] = 29
        cls = getattr(transformers, model or f"{name}ForCausalLM")
        built = cls(getattr(transformers, f"{name}Config")(**config)).to(torch.float64)
        for parameter in built.parameters():  # of norms and biases too
            nn.init.normal_(parameter, std=0.2)
        return built.train()

    return make


LLAMA = SMALL | {"num_key_value_heads": 1}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "use_cache": False}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
VIT = SMALL | {"image_size": 32, "patch_size": 16, "num_labels": 3}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
CONVNEXT = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_labels": 3}
WHISPER = (
    {"d_model": 16, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 9}
    | {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    | {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
)

LANGUAGE = {
    "gpt2": factory("GPT2", "GPT2LMHeadModel", **GPT2),
    "llama": factory("Llama", **LLAMA),
    "qwen2": factory("Qwen2", **LLAMA),
    "mistral": factory("Mistral", **LLAMA),
    "gemma": factory("Gemma", **LLAMA, head_dim=8),
    "mamba": factory("Mamba", **MAMBA),
}
TEXT = {"input_ids": IDS, "labels": IDS}
CLASSES = {"pixel_values": IMAGE, "labels": torch.tensor([0, 2])}
SPEECH = {"input_features": IMAGE.reshape(-1)[:128].reshape(2, 4, 16), "labels": IDS}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    **{name: (make, TEXT) for name, make in LANGUAGE.items()},
    "bert": (factory("Bert", "BertForMaskedLM", **SMALL), TEXT),
    "t5": (factory("T5", "T5ForConditionalGeneration", **T5), TEXT),
    "t5-gated": (factory("T5", "T5ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu"), TEXT),
    "vit": (factory("ViT", "ViTForImageClassification", **VIT), CLASSES),
    "resnet": (factory("ResNet", "ResNetForImageClassification", **RESNET), CLASSES),
    "convnext": (factory("ConvNext", "ConvNextForImageClassification", **CONVNEXT), CLASSES),
    "whisper": (factory("Whisper", "WhisperForConditionalGeneration", **WHISPER), SPEECH),
}
CASES = [pytest.param(*case, id=name) for name, case in MODELS.items()]


class InFloat64(TorchFunctionMode):
    """transformers computes norms, softmaxes and losses in float32, whatever the model: here in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float or (func is Tensor.to and args[1:] == (torch.float32,)):
            return args[0] if args[0].dtype == torch.float64 else func(*args, **kwargs)
        if kwargs.get("dtype") is torch.float32 and "softmax" in getattr(func, "__name__", ""):
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


@pytest.fixture
def in_float64() -> Iterator[None]:
    with InFloat64():
        yield


def step(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and all gradients, for equal random numbers."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("make", "inputs"), CASES)
def test_loss_and_gradients(make: Callable[[], Any], inputs: dict[str, Any]) -> None:
    model = make()
    before = [type(module) for module in model.modules()]
    expected = step(copy.deepcopy(model), inputs)
    convert(model, functional=True)
    assert_close(step(model, inputs), expected, rtol=1e-9, atol=1e-9)
    assert_close(step(pickle.loads(pickle.dumps(model)), inputs), expected, rtol=1e-9, atol=1e-9)
    revert(model)
    assert [type(module) for module in model.modules()] == before
    assert_close(step(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("make", "inputs"), CASES)
def test_without_functional(make: Callable[[], Any], inputs: dict[str, Any]) -> None:
    model = make()
    expected = step(copy.deepcopy(model), inputs)
    assert_close(step(convert(model), inputs), expected, rtol=1e-4, atol=1e-4)  # norms in float32 there


def test_which_modules_are_converted() -> None:
    model = convert(LANGUAGE["llama"]())
    notes = {row.class_name: row.note for row in manualgrad.conversion_report(model).rows if row.converted}
    assert notes["LlamaRMSNorm"] == "its forward is manualgrad.adapters.rms_norm"
    assert notes["LlamaMLP"] == "its forward is manualgrad.adapters.gated_mlp"
    gemma = convert(LANGUAGE["gemma"]())
    notes = {row.class_name: row.note for row in manualgrad.conversion_report(gemma).rows if row.converted}
    assert notes["GemmaRMSNorm"] == "its forward is manualgrad.adapters.rms_norm_weight_plus_one"
    gpt2 = convert(LANGUAGE["gpt2"](), functional=True)
    names = nodes(gpt2(input_ids=IDS, labels=IDS).loss)
    assert "AddmmBackward0" not in names
    names = {name for name in names if not name.endswith("FunctionBackward")}
    assert not [name for name in names if any(x in name for x in ("Norm", "Gelu", "Softmax", "Tanh", "Nll"))]


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "quick_gelu"]
)
def test_activations(name: str) -> None:
    module = transformers.activations.ACT2FN[name]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    expected = module(x)
    found = convert(module)(x)
    assert any(name.endswith("FunctionBackward") for name in nodes(found))
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    a, b = (torch.autograd.grad(y.sum(), x)[0] for y in (found, expected))
    assert_close(a, b, rtol=1e-9, atol=1e-9)


NORMS = {"llama": "LlamaRMSNorm", "gemma": "GemmaRMSNorm", "t5": "T5LayerNorm", "gpt_oss": "GptOssRMSNorm"}
ACTIVATIONS = ("gelu_new", "gelu_python", "quick_gelu", "gelu_10", "silu")


@pytest.mark.parametrize(
    ("weight_dtype", "input_dtype"), [("bfloat16",) * 2, ("float16",) * 2, ("float32", "bfloat16")]
)
@pytest.mark.parametrize("name", [*NORMS, *ACTIVATIONS])
def test_low_precision_error(name: str, weight_dtype: str, input_dtype: str) -> None:
    """Value and gradients in low precision are as close to float64 as those of the original module."""
    torch.manual_seed(0)
    if name in NORMS:
        package = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        module = getattr(package, NORMS[name])(64)
    else:
        module = copy.deepcopy(transformers.activations.ACT2FN[name])
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module = module.to(getattr(torch, weight_dtype))
    x = (4 * torch.randn(64, 64)).to(getattr(torch, input_dtype))
    grad_output = torch.randn(64, 64).bfloat16()

    def results(module: nn.Module, x: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), *module.parameters()]
        y = module(leaves[0])
        return [y.detach(), *torch.autograd.grad(y, leaves, grad_output.to(y.dtype))]

    with InFloat64():
        exact = results(copy.deepcopy(module).double(), x.double())
    expected, found = results(copy.deepcopy(module), x), results(convert(module, functional=True), x)
    for a, b, truth in zip(found, expected, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - truth).norm() <= 1.02 * (b - truth).norm()


class OtherRMSNorm(nn.Module):
    """Computes something else than its name says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, input: Tensor) -> Tensor:
        return input * self.weight


class NoRMSNorm(nn.Identity):
    """Has no weight."""


def test_adapters_are_tried_on_inputs() -> None:
    for module in (OtherRMSNorm(), NoRMSNorm(), OtherRMSNorm().to("meta")):
        assert find_adapter(module) is None
        assert type(convert(module)) is type(module)


def test_trials_have_no_side_effects() -> None:
    model = LANGUAGE["llama"]()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    state = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


class TwiceActivation(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input.relu() + input.relu()


def twice(module: Any, input: Tensor) -> Tensor:
    return 2 * manualgrad.nn.functional.relu(input)


def test_register_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manualgrad.adapters._adapters", [])
    manualgrad.register_adapter(r"Twice\w+")(twice)
    module = convert(TwiceActivation())
    x = torch.randn(4, requires_grad=True)
    assert "ReLUFunctionBackward" in nodes(module(x))
    assert_close(module(input=x), 2 * x.relu())
    assert type(pickle.loads(pickle.dumps(module))) is type(module)
    assert type(revert(module)) is TwiceActivation


# --- the loss without logits ---


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize(
    "more", [{}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(5)}, {"shift_labels": IDS}]
)
def test_fused_loss(name: str, more: dict[str, Any]) -> None:
    labels = IDS.masked_fill(IDS == 3, -100)
    inputs = {"input_ids": IDS, "labels": labels, **more}
    model = LANGUAGE[name]()
    before = [type(module) for module in model.modules()]
    expected = step(copy.deepcopy(model), inputs)
    unfused = copy.deepcopy(model)
    convert(convert(model, functional=True, fused_loss=True), fused_loss=True)
    for converted in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(step(converted, inputs), expected, rtol=1e-9, atol=1e-9)
    output = model(**inputs)
    assert output.logits is None
    assert len(model(**inputs, return_dict=False)) == len(unfused(**inputs, return_dict=False)) - 1
    assert model(input_ids=IDS).logits.shape == (2, 7, 29)
    assert_close(model.eval()(**inputs).logits, unfused.eval()(**inputs).logits, rtol=1e-9, atol=1e-9)
    revert(model)
    assert [type(module) for module in model.modules()] == before
    assert_close(step(model.train(), inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": 11}])
def test_fused_loss_in_low_precision(dtype: torch.dtype, more: dict[str, Any]) -> None:
    """The loss is in float32, and the gradients are as close to float64 as those of the original model."""
    model = LANGUAGE["llama"]().to(dtype)
    inputs = TEXT | more
    with InFloat64():
        loss, exact = step(copy.deepcopy(model).double(), inputs)
    errors = []
    for candidate in (model, convert(copy.deepcopy(model), functional=True, fused_loss=True)):
        found, gradients = step(candidate, inputs)
        assert found.dtype == torch.float32
        assert found != found.to(dtype)
        assert abs(found - loss) <= torch.finfo(dtype).eps * loss / 16
        errors.append(sum((a - b).norm() ** 2 for a, b in zip(gradients, exact, strict=True)))  # type: ignore[operator]
    assert errors[1] <= 1.04 * errors[0]


@pytest.mark.parametrize("fused_loss", [False, True])
def test_logits_are_not_saved(fused_loss: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("manualgrad.ops.linear_cross_entropy")
    monkeypatch.setattr(module, "MAX_LOGITS_PER_CHUNK", 4 * 29)
    saved: list[torch.Size] = []
    model = convert(LANGUAGE["llama"](), fused_loss=fused_loss)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        model(input_ids=IDS, labels=IDS)
    assert any(shape[-1:] == (29,) and shape.numel() >= 14 * 29 for shape in saved) is not fused_loss


def test_fused_loss_is_refused() -> None:
    for model in (nn.Linear(2, 2), MODELS["bert"][0]()):
        with pytest.raises(ValueError, match="fused_loss"):
            convert(model, fused_loss=True)
    capped = factory("Gemma2", **LLAMA, head_dim=8, final_logit_softcapping=5.0)()
    convert(capped, fused_loss=True)
    with pytest.raises(RuntimeError, match="changes its logits before the loss"):
        capped(input_ids=IDS, labels=IDS)
    assert capped(input_ids=IDS).logits.shape == (2, 7, 29)


@pytest.mark.usefixtures("in_float64")
def test_gradient_checkpointing() -> None:
    inputs = {"input_ids": IDS, "labels": IDS}
    model = LANGUAGE["llama"]()
    expected = step(copy.deepcopy(model), inputs)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_close(
            step(convert(model, functional=True, fused_loss=True), inputs), expected, rtol=1e-9, atol=1e-9
        )


def test_compiled() -> None:
    inputs = {"input_ids": IDS, "labels": IDS}
    model = LANGUAGE["llama"]()
    expected = step(copy.deepcopy(model), inputs)
    for fused_loss in (False, True):
        torch._dynamo.reset()
        convert(model, functional=True, fused_loss=fused_loss)
        found = step(torch.compile(model, backend="aot_eager"), inputs)
        assert_close(found, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = convert(LANGUAGE["llama"](), functional=True)
    model.save_pretrained(tmp_path)
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(other.state_dict(), model.state_dict())
    generated = model.eval().generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, other.eval().generate(IDS, max_new_tokens=3, do_sample=False))


class Wrapper(torch.nn.Module):
    """Passes on the attributes of the model inside, as in PEFT."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class Scaled(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def small_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def with_peft(model: Any, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [Wrapper, lambda model: with_peft(model, target_modules=["q_proj"])])
def test_fused_loss_of_a_wrapped_model(wrap: Any) -> None:
    ids = torch.randint(0, 99, (2, 8))
    torch.manual_seed(0)
    model = wrap(small_llama())
    expected = model(input_ids=ids, labels=ids).loss
    output = manualgrad.convert(model, functional=True, fused_loss=True)(input_ids=ids, labels=ids)
    assert "logits" not in output
    torch.testing.assert_close(output.loss, expected)
    classes = [type(module) for module in manualgrad.revert(model).modules()]
    assert not any("_generated_from" in vars(cls) for cls in classes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: with_peft(small_llama(), target_modules=["lm_head"]),
        lambda: with_peft(small_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
        lambda: _with_scaled_head(small_llama()),
    ],
    ids=["LoRA on the head", "a copy of the head", "a head with a forward"],
)
def test_other_heads_are_refused(make: Any) -> None:
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="fused_loss"):
        manualgrad.convert(model, functional=True, fused_loss=True)
    assert [type(module) for module in model.modules()] == before


def _with_scaled_head(model: Any) -> Any:
    model.lm_head = Scaled(32, 99, bias=False)
    return model


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "resnet", "convnext", "t5", "whisper"])
def test_program(name: str) -> None:
    """The program of a model has its loss and its gradients."""
    make, inputs = MODELS[name]
    model, reference = make(), make()
    for x in (*model.modules(), *reference.modules()):
        if hasattr(x, "config"):
            x.config.use_cache = False  # torch.export knows no caches
    module = manualgrad.export(model, (), inputs).module()
    torch.manual_seed(1)
    loss = module(**inputs).loss
    loss.backward()
    expected, gradients = step(reference, inputs)
    assert_close(loss.detach(), expected, rtol=1e-10, atol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if gradient is not None:
            assert parameter.grad is not None
            scale = gradient.abs().max().item()
            assert_close(parameter.grad, gradient, rtol=0, atol=1e-9 * scale + 1e-14)
