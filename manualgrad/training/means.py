"""What a loss or a metric is the mean over.

The mean over several batches is not the mean of their means where they differ in what is counted:

    mean over all = Σ countᵢ meanᵢ / Σ countᵢ

The counts of torch's losses differ. With ``ignore_index`` it is the number of targets that are not ignored, with
class weights the sum of their weights, for MSELoss the number of elements. `mean_of` finds the count where a loss
function of torch.nn.functional or manualgrad.nn.functional is called, by a module or by a function of the user.
"""

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Count = float | Tensor
Measure = Callable[[Any, Tensor], Any]
"""A loss or a metric: from (prediction, target) to a scalar, the mean over the batch, or to a pair (mean, count).

The count says what the mean is over, such as the number of tokens that are not padding. It is a number or a scalar
tensor, and 0 where the batch has nothing to count; the mean is not used then, and may be NaN. Without it,

- where the callable calls one loss function of torch.nn.functional or manualgrad.nn.functional with
  ``reduction="mean"``, itself or by a module such as CrossEntropyLoss, the count is what that function divides by;
- everywhere else it is the number of examples in the batch, the length of the target.
"""


class Mean(NamedTuple):
    """A mean, and what it is over."""

    value: Any
    count: Count


def mean_of(measure: Measure, prediction: Any, target: Tensor, examples: int) -> Mean:
    """What a loss or a metric gives of a batch, with its count.

    Args:
        examples: of the batch; 0 where the batch is not to be counted.

    Raises:
        ValueError: where it is a sum over the batch, or the count is not a number.
    """
    with _LossFunctions() as mode:
        value = measure(prediction, target)
    if not mode.calls and (original := _before_compilation(measure)) is not None:
        with torch.no_grad(), mode:  # a compiled call of manualgrad.nn.functional is not seen
            original(prediction, target)
    means, sums = [], []
    for function, args, kwargs, result in mode.calls:
        call = _arguments(function, args, kwargs)
        if call.reduction in ("mean", "batchmean"):
            means.append(call)
        elif call.reduction == "sum":
            sums.append(result)
    count: Any = examples
    if isinstance(value, tuple) and len(value) == 2:
        value, count = value
        if not isinstance(count, (int, float)) and not (isinstance(count, Tensor) and count.numel() == 1):
            raise ValueError(f"the count of a loss or metric must be a number, not {_described(count)}")
    elif len(means) == 1:
        with torch.no_grad():
            count = _COUNTS[means[0].name](means[0])
    if any(value is total for total in sums):
        raise ValueError(
            "a loss or metric must be a mean, and this is a sum (reduction='sum'): use reduction='mean', or "
            "return the pair (sum / count, count)"
        )
    return Mean(value, count if examples else 0)


def nothing(prediction: Any, loss: Tensor) -> Tensor:
    """The loss of a batch in which nothing counts: 0, and so are its gradients.

    The loss itself is NaN, and so may be its gradient by the prediction. So backward begins at the prediction.
    """
    outputs = [x for x in tree_leaves(prediction) if isinstance(x, Tensor) and x.is_floating_point()]
    zeros = [torch.where(torch.zeros_like(x, dtype=torch.bool), x, 0).sum().to(loss) for x in outputs]
    found = sum(zeros, torch.zeros_like(loss))
    return found if found.requires_grad or not loss.requires_grad else found.requires_grad_()


class _LossFunctions(TorchFunctionMode):
    """Sees the loss functions that are called: each, its arguments and its result. (Dynamo traces it, too.)"""

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
            kwargs = {**kwargs, "weight": _weight_left_out(func)}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


def _weight_left_out(function: Any) -> Any:
    """The weight of l1_loss, which torch (to 2.14 at least) does not pass on to a mode: from the running call."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("weight")


def _before_compilation(measure: Any) -> Any:
    return getattr(measure, "_orig_mod", None) or getattr(measure, "_torchdynamo_orig_callable", None)


_signature = cache(inspect.signature)


def _arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """All arguments of a call by name, with the older ways to say the reduction translated."""
    bound = _signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    call = SimpleNamespace(name=function.__name__, **bound.arguments)
    older = getattr(call, "size_average", None), getattr(call, "reduce", None)
    if older != (None, None):
        call.reduction = _reduction.legacy_get_string(*older, emit_warning=False)
    return call


def _described(count: Any) -> str:
    return f"of shape {tuple(count.shape)}" if isinstance(count, Tensor) else f"a {type(count).__name__}"


# What each of torch's loss functions divides its sum by, if the reduction is "mean".


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
    """Of (rows, classes) or (classes)."""
    return len(call.input) if call.input.dim() == 2 else 1


def _targets(call: Any) -> Count:
    """Class indices that are not ignored, by the weights of their classes. (With label smoothing too.)"""
    ignored = -100 if call.ignore_index is None else call.ignore_index
    valid = call.target != ignored
    if call.weight is None:
        return valid.sum()
    return (call.weight.take(call.target * valid) * valid).sum(dtype=torch.float64)


def _targets_or_probabilities(call: Any) -> Count:
    if not call.target.is_floating_point():
        return _targets(call)
    classes = call.target.shape[min(call.target.dim() - 1, 1)]
    return call.target.numel() // max(classes, 1)  # whatever the weights


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
    "huber_loss": _pairs,  # whatever the weights
    "kl_div": lambda call: len(call.input) if call.reduction == "batchmean" else _pairs(call),
    "l1_loss": _weighted_pairs,
    "linear_cross_entropy": _targets_or_probabilities,
    "margin_ranking_loss": lambda call: _elements(call.input1, call.input2, call.target),
    "mse_loss": _weighted_pairs,
    "multi_margin_loss": _rows,  # whatever the weights
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
