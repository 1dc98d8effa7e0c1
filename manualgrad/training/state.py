"""The state of a training run, and its result."""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import nan
from typing import Any, Self

Metrics = dict[str, float]
"""The mean "loss" and the mean of each metric, by name."""


def warn(message: str) -> None:
    """Print one line on stderr. A closed or full stderr is ignored."""
    with suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


@dataclass
class MetricAverages:
    """Weighted means over many batches. The weight of each batch is its count: what its mean is a mean over."""

    totals: Metrics = field(default_factory=dict)
    """The sum of mean times count."""
    counts: Metrics = field(default_factory=dict)
    """The sum of the counts."""
    examples: int = 0

    def add(self, means: Mapping[str, tuple[float, float]], examples: int) -> None:
        """Add the (mean, count) pairs of a batch. The mean may be NaN where the count is 0."""
        totals = {name: mean * count if count else 0.0 for name, (mean, count) in means.items()}
        self.merge(MetricAverages(totals, {name: count for name, (_, count) in means.items()}, examples))

    def merge(self, other: "MetricAverages") -> None:
        """Add the averages of other batches."""
        for target, source in ((self.totals, other.totals), (self.counts, other.counts)):
            for name, number in source.items():
                target[name] = target.get(name, 0.0) + number
        self.examples += other.examples

    def reduced(self, all_reduce_sum: Callable[[list[float]], list[float]]) -> "MetricAverages":
        """Return the averages over all processes, in one call of `all_reduce_sum`."""
        numbers = iter(all_reduce_sum([float(self.examples), *self.totals.values(), *self.counts.values()]))
        examples = int(next(numbers))
        totals = {name: next(numbers) for name in self.totals}
        return MetricAverages(totals, {name: next(numbers) for name in self.counts}, examples)

    def means(self) -> Metrics:
        """Return the mean of each metric over all batches so far. It is NaN where the count is 0."""
        counts = self.counts
        return {name: total / counts[name] if counts[name] else nan for name, total in self.totals.items()}


@dataclass
class OrderFingerprint:
    """Identifies the batches drawn in an epoch, and their order (see data_order.py)."""

    digest: str = ""
    """A hash of the indices."""
    first: list[float] = field(default_factory=list)
    """For loaders without indices: numbers computed from the first batch."""
    sums: list[float] = field(default_factory=list)
    """For loaders without indices: weighted sums of such numbers over all batches."""
    sizes: list[float] = field(default_factory=list)
    """The same sums of absolute values, the scale for comparing."""


@dataclass
class TrainerState:
    """What a checkpoint holds besides weights, optimizer and random states. All of it is plain data."""

    global_step: int = 0
    """Optimizer steps done since the start: the horizontal axis of every curve."""
    epoch: int = 0
    """Completed epochs."""
    updates_drawn: int = 0
    """Groups of batches drawn in the current epoch, one for each update, skipped updates included."""
    order: OrderFingerprint = field(default_factory=OrderFingerprint)
    """The batches of the current epoch."""
    previous_order: OrderFingerprint = field(default_factory=OrderFingerprint)
    """The batches of the previous epoch."""
    skipped_updates: int = 0
    """Updates skipped or rolled back because of a NaN or an infinity."""
    skipped_before_epoch: int = 0
    """How many of these came before the current epoch."""
    interrupted_points: Metrics | None = None
    """The curve points of the last update before a signal stopped training. A resumed run writes them again,
    because the end of the epoch may add points of the same step. None without an interruption."""
    epoch_trained: bool = False
    """A signal stopped training during validation: all updates of the current epoch are done."""
    epoch_averages: MetricAverages = field(default_factory=MetricAverages)
    """The averages of the current epoch."""
    train_metrics: Metrics = field(default_factory=dict)
    """Means over the last completed epoch, taken while the weights changed."""
    best_metrics: Metrics = field(default_factory=dict)
    """Means over the validation data after the best epoch."""
    best_epoch: int = 0
    """The epoch with the lowest validation loss, counted from 1; 0 before there is one."""

    def start_next_epoch(self) -> None:
        """Complete the current epoch."""
        if self.epoch_averages.counts.get("loss"):
            self.train_metrics = self.epoch_averages.means()
        self.epoch, self.updates_drawn, self.epoch_averages = self.epoch + 1, 0, MetricAverages()
        self.previous_order, self.order = self.order, OrderFingerprint()
        self.skipped_before_epoch, self.epoch_trained = self.skipped_updates, False

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        orders = {name: OrderFingerprint(**saved[name]) for name in ("order", "previous_order")}
        return cls(**{**saved, "epoch_averages": MetricAverages(**saved["epoch_averages"]), **orders})


@dataclass(frozen=True)
class FitResult:
    """The result of `Trainer.fit`."""

    epochs: int
    """Epochs trained, including those before a resume."""
    global_step: int
    """Optimizer steps done, including those before a resume."""
    best_epoch: int
    """The epoch that the model's weights come from: the best one, or the last one without validation."""
    stopped_early: bool
    """Whether `patience` ended training."""
    train: Metrics
    """Means over the last epoch, taken while the weights changed."""
    validation: Metrics
    """Means over the validation data after the best epoch; empty without validation."""
    skipped_updates: int
    """Updates skipped or rolled back because of a NaN or an infinity."""
    summary: Metrics
    """What the `on_fit_end` callback returned."""

    @classmethod
    def from_state(cls, state: TrainerState, max_epochs: int, summary: Metrics) -> Self:
        """Return the result of a run that has ended."""
        return cls(
            epochs=state.epoch,
            global_step=state.global_step,
            best_epoch=state.best_epoch or state.epoch,
            stopped_early=state.epoch < max_epochs,
            train=state.train_metrics,
            validation=state.best_metrics,
            skipped_updates=state.skipped_updates,
            summary=summary,
        )

    def all_metrics(self) -> Metrics:
        """Return all metrics: those of training and validation with a prefix, then the summary."""
        metrics = {f"train_{name}": mean for name, mean in self.train.items()}
        metrics |= {f"validation_{name}": mean for name, mean in self.validation.items()}
        return metrics | self.summary
