"""Losses of classes: each row of scores has one right answer, or a probability for each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.binding import bound
from manualgrad.ops.elementary import added, choose, drop_in, stands_for, times
from manualgrad.ops.loss import MEAN, NONE, REDUCTIONS, SUM, Loss, _nn
from manualgrad.ops.softmax import log_softmax
from manualgrad.registry import Call, register
from manualgrad.rule import cast, nothing_looks_on


def _class_axis(input: Tensor) -> int:
    return min(input.dim() - 1, 1)


class ClassLoss(Loss):
    r"""A loss of rows, each with an index t of its class: L = reduction of wᵢ ℓᵢ,  wᵢ = w[tᵢ], 0 where ignored

    reduction          "none": Lᵢ = wᵢ ℓᵢ     "sum": L = Σ wᵢ ℓᵢ     "mean": L = Σ wᵢ ℓᵢ / Σ wᵢ
    each wᵢ ℓᵢ is sent           gᵢ                    g                      g / Σ wᵢ            =: sent
    """

    def valid(target: Tensor, ignore_index: int) -> Tensor:
        return target != ignore_index

    def place(target: Tensor, valid: Tensor) -> Tensor:
        return target * valid  # an ignored index may lie outside the classes

    def row_weight(input: Tensor, weight: Tensor | None, place: Tensor, valid: Tensor) -> Tensor:
        return _row_weight(input, weight, place, valid)

    def sent(grad: Tensor, row_weight: Tensor, valid: Tensor, reduction: int) -> Tensor:
        if reduction == MEAN:
            grad = grad / row_weight.sum()
        return choose(valid, grad.expand_as(row_weight).contiguous())


def _row_weight(input: Tensor, weight: Tensor | None, place: Tensor, valid: Tensor) -> Tensor:
    return valid.to(input.dtype) if weight is None else choose(valid, weight[place].to(input.dtype))


@stands_for(_nn.nll_loss_nd)
class NLLLossFunction(ClassLoss):
    r"""ℓ = -x[t]        x: (N, C, ...) of log-probabilities   t: (N, ...)      ∂L/∂x[t] = -sent w[t]"""

    def forward(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> Tensor:
        return _nn.nll_loss_nd(input, target, weight, reduction, ignore_index)

    def grad_input(input: Tensor, place: Tensor, sent: Tensor, row_weight: Tensor) -> Tensor:
        axis = _class_axis(input)
        return added(torch.zeros_like(input), axis, place.unsqueeze(axis), (-sent * row_weight).unsqueeze(axis))


class CrossEntropyLossFunction(ClassLoss):
    r"""w[t] ℓ = -Σ_c q_c log p_c,    p = softmax x,   q = (1-ε) w[t] 1_t + (ε/C) w      (ε: label smoothing)

    log p_c = x_c - log Σ e^x,  d log p = dx - ⟨p, dx⟩:      ∂L/∂x = sent (p Σ q - q)

    Szegedy, Vanhoucke, Ioffe, Shlens and Wojna, "Rethinking the Inception Architecture for Computer Vision", 2016.
    """

    def forward(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        return _nn.cross_entropy_loss(input, target, weight, reduction, ignore_index, label_smoothing)

    def grad_input(
        input: Tensor,
        weight: Tensor | None,
        valid: Tensor,
        place: Tensor,
        sent: Tensor,
        row_weight: Tensor,
        label_smoothing: float,
    ) -> Tensor:
        axis = _class_axis(input)
        hard = mass = row_weight  # without a weight Σ q = 1
        if label_smoothing:
            hard = row_weight * (1 - label_smoothing)
            mass = row_weight if weight is None else hard + weight.mean() * label_smoothing
        gradient = _p_less_q(torch.softmax(input, axis), axis, place, sent * mass, sent * hard)
        if label_smoothing:
            soft = (sent * (label_smoothing / input.shape[axis])).unsqueeze(axis)
            gradient = gradient - (soft if weight is None else soft * _along(weight, input))
        if input.is_cpu and nothing_looks_on(gradient, sent) and valid.all():
            return gradient
        return choose(valid.unsqueeze(axis).expand_as(gradient), gradient)  # zero, though an ignored row hold inf


def _p_less_q(p: Tensor, axis: int, place: Tensor, mass: Tensor, hard: Tensor) -> Tensor:
    """p · mass, of which each row loses `hard` at its class."""
    return added(times(p, mass.unsqueeze(axis)), axis, place.unsqueeze(axis), -hard.unsqueeze(axis))


def _along(weight: Tensor, input: Tensor) -> Tensor:
    """A weight for each class, shaped to broadcast along the class axis."""
    return weight.reshape(-1, *[1] * (input.dim() - 2))


@stands_for(_nn.cross_entropy_loss)
def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """-Σ_c q_c log p_c: of class indices one rule, of class probabilities composed, as torch does."""
    if target.shape != input.shape or not target.is_floating_point() or ignore_index >= 0:
        return CrossEntropyLossFunction.apply(input, target, weight, reduction, ignore_index, label_smoothing)
    input, target, weight = cast(Loss, (input, target, weight))
    axis = _class_axis(input)
    classes = input.shape[axis]
    if label_smoothing > 0:
        target = target * (1 - label_smoothing) + label_smoothing / classes
    losses = log_softmax(input, axis) * target
    if weight is not None:
        if weight.shape != (classes,):
            raise ValueError(f"a weight for each of {classes} classes, not {tuple(weight.shape)}")
        losses = losses * _along(weight, input)
    if reduction == NONE:
        return -losses.sum(axis)
    return -losses.sum() / (input.numel() // max(classes, 1)) if reduction == MEAN else -losses.sum()


register(
    "nll_loss",
    samples=lambda t: [
        Call(t(5, 3), t.index(3, 5)),
        Call(t(5, 3), t.index(3, 5), t.fixed(3, low=0.5, high=2), ignore_index=1),
        Call(t(2, 3, 4), t.index(3, 2, 4), ignore_index=0, reduction="none"),
    ],
    big=lambda t: Call(t(512, 8192), t.index(8192, 512)),
)

register(
    "cross_entropy",
    samples=lambda t: [
        Call(t(5, 3), t.index(3, 5)),
        Call(t(5, 3), t.index(3, 5), t.fixed(3, low=0.5, high=2), ignore_index=1, label_smoothing=0.1),
        Call(t(2, 3, 2), t.index(3, 2, 2), label_smoothing=0.2, reduction="none"),
        Call(t(2, 3, 2), t(2, 3, 2).softmax(1), t(3, low=0.5, high=2), label_smoothing=0.1),
    ],
    big=lambda t: Call(t(512, 8192), t.index(8192, 512)),
)


class LinearCrossEntropyLossFunction(ClassLoss):
    r"""Cross entropy of scores x Wᵀ + b, some rows at a time, so that never all scores are in memory

    z = x Wᵀ + b,  D = ∂L/∂z = sent w[t] (p - 1_t):      ∂L/∂x = D W      ∂L/∂W = Dᵀ x      ∂L/∂b = Σ D
    The backward makes z again, and sums over the pieces. (torch's keeps the gradients from its forward, and so has
    no second derivative: it gives zero.)

    Wijmans, Huval, Hertzberg, Koltun and Krähenbühl, "Cut Your Losses in Large-Vocabulary Language Models", 2025.
    """

    autocast = {}

    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        rows: int,
    ) -> Tensor:
        pieces = zip(input.split(rows), target.split(rows), strict=True)
        losses = [_nll(F.linear(x, linear_weight, linear_bias), t, weight, ignore_index) for x, t in pieces]
        if reduction == NONE:
            return torch.cat(losses)
        total = torch.stack([piece.sum() for piece in losses]).sum()
        if reduction == SUM:
            return total
        valid = target != ignore_index
        return total / _row_weight(input, weight, target * valid, valid).sum()

    def gradients(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        place: Tensor,
        sent: Tensor,
        row_weight: Tensor,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        to_input: list[Tensor] = []
        to_weight, to_bias = torch.zeros_like(linear_weight), linear_weight.new_zeros(len(linear_weight))
        plus_product = Tensor.addmm_ if nothing_looks_on(linear_weight, sent) else Tensor.addmm
        pieces = zip(*(x.split(rows) for x in (input, place, sent * row_weight)), strict=True)
        for x, at, factor in pieces:
            p = torch.softmax(F.linear(x, linear_weight, linear_bias), 1)
            d = _p_less_q(p, 1, at, factor, factor)
            to_input.append(d @ linear_weight)
            to_weight, to_bias = plus_product(to_weight, d.mT, x), to_bias + d.sum(0)
        return torch.cat(to_input), to_weight, to_bias

    def grad_input(gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return gradients[0]

    def grad_linear_weight(gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return gradients[1]

    def grad_linear_bias(gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return gradients[2]


def _nll(scores: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    return _nn.nll_loss_nd(torch.log_softmax(scores, 1), target, weight, NONE, ignore_index)


_PIECE = 2**23
"""Scores at a time, 32 MiB of them in float32: enough rows for products at full speed."""


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
    options: Any = None,
) -> Tensor:
    """Cross entropy of x Wᵀ + b, as `torch.nn.functional.linear_cross_entropy`.

    Shapes: input (N, in) or (in), linear_weight (C, in) or (C, ..., in), linear_bias (C, ...), weight (C), target
    (N, ...) or () of class indices, or (N, C, ...) or (C) of class probabilities. With `options` rows with class
    indices are taken some at a time.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: other shapes.
    """
    composed = bound(F.linear_cross_entropy)
    in_pieces = reduction in REDUCTIONS and target.dtype == torch.int64 and linear_weight.dim() == 2
    if options is None or label_smoothing or not in_pieces or not 1 <= input.dim() <= 2:
        return composed(
            *(input, linear_weight, target),
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise RuntimeError(f"a bias for each of {len(linear_weight)} classes, not {tuple(linear_bias.shape)}")
    x, t = torch.atleast_2d(input), target.reshape(-1) if input.dim() == 1 else target
    if options.chunking_method == "auto":
        rows = max(1, _PIECE // max(1, len(linear_weight)))
    else:
        sizes = {"num_batches": len(x), "in_features": x.shape[1], "num_classes": len(linear_weight)}
        rows = options._adjust(**sizes, dtype=x.dtype, device=x.device).batch_chunk_size
    ignored = -100 if ignore_index is None else ignore_index
    loss = LinearCrossEntropyLossFunction.apply(
        x, linear_weight, linear_bias, t, weight, REDUCTIONS.index(reduction), ignored, rows
    )
    return loss.reshape(target.shape) if reduction == "none" else loss


if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
    linear_cross_entropy = drop_in(linear_cross_entropy)
    register(
        linear_cross_entropy,
        samples=lambda t: [
            Call(t(5, 2), t(3, 2), t.index(3, 5), linear_bias=t(3), weight=t.fixed(3, low=0.5, high=2)),
            Call(t(4, 2), t(3, 2, 2), t.index(3, 4, 2), ignore_index=1, label_smoothing=0.1, reduction="none"),
        ],
        big=lambda t: Call(t(256, 128), t(8192, 128), t.index(8192, 256)),
    )
