"""The loss and metrics of a batch, and their averages."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from .checks import check_loss, check_shapes
from .distributed import Shard
from .state import MetricAverages
from .weighted_means import LossOrMetric, Mean, compute_mean, to_numbers, zero_loss


class Objective:
    """Computes the loss and the metrics of a batch.

    Args:
        autocast: makes the context for the model and the loss.
    """

    def __init__(
        self,
        loss: LossOrMetric,
        metrics: Mapping[str, LossOrMetric],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.loss, self.metrics, self.autocast = loss, metrics, autocast

    def forward(self, model: Callable[..., Any], batch: Shard, allow_nan: bool = False) -> dict[str, Mean]:
        """Return the "loss" and the metrics of a batch.

        Args:
            allow_nan: a loss with count 0 may be NaN. Otherwise it is replaced by 0, with zero gradients.
        """
        with self.autocast():
            prediction = model(batch.input)
            check_shapes(prediction, batch.target)
            loss = compute_mean(self.loss, prediction, batch.target, batch.examples)
        check_loss(loss.value, training=torch.is_grad_enabled())
        if not allow_nan and not float(loss.count):  # float() waits for the device
            loss = Mean(zero_loss(prediction, loss.value), 0)
        means = {"loss": loss}
        with torch.no_grad():
            for name, metric in self.metrics.items():
                means[name] = compute_mean(metric, prediction, batch.target, batch.examples)
        return means


def average(batches: list[Shard], means: list[dict[str, Mean]]) -> MetricAverages:
    """Return the averages over batches of this process. This waits for the device."""
    averages = MetricAverages()
    for batch, mean in zip(batches, means, strict=True):
        averages.add(to_numbers(mean), batch.examples)
    return averages
