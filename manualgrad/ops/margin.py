"""Losses with a margin: the loss is 0 if the score of the right answer exceeds the others by the margin."""

from __future__ import annotations

import torch
from torch import Tensor

from manualgrad.ops.arithmetic import DifferenceFunction, WhereFunction
from manualgrad.ops.distance import pairwise_distance
from manualgrad.ops.loss import MEAN, NONE, Loss, _nn, reduce_losses
from manualgrad.ops.registration import implements
from manualgrad.ops.shapes import broadcast
from manualgrad.registry import SampleInput, TensorFactory, register
from manualgrad.rule import FLOAT32, Rule, autocast_inputs, replaces, with_reuse
from manualgrad.torch_internals import CLAMP_PASSES_GRADIENT_AT_BOUND, COMPILED_MULTILABEL_MARGIN_IS_WRONG


class SoftMarginLossFunction(Loss):
    r"""ℓ = log(1 + e^(-tx))      t = ±1      ∂L/∂x = -h t σ(-tx)"""

    def forward(input: Tensor, target: Tensor, reduction: int) -> Tensor:
        return _nn.soft_margin_loss(input, target, reduction)

    def grad_input(h: Tensor, input: Tensor, target: Tensor) -> Tensor:
        return -h * target * torch.sigmoid(-target * input)


@implements(_nn.soft_margin_loss)
def soft_margin_loss(input: Tensor, target: Tensor, reduction: int) -> Tensor:
    return SoftMarginLossFunction.apply(input, target.expand_as(input), reduction)


@implements(torch.clamp_min)
class ClampMinFunction(Rule):
    r"""y = max(x, low)      ∂L/∂x = g where x > low, else 0      (at x = low: as the installed torch)"""

    def forward(input: Tensor, low: float) -> Tensor:
        return torch.clamp_min(input, low)

    def grad_input(grad: Tensor, input: Tensor, low: float) -> Tensor:
        return torch.where(input >= low if CLAMP_PASSES_GRADIENT_AT_BOUND else input > low, grad, 0)


class MinimumFunction(Rule):
    r"""y = min(a, b)      ∂L/∂a = ḡ where a ≤ b, else 0      ∂L/∂b = ḡ where b ≤ a, else 0

    ḡ = ½ g where a = b, else g
    """

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.minimum(a, b)

    def gbar(grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a == b, grad * 0.5, grad)

    def grad_a(gbar: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a <= b, gbar, 0)

    def grad_b(gbar: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(b <= a, gbar, 0)


@implements(torch.hinge_embedding_loss)
def hinge_embedding_loss(input: Tensor, target: Tensor, margin: float, reduction: int) -> Tensor:
    """x where t ≠ -1, plus max(0, m - x) where t ≠ 1

    Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", 2006.
    """
    input, target = broadcast(*autocast_inputs(Loss, (input, target)))
    negative = WhereFunction.apply(target != 1, _hinge(torch.full_like(input, margin) - input))
    return reduce_losses(negative + WhereFunction.apply(target != -1, input), reduction)


def _hinge(input: Tensor) -> Tensor:
    return ClampMinFunction.apply(input, 0)


@implements(torch.minimum)
def minimum(a: Tensor, b: Tensor) -> Tensor:
    return MinimumFunction.apply(*broadcast(a, b))


@implements(torch.margin_ranking_loss)
def margin_ranking_loss(input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: int) -> Tensor:
    """max(0, m - t (x₁ - x₂))"""
    difference = DifferenceFunction.apply(*broadcast(input1, input2))
    return reduce_losses(_hinge(-target * difference + margin), reduction)


@implements(torch.triplet_margin_loss)
def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    p: float,
    eps: float,
    swap: bool,
    reduction: int,
) -> Tensor:
    """max(0, m + ‖a - p‖ - ‖a - n‖), with ``swap`` max(0, m + ‖a - p‖ - min(‖a - n‖, ‖p - n‖))

    Schroff, Kalenichenko and Philbin, "FaceNet", 2015. Balntas, Riba, Ponsa and Mikolajczyk, "Learning local
    feature descriptors with triplets and shallow convolutional neural networks", 2016.
    """
    if not isinstance(swap, bool):
        raise TypeError(f"swap must be a bool, got {swap!r}")
    if not anchor.dim() == positive.dim() == negative.dim():  # raises what torch raises
        return torch.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, reduction)
    anchor, positive, negative = autocast_inputs(Loss, (anchor, positive, negative))
    near, far = pairwise_distance(anchor, positive, p, eps), pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = minimum(far, pairwise_distance(positive, negative, p, eps))
    return reduce_losses(_hinge(margin + near - far), reduction)


def _signs(t: TensorFactory, *shape: int) -> Tensor:
    """±1 at random, without a gradient."""
    return t.no_grad(*shape).sign_()


register(
    "soft_margin_loss",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), _signs(t, 5, 3)),
        SampleInput(t(4, 3), _signs(t, 3), reduction="none"),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), _signs(t, 1024, 1024)),
)

register(
    "hinge_embedding_loss",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), _signs(t, 3), margin=0.4),
        SampleInput(t(5, 3), t.index(3, 5, 3) - 1, reduction="none"),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), _signs(t, 1024, 1024)),
)

register(
    "margin_ranking_loss",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t(5, 3), t(5, 3), margin=0.3),
        SampleInput(t(5, 2), t(1, 2), _signs(t, 5, 2), reduction="none"),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), t(1024, 1024), _signs(t, 1024, 1024)),
)

_AT_INFINITY = {
    "special_values": "as in torch: the gradient of an infinite distance is nan, even if it is not in the loss"
}

register(
    "triplet_margin_loss",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t(5, 3), t(5, 3)),
        SampleInput(t(4, 3), t(1, 3), t(4, 3), p=3.0, eps=1e-3, swap=True, reduction="none"),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), t(1024, 1024), t(1024, 1024)),
    expected_failures=_AT_INFINITY,
)

register(
    "triplet_margin_with_distance_loss",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t(5, 3), t(5, 3)),
        SampleInput(t(4, 3), t(4, 3), t(4, 3), swap=True, margin=0.5, reduction="none"),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), t(1024, 1024), t(1024, 1024)),
    expected_failures=_AT_INFINITY,
)


class CosineFunction(Rule):
    r"""c = u·v / √(p q),   p = u·u + ε,  q = v·v + ε      (along the last axis)

    dc = (du·v + u·dv) / √(p q) - c (u·du / p + v·dv / q)
    ∂L/∂u = g / √(p q) v - g c / p u            ∂L/∂v = g / √(p q) u - g c / q v
    """

    autocast = FLOAT32

    def forward(u: Tensor, v: Tensor) -> Tensor:
        return _cosine(u, v, _square_norm(u), _square_norm(v)).squeeze(-1)

    def p(u: Tensor) -> Tensor:
        return _square_norm(u)

    def q(v: Tensor) -> Tensor:
        return _square_norm(v)

    def c(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return _cosine(u, v, p, q)

    def g(grad: Tensor) -> Tensor:
        return grad.unsqueeze(-1)

    def grad_u(g: Tensor, c: Tensor, u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return g / (p * q).sqrt() * v - g * c / p * u

    def grad_v(g: Tensor, c: Tensor, u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return g / (p * q).sqrt() * u - g * c / q * v


def _square_norm(x: Tensor) -> Tensor:
    return (x * x).sum(-1, keepdim=True) + 1e-12


def _cosine(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return (u * v).sum(-1, keepdim=True) / (p * q).sqrt()


@implements(torch.cosine_embedding_loss)
def cosine_embedding_loss(input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: int) -> Tensor:
    """1 - c where t = 1,  max(0, c - m) where t = -1"""
    if target.dim() > 1 or not input1.dim() == input2.dim() == target.dim() + 1:  # raises what torch raises
        return torch.cosine_embedding_loss(input1, input2, target, margin, reduction)
    cosine, target = broadcast(CosineFunction.apply(*broadcast(input1, input2)), target)
    positive = WhereFunction.apply(target == 1, 1 - cosine)
    return reduce_losses(positive + WhereFunction.apply(target == -1, _hinge(cosine - margin)), reduction)


register(
    "cosine_embedding_loss",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t(5, 3), _signs(t, 5)),
        SampleInput(t(5, 3), t(1, 3), t.index(3, 5) - 1, margin=-0.3, reduction="none"),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), t(1024, 1024), _signs(t, 1024)),
)


class MultiMarginLossFunction(Loss):
    r"""ℓ = (w[t] / C) Σ_{c≠t} max(0, z_c)^p,   z_c = m - x[t] + x_c      p: 1 or 2

    ∂L/∂x_c = h (w[t] / C) p z_c^(p-1)  where z_c > 0          ∂L/∂x[t] = -Σ_{c≠t} ∂L/∂x_c

    Weston and Watkins, "Support vector machines for multi-class pattern recognition", 1999.
    """

    def forward(
        input: Tensor, target: Tensor, p: int, margin: float, weight: Tensor | None, reduction: int
    ) -> Tensor:
        return _nn.multi_margin_loss(input, target, p, margin, weight, reduction)

    def index(input: Tensor, target: Tensor) -> Tensor:
        """t, with the axis of classes"""
        return target.reshape(*input.shape[:-1], 1)

    def factor(h: Tensor, index: Tensor, input: Tensor, weight: Tensor | None) -> Tensor:
        """h w[t] / C"""
        h = (h.reshape(index.shape) if h.dim() else h) / max(input.shape[-1], 1)
        return h if weight is None else h * weight[index]

    def grad_input(factor: Tensor, index: Tensor, input: Tensor, p: int, margin: float) -> Tensor:
        z = margin - input.gather(-1, index) + input
        is_other = torch.ones_like(z, dtype=torch.bool).scatter(-1, index, False)
        derivative = 2 * z if p == 2 else torch.ones_like(z)  # p z^(p-1)
        grad_others = torch.where(is_other & (z > 0), factor * derivative, 0)
        return grad_others.scatter_add(-1, index, -grad_others.sum(-1, keepdim=True))


@implements(_nn.multi_margin_loss)
def multi_margin_loss(
    input: Tensor, target: Tensor, p: int, margin: float, weight: Tensor | None, reduction: int
) -> Tensor:
    if input.dim() == 0:  # a single class
        input, target = input.reshape(1), target.reshape(1)
    return MultiMarginLossFunction.apply(input, target, p, margin, weight, reduction)


class MultiLabelMarginLossFunction(Rule):
    r"""ℓ = (1/C) Σ_j Σ_c max(0, 1 - x[t_j] + x_c)      t_j: the labels before the first -1   c: the other classes

    L = the ℓ of all rows, their sum or mean      h = ∂L/∂ℓ = g, for the mean g / number of rows
    a_jc = 1 where 1 - x[t_j] + x_c > 0, else 0:      ∂L/∂x_c = h/C Σ_j a_jc        ∂L/∂x[t_j] = -h/C Σ_c a_jc
    """

    autocast = FLOAT32

    def forward(input: Tensor, target: Tensor, reduction: int) -> Tensor:
        return _nn.multilabel_margin_loss(input, target, reduction)

    def h(grad: Tensor, input: Tensor, reduction: int) -> Tensor:
        if reduction == NONE:
            return grad.unsqueeze(-1)
        return grad / max(input.shape[:-1].numel(), 1) if reduction == MEAN else grad

    def grad_input(h: Tensor, input: Tensor, target: Tensor) -> Tensor:
        return multilabel_margin_gradient(h, input, target)


def multilabel_margin_gradient(h: Tensor, input: Tensor, target: Tensor) -> Tensor:
    is_label = (target < 0).cumsum(-1) == 0
    return h / max(input.shape[-1], 1) * _signed_counts(input, target * is_label, is_label)


@replaces(multilabel_margin_gradient)
def _multilabel_margin_gradient_of_longest_row(h: Tensor, input: Tensor, target: Tensor) -> Tensor:
    """The same without the last columns, in which no row has a label, so that there are fewer pairs (j, c)."""
    longest = int(((target < 0).cumsum(-1) == 0).sum(-1).max()) if target.numel() else 0
    return with_reuse(multilabel_margin_gradient)(h, input, target[..., :longest])


def _signed_counts(input: Tensor, label: Tensor, is_label: Tensor) -> Tensor:
    """Σ_j a_jc for each class c that is no label, and -Σ_c a_jc for each label t_j"""
    is_other = torch.zeros_like(input, dtype=torch.long).scatter_add(-1, label, is_label.long()) == 0
    within_margin = 1 - input.gather(-1, label).unsqueeze(-1) + input.unsqueeze(-2) > 0
    a = within_margin & is_label.unsqueeze(-1) & is_other.unsqueeze(-2)
    return a.sum(-2).scatter_add(-1, label, -a.sum(-1))


@implements(_nn.multilabel_margin_loss)
def multilabel_margin_loss(input: Tensor, target: Tensor, reduction: int) -> Tensor:
    if input.dim() == 0:  # a single class
        input, target = input.reshape(1), target.reshape(1)
    return MultiLabelMarginLossFunction.apply(input, target, reduction)


register(
    "multi_margin_loss",
    sample_inputs=lambda t: [
        SampleInput(t(5, 4), t.index(4, 5)),
        SampleInput(t(5, 4), t.index(4, 5), 2, 0.7, t.no_grad(4, low=0.5, high=2), reduction="none"),
    ],
    benchmark_input=lambda t: SampleInput(t(8192, 100), t.index(100, 8192)),
)

register(
    "multilabel_margin_loss",
    sample_inputs=lambda t: [
        SampleInput(
            t(3, 4), torch.tensor([[1, 2, -1, 3], [0, 0, 1, -1], [-1, 1, 2, 0]]).to(t.device), reduction="none"
        ),
        SampleInput(t(4), torch.tensor([3, 0, -1, 1]).to(t.device)),
    ],
    benchmark_input=lambda t: SampleInput(
        t(256, 80), t.index(80, 256, 80).where(torch.arange(80, device=t.device) < 5, -1)
    ),
    expected_failures=dict.fromkeys(
        ("compile", "compile_dynamic") if COMPILED_MULTILABEL_MARGIN_IS_WRONG else (),
        "torch.compile replaces torch's forward by its own, which is wrong before torch 2.14",
    ),
)
