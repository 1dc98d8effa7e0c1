"""The settings of a training run."""

import os
import re
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

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
            "device",
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
