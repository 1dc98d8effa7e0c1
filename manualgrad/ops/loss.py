"""Losses: what the output layer is told first."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from manualgrad.ops.elementary import DifferenceLoss, PointwiseLoss, choose, drop_in, scaled, times
from manualgrad.registry import Call, register
from manualgrad.rule import FLOAT32, Rule, nothing_looks_on

# F.mse_loss without the checks that have been made
_mse_loss = torch._C._nn.mse_loss  # pyright: ignore[reportAttributeAccessIssue]

_REDUCTIONS = ("mean", "sum", "none")


def _named(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """The reduction, also from torch's two older arguments; an unknown one raises ValueError."""
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    _reduction.get_enum(reduction)
    return reduction


def _paired(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Input and target of one shape; torch broadcasts here, with a warning."""
    if target.size() == input.size():
        return input, target
    warnings.warn(
        f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
        "This will likely lead to incorrect results due to broadcasting. "
        "Please ensure they have the same size.",
        stacklevel=5,
    )
    broadcast = torch.broadcast_tensors(input, target)
    return broadcast[0], broadcast[1]


def _reduced(
    rule: type[Rule],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    *settings: float,
    mean_by_weight: bool = True,
) -> Tensor:
    """A loss of pairs. With a weight for each: the losses of all, weighted, and a mean that divides by the sum of
    the weights, or by their number."""
    x, t = _paired(input, target)
    if weight is None:
        return rule.apply(x, t, reduction, *settings)
    if weight.size() != input.size():
        raise ValueError("Weights and input must have the same size.")
    losses = rule.apply(x, t, "none", *settings) * weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / weight.sum() if mean_by_weight else losses.mean()


class MSELossFunction(DifferenceLoss):
    r"""ℓ = (x - t)²      ∂ℓ/∂x = 2 (x - t)"""

    autocast = FLOAT32

    def forward(input: Tensor, target: Tensor, reduction: str) -> Tensor:
        return _mse_loss(input, target, _reduction.get_enum(reduction))

    def grad_input(grad: Tensor, input: Tensor, target: Tensor, scale: float) -> Tensor:
        return times((input - target).conj(), grad * (2 * scale))


class WeightedMSELossFunction(MSELossFunction):
    """With a weight torch computes it by other operations: autocast treats them otherwise, and they take
    complex numbers."""

    autocast = {"cuda": "float32"}
    complex = True

    def forward(input: Tensor, target: Tensor, reduction: str) -> Tensor:
        return torch.pow(input - target, 2)


@drop_in
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """(x - t)², reduced, as `torch.nn.functional.mse_loss`. Input, target and weight of one shape.

    Raises:
        ValueError: an unknown reduction, or a weight of another shape.
    """
    rule = MSELossFunction if weight is None else WeightedMSELossFunction
    return _reduced(rule, input, target, weight, _named(reduction, size_average, reduce))


class MSELoss(torch.nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction)


class L1LossFunction(DifferenceLoss):
    r"""ℓ = |x - t|      ∂ℓ/∂x = sign(x - t)      (at 0: 0; for complex numbers d / |d|)"""

    autocast = FLOAT32
    complex = True

    def forward(input: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.l1_loss(input, target, reduction=reduction)

    def slope(difference: Tensor) -> Tensor:
        return difference.sgn()


class WeightedL1LossFunction(L1LossFunction):
    """With a weight torch computes it by other operations, which autocast leaves alone."""

    autocast = {}


@drop_in
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """|x - t|, reduced, as `torch.nn.functional.l1_loss`. Input, target and weight of one shape.

    Raises:
        ValueError: an unknown reduction, or a weight of another shape.
    """
    rule = L1LossFunction if weight is None else WeightedL1LossFunction
    return _reduced(rule, input, target, weight, _named(reduction, size_average, reduce))


class L1Loss(torch.nn.L1Loss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return l1_loss(input, target, reduction=self.reduction)


class SmoothL1LossFunction(DifferenceLoss):
    r"""ℓ = ½ d²/β where |d| < β, else |d| - ½ β,   d = x - t      ∂ℓ/∂x = d/β, clamped to [-1, 1]

    Girshick, "Fast R-CNN", 2015.
    """

    autocast = FLOAT32

    def forward(input: Tensor, target: Tensor, reduction: str, beta: float) -> Tensor:
        return F.smooth_l1_loss(input, target, reduction=reduction, beta=beta)

    def slope(difference: Tensor, beta: float) -> Tensor:
        return (difference / beta).clamp(-1, 1)


@drop_in
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """Quadratic below β, linear above, reduced, as `torch.nn.functional.smooth_l1_loss`. Input and target of
    one shape.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: β is negative.
    """
    reduction = _named(reduction, size_average, reduce)
    if beta == 0:
        return _reduced(L1LossFunction, input, target, None, reduction)
    return _reduced(SmoothL1LossFunction, input, target, None, reduction, beta)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLossFunction(DifferenceLoss):
    r"""ℓ = ½ d² where |d| ≤ δ, else δ (|d| - ½ δ),   d = x - t      ∂ℓ/∂x = d, clamped to [-δ, δ]

    Huber, "Robust Estimation of a Location Parameter", 1964.
    """

    autocast = FLOAT32

    def forward(input: Tensor, target: Tensor, reduction: str, delta: float) -> Tensor:
        return F.huber_loss(input, target, reduction=reduction, delta=delta)

    def slope(difference: Tensor, delta: float) -> Tensor:
        return difference.clamp(-delta, delta)


@drop_in
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Quadratic up to δ, linear above, reduced, as `torch.nn.functional.huber_loss`. Input, target and weight of
    one shape.

    Raises:
        ValueError: an unknown reduction, or a weight of another shape.
        RuntimeError: δ is not positive.
    """
    reduction = _named(reduction, None, None)
    return _reduced(HuberLossFunction, input, target, weight, reduction, delta, mean_by_weight=False)


class HuberLoss(torch.nn.HuberLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return huber_loss(input, target, reduction=self.reduction, delta=self.delta)


for _function, _module, _variants in (
    (mse_loss, MSELoss, []),
    (l1_loss, L1Loss, []),
    (smooth_l1_loss, SmoothL1Loss, [{"beta": 0.3}, {"beta": 0.0}]),
    (huber_loss, HuberLoss, [{"delta": 0.3}]),
):
    register(
        _function,
        _module,
        samples=lambda t, variants=_variants, weighted=_function is not smooth_l1_loss: [
            *(Call(t(5, 3), t(5, 3), reduction=reduction) for reduction in _REDUCTIONS),
            *(Call(t(5, 3), t(5, 3), **variant) for variant in variants),
            *(
                Call(t(5, 3), t(5, 3), weight=t(5, 3, low=0.5, high=2), reduction=reduction)
                for reduction in _REDUCTIONS
                if weighted
            ),
        ],
        big=lambda t: Call(t(1024, 1024), t(1024, 1024)),
        lacks={
            "kept_for_backward": "keeps input and target where torch keeps their difference: one more tensor, "
            "but the target is the caller's"
        }
        if _function is l1_loss
        else {},
    )


def _weighing(slope: Tensor, weight: Tensor | None) -> Tensor:
    return slope if weight is None else slope * weight


class BCELossFunction(PointwiseLoss):
    r"""ℓ = -w (t log x + (1 - t) log(1 - x))      (logarithms not below -100)

    ∂ℓ/∂x = -w (t/x - (1 - t)/(1 - x)) = w (x - t) / (x (1 - x))      (denominator not below 1e-12, as torch)
    ∂ℓ/∂t = -w (log x - log(1 - x))
    """

    autocast = {"cpu": "float32", "cuda": "refuse"}

    def forward(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
        return F.binary_cross_entropy(input, target, weight, reduction=reduction)

    def slope(input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        slope = (input - target) / (input * (1 - input)).clamp(min=1e-12)
        return _weighing(slope, weight)

    def grad_target(grad: Tensor, input: Tensor, weight: Tensor | None, scale: float) -> Tensor:
        slope = (1 - input).log().clamp(min=-100) - input.log().clamp(min=-100)
        return scaled(grad, scale) * _weighing(slope, weight)


@drop_in
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-w (t log x + (1 - t) log(1 - x)), reduced, as `torch.nn.functional.binary_cross_entropy`.

    Input, in [0, 1], and target of one shape; a weight that broadcasts to it.

    Raises:
        ValueError: an unknown reduction, or a target of another shape.
        RuntimeError: an input outside [0, 1].
    """
    reduction = _named(reduction, size_average, reduce)
    if target.size() != input.size():
        raise ValueError(f"the target's size ({target.size()}) must be the input's ({input.size()})")
    if weight is not None:
        weight = weight.expand(torch.broadcast_shapes(target.size(), weight.size()))
    return BCELossFunction.apply(input, target, weight, reduction)


class BCELoss(torch.nn.BCELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


register(
    binary_cross_entropy,
    BCELoss,
    samples=lambda t: [
        *(
            Call(t(5, 3, low=0.05, high=0.95), t(5, 3, low=0, high=1), reduction=reduction)
            for reduction in _REDUCTIONS
        ),
        Call(t(5, 3, low=0.05, high=0.95), t(5, 3, low=0, high=1), t.fixed(3, low=0.5, high=2)),
    ],
    big=lambda t: Call(t(1024, 1024, low=0.05, high=0.95), t(1024, 1024, low=0, high=1)),
    special=False,
)


class BCEWithLogitsLossFunction(PointwiseLoss):
    r"""ℓ = w ((1 - t) x + c softplus(-x)),   c = 1 + (positive weight - 1) t

    softplus′(-x) = -σ(-x):      ∂ℓ/∂x = w (1 - t - c σ(-x))
                                 ∂ℓ/∂t = w ((positive weight - 1) softplus(-x) - x)
    """

    autocast = FLOAT32

    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, positive_weight: Tensor | None, reduction: str
    ) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, weight, pos_weight=positive_weight, reduction=reduction
        )

    def slope(input: Tensor, target: Tensor, weight: Tensor | None, positive_weight: Tensor | None) -> Tensor:
        if positive_weight is None:
            slope = torch.sigmoid(input) - target
        else:
            slope = 1 - target - (1 + (positive_weight - 1) * target) * torch.sigmoid(-input)
        return _weighing(slope, weight)

    def grad_target(
        grad: Tensor, input: Tensor, weight: Tensor | None, positive_weight: Tensor | None, scale: float
    ) -> Tensor:
        slope = -input if positive_weight is None else (positive_weight - 1) * F.softplus(-input) - input
        return scaled(grad, scale) * _weighing(slope, weight)


@drop_in
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross entropy of σ(x), reduced, as `torch.nn.functional.binary_cross_entropy_with_logits`.

    Input and target of one shape; weights that broadcast to it.

    Raises:
        ValueError: an unknown reduction, or a target of another shape.
    """
    reduction = _named(reduction, size_average, reduce)
    if target.size() != input.size():
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    return BCEWithLogitsLossFunction.apply(input, target, weight, pos_weight, reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


register(
    binary_cross_entropy_with_logits,
    BCEWithLogitsLoss,
    samples=lambda t: [
        *(Call(t(5, 3), t(5, 3, low=0, high=1), reduction=reduction) for reduction in _REDUCTIONS),
        Call(
            t(5, 3),
            t(5, 3, low=0, high=1),
            t.fixed(3, low=0.5, high=2),
            pos_weight=t.fixed(3, low=0.5, high=2),
        ),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024, low=0, high=1)),
)


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
        return torch.zeros_like(input).scatter(axis, place.unsqueeze(axis), sent)


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
    return NLLLossFunction.apply(input, target, weight, ignore_index, _named(reduction, size_average, reduce))


class NLLLoss(torch.nn.NLLLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return nll_loss(
            input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


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
    reduction = _named(reduction, size_average, reduce)
    if target.is_floating_point():
        if ignore_index >= 0 or target.shape != input.shape:  # raises what torch raises
            return F.cross_entropy(input, target, weight, ignore_index=ignore_index)
        return SoftCrossEntropyLossFunction.apply(input, target, weight, reduction, label_smoothing)
    return CrossEntropyLossFunction.apply(input, target, weight, ignore_index, reduction, label_smoothing)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


register(
    nll_loss,
    NLLLoss,
    samples=lambda t: [
        *(Call(t(5, 3), t.index(3, 5), reduction=reduction) for reduction in _REDUCTIONS),
        *(
            Call(t(5, 3), t.index(3, 5), t.fixed(3, low=0.5, high=2), ignore_index=1, reduction=reduction)
            for reduction in _REDUCTIONS
        ),
        Call(t(2, 3, 4), t.index(3, 2, 4), ignore_index=0),
        Call(t(3), t.index(3)),
    ],
    big=lambda t: Call(t(512, 8192), t.index(8192, 512)),
)

register(
    cross_entropy,
    CrossEntropyLoss,
    samples=lambda t: [
        *(Call(t(5, 3), t.index(3, 5), reduction=reduction) for reduction in _REDUCTIONS),
        *(
            Call(
                t(5, 3),
                t.index(3, 5),
                t.fixed(3, low=0.5, high=2),
                ignore_index=1,
                label_smoothing=0.1,
                reduction=reduction,
            )
            for reduction in _REDUCTIONS
        ),
        Call(t(2, 3, 4), t.index(3, 2, 4), label_smoothing=0.2),
        Call(t(3), t.index(3)),
        *(Call(t(5, 3), t(5, 3).softmax(1), reduction=reduction) for reduction in _REDUCTIONS),
        Call(t(2, 3, 4), t(2, 3, 4).softmax(1), t(3, low=0.5, high=2), label_smoothing=0.1),
        Call(t(3), t(3).softmax(0), t(3, low=0.5, high=2)),
    ],
    big=lambda t: Call(t(512, 8192), t.index(8192, 512)),
)
