"""Losses of classes: each row of scores has one right answer, or a probability for each."""

from __future__ import annotations

import torch
from torch import Tensor

from manualgrad.ops.elementary import added, choose, stands_for, times
from manualgrad.ops.loss import MEAN, NONE, Loss, _nn
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
    # take, for weight[place] with one place is an integer's indexing, which torch.compile refuses
    return valid.to(input.dtype) if weight is None else choose(valid, weight.take(place).to(input.dtype))


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
