"""Losses of classes: each row of scores has one right answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import choose, drop_in
from manualgrad.ops.loss import REDUCTIONS, named
from manualgrad.registry import Call, register
from manualgrad.rule import FLOAT32, Rule, nothing_looks_on


def _class_axis(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


class ClassLoss(Rule):
    r"""A loss of rows, each with an index t of its class: L = reduction of ℓᵢ wᵢ,  wᵢ = w[tᵢ], 0 where ignored

    reduction   "none": Lᵢ = ℓᵢ wᵢ      "sum": L = Σ ℓᵢ wᵢ      "mean": L = Σ ℓᵢ wᵢ / Σ wᵢ
    each row is sent               gᵢ or g                        g / Σ wᵢ                     =: spread
    """

    def valid(target: Tensor, ignore_index: int) -> Tensor:
        return target != ignore_index

    def place(target: Tensor, valid: Tensor) -> Tensor:
        return target * valid  # an ignored index may lie outside the classes

    def row_weight(input: Tensor, weight: Tensor | None, place: Tensor, valid: Tensor) -> Tensor:
        return valid.to(input.dtype) if weight is None else choose(valid, weight[place].to(input.dtype))

    def spread(grad: Tensor, row_weight: Tensor, valid: Tensor, reduction: str) -> Tensor:
        if reduction == "mean":
            grad = grad / row_weight.sum()
        return choose(valid, grad.expand_as(row_weight).contiguous())


class NLLLossFunction(ClassLoss):
    r"""ℓ = -x[t]        x: (N, C, ...) of log-probabilities   t: (N, ...)      ∂L/∂x[t] = -spread · w[t]"""

    autocast = FLOAT32

    def forward(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
        return F.nll_loss(input, target, weight, ignore_index=ignore_index, reduction=reduction)

    def grad_input(input: Tensor, place: Tensor, spread: Tensor, row_weight: Tensor) -> Tensor:
        axis = _class_axis(input)
        sent = (-spread * row_weight).unsqueeze(axis)
        zeros = torch.zeros_like(input)
        if nothing_looks_on(zeros, sent):
            return zeros.scatter_(axis, place.unsqueeze(axis), sent)
        return zeros.scatter(axis, place.unsqueeze(axis), sent)


@drop_in
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-w[t] x[t], reduced, as `torch.nn.functional.nll_loss`.

    Shapes: input (N, C, ...) or (C) of log-probabilities, target (N, ...) or () of class indices, weight (C).

    Raises:
        ValueError: an unknown reduction, or batches of different sizes.
        IndexError: an index that is no class.
    """
    return NLLLossFunction.apply(input, target, weight, ignore_index, named(reduction, size_average, reduce))


class CrossEntropyLossFunction(ClassLoss):
    r"""ℓ w[t] = -Σ_c q_c log p_c,    p = softmax x,   q = (1-ε) w[t] 1_t + (ε/C) w      (ε: label smoothing)

    log p_c = x_c - log Σ e^x,  d log p = dx - ⟨p, dx⟩:      ∂L/∂x = spread · (p Σ q - q)
    """

    autocast = FLOAT32

    def forward(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    def mass(weight: Tensor | None, row_weight: Tensor, label_smoothing: float) -> Tensor:
        """Σ q, of each row."""
        if weight is None or not label_smoothing:
            return row_weight
        return row_weight * (1 - label_smoothing) + weight.mean() * label_smoothing

    def grad_input(
        input: Tensor,
        weight: Tensor | None,
        valid: Tensor,
        place: Tensor,
        spread: Tensor,
        row_weight: Tensor,
        mass: Tensor,
        label_smoothing: float,
    ) -> Tensor:
        axis = _class_axis(input)
        hard = spread * row_weight * (1 - label_smoothing)
        gradient = torch.softmax(input, axis) * (spread * mass).unsqueeze(axis)
        gradient = gradient.scatter_add(axis, place.unsqueeze(axis), -hard.unsqueeze(axis))
        if label_smoothing:
            soft = (spread * (label_smoothing / input.shape[axis])).unsqueeze(axis)
            gradient = gradient - (soft if weight is None else soft * _along(weight, input, axis))
        if input.is_cpu and nothing_looks_on(input, valid) and bool(valid.all()):
            return gradient
        return choose(valid.unsqueeze(axis).expand_as(gradient), gradient)  # zero, though an ignored row hold inf


class SoftCrossEntropyLossFunction(Rule):
    r"""ℓ = -Σ_c q_c log p_c,    p = softmax x,   q = w ((1-ε) t + ε/C)      t: class probabilities

    ∂L/∂x = spread · (p Σ q - q)       ∂L/∂t = -spread · (1-ε) w log p       ∂L/∂w = -Σ spread · (q/w) log p
    """

    autocast = FLOAT32

    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float
    ) -> Tensor:
        return F.cross_entropy(input, target, weight, reduction=reduction, label_smoothing=label_smoothing)

    def axis(input: Tensor) -> int:
        return _class_axis(input)

    def spread(grad: Tensor, input: Tensor, reduction: str, axis: int) -> Tensor:
        if reduction == "mean":
            return grad / (input.numel() // max(input.shape[axis], 1))
        return grad if reduction == "sum" else grad.unsqueeze(axis)

    def class_weight(input: Tensor, weight: Tensor | None, axis: int) -> Tensor:
        return torch.ones_like(input) if weight is None else _along(weight, input, axis)

    def smoothed(target: Tensor, label_smoothing: float, axis: int) -> Tensor:
        return target * (1 - label_smoothing) + label_smoothing / target.shape[axis] if label_smoothing else target

    def log_probability(input: Tensor, axis: int) -> Tensor:
        return torch.log_softmax(input, axis)

    def grad_input(
        spread: Tensor, smoothed: Tensor, class_weight: Tensor, log_probability: Tensor, axis: int
    ) -> Tensor:
        q = smoothed * class_weight
        return spread * (log_probability.exp() * q.sum(axis, keepdim=True) - q)

    def grad_target(
        spread: Tensor, class_weight: Tensor, log_probability: Tensor, label_smoothing: float
    ) -> Tensor:
        return -spread * (1 - label_smoothing) * class_weight * log_probability

    def grad_weight(spread: Tensor, smoothed: Tensor, log_probability: Tensor, axis: int) -> Tensor:
        sent = -spread * smoothed * log_probability
        others = tuple(i for i in range(sent.dim()) if i != axis)
        return sent.sum(others) if others else sent


def _along(weight: Tensor, input: Tensor, axis: int) -> Tensor:
    """A weight for each class, shaped to broadcast along the class axis."""
    return weight.reshape(-1, *[1] * (input.dim() - axis - 1))


@drop_in
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of softmax(x) with class indices or probabilities, as `torch.nn.functional.cross_entropy`.

    Shapes: input (N, C, ...) or (C), target (N, ...) or () of class indices or of the input's shape with class
    probabilities, weight (C).

    Raises:
        ValueError: an unknown reduction, or batches of different sizes.
        IndexError: an index that is no class.
        RuntimeError: label smoothing outside [0, 1], a target of a wrong shape or dtype.
    """
    reduction = named(reduction, size_average, reduce)
    if target.is_floating_point():
        if ignore_index >= 0 or target.shape != input.shape:  # raises what torch raises
            return F.cross_entropy(input, target, weight, ignore_index=ignore_index)
        return SoftCrossEntropyLossFunction.apply(input, target, weight, reduction, label_smoothing)
    return CrossEntropyLossFunction.apply(input, target, weight, ignore_index, reduction, label_smoothing)


register(
    nll_loss,
    samples=lambda t: [
        *(Call(t(5, 3), t.index(3, 5), reduction=reduction) for reduction in REDUCTIONS),
        *(
            Call(t(5, 3), t.index(3, 5), t.fixed(3, low=0.5, high=2), ignore_index=1, reduction=reduction)
            for reduction in REDUCTIONS
        ),
        Call(t(2, 3, 4), t.index(3, 2, 4), ignore_index=0),
        Call(t(3), t.index(3)),
    ],
    big=lambda t: Call(t(512, 8192), t.index(8192, 512)),
)

register(
    cross_entropy,
    samples=lambda t: [
        *(Call(t(5, 3), t.index(3, 5), reduction=reduction) for reduction in REDUCTIONS),
        *(
            Call(
                t(5, 3),
                t.index(3, 5),
                t.fixed(3, low=0.5, high=2),
                ignore_index=1,
                label_smoothing=0.1,
                reduction=reduction,
            )
            for reduction in REDUCTIONS
        ),
        Call(t(2, 3, 4), t.index(3, 2, 4), label_smoothing=0.2),
        Call(t(3), t.index(3)),
        *(Call(t(5, 3), t(5, 3).softmax(1), reduction=reduction) for reduction in REDUCTIONS),
        Call(t(2, 3, 4), t(2, 3, 4).softmax(1), t(3, low=0.5, high=2), label_smoothing=0.1),
        Call(t(3), t(3).softmax(0), t(3, low=0.5, high=2)),
    ],
    big=lambda t: Call(t(512, 8192), t.index(8192, 512)),
)
