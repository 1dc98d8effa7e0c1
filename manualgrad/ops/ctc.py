"""Connectionist temporal classification: a loss over every way to align a label sequence with a longer input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import implements
from manualgrad.ops.loss import MEAN, NONE, reduced
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule, replaces

_NEVER = -1e30  # log 0: finite, so that differences of two stay numbers, and so do all derivatives
_forward = torch._ctc_loss  # pyright: ignore[reportPrivateImportUsage]


class CTCLossFunction(Rule):
    r"""ℓ = -log P,   P = Σ_π Π_t y_t(π_t)      over the paths π that read as the labels

    y_t(k) = e^(x_tk)      x: (T, N, C)      A path follows l = _ a _ b _ … _ (the labels with blanks between
    them): each step it stays, moves on by one, or skips a blank between two different labels.

    α_t(s)   all paths that are at l_s at time t, up to and with t:      α_t(s) = y_t(l_s) Σ α_{t-1}(s, s-1, s-2)
    β_t(s)   all paths from there on, with t:      α of the sequence read backwards in time and labels
    γ_t(s)   = α_t(s) β_t(s) / y_t(l_s) / P:       the share of paths that pass there; Σ_s γ_t(s) = 1

    P is linear in each y_t(k), so ∂P/∂x_tk sums the paths that pass k at t:   ∂ℓ/∂x_tk = -Σ_{l_s = k} γ_t(s)
    torch defines it with e^(x_tk) more: then a row sums to 0, which a log-softmax before it passes on as it is.
    After one, both are the derivative, to every order.

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
        """Steps of each sequence."""
        return input_lengths.reshape(-1).to(log_probs.device, torch.int64)

    def ends(log_probs: Tensor, target_lengths: Tensor) -> Tensor:
        """The last place in l, of each sequence."""
        return 2 * target_lengths.reshape(-1).to(log_probs.device, torch.int64)

    def path(log_probs: Tensor, targets: Tensor, ends: Tensor, blank: int) -> Tensor:
        """l of each sequence: (N, S). What stands behind its end is any class."""
        labels = _labels(targets.to(log_probs.device, torch.int64), ends).clamp(0, log_probs.shape[-1] - 1)
        pairs = torch.stack([torch.full_like(labels, blank), labels], -1).reshape(len(labels), 2 * labels.shape[1])
        return F.pad(pairs, (0, 1), value=blank)

    def step(log_probs: Tensor, lengths: Tensor) -> Tensor:
        """t, for all sequences: (T, 1)."""
        return torch.arange(len(log_probs), device=lengths.device).unsqueeze(1)

    def alive(step: Tensor, lengths: Tensor, path: Tensor, ends: Tensor) -> Tensor:
        """The sequence has this step, and l this place: (T, N, S)."""
        place = torch.arange(path.shape[1], device=path.device)
        return (step < lengths).unsqueeze(-1) & (place <= ends.unsqueeze(1))

    def backwards(step: Tensor, lengths: Tensor, path: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """For t and s the step and the place that are read there if a sequence is read backwards."""
        place = torch.arange(path.shape[1], device=path.device)
        return (lengths - 1 - step).clamp(min=0), (ends.unsqueeze(1) - place).clamp(min=0)

    def log_y(log_probs: Tensor, path: Tensor) -> Tensor:
        """log y_t(l_s)"""
        return log_probs.gather(2, path.expand(len(log_probs), *path.shape)).clamp(min=_NEVER)

    def log_alpha_beta(log_y: Tensor, path: Tensor, backwards: tuple[Tensor, Tensor], blank: int) -> Tensor:
        """log α and log β, one after the other: both by one recursion, for twice as many sequences."""
        twice = torch.cat([log_y, _read(log_y, backwards)], 1)
        alpha, beta = _log_alpha(twice, torch.cat([path, path.gather(1, backwards[1])]), blank).chunk(2, 1)
        return torch.stack([alpha, _read(beta, backwards)])

    def log_gamma(log_alpha_beta: Tensor, log_y: Tensor, alive: Tensor) -> Tensor:
        """log γ + log P"""
        return torch.where(alive, log_alpha_beta[0] + log_alpha_beta[1] - log_y, _NEVER)

    def grad_log_probs(
        grad: Tensor,
        log_probs: Tensor,
        path: Tensor,
        log_gamma: Tensor,
        step: Tensor,
        lengths: Tensor,
        zero_infinity: bool,
    ) -> Tensor:
        gamma = torch.softmax(log_gamma, -1)
        derivative = log_probs.exp().scatter_add(2, path.expand(gamma.shape), -gamma)
        possible = (log_gamma.amax((0, 2)) > _NEVER / 2).unsqueeze(-1)
        of_all = torch.where(possible, derivative * grad.unsqueeze(-1), 0 if zero_infinity else math.nan)
        return torch.where((step < lengths).unsqueeze(-1), of_all, 0)


def _labels(labels: Tensor, ends: Tensor) -> Tensor:
    """(N, L), also of targets that stand one after the other."""
    if labels.dim() > 1:
        return labels
    first = (ends.cumsum(0) - ends) // 2
    reach = torch.arange(int(ends.max()) // 2, device=labels.device)
    return labels[(first.unsqueeze(1) + reach).clamp(max=max(len(labels) - 1, 0))]


def _read(tensor: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    """(T, N, S), read at other steps and places."""
    return tensor.gather(0, at[0].unsqueeze(-1).expand(tensor.shape)).gather(2, at[1].expand(tensor.shape))


def _log_alpha(log_y: Tensor, path: Tensor, blank: int) -> Tensor:
    """log α: (T, N, S), by the recursion in t."""
    skips = F.pad((path[:, 2:] != blank) & (path[:, 2:] != path[:, :-2]), (min(2, path.shape[1]), 0))
    skip = (1.0 - skips.to(log_y.dtype)) * _NEVER
    start = (torch.arange(path.shape[1], device=path.device) >= 2).to(log_y.dtype) * _NEVER
    first, *others = log_y.unbind(0)
    alpha = [first + start]
    for y in others:
        before = F.pad(alpha[-1], (2, 0), value=_NEVER)
        alpha.append(_log_sum(alpha[-1], before[..., 1:-1], before[..., :-2] + skip) + y)
    return torch.stack(alpha)


def _log_sum(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """log (eᵃ + eᵇ + eᶜ)"""
    return torch.logsumexp(torch.stack([a, b, c]), 0)


@replaces(_log_sum)
def _log_sum_in_pairs(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Faster, but its higher derivatives are nan where it overflows."""
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
    """Of (T, N, C) or (T, C), and targets (N, S) or one after the other. The mean first divides each loss by its
    number of labels."""
    batch = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    inputs, lengths = (x if isinstance(x, Tensor) else torch.tensor(x) for x in (input_lengths, target_lengths))
    losses = CTCLossFunction.apply(batch, targets.long(), inputs, lengths, blank, zero_infinity)
    if reduction == MEAN:
        losses = losses / lengths.reshape(-1).to(losses).clamp(min=1)
    elif reduction == NONE and log_probs.dim() != 3:
        losses = losses.squeeze(0)
    return reduced(losses, reduction)


register(
    "ctc_loss",
    sample_inputs=lambda t: [
        SampleInput(
            t(5, 3, 4).log_softmax(2), 1 + t.index(3, 3, 2), torch.tensor([5, 4, 5]), torch.tensor([2, 1, 0])
        ).with_gradient_by_definition(after=partial(torch.log_softmax, dim=2)),
        SampleInput(
            *(t(4, 2, 3).log_softmax(2), torch.tensor([0, 0, 1]).to(t.device), (4, 4), (2, 1)),
            blank=2,
            reduction="none",
        ).with_gradient_by_definition(),
        SampleInput(
            *(t(4, 3), torch.tensor([1, 2]).to(t.device), (4,), (2,)), reduction="sum", zero_infinity=True
        ).with_gradient_by_definition(),
    ],
    benchmark_input=lambda t: SampleInput(
        t(150, 32, 64).log_softmax(2), 1 + t.index(63, 32, 30), torch.full((32,), 150), torch.full((32,), 30)
    ),
    supports_special_values=False,  # log-probabilities have no infinity but -∞
    expected_failures={
        **dict.fromkeys(
            ("compile", "compile_dynamic"),
            "the shapes that torch's forward computes with depend on the lengths",
        ),
        "large_values": "torch's gradient has e^x in it, which overflows where x is no log-probability",
    },
)
