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

from .cli import CliSettings


class TrainingSettings(CliSettings):
    """How to train. Checked before anything is allocated. A script adds its own fields in a subclass."""

    max_epochs: PositiveInt = 10
    """How many times to go through the training data."""
    seed: NonNegativeInt = 0
    """Seeds, with the number of the epoch, the shuffling and every other random draw of training."""
    device: str = "auto"
    """Where to train: auto (CUDA where there is one), cpu, cuda or cuda:N."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision of autocast. float32 turns autocast off; float16 also scales the loss."""
    compile: bool = False
    """Train the result of torch.compile. A resumed run is then exact to the last bit only if all batches have one
    size: the program for a second size depends on the sizes compiled before it."""
    accumulate_grad_batches: PositiveInt = 1
    """How many batches make one update. Its gradient is that of one batch with all their examples."""
    max_grad_norm: PositiveFloat | None = None
    """Scale the gradient down to this norm if it is larger. None disables clipping."""
    lr_scheduler_interval: Literal["step", "epoch"] = "step"
    """When the learning-rate scheduler steps."""
    patience: PositiveInt | None = None
    """Stop after this many epochs without a better validation loss. None trains for all epochs."""
    run_dir: Path | None = None
    """The folder for the curves and checkpoints of this run. None writes neither."""
    resume_from_checkpoint: bool = False
    """Continue the run in run_dir exactly as if it had never stopped. If there is none, begin it."""
    checkpoint_every_n_steps: PositiveInt | None = None
    """Write a checkpoint every so many optimizer steps, and always after each epoch."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints to keep, besides the best."""
    on_disk_error: Literal["continue", "stop"] = "continue"
    """What to do if a checkpoint or a curve cannot be written: warn and try again later, or stop."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do if a loss or gradient is NaN or infinite: stop, skip that update, or load the last checkpoint and
    continue with the next batches."""
    nonfinite_limit: PositiveInt = 10
    """Stop if more than so many updates of one epoch are not finite."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: each process holds the whole model (ddp) or a shard of it (fsdp)."""
    loader_warning_seconds: PositiveFloat = 60.0
    """Warn if a loader gives no batch for so long."""
    log_every_n_steps: PositiveInt = 10
    """Add points to the training curves every so many optimizer steps."""
    histograms_every_n_epochs: PositiveInt | None = 5
    """Add histograms of weights and gradients every so many epochs. None adds none."""
    progress_bar: bool = True
    """Show a progress bar if the output is a terminal."""

    not_hyperparameters: ClassVar[frozenset[str]] = frozenset(
        {
            "settings",
            "device",
            "compile",
            "run_dir",
            "resume_from_checkpoint",
            "checkpoint_every_n_steps",
            "keep_last",
            "on_disk_error",
            "strategy",
            "loader_warning_seconds",
            "log_every_n_steps",
            "histograms_every_n_epochs",
            "progress_bar",
        }
    )
    """The settings that do not change what is learned."""
    changeable_on_resume: ClassVar[frozenset[str]] = not_hyperparameters | {
        "max_epochs",
        "patience",
        "on_nonfinite",
        "nonfinite_limit",
    }
    """The settings in which a resumed run may differ from the original one."""

    @field_validator("device")
    @classmethod
    def _device_exists(cls, name: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
            raise ValueError("Input should be 'auto', 'cpu', 'cuda' or 'cuda:N'")
        devices = torch.cuda.device_count()
        if name.startswith("cuda") and (torch.device(name).index or 0) >= devices:
            raise ValueError(f"torch finds {devices} CUDA devices here")
        return name

    @model_validator(mode="after")
    def _resume_needs_run_dir(self) -> Self:
        if self.resume_from_checkpoint and self.run_dir is None:
            raise ValueError("resume_from_checkpoint needs run_dir, the folder of the run to continue")
        return self

    def torch_device(self) -> torch.device:
        """Return the device to train on."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if self.device == "auto" else self.device)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:  # set by torchrun
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return device


class TaskSettings(TrainingSettings):
    """The options that all training scripts share."""

    data: Path | None = None
    """The data; by default those that come with this script."""
    model: Literal["manualgrad", "torch"] = "manualgrad"
    """The layers: those of manualgrad.nn, or those of torch.nn with the same initial weights."""
    batch_size: PositiveInt = 128
    """Examples per batch."""
    learning_rate: PositiveFloat = 2e-3
    """The highest learning rate of the one-cycle schedule."""
    weight_decay: NonNegativeFloat = 0.01
    """The weight decay of AdamW."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Scale the gradient down to this norm if it is larger. None disables clipping."""
    run_dir: Path | None = None
    """The folder for the curves and checkpoints; by default a new one under runs/."""
    log_every_n_steps: PositiveInt = 25
    """Add points to the training curves every so many optimizer steps."""

    # The one-cycle schedule depends on the number of epochs, so a resumed run must have the same.
    changeable_on_resume: ClassVar[frozenset[str]] = TrainingSettings.changeable_on_resume - {"max_epochs"}

    task: ClassVar[str] = "task"
    """The first part of the name of a run's folder."""

    def resolved(self) -> Self:
        """Return these settings, with values for those that depend on others by default."""
        name = f"{self.task}-{self.model}-seed{self.seed}-{datetime.now():%Y%m%d-%H%M%S}"
        return self.model_copy(update={"run_dir": self.run_dir or Path("runs", name)})

    @property
    def layers(self) -> Any:
        """The module with the layers and losses: manualgrad.nn or torch.nn."""
        return manualgrad.nn if self.model == "manualgrad" else torch.nn

    def one_cycle(self, model: torch.nn.Module, batches: int) -> tuple[AdamW, OneCycleLR]:
        """Return AdamW and its one-cycle schedule, for so many batches per epoch."""
        optimizer = AdamW(model.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        per_step = self.lr_scheduler_interval == "step"
        steps = self.max_epochs * (math.ceil(batches / self.accumulate_grad_batches) if per_step else 1)
        return optimizer, OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
