"""What a run leaves for TensorBoard: every curve and card and its name, in one place.

    loss/train              the loss of one update
    loss/train_epoch        its mean over an epoch, while the weights change
    loss/validation_epoch   its mean over the validation data, after the epoch
    <metric>/...            the same for each metric
    optimizer/...           the learning rate, and the norm of the gradient before clipping
    speed/...               examples per second
    weights/...             a histogram of each parameter
    weights_gradient/...    a histogram of its gradient, after clipping
    summary/...             the final figures, which are also the columns of the hparams tab, and a text card
    settings                a text card
    gradient_flow           a picture: the norm of each layer's gradient, from the loss back to the input
    saved_bytes             a card and a picture: what each layer keeps for the backward
    custom scalars          the loss and each metric, training and validation together

The step of every point is the number of updates done, so that all the curves share one axis. Whatever is
written after a checkpoint has a later step than the checkpoint: a resumed run purges the later steps, and
every point is there once. Points wait in memory until they are handed to the operating system, which is before
every checkpoint: what a full disk refuses is written when there is room again.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from manualgrad.meter import TENSORBOARD_LENGTH, TENSORBOARD_MAX_BARS, add_pil_image, bar_chart, saved_bytes

from .checkpoint import CheckpointError
from .processes import whole
from .progress import warn
from .settings import TrainingSettings

Point = tuple[int, Callable[[SummaryWriter], object]]
"""Its step, and how to write it."""

_FLUSH_EVERY = 5.0
"""Seconds after which points are handed on even if no checkpoint is due, for those who look."""


class TrainingLog:
    """The TensorBoard files of one run; without a folder every method does nothing.

    Args:
        folder: the run folder, or None.
        step: the first step of this log: the points from there on, of a run cut short, are purged.
        go_on: speak on stderr of what cannot be written, rather than raise.
    """

    def __init__(self, folder: Path | None, step: int, go_on: bool = True) -> None:
        self.folder, self.go_on = folder, go_on
        self._next = step  # where the next file begins
        self._waiting: list[Point] = []
        self._newest: list[Point] = []  # of those handed on, the ones of the last step
        self._writer: SummaryWriter | None = None
        self._flushed = time.monotonic()
        self._before = threading.excepthook

    def _on_exception(self, args: Any) -> None:
        """The writer has a thread, whose error `flush` is told: no need for a traceback."""
        if not (isinstance(args.exc_value, OSError) and "event_file_writer" in type(args.thread).__module__):
            self._before(args)

    def __enter__(self) -> "TrainingLog":
        threading.excepthook = self._on_exception
        self.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()
        threading.excepthook = self._before

    def flush(self) -> None:
        """Hand every point to the operating system: no checkpoint may be ahead of the curves.

        Raises:
            CheckpointError: unless `go_on`, if that cannot be.
        """
        if self.folder is None:
            return
        self._flushed = time.monotonic()
        try:
            if self._writer is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                _wait_for_a_later_name(self.folder)
                self._writer = SummaryWriter(self.folder, purge_step=self._next)
            for _, write in self._waiting:
                write(self._writer)
            self._writer.flush()
        except OSError as error:
            self._writer = None  # its thread has ended; all of the steps that wait is written anew, by another
            if self._waiting:
                self._next = self._waiting[0][0]
                self._waiting = [point for point in self._newest if point[0] >= self._next] + self._waiting
                self._newest = []
            message = f"{self.folder}: curves cannot be written ({error.strerror or error})"
            if not self.go_on:
                raise CheckpointError(f"{message}. Make room, or make the folder writable, and resume") from error
            warn(f"{message}: they wait in memory")
        else:
            if self._waiting:
                last = self._waiting[-1][0]
                self._newest = [point for point in self._newest + self._waiting if point[0] == last]
            self._waiting = []

    def purge(self, step: int) -> None:
        """Forget the points from `step` on: training has gone back."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
        self._writer, self._next, self._newest = None, step, []
        self.flush()

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
        if self.folder is not None:
            card = f"| setting | value |\n|---|---|\n{rows}\n\n{_verbatim(model)}\n\n{_verbatim(optimizer)}"
            self.add(step, lambda writer: writer.add_text("settings", card, step))

    def layout(self, names: Iterable[str], step: int) -> None:
        """Lay the loss and the metrics out in the custom scalars tab, training and validation in one chart."""
        charts = {name: ["Multiline", [f"{name}/train_epoch", f"{name}/validation_epoch"]] for name in names}
        part = custom_scalars({"training and validation": charts})
        self.add(step, lambda writer: writer._get_file_writer().add_summary(part, step))

    def saved_bytes(self, model: nn.Module, input: Tensor, step: int) -> None:
        """Add what each layer keeps for the backward of a batch."""
        if self.folder is not None:
            kept = saved_bytes(model, input)
            self.add(step, lambda writer: kept.log(writer, step=step))

    def update(
        self, means: Mapping[str, float], norm: float, optimizer: Optimizer, speed: float, step: int
    ) -> dict[str, float]:
        """Add the loss and metrics of one update, what the optimizer did, and the examples per second.

        Returns:
            The points by tag, for `points`.
        """
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        groups = [f"_group{number}" if len(rates) > 1 else "" for number in range(len(rates))]
        points = {f"optimizer/learning_rate{group}": rate for group, rate in zip(groups, rates, strict=True)}
        points |= {"optimizer/gradient_norm": norm, "speed/examples_per_second": speed}
        points |= {f"{name}/train": mean for name, mean in means.items()}
        self.points(points, step)
        if time.monotonic() - self._flushed > _FLUSH_EVERY:
            self.flush()
        return points

    def points(self, points: Mapping[str, float], step: int) -> None:
        """Add points by tag."""
        if self.folder is not None and points:  # in one event: SummaryWriter.add_scalar takes five times as long
            part = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()])
            now = time.time()
            self.add(step, lambda writer: writer._get_file_writer().add_summary(part, step, now))

    def epoch(self, split: str, means: Mapping[str, float], step: int) -> None:
        """Add the mean loss and metrics of an epoch, on the "train" or "validation" data."""
        self.points({f"{name}/{split}_epoch": mean for name, mean in means.items()}, step)

    def histograms(self, model: nn.Module, step: int) -> None:
        """Add the distribution of every parameter and of its gradient, and the picture of the gradient's flow."""
        norms: dict[str, float] = {}
        for name, parameter in model.named_parameters():
            for tag, tensor in ((f"weights/{name}", parameter), (f"weights_gradient/{name}", parameter.grad)):
                if tensor is not None and tensor.numel():
                    values = whole(tensor.detach()).to_dense().float()  # numpy has neither sparse nor bfloat16
                    if values.isfinite().all():  # which a gradient that overflowed float16 is not
                        now = values.cpu().clone()
                        add = partial(SummaryWriter.add_histogram, tag=tag, values=now, global_step=step)
                        self.add(step, add)
                        if tensor is parameter.grad:
                            norms[name] = values.norm().item()
        if self.folder is not None and norms:
            flow = [(layer, [norm]) for layer, norm in reversed(_by_layer(norms).items())]
            picture = bar_chart(flow, ["gradient's norm, loss to input"], "{:.2g}".format, TENSORBOARD_LENGTH)
            self.add(step, lambda writer: add_pil_image(writer, "gradient_flow", picture, step))

    def summary(self, settings: TrainingSettings, figures: Mapping[str, float], step: int) -> None:
        """Add the final figures, and the row of this run in the hparams tab."""
        rows = "\n".join(f"| {name.replace('_', ' ')} | {figure:.6g} |" for name, figure in figures.items())
        self.add(step, lambda writer: writer.add_text("summary", f"| figure | value |\n|---|---:|\n{rows}", step))
        figures = {f"summary/{name}": figure for name, figure in figures.items()}
        chosen = settings.model_dump(exclude=set(settings.bookkeeping))
        numbers = (int, float, type(None))
        row = {name: value if type(value) in numbers else str(value) for name, value in chosen.items()}
        for part in hparams(row, figures):  # add_hparams would make it a run of its own, apart from the curves
            self.add(step, lambda writer, part=part: writer._get_file_writer().add_summary(part))
        self.points(figures, step)

    def add(self, step: int, write: Callable[[SummaryWriter], object]) -> None:
        """Add something of one's own: what `write` does with a writer, some time later and perhaps again."""
        if self.folder is not None:
            self._waiting.append((step, write))


def _by_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """The norms of the gradients of parameters as those of their layers, or of the modules around them where there
    are more layers than a picture can show."""
    found: dict[str, float] = {}
    for depth in range(max(name.count(".") for name in norms), 0, -1):
        found = {}
        for name, norm in norms.items():
            layer = ".".join(name.split(".")[:-1][:depth]) or "model"
            found[layer] = math.hypot(found.get(layer, 0), norm)
        if len(found) <= TENSORBOARD_MAX_BARS:
            break
    return found or dict(norms)


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads the files of a run by name, in which the time counts whole seconds: let one pass."""
    names = [path.name for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(name.split(".")[3]) for name in names), default=0)
    latest = time.monotonic() + 5  # the clock may have been set back, and by any time
    while int(time.time()) <= newest and time.monotonic() < latest:
        time.sleep(0.01)
    if int(time.time()) <= newest:
        warn(f"{folder}: the clock is behind the newest file of curves: TensorBoard may order the points wrongly")


def _verbatim(thing: object) -> str:
    """Markdown that shows `thing` as it prints."""
    return "\n".join(f"    {line}" for line in str(thing).splitlines())
