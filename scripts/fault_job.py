"""A small training job for scripts/faults.py, its processes, and comparisons of what runs leave behind.

python scripts/fault_job.py --help
"""

import atexit
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.data import DataLoader, Dataset

import manualgrad.nn
from manualgrad.training import (
    CheckpointError,
    Interrupted,
    NonFiniteError,
    Trainer,
    TrainingSettings,
    checkpoint,
    parse_settings,
)

Found = TypeVar("Found")
TIMEOUT = 180
"""Seconds after which a process without progress counts as hanging."""


class Failure(AssertionError):
    """A check failed."""


def expect(condition: object, message: str) -> None:
    if not condition:
        raise Failure(message)


# The job


class Job(TrainingSettings):
    """A small job with everything that a resume has to restore: noise, order, dropout, batch norm, a scheduler."""

    layers: Literal["manualgrad", "torch", "converted", "compiled"] = "manualgrad"
    """manualgrad.nn, torch.nn, or torch.nn after manualgrad.convert or torch.compile."""
    plain: bool = False
    """float64, without noise, dropout and batch norm: these depend on how a batch is split over processes."""
    rows: PositiveInt = 250
    """Rows of the training data; validation has a fifth as many."""
    batch_size: PositiveInt = 16
    """Rows per batch."""
    width: PositiveInt = 16
    """Units of each hidden layer."""
    workers: NonNegativeInt = 2
    """Worker processes of the training loader."""
    pause: NonNegativeFloat = 0.0
    """Seconds to sleep in the loss of each training batch."""
    max_epochs: PositiveInt = 5
    """How many times to go through the training data."""
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """The precision of autocast."""
    accumulate_grad_batches: PositiveInt = 2
    """How many batches make one update."""
    checkpoint_every_n_steps: PositiveInt | None = 3
    """Write a checkpoint every so many optimizer steps, and always after each epoch."""
    log_every_n_steps: PositiveInt = 1
    """Add points to the training curves every so many optimizer steps."""
    histograms_every_n_epochs: PositiveInt | None = 2
    """Add histograms of weights and gradients every so many epochs."""

    not_hyperparameters: ClassVar[frozenset[str]] = TrainingSettings.not_hyperparameters | {"workers", "pause"}
    changeable_on_resume: ClassVar[frozenset[str]] = TrainingSettings.changeable_on_resume | {"workers", "pause"}


TOTAL_BATCHES = Job().max_epochs * math.ceil(Job().rows / Job().batch_size)
"""Batches of the default job, over all epochs."""


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Eight columns, and a target that a small network can learn."""

    def __init__(self, rows: int, plain: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, 8, generator=generator, dtype=torch.float64 if plain else torch.float32)
        self.y = self.x[:, :1].sin() + self.x[:, 1:2] * self.x[:, 2:3]
        self.noise = 0.0 if plain else 0.1

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        if self.noise:  # drawn at each access, like an augmentation
            return self.x[row] + self.noise * (torch.randn(8) + random.random()), self.y[row]
        return self.x[row], self.y[row]


def network(job: Job) -> nn.Module:
    """Return a network with two hidden blocks. Its initial weights do not depend on `job.layers`."""
    layers: Any = manualgrad.nn if job.layers == "manualgrad" else nn
    torch.manual_seed(0)

    def block(inputs: int) -> nn.Module:
        norm = layers.LayerNorm(job.width) if job.plain else layers.BatchNorm1d(job.width)
        dropout = layers.Dropout(0.0 if job.plain else 0.2)
        return nn.Sequential(layers.Linear(inputs, job.width), norm, layers.GELU(), dropout)

    model = nn.Sequential(nn.Sequential(block(8), block(job.width)), layers.Linear(job.width, 1))
    model.to(torch.float64 if job.plain else torch.float32)
    if job.layers == "converted":
        manualgrad.convert(model)
    # dynamic=False: by default the program for a batch size depends on the sizes compiled before it, and a resumed
    # run compiles other sizes first.
    return torch.compile(model, dynamic=False) if job.layers == "compiled" else model  # pyright: ignore


def trainer(
    job: Job, model: nn.Module | None = None, batches: Any = None, on_batch: Callable[[], object] = lambda: None
) -> Trainer:
    """Return the trainer of the job, or of another model and other batches. Each batch calls `on_batch`."""
    model = network(job) if model is None else model
    mean_squared_error = nn.MSELoss() if job.layers == "torch" else manualgrad.nn.MSELoss()

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.requires_grad:
            on_batch()
            time.sleep(job.pause)
        return mean_squared_error(prediction, target)

    def absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs().mean()

    data = Rows(job.rows, job.plain, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    return Trainer(
        model,
        loss,
        optimizer,
        batches or DataLoader(data, job.batch_size, shuffle=True, num_workers=job.workers),
        DataLoader(Rows(job.rows // 5, job.plain, seed=2), 64),
        settings=job,
        lr_scheduler=CosineAnnealingLR(optimizer, 50),
        metrics={"absolute_error": absolute_error},
    )


def main() -> None:
    """Train. Prints the process id, a line for each batch, and at the end the result as JSON."""
    torch.set_num_threads(1)
    job = parse_settings(Job)
    print("ready", os.getpid(), flush=True)
    try:
        result = trainer(job, on_batch=lambda: print("batch", flush=True)).fit()
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(interrupted.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except (CheckpointError, NonFiniteError, OSError) as error:
        sys.exit(f"error: {error}")
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(asdict(result)))


# Its processes


class Run:
    """The job in a run folder, started any number of times with the same command.

    Args:
        folder: the run folder. The files of stdout and stderr are next to it.
        processes: the number of processes under torchrun, with three restarts; 0 for no torchrun.
        options: fields of the job.
    """

    def __init__(self, folder: Path, processes: int = 0, **options: Any) -> None:
        self.folder, self.processes, self.options = folder, processes, options
        self.output, self.errors = folder.with_suffix(".out"), folder.with_suffix(".err")
        self.process: subprocess.Popen[bytes]
        self.start_time = 0.0

    def job(self) -> Job:
        options = {"progress_bar": False, **self.options}
        return Job(run_dir=self.folder, resume_from_checkpoint=True, **options)

    def start(self) -> Self:
        """Begin or resume the run. Returns when python and torch are loaded."""
        command = [sys.executable]
        if self.processes:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
            command += ["--max-restarts=3"]
        command += [__file__]
        for name, value in self.job().model_dump(mode="json", exclude_unset=True).items():
            flag = name.replace("_", "-")
            negation = "" if value else "no-"
            command += [f"--{negation}{flag}" if isinstance(value, bool) else f"--{flag}={value}"]
        self.start_time = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by nohup; the job would inherit it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=errors, start_new_session=True
            )
        atexit.register(self.kill)
        self.wait_for(lambda: len(self.pids()) >= max(1, self.processes))
        return self

    def pids(self) -> list[int]:
        """Return the ids of the training processes, those restarted by torchrun last."""
        return [int(pid) for pid in re.findall(r"^ready (\d+)$", self.output.read_text(), re.MULTILINE)]

    def batches(self) -> int:
        """Return the number of batches since the start, including the current one, of all processes together."""
        return len(re.findall(r"^batch$", self.output.read_text(), re.MULTILINE))

    def wait_for_batch(self, batch: int, fraction: float) -> bool:
        """Wait until the run is inside of this batch, counted from 1 since the start.

        Args:
            fraction: how far inside, as a fraction of the time of the previous batch. The wait ends with the
                batch.

        Returns:
            False if the run ended before.
        """
        duration = 0.0
        for number in (batch - 1, batch):
            begin = time.monotonic()
            while self.batches() < number:
                if self.process.poll() is not None:
                    return False
                expect((duration := time.monotonic() - begin) < TIMEOUT, "the run hangs")
                time.sleep(0.0005)
        end = time.monotonic() + fraction * duration
        while time.monotonic() < end and self.batches() == batch:
            time.sleep(0.0002)
        return self.process.poll() is None

    def wait_for(self, condition: Callable[[], Found]) -> Found:
        """Wait until the condition is true, and return its value."""
        deadline = time.monotonic() + TIMEOUT
        while not (found := condition()):
            status = self.process.poll()
            expect(status is None, f"the run ended with status {status}: {self.stderr()}")
            expect(time.monotonic() < deadline, "the run hangs")
            time.sleep(0.0005)
        return found

    def kill(self) -> None:
        """Send SIGKILL to the training processes and torchrun. The loader's workers then exit by themselves."""
        if self.process.poll() is None:
            for pid in (self.process.pid, *self.pids()[-self.processes :]):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> Self:
        """Wait until the run ends, and expect status 0."""
        status = self.process.wait(TIMEOUT)
        expect(status == 0, f"the run ended with status {status}: {self.stderr()}")
        return self

    def stderr(self) -> str:
        return self.errors.read_text().strip()

    def checkpoints(self) -> list[Path]:
        """Return the step checkpoints, the oldest first."""
        return checkpoint.list_checkpoints(self.folder)[::-1]

    def step(self) -> int:
        """Return the step of the newest checkpoint, or 0."""
        return int(self.checkpoints()[-1].stem.removeprefix("step-")) if self.checkpoints() else 0

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written, or was when the process was killed."""
        with suppress(FileNotFoundError):  # the file was renamed just now
            return any(path.stat().st_mtime > self.start_time for path in self.folder.glob(".*"))
        return False

    def expect_intact_checkpoints(self) -> None:
        expect(self.checkpoints(), "there is no checkpoint")
        for path in (*self.checkpoints(), *self.folder.glob("best.pt")):
            checkpoint.load(path)

    def outcome(self) -> dict[str, Any]:
        """Return everything that a finished run leaves: result, checkpoints, curves, names of files."""
        return {
            "result": json.loads(self.output.read_text().splitlines()[-1]),
            "newest": checkpoint.load(self.checkpoints()[-1]),
            "best": checkpoint.load(self.folder / "best.pt"),
            "curves": read_points(self.folder),
            "files": {p.name: True for p in self.folder.iterdir() if not p.name.startswith("events.")},
        }

    def expect_same_outcome(self, undisturbed: "Run") -> None:
        """Expect the outcome of an undisturbed run, to the last bit."""
        expected = undisturbed.outcome()
        if found := differences(self.outcome(), expected):
            raise Failure(f"{len(found)} differences from the undisturbed run: {found[0]}")


def undisturbed_run(folder: Path, **options: Any) -> Run:
    """Run the job in this process to its end."""
    run = Run(folder, **options)
    run.output.write_text(json.dumps(asdict(trainer(run.job()).fit())))
    return run


# Comparisons


def differences(found: Any, expected: Any) -> list[str]:
    """Return where two nested containers differ. Tensors are compared by dtype, shape and bits, the rest by
    value."""
    a, b = (dict(tree_flatten_with_path(value)[0]) for value in (found, expected))
    return [
        f"{keystr(path)} is {a.get(path, 'absent')!r}, not {b.get(path, 'absent')!r}"
        for path in {**b, **a}
        if path not in a or path not in b or not _same_bits(a[path], b[path])
    ]


def _same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_type = (a.dtype, a.shape) == (b.dtype, b.shape)
        return same_type and torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))
    return type(a) is type(b) and a == b


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) points of every curve that TensorBoard shows of a run."""
    events = _read_events(folder)
    return {tag: [(p.step, p.value) for p in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_points(folder: Path) -> dict[str, Any]:
    """Return every point of curves and histograms, by tag and step; of speeds only the steps.

    Raises:
        Failure: if TensorBoard shows a point twice.
    """
    events, found = _read_events(folder), {}
    points: list[tuple[str, int, Any]] = [(t, *p) for t, curve in read_scalars(folder).items() for p in curve]
    for tag in events.Tags()["histograms"]:
        points += [(tag, event.step, event.histogram_value) for event in events.Histograms(tag)]
    for tag, step, value in points:
        name = f"{tag} at {step}"
        expect(name not in found, f"TensorBoard shows {name} twice")
        found[name] = None if tag.startswith("speed/") else value
    return found


def _read_events(folder: Path) -> EventAccumulator:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it logs each restart of a run
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


if __name__ == "__main__":
    main()
