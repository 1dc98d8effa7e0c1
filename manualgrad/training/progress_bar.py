"""The progress bar of a run."""

import math
from typing import Any

from tqdm import tqdm

from .batches import Loader, num_batches
from .settings import TrainingSettings
from .state import Metrics, TrainerState


def progress_bar(state: TrainerState, settings: TrainingSettings, loader: Loader, enabled: bool) -> "tqdm[Any]":
    """Return a bar over all updates of the run. It shows nothing without a terminal."""
    batches = num_batches(loader)
    per_epoch = None if batches is None else math.ceil(batches / settings.accumulate_grad_batches)
    return tqdm(
        total=None if per_epoch is None else settings.max_epochs * per_epoch,
        initial=state.global_step,
        disable=None if enabled and settings.progress_bar else True,  # None: disabled without a terminal
        unit=" updates",
        dynamic_ncols=True,
    )


def show_losses(bar: "tqdm[Any]", state: TrainerState, means: Metrics) -> None:
    """Show the loss of the last update and the best validation loss."""
    best = {"best validation": f"{state.best_metrics['loss']:.4g}"} if state.best_metrics else {}
    bar.set_postfix({"loss": f"{means['loss']:.4g}"} | best, refresh=False)
