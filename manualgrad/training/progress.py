"""How far training has come, and what it came to."""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import nan
from typing import Any, Self

Figures = dict[str, float]
"""The "loss" and each metric by name: means."""


def warn(message: str) -> None:
    """One line on stderr; that it cannot be written to stops nothing."""
    with suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


@dataclass
class Averages:
    """Means over many batches, of figures that come as means over one, each with the count of what it is over."""

    totals: Figures = field(default_factory=dict)
    """The sum of mean times count."""
    counts: Figures = field(default_factory=dict)
    examples: int = 0

    def add(self, means: Mapping[str, tuple[float, float]], examples: int) -> None:
        """Add the means of a batch of so many examples, each with its count; a mean over nothing may be NaN."""
        totals = {name: mean * count if count else 0.0 for name, (mean, count) in means.items()}
        self.merge(Averages(totals, {name: count for name, (_, count) in means.items()}, examples))

    def merge(self, other: "Averages") -> None:
        """Add those of other batches."""
        for mine, others in ((self.totals, other.totals), (self.counts, other.counts)):
            for name, number in others.items():
                mine[name] = mine.get(name, 0.0) + number
        self.examples += other.examples

    def over_processes(self, total: Callable[[list[float]], list[float]]) -> "Averages":
        """Those of all processes: `total` adds up a list of numbers over them."""
        numbers = iter(total([float(self.examples), *self.totals.values(), *self.counts.values()]))
        examples = int(next(numbers))
        return Averages(
            {name: next(numbers) for name in self.totals}, {name: next(numbers) for name in self.counts}, examples
        )

    def means(self) -> Figures:
        """The mean of each figure over all batches so far; NaN where there was nothing to count."""
        counts = self.counts
        return {name: total / counts[name] if counts[name] else nan for name, total in self.totals.items()}


@dataclass
class Drawn:
    """What an epoch drew from its loader (see order.py)."""

    digest: str = ""
    """Of the indices."""
    first: list[float] = field(default_factory=list)
    """Numbers of the first batch, where there are no indices."""
    sums: list[float] = field(default_factory=list)
    """Of numbers of all batches, likewise."""
    sizes: list[float] = field(default_factory=list)
    """Of their absolute values."""


@dataclass
class Progress:
    """All that a checkpoint needs besides weights, optimizer and random states; plain data throughout."""

    step: int = 0
    """Updates done since the start: the horizontal axis of every curve."""
    epoch: int = 0
    """Whole epochs done."""
    drawn: int = 0
    """Groups of batches drawn in the epoch under way, for an update each (unless it was left out)."""
    order: Drawn = field(default_factory=Drawn)
    """What these were."""
    order_before: Drawn = field(default_factory=Drawn)
    """What the epoch before it drew."""
    left_out: int = 0
    """Updates left out for their bad numbers."""
    left_out_before: int = 0
    """Of these, before the epoch under way."""
    points: Figures | None = None
    """Where training was asked to stop, the points of the last update: they are written again on resuming, with
    those of the epoch, if it has ended there, which have the same step. None elsewhere."""
    trained: bool = False
    """It was asked to stop while the epoch, all of it trained, was validated."""
    running: Averages = field(default_factory=Averages)
    """The figures of the epoch under way."""
    train: Figures = field(default_factory=dict)
    """Means over the last whole epoch of training, taken while the weights changed."""
    best: Figures = field(default_factory=dict)
    """Means over the validation data after the best epoch."""
    best_epoch: int = 0
    """The epoch with the lowest validation loss, counted from 1; 0 before there is one."""

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        drawn = {name: Drawn(**saved[name]) for name in ("order", "order_before") if name in saved}
        return cls(**{**saved, "running": Averages(**saved["running"]), **drawn})


@dataclass(frozen=True)
class FitResult:
    """What `Trainer.fit` came to."""

    epochs: int
    """Epochs trained, those before a resume included."""
    steps: int
    """Updates made, likewise."""
    best_epoch: int
    """The epoch whose weights the model now has: the best one, or without validation the last."""
    stopped_early: bool
    """Whether `patience` ended training."""
    train: Figures
    """Means over the last epoch of training, taken while the weights changed."""
    validation: Figures
    """Means over the validation data after the best epoch; empty without validation."""
    left_out: int
    """Updates left out for their bad numbers, or undone."""
    summary: Figures
    """What the `summary` function of the trainer returned."""
