"""Losses with a margin: nothing more is to be won once the right side is ahead by it."""

from __future__ import annotations

import torch
from torch import Tensor

from manualgrad.ops.distance import pairwise_distance
from manualgrad.ops.elementary import DifferenceFunction, added, broadcast, choose, stands_for, times
from manualgrad.ops.loss import MEAN, NONE, Loss, _nn, reduced
from manualgrad.registry import Call, Maker, register
from manualgrad.rule import FLOAT32, Rule, cast, nothing_looks_on
from manualgrad.torch_versions import CLAMP_PASSES_AT_ITS_BOUND, COMPILED_MULTILABEL_MARGIN_IS_WRONG


class SoftMarginLossFunction(Loss):
    r"""ℓ = log(1 + e^(-tx))      t = ±1      ∂ℓ/∂x = -t σ(-tx)"""

    def forward(input: Tensor, target: Tensor, reduction: int) -> Tensor:
        return _nn.soft_margin_loss(input, target, reduction)

    def grad_input(sent: Tensor, input: Tensor, target: Tensor) -> Tensor:
        return times(times(torch.sigmoid(-target * input), -target), sent)


@stands_for(_nn.soft_margin_loss)
def soft_margin_loss(input: Tensor, target: Tensor, reduction: int) -> Tensor:
    return SoftMarginLossFunction.apply(input, target.expand_as(input), reduction)


@stands_for(torch.clamp_min)
class ClampMinFunction(Rule):
    r"""y = max(x, low)      ∂L/∂x = g where x > low, else 0      (at x = low as the installed torch)"""

    def forward(input: Tensor, low: float) -> Tensor:
        return torch.clamp_min(input, low)

    def grad_input(grad: Tensor, input: Tensor, low: float) -> Tensor:
        return choose(input >= low if CLAMP_PASSES_AT_ITS_BOUND else input > low, grad)


class MinimumFunction(Rule):
    r"""y = min(a, b)      ∂L/∂a = g where a < b, ½ g where a = b, else 0;   ∂L/∂b the same the other way round"""

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.minimum(a, b)

    def half(grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return choose(a == b, grad * 0.5, grad)

    def grad_a(half: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return choose(a <= b, half)

    def grad_b(half: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return choose(b <= a, half)


@stands_for(torch.hinge_embedding_loss)
def hinge_embedding_loss(input: Tensor, target: Tensor, margin: float, reduction: int) -> Tensor:
    """x where t ≠ -1, and max(0, m - x) where t ≠ 1

    Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", 2006.
    """
    input, target = broadcast(*cast(Loss, (input, target)))
    return reduced(
        choose(target != 1, _hinge(torch.full_like(input, margin) - input)) + choose(target != -1, input),
        reduction,
    )


def _hinge(input: Tensor) -> Tensor:
    return ClampMinFunction.apply(input, 0)


@stands_for(torch.minimum)
def minimum(a: Tensor, b: Tensor) -> Tensor:
    return MinimumFunction.apply(*broadcast(a, b))


@stands_for(torch.margin_ranking_loss)
def margin_ranking_loss(input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: int) -> Tensor:
    """max(0, m - t (x₁ - x₂))"""
    difference = DifferenceFunction.apply(*broadcast(input1, input2))
    return reduced(_hinge(-target * difference + margin), reduction)


@stands_for(torch.triplet_margin_loss)
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
    """max(0, m + ‖a - p‖ - ‖a - n‖); with `swap` n is as far as it is from the nearer of a and p.

    Schroff, Kalenichenko and Philbin, "FaceNet", 2015. Balntas, Riba, Ponsa and Mikolajczyk, "Learning local
    feature descriptors with triplets and shallow convolutional neural networks", 2016.
    """
    if not isinstance(swap, bool):
        raise TypeError(f"swap must be a bool, but is {swap!r}")
    if not anchor.dim() == positive.dim() == negative.dim():  # raises what torch raises
        return torch.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, reduction)
    anchor, positive, negative = cast(Loss, (anchor, positive, negative))
    near, far = pairwise_distance(anchor, positive, p, eps), pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = minimum(far, pairwise_distance(positive, negative, p, eps))
    return reduced(_hinge(margin + near - far), reduction)


def _signs(t: Maker, *shape: int) -> Tensor:
    """Fixed numbers of ±1."""
    return t.fixed(*shape).sign_()


register(
    "soft_margin_loss",
    samples=lambda t: [
        Call(t(5, 3), _signs(t, 5, 3)),
        Call(t(4, 3), _signs(t, 3), reduction="none"),
    ],
    big=lambda t: Call(t(1024, 1024), _signs(t, 1024, 1024)),
)

register(
    "hinge_embedding_loss",
    samples=lambda t: [
        Call(t(5, 3), _signs(t, 3), margin=0.4),
        Call(t(5, 3), t.index(3, 5, 3) - 1, reduction="none"),
    ],
    big=lambda t: Call(t(1024, 1024), _signs(t, 1024, 1024)),
)

register(
    "margin_ranking_loss",
    samples=lambda t: [
        Call(t(5, 3), t(5, 3), t(5, 3), margin=0.3),
        Call(t(5, 2), t(1, 2), _signs(t, 5, 2), reduction="none"),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024), _signs(t, 1024, 1024)),
)

_AT_INFINITY = {
    "special_values": "as torch: an infinite distance has no slope, though none of it counts in the loss"
}

register(
    "triplet_margin_loss",
    samples=lambda t: [
        Call(t(5, 3), t(5, 3), t(5, 3)),
        Call(t(4, 3), t(1, 3), t(4, 3), p=3.0, eps=1e-3, swap=True, reduction="none"),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024), t(1024, 1024)),
    lacks=_AT_INFINITY,
)

register(
    "triplet_margin_with_distance_loss",
    samples=lambda t: [
        Call(t(5, 3), t(5, 3), t(5, 3)),
        Call(t(4, 3), t(4, 3), t(4, 3), swap=True, margin=0.5, reduction="none"),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024), t(1024, 1024)),
    lacks=_AT_INFINITY,
)


class CosineFunction(Rule):
    r"""c = u·v / √(p q),   p = u·u + ε,  q = v·v + ε      (along the last axis)

    dc = (du·v + u·dv) / √(p q) - c (u·du / p + v·dv / q)
    ∂L/∂u = g (v / √(p q) - c u / p)            ∂L/∂v = g (u / √(p q) - c v / q)
    """

    autocast = FLOAT32

    def forward(u: Tensor, v: Tensor) -> Tensor:
        p, q = _square(u), _square(v)
        return (u * v).sum(-1) / (p * q).sqrt_()

    def p(u: Tensor) -> Tensor:
        return _square(u)

    def q(v: Tensor) -> Tensor:
        return _square(v)

    def across(grad: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return (grad / (p * q).sqrt()).unsqueeze(-1)

    def along(grad: Tensor, u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return grad * (u * v).sum(-1) / (p * q).sqrt()

    def grad_u(across: Tensor, along: Tensor, u: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return across * v - (along / p).unsqueeze(-1) * u

    def grad_v(across: Tensor, along: Tensor, u: Tensor, v: Tensor, q: Tensor) -> Tensor:
        return across * u - (along / q).unsqueeze(-1) * v


def _square(tensor: Tensor) -> Tensor:
    return (tensor * tensor).sum(-1) + 1e-12


@stands_for(torch.cosine_embedding_loss)
def cosine_embedding_loss(input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: int) -> Tensor:
    """1 - c where t = 1,  max(0, c - m) where t = -1"""
    rows = target.dim()
    if rows > 1 or not input1.dim() == input2.dim() == rows + 1:  # raises what torch raises
        return torch.cosine_embedding_loss(input1, input2, target, margin, reduction)
    cosine, target = broadcast(CosineFunction.apply(*broadcast(input1, input2)), target)
    return reduced(choose(target == 1, 1 - cosine) + choose(target == -1, _hinge(cosine - margin)), reduction)


register(
    "cosine_embedding_loss",
    samples=lambda t: [
        Call(t(5, 3), t(5, 3), _signs(t, 5)),
        Call(t(5, 3), t(1, 3), t.index(3, 5) - 1, margin=-0.3, reduction="none"),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024), _signs(t, 1024)),
)


class MultiMarginLossFunction(Loss):
    r"""ℓ = (w[t] / C) Σ_{c≠t} h_c^p,   h_c = max(0, m - x[t] + x_c)      p: 1 or 2

    ∂ℓ/∂x_c = (w[t] / C) p h_c^(p-1)  where h_c > 0          ∂ℓ/∂x[t] = -Σ_{c≠t} ∂ℓ/∂x_c

    Weston and Watkins, "Support vector machines for multi-class pattern recognition", 1999.
    """

    def forward(
        input: Tensor, target: Tensor, p: int, margin: float, weight: Tensor | None, reduction: int
    ) -> Tensor:
        return _nn.multi_margin_loss(input, target, p, margin, weight, reduction)

    def place(input: Tensor, target: Tensor) -> Tensor:
        return target.reshape(*input.shape[:-1], 1)

    def grad_input(
        sent: Tensor, input: Tensor, place: Tensor, p: int, margin: float, weight: Tensor | None
    ) -> Tensor:
        sent = (sent.reshape(place.shape) if sent.dim() else sent) / max(input.shape[-1], 1)
        if weight is not None:
            sent = sent * weight[place]
        above = margin - input.gather(-1, place) + input
        others = torch.ones_like(above, dtype=torch.bool).scatter(-1, place, False)
        slope = choose(others & (above > 0), 2 * above * sent if p == 2 else sent.expand_as(above).contiguous())
        return added(slope, -1, place, -slope.sum(-1, keepdim=True))


@stands_for(_nn.multi_margin_loss)
def multi_margin_loss(
    input: Tensor, target: Tensor, p: int, margin: float, weight: Tensor | None, reduction: int
) -> Tensor:
    if input.dim() == 0:  # a single class
        input, target = input.reshape(1), target.reshape(1)
    return MultiMarginLossFunction.apply(input, target, p, margin, weight, reduction)


class MultiLabelMarginLossFunction(Rule):
    r"""ℓ = (1/C) Σ_j Σ_c max(0, 1 - x[t_j] + x_c)      t_j: the labels, up to the first -1   c: no label

    a_jc = 1 where 1 - x[t_j] + x_c > 0:      ∂ℓ/∂x_c = (1/C) Σ_j a_jc,      ∂ℓ/∂x[t_j] = -(1/C) Σ_c a_jc
    """

    autocast = FLOAT32

    def forward(input: Tensor, target: Tensor, reduction: int) -> Tensor:
        return _nn.multilabel_margin_loss(input, target, reduction)

    def grad_input(grad: Tensor, input: Tensor, target: Tensor, reduction: int) -> Tensor:
        labelled = (target < 0).cumsum(-1) == 0
        place = target * labelled
        label = torch.zeros_like(target).scatter_add(-1, place, labelled.long()) > 0
        if nothing_looks_on(input, target):  # no row has more labels than the longest
            most = int(labelled.sum(-1).max()) if labelled.numel() else 0
            place, labelled = place[..., :most], labelled[..., :most]
        ahead = 1 - input.gather(-1, place).unsqueeze(-1) + input.unsqueeze(-2)
        active = (ahead > 0) & labelled.unsqueeze(-1) & label.logical_not().unsqueeze(-2)
        count = active.sum(-2).scatter_add(-1, place, -active.sum(-1))
        rows = input.shape[:-1].numel() if reduction == MEAN else 1
        sent = grad.unsqueeze(-1) if reduction == NONE else grad
        return sent / max(rows * input.shape[-1], 1) * count


@stands_for(_nn.multilabel_margin_loss)
def multilabel_margin_loss(input: Tensor, target: Tensor, reduction: int) -> Tensor:
    if input.dim() == 0:  # a single class
        input, target = input.reshape(1), target.reshape(1)
    return MultiLabelMarginLossFunction.apply(input, target, reduction)


register(
    "multi_margin_loss",
    samples=lambda t: [
        Call(t(5, 4), t.index(4, 5)),
        Call(t(5, 4), t.index(4, 5), 2, 0.7, t.fixed(4, low=0.5, high=2), reduction="none"),
    ],
    big=lambda t: Call(t(8192, 100), t.index(100, 8192)),
)

register(
    "multilabel_margin_loss",
    samples=lambda t: [
        Call(t(3, 4), torch.tensor([[1, 2, -1, 3], [0, 0, 1, -1], [-1, 1, 2, 0]]).to(t.device), reduction="none"),
        Call(t(4), torch.tensor([3, 0, -1, 1]).to(t.device)),
    ],
    big=lambda t: Call(t(256, 80), t.index(80, 256, 80).where(torch.arange(80, device=t.device) < 5, -1)),
    lacks=dict.fromkeys(
        ("compile", "compile_dynamic") if COMPILED_MULTILABEL_MARGIN_IS_WRONG else (),
        "torch.compile puts another forward in place of torch's, and before torch 2.14 a wrong one",
    ),
)
