"""Modules of other packages that are not classes of torch.nn, and manualgrad's forward for each.

An adapter names the classes that it is for, and the forward that `convert` gives to their modules:

    @register_adapter(r"\\w*QuickGELU\\w*")
    def quick_gelu(module, input):
        return SwishFunction.apply(input, 1.702)

Packages use one name for different computations, and change them. So an adapter is used only if it computes the
same as the module on trial inputs. The adapters below are for `transformers`, which is not imported here.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from manualgrad.fallback import UNRELATED_ERRORS
from manualgrad.nn import functional
from manualgrad.ops.activation import SwishFunction
from manualgrad.ops.arithmetic import multiply
from manualgrad.ops.linear_cross_entropy import linear_cross_entropy_in_float32
from manualgrad.rebinding import rebind

Forward = TypeVar("Forward", bound=Callable[[Any, Tensor], Tensor])


class Adapter(NamedTuple):
    """A forward for the modules of some classes."""

    classes: re.Pattern[str]
    """Matches the names of the classes."""
    forward: Callable[[Any, Tensor], Tensor]
    features: Callable[[Any], int]
    """The size of the last axis of a trial input for a module."""


_adapters: list[Adapter] = []


def register_adapter(
    classes: str, *, features: Callable[[Any], int] = lambda module: 64
) -> Callable[[Forward], Forward]:
    """Register the decorated function, ``forward(module, input)``, as the forward that `convert` gives to modules.

    `convert` uses it for a module of one input if the name of its class matches and if the function returns the
    same value and dtype as the module on trial inputs of shape (2, 3, ``features(module)``). The trial inputs are
    small and large numbers in the dtype of the parameters, and in bfloat16 too where this is float32. Adapters
    that were registered later are tried first. To pickle converted models, the function must be at the top level
    of a module.

    Args:
        classes: a regular expression for the whole name of a class.
        features: the size of the last axis of the module's input.
    """

    def register(forward: Forward) -> Forward:
        _adapters.insert(0, Adapter(re.compile(classes), forward, features))
        return forward

    return register


def find_adapter(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """The forward of the adapter for this module, if there is one."""
    name = type(module).__name__
    return next((x.forward for x in _adapters if x.classes.fullmatch(name) and _agrees(module, x)), None)


_SCALES = torch.tensor([[[0.1], [1.0], [16.0]]], dtype=torch.float64)
"""Of the rows of a trial input. Some activations differ for large numbers only."""


def _agrees(module: nn.Module, adapter: Adapter) -> bool:
    """The adapter computes the same as the module, to its precision (at most float32 in transformers' norms).

    A module in float32 is tried in bfloat16 too: it is given this under autocast, and modules differ in what they
    return then.
    """
    parameter = next(module.parameters(), torch.empty(0, dtype=torch.float64))
    if parameter.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        trial = torch.randn(2, 3, adapter.features(module), generator=generator, dtype=torch.float64)
        trials = [(trial * _SCALES).to(parameter)]
    except Exception:  # the module lacks an attribute that the adapter reads
        return False
    if parameter.dtype == torch.float32:
        trials.append(trials[0].bfloat16())
    for trial in trials:
        expected, found = (
            _try_forward(forward, module, trial) for forward in (type(module).forward, adapter.forward)
        )
        if expected is None and trial is not trials[0]:  # the module does not support bfloat16
            continue
        tolerance = max(1e-5, 4 * torch.finfo(trial.dtype).eps)
        if expected is None or found is None or found.dtype != expected.dtype:
            return False
        if not torch.allclose(found, expected, tolerance, tolerance, equal_nan=True):
            return False
    return True


def _try_forward(forward: Callable[[Any, Tensor], Tensor], module: nn.Module, trial: Tensor) -> Tensor | None:
    """The output for a trial input; None if the forward raises an error."""
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng([trial.device] if trial.is_cuda else []),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return forward(module, trial)
    except UNRELATED_ERRORS:
        raise
    except Exception:
        return None


# --- transformers ---

_ACTIVATIONS = r"\w*(GELU|GeLU|SiLU|Mish)\w*"


@register_adapter(_ACTIVATIONS)
def gelu(module: Any, input: Tensor) -> Tensor:
    return functional.gelu(input)


@register_adapter(_ACTIVATIONS)
def gelu_tanh(module: Any, input: Tensor) -> Tensor:
    return functional.gelu(input, approximate="tanh")


@register_adapter(_ACTIVATIONS)
def quick_gelu(module: Any, input: Tensor) -> Tensor:
    """x σ(1.702 x)"""
    return SwishFunction.apply(input, 1.702)


@register_adapter(_ACTIVATIONS)
def silu(module: Any, input: Tensor) -> Tensor:
    return functional.silu(input)


@register_adapter(_ACTIVATIONS)
def mish(module: Any, input: Tensor) -> Tensor:
    return functional.mish(input)


@register_adapter(r"Conv1D", features=lambda module: module.nx)
def transposed_linear(module: Any, input: Tensor) -> Tensor:
    """GPT-2's linear layer, with a weight of shape (in, out)."""
    return functional.linear(input, module.weight.mT, module.bias)


def _epsilon(module: Any) -> float:
    return next(vars(module)[name] for name in ("variance_epsilon", "eps", "epsilon") if name in vars(module))


_NORMS = r"\w*(RMSNorm|T5LayerNorm)"


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


@register_adapter(_NORMS, features=lambda module: module.weight.numel())
def rms_norm_rounded_last(module: Any, input: Tensor) -> Tensor:
    """w x / √(E x² + ε), in float32 at least, rounded to the dtype of x."""
    x, weight = _at_least_float32(input, module.weight)
    return functional.rms_norm(x, tuple(weight.shape), weight, _epsilon(module)).type_as(input)


@register_adapter(_NORMS, features=lambda module: module.weight.numel())
def rms_norm(module: Any, input: Tensor) -> Tensor:
    """w x / √(E x² + ε), in float32 at least, rounded once (transformers: in float32 at most, rounded twice).

    With a weight in float32 and an input in bfloat16, x / √(E x² + ε) is rounded, and the product with w is not.
    """
    weight, shape = module.weight, tuple(module.weight.shape)
    if weight.dtype == input.dtype:
        return functional.rms_norm(input, shape, weight, _epsilon(module))
    return weight * functional.rms_norm(input, shape, None, _epsilon(module))


@register_adapter(_NORMS, features=lambda module: module.weight.numel())
def rms_norm_weight_plus_one(module: Any, input: Tensor) -> Tensor:
    """(1 + w) x / √(E x² + ε), of Gemma"""
    x, weight = _at_least_float32(input, module.weight)
    return functional.rms_norm(x, tuple(weight.shape), 1 + weight, _epsilon(module)).type_as(input)


@register_adapter(r"\w*T5LayerNorm", features=lambda module: module.weight.numel())
def rms_norm_in_float32(module: Any, input: Tensor) -> Tensor:
    """w x / √(E x² + ε), of T5: with a weight in float32 nothing is rounded."""
    weight = module.weight
    return functional.rms_norm(input.to(weight.dtype), tuple(weight.shape), weight, _epsilon(module))


@register_adapter(r"\w*MLP", features=lambda module: module.gate_proj.in_features)
def gated_mlp(module: Any, input: Tensor) -> Tensor:
    """W₃ (f(W₁ x) · W₂ x), of Llama"""
    return module.down_proj(multiply(module.act_fn(module.gate_proj(input)), module.up_proj(input)))


# --- the loss of a causal language model, without logits ---


class LossFusion:
    """One forward of a language model. The model calls its head, which returns its input. The loss function then
    calls the head again, which returns the loss, computed from this input without logits."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        self.hidden: Any = None
        """The input of the head."""
        self.compute_loss: Callable[[Any], Tensor] | None = None
        """What the head does in its second call."""

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """transformers' ``ForCausalLMLoss`` of the logits that the head would compute."""
        if logits is not self.hidden or vocab_size != self.head.weight.shape[0]:
            raise RuntimeError(
                f"{type(self.model).__name__} changes its logits before the loss (scales, caps or selects them), "
                "so the loss cannot be computed without logits: call manualgrad.revert(model), then convert it "
                "without fused_loss"
            )
        targets: Any = shift_labels
        if targets is None:
            targets = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        self.compute_loss = lambda hidden: linear_cross_entropy_in_float32(
            hidden.flatten(0, -2),
            self.head.weight,
            targets.flatten().to(hidden.device),
            linear_bias=self.head.bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        loss = self.head(self.hidden)  # by a call of the module, for which FSDP gathers its weights
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def without_logits(self, output: Any) -> Any:
        """The model's output without the logits."""
        if isinstance(output, tuple):  # the loss, the logits, more
            return output[:1] + output[2:]
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})


_fusion: ContextVar[LossFusion | None] = ContextVar("_fusion", default=None)


def supports_fused_loss(module: Any) -> bool:
    """The module is a causal language model of transformers with the usual loss and a linear head.

    A wrapper that passes on the attributes of the model inside (PEFT's) does not count: the class itself must
    define the loss.
    """
    if not isinstance(inspect.getattr_static(type(module), "loss_function", None), property):
        return False
    usual = getattr(module.loss_function, "__name__", "") == "ForCausalLMLoss"
    return usual and _is_plain_linear(module.get_output_embeddings())


def _is_plain_linear(head: Any) -> bool:
    """The head is a linear layer that does not override its forward: the loss reads its weight and bias only."""
    forwards = (nn.Linear.forward, rebind(nn.Linear).forward)
    return (
        isinstance(head, nn.Linear)
        and "forward" not in vars(head)
        and inspect.unwrap(type(head).forward) in forwards
    )


def fused_model(cls: type[nn.Module]) -> dict[str, Any]:
    """The methods of a language model that computes its loss without logits, in training if labels are given."""
    signature, original = inspect.signature(cls.forward), inspect.getattr_static(cls, "loss_function")

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        labels = signature.bind(self, *args, **kwargs).arguments.get("labels")
        if labels is None or not self.training:
            return cls.forward(self, *args, **kwargs)
        fusion = LossFusion(self)
        token = _fusion.set(fusion)
        try:
            return fusion.without_logits(cls.forward(self, *args, **kwargs))
        finally:
            _fusion.reset(token)

    def loss_function(self: Any) -> Any:
        fusion = _fusion.get()
        return original.fget(self) if fusion is None or fusion.model is not self else fusion.loss

    return {"forward": forward, "loss_function": property(loss_function, original.fset)}


def fused_head(cls: type[nn.Module]) -> dict[str, Any]:
    """The methods of the head of such a model."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        fusion = _fusion.get()
        if fusion is None or fusion.head is not self:
            return cls.forward(self, input)
        if fusion.compute_loss is not None:
            return fusion.compute_loss(input)
        fusion.hidden = input
        return input

    return {"forward": forward}
