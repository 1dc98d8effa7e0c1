"""How far training has come, and what it came to."""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

Figures = dict[str, float]
"""The "loss" and each metric by name: means over examples."""


def warn(message: str) -> None:
    """One line on stderr; that it cannot be written to stops nothing."""
    with suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


@dataclass
class Averages:
    """Means over examples, of figures that come as means over batches."""

    totals: Figures = field(default_factory=dict)
    examples: int = 0

    def add(self, means: Mapping[str, float], examples: int) -> None:
        """Count the means of a batch of so many examples."""
        for name, mean in means.items():
            self.totals[name] = self.totals.get(name, 0.0) + mean * examples
        self.examples += examples

    def merged(self, total: Callable[[list[float]], list[float]]) -> "Averages":
        """Those of all processes: `total` adds up a list of numbers over them."""
        examples, *totals = total([float(self.examples), *self.totals.values()])
        return Averages(dict(zip(self.totals, totals, strict=True)), int(examples))

    def means(self) -> Figures:
        """The mean of each figure over all examples so far."""
        return {name: total / self.examples for name, total in self.totals.items()}


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
