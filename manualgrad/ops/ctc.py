"""Connectionist temporal classification: a loss over every way to align a label sequence with a longer input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import choose, drop_in, reduced
from manualgrad.ops.loss import named
from manualgrad.registry import Call, register
from manualgrad.rule import Rule

_NEVER = -1e30  # log 0: finite, so that differences of two stay numbers, and so do all derivatives


_ctc_loss = torch._ctc_loss  # pyright: ignore[reportPrivateImportUsage]


class CTCLossFunction(Rule):
    r"""ℓ = -log P,   P = Σ_π Π_t y_t(π_t)      over the paths π that read as the labels

    y_t(k) = e^(x_tk)      x: (T, N, C)      A path walks along l = _ a _ b _ … _ (the labels with blanks between
    them): each step it stays, goes on by one, or skips a blank between two different labels.

    α_t(s)   all paths that are at l_s at time t, up to and with t:      α_t(s) = y_t(l_s) Σ α_{t-1}(s, s-1, s-2)
    β_t(s)   all paths from there on, with t:      α of the sequence read backwards in time and labels
    γ_t(s)   = α_t(s) β_t(s) / y_t(l_s) / P:       the share of paths that pass there; Σ_s γ_t(s) = 1

    P is linear in each y_t(k), so  ∂P/∂x_tk = the sum of the paths that pass k at t:
    ∂ℓ/∂x_tk = -Σ_{s: l_s = k} γ_t(s)

    Graves, Fernández, Gomez and Schmidhuber, "Connectionist Temporal Classification", 2006. (torch adds e^(x_tk),
    which the gradient of a log-softmax before it takes away again, and which is not there without one.)
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
        losses = _ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)[0]
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
        blanks = torch.full_like(labels, blank)
        pairs = torch.stack([blanks, labels], -1).reshape(labels.shape[0], 2 * labels.shape[1])
        return F.pad(pairs, (0, 1), value=blank)

    def share(
        log_probs: Tensor, path: Tensor, inputs: Tensor, ends: Tensor, blank: int, zero_infinity: bool
    ) -> Tensor:
        """γ: (T, N, S)."""
        times, places = (torch.arange(n, device=path.device) for n in (log_probs.shape[0], path.shape[1]))
        shape = (*log_probs.shape[:2], path.shape[1])
        early = (inputs - 1 - times.unsqueeze(1)).clamp(min=0).unsqueeze(-1).expand(shape)
        back = (ends.unsqueeze(1) - places).clamp(min=0)

        def backwards(along: Tensor) -> Tensor:
            return along.gather(0, early).gather(2, back.expand(shape))

        emitted = log_probs.gather(2, path.expand(shape)).clamp(min=_NEVER)
        both = _walked(torch.cat([emitted, backwards(emitted)], 1), torch.cat([path, path.gather(1, back)]), blank)
        ahead, behind = both.chunk(2, 1)
        alive = (times.unsqueeze(1) < inputs).unsqueeze(-1) & (places <= ends.unsqueeze(1))
        through = ahead + backwards(behind) - emitted
        through = choose(alive, through, torch.full_like(through, _NEVER))
        possible = (through.amax((0, 2)) > _NEVER / 2).unsqueeze(-1).expand(shape)
        share = torch.softmax(through, -1)
        share = choose(possible, share, torch.full_like(share, 0 if zero_infinity else float("nan")))
        return choose(alive, share)

    def grad_log_probs(grad: Tensor, log_probs: Tensor, path: Tensor, share: Tensor) -> Tensor:
        sent = -grad.unsqueeze(-1) * share
        return torch.zeros_like(log_probs).scatter_add(2, path.expand(sent.shape), sent)


def _walked(emitted: Tensor, path: Tensor, blank: int) -> Tensor:
    """log α: (T, N, S), from log y_t(l_s) and l."""
    apart = F.pad((path[:, 2:] != blank) & (path[:, 2:] != path[:, :-2]), (min(2, path.shape[1]), 0))
    skip = (1.0 - apart.to(emitted.dtype)) * _NEVER
    start = (torch.arange(path.shape[1], device=path.device) >= 2).to(emitted.dtype) * _NEVER
    first, *others = emitted.unbind(0)
    walked = [first + start]
    for each in others:
        stay = walked[-1]
        before = F.pad(stay, (2, 0), value=_NEVER)
        ways = torch.stack([stay, before[..., 1:-1], before[..., :-2] + skip])
        moved = torch.logsumexp(ways, 0)  # not logaddexp, whose higher derivatives are nan where it overflows
        walked.append(moved + each)
    return torch.stack(walked)


@drop_in
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """-log of the probability of the labels, summed over alignments, as `torch.nn.functional.ctc_loss`.

    Shapes: log_probs (T, N, C) or (T, C), targets (N, S) or one after the other, lengths (N) or (). The reduction
    "mean" divides each loss by its number of labels first. The gradient is the derivative; torch's is that of
    log-softmax and this together, and agrees with it after a log-softmax.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: lengths that do not fit.
    """
    reduction = named(reduction, None, None)
    batch = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    inputs, lengths = (x if isinstance(x, Tensor) else torch.tensor(x) for x in (input_lengths, target_lengths))
    losses = CTCLossFunction.apply(batch, targets.long(), inputs, lengths, blank, zero_infinity)
    if reduction == "mean":
        losses = losses / lengths.reshape(-1).to(losses).clamp(min=1)
    elif reduction == "none" and log_probs.dim() != 3:
        losses = losses.squeeze(0)
    return reduced(losses, reduction)


_ANOTHER = "torch's gradient is that of log-softmax and this together; ours is the derivative (finite differences)"
_HALF = "torch has no forward for bfloat16 and float16"

register(
    ctc_loss,
    samples=lambda t: [
        Call(t(5, 3, 4).log_softmax(2), 1 + t.index(3, 3, 2), torch.tensor([5, 4, 5]), torch.tensor([2, 1, 0])),
        Call(t(4, 2, 3), torch.tensor([0, 0, 1]).to(t.device), (4, 4), (2, 1), blank=2, reduction="none"),
        Call(t(4, 3), torch.tensor([1, 2]).to(t.device), (4,), (2,), reduction="sum", zero_infinity=True),
    ],
    big=lambda t: Call(
        t(150, 32, 64).log_softmax(2), 1 + t.index(63, 32, 30), torch.full((32,), 150), torch.full((32,), 30)
    ),
    special=False,
    lacks=dict.fromkeys(("gradient_of_each_subset", "strides", "expanded_gradient", "autocast"), _ANOTHER)
    | dict.fromkeys(("low_precision", "low_precision_at_full_size"), _HALF)
    | {
        "compile": "the shapes that torch's forward computes with depend on the lengths",
        "zero_size": "torch refuses an input without times",
    },
)
