"""Classification losses. The target of a row is a class index, or a probability per class."""

from __future__ import annotations

import torch
from torch import Tensor

from manualgrad.ops.loss import MEAN, NONE, _nn
from manualgrad.ops.registration import implements
from manualgrad.ops.softmax import log_softmax
from manualgrad.registry import SampleInput, register
from manualgrad.rule import FLOAT32, Rule, autocast_inputs, replaces, with_reuse


class ClassLoss(Rule):
    r"""L = reduction of wᵢ ℓᵢ      i: a row   t: its class index   wᵢ = w[t], 0 where t is ignored

    reduction            "none": Lᵢ = wᵢ ℓᵢ     "sum": L = Σ wᵢ ℓᵢ     "mean": L = Σ wᵢ ℓᵢ / Σ wᵢ
    γᵢ = ∂L/∂(wᵢ ℓᵢ)           gᵢ                    g                      g / Σ wᵢ           (0 where ignored)
    """

    autocast = FLOAT32

    def axis(input: Tensor) -> int:
        """The class axis."""
        return min(input.dim() - 1, 1)

    def valid(target: Tensor, ignore_index: int) -> Tensor:
        return target != ignore_index

    def t(target: Tensor, valid: Tensor) -> Tensor:
        return target * valid  # an ignored index may be out of range

    def w(input: Tensor, weight: Tensor | None, t: Tensor, valid: Tensor) -> Tensor:
        return weight_of(t, valid, weight, input)

    def gamma(grad: Tensor, w: Tensor, valid: Tensor, reduction: int) -> Tensor:
        return torch.where(valid, grad / w.sum() if reduction == MEAN else grad, 0)


def weight_of(t: Tensor, valid: Tensor, weight: Tensor | None, like: Tensor) -> Tensor:
    """w[t], 0 where ignored, in the dtype of `like`."""
    # not weight[t]: for a single t that is integer indexing, which torch.compile does not support
    return valid.to(like.dtype) if weight is None else torch.where(valid, weight.take(t).to(like.dtype), 0)


@implements(_nn.nll_loss_nd)
class NLLLossFunction(ClassLoss):
    r"""ℓ = -x[t]        x: (N, C, ...), log-probabilities   t: (N, ...)      ∂L/∂x[t] = -γ w,  others 0"""

    def forward(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> Tensor:
        return _nn.nll_loss_nd(input, target, weight, reduction, ignore_index)

    def grad_input(input: Tensor, t: Tensor, gamma: Tensor, w: Tensor, axis: int) -> Tensor:
        return torch.zeros_like(input).scatter_add(axis, t.unsqueeze(axis), (-gamma * w).unsqueeze(axis))


class CrossEntropyLossFunction(ClassLoss):
    r"""w[t] ℓ = -Σ_c q_c log p_c,    p = softmax x,   q = (1-ε) w[t] 1_t + (ε/C) w

    ε: label smoothing   1_t: one-hot
    log p_c = x_c - log Σ e^x,   d log p = dx - ⟨p, dx⟩:      ∂L/∂x = γ (p Σq - q),   Σq = (1-ε) w[t] + ε mean w

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

    def p(input: Tensor, valid: Tensor, axis: int) -> Tensor:
        return softmax_of_valid(input, valid.unsqueeze(axis), axis)

    def q_t(w: Tensor, label_smoothing: float) -> Tensor:
        """(1-ε) w[t], the part of q at the class t"""
        return w * (1 - label_smoothing) if label_smoothing else w

    def smoothing(input: Tensor, weight: Tensor | None, label_smoothing: float, axis: int) -> Tensor | float:
        """(ε/C) w, the part of q at every class"""
        share = label_smoothing / max(input.shape[axis], 1)
        return share if weight is None else share * _along(weight, input)

    def sum_q(q_t: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
        return q_t + label_smoothing * (1 if weight is None else weight.mean()) if label_smoothing else q_t

    def grad_input(
        p: Tensor,
        sum_q: Tensor,
        q_t: Tensor,
        smoothing: Tensor | float,
        gamma: Tensor,
        t: Tensor,
        axis: int,
        label_smoothing: float,
    ) -> Tensor:
        from_p = p * (gamma * sum_q).unsqueeze(axis)
        grad_input = from_p.scatter_add(axis, t.unsqueeze(axis), (-gamma * q_t).unsqueeze(axis))
        return grad_input - gamma.unsqueeze(axis) * smoothing if label_smoothing else grad_input


def softmax_of_valid(x: Tensor, valid: Tensor, axis: int) -> Tensor:
    """softmax x, with x = 0 in ignored rows. Otherwise γ p = 0 · nan there if x is infinite."""
    return torch.softmax(torch.where(valid, x, 0), axis)


@replaces(softmax_of_valid)
def _softmax_if_all_valid(x: Tensor, valid: Tensor, axis: int) -> Tensor:
    """Without `where` if all rows are valid. On the CPU this test needs no synchronization."""
    return torch.softmax(x, axis) if x.is_cpu and valid.all() else with_reuse(softmax_of_valid)(x, valid, axis)


def _along(weight: Tensor, input: Tensor) -> Tensor:
    """The class weights in a shape that broadcasts with the input."""
    return weight.reshape(-1, *[1] * (input.dim() - 2))


@implements(_nn.cross_entropy_loss)
def cross_entropy_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> Tensor:
    """-Σ_c q_c log p_c: one rule for class indices, a composition for class probabilities, as in torch."""
    is_probability = target.shape == input.shape and target.is_floating_point()
    if not is_probability or ignore_index >= 0:  # torch raises an error for probabilities with an ignored index
        return CrossEntropyLossFunction.apply(input, target, weight, reduction, ignore_index, label_smoothing)
    input, target, weight = autocast_inputs(ClassLoss, (input, target, weight))
    axis = ClassLoss.axis(input)  # pyright: ignore[reportAttributeAccessIssue]
    classes = input.shape[axis]
    if label_smoothing > 0:
        target = target * (1 - label_smoothing) + label_smoothing / classes
    losses = log_softmax(input, axis) * target
    if weight is not None:
        if weight.shape != (classes,):
            raise ValueError(f"weight must have shape ({classes},), one per class, but has {tuple(weight.shape)}")
        losses = losses * _along(weight, input)
    if reduction == NONE:
        return -losses.sum(axis)
    return -losses.sum() / (input.numel() // max(classes, 1)) if reduction == MEAN else -losses.sum()


register(
    "nll_loss",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t.index(3, 5)),
        SampleInput(t(5, 3), t.index(3, 5), t.no_grad(3, low=0.5, high=2), ignore_index=1),
        SampleInput(t(2, 3, 4), t.index(3, 2, 4), ignore_index=0, reduction="none"),
    ],
    benchmark_input=lambda t: SampleInput(t(512, 8192), t.index(8192, 512)),
)

register(
    "cross_entropy",
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), t.index(3, 5)),
        SampleInput(t(5, 3), t.index(3, 5), t.no_grad(3, low=0.5, high=2), ignore_index=1, label_smoothing=0.1),
        SampleInput(t(2, 3, 2), t.index(3, 2, 2), label_smoothing=0.2, reduction="none"),
        SampleInput(t(2, 3, 2), t(2, 3, 2).softmax(1), t(3, low=0.5, high=2), label_smoothing=0.1),
    ],
    benchmark_input=lambda t: SampleInput(t(512, 8192), t.index(8192, 512)),
)
