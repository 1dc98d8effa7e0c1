"""Cross entropy of a linear map's output, in chunks of rows: the head of a language model and its loss.

N rows and C classes have N·C logits. For a large vocabulary they take more memory than everything else that a
training step saves. So the rows are processed in chunks. The logits of a chunk are freed before the next chunk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manualgrad.ops.classification import _along, weight_of
from manualgrad.ops.linear import LinearFunction
from manualgrad.ops.loss import MEAN, NONE, REDUCTIONS, with_torch_function_dispatch
from manualgrad.ops.registration import with_errors_of
from manualgrad.ops.shapes import flatten, rows
from manualgrad.rebinding import rebind_function
from manualgrad.recomputation import saved_tensor_hooks_active
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule, autocast_inputs, replaces, with_reuse
from manualgrad.rule.reuse import fast_version
from manualgrad.torch_internals import in_forward_mode_or_transform, inplace_is_safe, is_last_backward

MAX_LOGITS_PER_CHUNK = 2**24
"""64 MiB in float32. A chunk of this size has enough rows for matrix products at full speed."""

_LOGITS_IN_CACHE = 2**17
"""How many logits of a chunk the pointwise operations process at one time."""

_CLASSES_PER_PRODUCT = 4096
"""For how many classes at one time a weight in bfloat16 or float16 is converted to float32."""

Needed = tuple[bool, bool, bool]
"""Whether the gradients of input, linear_weight and linear_bias are needed."""


class LinearCrossEntropyLossFunction(Rule):
    r"""ℓ = -Σ_c q_c log p_c = λ Σq - Σ_c q_c z_c,    z = x Wᵀ + b,   λ = log Σ_c e^z_c,   p = e^(z - λ)

    x: (N, in)   W: (C, ..., in)   b: (C, ...)   t: (N, ...) class indices, or (N, C, ...) class probabilities
    w: (C), class weights, or 1   ε: label smoothing   L: the losses ℓ, their sum or mean, in float32 at least

    class indices          q_c = (1-ε) w[t] 1[c = t] + (ε/C) w_c   s = ∂L/∂ℓ = g,  for the mean g / Σ w[t]
    class probabilities    q = w t′,   t′ = (1-ε) t + ε/C          s = ∂L/∂ℓ = g,  for the mean g / number of rows
    ignored rows           ℓ = 0                                   s = 0

    dℓ = Σq ⟨p, dz⟩ - ⟨q, dz⟩ + ⟨λ - z, dq⟩:
    D = ∂L/∂z = s (p Σq - q)      ∂L/∂x = D W      ∂L/∂W = Dᵀ x      ∂L/∂b = Σ D
    Q = ∂L/∂q = s (λ - z)         ∂L/∂t = Q (1-ε) w                  ∂L/∂w = Σ Q t′

    The logits z are not saved. The backward computes them again for each chunk of rows.

    Wijmans, Huval, Hertzberg, Koltun and Krähenbühl, "Cut Your Losses in Large-Vocabulary Language Models", 2025.
    """

    upcast_gradients = False  # everything except the matrix products is computed in float32 at least

    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
        chunk_size: int,
        needed: Needed,
    ) -> Tensor:
        options = TargetOptions(weight, ignore_index, label_smoothing)
        chunks = split_rows(input, linear_weight, target, options, _unit_s(linear_weight), chunk_size)
        losses = [losses_of_rows(x, linear_weight, linear_bias, q) for x, q, _ in chunks]
        return _reduce(losses, target, options, reduction)

    def options(weight: Tensor | None, ignore_index: int, label_smoothing: float) -> TargetOptions:
        return TargetOptions(weight, ignore_index, label_smoothing)

    def s(grad: Tensor, target: Tensor, options: TargetOptions, reduction: int) -> Tensor:
        return options.grad_losses(grad, target, reduction)

    def split(
        input: Tensor, linear_weight: Tensor, target: Tensor, options: TargetOptions, chunk_size: int
    ) -> Callable[[Tensor], Iterator[Chunk]]:
        """Of s: the chunks of all rows"""
        return lambda s: split_rows(input, linear_weight, target, options, s, chunk_size)

    def gradients(
        split: Any, s: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, needed: Needed
    ) -> list[Any]:
        """∂L/∂x, ∂L/∂W and ∂L/∂b"""
        return losses_and_gradients(split(s), linear_weight, linear_bias, needed)[1]

    def grad_input(gradients: list[Any], input: Tensor) -> Tensor:
        return gradients[0].to(input.dtype)

    def grad_linear_weight(gradients: list[Any], linear_weight: Tensor) -> Tensor:
        return gradients[1].to(linear_weight.dtype)

    def grad_linear_bias(gradients: list[Any], linear_weight: Tensor) -> Tensor:
        return gradients[2].to(linear_weight.dtype)

    def Q(split: Any, s: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
        """s (λ - z), in the shape of class probabilities"""
        z_and_s = ((logits(x, linear_weight, linear_bias), s) for x, _, s in split(s))
        return torch.cat([s * (logsumexp(z) - z) for z, s in z_and_s])

    def grad_target(Q: Tensor, target: Tensor, options: TargetOptions) -> Tensor:
        grad = Q * (1 - options.label_smoothing)
        return (grad if options.weight is None else grad * _along(options.weight, grad)).to(target.dtype)

    def grad_weight(Q: Tensor, target: Tensor, options: TargetOptions, weight: Tensor) -> Tensor:
        _check_weight_is_differentiable(target)
        return (Q * options.smooth(target)).sum([0, *range(2, target.dim())]).to(weight.dtype)


def _check_weight_is_differentiable(target: Tensor) -> None:
    if not target.is_floating_point():
        raise RuntimeError("a class weight has no gradient if the target holds class indices")


# --- q: how much each class counts in the loss ---


class ClassCoefficients(NamedTuple):
    """q_c = hard 1[c = label] + soft_c for n rows, (n, C, *). Class probabilities have only the second term."""

    hard: Tensor  # (n, 1, *), or (n, 0, *) for class probabilities
    label: Tensor  # of the same shape
    soft: Tensor | None  # (n, C, *) or (C, *)
    sum: Tensor  # Σ_c q_c, (n, 1, *)
    valid: Tensor  # false in ignored rows, (n, 1, *) or ()


class TargetOptions(NamedTuple):
    """The arguments of the loss that turn a target into q, and the losses into their mean."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float

    def coefficients(self, target: Tensor, like: Tensor) -> ClassCoefficients:
        """q for the targets of some rows. ``like`` has the dtype of q, and one element for each class."""
        if target.is_floating_point():
            q = self.smooth(target.to(like.dtype))
            q = q if self.weight is None else q * _along(self.weight.to(like.dtype), q)
            return ClassCoefficients(
                q[:, :0], q[:, :0].long(), q, q.sum(1, True), q.new_ones((), dtype=torch.bool)
            )
        valid = (target != self.ignore_index).unsqueeze(1)
        label = target.unsqueeze(1) * valid  # ignore_index may be outside of the classes
        w = weight_of(label, valid, self.weight, like)
        if not self.label_smoothing:
            return ClassCoefficients(w, label, None, w, valid)
        weight = torch.ones_like(like) if self.weight is None else self.weight.to(like.dtype)
        hard = w * (1 - self.label_smoothing)
        soft = _along(weight * (self.label_smoothing / len(like)), label)
        return ClassCoefficients(hard, label, soft, hard + soft.sum(), valid)

    def smooth(self, target: Tensor) -> Tensor:
        """t′ = (1-ε) t + ε/C"""
        if not self.label_smoothing:
            return target
        return target * (1 - self.label_smoothing) + self.label_smoothing / target.shape[1]

    def mean(self, total: Tensor, target: Tensor) -> Tensor:
        """The sum of the losses divided by Σ w[t], or for class probabilities by the number of rows."""
        if target.is_floating_point():
            return total / (target.numel() // max(target.shape[1], 1))
        valid = target != self.ignore_index
        return total / weight_of(target * valid, valid, self.weight, total).sum()

    def grad_losses(self, grad: Tensor, target: Tensor, reduction: int) -> Tensor:
        """s = ∂L/∂ℓ, one number for all rows, or one for each row. It is 0 if the mean has no valid row."""
        if reduction != MEAN:
            return grad
        valid = torch.ones_like(target) if target.is_floating_point() else target != self.ignore_index
        return torch.where(valid.any(), self.mean(grad, target), 0)


# --- ℓ and D of some rows ---


def logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """z = x Wᵀ + b, in float32 at least"""
    z = F.linear(x, rows(weight), None if bias is None else bias.reshape(-1))
    return z.to(_at_least_float32(z.dtype)).reshape(len(x), *weight.shape[:-1])


def logsumexp(z: Tensor) -> Tensor:
    """λ = log Σ_c e^z_c"""
    return z.logsumexp(1, keepdim=True)


def cross_entropy(z: Tensor, lam: Tensor, q: ClassCoefficients) -> Tensor:
    """ℓ = λ Σq - Σ_c q_c z_c, 0 in ignored rows"""
    hard = (q.hard * _logit_of_label(z, q.label)).sum(1, keepdim=True)
    qz = hard if q.soft is None else hard + (z * q.soft).sum(1, keepdim=True)
    return torch.where(q.valid, lam * q.sum - qz, 0).squeeze(1)


def grad_logits(z: Tensor, lam: Tensor, q: ClassCoefficients, s: Tensor) -> Tensor:
    """D = ∂L/∂z = s (p Σq - q),   p = e^(z - λ)"""
    s = torch.where(q.valid, s, 0)
    p = (z - lam).exp()
    D = (p * (s * q.sum)).scatter_add(1, q.label, -s * q.hard)
    return D if q.soft is None else D - s * q.soft


def losses_of_rows(x: Tensor, weight: Tensor, bias: Tensor | None, q: ClassCoefficients) -> Tensor:
    z = logits(x, weight, bias)
    return cross_entropy(z, logsumexp(z), q)


def losses_and_grad_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, q: ClassCoefficients, s: Tensor
) -> tuple[Tensor, Tensor]:
    """ℓ and D"""
    z = logits(x, weight, bias)
    lam = logsumexp(z)
    return cross_entropy(z, lam, q), grad_logits(z, lam, q, s)


@replaces(losses_and_grad_logits)
def _losses_and_grad_logits_in_cache(
    x: Tensor, weight: Tensor, bias: Tensor | None, q: ClassCoefficients, s: Tensor
) -> tuple[Tensor, Tensor]:
    """The same. On the CPU, few rows are processed at one time, so that temporaries stay in the cache. D is
    written over z."""
    z = logits(x, weight, bias)
    if not len(z):
        return cross_entropy(z, logsumexp(z), q), z
    step = max(1, _LOGITS_IN_CACHE // max(z[:1].numel(), 1)) if z.is_cpu else len(z)
    losses_of_parts = []
    for start in range(0, len(z), step):
        part = slice(start, start + step)
        lam = logsumexp(z[part])
        q_part = ClassCoefficients(*[_select_rows(tensor, part, z) for tensor in q])
        losses_of_parts.append(cross_entropy(z[part], lam, q_part))
        z[part] = fast_version(grad_logits)(z[part], lam, q_part, _select_rows(s, part, z))
    return torch.cat(losses_of_parts), z


def _select_rows(tensor: Any, part: slice, z: Tensor) -> Any:
    """Some rows of a tensor that has an axis of rows, as z does. Other tensors are the same for all rows."""
    return tensor[part] if tensor is not None and tensor.dim() == z.dim() else tensor


def _logit_of_label(z: Tensor, label: Tensor) -> Tensor:
    """z_t"""
    try:
        return z.gather(1, label)
    except RuntimeError as error:
        if "out of bounds" in str(error):  # torch's losses raise an IndexError here
            raise IndexError(f"a target is not a class: {error}") from None
        raise


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- ℓ and the gradients of all rows, one chunk after the other ---

Chunk = tuple[Tensor, ClassCoefficients, Tensor]
"""x, q and s of some rows"""


def split_rows(
    input: Tensor, weight: Tensor, target: Tensor, options: TargetOptions, s: Tensor, chunk_size: int
) -> Iterator[Chunk]:
    """The chunks of all rows. ``s`` is one number for all rows, or one for each row."""
    like = weight.new_empty(len(weight), dtype=_at_least_float32(weight.dtype))
    s_of_chunks = (part.unsqueeze(1) for part in s.split(chunk_size)) if s.dim() else repeat(s)
    for x, t, part in zip(input.split(chunk_size), target.split(chunk_size), s_of_chunks, strict=False):
        yield _zero_ignored_rows(x, t, options.ignore_index), options.coefficients(t, like), part


def _zero_ignored_rows(x: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """x, with 0 in ignored rows even if they hold inf or nan."""
    if target.is_floating_point():
        return x
    return torch.where(flatten((target != ignore_index).unsqueeze(-1), 1).any(1, keepdim=True), x, 0)


def _unit_s(weight: Tensor) -> Tensor:
    """s = 1, in the dtype of the logits."""
    return weight.new_ones((), dtype=_at_least_float32(weight.dtype))


def _reduce(losses: list[Tensor], target: Tensor, options: TargetOptions, reduction: int) -> Tensor:
    """L from the losses of each chunk."""
    if reduction == NONE:
        return torch.cat(losses)
    total = torch.stack([x.sum() for x in losses]).sum()
    return options.mean(total, target) if reduction == MEAN else total


LossesAndGradients = tuple[list[Tensor], list[Any]]


def add_product(total: Tensor | None, D: Tensor, factor: Tensor) -> Tensor:
    """total + D factor, where the factor may have a lower precision than D"""
    product = (D.to(factor.dtype) @ factor).to(D.dtype)
    return product if total is None else total + product


def losses_and_gradients(
    chunks: Iterable[Chunk],
    weight: Tensor,
    bias: Tensor | None,
    needed: Needed,
    add: Callable[[Tensor | None, Tensor, Tensor], Tensor] | None = None,
) -> LossesAndGradients:
    """ℓ of each chunk; and ∂L/∂x = D W, ∂L/∂W = Dᵀ x and ∂L/∂b = Σ D, the last two as sums over the chunks"""
    add = add or add_product
    losses, grads_input, grad_weight, grad_bias = [], [], None, None
    W = rows(weight)
    for x, q, s in chunks:
        loss, D = losses_and_grad_logits(x, weight, bias, q, s)
        D = D.reshape(len(x), len(W))
        losses.append(loss)
        if needed[0]:
            grads_input.append(add(None, D, W))
        if needed[1]:
            grad_weight = add(grad_weight, D.mT, x)
        if needed[2]:
            grad_bias = D.sum(0) if grad_bias is None else grad_bias + D.sum(0)
        del D  # frees it before the next logits are computed
    return losses, [
        torch.cat(grads_input) if needed[0] else None,
        None if grad_weight is None else grad_weight.reshape(weight.shape),
        None if grad_bias is None else grad_bias.reshape(weight.shape[:-1]),
    ]


@replaces(losses_and_gradients)
def _losses_and_gradients_inplace(
    chunks: Iterable[Chunk], weight: Tensor, bias: Tensor | None, needed: Needed
) -> LossesAndGradients:
    """The same. The products of a chunk are added in place."""
    return with_reuse(losses_and_gradients)(chunks, weight, bias, needed, _add_product_inplace)


def _add_product_inplace(total: Tensor | None, D: Tensor, factor: Tensor) -> Tensor:
    """`add_product` in the precision of D, written into the total.

    On the CPU, a factor in bfloat16 is converted to float32, some rows at one time. A product in bfloat16 may take
    100 times as long (256 x 8192 times 8192 x 512, one thread, no instructions for bfloat16: 7.2 s and 0.07 s).
    """
    if D.dtype == factor.dtype:
        return D @ factor if total is None else total.addmm_(D, factor)
    if not D.is_cpu:
        product = torch.mm(D.to(factor.dtype), factor, out_dtype=D.dtype)
        return product if total is None else total.add_(product)
    total = D.new_zeros(len(D), factor.shape[1]) if total is None else total
    for columns, part in zip(D.split(_CLASSES_PER_PRODUCT, 1), factor.split(_CLASSES_PER_PRODUCT), strict=True):
        total.addmm_(columns, part.to(D.dtype))
    return total


# --- the gradients, computed in the forward ---


def _scale_in_last_backward(
    unit_grad_linear_weight: Tensor, s: Tensor, saved_is_observed: bool, linear_weight: Tensor
) -> Tensor | None:
    """s times the saved gradient, written into it. None if a hook or a later backward may read the saved one."""
    if saved_is_observed or not is_last_backward():
        return None
    return unit_grad_linear_weight.mul_(s).to(linear_weight.dtype)


class LinearCrossEntropyLossWithGradientsFunction(LinearCrossEntropyLossFunction):
    r"""For a sum or a mean, s is one number, and the gradients are linear in it: ∂L/∂x = s · (∂L/∂x for s = 1)

    The forward has the logits. It computes the gradients for s = 1, and saves them as ``unit_grad_...``. The
    backward multiplies them by s. The gradient of W is as large as W, so the last backward writes into it.
    """

    statistics = ("unit_grad_input", "unit_grad_linear_weight", "unit_grad_linear_bias")
    vendor_kernels = {("grad_linear_weight",): _scale_in_last_backward}

    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
        chunk_size: int,
        needed: Needed,
        saved_is_observed: bool,
    ) -> tuple[Tensor, ...]:
        options = TargetOptions(weight, ignore_index, label_smoothing)
        chunks = split_rows(input, linear_weight, target, options, _unit_s(linear_weight), chunk_size)
        compute = fast_version(losses_and_gradients) if inplace_is_safe(input) else losses_and_gradients
        losses, unit_grads = compute(chunks, linear_weight, linear_bias, needed)
        not_needed = input.new_empty(0)
        loss = _reduce(losses, target, options, reduction)
        return loss, *[not_needed if x is None else x for x in unit_grads]

    def unit_grads(split: Any, linear_weight: Tensor, linear_bias: Tensor | None, needed: Needed) -> list[Any]:
        return losses_and_gradients(split(_unit_s(linear_weight)), linear_weight, linear_bias, needed)[1]

    def unit_grad_input(unit_grads: list[Any]) -> Tensor:
        return unit_grads[0]

    def unit_grad_linear_weight(unit_grads: list[Any]) -> Tensor:
        return unit_grads[1]

    def unit_grad_linear_bias(unit_grads: list[Any]) -> Tensor:
        return unit_grads[2]

    def grad_input(unit_grad_input: Tensor, s: Tensor, input: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        # an infinite s must not make 0 · ∞ = nan of an ignored row
        return _zero_ignored_rows(unit_grad_input * s, target, ignore_index).to(input.dtype)

    def grad_linear_weight(
        unit_grad_linear_weight: Tensor, s: Tensor, saved_is_observed: bool, linear_weight: Tensor
    ) -> Tensor:
        return (unit_grad_linear_weight * s).to(linear_weight.dtype)

    def grad_linear_bias(unit_grad_linear_bias: Tensor, s: Tensor, linear_weight: Tensor) -> Tensor:
        return (unit_grad_linear_bias * s).to(linear_weight.dtype)


# --- the function ---


def _linear_then_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` for a torch that does not have it, by its definition."""
    _check_shapes(input, linear_weight, linear_bias, target, ignore_index)
    z = F.linear(input, rows(linear_weight), None if linear_bias is None else linear_bias.reshape(-1))
    return F.cross_entropy(
        z.reshape(*input.shape[:-1], *linear_weight.shape[:-1]),
        target,
        weight=weight,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )


_reference: Any = getattr(F, "linear_cross_entropy", _linear_then_cross_entropy)  # new in torch 2.13


@with_torch_function_dispatch
@partial(with_errors_of, _reference)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
) -> Tensor:
    """Cross entropy of x Wᵀ + b, as `torch.nn.functional.linear_cross_entropy`, new in torch 2.13.

    Shapes: input (N, in) or (in), linear_weight (C, in) or (C, ..., in), linear_bias (C, ...), weight (C), target
    (N, ...) or () of class indices, or (N, C, ...) or (C) of class probabilities. The result is a number, or with
    reduction "none" has the shape of class indices.

    Memory never holds more than 2²⁴ logits, or the logits of one row, unless ``options`` sets another chunk size.
    The options ``acc_policy`` and ``acc_dtype`` have no effect: sums are always in float32 at least. Nor has
    ``allow_retain_graph``: the graph may always be retained.

    Raises:
        RuntimeError, ValueError: the shapes do not match.
        ValueError: the reduction is unknown, or options contradict each other.
        RuntimeError: a class weight requires a gradient, and the target holds class indices.
        IndexError: a class index is outside of the classes.
    """
    count = input.shape[:-1].numel() * linear_weight.shape[:-1].numel()
    if options is None and count <= MAX_LOGITS_PER_CHUNK:  # torch's code, which calls manualgrad's rules here
        return rebind_function(_reference)(
            *(input, linear_weight, target),
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    loss = linear_cross_entropy_in_float32(
        *(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options)
    )
    device = input.device.type
    autocasts = device in LinearFunction.autocast and torch.is_autocast_enabled(device)
    return loss if autocasts else loss.to(input.dtype)  # under autocast torch's loss is in float32


def linear_cross_entropy_in_float32(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
) -> Tensor:
    """The loss of `linear_cross_entropy`, in float32 at least for inputs in bfloat16 and float16 too.

    It equals the loss of a model that converts its logits to float32.
    """
    how = REDUCTIONS.index(reduction)
    _check_shapes(input, linear_weight, linear_bias, target, ignore_index)
    classes = len(linear_weight)
    if weight is not None and weight.shape != (classes,):
        raise RuntimeError(f"weight must have the shape ({classes},), got {tuple(weight.shape)}")
    if label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    n, logits_per_row = input.shape[:-1].numel(), linear_weight.shape[:-1].numel()
    x, linear_weight, linear_bias = autocast_inputs(LinearFunction, (input, linear_weight, linear_bias))
    tensors = torch.atleast_2d(x), linear_weight, linear_bias
    settings = (
        *(target.unsqueeze(0) if input.dim() == 1 else target, weight, how),
        *(-100 if ignore_index is None else ignore_index, max(float(label_smoothing), 0.0)),
        _chunk_size(options, n, input.shape[-1], logits_per_row),
    )
    if torch.compiler.is_compiling() or in_forward_mode_or_transform():  # requires_grad is not known
        needed, with_gradients = (True, True, linear_bias is not None), False
    else:
        *needed, target_needed, weight_needed = (
            torch.is_grad_enabled() and x is not None and x.requires_grad for x in (*tensors, target, weight)
        )
        if weight_needed:
            _check_weight_is_differentiable(target)
        needed = tuple(needed)
        with_gradients = how != NONE and any(needed) and not (target_needed or weight_needed)
    if with_gradients:
        loss = LinearCrossEntropyLossWithGradientsFunction.apply(
            *tensors, *settings, needed, saved_tensor_hooks_active()
        )
    else:
        loss = LinearCrossEntropyLossFunction.apply(*tensors, *settings, needed)
    return loss.squeeze(0) if how == NONE and input.dim() == 1 else loss


def _chunk_size(options: LinearCrossEntropyOptions | None, n: int, features: int, logits_per_row: int) -> int:
    """The number of rows in a chunk, of n rows."""
    size, method = (None, "auto") if options is None else (options.batch_chunk_size, options.chunking_method)
    if size is None and method == "auto":
        chunks = max(1, -(-n * logits_per_row // MAX_LOGITS_PER_CHUNK))
        return max(1, -(-n // chunks))
    if method is None or method == "auto":
        return max(1, n if size is None else min(size, n))
    # torch's "aspect_ratio:r": the logits of k rows take as much memory as the input. k is rounded up to a power
    # of 2, and divided by r.
    k = -(-n // -(-logits_per_row // features))
    chosen = min((1 << (k - 1).bit_length()) // int(method.partition(":")[2] or 1), n)
    if size not in (None, chosen):
        raise ValueError(
            f"batch_chunk_size={size} contradicts chunking_method={method!r}, which chooses {chosen}: pass one"
        )
    return max(1, chosen)


def _check_shapes(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, ignore_index: int | None
) -> None:
    if input.dim() not in (1, 2) or linear_weight.dim() < 2 or input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "linear_cross_entropy expects an input (N, in) or (in) and a linear_weight (C, ..., in), got "
            f"{tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    batch, (classes, *more) = input.shape[:-1], linear_weight.shape[:-1]
    if more and not batch:
        raise RuntimeError(
            f"a linear_weight {tuple(linear_weight.shape)} needs a batch of inputs (N, in), got one input (in)"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(f"linear_bias must have the shape {(classes, *more)}, got {tuple(linear_bias.shape)}")
    if target.shape == (*batch, classes, *more):
        if not target.is_floating_point():
            raise RuntimeError(f"class probabilities must be floating-point numbers, got {target.dtype}")
        if ignore_index is not None:
            raise RuntimeError("ignore_index applies to class indices, but the target holds class probabilities")
    elif target.shape != (*batch, *more) or target.dtype != torch.int64:
        raise RuntimeError(
            f"target must be class indices, int64 {(*batch, *more)}, or class probabilities "
            f"{(*batch, classes, *more)}, got {target.dtype} {tuple(target.shape)}"
        )


register(
    linear_cross_entropy,
    reference=_reference,
    sample_inputs=lambda t: [
        SampleInput(t(5, 2), t(3, 2), t.index(3, 5), linear_bias=t(3), weight=t.no_grad(3, low=0.5, high=2)),
        SampleInput(t(4, 2), t(3, 2, 2), t.index(3, 4, 2), ignore_index=1, label_smoothing=0.1, reduction="none"),
        SampleInput(
            t(4, 2),
            t(3, 2),
            t(4, 3).softmax(1),
            linear_bias=t(3),
            weight=t(3, low=0.5, high=2),
            label_smoothing=0.1,
        ),
        SampleInput(
            t(2), t(3, 2), t.index(3), linear_bias=t(3), label_smoothing=0.2, weight=t.no_grad(3, low=0.5, high=2)
        ),
        SampleInput(t(4, 2), t(3, 2, 2), t(4, 3, 2).softmax(1), reduction="sum"),
    ],
    benchmark_input=lambda t: SampleInput(t(256, 128), t(8192, 128), t.index(8192, 256)),
)


if hasattr(nn, "LinearCrossEntropyLoss"):  # new in torch 2.13
    LinearCrossEntropyOptions = nn.LinearCrossEntropyOptions  # pyright: ignore[reportAssignmentType]
else:

    @dataclass(slots=True, frozen=True)
    class LinearCrossEntropyOptions:
        """The size of chunks, as `torch.nn.LinearCrossEntropyOptions` of torch 2.13."""

        allow_retain_graph: bool = False
        batch_chunk_size: int | None = None
        chunking_method: str | None = "auto"
        acc_policy: str = "auto"
        acc_dtype: torch.dtype | None = None

        def __post_init__(self) -> None:
            if self.acc_policy not in ("accurate", "balanced", "compact", "auto"):
                raise ValueError(f"invalid acc_policy: {self.acc_policy!r}")
            if not re.fullmatch(r"auto|aspect_ratio(:0*[1-9]\d*)?", self.chunking_method or "auto"):
                raise ValueError(f"invalid chunking_method: {self.chunking_method!r}")
            size = self.batch_chunk_size
            if size is not None and not (isinstance(size, int) and size > 0):
                raise ValueError(f"batch_chunk_size must be positive int or None, got {size!r}")
            if self.acc_dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
                raise ValueError(f"acc_dtype must be a floating dtype or None, got {self.acc_dtype!r}")

    class LinearCrossEntropyLoss(nn.Module):
        """`linear_cross_entropy` with its linear map, as `torch.nn.LinearCrossEntropyLoss` of torch 2.13."""

        weight: Tensor | None

        def __init__(
            self,
            in_features: int,
            num_classes: int,
            *,
            out_features: tuple[int, ...] = (),
            bias: bool = False,
            device: Any = None,
            dtype: torch.dtype | None = None,
            reduction: str = "mean",
            weight: Tensor | None = None,
            ignore_index: int | None = None,
            label_smoothing: float = 0.0,
            options: LinearCrossEntropyOptions | None = None,
        ) -> None:
            if weight is not None and weight.shape != (num_classes,):
                raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
            if not 0 <= label_smoothing <= 1:
                raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
            super().__init__()
            self.reduction = reduction
            self.register_buffer("weight", weight)
            self.num_classes = num_classes
            self.out_features = out_features
            self.ignore_index = ignore_index
            self.label_smoothing = label_smoothing
            total = math.prod(out_features, start=num_classes)
            self.linear = nn.Linear(in_features, total, bias=bias, device=device, dtype=dtype)
            self.options = options

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            shape = (self.num_classes, *self.out_features)
            bias = self.linear.bias
            return linear_cross_entropy(
                input,
                self.linear.weight.reshape(*shape, self.linear.in_features),
                target,
                linear_bias=None if bias is None else bias.reshape(shape),
                weight=self.weight,
                reduction=self.reduction,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                options=self.options,
            )

        def extra_repr(self) -> str:
            sizes = f"num_classes={self.num_classes}, out_features={self.out_features}"
            more = [f"{x}={getattr(self, x)}" for x in ("reduction", "ignore_index", "label_smoothing", "options")]
            bias = self.linear.bias is not None
            return ", ".join([f"in_features={self.linear.in_features}, {sizes}, bias={bias}", *more])
