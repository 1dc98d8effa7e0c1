"""Losses of an output and a target, element by element.

torch's Python functions check the arguments, warn, broadcast, and then call one kernel. The rules in this file
replace these kernels and have the same arguments, so torch's functions do the rest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from manualgrad.ops.arithmetic import AbsoluteFunction, DifferenceFunction
from manualgrad.ops.registration import implements, with_torch_errors
from manualgrad.ops.shapes import broadcast
from manualgrad.registry import SampleInput, register
from manualgrad.rule import FLOAT32, Rule
from manualgrad.torch_internals import unwrap_functorch

_nn: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]

NONE, MEAN, SUM = range(3)  # torch's numbers for the reductions
REDUCTIONS = ("none", "mean", "sum")


class Loss(Rule):
    r"""L = reduction of ℓᵢ      n: the number of elements

    reduction          "none": Lᵢ = ℓᵢ     "sum": L = Σ ℓᵢ     "mean": L = (1/n) Σ ℓᵢ
    hᵢ = ∂L/∂ℓᵢ               gᵢ                  g                   g / n
    """

    autocast = FLOAT32

    def h(grad: Tensor, target: Tensor, reduction: int) -> Tensor:
        return _grad_losses(grad, target, reduction)


def _grad_losses(grad: Tensor, like: Tensor, reduction: int) -> Tensor:
    return grad / max(like.numel(), 1) if reduction == MEAN else grad


class PairLoss(Loss):
    r"""ℓ = ℓ(x, t)      A subclass defines ``derivative``, ∂ℓ/∂x, and ``target_derivative``, ∂ℓ/∂t.

    dL = Σ hᵢ (∂ℓᵢ/∂x dxᵢ + ∂ℓᵢ/∂t dtᵢ):      ∂L/∂x = h ∂ℓ/∂x      ∂L/∂t = h ∂ℓ/∂t
    """

    def grad_input(h: Tensor, derivative: Tensor) -> Tensor:
        return h * derivative

    def grad_target(grad: Tensor, input: Tensor, reduction: int, target_derivative: Tensor) -> Tensor:
        # n from the input instead of the target: ∂ℓ/∂t often does not need the target, which then is not saved
        return _grad_losses(grad, input, reduction) * target_derivative


class DifferenceLoss(Loss):
    r"""ℓ = ℓ(d),  d = x - t      ∂L/∂t = -∂L/∂x"""

    def difference(input: Tensor, target: Tensor) -> Tensor:
        return input - target

    def grad_target(grad_input: Tensor) -> Tensor:
        return -grad_input


def reduce_losses(losses: Tensor, reduction: int) -> Tensor:
    return losses.mean() if reduction == MEAN else losses.sum() if reduction == SUM else losses


@implements(_nn.mse_loss)
class MSELossFunction(DifferenceLoss):
    r"""ℓ = d²,   d = x - t      ∂L/∂x = 2 h d"""

    def forward(input: Tensor, target: Tensor, reduction: int) -> Tensor:
        return _nn.mse_loss(input, target, reduction)

    def grad_input(h: Tensor, difference: Tensor) -> Tensor:
        return 2 * h * difference


@implements(_nn.huber_loss)
class HuberLossFunction(DifferenceLoss):
    r"""ℓ = ½ d² where |d| ≤ δ, else δ (|d| - ½ δ),   d = x - t      ∂L/∂x = h d,  d clamped to [-δ, δ]

    Huber, "Robust Estimation of a Location Parameter", 1964.
    """

    def forward(input: Tensor, target: Tensor, reduction: int, delta: float) -> Tensor:
        return _nn.huber_loss(input, target, reduction, delta)

    def grad_input(h: Tensor, difference: Tensor, delta: float) -> Tensor:
        return h * difference.clamp(-delta, delta)


@implements(_nn.smooth_l1_loss)
class SmoothL1LossFunction(HuberLossFunction):
    r"""ℓ = ½ d²/β where |d| < β, else |d| - ½ β:  Huber's loss with δ = β, divided by β

    Girshick, "Fast R-CNN", 2015.
    """

    def forward(input: Tensor, target: Tensor, reduction: int, delta: float) -> Tensor:
        return _nn.smooth_l1_loss(input, target, reduction, delta)

    def grad_input(h: Tensor, difference: Tensor, delta: float) -> Tensor:
        return h / delta * difference.clamp(-delta, delta)


@implements(_nn.l1_loss)
def l1_loss(input: Tensor, target: Tensor, reduction: int) -> Tensor:
    """|x - t|. It saves only the difference."""
    if input.is_complex() != target.is_complex():  # of the real one, autograd takes the real part of the gradient
        dtype = torch.promote_types(input.dtype, target.dtype)
        input, target = input.to(dtype), target.to(dtype)
    return reduce_losses(AbsoluteFunction.apply(DifferenceFunction.apply(input, target)), reduction)


for _name, _settings in (("mse_loss", {}), ("l1_loss", {}), ("huber_loss", {"delta": 0.3})):
    register(
        _name,
        sample_inputs=lambda t, settings=_settings: [
            SampleInput(t(5, 3), t(5, 3), **settings),
            SampleInput(t(5, 3), t(5, 3), weight=t(5, 3, low=0.5, high=2), reduction="none"),
        ],
        benchmark_input=lambda t: SampleInput(t(1024, 1024), t(1024, 1024)),
    )

register(
    "smooth_l1_loss",
    sample_inputs=lambda t: [SampleInput(t(5, 3), t(5, 3), beta=beta) for beta in (0.3, 0.0)],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), t(1024, 1024)),
)


@implements(_nn.binary_cross_entropy)
class BCELossFunction(PairLoss):
    r"""ℓ = -w (t log x + (1 - t) log(1 - x))      w: weight   (logarithms not below -100)

    ∂ℓ/∂x = -w (t/x - (1 - t)/(1 - x)) = w (x - t) / (x (1 - x))      (denominator not below 1e-12, as torch)
    ∂ℓ/∂t = w (log(1 - x) - log x)
    """

    autocast = {"cpu": "float32", "cuda": "banned"}

    def forward(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
        return _nn.binary_cross_entropy(input, target, weight, reduction)

    def derivative(input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        derivative = (input - target) / (input * (1 - input)).clamp(min=1e-12)
        return derivative if weight is None else weight * derivative

    def target_derivative(input: Tensor, weight: Tensor | None) -> Tensor:
        derivative = torch.log(1 - input).clamp(min=-100) - torch.log(input).clamp(min=-100)
        return derivative if weight is None else weight * derivative


@implements(torch.binary_cross_entropy_with_logits)
class BCEWithLogitsLossFunction(PairLoss):
    r"""ℓ = -w (w₊ t log σ(x) + (1 - t) log σ(-x))      w: weight   w₊: weight of the positive class

    (log σ)′(x) = σ(-x):      ∂ℓ/∂x = w ((1 - t) σ(x) - w₊ t σ(-x)),  for w₊ = 1:  w (σ(x) - t)
                              ∂ℓ/∂t = w (log σ(-x) - w₊ log σ(x)),    for w₊ = 1:  -w x
    """

    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, positive_weight: Tensor | None, reduction: int
    ) -> Tensor:
        return torch.binary_cross_entropy_with_logits(input, target, weight, positive_weight, reduction)

    def derivative(input: Tensor, target: Tensor, weight: Tensor | None, positive_weight: Tensor | None) -> Tensor:
        derivative = (
            torch.sigmoid(input) - target
            if positive_weight is None
            else (1 - target) * torch.sigmoid(input) - positive_weight * target * torch.sigmoid(-input)
        )
        return derivative if weight is None else weight * derivative

    def target_derivative(input: Tensor, weight: Tensor | None, positive_weight: Tensor | None) -> Tensor:
        derivative = (
            -input if positive_weight is None else F.logsigmoid(-input) - positive_weight * F.logsigmoid(input)
        )
        return derivative if weight is None else weight * derivative


register(
    "binary_cross_entropy",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3, low=0.05, high=0.95), t(5, 3, low=0, high=1)),
        SampleInput(
            t(4, 3, low=0.05, high=0.95), t(4, 3, low=0, high=1), t.no_grad(3, low=0.5, high=2), reduction="none"
        ),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024, low=0.05, high=0.95), t(1024, 1024, low=0, high=1)),
    supports_special_values=False,  # inputs must be probabilities
)

register(
    "binary_cross_entropy_with_logits",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t(5, 3, low=0, high=1)),
        SampleInput(
            *(t(4, 3), t(4, 3, low=0, high=1), t.no_grad(3, low=0.5, high=2)),
            pos_weight=t.no_grad(3, low=0.5, high=2),
            reduction="none",
        ),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), t(1024, 1024, low=0, high=1)),
)

register(
    "multilabel_soft_margin_loss",  # torch computes it by logsigmoid
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t(5, 3, low=0, high=1)),
        SampleInput(t(2, 4, 3), t(4, 3, low=0, high=1), t(3, low=0.5, high=2), reduction="none"),
    ],
    benchmark_input=lambda t: SampleInput(t(4096, 80), t(4096, 80, low=0, high=1)),
)


class KLDivFunction(Loss):
    r"""ℓ = p (log p - x)      x: log-probabilities   target: p or log p      (0 log 0 = 0)

    ∂L/∂x = -h p            ∂L/∂p = h (log p + 1 - x)            ∂L/∂(log p) = p ∂L/∂p
    """

    def forward(input: Tensor, target: Tensor, reduction: int, log_target: bool) -> Tensor:
        return torch.kl_div(input, target, reduction, log_target=log_target)

    def p(target: Tensor, log_target: bool) -> Tensor:
        return target.exp() if log_target else target

    def log_p(target: Tensor, log_target: bool) -> Tensor:
        return target if log_target else target.log()

    def grad_input(h: Tensor, p: Tensor) -> Tensor:
        return -h * p

    def grad_target(h: Tensor, input: Tensor, p: Tensor, log_p: Tensor, log_target: bool) -> Tensor:
        grad_p = h * (log_p + 1 - input)
        return p * grad_p if log_target else grad_p


@implements(torch.kl_div)
def kl_div(input: Tensor, target: Tensor, reduction: int, *, log_target: bool) -> Tensor:
    return KLDivFunction.apply(*broadcast(input, target), reduction, log_target)


register(
    "kl_div",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3).log_softmax(1), t(5, 3).softmax(1), reduction="batchmean"),
        SampleInput(t(3), t(4, 3), reduction="none", log_target=True),
    ],
    benchmark_input=lambda t: SampleInput(
        t(512, 2048).log_softmax(1), t(512, 2048).softmax(1), reduction="batchmean"
    ),
)


class PoissonNLLLossFunction(PairLoss):
    r"""x: the logarithm of the rate    ℓ = eˣ - t x              ∂ℓ/∂x = eˣ - t               ∂ℓ/∂t = -x
    x: the rate                     ℓ = x - t log(x + ε)      ∂ℓ/∂x = 1 - t / (x + ε)      ∂ℓ/∂t = -log(x + ε)
    """

    supports_complex = True

    def forward(input: Tensor, target: Tensor, log_input: bool, eps: float, reduction: int) -> Tensor:
        return torch.poisson_nll_loss(input, target, log_input, False, eps, reduction)

    def derivative(input: Tensor, target: Tensor, log_input: bool, eps: float) -> Tensor:
        derivative = input.exp() - target if log_input else 1 - target / (input + eps)
        return derivative.conj()

    def target_derivative(input: Tensor, log_input: bool, eps: float) -> Tensor:
        return -(input if log_input else (input + eps).log()).conj()


class StirlingFunction(Rule):
    r"""y = t log t - t + ½ log 2πt  where t > 1, else 0      (≈ log t!)      ∂L/∂t = g (log t + ½/t), else 0"""

    autocast = FLOAT32

    def forward(input: Tensor) -> Tensor:
        value = input * torch.log(input) - input + 0.5 * torch.log(2 * math.pi * input)
        return value.masked_fill(input <= 1, 0)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        t = input.clamp(min=1)  # so that the derivatives of log t + ½/t are finite where the result is 0
        return torch.where(input > 1, grad * (t.log() + 0.5 / t), 0)


@implements(torch.poisson_nll_loss)
def poisson_nll_loss(
    input: Tensor, target: Tensor, log_input: bool, full: bool, eps: float, reduction: int
) -> Tensor:
    if not isinstance(full, bool):
        raise TypeError(f"full must be a bool, got {full!r}")
    input, target = broadcast(input, target)
    if not full:
        return PoissonNLLLossFunction.apply(input, target, log_input, eps, reduction)
    losses = PoissonNLLLossFunction.apply(input, target, log_input, eps, NONE)
    return reduce_losses(losses + StirlingFunction.apply(target), reduction)


register(
    "poisson_nll_loss",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t(5, 3, low=1.1, high=4)),
        SampleInput(t(4, 3, low=0.5, high=2), t(3, low=0, high=3), False, True, reduction="none"),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), t(1024, 1024, low=0, high=4)),
)


class VarianceFloorFunction(Rule):
    r"""y = max(x, ε)      ∂L/∂x = g as in torch, even where x < ε: so training can raise a variance below ε"""

    def forward(input: Tensor, eps: float) -> Tensor:
        return input.clone().clamp_(min=eps)

    def grad_input(grad: Tensor) -> Tensor:
        return grad


class GaussianNLLLossFunction(Rule):
    r"""ℓ = ½ (log v + d²/v)      d = x - t   v: the variance

    ∂L/∂d = g d/v            ∂L/∂v = ½ g (1/v - (d/v)²) = ½ g (1 - d²/v) / v

    Nix and Weigend, "Estimating the mean and variance of the target probability distribution", 1994.
    """

    autocast = {"cuda": "float32"}

    def forward(difference: Tensor, var: Tensor) -> Tensor:
        return 0.5 * (torch.log(var) + difference**2 / var)

    def grad_difference(grad: Tensor, difference: Tensor, var: Tensor) -> Tensor:
        return grad * (difference / var)

    def grad_var(grad: Tensor, difference: Tensor, var: Tensor) -> Tensor:
        return 0.5 * grad * ((1 - difference * difference / var) / var)


def with_torch_function_dispatch(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Passes a call to ``__torch_function__`` of a mode or a tensor subclass, as torch's Python functions do."""

    @functools.wraps(function)
    def dispatching(*args: Any, **kwargs: Any) -> Tensor:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if has_torch_function(tensors):
            return handle_torch_function(dispatching, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return dispatching


@with_torch_function_dispatch
@with_torch_errors
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """½ (log v + (x - t)²/v), reduced, as `torch.nn.functional.gaussian_nll_loss`.

    Input and target broadcast. The variance is a number, or has the shape of the input, except that one axis may
    have size 1, or the last axis may be absent. A variance below ε counts as ε.

    Raises:
        ValueError: the reduction is unknown, or a variance is negative or has another shape.
    """
    variance = var if isinstance(var, Tensor) else var * torch.ones_like(input)
    if not torch.compiler.is_compiling() and (unwrap_functorch(variance) < 0).any():
        raise ValueError("var has negative entry/entries")
    if input.shape[:-1] == variance.shape:
        variance = variance.unsqueeze(-1)
    elif input.shape != variance.shape:
        differing = [size for n, size in zip(input.shape, variance.shape, strict=False) if n != size]
        if input.dim() != variance.dim() or differing != [1]:
            raise ValueError("var is of incorrect size")
    if reduction not in REDUCTIONS:
        raise ValueError(reduction + " is not valid")
    losses = GaussianNLLLossFunction.apply(*broadcast(input - target, VarianceFloorFunction.apply(variance, eps)))
    if full:
        losses = losses + 0.5 * math.log(2 * math.pi)
    return reduce_losses(losses, REDUCTIONS.index(reduction))


register(
    gaussian_nll_loss,
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t(5, 3), t(5, 3, low=0.5, high=2)),
        SampleInput(t(4, 3), t(3), t(4, low=0.5, high=2), full=True, reduction="none"),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), t(1024, 1024), t(1024, 1024, low=0.5, high=2)),
    supports_special_values=False,  # a variance must not be negative
)
