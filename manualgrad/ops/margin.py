"""Losses with a margin: nothing more is to be won once the right side is ahead by it."""

from __future__ import annotations

from collections.abc import Callable

import torch
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
)
from manualgrad.ops.loss import REDUCTIONS, named
from manualgrad.registry import Call, Maker, register
from manualgrad.rule import FLOAT32, Rule

# torch's functions without the checks that have been made
_soft_margin_loss = torch._C._nn.soft_margin_loss  # pyright: ignore[reportAttributeAccessIssue]
_multi_margin_loss = torch._C._nn.multi_margin_loss  # pyright: ignore[reportAttributeAccessIssue]
_multilabel_margin_loss = torch._C._nn.multilabel_margin_loss  # pyright: ignore[reportAttributeAccessIssue]


class SoftMarginLossFunction(PointwiseLoss):
    r"""ℓ = log(1 + e^(-tx))      t = ±1      ∂ℓ/∂x = -t σ(-tx)"""

    autocast = FLOAT32

    def forward(input: Tensor, target: Tensor, reduction: str) -> Tensor:
        return _soft_margin_loss(input, target, _reduction.get_enum(reduction))

    def slope(input: Tensor, target: Tensor) -> Tensor:
        return -target * torch.sigmoid(-target * input)


@drop_in
def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """log(1 + e^(-tx)), reduced, as `torch.nn.functional.soft_margin_loss`. Target, of ±1, broadcasts to input.

    Raises:
        ValueError: an unknown reduction.
    """
    return SoftMarginLossFunction.apply(input, target.expand_as(input), named(reduction, size_average, reduce))


class HingeEmbeddingLossFunction(PointwiseLoss):
    r"""ℓ = x where similar + max(0, m - x) where dissimilar

    ∂ℓ/∂x = 1 where similar - 1 where dissimilar and x ≤ m
    """

    autocast = FLOAT32

    def forward(input: Tensor, similar: Tensor, dissimilar: Tensor, margin: float, reduction: str) -> Tensor:
        zero = torch.zeros_like(input)
        apart = torch.where(dissimilar, (torch.full_like(input, margin) - input).clamp_min_(0), zero)
        return reduced(apart + torch.where(similar, input, zero), reduction)

    def grad_input(
        grad: Tensor, input: Tensor, similar: Tensor, dissimilar: Tensor, margin: float, scale: float
    ) -> Tensor:
        sent = scaled(grad, scale).expand_as(input).contiguous()
        return choose(similar, sent) - choose(dissimilar & (input <= margin), sent)


@drop_in
def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """x where t = 1, max(0, m - x) where t = -1, reduced, as `torch.nn.functional.hinge_embedding_loss`.

    Input and target broadcast; an element whose target is neither has both terms.

    Raises:
        ValueError: an unknown reduction.
    """
    reduction = named(reduction, size_average, reduce)
    input, target = broadcast(input, target)
    return HingeEmbeddingLossFunction.apply(input, target != -1, target != 1, margin, reduction)


class MarginRankingLossFunction(PointwiseLoss):
    r"""ℓ = max(0, m - t d)      d = x₁ - x₂,  t = ±1

    ∂ℓ/∂d = -t,  ∂ℓ/∂t = -d,  where t d ≤ m
    """

    def forward(input: Tensor, target: Tensor, margin: float, reduction: str) -> Tensor:
        return reduced((-target * input + margin).clamp_min_(0), reduction)

    def sent(grad: Tensor, input: Tensor, target: Tensor, margin: float, scale: float) -> Tensor:
        return choose(margin - target * input >= 0, scaled(grad, scale).expand_as(input).contiguous())

    def grad_input(sent: Tensor, target: Tensor) -> Tensor:
        return -target * sent

    def grad_target(sent: Tensor, input: Tensor) -> Tensor:
        return -input * sent


@drop_in
def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """max(0, m - t (x₁ - x₂)), reduced, as `torch.nn.functional.margin_ranking_loss`. All three broadcast.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: not all have the same number of axes.
    """
    reduction = named(reduction, size_average, reduce)
    if not input1.dim() == input2.dim() == target.dim():
        raise RuntimeError(
            "margin_ranking_loss : All input tensors should have same dimension but got sizes: "
            f"input1: {input1.size()}, input2: {input2.size()}, target: {target.size()} "
        )
    difference = DifferenceFunction.apply(*broadcast(input1, input2))
    return MarginRankingLossFunction.apply(*broadcast(difference, target), margin, reduction)


def _signs(t: Maker, *shape: int) -> Tensor:
    """Fixed numbers of ±1."""
    return t.fixed(*shape).sign_()


register(
    soft_margin_loss,
    samples=lambda t: [
        Call(t(5, 3), _signs(t, 5, 3)),
        Call(t(5, 3), _signs(t, 3), reduction="sum"),
        Call(t(5, 3), _signs(t, 5, 3), reduction="none"),
    ],
    big=lambda t: Call(t(1024, 1024), _signs(t, 1024, 1024)),
)

register(
    hinge_embedding_loss,
    samples=lambda t: [
        Call(t(5, 3), _signs(t, 5, 3)),
        Call(t(5, 3), _signs(t, 3), margin=0.4, reduction="sum"),
        Call(t(5, 3), t.index(3, 5, 3) - 1, reduction="none"),
    ],
    big=lambda t: Call(t(1024, 1024), _signs(t, 1024, 1024)),
)

register(
    margin_ranking_loss,
    samples=lambda t: [
        Call(t(5, 3), t(5, 3), t(5, 3), margin=0.3),
        Call(t(5, 3), t(1, 3), _signs(t, 5, 3), reduction="sum"),
        Call(t(5), t(5), _signs(t, 5), 0.5, reduction="none"),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024), _signs(t, 1024, 1024)),
)


class CosineEmbeddingLossFunction(Rule):
    r"""ℓ = 1 - c where t = 1,  max(0, c - m) where t = -1,   c = u·v / √(p q),   p = u·u + ε,  q = v·v + ε

    dc = (du·v + u·dv) / √(p q) - c (u·du / p + v·dv / q)
    ∂c/∂u = v / √(p q) - c u / p            ∂c/∂v = u / √(p q) - c v / q
    ∂ℓ/∂c = -1 where t = 1,  1 where t = -1 and c ≥ m,  else 0
    """

    autocast = FLOAT32

    def forward(input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: str) -> Tensor:
        return torch.cosine_embedding_loss(input1, input2, target, margin, _reduction.get_enum(reduction))

    def scale(target: Tensor, reduction: str) -> float:
        return mean_scale(target, reduction)

    def p(input1: Tensor) -> Tensor:
        return (input1 * input1).sum(-1) + 1e-12

    def q(input2: Tensor) -> Tensor:
        return (input2 * input2).sum(-1) + 1e-12

    def root(p: Tensor, q: Tensor) -> Tensor:
        return (p * q).sqrt()

    def cosine(input1: Tensor, input2: Tensor, root: Tensor) -> Tensor:
        return (input1 * input2).sum(-1) / root

    def sent(grad: Tensor, cosine: Tensor, target: Tensor, margin: float, scale: float) -> Tensor:
        each = scaled(grad, scale).expand_as(cosine).contiguous()
        return choose((target == -1) & (cosine >= margin), each) - choose(target == 1, each)

    def grad_input1(
        sent: Tensor, input1: Tensor, input2: Tensor, cosine: Tensor, root: Tensor, p: Tensor
    ) -> Tensor:
        return (sent / root).unsqueeze(-1) * input2 - (sent * cosine / p).unsqueeze(-1) * input1

    def grad_input2(
        sent: Tensor, input1: Tensor, input2: Tensor, cosine: Tensor, root: Tensor, q: Tensor
    ) -> Tensor:
        return (sent / root).unsqueeze(-1) * input1 - (sent * cosine / q).unsqueeze(-1) * input2


@drop_in
def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """1 - cos where t = 1, max(0, cos - m) where t = -1, as `torch.nn.functional.cosine_embedding_loss`.

    Shapes: inputs (N, d) or (d), which broadcast, target (N) or ().

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: inputs of other shapes.
    """
    reduction = named(reduction, size_average, reduce)
    rows = target.dim()
    if rows > 1 or not input1.dim() == input2.dim() == rows + 1:
        raise RuntimeError(f"{rows}D target tensor expects {rows + 1}D input tensors (and at most 1D targets)")
    input1, input2 = broadcast(input1, input2)
    if rows:
        target = target.expand(len(input1)) if len(target) == 1 else target
        input1, input2 = (x.expand(len(target), -1) for x in (input1, input2))
    return CosineEmbeddingLossFunction.apply(input1, input2, target.detach(), margin, reduction)


register(
    cosine_embedding_loss,
    samples=lambda t: [
        Call(t(5, 3), t(5, 3), _signs(t, 5)),
        Call(t(5, 3), t(1, 3), t.index(3, 5) - 1, margin=-0.3, reduction="none"),
        Call(t(3), t(3), _signs(t), reduction="sum"),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024), _signs(t, 1024)),
)


class DistanceFunction(Rule):
    r"""y = ‖z‖ = (Σ |z|^p)^(1/p),   z = d + ε      (along the last axis)

    dy = y^(1-p) Σ |z|^(p-1) sign z dz      ∂L/∂d = g sign z (|z| / y)^(p-1)      (at y = 0: 0)
    p = ∞: the sign where |z| is the largest, shared among equals
    """

    autocast = {"cuda": "float32"}
    complex = True

    def forward(input: Tensor, p: float, eps: float) -> Tensor:
        return torch.norm(input + eps, p, -1)

    def direction(input: Tensor, output: Tensor, p: float, eps: float) -> Tensor:
        z, y = input + eps, output.unsqueeze(-1)
        if p == float("inf"):
            largest = z.abs() == z.abs().amax(-1, keepdim=True)
            return choose(largest, z.sgn()) / largest.sum(-1, keepdim=True).clamp(min=1)
        if p == 0:
            return torch.zeros_like(z)
        y = choose(y == 0, torch.ones_like(y), y)
        if p == 2:
            return z / y
        return z.sgn() if p == 1 else z.sgn() * (z.abs() / y) ** (p - 1)

    def grad_input(grad: Tensor, direction: Tensor) -> Tensor:
        return grad.unsqueeze(-1) * direction


class SmallerFunction(Rule):
    r"""y = min(a, b)      ∂L/∂a = g where a < b, ½ g where a = b, else 0;   ∂L/∂b the same the other way round"""

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.minimum(a, b)

    def half(grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return choose(a == b, grad * 0.5, grad)

    def grad_a(half: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return choose(a <= b, half)

    def grad_b(half: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return choose(b <= a, half)


class TripletLossFunction(DifferenceLoss):
    r"""ℓ = max(0, m + d),   d = near - far: the distances of an anchor to its like and to its unlike

    ∂ℓ/∂d = 1 where d ≥ -m, else 0
    """

    def forward(input: Tensor, target: Tensor, margin: float, reduction: str) -> Tensor:
        return reduced(torch.clamp_min(margin + input - target, 0), reduction)

    def grad_input(grad: Tensor, input: Tensor, target: Tensor, margin: float, scale: float) -> Tensor:
        return choose(margin + input - target >= 0, scaled(grad, scale).expand_as(input).contiguous())


def _triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    distance: Callable[[Tensor, Tensor], Tensor],
    margin: float,
    swap: bool,
    reduction: str,
) -> Tensor:
    """The loss of the distances; with `swap` the unlike is as far as it is from the nearer of anchor and like.

    Balntas, Riba, Ponsa and Mikolajczyk, "Learning local feature descriptors with triplets and shallow
    convolutional neural networks", 2016.
    """
    if margin <= 0:
        raise ValueError(f"margin must be greater than 0, got {margin}")
    if not anchor.dim() == positive.dim() == negative.dim():
        raise RuntimeError(
            "The anchor, positive, and negative tensors are expected to have the same number of dimensions, "
            f"but got: anchor {anchor.dim()}D, positive {positive.dim()}D, and negative {negative.dim()}D inputs"
        )
    near, far = distance(anchor, positive), distance(anchor, negative)
    if swap:
        far = SmallerFunction.apply(*broadcast(far, distance(positive, negative)))
    return TripletLossFunction.apply(*broadcast(near, far), margin, reduction)


@drop_in
def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """max(0, m + ‖a - p‖ - ‖a - n‖), reduced, as `torch.nn.functional.triplet_margin_loss`.

    Shapes: (*, d), which broadcast; the norm of order `p`, along the last axis, of a difference plus ε.

    Raises:
        ValueError: an unknown reduction, a margin that is not positive.
        RuntimeError: not all have the same number of axes.
    """
    reduction = named(reduction, size_average, reduce)
    if not isinstance(swap, bool):
        raise TypeError(f"swap must be a bool, but is {swap!r}")

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return DistanceFunction.apply(DifferenceFunction.apply(*broadcast(a, b)), p, eps)

    return _triplet(anchor, positive, negative, distance, margin, swap, reduction)


def _euclidean(a: Tensor, b: Tensor) -> Tensor:
    return DistanceFunction.apply(PlainDifferenceFunction.apply(*broadcast(a, b)), 2.0, 1e-6)


@drop_in
def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """max(0, m + D(a, p) - D(a, n)), reduced, as `torch.nn.functional.triplet_margin_with_distance_loss`.

    D is any function of two tensors, differentiated as it is; the euclidean distance if none is given.

    Raises:
        ValueError: an unknown reduction, a margin that is not positive.
        RuntimeError: not all have the same number of axes.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return _triplet(anchor, positive, negative, distance_function or _euclidean, margin, swap, reduction)


register(
    triplet_margin_loss,
    samples=lambda t: [
        Call(t(5, 3), t(5, 3), t(5, 3)),
        Call(t(5, 3), t(1, 3), t(5, 3), p=3.0, eps=1e-3, swap=True, reduction="sum"),
        Call(t(2, 4, 3), t(2, 4, 3), t(2, 4, 3), p=1.0, margin=0.5, reduction="none"),
        Call(t(3), t(3), t(3), p=float("inf"), swap=True),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024), t(1024, 1024)),
)

register(
    triplet_margin_with_distance_loss,
    samples=lambda t: [
        Call(t(5, 3), t(5, 3), t(5, 3), swap=True, reduction="sum"),
        Call(t(5, 3), t(5, 3), t(5, 3), margin=0.5, reduction="none"),
        Call(t(3), t(3), t(3)),
    ],
    big=lambda t: Call(t(1024, 1024), t(1024, 1024), t(1024, 1024)),
)


class MultiMarginLossFunction(Rule):
    r"""ℓ = (w[t] / C) Σ_{c≠t} h_c^p,   h_c = max(0, m - x[t] + x_c)      p: 1 or 2

    ∂ℓ/∂x_c = (w[t] / C) p h_c^(p-1)  where h_c > 0          ∂ℓ/∂x[t] = -Σ_{c≠t} ∂ℓ/∂x_c
    """

    autocast = FLOAT32

    def forward(
        input: Tensor, target: Tensor, p: int, margin: float, weight: Tensor | None, reduction: str
    ) -> Tensor:
        return _multi_margin_loss(input, target, p, margin, weight, _reduction.get_enum(reduction))

    def place(input: Tensor, target: Tensor) -> Tensor:
        return target.reshape(*input.shape[:-1], 1)

    def grad_input(
        grad: Tensor,
        input: Tensor,
        place: Tensor,
        p: int,
        margin: float,
        weight: Tensor | None,
        reduction: str,
    ) -> Tensor:
        rows = max(place.numel(), 1) if reduction == "mean" else 1
        sent = grad.reshape(place.shape) if reduction == "none" else grad.expand_as(place)
        sent = sent / (rows * max(input.shape[-1], 1))
        if weight is not None:
            sent = sent * weight[place]
        above = margin - input.gather(-1, place) + input
        others = torch.ones_like(above, dtype=torch.bool).scatter(-1, place, False)
        slope = 2 * above * sent if p == 2 else sent.expand_as(above).contiguous()
        slope = choose(others & (above > 0), slope)
        return slope.scatter_add(-1, place, -slope.sum(-1, keepdim=True))


@drop_in
def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Σ max(0, m - x[t] + x_c)^p w[t] / C over c ≠ t, as `torch.nn.functional.multi_margin_loss`.

    Shapes: input (N, C) or (C), target (N) or () of class indices, weight (C).

    Raises:
        ValueError: an unknown reduction, p not 1 or 2, a weight that has not one axis.
        RuntimeError: an index that is no class, other shapes.
    """
    reduction = named(reduction, size_average, reduce)
    if p not in (1, 2):
        raise ValueError("only p == 1 and p == 2 supported")
    if weight is not None and weight.dim() != 1:
        raise ValueError("weight must be one-dimensional")
    if input.dim() == 0:  # a single class
        input, target = input.reshape(1), target.reshape(1)
    return MultiMarginLossFunction.apply(input, target, p, margin, weight, reduction)


class MultiLabelMarginLossFunction(Rule):
    r"""ℓ = (1/C) Σ_j Σ_c max(0, 1 - x[t_j] + x_c)      t_j: the labels, up to the first -1   c: no label

    a_jc = 1 where 1 - x[t_j] + x_c > 0:      ∂ℓ/∂x_c = (1/C) Σ_j a_jc,      ∂ℓ/∂x[t_j] = -(1/C) Σ_c a_jc
    """

    autocast = FLOAT32

    def forward(input: Tensor, target: Tensor, reduction: str) -> Tensor:
        return _multilabel_margin_loss(input, target, _reduction.get_enum(reduction))

    def grad_input(grad: Tensor, input: Tensor, target: Tensor, reduction: str) -> Tensor:
        labelled = (target < 0).cumsum(-1) == 0
        place = target * labelled
        label = torch.zeros_like(target).scatter_add(-1, place, labelled.long()) > 0
        ahead = 1 - input.gather(-1, place).unsqueeze(-1) + input.unsqueeze(-2)
        active = (ahead > 0) & labelled.unsqueeze(-1) & label.logical_not().unsqueeze(-2)
        count = active.sum(-2).scatter_add(-1, place, -active.sum(-1))
        rows = input.shape[:-1].numel() if reduction == "mean" else 1
        sent = grad.unsqueeze(-1) if reduction == "none" else grad
        return sent / max(rows * input.shape[-1], 1) * count


@drop_in
def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Σ max(0, 1 - x[label] + x_c) / C over labels and other classes, as
    `torch.nn.functional.multilabel_margin_loss`.

    Shapes: input and target (N, C) or (C); the target has the labels of each row, then -1.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: a label that is no class, other shapes.
    """
    reduction = named(reduction, size_average, reduce)
    if input.dim() == 0:  # a single class
        input, target = input.reshape(1), target.reshape(1)
    return MultiLabelMarginLossFunction.apply(input, target, reduction)


_IN_HALF = "torch has no forward for bfloat16 and float16 on the CPU"
_NOT_IN_HALF = {"low_precision": _IN_HALF, "low_precision_at_full_size": _IN_HALF}

register(
    multi_margin_loss,
    samples=lambda t: [
        Call(t(5, 4), t.index(4, 5)),
        Call(t(5, 4), t.index(4, 5), 2, 0.7, t.fixed(4, low=0.5, high=2), reduction="sum"),
        Call(t(5, 4), t.index(4, 5), weight=t.fixed(4, low=0.5, high=2), reduction="none"),
        Call(t(4), t.index(4), 2),
    ],
    big=lambda t: Call(t(8192, 100), t.index(100, 8192)),
    lacks=_NOT_IN_HALF,
)


register(
    multilabel_margin_loss,
    samples=lambda t: [
        Call(t(3, 4), torch.tensor([[1, 2, -1, 3], [0, 0, 1, -1], [3, 1, 2, 0]]).to(t.device)),
        Call(t(3, 4), torch.tensor([[1, -1, 0, 3], [-1, 0, 1, -1], [2, 1, -1, 0]]).to(t.device), reduction="none"),
        Call(t(4), torch.tensor([3, 0, -1, 1]).to(t.device), reduction="sum"),
    ],
    big=lambda t: Call(t(256, 80), t.index(80, 256, 80).where(torch.arange(80, device=t.device) < 5, -1)),
    lacks=_NOT_IN_HALF
    | {"compile": "torch.compile puts another forward in place of torch's, and in torch 2.13 a wrong one"},
)
