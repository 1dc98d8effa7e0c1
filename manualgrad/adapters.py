"""Modules that other packages write out in Python, computed by ours when `convert` meets them.

An adapter says by which names of classes such a module may go and what is then computed in its place:

    @register_adapter(r"\\w*QuickGELU\\w*")
    def quick_gelu(module, input):
        return SwishFunction.apply(input, 1.702)

A name proves nothing, and packages change. So a module is only taken for what an adapter says if on a trial input
it computes the same. The table below is for `transformers`, which is never imported here.
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
from manualgrad.ops.elementary import product
from manualgrad.ops.linear_cross_entropy import linear_cross_entropy_in_float32
from manualgrad.rebinding import derived

Forward = TypeVar("Forward", bound=Callable[[Any, Tensor], Tensor])


class Adapter(NamedTuple):
    """What is computed in place of modules whose class goes by such a name."""

    classes: re.Pattern[str]
    forward: Callable[[Any, Tensor], Tensor]
    features: Callable[[Any], int]


_adapters: list[Adapter] = []


def register_adapter(
    classes: str, *, features: Callable[[Any], int] = lambda module: 64
) -> Callable[[Forward], Forward]:
    """Enter the function that follows, ``forward(module, input)``, as what `convert` computes for some modules.

    Those are the modules of one input whose class's name matches `classes`, a regular expression, as a whole, and
    that give what the function gives, value and dtype, on trial inputs of shape (2, 3, ``features(module)``). The
    trials are small and large numbers in the dtype of the parameters, and in bfloat16 where that is float32. Later
    entries come first. For converted models to be pickled, the function must stand in a module.
    """

    def enter(forward: Forward) -> Forward:
        _adapters.insert(0, Adapter(re.compile(classes), forward, features))
        return forward

    return enter


def adapted(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """What is computed in this module's place, if there is something."""
    name = type(module).__name__
    return next((x.forward for x in _adapters if x.classes.fullmatch(name) and _agrees(module, x)), None)


_SCALES = torch.tensor([[[0.1], [1.0], [16.0]]], dtype=torch.float64)
"""Of the rows of a trial: an activation that clips, say, differs in large numbers only."""


def _agrees(module: nn.Module, adapter: Adapter) -> bool:
    """Both compute the same, to the precision that the module has (transformers' norms: float32 at best).

    Under autocast a module in float32 is given bfloat16, and modules differ in what they return then.
    """
    parameter = next(module.parameters(), torch.empty(0, dtype=torch.float64))
    if parameter.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        trial = torch.randn(2, 3, adapter.features(module), generator=generator, dtype=torch.float64)
        trials = [(trial * _SCALES).to(parameter)]
    except Exception:  # it has not the attributes that the adapter is for
        return False
    if parameter.dtype == torch.float32:
        trials.append(trials[0].bfloat16())
    for trial in trials:
        expected, found = (_result(forward, module, trial) for forward in (type(module).forward, adapter.forward))
        if expected is None and trial is not trials[0]:  # the module takes no bfloat16
            continue
        tolerance = max(1e-5, 4 * torch.finfo(trial.dtype).eps)
        if expected is None or found is None or found.dtype != expected.dtype:
            return False
        if not torch.allclose(found, expected, tolerance, tolerance, equal_nan=True):
            return False
    return True


def _result(forward: Callable[[Any, Tensor], Tensor], module: nn.Module, trial: Tensor) -> Tensor | None:
    """What a forward gives for a trial; None: it refuses it."""
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
    """GPT-2's linear layer, whose weight is (in, out)."""
    return functional.linear(input, module.weight.mT, module.bias)


def _epsilon(module: Any) -> float:
    return next(vars(module)[name] for name in ("variance_epsilon", "eps", "epsilon") if name in vars(module))


_NORMS = r"\w*(RMSNorm|T5LayerNorm)"


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


@register_adapter(_NORMS, features=lambda module: module.weight.numel())
def rms_norm_rounded_last(module: Any, input: Tensor) -> Tensor:
    """w x / √(E x² + ε), in float32 at least, rounded to the dtype of x."""
    x, weight = _widened(input, module.weight)
    return functional.rms_norm(x, tuple(weight.shape), weight, _epsilon(module)).type_as(input)


@register_adapter(_NORMS, features=lambda module: module.weight.numel())
def rms_norm(module: Any, input: Tensor) -> Tensor:
    """w x / √(E x² + ε), in float32 at least, rounded once (transformers: in float32 at most, and twice).

    With a weight in float32 and an input in bfloat16, x / √(E x² + ε) is rounded, and the product with w is not.
    """
    weight, shape = module.weight, tuple(module.weight.shape)
    if weight.dtype == input.dtype:
        return functional.rms_norm(input, shape, weight, _epsilon(module))
    return weight * functional.rms_norm(input, shape, None, _epsilon(module))


@register_adapter(_NORMS, features=lambda module: module.weight.numel())
def rms_norm_from_one(module: Any, input: Tensor) -> Tensor:
    """Gemma's: (1 + w) x / √(E x² + ε)"""
    x, weight = _widened(input, module.weight)
    return functional.rms_norm(x, tuple(weight.shape), 1 + weight, _epsilon(module)).type_as(input)


@register_adapter(r"\w*T5LayerNorm", features=lambda module: module.weight.numel())
def rms_norm_in_float32(module: Any, input: Tensor) -> Tensor:
    """T5's, which rounds nothing with a weight in float32."""
    weight = module.weight
    return functional.rms_norm(input.to(weight.dtype), tuple(weight.shape), weight, _epsilon(module))


@register_adapter(r"\w*MLP", features=lambda module: module.gate_proj.in_features)
def gated_mlp(module: Any, input: Tensor) -> Tensor:
    """Llama's: W₃ (f(W₁ x) · W₂ x)"""
    return module.down_proj(product(module.act_fn(module.gate_proj(input)), module.up_proj(input)))


# --- a causal language model and its loss, without logits ---


class Fusion:
    """One forward of a model. Its head is called twice: by the model, and returns its input; then by the loss, and
    returns the loss, computed from that input without logits."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        self.hidden: Any = None
        self.of_head: Callable[[Any], Tensor] | None = None

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
        """transformers' ``ForCausalLMLoss`` of what the head would make of its input."""
        if logits is not self.hidden or vocab_size != self.head.weight.shape[0]:
            raise RuntimeError(
                f"{type(self.model).__name__} does something to its logits before the loss (a scale, a cap, a "
                "choice), so the two cannot be one: revert it, and convert it without fused_loss"
            )
        targets: Any = shift_labels
        if targets is None:
            targets = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        self.of_head = lambda hidden: linear_cross_entropy_in_float32(
            hidden.flatten(0, -2),
            self.head.weight,
            targets.flatten().to(hidden.device),
            linear_bias=self.head.bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        loss = self.head(self.hidden)  # FSDP gathers the weights of a module when it is called
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def without_logits(self, output: Any) -> Any:
        """The model's output, but for the logits."""
        if isinstance(output, tuple):  # the loss, the logits, more
            return output[:1] + output[2:]
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})


_fusion: ContextVar[Fusion | None] = ContextVar("_fusion", default=None)


def fuses(module: Any) -> bool:
    """A causal language model of transformers with the usual loss and a linear layer for a head.

    Not a wrapper (PEFT's, say) that passes on the attributes of the model inside: the class itself has the loss.
    """
    if not isinstance(inspect.getattr_static(type(module), "loss_function", None), property):
        return False
    usual = getattr(module.loss_function, "__name__", "") == "ForCausalLMLoss"
    return usual and _plain_linear(module.get_output_embeddings())


def _plain_linear(head: Any) -> bool:
    """A linear layer with no forward of its own: the loss is computed from its weight and bias only."""
    linear = (nn.Linear.forward, derived(nn.Linear).forward)
    return (
        isinstance(head, nn.Linear)
        and "forward" not in vars(head)
        and inspect.unwrap(type(head).forward) in linear
    )


def fused_model(kind: type[nn.Module]) -> dict[str, Any]:
    """What a class has that computes its loss so, in training and when labels are given."""
    signature, theirs = inspect.signature(kind.forward), inspect.getattr_static(kind, "loss_function")

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        labels = signature.bind(self, *args, **kwargs).arguments.get("labels")
        if labels is None or not self.training:
            return kind.forward(self, *args, **kwargs)
        fusion = Fusion(self)
        before = _fusion.set(fusion)
        try:
            return fusion.without_logits(kind.forward(self, *args, **kwargs))
        finally:
            _fusion.reset(before)

    def loss_function(self: Any) -> Any:
        fusion = _fusion.get()
        return theirs.fget(self) if fusion is None or fusion.model is not self else fusion.loss

    return {"forward": forward, "loss_function": property(loss_function, theirs.fset)}


def fused_head(kind: type[nn.Module]) -> dict[str, Any]:
    """What a head's class has that leaves its work to the loss, if there will be one."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        fusion = _fusion.get()
        if fusion is None or fusion.head is not self:
            return kind.forward(self, input)
        if fusion.of_head is not None:
            return fusion.of_head(input)
        fusion.hidden = input
        return input

    return {"forward": forward}
