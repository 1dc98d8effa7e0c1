"""The settings of a training run."""

import math
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

import manualgrad.nn

from .script import CommandLine


class TrainingSettings(CommandLine):
    """How to train: checked before anything is allocated. A script adds its own fields in a subclass."""

    epochs: PositiveInt = 10
    """How many times to go through the training data."""
    seed: NonNegativeInt = 0
    """Decides, with the number of the epoch, the shuffling and every other random draw of training."""
    device: str = "auto"
    """Where to train: auto (CUDA where there is one), cpu, cuda or cuda:N."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision of autocast; float32 turns autocast off, float16 scales the loss as well."""
    compile: bool = False
    """Train what torch.compile makes of the model. A resumed run is then exact to the last bit only where all
    batches have one size: the program for a second size depends on the sizes that were compiled before it."""
    accumulate: PositiveInt = 1
    """How many batches make one update: their gradient is that of one batch holding them all."""
    clip_norm: PositiveFloat | None = None
    """The norm to which larger gradients are scaled down; None leaves them as they are."""
    schedule_every: Literal["update", "epoch"] = "update"
    """When the learning-rate schedule advances."""
    patience: PositiveInt | None = None
    """Stop after this many epochs without a better validation loss; None trains for all epochs."""
    run_dir: Path | None = None
    """The folder for the curves and checkpoints of this run; None writes neither."""
    resume: bool = False
    """Continue the run in run_dir, if there is one, exactly as if it had never stopped; else begin it."""
    checkpoint_every: PositiveInt | None = None
    """Write a checkpoint every so many updates, besides the one after each epoch."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints to keep, besides the best."""
    on_disk_error: Literal["go_on", "stop"] = "go_on"
    """What to do where a checkpoint or a curve cannot be written: warn and try again later, or stop."""
    on_nonfinite: Literal["stop", "skip", "back_up"] = "stop"
    """What to do where a loss or gradient is NaN or infinite: stop, leave that update out, or go back to the
    weights of the last checkpoint and on with the batches that follow."""
    nonfinite_limit: PositiveInt = 10
    """Stop in any case after so many of them in one epoch."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: whether each process holds the whole model (ddp) or a part of it (fsdp)."""
    loader_warning: PositiveFloat = 60.0
    """Speak of a loader that gives nothing for so many seconds."""
    log_every: PositiveInt = 10
    """Add points to the training curves every so many updates."""
    histogram_every: PositiveInt | None = 5
    """Add histograms of weights and gradients every so many epochs; None adds none."""
    progress: bool = True
    """Show a progress bar when the output is a terminal."""

    bookkeeping: ClassVar[frozenset[str]] = frozenset(
        {
            "settings",
            "device",
            "compile",
            "run_dir",
            "resume",
            "checkpoint_every",
            "keep_last",
            "on_disk_error",
            "parallel",
            "loader_warning",
            "log_every",
            "histogram_every",
            "progress",
        }
    )
    """The settings that have no say in what is learned."""
    free_on_resume: ClassVar[frozenset[str]] = bookkeeping | {
        "epochs",
        "patience",
        "on_nonfinite",
        "nonfinite_limit",
    }
    """The settings in which a resumed run may differ from the run it continues."""

    @field_validator("device")
    @classmethod
    def _device_is_there(cls, name: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
            raise ValueError("Input should be 'auto', 'cpu', 'cuda' or 'cuda:N'")
        here = torch.cuda.device_count()
        if name.startswith("cuda") and (torch.device(name).index or 0) >= here:
            raise ValueError(f"torch finds {here} CUDA devices here")
        return name

    @model_validator(mode="after")
    def _resume_from_somewhere(self) -> Self:
        if self.resume and self.run_dir is None:
            raise ValueError("resume needs run_dir, the folder of the run to continue")
        return self

    def torch_device(self) -> torch.device:
        """The device to train on."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if self.device == "auto" else self.device)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:  # set by torchrun
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return device


class TaskSettings(TrainingSettings):
    """What the training scripts have in common: one option, one meaning in all of them."""

    data: Path | None = None
    """The data; by default those that come with this script."""
    model: Literal["ours", "torch"] = "ours"
    """Whose layers: those of manualgrad.nn, or those of torch.nn from the same initial weights."""
    batch_size: PositiveInt = 128
    """Examples per batch."""
    learning_rate: PositiveFloat = 2e-3
    """The highest rate of the one-cycle schedule."""
    weight_decay: NonNegativeFloat = 0.01
    """The weight decay of AdamW."""
    clip_norm: PositiveFloat | None = 1.0
    """The norm to which larger gradients are scaled down; None leaves them as they are."""
    run_dir: Path | None = None
    """The folder for the curves and checkpoints; by default one of this run under runs/."""
    log_every: PositiveInt = 25
    """Add points to the training curves every so many updates."""

    # The one-cycle schedule is laid out over all the epochs, so their number stays what it was.
    free_on_resume: ClassVar[frozenset[str]] = TrainingSettings.free_on_resume - {"epochs"}

    task: ClassVar[str] = "task"
    """How the folders of its runs are called."""

    def resolved(self) -> Self:
        """These settings with values for those whose default depends on the others."""
        name = f"{self.task}-{self.model}-seed{self.seed}-{datetime.now():%Y%m%d-%H%M%S}"
        return self.model_copy(update={"run_dir": self.run_dir or Path("runs", name)})

    @property
    def layers(self) -> Any:
        """The module that has the layers and losses: manualgrad.nn or torch.nn."""
        return manualgrad.nn if self.model == "ours" else torch.nn

    def one_cycle(self, model: torch.nn.Module, batches: int) -> tuple[AdamW, OneCycleLR]:
        """AdamW and its schedule, for so many batches an epoch."""
        optimizer = AdamW(model.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        updates = math.ceil(batches / self.accumulate) if self.schedule_every == "update" else 1
        return optimizer, OneCycleLR(optimizer, self.learning_rate, total_steps=self.epochs * updates)
