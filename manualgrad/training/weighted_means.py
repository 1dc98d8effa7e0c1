"""The count of a loss or metric: what its mean is a mean over.

Batches may have different counts. The mean over several batches weights each mean by its count:

    mean = Σ countᵢ meanᵢ / Σ countᵢ

The count depends on the loss. With ``ignore_index`` it is the number of targets that are not ignored, with class
weights the sum of their weights, for MSELoss the number of elements. `compute_mean` determines it by recording the
call of a loss function of torch.nn.functional or manualgrad.nn.functional, inside of a module or of a user's
function.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Count = float | Tensor
LossOrMetric = Callable[[Any, Tensor], Any]
"""Maps (prediction, target) to a scalar, the mean over the batch, or to a pair (mean, count).

The count is what the mean is a mean over, such as the number of tokens that are not padding. It is a number or a
scalar tensor. Where it is 0 the mean is not used and may be NaN. If the callable returns no count:

- if it calls one loss function of torch.nn.functional or manualgrad.nn.functional with ``reduction="mean"``,
  directly or through a module such as CrossEntropyLoss, the count is what that function divides by;
- otherwise the count is the number of examples in the batch, the length of the target.
"""


class Mean(NamedTuple):
    """A mean and its count."""

    value: Any
    count: Count


def compute_mean(function: LossOrMetric, prediction: Any, target: Tensor, examples: int) -> Mean:
    """Evaluate a loss or metric on a batch, and determine its count.

    Args:
        examples: the examples of the batch. If 0, the count is 0 too.

    Raises:
        ValueError: if the result is a sum over the batch, or the count is not a number.
    """
    with _RecordLossCalls() as mode:
        value = function(prediction, target)
    if not mode.calls and (original := _uncompiled(function)) is not None:
        with torch.no_grad(), mode:  # the mode does not record compiled calls of manualgrad.nn.functional
            original(prediction, target)
    means, sums = [], []
    for loss_function, args, kwargs, result in mode.calls:
        call = _bind(loss_function, args, kwargs)
        if call.reduction in ("mean", "batchmean"):
            means.append(call)
        elif call.reduction == "sum":
            sums.append(result)
    count: Any = examples
    if isinstance(value, tuple) and len(value) == 2:
        value, count = value
        if not isinstance(count, (int, float)) and not (isinstance(count, Tensor) and count.numel() == 1):
            raise ValueError(f"the count of a loss or metric must be a number, not {_describe(count)}")
    elif len(means) == 1:
        with torch.no_grad():
            count = _COUNTS[means[0].name](means[0])
    if any(value is total for total in sums):
        raise ValueError(
            "a loss or metric must be a mean, but this is a sum (reduction='sum'): use reduction='mean', or "
            "return the pair (sum / count, count)"
        )
    return Mean(value, count if examples else 0)


def zero_loss(prediction: Any, loss: Tensor) -> Tensor:
    """Return a zero with zero gradients, in place of the loss of a batch with count 0.

    That loss is NaN, and its gradient by the prediction may be NaN. So this zero depends on the prediction only.
    """
    outputs = [x for x in tree_leaves(prediction) if isinstance(x, Tensor) and x.is_floating_point()]
    zeros = [torch.where(torch.zeros_like(x, dtype=torch.bool), x, 0).sum().to(loss) for x in outputs]
    zero = sum(zeros, torch.zeros_like(loss))
    return zero if zero.requires_grad or not loss.requires_grad else zero.requires_grad_()


def to_numbers(means: Mapping[str, Mean]) -> dict[str, tuple[float, float]]:
    """Convert means and counts to numbers. This waits for the device.

    Raises:
        ValueError: for a count that is negative, infinite or NaN.
    """

    def number(value: Tensor | float) -> float:
        return float(value.item() if isinstance(value, Tensor) else value)

    numbers = {name: (number(mean.value), number(mean.count)) for name, mean in means.items()}
    for name, (_, count) in numbers.items():
        if not 0 <= count < math.inf:
            raise ValueError(f"the count of {name!r} is {count}: it must not be negative, infinite or NaN")
    return numbers


class _RecordLossCalls(TorchFunctionMode):
    """Records each call of a loss function: function, arguments, result. (Dynamo can trace this mode.)"""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _COUNTS or not (func.__module__ or "").startswith(("torch.nn.", "manualgrad.")):
            return func(*args, **kwargs)
        if name == "l1_loss" and "weight" not in kwargs and not torch.compiler.is_compiling():
            kwargs = {**kwargs, "weight": _missing_weight(func)}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


def _missing_weight(function: Any) -> Any:
    """Return the weight of l1_loss from its stack frame: torch (up to 2.14 at least) does not pass it to a
    mode."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("weight")


def _uncompiled(function: Any) -> Any:
    return getattr(function, "_orig_mod", None) or getattr(function, "_torchdynamo_orig_callable", None)


_signature = cache(inspect.signature)


def _bind(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """Return all arguments of a call by name. The deprecated size_average and reduce become a reduction."""
    bound = _signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    call = SimpleNamespace(name=function.__name__, **bound.arguments)
    deprecated = getattr(call, "size_average", None), getattr(call, "reduce", None)
    if deprecated != (None, None):
        call.reduction = _reduction.legacy_get_string(*deprecated, emit_warning=False)
    return call


def _describe(count: Any) -> str:
    return f"of shape {tuple(count.shape)}" if isinstance(count, Tensor) else f"a {type(count).__name__}"


# What each loss function of torch divides its sum by if the reduction is "mean".


def _shape(*tensors: Any) -> torch.Size:
    return torch.broadcast_shapes(*(x.shape for x in tensors if isinstance(x, Tensor)))


def _elements(*tensors: Any) -> int:
    return _shape(*tensors).numel()


def _pairs(call: Any) -> Count:
    return _elements(call.input, call.target)


def _weighted_pairs(call: Any) -> Count:
    weight = getattr(call, "weight", None)  # torch 2.11 has none everywhere
    return _pairs(call) if weight is None else weight.sum(dtype=torch.float64)


def _rows(call: Any) -> Count:
    """The rows of an input of shape (rows, classes) or (classes)."""
    return len(call.input) if call.input.dim() == 2 else 1


def _targets(call: Any) -> Count:
    """The targets that are not ignored, each weighted by its class weight. Label smoothing changes nothing."""
    ignored = -100 if call.ignore_index is None else call.ignore_index
    valid = call.target != ignored
    if call.weight is None:
        return valid.sum()
    return (call.weight.take(call.target * valid) * valid).sum(dtype=torch.float64)


def _targets_or_probabilities(call: Any) -> Count:
    if not call.target.is_floating_point():
        return _targets(call)
    classes = call.target.shape[min(call.target.dim() - 1, 1)]
    return call.target.numel() // max(classes, 1)  # class weights do not matter


def _gaussian(call: Any) -> Count:
    var = call.var
    if isinstance(var, Tensor) and var.dim() < call.input.dim():
        var = var.unsqueeze(-1)
    return _elements(call.input, call.target, var)


def _triplets(call: Any) -> Count:
    return _shape(call.anchor, call.positive, call.negative)[:-1].numel()


_COUNTS: dict[str, Callable[[Any], Count]] = {
    "binary_cross_entropy": _pairs,
    "binary_cross_entropy_with_logits": _pairs,
    "cosine_embedding_loss": lambda call: _elements(call.input1[..., 0], call.input2[..., 0], call.target),
    "cross_entropy": _targets_or_probabilities,
    "ctc_loss": lambda call: call.log_probs.shape[1] if call.log_probs.dim() == 3 else 1,
    "gaussian_nll_loss": _gaussian,
    "hinge_embedding_loss": _pairs,
    "huber_loss": _pairs,  # the weights do not matter
    "kl_div": lambda call: len(call.input) if call.reduction == "batchmean" else _pairs(call),
    "l1_loss": _weighted_pairs,
    "linear_cross_entropy": _targets_or_probabilities,
    "margin_ranking_loss": lambda call: _elements(call.input1, call.input2, call.target),
    "mse_loss": _weighted_pairs,
    "multi_margin_loss": _rows,  # class weights do not matter
    "multilabel_margin_loss": _rows,
    "multilabel_soft_margin_loss": lambda call: (
        _elements(call.input, call.target, call.weight) // max(call.input.shape[-1], 1)
    ),
    "nll_loss": _targets,
    "poisson_nll_loss": _pairs,
    "smooth_l1_loss": _pairs,
    "soft_margin_loss": _pairs,
    "triplet_margin_loss": _triplets,
    "triplet_margin_with_distance_loss": lambda call: (call.distance_function or torch.pairwise_distance)(
        call.anchor, call.positive
    ).numel(),
}
