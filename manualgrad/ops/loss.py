"""Losses of pairs of numbers, an output and its target: what the output layer is told first."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from manualgrad.ops.elementary import (
    DifferenceFunction,
    DifferenceLoss,
    PlainDifferenceFunction,
    PointwiseLoss,
    broadcast,
    choose,
    drop_in,
    mean_scale,
    reduced,
    scaled,
    times,
)
from manualgrad.registry import Call, register
from manualgrad.rule import FLOAT32, Rule, plain

# F.mse_loss without the checks that have been made
_mse_loss = torch._C._nn.mse_loss  # pyright: ignore[reportAttributeAccessIssue]

REDUCTIONS = ("mean", "sum", "none")


def named(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
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
    loss: Callable[..., Tensor],
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
        return loss(x, t, reduction, *settings)
    if weight.size() != input.size():
        raise ValueError("Weights and input must have the same size.")
    losses = loss(x, t, "none", *settings) * weight
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
    return _reduced(rule.apply, input, target, weight, named(reduction, size_average, reduce))


class L1LossFunction(PointwiseLoss):
    r"""ℓ = |d|      ∂ℓ/∂d = sign d      (at 0: 0; for complex numbers d / |d|)"""

    complex = True

    def forward(input: Tensor, reduction: str) -> Tensor:
        return reduced(input.abs(), reduction)

    def slope(input: Tensor) -> Tensor:
        return input.sgn()


def _l1_loss(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Of x - t, which is kept in place of both."""
    return L1LossFunction.apply(DifferenceFunction.apply(input, target), reduction)


def _weighted_l1_loss(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """With a weight torch computes it by other operations, which autocast leaves alone."""
    return L1LossFunction.apply(PlainDifferenceFunction.apply(input, target), reduction)


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
    loss = _l1_loss if weight is None else _weighted_l1_loss
    return _reduced(loss, input, target, weight, named(reduction, size_average, reduce))


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
    reduction = named(reduction, size_average, reduce)
    if beta == 0:
        return _reduced(_l1_loss, input, target, None, reduction)
    return _reduced(SmoothL1LossFunction.apply, input, target, None, reduction, beta)


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
    reduction = named(reduction, None, None)
    return _reduced(HuberLossFunction.apply, input, target, weight, reduction, delta, mean_by_weight=False)


for _function, _variants in (
    (mse_loss, []),
    (l1_loss, []),
    (smooth_l1_loss, [{"beta": 0.3}, {"beta": 0.0}]),
    (huber_loss, [{"delta": 0.3}]),
):
    register(
        _function,
        samples=lambda t, variants=_variants, weighted=_function is not smooth_l1_loss: [
            *(Call(t(5, 3), t(5, 3), reduction=reduction) for reduction in REDUCTIONS),
            *(Call(t(5, 3), t(5, 3), **variant) for variant in variants),
            *(
                Call(t(5, 3), t(5, 3), weight=t(5, 3, low=0.5, high=2), reduction=reduction)
                for reduction in REDUCTIONS
                if weighted
            ),
        ],
        big=lambda t: Call(t(1024, 1024), t(1024, 1024)),
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
    reduction = named(reduction, size_average, reduce)
    if target.size() != input.size():
        raise ValueError(f"the target's size ({target.size()}) must be the input's ({input.size()})")
    if weight is not None:
        weight = weight.expand(torch.broadcast_shapes(target.size(), weight.size()))
    return BCELossFunction.apply(input, target, weight, reduction)


register(
    binary_cross_entropy,
    samples=lambda t: [
        *(
            Call(t(5, 3, low=0.05, high=0.95), t(5, 3, low=0, high=1), reduction=reduction)
            for reduction in REDUCTIONS
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
    reduction = named(reduction, size_average, reduce)
    if target.size() != input.size():
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    return BCEWithLogitsLossFunction.apply(input, target, weight, pos_weight, reduction)


register(
    binary_cross_entropy_with_logits,
    samples=lambda t: [
        *(Call(t(5, 3), t(5, 3, low=0, high=1), reduction=reduction) for reduction in REDUCTIONS),
        Call(
            t(5, 3),
            t(5, 3, low=0, high=1),
            t.fixed(3, low=0.5, high=2),
            pos_weight=t.fixed(3, low=0.5, high=2),
        ),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024, low=0, high=1)),
)


class MultiLabelSoftMarginLossFunction(BCEWithLogitsLossFunction):
    r"""ℓ = -(t log σ(x) + (1 - t) log σ(-x)):  binary cross entropy, as torch computes it here"""

    autocast = {}

    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, positive_weight: Tensor | None, reduction: str
    ) -> Tensor:
        return -(target * F.logsigmoid(input) + (1 - target) * F.logsigmoid(-input))


class ClassMeanFunction(Rule):
    r"""y = (1/C) Σ x      along an axis of `count` numbers      ∂L/∂x = g / C,  for each"""

    autocast = {"cuda": "float32"}

    def forward(input: Tensor, axis: int, count: int, classes: int) -> Tensor:
        return input.sum(axis) / classes

    def grad_input(grad: Tensor, axis: int, count: int, classes: int) -> Tensor:
        sizes = [-1] * (grad.dim() + 1)
        sizes[axis] = count
        return (grad / classes).unsqueeze(axis).expand(sizes)


@drop_in
def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross entropy of σ(x), a mean over the last axis, as
    `torch.nn.functional.multilabel_soft_margin_loss`.

    Shapes: input and target (*, C), a weight that broadcasts to them; without a reduction the result is (*).

    Raises:
        ValueError: an unknown reduction.
    """
    reduction = named(reduction, size_average, reduce)
    x, t = broadcast(input, target)
    losses = MultiLabelSoftMarginLossFunction.apply(x, t, None, None, "none")
    if weight is not None:
        losses = losses * weight
    axis = input.dim() - 1  # of the input, though a target of more axes may have broadcast it
    return reduced(ClassMeanFunction.apply(losses, axis, losses.size(axis), input.size(axis)), reduction)


register(
    multilabel_soft_margin_loss,
    samples=lambda t: [
        Call(t(5, 3), t(5, 3, low=0, high=1)),
        Call(t(2, 4, 3), t(4, 3, low=0, high=1), t(3, low=0.5, high=2), reduction="none"),
        Call(t(3), t(3, low=0, high=1), t.fixed(3, low=0.5, high=2), reduction="sum"),
    ],
    big=lambda t: Call(t(4096, 80), t(4096, 80, low=0, high=1)),
)


class KLDivFunction(PointwiseLoss):
    r"""ℓ = t (log t - x)      x: log-probabilities   t: probabilities      (0 log 0 = 0)

    ∂ℓ/∂x = -t            ∂ℓ/∂t = log t + 1 - x
    """

    autocast = FLOAT32

    def forward(input: Tensor, target: Tensor, log_target: bool, reduction: str) -> Tensor:
        return torch.kl_div(input, target, _reduction.get_enum(reduction), log_target=log_target)

    def scale(target: Tensor, reduction: str) -> float:
        return mean_scale(target, reduction)

    def slope(target: Tensor) -> Tensor:
        return -target

    def grad_target(grad: Tensor, input: Tensor, target: Tensor, scale: float) -> Tensor:
        return scaled(grad, scale) * (target.log() + 1 - input)


class KLDivLogTargetFunction(KLDivFunction):
    r"""ℓ = eᵗ (t - x)      x, t: log-probabilities

    ∂ℓ/∂x = -eᵗ            ∂ℓ/∂t = eᵗ (t - x) + eᵗ
    """

    def slope(target: Tensor) -> Tensor:
        return -target.exp()

    def grad_target(grad: Tensor, input: Tensor, target: Tensor, scale: float) -> Tensor:
        return scaled(grad, scale) * (target - input + 1) * target.exp()


@drop_in
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """t (log t - x), reduced, as `torch.nn.functional.kl_div`. Input, of log-probabilities, and target broadcast.

    The reduction "batchmean" divides the sum by the input's first size.

    Raises:
        ValueError: an unknown reduction.
    """
    if size_average is None and reduce is None and reduction == "mean":
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
            stacklevel=3,
        )
    by_batch = reduction == "batchmean"
    reduction = named("sum" if by_batch else reduction, size_average, reduce)
    rule = KLDivLogTargetFunction if log_target else KLDivFunction
    loss = rule.apply(*broadcast(input, target), log_target, reduction)
    return loss / input.size(0) if by_batch and input.dim() else loss


register(
    kl_div,
    samples=lambda t: [
        Call(t(5, 3).log_softmax(1), t(5, 3).softmax(1), reduction="batchmean"),
        Call(t(5, 3), t(5, 3), reduction="sum", log_target=True),
        Call(t(5, 3), t(3, low=0.1, high=0.9), reduction="none"),
        Call(t(3), t(5, 3), reduction="batchmean", log_target=True),
    ],
    big=lambda t: Call(t(512, 2048).log_softmax(1), t(512, 2048).softmax(1), reduction="batchmean"),
)


class PoissonNLLLossFunction(PointwiseLoss):
    r"""ℓ = eˣ - t x,   or of the rate itself   x - t log(x + ε)

    ∂ℓ/∂x = eˣ - t,   or   1 - t / (x + ε)            ∂ℓ/∂t = -x,   or   -log(x + ε)
    """

    autocast = FLOAT32
    complex = True

    def forward(input: Tensor, target: Tensor, log_input: bool, eps: float, reduction: str) -> Tensor:
        return torch.poisson_nll_loss(input, target, log_input, False, eps, _reduction.get_enum(reduction))

    def slope(input: Tensor, target: Tensor, log_input: bool, eps: float) -> Tensor:
        slope = input.exp() - target if log_input else 1 - target / (input + eps)
        return slope.conj()

    def grad_target(grad: Tensor, input: Tensor, log_input: bool, eps: float, scale: float) -> Tensor:
        return -scaled(grad, scale) * (input if log_input else (input + eps).log()).conj()


class StirlingFunction(Rule):
    r"""y = t log t - t + ½ log 2πt  where t > 1, else 0:  log t! for large t      y′ = log t + 1/2t,  and 0"""

    autocast = FLOAT32

    def forward(input: Tensor) -> Tensor:
        value = input * torch.log(input) - input + 0.5 * torch.log(2 * math.pi * input)
        return value.masked_fill(input <= 1, 0)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        above = input.clamp(min=1)  # so that the branch not taken stays finite and so do its derivatives
        return choose(input > 1, grad * (above.log() + 0.5 / above))


@drop_in
def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """eˣ - t x, reduced, as `torch.nn.functional.poisson_nll_loss`. Input and target broadcast.

    Raises:
        ValueError: an unknown reduction.
    """
    reduction = named(reduction, size_average, reduce)
    if not isinstance(full, bool):
        raise TypeError(f"full must be a bool, but is {full!r}")
    input, target = broadcast(input, target)
    if not full:
        return PoissonNLLLossFunction.apply(input, target, log_input, eps, reduction)
    losses = PoissonNLLLossFunction.apply(input, target, log_input, eps, "none")
    return reduced(losses + StirlingFunction.apply(target), reduction)


register(
    poisson_nll_loss,
    samples=lambda t: [
        Call(t(5, 3), t(5, 3, low=1.1, high=4)),
        Call(t(5, 3), t(3, low=1.5, high=4), full=True, reduction="sum"),
        Call(t(5, 3, low=0.5, high=2), t(5, 3, low=0, high=0.9), False, True, reduction="none"),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024, low=0, high=4)),
)


class FloorFunction(Rule):
    r"""y = max(x, ε)      ∂L/∂x := g      (so torch defines it: a variance below the floor still learns)"""

    def forward(input: Tensor, eps: float) -> Tensor:
        return input.clone().clamp_(min=eps)

    def grad_input(grad: Tensor) -> Tensor:
        return grad


class GaussianNLLLossFunction(PointwiseLoss):
    r"""ℓ = ½ (log v + d²/v),   and if `full` + ½ log 2π            d: x - t   v: the variance

    ∂ℓ/∂d = d/v            ∂ℓ/∂v = ½ (1/v - (d/v)²)
    """

    autocast = {"cuda": "float32"}

    def forward(input: Tensor, var: Tensor, full: bool, reduction: str) -> Tensor:
        losses = 0.5 * (torch.log(var) + input**2 / var)
        if full:
            losses += 0.5 * math.log(2 * math.pi)
        return reduced(losses, reduction)

    def slope(input: Tensor, var: Tensor) -> Tensor:
        return input / var

    def grad_var(grad: Tensor, input: Tensor, var: Tensor, scale: float) -> Tensor:
        return scaled(grad, 0.5 * scale) * (1 - input * input / var) / var


@drop_in
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """½ (log v + (x - t)²/v), reduced, as `torch.nn.functional.gaussian_nll_loss`.

    Input and target broadcast; the variance is a number, or of the input's shape but for one axis, which may be of
    size 1 or, the last, left out. Variances below ε count as ε.

    Raises:
        ValueError: an unknown reduction, a variance below 0 or of another shape.
    """
    variance = var if isinstance(var, Tensor) else var * torch.ones_like(input)
    if not torch.compiler.is_compiling() and (plain(variance) < 0).any():
        raise ValueError("var has negative entry/entries")
    sizes = input.size(), variance.size()
    if sizes[0][:-1] == sizes[1]:
        variance = variance.unsqueeze(-1)
    elif len(sizes[0]) != len(sizes[1]) or sum(v for x, v in zip(*sizes, strict=True) if x != v) not in (0, 1):
        raise ValueError("var is of incorrect size")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not valid")
    difference = PlainDifferenceFunction.apply(*broadcast(input, target))
    difference, variance = broadcast(difference, FloorFunction.apply(variance, eps))
    return GaussianNLLLossFunction.apply(difference, variance, full, reduction)


register(
    gaussian_nll_loss,
    samples=lambda t: [
        Call(t(5, 3), t(5, 3), t(5, 3, low=0.5, high=2)),
        Call(t(5, 3), t(3), t(5, low=0.5, high=2), full=True, reduction="sum"),
        Call(t(5, 3), t(5, 3), t(5, 1, low=0.5, high=2), eps=0.1, reduction="none"),
        Call(t(5, 3), t(5, 3), 0.7),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024), t(1024, 1024, low=0.5, high=2)),
    special=False,
)
