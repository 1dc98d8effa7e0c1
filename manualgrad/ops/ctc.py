"""Connectionist temporal classification: a loss over all alignments of labels with a longer input sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.loss import MEAN, NONE, reduce_losses
from manualgrad.ops.registration import implements
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule, replaces

_LOG_ZERO = -1e30  # finite, so that differences and all derivatives are finite
_forward = torch._ctc_loss  # pyright: ignore[reportPrivateImportUsage]


class CTCLossFunction(Rule):
    r"""ℓ = -log P,   P = Σ_π Π_t y_t(π_t)      over the paths π that spell the labels

    y_t(k) = e^(x_tk)      x: (T, N, C)      l = _ a _ b _ … _: the classes of the labels, with blanks between them
    A path moves through l. In each step it stays, advances by one, or skips a blank between two different labels.

    α_t(s)   sum over the partial paths up to time t that end at l_s:      α_t(s) = y_t(l_s) Σ_r α_{t-1}(r),
             r: s, s-1, and s-2 if a path may skip from there
    β_t(s)   sum over the partial paths from time t that start at l_s:     α of the reversed sequence and labels
    γ_t(s)   = α_t(s) β_t(s) / y_t(l_s) / P:   the probability of l_s at time t, given the labels; Σ_s γ_t(s) = 1

    P is linear in each y_t(k), so ∂P/∂x_tk sums the paths that are at k at time t:  ∂ℓ/∂x_tk = -Σ_{l_s = k} γ_t(s)
    torch, and so this rule, returns e^(x_tk) - Σ_{l_s = k} γ_t(s) instead. If x is a log-softmax, its backward
    G - e^x Σ G gives the same for both gradients G, to every order.

    Graves, Fernández, Gomez and Schmidhuber, "Connectionist Temporal Classification", 2006.
    """

    autocast = {"cpu": "float32"}

    def forward(
        log_probs: Tensor,
        targets: Tensor,
        input_lengths: Tensor,
        target_lengths: Tensor,
        blank: int,
        zero_infinity: bool,
    ) -> Tensor:
        losses = _forward(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)[0]
        return torch.where(losses == float("inf"), 0, losses) if zero_infinity else losses

    def lengths(log_probs: Tensor, input_lengths: Tensor) -> Tensor:
        """The number of steps per sequence."""
        return input_lengths.reshape(-1).to(log_probs.device, torch.int64)

    def ends(log_probs: Tensor, target_lengths: Tensor) -> Tensor:
        """The last index of l, per sequence."""
        return 2 * target_lengths.reshape(-1).to(log_probs.device, torch.int64)

    def classes(log_probs: Tensor, targets: Tensor, ends: Tensor, blank: int) -> Tensor:
        """l, per sequence: (N, S). After its end the classes are arbitrary."""
        labels = _labels(targets.to(log_probs.device, torch.int64), ends).clamp(0, log_probs.shape[-1] - 1)
        pairs = torch.stack([torch.full_like(labels, blank), labels], -1).reshape(len(labels), 2 * labels.shape[1])
        return F.pad(pairs, (0, 1), value=blank)

    def step(log_probs: Tensor, lengths: Tensor) -> Tensor:
        """t: (T, 1)."""
        return torch.arange(len(log_probs), device=lengths.device).unsqueeze(1)

    def exists(step: Tensor, lengths: Tensor, classes: Tensor, ends: Tensor) -> Tensor:
        """The sequence has the step t, and l the index s: (T, N, S)."""
        s = torch.arange(classes.shape[1], device=classes.device)
        return (step < lengths).unsqueeze(-1) & (s <= ends.unsqueeze(1))

    def reversed_indices(step: Tensor, lengths: Tensor, classes: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The indices t and s of the reversed sequence and labels."""
        s = torch.arange(classes.shape[1], device=classes.device)
        return (lengths - 1 - step).clamp(min=0), (ends.unsqueeze(1) - s).clamp(min=0)

    def log_y(log_probs: Tensor, classes: Tensor) -> Tensor:
        """log y_t(l_s)"""
        return log_probs.gather(2, classes.expand(len(log_probs), *classes.shape)).clamp(min=_LOG_ZERO)

    def log_alpha_beta(
        log_y: Tensor, classes: Tensor, reversed_indices: tuple[Tensor, Tensor], blank: int
    ) -> Tensor:
        """log α and log β, stacked. One recursion computes both: the reversed sequences are further sequences."""
        both_log_y = torch.cat([log_y, _gather(log_y, reversed_indices)], 1)
        both_classes = torch.cat([classes, classes.gather(1, reversed_indices[1])])
        alpha, beta = _log_alpha(both_log_y, both_classes, blank).chunk(2, 1)
        return torch.stack([alpha, _gather(beta, reversed_indices)])

    def log_gamma_P(log_alpha_beta: Tensor, log_y: Tensor, exists: Tensor) -> Tensor:
        """log (γ P). A softmax over s divides by P, because Σ_s γ_t(s) = 1."""
        return torch.where(exists, log_alpha_beta[0] + log_alpha_beta[1] - log_y, _LOG_ZERO)

    def grad_log_probs(
        grad: Tensor,
        log_probs: Tensor,
        classes: Tensor,
        log_gamma_P: Tensor,
        step: Tensor,
        lengths: Tensor,
        zero_infinity: bool,
    ) -> Tensor:
        gamma = torch.softmax(log_gamma_P, -1)
        derivative = log_probs.exp().scatter_add(2, classes.expand(gamma.shape), -gamma)
        has_path = (log_gamma_P.amax((0, 2)) > _LOG_ZERO / 2).unsqueeze(-1)
        grad_input = torch.where(has_path, derivative * grad.unsqueeze(-1), 0 if zero_infinity else math.nan)
        return torch.where((step < lengths).unsqueeze(-1), grad_input, 0)


def _labels(labels: Tensor, ends: Tensor) -> Tensor:
    """The targets as (N, L), also if they are concatenated."""
    if labels.dim() > 1:
        return labels
    first = (ends.cumsum(0) - ends) // 2
    offset = torch.arange(int(ends.max()) // 2, device=labels.device)
    return labels[(first.unsqueeze(1) + offset).clamp(max=max(len(labels) - 1, 0))]


def _gather(tensor: Tensor, indices: tuple[Tensor, Tensor]) -> Tensor:
    """A tensor (T, N, S) at the indices t (T, N) and s (N, S)."""
    t, s = indices[0].unsqueeze(-1), indices[1]
    return tensor.gather(0, t.expand(tensor.shape)).gather(2, s.expand(tensor.shape))


def _log_alpha(log_y: Tensor, classes: Tensor, blank: int) -> Tensor:
    """log α: (T, N, S), by the recursion over t."""
    can_skip = (classes[:, 2:] != blank) & (classes[:, 2:] != classes[:, :-2])
    can_skip = F.pad(can_skip, (min(2, classes.shape[1]), 0))  # not to s = 0 or 1
    skip_penalty = (1.0 - can_skip.to(log_y.dtype)) * _LOG_ZERO
    start_penalty = (torch.arange(classes.shape[1], device=classes.device) >= 2).to(log_y.dtype) * _LOG_ZERO
    first, *others = log_y.unbind(0)
    alpha = [first + start_penalty]  # a path starts at the first blank or the first label
    for y in others:
        previous = F.pad(alpha[-1], (2, 0), value=_LOG_ZERO)
        alpha.append(_log_sum(alpha[-1], previous[..., 1:-1], previous[..., :-2] + skip_penalty) + y)
    return torch.stack(alpha)


def _log_sum(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """log (eᵃ + eᵇ + eᶜ)"""
    return torch.logsumexp(torch.stack([a, b, c]), 0)


@replaces(_log_sum)
def _log_sum_in_pairs(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Faster, but the higher derivatives of logaddexp are nan where it overflows."""
    return torch.logaddexp(torch.logaddexp(a, b), c)


@implements(torch.ctc_loss)
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int,
    reduction: int,
    zero_infinity: bool,
) -> Tensor:
    """The loss of log-probabilities (T, N, C) or (T, C), and of targets (N, S) or concatenated.

    The mean divides each loss by its number of labels first.
    """
    batch = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    input_lengths, target_lengths = (
        x if isinstance(x, Tensor) else torch.tensor(x) for x in (input_lengths, target_lengths)
    )
    losses = CTCLossFunction.apply(batch, targets.long(), input_lengths, target_lengths, blank, zero_infinity)
    if reduction == MEAN:
        losses = losses / target_lengths.reshape(-1).to(losses).clamp(min=1)
    elif reduction == NONE and log_probs.dim() != 3:
        losses = losses.squeeze(0)
    return reduce_losses(losses, reduction)


register(
    "ctc_loss",
    sample_inputs=lambda t: [
        SampleInput(
            t(5, 3, 4).log_softmax(2), 1 + t.index(3, 3, 2), torch.tensor([5, 4, 5]), torch.tensor([2, 1, 0])
        ).with_surrogate_gradient(derivative_after=partial(torch.log_softmax, dim=2)),
        SampleInput(
            *(t(4, 2, 3).log_softmax(2), torch.tensor([0, 0, 1]).to(t.device), (4, 4), (2, 1)),
            blank=2,
            reduction="none",
        ).with_surrogate_gradient(),
        SampleInput(
            *(t(4, 3), torch.tensor([1, 2]).to(t.device), (4,), (2,)), reduction="sum", zero_infinity=True
        ).with_surrogate_gradient(),
    ],
    benchmark_input=lambda t: SampleInput(
        t(150, 32, 64).log_softmax(2), 1 + t.index(63, 32, 30), torch.full((32,), 150), torch.full((32,), 30)
    ),
    supports_special_values=False,  # +∞ is not a log-probability
    expected_failures={
        **dict.fromkeys(
            ("compile", "compile_dynamic"),
            "shapes inside torch's forward depend on the values of the lengths",
        ),
        "large_values": "torch's gradient contains e^x, which overflows where x is not a log-probability",
    },
)
