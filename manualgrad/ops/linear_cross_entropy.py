"""Cross entropy of the scores that a linear map gives: a language model's head and its loss, without the scores.

N rows and C classes have N·C scores. For a vocabulary that is more than everything else that a step saves. So the
rows are taken in pieces: the scores of a piece are computed, and freed when its loss and its gradients are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manualgrad.ops.classification import _along, weight_of
from manualgrad.ops.elementary import flatten, rows, with_errors_of
from manualgrad.ops.linear import LinearFunction
from manualgrad.ops.loss import MEAN, NONE, REDUCTIONS, overridable
from manualgrad.rebinding import rebind_function
from manualgrad.recomputation import keeping_is_seen
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule, cast, replaces
from manualgrad.rule.reuse import fast
from manualgrad.rule.torch_internals import beyond_reverse_mode, inplace_is_safe, is_last_backward

_PIECE = 2**24
"""Scores at a time, 64 MiB of them in float32: rows enough for products at full speed."""

_IN_CACHE = 2**17
"""Scores at a time between the products."""

_BLOCK = 4096
"""Classes at a time, where a weight in a lower precision is converted to float32 for a product."""


# --- the loss of some rows and its gradient ---


class Q(NamedTuple):
    """q_c = hard 1_t + soft_c, of some rows: (n, C, *), in parts"""

    hard: Tensor  # (n, 1, *), of class probabilities (n, 0, *)
    t: Tensor  # of the same shape
    soft: Tensor | None  # (n, C, *) or (C, *)
    total: Tensor  # Σ_c q_c, (n, 1, *)
    valid: Tensor  # false in ignored rows, (n, 1, *) or ()


class Reading(NamedTuple):
    """How a target is read: a class index, or a probability for each class."""

    weight: Tensor | None
    ignore_index: int
    epsilon: float

    def q(self, target: Tensor, like: Tensor) -> Q:
        """Of some rows, in the dtype of a tensor with as many classes."""
        if target.is_floating_point():
            q = self.smoothed(target.to(like.dtype))
            q = q if self.weight is None else q * _along(self.weight.to(like.dtype), q)
            return Q(q[:, :0], q[:, :0].long(), q, q.sum(1, True), q.new_ones((), dtype=torch.bool))
        valid = (target != self.ignore_index).unsqueeze(1)
        t = target.unsqueeze(1) * valid  # an ignored index may be no class
        w = weight_of(t, valid, self.weight, like)
        if not self.epsilon:
            return Q(w, t, None, w, valid)
        weight = torch.ones_like(like) if self.weight is None else self.weight.to(like.dtype)
        hard, soft = w * (1 - self.epsilon), _along(weight * (self.epsilon / len(like)), t)
        return Q(hard, t, soft, hard + soft.sum(), valid)

    def smoothed(self, target: Tensor) -> Tensor:
        """t′ = (1-ε) t + ε/C"""
        return target * (1 - self.epsilon) + self.epsilon / target.shape[1] if self.epsilon else target

    def mean(self, total: Tensor, target: Tensor) -> Tensor:
        """A sum over rows, divided by the number of rows, or by their Σ w[t]."""
        if target.is_floating_point():
            return total / (target.numel() // max(target.shape[1], 1))
        valid = target != self.ignore_index
        return total / weight_of(target * valid, valid, self.weight, total).sum()

    def s(self, grad: Tensor, target: Tensor, reduction: int) -> Tensor:
        """∂L/∂ℓ, one number for all rows, or one for each; 0 if all rows are ignored."""
        counted = torch.ones_like(target) if target.is_floating_point() else target != self.ignore_index
        return torch.where(counted.any(), self.mean(grad, target), 0) if reduction == MEAN else grad


def scores(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """z = x Wᵀ + b, in float32 at least"""
    z = F.linear(x, rows(weight), None if bias is None else bias.reshape(-1))
    return z.to(_wide(z.dtype)).reshape(len(x), *weight.shape[:-1])


def logsumexp(z: Tensor) -> Tensor:
    """λ = log Σ e^z"""
    return z.logsumexp(1, keepdim=True)


def losses(z: Tensor, lam: Tensor, q: Q) -> Tensor:
    """ℓ = λ Σq - Σ_c q_c z_c, 0 in ignored rows"""
    hard = (q.hard * _at(q.t, z)).sum(1, keepdim=True)
    qz = hard if q.soft is None else hard + (z * q.soft).sum(1, keepdim=True)
    return torch.where(q.valid, lam * q.total - qz, 0).squeeze(1)


def slope(z: Tensor, lam: Tensor, q: Q, s: Tensor) -> Tensor:
    """D = ∂L/∂z = s (p Σq - q),   p = e^(z - λ)"""
    counted = torch.where(q.valid, s, 0)
    dense = (z - lam).exp() * (counted * q.total)
    hard = dense.scatter_add(1, q.t, -counted * q.hard)
    return hard if q.soft is None else hard - counted * q.soft


def losses_of(x: Tensor, weight: Tensor, bias: Tensor | None, q: Q) -> Tensor:
    z = scores(x, weight, bias)
    return losses(z, logsumexp(z), q)


def losses_and_slope(x: Tensor, weight: Tensor, bias: Tensor | None, q: Q, s: Tensor) -> tuple[Tensor, Tensor]:
    z = scores(x, weight, bias)
    lam = logsumexp(z)
    return losses(z, lam, q), slope(z, lam, q, s)


@replaces(losses_and_slope)
def _losses_and_slope_by_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, q: Q, s: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for a few rows at a time, so that temporaries stay in the cache. D is written over z."""
    z, found = scores(x, weight, bias), []
    few = max(1, _IN_CACHE // max(z[:1].numel(), 1) if z.is_cpu else len(z))
    for i in range(0, len(z), few):
        part = slice(i, i + few)
        some, lam = Q(*[_rows_of(a, part, z) for a in q]), logsumexp(z[part])
        found.append(losses(z[part], lam, some))
        z[part] = fast(slope)(z[part], lam, some, _rows_of(s, part, z))
    return torch.cat(found) if found else losses(z, logsumexp(z), q), z


def _rows_of(tensor: Any, part: slice, z: Tensor) -> Any:
    """Some rows, if the tensor has rows as z does."""
    return tensor[part] if tensor is not None and tensor.dim() == z.dim() else tensor


def _at(t: Tensor, z: Tensor) -> Tensor:
    """z_t"""
    try:
        return z.gather(1, t)
    except RuntimeError as error:
        if "out of bounds" in str(error):  # torch's losses raise an IndexError for such a class
            raise IndexError(f"a target is no class: {error}") from None
        raise


def _where_counted(target: Tensor, ignore_index: int, x: Tensor) -> Tensor:
    """x, but 0 in ignored rows, whatever they hold."""
    if target.is_floating_point():
        return x
    return torch.where(flatten((target != ignore_index).unsqueeze(-1), 1).any(1, keepdim=True), x, 0)


def _one(weight: Tensor) -> Tensor:
    """s of a plain sum of losses, in the dtype of the scores."""
    return weight.new_ones((), dtype=_wide(weight.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 at least."""
    return torch.promote_types(dtype, torch.float32)


# --- piece after piece ---

Piece = tuple[Tensor, Q, Tensor]
"""Of some rows: x, q and s"""

Needed = tuple[bool, bool, bool]
"""Which gradients are needed: of input, linear_weight and linear_bias."""

Sums = tuple[list[Tensor], list[Any]]


def pieces(
    input: Tensor, weight: Tensor, target: Tensor, reading: Reading, s: Tensor, size: int
) -> Iterator[Piece]:
    like = weight.new_empty(len(weight), dtype=_wide(weight.dtype))
    each = (x.unsqueeze(1) for x in s.split(size)) if s.dim() else repeat(s)
    for x, t, s in zip(input.split(size), target.split(size), each, strict=False):
        yield _where_counted(t, reading.ignore_index, x), reading.q(t, like), s


def sums(some: Iterable[Piece], weight: Tensor, bias: Tensor | None, needed: Needed) -> Sums:
    """ℓ of each piece, and the sums over the pieces of  ∂L/∂x = D W,  ∂L/∂W = Dᵀ x  and  ∂L/∂b = Σ D"""
    return _sums(some, weight, bias, needed, plus_product)


def _sums(some: Iterable[Piece], weight: Tensor, bias: Tensor | None, needed: Needed, plus: Any) -> Sums:
    found, of_input, of_weight, of_bias = [], [], None, None
    for x, q, s in some:
        loss, D = losses_and_slope(x, weight, bias, q, s)
        D = D.reshape(len(x), len(rows(weight)))
        found.append(loss)
        if needed[0]:
            of_input.append(plus(None, D, rows(weight)))
        if needed[1]:
            of_weight = plus(of_weight, D.mT, x)
        if needed[2]:
            of_bias = D.sum(0) if of_bias is None else of_bias + D.sum(0)
        del D  # before the next scores are computed
    return found, [
        torch.cat(of_input) if needed[0] else None,
        None if of_weight is None else of_weight.reshape(weight.shape),
        None if of_bias is None else of_bias.reshape(weight.shape[:-1]),
    ]


def plus_product(total: Tensor | None, D: Tensor, factor: Tensor) -> Tensor:
    """total + D times a factor that may have a lower precision"""
    product = (D.to(factor.dtype) @ factor).to(D.dtype)
    return product if total is None else total + product


@replaces(sums)
def _sums_into(some: Iterable[Piece], weight: Tensor, bias: Tensor | None, needed: Needed) -> Sums:
    """The same. The product of a piece is added to the sum in its memory."""
    return fast(_sums)(some, weight, bias, needed, _plus_product_into)


def _plus_product_into(total: Tensor | None, D: Tensor, factor: Tensor) -> Tensor:
    """The same in the precision of D, written into the total.

    On the CPU the product is in float32, of some rows of the factor at a time. In bfloat16 it may take 100 times
    as long (256 x 8192 times 8192 x 512, one thread, no instructions for bfloat16: 7.2 s and 0.07 s).
    """
    if D.dtype == factor.dtype:
        return D @ factor if total is None else total.addmm_(D, factor)
    if not D.is_cpu:
        product = torch.mm(D.to(factor.dtype), factor, out_dtype=D.dtype)
        return product if total is None else total.add_(product)
    total = D.new_zeros(len(D), factor.shape[1]) if total is None else total
    for part, some in zip(D.split(_BLOCK, 1), factor.split(_BLOCK), strict=True):
        total.addmm_(part, some.to(D.dtype))
    return total


class LinearCrossEntropyLossFunction(Rule):
    r"""ℓ = -Σ_c q_c log p_c = λ Σq - Σ_c q_c z_c,    z = x Wᵀ + b,   λ = log Σ e^z,   p = e^(z - λ)

    q = w t′,  t′ = (1-ε) t + ε/C,  of class probabilities t; of a class index as in `CrossEntropyLossFunction`
    L: the losses, their sum or their mean;   s = ∂L/∂ℓ, 0 where ignored: g, or g / Σ w[t] of a mean

    dλ = ⟨p, dz⟩, so  D = ∂L/∂z = s (p Σq - q):      ∂L/∂x = D W      ∂L/∂W = Dᵀ x      ∂L/∂b = Σ D
    and  ∂L/∂q = s (λ - z):      ∂L/∂t = s (1-ε) w (λ - z)      ∂L/∂w = Σ s t′ (λ - z)

    x: (N, in)   W: (C, ..., in)   b: (C, ...)   t: (N, ...) or (N, C, ...)   w: (C)   L: in float32 at least
    The backward computes z again, and sums over the pieces.

    Wijmans, Huval, Hertzberg, Koltun and Krähenbühl, "Cut Your Losses in Large-Vocabulary Language Models", 2025.
    """

    upcast_gradients = False  # what is no product is in float32 already

    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
        size: int,
        needed: Needed,
    ) -> Tensor:
        reading = Reading(weight, ignore_index, label_smoothing)
        some = pieces(input, linear_weight, target, reading, _one(linear_weight), size)
        each = [losses_of(x, linear_weight, linear_bias, q) for x, q, _ in some]
        return _reduced(each, target, reading, reduction)

    def reading(weight: Tensor | None, ignore_index: int, label_smoothing: float) -> Reading:
        return Reading(weight, ignore_index, label_smoothing)

    def s(grad: Tensor, target: Tensor, reading: Reading, reduction: int) -> Tensor:
        return reading.s(grad, target, reduction)

    def gradients(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        reading: Reading,
        s: Tensor,
        size: int,
        needed: Needed,
    ) -> list[Any]:
        some = pieces(input, linear_weight, target, reading, s, size)
        return sums(some, linear_weight, linear_bias, needed)[1]

    def grad_input(gradients: list[Any], input: Tensor) -> Tensor:
        return gradients[0].to(input.dtype)

    def grad_linear_weight(gradients: list[Any], linear_weight: Tensor) -> Tensor:
        return gradients[1].to(linear_weight.dtype)

    def grad_linear_bias(gradients: list[Any], linear_weight: Tensor) -> Tensor:
        return gradients[2].to(linear_weight.dtype)

    def surprisal(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        reading: Reading,
        s: Tensor,
        size: int,
    ) -> Tensor:
        """∂L/∂q = s (λ - z), in the shape of a target of class probabilities"""
        some = pieces(input, linear_weight, target, reading, s, size)
        of_some = ((scores(x, linear_weight, linear_bias), s) for x, _, s in some)
        return torch.cat([s * (logsumexp(z) - z) for z, s in of_some])

    def grad_target(surprisal: Tensor, target: Tensor, reading: Reading) -> Tensor:
        found = surprisal * (1 - reading.epsilon)
        return (found if reading.weight is None else found * _along(reading.weight, found)).to(target.dtype)

    def grad_weight(surprisal: Tensor, target: Tensor, reading: Reading, weight: Tensor) -> Tensor:
        if not target.is_floating_point():
            raise RuntimeError("a class weight has no gradient where the target is class indices")
        return (surprisal * reading.smoothed(target)).sum([0, *range(2, target.dim())]).to(weight.dtype)


def _reduced(losses: list[Tensor], target: Tensor, reading: Reading, reduction: int) -> Tensor:
    if reduction == NONE:
        return torch.cat(losses)
    total = torch.stack([piece.sum() for piece in losses]).sum()
    return reading.mean(total, target) if reduction == MEAN else total


def _slope_times_s(slope: Tensor, s: Tensor, shown: bool, input: Tensor) -> Tensor | None:
    """s times the saved slope, written into it, if this backward is the last that reads it."""
    return None if shown or not is_last_backward() else slope.mul_(s).to(input.dtype)


class LinearCrossEntropyLossOnceFunction(LinearCrossEntropyLossFunction):
    r"""The same for a sum or a mean, where s is one number: D is computed in the forward, which has the scores.

    The gradients of Σ ℓ are saved, and the backward multiplies them by s. That of W is as large as W, so the last
    backward writes the product into it.
    """

    statistics = ("slope_input", "slope_linear_weight", "slope_linear_bias")
    vendor_kernels = {"grad_linear_weight": _slope_times_s}

    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
        size: int,
        needed: Needed,
        shown: bool,
    ) -> tuple[Tensor, ...]:
        reading = Reading(weight, ignore_index, label_smoothing)
        some = pieces(input, linear_weight, target, reading, _one(linear_weight), size)
        compute = fast(sums) if inplace_is_safe(input) else sums
        each, slopes = compute(some, linear_weight, linear_bias, needed)
        absent = input.new_empty(0)
        return _reduced(each, target, reading, reduction), *[absent if x is None else x for x in slopes]

    def slopes(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        reading: Reading,
        size: int,
        needed: Needed,
    ) -> list[Any]:
        some = pieces(input, linear_weight, target, reading, _one(linear_weight), size)
        return sums(some, linear_weight, linear_bias, needed)[1]

    def slope_input(slopes: list[Any]) -> Tensor:
        return slopes[0]

    def slope_linear_weight(slopes: list[Any]) -> Tensor:
        return slopes[1]

    def slope_linear_bias(slopes: list[Any]) -> Tensor:
        return slopes[2]

    def grad_input(slope_input: Tensor, s: Tensor, input: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        return _where_counted(target, ignore_index, slope_input * s).to(input.dtype)

    def grad_linear_weight(slope_linear_weight: Tensor, s: Tensor, shown: bool, input: Tensor) -> Tensor:
        return (slope_linear_weight * s).to(input.dtype)

    def grad_linear_bias(slope_linear_bias: Tensor, s: Tensor, input: Tensor) -> Tensor:
        return (slope_linear_bias * s).to(input.dtype)


def _composed(
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
    """What torch's function is equivalent to, for a torch that has none."""
    _check_shapes(input, linear_weight, linear_bias, target, ignore_index)
    scores = F.linear(input, rows(linear_weight), None if linear_bias is None else linear_bias.reshape(-1))
    return F.cross_entropy(
        scores.reshape(*input.shape[:-1], *linear_weight.shape[:-1]),
        target,
        weight=weight,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )


_reference: Any = getattr(F, "linear_cross_entropy", _composed)  # torch has it since 2.13


@overridable
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
    """Cross entropy of x Wᵀ + b, as `torch.nn.functional.linear_cross_entropy`, which torch has since 2.13.

    Shapes: input (N, in) or (in), linear_weight (C, in) or (C, ..., in), linear_bias (C, ...), weight (C), target
    (N, ...) or () of class indices, or (N, C, ...) or (C) of class probabilities. The result is a number, or with
    reduction "none" of the shape that class indices have.

    More than 2²⁴ scores are never in memory together, whatever the target, the smoothing and the reduction; with
    `options` the rows are taken in pieces as these say. The precision of sums is float32's at least, whichever
    ``acc_policy`` they name, and the graph may be retained whether or not ``allow_retain_graph``.

    Raises:
        RuntimeError, ValueError: other shapes.
        ValueError: an unknown reduction, or options that contradict each other.
        RuntimeError: a class weight that requires a gradient beside class indices.
        IndexError: a class index that is none.
    """
    scores = input.shape[:-1].numel() * linear_weight.shape[:-1].numel()
    if options is None and scores <= _PIECE:
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
    lowered = device in LinearFunction.autocast and torch.is_autocast_enabled(device)
    return loss if lowered else loss.to(input.dtype)  # under autocast torch's loss is in float32


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
    """The loss of `linear_cross_entropy`, in float32 for bfloat16 and float16 too.

    A model that converts its logits to float32 before the loss has such a loss.
    """
    how = REDUCTIONS.index(reduction)
    _check_shapes(input, linear_weight, linear_bias, target, ignore_index)
    classes, soft = len(linear_weight), target.is_floating_point()
    if weight is not None and weight.shape != (classes,):
        raise RuntimeError(f"a weight for each of {classes} classes, not {tuple(weight.shape)}")
    if label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0 and 1, not {label_smoothing}")
    n, scores = input.shape[:-1].numel(), linear_weight.shape[:-1].numel()
    tensors = cast(LinearFunction, (input, linear_weight, linear_bias))
    tensors = torch.atleast_2d(tensors[0]), *tensors[1:]
    settings = (
        *(target.reshape(-1, *target.shape) if input.dim() == 1 else target, weight, how),
        *(-100 if ignore_index is None else ignore_index, max(float(label_smoothing), 0.0)),
        _rows_at_a_time(options, n, input.shape[-1], scores),
    )
    if torch.compiler.is_compiling() or beyond_reverse_mode():  # what needs a gradient does not show
        needed, once = (True, True, linear_bias is not None), False
    else:
        tracked = [
            torch.is_grad_enabled() and x is not None and x.requires_grad for x in (*tensors, target, weight)
        ]
        needed, once = tuple(tracked[:3]), how != NONE and any(tracked) and not any(tracked[3:])
        if tracked[4] and not soft:
            raise RuntimeError("a class weight has no gradient beside class indices")
    if once:
        loss = LinearCrossEntropyLossOnceFunction.apply(*tensors, *settings, needed, keeping_is_seen())
    else:
        loss = LinearCrossEntropyLossFunction.apply(*tensors, *settings, needed)
    return loss.squeeze(0) if how == NONE and input.dim() == 1 else loss


def _rows_at_a_time(options: LinearCrossEntropyOptions | None, n: int, features: int, scores: int) -> int:
    """Of n rows that have so many features and scores each."""
    asked, method = (None, "auto") if options is None else (options.batch_chunk_size, options.chunking_method)
    if asked is None and method == "auto":
        pieces = max(1, -(-n * scores // _PIECE))
        found = -(-n // pieces)
    elif method is None or method == "auto":
        found = n if asked is None else min(asked, n)
    else:  # "aspect_ratio:2" is half as many rows as have as many scores as the input has elements, or some more
        needed = -(-n // -(-scores // features))
        found = min((1 << (needed - 1).bit_length()) // int(method.partition(":")[2] or 1), n)
        if asked not in (None, found):
            raise ValueError(
                f"batch_chunk_size={asked} and chunking_method={method!r}, which is {found}: pass one"
            )
    return max(1, found)


def _check_shapes(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, ignore_index: int | None
) -> None:
    if input.dim() not in (1, 2) or linear_weight.dim() < 2 or input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            f"an input (N, in) or (in) and a linear_weight (C, ..., in), not {tuple(input.shape)} and "
            f"{tuple(linear_weight.shape)}"
        )
    batch, (classes, *more) = input.shape[:-1], linear_weight.shape[:-1]
    if more and not batch:
        raise RuntimeError(
            f"a linear_weight {tuple(linear_weight.shape)} needs a batch of inputs, not a single one"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(f"a linear_bias {(classes, *more)}, not {tuple(linear_bias.shape)}")
    if target.shape == (*batch, classes, *more):
        if not target.is_floating_point():
            raise RuntimeError(f"class probabilities are floating numbers, not {target.dtype}")
        if ignore_index is not None:
            raise RuntimeError("ignore_index is of class indices: a target of probabilities has none")
    elif target.shape != (*batch, *more) or target.dtype != torch.int64:
        raise RuntimeError(
            f"a target of class indices, int64 {(*batch, *more)}, or of probabilities {(*batch, classes, *more)}, "
            f"not {target.dtype} {tuple(target.shape)}"
        )


register(
    linear_cross_entropy,
    reference=_reference,
    sample_inputs=lambda t: [
        SampleInput(t(5, 2), t(3, 2), t.index(3, 5), linear_bias=t(3), weight=t.fixed(3, low=0.5, high=2)),
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
            t(2), t(3, 2), t.index(3), linear_bias=t(3), label_smoothing=0.2, weight=t.fixed(3, low=0.5, high=2)
        ),
        SampleInput(t(4, 2), t(3, 2, 2), t(4, 3, 2).softmax(1), reduction="sum"),
    ],
    benchmark_input=lambda t: SampleInput(t(256, 128), t(8192, 128), t.index(8192, 256)),
)


if hasattr(nn, "LinearCrossEntropyLoss"):  # since torch 2.13
    LinearCrossEntropyOptions = nn.LinearCrossEntropyOptions  # pyright: ignore[reportAssignmentType]
else:

    @dataclass(slots=True, frozen=True)
    class LinearCrossEntropyOptions:
        """How many rows are taken at a time, as `torch.nn.LinearCrossEntropyOptions` of torch 2.13."""

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
            rows = self.batch_chunk_size
            if rows is not None and not (isinstance(rows, int) and rows > 0):
                raise ValueError(f"batch_chunk_size must be positive int or None, got {rows!r}")
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
            shown = {
                "in_features": self.linear.in_features,
                "num_classes": self.num_classes,
                "out_features": self.out_features,
                "bias": self.linear.bias is not None,
                **{
                    name: getattr(self, name)
                    for name in ("reduction", "ignore_index", "label_smoothing", "options")
                },
            }
            return ", ".join(f"{name}={value}" for name, value in shown.items())
