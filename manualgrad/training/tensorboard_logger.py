"""What a run writes for TensorBoard: every curve and card and its name, in one place.

    loss/train              the loss of one update
    loss/train_epoch        its mean over an epoch, while the weights change
    loss/validation_epoch   its mean over the validation data, after the epoch
    <metric>/...            the same for each metric
    optimizer/...           the learning rate, and the norm of the gradient before clipping
    speed/...               examples per second
    weights/...             a histogram of each parameter
    weights_gradient/...    a histogram of its gradient, after clipping
    summary/...             the final metrics, which are also the columns of the hparams tab, and a text card
    settings                a text card
    gradient_flow           a picture: the norm of each layer's gradient, from the loss to the input
    saved_bytes             a card and a picture: the bytes that each layer saves for backward
    program                 a card: forward and backward as one Python program, if `log_program` is called
    graphs                  the model's operations, likewise
    custom scalars          the loss and each metric, training and validation in one chart

The step of every point is the number of optimizer steps done, so all curves share one axis. Points written after a
checkpoint have a later step than the checkpoint: a resumed run purges the later steps, so every point is there
once. Points wait in memory until `flush` hands them to the operating system, before every checkpoint. If the disk
is full they stay in memory until there is room.
"""

import math
import threading
import time
import warnings
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

from manualgrad.conversion import reverted
from manualgrad.meter import TENSORBOARD_LENGTH, TENSORBOARD_MAX_BARS, add_pil_image, bar_chart, saved_bytes
from manualgrad.program import export

from .distributed import full_tensor
from .serialization import CheckpointError
from .settings import TrainingSettings
from .state import warn

Event = tuple[int, Callable[[SummaryWriter], object]]
"""A step, and a function that writes with a SummaryWriter."""

_FLUSH_SECONDS = 5.0
"""How often points are flushed between two checkpoints, for those who watch the run."""


class TensorBoardLogger:
    """Writes the TensorBoard files of one run. Without a folder every method does nothing.

    Args:
        folder: the run folder, or None.
        step: the first step of this log. Older points from this step on are purged.
        ignore_disk_errors: warn on stderr when points cannot be written, instead of raising.
    """

    def __init__(self, folder: Path | None, step: int, ignore_disk_errors: bool = True) -> None:
        self.folder, self.ignore_disk_errors = folder, ignore_disk_errors
        self._purge_step = step  # of the next file
        self._pending: list[Event] = []
        self._flushed_last_step: list[Event] = []
        self._writer: SummaryWriter | None = None
        self._flush_time = time.monotonic()
        self._previous_hook = threading.excepthook
        self._rate_time, self._rate_examples = time.perf_counter(), 0

    def _on_exception(self, args: Any) -> None:
        """Print no traceback for an OSError in the thread of the SummaryWriter: `flush` raises it too."""
        if not (isinstance(args.exc_value, OSError) and "event_file_writer" in type(args.thread).__module__):
            self._previous_hook(args)

    def __enter__(self) -> "TensorBoardLogger":
        threading.excepthook = self._on_exception
        self.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()
        threading.excepthook = self._previous_hook

    def flush(self) -> None:
        """Hand all points to the operating system. This comes before a checkpoint, so that a kill loses no points.

        Raises:
            CheckpointError: if they cannot be written, unless `ignore_disk_errors`.
        """
        if self.folder is None:
            return
        self._flush_time = time.monotonic()
        try:
            if self._writer is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                _wait_for_later_file_name(self.folder)
                self._writer = SummaryWriter(self.folder, purge_step=self._purge_step)
            for _, write in self._pending:
                write(self._writer)
            self._writer.flush()
        except OSError as error:
            self._writer = None  # its thread has ended; another one purges the pending steps and writes them again
            if self._pending:
                self._purge_step = self._pending[0][0]
                again = [event for event in self._flushed_last_step if event[0] >= self._purge_step]
                self._pending, self._flushed_last_step = again + self._pending, []
            message = f"{self.folder}: curves cannot be written ({error.strerror or error})"
            if not self.ignore_disk_errors:
                raise CheckpointError(f"{message}. Make room, or make the folder writable, and resume") from error
            warn(f"{message}: the points stay in memory for now")
        else:
            if self._pending:
                last = self._pending[-1][0]
                self._flushed_last_step = [
                    event for event in self._flushed_last_step + self._pending if event[0] == last
                ]
            self._pending = []

    def purge(self, step: int) -> None:
        """Remove the points from `step` on, after a rollback."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
        self._writer, self._purge_step, self._flushed_last_step = None, step, []
        self.flush()

    def log_settings(
        self,
        settings: TrainingSettings,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        step: int,
    ) -> None:
        """Add a card with all settings, the optimizer and the model."""
        size = sum(parameter.numel() for parameter in model.parameters())
        facts = {**dict(settings), "device": device, "parameters": f"{size:,}", "torch": torch.__version__}
        names = sorted(facts, key=lambda name: name in settings.not_hyperparameters)
        rows = "\n".join(f"| {name.replace('_', ' ')} | {facts[name]} |" for name in names)
        if self.folder is not None:
            card = f"| setting | value |\n|---|---|\n{rows}\n\n{_verbatim(model)}\n\n{_verbatim(optimizer)}"
            self.add(step, lambda writer: writer.add_text("settings", card, step))

    def log_layout(self, names: Iterable[str], step: int) -> None:
        """Show training and validation in one chart for the loss and each metric, in the custom scalars tab."""
        charts = {name: ["Multiline", [f"{name}/train_epoch", f"{name}/validation_epoch"]] for name in names}
        part = custom_scalars({"training and validation": charts})
        self.add(step, lambda writer: writer._get_file_writer().add_summary(part, step))

    def log_saved_bytes(self, model: nn.Module, input: Tensor, step: int) -> None:
        """Add the bytes that each layer saves for the backward of a batch."""
        if self.folder is not None:
            saved = saved_bytes(model, input)
            self.add(step, lambda writer: saved.log(writer, step=step))

    def log_program(self, model: nn.Module, input: Tensor, step: int) -> None:
        """Add the model's forward and backward as one Python program (see `manualgrad.export`), and its graph."""
        if self.folder is None:
            return
        code = export(model, (input,)).code

        def write(writer: SummaryWriter) -> None:
            writer.add_text("program", _verbatim(code), step)
            with reverted(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
                writer.add_graph(model, input)

        self.add(step, write)

    def start_epoch(self, examples: int) -> None:
        """Start measuring the speed; `examples` is the number of examples in this epoch so far."""
        self._rate_time, self._rate_examples = time.perf_counter(), examples

    def log_update(
        self, means: Mapping[str, float], norm: float, optimizer: Optimizer, examples: int, step: int
    ) -> dict[str, float]:
        """Add the loss and metrics of one update, the gradient's norm, the learning rate, and the examples per
        second.

        Args:
            examples: the number of examples in this epoch so far.

        Returns:
            The points by tag, for `log_scalars`.
        """
        speed = (examples - self._rate_examples) / (time.perf_counter() - self._rate_time)
        self.start_epoch(examples)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        groups = [f"_group{number}" if len(rates) > 1 else "" for number in range(len(rates))]
        points = {f"optimizer/learning_rate{group}": rate for group, rate in zip(groups, rates, strict=True)}
        points |= {"optimizer/gradient_norm": norm, "speed/examples_per_second": speed}
        points |= {f"{name}/train": mean for name, mean in means.items()}
        self.log_scalars(points, step)
        if time.monotonic() - self._flush_time > _FLUSH_SECONDS:
            self.flush()
        return points

    def log_scalars(self, points: Mapping[str, float], step: int) -> None:
        """Add points by tag."""
        if self.folder is not None and points:  # one event: SummaryWriter.add_scalar takes five times as long
            part = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()])
            now = time.time()
            self.add(step, lambda writer: writer._get_file_writer().add_summary(part, step, now))

    def log_epoch(self, split: str, means: Mapping[str, float], step: int) -> None:
        """Add the mean loss and metrics of an epoch, on the "train" or "validation" data."""
        self.log_scalars({f"{name}/{split}_epoch": mean for name, mean in means.items()}, step)

    def log_histograms(self, model: nn.Module, step: int) -> None:
        """Add histograms of all parameters and gradients, and a picture of the gradient norms by layer."""
        norms: dict[str, float] = {}
        for name, parameter in model.named_parameters():
            for tag, tensor in ((f"weights/{name}", parameter), (f"weights_gradient/{name}", parameter.grad)):
                if tensor is not None and tensor.numel():
                    values = (
                        full_tensor(tensor.detach()).to_dense().float()
                    )  # numpy has no sparse and no bfloat16 arrays
                    if values.isfinite().all():  # not after an overflow of float16
                        copy = values.cpu().clone()
                        add = partial(SummaryWriter.add_histogram, tag=tag, values=copy, global_step=step)
                        self.add(step, add)
                        if tensor is parameter.grad:
                            norms[name] = values.norm().item()
        if self.folder is not None and norms:
            flow = [(layer, [norm]) for layer, norm in reversed(_by_layer(norms).items())]
            picture = bar_chart(flow, ["gradient's norm, loss to input"], "{:.2g}".format, TENSORBOARD_LENGTH)
            self.add(step, lambda writer: add_pil_image(writer, "gradient_flow", picture, step))

    def log_summary(self, settings: TrainingSettings, metrics: Mapping[str, float], step: int) -> None:
        """Add the final metrics, and the row of this run in the hparams tab."""
        rows = "\n".join(f"| {name.replace('_', ' ')} | {value:.6g} |" for name, value in metrics.items())
        self.add(step, lambda writer: writer.add_text("summary", f"| metric | value |\n|---|---:|\n{rows}", step))
        metrics = {f"summary/{name}": value for name, value in metrics.items()}
        chosen = settings.model_dump(exclude=set(settings.not_hyperparameters))
        numbers = (int, float, type(None))
        row = {name: value if type(value) in numbers else str(value) for name, value in chosen.items()}
        for part in hparams(row, metrics):  # SummaryWriter.add_hparams would write them as a separate run
            self.add(step, lambda writer, part=part: writer._get_file_writer().add_summary(part))
        self.log_scalars(metrics, step)

    def add(self, step: int, write: Callable[[SummaryWriter], object]) -> None:
        """Add anything else. `write` is called with a SummaryWriter, later, and possibly more than once."""
        if self.folder is not None:
            self._pending.append((step, write))


def _by_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """Combine gradient norms of parameters to those of layers, or of outer modules if a picture cannot show so
    many layers."""
    by_layer: dict[str, float] = {}
    for depth in range(max(name.count(".") for name in norms), 0, -1):
        by_layer = {}
        for name, norm in norms.items():
            layer = ".".join(name.split(".")[:-1][:depth]) or "model"
            by_layer[layer] = math.hypot(by_layer.get(layer, 0), norm)
        if len(by_layer) <= TENSORBOARD_MAX_BARS:
            break
    return by_layer or dict(norms)


def _wait_for_later_file_name(folder: Path) -> None:
    """Wait until a new file sorts after the newest one. TensorBoard reads the files of a run in the order of their
    names, which hold the time in whole seconds."""
    names = [path.name for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(name.split(".")[3]) for name in names), default=0)
    latest = time.monotonic() + 5  # give up then: the clock may have been set back by any time
    while int(time.time()) <= newest and time.monotonic() < latest:
        time.sleep(0.01)
    if int(time.time()) <= newest:
        warn(f"{folder}: the clock is behind the newest event file: TensorBoard may order the points wrongly")


def _verbatim(value: object) -> str:
    """Return Markdown that shows `str(value)` as a code block."""
    return "\n".join(f"    {line}" for line in str(value).splitlines())
