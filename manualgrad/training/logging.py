"""What a run leaves for TensorBoard: every curve and card and its name, in one place.

    loss/train              the loss of one update
    loss/train_epoch        its mean over an epoch, while the weights change
    loss/validation_epoch   its mean over the validation data, after the epoch
    <metric>/...            the same for each metric
    optimizer/...           the learning rate, and the norm of the gradient before clipping
    speed/...               examples per second
    weights/...             a histogram of each parameter
    weights_gradient/...    a histogram of its gradient, after clipping
    summary/...             the final figures, which are also the columns of the hparams tab
    settings                a text card

The step of every point is the number of updates done, so that all the curves share one axis. Whatever is
written after a checkpoint has a later step than the checkpoint: a resumed run purges the later steps, and
every point is there once.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from .settings import TrainingSettings


class TrainingLog:
    """The TensorBoard files of one run; without a folder every method does nothing.

    Args:
        folder: the run folder, or None.
        step: updates done already; the points after it, of a run cut short, are purged.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self.writer = None
        if folder is not None:
            _wait_for_a_later_name(folder)
            self.writer = SummaryWriter(folder, purge_step=step + 1)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def flush(self) -> None:
        """Hand every point to the operating system: no checkpoint may be ahead of the curves."""
        if self.writer is not None:
            self.writer.flush()

    def settings(
        self,
        settings: TrainingSettings,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        step: int,
    ) -> None:
        """Add the card with every setting, the optimizer and the model."""
        size = sum(parameter.numel() for parameter in model.parameters())
        facts = {**dict(settings), "device": device, "parameters": f"{size:,}", "torch": torch.__version__}
        names = sorted(facts, key=lambda name: name in settings.bookkeeping)  # what matters first
        rows = "\n".join(f"| {name.replace('_', ' ')} | {facts[name]} |" for name in names)
        if self.writer is not None:
            card = f"| setting | value |\n|---|---|\n{rows}\n\n{_verbatim(model)}\n\n{_verbatim(optimizer)}"
            self.writer.add_text("settings", card, step)

    def update(
        self, means: Mapping[str, float], norm: float, optimizer: Optimizer, speed: float, step: int
    ) -> None:
        """Add the loss and metrics of one update, what the optimizer did, and the examples per second."""
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        for number, rate in enumerate(rates):
            group = f"_group{number}" if len(rates) > 1 else ""
            self._scalar(f"optimizer/learning_rate{group}", rate, step)
        self._scalar("optimizer/gradient_norm", norm, step)
        self._scalar("speed/examples_per_second", speed, step)
        for name, mean in means.items():
            self._scalar(f"{name}/train", mean, step)

    def epoch(self, split: str, means: Mapping[str, float], step: int) -> None:
        """Add the mean loss and metrics of an epoch, on the "train" or "validation" data."""
        for name, mean in means.items():
            self._scalar(f"{name}/{split}_epoch", mean, step)

    def histograms(self, model: nn.Module, step: int) -> None:
        """Add the distribution of every parameter and of its gradient."""
        if self.writer is None:
            return
        for name, parameter in model.named_parameters():
            for tag, tensor in ((f"weights/{name}", parameter), (f"weights_gradient/{name}", parameter.grad)):
                if tensor is not None and tensor.numel():
                    values = tensor.detach().to_dense().float()  # numpy has neither sparse nor bfloat16
                    if values.isfinite().all():  # which a gradient that overflowed float16 is not
                        self.writer.add_histogram(tag, values, step)

    def summary(self, settings: TrainingSettings, figures: Mapping[str, float], step: int) -> None:
        """Add the final figures, and the row of this run in the hparams tab."""
        if self.writer is None:
            return
        figures = {f"summary/{name}": figure for name, figure in figures.items()}
        chosen = settings.model_dump(exclude=set(settings.bookkeeping))
        numbers = (int, float, type(None))
        row = {name: value if type(value) in numbers else str(value) for name, value in chosen.items()}
        for part in hparams(row, figures):  # add_hparams would make it a run of its own, apart from the curves
            self.writer._get_file_writer().add_summary(part)
        for tag, figure in figures.items():
            self._scalar(tag, figure, step)

    def _scalar(self, tag: str, value: float, step: int) -> None:
        if self.writer is not None:
            self.writer.add_scalar(tag, value, step)


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads the files of a run by name, in which the time counts whole seconds: let one pass."""
    names = [path.name for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(name.split(".")[3]) for name in names), default=0)
    while int(time.time()) == newest:
        time.sleep(0.01)


def _verbatim(thing: object) -> str:
    """Markdown that shows `thing` as it prints."""
    return "\n".join(f"    {line}" for line in str(thing).splitlines())
