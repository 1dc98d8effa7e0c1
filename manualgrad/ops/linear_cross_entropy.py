"""Cross entropy of the scores that a linear map gives: a language model's head and its loss, without the scores.

N rows and C classes have N·C scores, for a vocabulary more than all else that a step keeps. They are made some
rows at a time, all in one place, and are gone when the loss of these rows is known.
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

from manualgrad.binding import bound
from manualgrad.ops.classification import _along, _row_weight
from manualgrad.ops.elementary import added, choose, plus, refusing_as, rows, times
from manualgrad.ops.linear import LinearFunction
from manualgrad.ops.loss import MEAN, NONE, REDUCTIONS, overridable
from manualgrad.registry import Call, register
from manualgrad.rule import Rule, beyond_reverse_mode, cast, last_backward, nothing_looks_on
from manualgrad.saving import keeping_is_seen

_PIECE = 2**24
"""Scores at a time, 64 MiB of them in float32: rows enough for products at full speed."""

_BLOCK = 4096
"""Classes at a time, where a weight in a lower precision is widened for a product."""


class Answers(NamedTuple):
    """What is right in some rows: q = hard at its place + soft;  Σ q;  which rows count (None: all)."""

    mass: Tensor
    soft: Tensor | None
    place: Tensor | None = None
    hard: Tensor | None = None
    valid: Tensor | None = None


class Reading(NamedTuple):
    """How a target is read: a class index, or a probability for each class."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float

    def answers(self, target: Tensor, like: Tensor) -> Answers:
        """q of these rows, to be held against scores of the classes that `like` has, in its dtype."""
        weight, smoothing = self.weight, self.label_smoothing
        weight = None if weight is None else weight.to(like.dtype)
        if target.is_floating_point():
            soft = self.smoothed(target.to(like.dtype))
            soft = soft if weight is None else soft * _along(weight, soft)
            return Answers(soft.sum(1), soft)
        valid = target != self.ignore_index
        place = target * valid  # an ignored index may lie outside the classes
        hard = mass = _row_weight(like, weight, place, valid)
        soft = None
        if smoothing:
            hard = hard * (1 - smoothing)
            soft = like.new_ones(len(like)) if weight is None else weight
            soft = _along(soft * (smoothing / len(like)), target.unsqueeze(1))
            mass = hard + soft.sum()
        return Answers(mass, soft, place, hard, valid)

    def smoothed(self, target: Tensor) -> Tensor:
        """t′ of class probabilities t."""
        smoothing = self.label_smoothing
        return target * (1 - smoothing) + smoothing / target.shape[1] if smoothing else target

    def mean(self, total: Tensor, target: Tensor) -> Tensor:
        """A sum over rows, divided by how much they count."""
        if target.is_floating_point():
            return total / (target.numel() // max(target.shape[1], 1))
        valid = target != self.ignore_index
        return total / _row_weight(total, self.weight, target * valid, valid).sum()

    def of_mean(self, grad: Tensor, target: Tensor) -> Tensor:
        """What each row is sent by a mean; nothing, if none counts."""
        if target.is_floating_point():
            return self.mean(grad, target) if target.numel() else torch.zeros_like(grad)
        return choose((target != self.ignore_index).any(), self.mean(grad, target))


def _pieces(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reading: Reading, size: int
) -> Iterator[tuple[Tensor, Tensor, Answers]]:
    """Of some rows after another: inputs, scores, answers. The scores may be written over: where nothing looks on,
    the next take their place."""
    flat, shift = rows(weight), None if bias is None else bias.reshape(-1)
    like = weight.new_empty(len(weight), dtype=_wide(weight.dtype))
    rooms: list[Tensor] = []
    for x, t in zip(input.split(size), target.split(size), strict=True):
        q = reading.answers(t, like)
        x = x if q.valid is None else _where_counted(q.valid, x)
        if not rooms:
            scores = F.linear(x, flat, shift)
            wide = scores.to(like.dtype)
            rooms = [scores, wide] if nothing_looks_on(scores) else []
        else:
            scores, wide = (room[: len(x)] for room in rooms)
            scores = scores if shift is None else scores.copy_(shift)
            scores = scores.addmm_(x, flat.mT, beta=0 if shift is None else 1)
            wide = wide if wide.dtype == scores.dtype else wide.copy_(scores)
        yield x, wide.reshape(len(x), *weight.shape[:-1]), q


def _where_counted(valid: Tensor, x: Tensor) -> Tensor:
    """Whatever an ignored row holds leaves no trace."""
    counted = valid if valid.dim() == 1 else valid.sum(list(range(1, valid.dim()))) > 0
    return choose(counted.unsqueeze(1).expand_as(x), x.contiguous())


class Softmax(NamedTuple):
    """p = exponentials / total, without the division; λ = log Σ e^z."""

    exponentials: Tensor
    total: Tensor
    logsumexp: Tensor


def _softmax(scores: Tensor) -> Softmax:
    """Written over the scores, where nothing looks on."""
    top = scores.detach().amax(1, keepdim=True)  # p does not depend on it
    shifted = plus(scores, -top)
    exponentials = shifted.exp_() if nothing_looks_on(shifted) else shifted.exp()
    total = exponentials.sum(1)
    return Softmax(exponentials, total, total.log() + top.squeeze(1))


def _right(scores: Tensor, q: Answers) -> Tensor:
    """Σ_c q_c z_c"""
    found = torch.zeros_like(q.mass) if q.soft is None else (scores * q.soft).sum(1)
    if q.place is not None and q.hard is not None:
        found = found + q.hard * _scores_at(q.place, scores)
    return found


def _scores_at(place: Tensor, scores: Tensor) -> Tensor:
    try:
        return scores.gather(1, place.unsqueeze(1)).squeeze(1)
    except RuntimeError as error:
        if "out of bounds" in str(error):  # torch's losses raise an IndexError for such a class
            raise IndexError(f"a target is no class: {error}") from None
        raise


def _losses(right: Tensor, softmax: Softmax, q: Answers) -> Tensor:
    losses = softmax.logsumexp * q.mass - right
    return losses if q.valid is None else choose(q.valid, losses)


def _slope(softmax: Softmax, q: Answers, sent: Tensor) -> Tensor:
    """D, written over the exponentials where nothing looks on."""
    sent = sent.expand_as(q.mass).contiguous()
    sent = sent if q.valid is None else choose(q.valid, sent)
    slope = times(softmax.exponentials, (sent * q.mass / softmax.total).unsqueeze(1))
    if q.place is not None and q.hard is not None:
        slope = added(slope, 1, q.place.unsqueeze(1), (-sent * q.hard).unsqueeze(1))
    return slope if q.soft is None else plus(slope, q.soft, -sent.unsqueeze(1))


Needed = tuple[bool, bool, bool]
"""Of input, linear_weight and linear_bias: whose gradient is needed."""


def _one(weight: Tensor) -> Tensor:
    """1 in the dtype of the scores: what each row of a plain sum of losses is sent."""
    return weight.new_ones((), dtype=_wide(weight.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _products(slopes: Iterable[tuple[Tensor, Tensor]], weight: Tensor, needed: Needed) -> list[Tensor | None]:
    """∂L/∂x = D W,  ∂L/∂W = Dᵀ x  and  ∂L/∂b = Σ D,  from x and D of some rows after another."""
    to_input: list[Tensor] = []
    to_weight: Tensor | None = None
    to_bias: Tensor | None = None
    for x, slope in slopes:
        slope = slope.reshape(len(x), len(rows(weight)))
        if needed[2]:
            to_bias = slope.sum(0) if to_bias is None else to_bias + slope.sum(0)
        if needed[0]:
            to_input.append(_wide_product(slope, rows(weight)))
        if needed[1]:
            to_weight = _plus_product(to_weight, slope.mT, x)
    return [
        torch.cat(to_input) if needed[0] else None,
        None if to_weight is None else to_weight.reshape(weight.shape),
        None if to_bias is None else to_bias.reshape(weight.shape[:-1]),
    ]


def _wide_product(slope: Tensor, weight: Tensor) -> Tensor:
    """D W in the precision of D, float32 at least, for a W that may have a lower one.

    On the CPU the product itself is in float32, some classes of W at a time. In bfloat16 it takes up to 100 times
    as long there (256 x 8192 times 8192 x 512, one thread, no instructions for bfloat16: 7.2 s and 0.07 s).
    """
    if slope.dtype == weight.dtype:
        return slope @ weight
    if not nothing_looks_on(slope):
        return (slope.to(weight.dtype) @ weight).to(slope.dtype)
    if not slope.is_cpu:
        return torch.mm(slope.to(weight.dtype), weight, out_dtype=slope.dtype)
    total = slope.new_zeros(len(slope), weight.shape[1])
    for part, factor in zip(slope.split(_BLOCK, 1), weight.split(_BLOCK), strict=True):
        total.addmm_(part, factor.to(slope.dtype))
    return total


def _plus_product(total: Tensor | None, slope: Tensor, x: Tensor) -> Tensor:
    """total + Dᵀ x in the precision of D likewise, written over the total where nothing looks on."""
    if total is None or not nothing_looks_on(total, slope):
        product = _wide_product(slope, x)
        return product if total is None else total + product
    if slope.is_cpu or slope.dtype == x.dtype:
        return total.addmm_(slope, x.to(slope.dtype))
    return total.add_(_wide_product(slope, x))


def _with_sent(pieces: Iterable[Any], sent: Tensor, size: int) -> Iterable[tuple[Any, Tensor]]:
    """Each piece with what its rows are sent: the same for all, or each its own."""
    return zip(pieces, sent.split(size) if sent.dim() else repeat(sent), strict=False)


def _gradients(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    reading: Reading,
    sent: Tensor,
    size: int,
    needed: Needed,
) -> list[Any]:
    """Of input, linear_weight and linear_bias, from scores made again."""
    pieces = _pieces(input, linear_weight, linear_bias, target, reading, size)
    slopes = ((x, _slope(_softmax(z), q, s)) for (x, z, q), s in _with_sent(pieces, sent, size))
    return _products(slopes, linear_weight, needed)


class LinearCrossEntropyLossFunction(Rule):
    r"""ℓ = -Σ_c q_c log p_c = λ Σ q - Σ_c q_c z_c,    z = x Wᵀ + b,   λ = log Σ e^z,   p = e^(z - λ)

    q = w t′,  t′ = (1-ε) t + ε/C,  of class probabilities t; of a class index as in `CrossEntropyLossFunction`
    L: the losses, their sum or their mean;  each is sent s (as there), 0 where ignored

    dλ = ⟨p, dz⟩, so  D = ∂L/∂z = s (p Σ q - q):      ∂L/∂x = D W      ∂L/∂W = Dᵀ x      ∂L/∂b = Σ D
    and  ∂L/∂q = s (λ - z):      ∂L/∂t = s (1-ε) w (λ - z)      ∂L/∂w = Σ s t′ (λ - z)

    x: (N, in)   W: (C, ..., in)   b: (C, ...)   t: (N, ...) or (N, C, ...)   w: (C)   L: in float32 at least
    The backward makes z again, and sums over the pieces.

    Wijmans, Huval, Hertzberg, Koltun and Krähenbühl, "Cut Your Losses in Large-Vocabulary Language Models", 2025.
    """

    in_float32 = False  # what is no product is in float32 as it is

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
        pieces = _pieces(input, linear_weight, linear_bias, target, reading, size)
        return _reduced([_losses(_right(z, q), _softmax(z), q) for _, z, q in pieces], target, reading, reduction)

    def reading(weight: Tensor | None, ignore_index: int, label_smoothing: float) -> Reading:
        return Reading(weight, ignore_index, label_smoothing)

    def sent(grad: Tensor, target: Tensor, reading: Reading, reduction: int) -> Tensor:
        return reading.of_mean(grad, target) if reduction == MEAN else grad

    gradients = _gradients

    def grad_input(gradients: list[Any], input: Tensor) -> Tensor:
        return gradients[0].to(input.dtype)

    def grad_linear_weight(gradients: list[Any], linear_weight: Tensor) -> Tensor:
        return gradients[1].to(linear_weight.dtype)

    def grad_linear_bias(gradients: list[Any], linear_weight: Tensor) -> Tensor:
        return gradients[2].to(linear_weight.dtype)

    def surprise(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        reading: Reading,
        sent: Tensor,
        size: int,
    ) -> Tensor:
        """s (λ - z): as many numbers as the target holds."""
        if not target.is_floating_point():
            raise RuntimeError("a class weight has no gradient where the target is class indices")
        pieces = _pieces(input, linear_weight, linear_bias, target, reading, size)
        found = []
        for (_, z, _), s in _with_sent(pieces, sent, size):
            found.append((z.logsumexp(1, keepdim=True) - z) * (s.unsqueeze(1) if s.dim() else s))
        return torch.cat(found)

    def grad_target(surprise: Tensor, target: Tensor, reading: Reading) -> Tensor:
        kept = surprise * (1 - reading.label_smoothing)
        return (kept if reading.weight is None else kept * _along(reading.weight, kept)).to(target.dtype)

    def grad_weight(surprise: Tensor, target: Tensor, reading: Reading, weight: Tensor) -> Tensor:
        return (surprise * reading.smoothed(target)).sum([0, *range(2, target.dim())]).to(weight.dtype)


def _reduced(losses: list[Tensor], target: Tensor, reading: Reading, reduction: int) -> Tensor:
    if reduction == NONE:
        return torch.cat(losses)
    total = torch.stack([piece.sum() for piece in losses]).sum()
    return reading.mean(total, target) if reduction == MEAN else total


class LinearCrossEntropyLossOnceFunction(LinearCrossEntropyLossFunction):
    r"""The same for a sum or a mean, whose rows are all sent one s: D is formed in the forward, the scores at hand

    Kept are the slopes of Σ ℓ, which the backward multiplies by s. The one of W is as large as W, so it is written
    over where nobody sees it any more.
    """

    statistics = ("slope_input", "slope_linear_weight", "slope_linear_bias")

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
        losses: list[Tensor] = []
        one = _one(linear_weight)

        def slopes() -> Iterator[tuple[Tensor, Tensor]]:
            for x, z, q in _pieces(input, linear_weight, linear_bias, target, reading, size):
                right, softmax = _right(z, q), _softmax(z)
                losses.append(_losses(right, softmax, q))
                yield x, _slope(softmax, q, one)

        found = _products(slopes(), linear_weight, needed)
        absent = input.new_empty(0)
        return _reduced(losses, target, reading, reduction), *[absent if x is None else x for x in found]

    def slopes(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        reading: Reading,
        size: int,
        needed: Needed,
    ) -> list[Any]:
        return _gradients(input, linear_weight, linear_bias, target, reading, _one(linear_weight), size, needed)

    def slope_input(slopes: list[Any]) -> Tensor:
        return slopes[0]

    def slope_linear_weight(slopes: list[Any]) -> Tensor:
        return slopes[1]

    def slope_linear_bias(slopes: list[Any]) -> Tensor:
        return slopes[2]

    def grad_input(
        slope_input: Tensor, sent: Tensor, shown: bool, input: Tensor, target: Tensor, ignore_index: int
    ) -> Tensor:
        found = _sent_on(slope_input, sent, shown).to(input.dtype)
        return found if target.is_floating_point() else _where_counted(target != ignore_index, found)

    def grad_linear_weight(slope_linear_weight: Tensor, sent: Tensor, shown: bool, input: Tensor) -> Tensor:
        return _sent_on(slope_linear_weight, sent, shown).to(input.dtype)

    def grad_linear_bias(slope_linear_bias: Tensor, sent: Tensor, shown: bool, input: Tensor) -> Tensor:
        return _sent_on(slope_linear_bias, sent, shown).to(input.dtype)


def _sent_on(slope: Tensor, sent: Tensor, shown: bool) -> Tensor:
    return times(slope, sent) if not shown and last_backward() else slope * sent


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
@partial(refusing_as, _reference)
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
        return bound(_reference)(
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
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int | None,
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
    samples=lambda t: [
        Call(t(5, 2), t(3, 2), t.index(3, 5), linear_bias=t(3), weight=t.fixed(3, low=0.5, high=2)),
        Call(t(4, 2), t(3, 2, 2), t.index(3, 4, 2), ignore_index=1, label_smoothing=0.1, reduction="none"),
        Call(
            t(4, 2),
            t(3, 2),
            t(4, 3).softmax(1),
            linear_bias=t(3),
            weight=t(3, low=0.5, high=2),
            label_smoothing=0.1,
        ),
        Call(t(2), t(3, 2), t.index(3), linear_bias=t(3), label_smoothing=0.2, weight=t.fixed(3, low=0.5, high=2)),
        Call(t(4, 2), t(3, 2, 2), t(4, 3, 2).softmax(1), reduction="sum"),
    ],
    big=lambda t: Call(t(256, 128), t(8192, 128), t.index(8192, 256)),
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
