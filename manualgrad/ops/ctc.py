"""Connectionist temporal classification: a loss over every way to align a label sequence with a longer input."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import added, choose, stands_for
from manualgrad.ops.loss import MEAN, NONE, reduced
from manualgrad.registry import Call, register
from manualgrad.rule import Rule, differentiated

_NEVER = -1e30  # log 0: finite, so that differences of two stay numbers, and so do all derivatives
_forward = torch._ctc_loss  # pyright: ignore[reportPrivateImportUsage]


class CTCLossFunction(Rule):
    r"""ℓ = -log P,   P = Σ_π Π_t y_t(π_t)      over the paths π that read as the labels

    y_t(k) = e^(x_tk)      x: (T, N, C)      A path walks along l = _ a _ b _ … _ (the labels with blanks between
    them): each step it stays, goes on by one, or skips a blank between two different labels.

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

    def inputs(log_probs: Tensor, input_lengths: Tensor) -> Tensor:
        return input_lengths.reshape(-1).to(log_probs.device, torch.int64)

    def ends(log_probs: Tensor, target_lengths: Tensor) -> Tensor:
        """The last place in l, of each sequence."""
        return 2 * target_lengths.reshape(-1).to(log_probs.device, torch.int64)

    def path(log_probs: Tensor, targets: Tensor, ends: Tensor, blank: int) -> Tensor:
        """l of each sequence: (N, S); what stands behind its end is any class."""
        labels = targets.to(log_probs.device, torch.int64)
        if labels.dim() == 1:  # one after the other
            first = (ends.cumsum(0) - ends) // 2
            reach = torch.arange(int(ends.max()) // 2, device=labels.device)
            labels = labels[(first.unsqueeze(1) + reach).clamp(max=max(len(labels) - 1, 0))]
        labels = labels.clamp(0, log_probs.shape[-1] - 1)
        pairs = torch.stack([torch.full_like(labels, blank), labels], -1).flatten(1)
        return F.pad(pairs, (0, 1), value=blank)

    def through(log_probs: Tensor, path: Tensor, inputs: Tensor, ends: Tensor, blank: int) -> Tensor:
        """log γ + log P: (T, N, S)."""
        times, places = (torch.arange(n, device=path.device) for n in (len(log_probs), path.shape[1]))
        shape = (*log_probs.shape[:2], path.shape[1])
        early = (inputs - 1 - times.unsqueeze(1)).clamp(min=0).unsqueeze(-1).expand(shape)
        back = (ends.unsqueeze(1) - places).clamp(min=0)

        def backwards(along: Tensor) -> Tensor:
            return along.gather(0, early).gather(2, back.expand(shape))

        emitted = log_probs.gather(2, path.expand(shape)).clamp(min=_NEVER)
        both = _walked(torch.cat([emitted, backwards(emitted)], 1), torch.cat([path, path.gather(1, back)]), blank)
        ahead, behind = both.chunk(2, 1)
        through = ahead + backwards(behind) - emitted
        alive = (times.unsqueeze(1) < inputs).unsqueeze(-1) & (places <= ends.unsqueeze(1))
        return choose(alive, through, torch.full_like(through, _NEVER))

    def grad_log_probs(
        grad: Tensor, log_probs: Tensor, path: Tensor, through: Tensor, inputs: Tensor, zero_infinity: bool
    ) -> Tensor:
        share = torch.softmax(through, -1)
        gradient = added(log_probs.exp(), 2, path.expand(share.shape), -share) * grad.unsqueeze(-1)
        possible = (through.amax((0, 2)) > _NEVER / 2).unsqueeze(-1).expand_as(gradient)
        gradient = choose(possible, gradient, torch.full_like(gradient, 0 if zero_infinity else float("nan")))
        alive = torch.arange(len(log_probs), device=inputs.device).unsqueeze(1) < inputs
        return choose(alive.unsqueeze(-1).expand_as(gradient), gradient)


def _walked(emitted: Tensor, path: Tensor, blank: int) -> Tensor:
    """log α: (T, N, S), from log y_t(l_s) and l."""
    apart = F.pad((path[:, 2:] != blank) & (path[:, 2:] != path[:, :-2]), (min(2, path.shape[1]), 0))
    skip = (1.0 - apart.to(emitted.dtype)) * _NEVER
    start = (torch.arange(path.shape[1], device=path.device) >= 2).to(emitted.dtype) * _NEVER
    first, *others = emitted.unbind(0)
    walked = [first + start]
    for each in others:
        before = F.pad(walked[-1], (2, 0), value=_NEVER)
        walked.append(_log_sum(walked[-1], before[..., 1:-1], before[..., :-2] + skip) + each)
    return torch.stack(walked)


def _log_sum(*ways: Tensor) -> Tensor:
    """log Σ e^way. The faster logaddexp has higher derivatives that are nan where it overflows."""
    return torch.logsumexp(torch.stack(ways), 0) if differentiated() else functools.reduce(torch.logaddexp, ways)


@stands_for(torch.ctc_loss)
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
    samples=lambda t: [
        Call(
            t(5, 3, 4).log_softmax(2), 1 + t.index(3, 3, 2), torch.tensor([5, 4, 5]), torch.tensor([2, 1, 0])
        ).with_gradient_by_definition(after=partial(torch.log_softmax, dim=2)),
        Call(
            *(t(4, 2, 3).log_softmax(2), torch.tensor([0, 0, 1]).to(t.device), (4, 4), (2, 1)),
            blank=2,
            reduction="none",
        ).with_gradient_by_definition(),
        Call(
            *(t(4, 3), torch.tensor([1, 2]).to(t.device), (4,), (2,)), reduction="sum", zero_infinity=True
        ).with_gradient_by_definition(),
    ],
    big=lambda t: Call(
        t(150, 32, 64).log_softmax(2), 1 + t.index(63, 32, 30), torch.full((32,), 150), torch.full((32,), 30)
    ),
    special=False,  # log-probabilities have no infinity but -∞
    lacks={
        **dict.fromkeys(
            ("compile", "compile_dynamic"),
            "the shapes that torch's forward computes with depend on the lengths",
        ),
        "large_values": "torch's gradient has e^x in it, which overflows where x is no log-probability",
    },
)
