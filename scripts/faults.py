"""What becomes of a run when things go wrong, by doing it: kill it, break its files, fill its disk, and compare.

    python scripts/faults.py                             every promise of the trainer
    python scripts/faults.py --only kill --kills 1000    one of them, for longer
    python scripts/faults.py --short                     each in its shortest form

A small job, defined here, trains in processes of its own (`faults.py job --help`), and the faults come from
outside, at moments drawn from the seed that is printed; what it comes to is compared with the same job left alone.
Each promise is a function below, its text the docstring. The table says what was done and how often, and what
broke; the exit status is 1 where anything did. (Linux; a full and a read-only disk take the right to mount one.)
"""

import atexit
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
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
    CommandLine,
    Interrupted,
    NonFiniteError,
    Trainer,
    TrainingSettings,
    checkpoint,
    parse_settings,
)
from manualgrad.training.randomness import set_random_states

Found = TypeVar("Found")
HANGS = 180
"""Seconds after which a process that says nothing is taken to hang."""

# The job


class Job(TrainingSettings):
    """A small job with all that has to be put back: noise, order, dropout, batch norm, groups, a schedule."""

    layers: Literal["ours", "torch", "converted", "compiled"] = "ours"
    """Of manualgrad.nn, of torch.nn, and torch's after manualgrad.convert or torch.compile."""
    plain: bool = False
    """In float64, without noise, dropout and batch norm, whose numbers depend on how a batch is divided."""
    rows: PositiveInt = 250
    """Of the training data; a fifth as many for validation."""
    batch_size: PositiveInt = 16
    """Rows per batch."""
    width: PositiveInt = 16
    """Units in each hidden layer."""
    workers: NonNegativeInt = 2
    """Processes that load the training data."""
    pause: NonNegativeFloat = 0.0
    """Seconds by which the loss of a training batch takes longer."""
    epochs: PositiveInt = 5
    """How many times to go through the training data."""
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """The precision of autocast."""
    accumulate: PositiveInt = 2
    """How many batches make one update."""
    checkpoint_every: PositiveInt | None = 3
    """Write a checkpoint every so many updates, besides the one after each epoch."""
    log_every: PositiveInt = 1
    """Add points to the training curves every so many updates."""
    histogram_every: PositiveInt | None = 2
    """Add histograms of weights and gradients every so many epochs."""

    bookkeeping: ClassVar[frozenset[str]] = TrainingSettings.bookkeeping | {"workers", "pause"}
    free_on_resume: ClassVar[frozenset[str]] = TrainingSettings.free_on_resume | {"workers", "pause"}


BATCHES = Job().epochs * math.ceil(Job().rows / Job().batch_size)
"""Of the job, over all its epochs."""


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
        if self.noise:  # as an augmentation draws it
            return self.x[row] + self.noise * (torch.randn(8) + random.random()), self.y[row]
        return self.x[row], self.y[row]


def network(job: Job) -> nn.Module:
    """Two hidden blocks; the same weights for every kind of layers."""
    layers: Any = manualgrad.nn if job.layers == "ours" else nn
    torch.manual_seed(0)

    def block(inputs: int) -> nn.Module:
        norm = layers.LayerNorm(job.width) if job.plain else layers.BatchNorm1d(job.width)
        dropout = layers.Dropout(0.0 if job.plain else 0.2)
        return nn.Sequential(layers.Linear(inputs, job.width), norm, layers.GELU(), dropout)

    model = nn.Sequential(nn.Sequential(block(8), block(job.width)), layers.Linear(job.width, 1))
    model.to(torch.float64 if job.plain else torch.float32)
    if job.layers == "converted":
        manualgrad.convert(model)
    # For each size of a batch one program: by default what a size gets depends on the sizes seen before it, and a
    # run that goes on has seen others than one that nothing happened to.
    return torch.compile(model, dynamic=False) if job.layers == "compiled" else model  # pyright: ignore


def trainer(
    job: Job, model: nn.Module | None = None, batches: Any = None, on_batch: Callable[[], object] = lambda: None
) -> Trainer:
    """The trainer of the job, or of another model and other batches; `on_batch` is called within each of them."""
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
        schedule=CosineAnnealingLR(optimizer, 50),
        metrics={"absolute_error": absolute_error},
    )


def run_job(job: Job) -> None:
    """Train, as a script does, print a line within each batch, and at last what it came to as JSON."""
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


# Runs of it, and what is expected of them


class Broken(AssertionError):
    """A promise that was not kept."""


def expect(kept: object, otherwise: str) -> None:
    if not kept:
        raise Broken(otherwise)


class Run:
    """The job in a folder, started with one and the same command as often as need be.

    Args:
        folder: of the run; what its processes say lies beside it.
        processes: under torchrun so many, which it restarts three times; 0 without it.
        options: the fields of the job.
    """

    def __init__(self, folder: Path, processes: int = 0, **options: Any) -> None:
        self.folder, self.processes, self.options = folder, processes, options
        self.output, self.errors = folder.with_suffix(".out"), folder.with_suffix(".err")
        self.process: subprocess.Popen[bytes]
        self.started = 0.0

    def job(self) -> Job:
        return Job(run_dir=self.folder, resume=True, **{"progress": False, **self.options})

    def start(self) -> Self:
        """Begin or go on, and return when Python and torch are loaded."""
        command = [sys.executable]
        if self.processes:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
            command += ["--max-restarts=3"]
        command += [__file__, "job"]
        for name, value in self.job().model_dump(mode="json", exclude_unset=True).items():
            flag = name.replace("_", "-")
            switch = "" if value else "no-"
            command += [f"--{switch}{flag}" if isinstance(value, bool) else f"--{flag}={value}"]
        self.started = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by nohup, and the job would ignore it too
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=errors, start_new_session=True
            )
        atexit.register(self.kill)
        self.wait_for(lambda: len(self.pids()) >= max(1, self.processes))
        return self

    def pids(self) -> list[int]:
        """Those of the trainers, a torchrun's restarted ones last."""
        return [int(pid) for pid in re.findall(r"^ready (\d+)$", self.output.read_text(), re.MULTILINE)]

    def batches(self) -> int:
        """On how many it has trained since it was started, with the one it is in; of several trainers together."""
        return len(re.findall(r"^batch$", self.output.read_text(), re.MULTILINE))

    def reach(self, batch: int, part: float) -> bool:
        """Wait until it is within this batch since it was started, counted from 1, by this part of a batch's time.

        Whatever the machine does beside it, it is not waited for longer than this batch takes.

        Returns:
            False: it ended before.
        """
        duration = 0.0
        for number in (batch - 1, batch):
            begin = time.monotonic()
            while self.batches() < number:
                if self.process.poll() is not None:
                    return False
                expect((duration := time.monotonic() - begin) < HANGS, "it hangs")
                time.sleep(0.0005)
        end = time.monotonic() + part * duration
        while time.monotonic() < end and self.batches() == batch:
            time.sleep(0.0002)
        return self.process.poll() is None

    def wait_for(self, condition: Callable[[], Found]) -> Found:
        deadline = time.monotonic() + HANGS
        while not (found := condition()):
            expect(self.process.poll() is None, f"it ended with {self.process.returncode}: {self.said()}")
            expect(time.monotonic() < deadline, "it hangs")
            time.sleep(0.0005)
        return found

    def kill(self) -> None:
        """kill -9, of torchrun's trainers too; the loaders' workers find out by themselves."""
        if self.process.poll() is None:
            for pid in (self.process.pid, *self.pids()[-self.processes :]):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> Self:
        """Wait for the end, which must be a good one."""
        status = self.process.wait(HANGS)
        expect(status == 0, f"it ended with status {status}: {self.said()}")
        return self

    def said(self) -> str:
        return self.errors.read_text().strip()

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))

    def step(self) -> int:
        """That of the newest checkpoint, 0 before there is one."""
        return int(self.checkpoints()[-1].stem.removeprefix("step-")) if self.checkpoints() else 0

    def unfinished(self) -> bool:
        """A file is being written, or was when the process was killed."""
        with suppress(FileNotFoundError):  # it has just been finished
            return any(path.stat().st_mtime > self.started for path in self.folder.glob(".*"))
        return False

    def expect_whole_checkpoints(self) -> None:
        expect(self.checkpoints(), "there is no checkpoint")
        for path in (*self.checkpoints(), *self.folder.glob("best.pt")):
            checkpoint.load(path)

    def came_to(self) -> dict[str, Any]:
        """All that a finished run has come to, by name: checkpoints, curves, final figures, names of files."""
        parts = {
            "result": json.loads(self.output.read_text().splitlines()[-1]),
            "newest": checkpoint.load(self.checkpoints()[-1]),
            "best": checkpoint.load(self.folder / "best.pt"),
            "curves": points(self.folder),
            "files": {p.name: True for p in self.folder.iterdir() if not p.name.startswith("events.")},
        }
        return {keystr(path): leaf for path, leaf in tree_flatten_with_path(parts)[0]}

    def expect_same_end(self, quiet: "Run") -> None:
        """Equal to the last bit to what a run that nothing happened to has come to."""
        mine, its = self.came_to(), quiet.came_to()
        differing = [name for name in {**its, **mine} if not same(mine.get(name), its.get(name))]
        if differing:
            name = differing[0]
            more = f"{len(differing)} of {len(its)} things differ from the quiet run, such as {name}: "
            raise Broken(f"{more}{mine.get(name, 'absent')!r}, not {its.get(name, 'absent')!r}")


def same(one: Any, other: Any) -> bool:
    """Equal bits."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other)))
    return type(one) is type(other) and one == other


def points(folder: Path) -> dict[str, Any]:
    """Every point that TensorBoard shows, each there once; of the speeds the steps alone."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each restart
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    found: dict[str, Any] = {}
    for tag in (*events.Tags()["scalars"], *events.Tags()["histograms"]):
        scalar = tag in events.Tags()["scalars"]
        for point in events.Scalars(tag) if scalar else events.Histograms(tag):
            name = f"{tag} at {point.step}"
            expect(name not in found, f"TensorBoard shows {name} twice")
            value: Any = point.value if scalar else point.histogram_value  # pyright: ignore
            found[name] = None if tag.startswith("speed/") else value
    return found


def quiet_run(folder: Path, **options: Any) -> Run:
    """The job in this process, which nothing happens to."""
    run = Run(folder, **options)
    run.output.write_text(json.dumps(asdict(trainer(run.job()).fit())))
    return run


class Row:
    """What was done to try a promise, how often, and what broke it."""

    def __init__(self, promise: str) -> None:
        self.promise = promise
        self.done: Counter[str] = Counter()
        self.notes: list[str] = []
        self.broken: list[str] = []

    @contextmanager
    def trial(self, what: str, detail: str = "") -> Iterator[None]:
        """Count it; an error in it breaks the promise, and is told at once."""
        self.done[what] += 1
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            shown = text if len(text) < 800 else f"{text[:400]} ... {text[-400:]}"
            self.broken.append(f"{what}{detail and f' ({detail})'}: {type(error).__name__}: {shown}")
            print("BROKEN", self.broken[-1], file=sys.stderr, flush=True)

    def __str__(self) -> str:
        done = "; ".join([*(f"{count} {what}" for what, count in self.done.items()), *self.notes])
        more = f" (and {len(self.broken) - 1} more)" if len(self.broken) > 1 else ""
        result = f"**broken** {self.broken[0]}{more}".replace("|", "\\|") if self.broken else "kept"
        return f"| {self.promise} | {done} | {result} |"


# The promises


class Settings(CommandLine):
    """Break runs in every way that the trainer promises to withstand, and compare what they come to."""

    only: list[Literal["kill", "signals", "checkpoints", "disk", "numbers", "processes", "long", "models"]] = []
    """The promises to try; by default all."""
    kills: PositiveInt = 100
    """Times to kill -9."""
    signals: PositiveInt = 5
    """Times to send each signal."""
    flips: PositiveInt = 200
    """Bits to flip in a checkpoint, one at a time."""
    steps: PositiveInt = 10_000
    """Updates of a long run."""
    short: bool = False
    """Try each promise in its shortest form."""
    seed: NonNegativeInt | None = None
    """Decides the moments of the faults and the bits that flip; by default drawn anew, and printed."""
    keep: Path | None = None
    """An empty folder for the runs, to be kept; by default they are removed."""

    def resolved(self) -> Self:
        """These settings with the seed drawn, and for the short form with small counts."""
        values: dict[str, Any] = {"kills": 2, "signals": 1, "flips": 20, "steps": 500} if self.short else {}
        values["seed"] = random.SystemRandom().randrange(10**6)
        return self.model_copy(update={k: v for k, v in values.items() if k not in self.model_fields_set})


def kill(row: Row, settings: Settings, place: Path) -> None:
    """After kill -9 at any moment the same command goes on, to the same end in every bit, with the same curves."""
    quiet = quiet_run(place / "quiet")
    moments = random.Random(settings.seed)
    kills = 0
    for number in itertools.count():
        run, batches = Run(place / f"killed{number}"), []
        while kills < settings.kills and len(batches) < 12:
            run.start()
            batches.append(batch := moments.randrange(BATCHES // 4))
            if batch:
                run.reach(batch, moments.random())
            else:  # before the first
                time.sleep(moments.uniform(0, 0.2))
            while kills % 3 == 0 and not run.unfinished() and run.process.poll() is None:
                time.sleep(0.0002)
            if run.process.poll() is not None:  # it came to its end
                break
            run.kill()
            kills += 1
            with row.trial("kills while a checkpoint was written" if run.unfinished() else "kills elsewhere"):
                if run.step():  # and not in the very beginning
                    run.expect_whole_checkpoints()
        with row.trial("killed runs compared", f"in batches {batches}, each counted from the kill before"):
            if run.process.returncode == -signal.SIGKILL:
                run.start()
            run.end()
            run.expect_same_end(quiet)
        if kills == settings.kills:
            return


def signals(row: Row, settings: Settings, place: Path) -> None:
    """SIGTERM or Ctrl-C: the step ends, a checkpoint is written, one line says how to go on, the status is 143 or
    130; a second Ctrl-C stops at once. Checkpoints stay whole, and the same command goes on to the same end."""
    moments = random.Random(settings.seed)
    sparse: dict[str, Any] = {"checkpoint_every": None, "epochs": 12}
    quiet = quiet_run(place / "quiet", **sparse)
    ways = [("SIGTERM", os.killpg, 143), ("SIGINT", os.killpg, 130)]
    ways += [] if settings.short else [("SIGTERM", os.kill, 143)]
    for number in range(settings.signals):
        run = Run(place / f"run{number}", pause=0.03, **sparse)
        for name, send, status in ways:  # a terminal and a cluster send it to the loader's workers too
            delay, before = moments.uniform(0, 0.6), run.step()
            to = "all its processes" if send is os.killpg else "the trainer alone"
            with row.trial(f"{name} to {to}", f"{delay:.4f} s after an epoch"):
                run.start()
                run.wait_for(lambda run=run, before=before: run.step() > before)
                time.sleep(delay)
                send(run.process.pid, getattr(signal, name))
                expect(run.process.wait(HANGS) == status, f"the status is {run.process.returncode}: {run.said()}")
                expect(re.fullmatch(r"[^\n]*resume[^\n]*", run.said()), f"no line on how to go on: {run.said()}")
                steps = [int(name.split()[-1]) for name in points(run.folder) if name.startswith("loss/train at")]
                expect(run.step() == max(steps), f"step {max(steps)} was made, {run.step()} saved")
                run.expect_whole_checkpoints()
        with row.trial("second Ctrl-C"):
            run.options["pause"], logs = 20, len(list(run.folder.iterdir()))
            run.start()
            run.wait_for(lambda run=run, logs=logs: len(list(run.folder.iterdir())) > logs)
            run.wait_for(run.batches)  # and it is in the middle of an update
            os.killpg(run.process.pid, signal.SIGINT)
            time.sleep(1)
            expect(run.process.poll() is None, f"the first ended it: {run.said()}")
            os.killpg(run.process.pid, signal.SIGINT)
            expect(run.process.wait(HANGS) == 130, f"the status is {run.process.returncode}: {run.said()}")
            run.expect_whole_checkpoints()
        with row.trial("stopped runs compared"):
            run.kill()
            run.options["pause"] = 0
            run.start().end()
            run.expect_same_end(quiet)


class Malice:
    """What a pickle may hold: a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def checkpoints(row: Row, settings: Settings, place: Path) -> None:
    """A checkpoint that is cut short, changed, foreign or malicious is refused in one line with its name and the
    reason, nothing in it is run, and the newest whole one is taken instead."""
    quiet, run = quiet_run(place / "quiet", workers=0), quiet_run(place / "broken", workers=0)
    older, newest = run.checkpoints()
    good, marker = newest.read_bytes(), place / "it_ran"

    def write(content: bytes) -> None:
        newest.unlink()  # it may be the best one as well, under another name
        newest.write_bytes(content)

    def refused(what: str, reason: str, detail: str = "", instead: bool = True, **other: Any) -> None:
        """What is now there as the newest; `other` is what the trainer is made of."""
        with row.trial(what, detail), redirect_stderr(io.StringIO()) as said:
            try:
                step = trainer(run.job(), **other).progress.step
            except CheckpointError as error:
                expect(not instead, f"nothing was taken instead: {error}")
                print(error, file=sys.stderr)
            else:
                expect(instead and older.stem == f"step-{step:010}", f"it goes on from step {step}")
            pattern = rf"[^\n]*{re.escape(str(newest))}[^\n]*({reason})[^\n]*\n"
            expect(re.fullmatch(pattern, said.getvalue()), f"not one line with name and reason: {said.getvalue()}")
            expect(not marker.exists(), "something in it was run")

    for size in range(0, len(good), 1024):
        write(good[:size])
        refused("cut short", "cut short", f"to {size} bytes")
    bits = random.Random(settings.seed)
    for _ in range(settings.flips):
        byte, bit = bits.randrange(len(good)), bits.randrange(8)
        write(good[:byte] + bytes([good[byte] ^ 1 << bit]) + good[byte + 1 :])
        refused("with a bit flipped", "changed|cut short", f"bit {bit} of byte {byte}")
    payload = checkpoint.load(older)
    checkpoint.save(newest, payload | {"format": 99})
    refused("of another version", "format")
    checkpoint.write_unchecked(newest, payload | {"model": Malice(f"touch {marker}")})
    refused("malicious", "plain data")
    torch.save(Malice(f"touch {marker}"), newest)
    refused("malicious", "cut short", "without a seal")
    write(good)
    wider = network(run.job().model_copy(update={"width": 17}))
    refused("of another model", "different model", instead=False, model=wider)

    write(good[: len(good) // 2])
    with row.trial("runs that went on from the older one, compared"), redirect_stderr(io.StringIO()):
        quiet_run(run.folder, workers=0).expect_same_end(quiet)
    with row.trial("runs with no whole one"):
        for path in (*run.checkpoints(), run.folder / "best.pt"):
            path.write_bytes(path.read_bytes()[:-1])
        with suppress(CheckpointError):
            trainer(run.job())
            raise Broken("it begins anew")


@contextmanager
def mounted(folder: Path, *what: str) -> Iterator[bool]:
    """A disk of 8 MiB in memory, or something else, is mounted there: gives whether that is allowed."""
    folder.mkdir(exist_ok=True)
    what = what or ("-t", "tmpfs", "-o", "size=8m", "tmpfs")
    allowed = os.geteuid() == 0 and subprocess.run(["mount", *what, folder], capture_output=True).returncode == 0
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def full_disk(run: Run) -> Iterator[None]:
    """There is no room for anything."""
    ballast = run.folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only_disk(run: Run) -> Iterator[None]:
    """The folder is mounted over itself, read-only, which binds root as well."""
    with mounted(run.folder, "--bind", str(run.folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", run.folder], check=True)
        yield


@contextmanager
def file_limit(run: Run) -> Iterator[None]:
    """No file of the process may grow beyond 16 KiB."""
    pid = run.pids()[-1]
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (16 * 1024, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def disk(row: Row, settings: Settings, place: Path) -> None:
    """On a disk that is full or read-only a run goes on or stops, as set, and says what to do; the last checkpoint
    stays whole. When there is room again checkpoints are written again, and the end is the same."""
    quiet, advice = quiet_run(place / "quiet", epochs=16), re.compile("[Mm]ake (room|the folder writable)")
    for policy in ("go_on",) if settings.short else ("go_on", "stop"):
        run = Run(place / policy, pause=0.02, epochs=16, on_disk_error=policy)
        with mounted(run.folder) as allowed:
            faults = (full_disk, read_only_disk, file_limit) if allowed else (file_limit,)
            if not allowed:
                row.notes.append("no disk is full or read-only, as nothing may be mounted here")
            run.start()
            for fault in faults:
                step, said = run.step(), len(run.said())
                with row.trial(f"{fault.__name__.replace('_', ' ')}, {policy}"):
                    run.wait_for(lambda run=run, step=step: run.step() > step)
                    with fault(run):
                        if policy == "go_on":  # it says what to do, and trains
                            run.wait_for(lambda run=run, said=said: advice.search(run.said(), said))
                            batches = run.batches()
                            run.wait_for(lambda run=run, batches=batches: run.batches() > batches + 4)
                        else:
                            expect((status := run.process.wait(HANGS)) == 1, f"the status is {status}")
                            expect(advice.search(run.said()), f"it does not say what to do: {run.said()}")
                        run.expect_whole_checkpoints()
                        told, step = run.said()[said:], run.step()
                    if policy == "stop":
                        run.start()
                    run.wait_for(lambda run=run, step=step: run.step() > step)
                    expect("Traceback" not in told, f"that is not a line: {told}")
            with row.trial("runs on such disks compared", policy):
                run.end()
                run.expect_same_end(quiet)


MARK = 77.0


class Fragile(nn.Module):
    """Adds a weight that is zero, and whose gradient is `bad` where a row is marked."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.w, self.bad = nn.Parameter(torch.zeros(())), bad

    def forward(self, x: Tensor) -> Tensor:
        w = self.w * 1
        if w.requires_grad and (x == MARK).any():
            w.register_hook(lambda grad: torch.full_like(grad, self.bad))
        return x + w


def fragile_network(job: Job, bad: float) -> nn.Module:
    return nn.Sequential(OrderedDict(fragile=Fragile(bad), body=network(job)))


def numbers(row: Row, settings: Settings, place: Path) -> None:
    """NaN and infinity in data, target, gradient or weights: training stops, leaves the update out or backs up, as
    set; the report names step, batch and first layer, and the file that is saved makes it happen again."""
    named = {"data": "input data", "target": "target data", "gradient": "'fragile'", "weight": "'body.1.weight'"}
    policies = ("stop", "skip", "back_up")
    small = {"nonfinite_limit": 3, "accumulate": 1, "precision": "float32", "epochs": 2}
    for (kind, name), bad, policy in itertools.product(named.items(), (math.nan, math.inf), policies):
        job = Run(place / f"{kind}-{bad}-{policy}", on_nonfinite=policy, **small).job()
        rows = Rows(job.rows, True, seed=1)
        batches = [[rows.x[i : i + 16].float(), rows.y[i : i + 16].float()] for i in range(0, job.rows, 16)]
        spoiled = batches[6][1 if kind == "target" else 0]
        spoiled[3, 0] = bad if kind in ("data", "target") else MARK
        model = fragile_network(job, bad if kind == "gradient" else 0.0)
        healthy = iter([kind == "weight"])

        def spoil(module: nn.Module, inputs: tuple[Tensor], healthy: Any = healthy, bad: float = bad) -> None:
            """As a fault of the memory would: one weight, once."""
            if (inputs[0] == MARK).any() and next(healthy, False):
                with torch.no_grad():
                    module.get_parameter("body.1.weight")[0, 2] = bad

        model.register_forward_pre_hook(spoil)
        stops = policy == "stop" or (kind, policy) == ("weight", "skip")  # which leaving out cannot mend
        with row.trial(f"{kind}, {policy}", str(bad)):
            with redirect_stderr(io.StringIO()) as said:
                try:
                    trainer(job, model, [tuple(batch) for batch in batches]).fit()
                except NonFiniteError as error:
                    expect(stops, f"it stopped: {error}")
                    print(error, file=sys.stderr)
                else:
                    expect(not stops, "it went on")
                    expect(all(p.isfinite().all() for p in model.parameters()), "the weights are not finite")
            report = said.getvalue().partition("\n")[0]
            expect(re.search(rf"step 7 \(epoch 1, (update|batch) 7\).*{name}", report), report)
            saved = torch.load(job.run_dir / "nonfinite-step-7.pt", weights_only=True)  # pyright: ignore
            model = fragile_network(job, bad if kind == "gradient" else 0.0)
            model.load_state_dict(saved["model"])
            set_random_states(saved["random"])
            ((input, target),) = saved["batches"]
            loss = manualgrad.nn.functional.mse_loss(model(input), target)
            loss.backward()
            numbers = (loss, *(p.grad for p in model.parameters() if p.grad is not None))
            expect(not all(x.isfinite().all() for x in numbers), "what is saved gives finite numbers")


def processes(row: Row, settings: Settings, place: Path) -> None:
    """Two processes under torchrun, by DDP or FSDP, make the updates of one, to 1e-9 in float64; checkpoints go on
    with any number of them; where one is killed they are restarted, and come to the same end in every bit."""
    plain: dict[str, Any] = {"plain": True, "precision": "float32", "workers": 0, "epochs": 3}
    plain |= {"checkpoint_every": 1, "keep_last": 1000}  # so that every step can be compared
    one = quiet_run(place / "one", **plain)
    for first, then in (
        [("one", "fsdp")] if settings.short else itertools.product(("one", "ddp", "fsdp"), repeat=2)
    ):
        with row.trial("runs killed, gone on with in another way, and compared", f"{first}, then {then}"):
            run = Run(place / f"{first}-{then}", **plain)
            for way in (first, then):
                run.processes = 0 if way == "one" else 2
                run.options["parallel"] = "fsdp" if way == "fsdp" else "ddp"
                run.start()
                if run.step() < 9:  # the first
                    run.wait_for(lambda run=run: run.step() > 9)
                    run.kill()
            run.end()
            expect_close(run, one)
    for parallel in ("ddp",) if settings.short else ("ddp", "fsdp"):
        quiet = Run(place / parallel, 2, parallel=parallel).start().end()
        for victim in (-1,) if settings.short else (-1, -2):
            with row.trial("trainers killed under torchrun", parallel):
                run = Run(place / f"{parallel}{victim}", 2, parallel=parallel).start()
                run.wait_for(lambda run=run: run.step() > 9)
                os.kill(run.pids()[victim], signal.SIGKILL)
                run.end()
                expect(len(run.pids()) > 2, "they were not restarted")
                run.expect_same_end(quiet)


def expect_close(run: Run, one: Run) -> None:
    """After every step states and losses are those of one process but for rounding; the curves have its points."""
    differing = points(run.folder).keys() ^ points(one.folder).keys()
    expect(not differing, f"the curves have other points: {', '.join(sorted(differing))}")
    for path in one.checkpoints():
        payloads = [checkpoint.load(r.folder / path.name) | {"random": 0} for r in (one, run)]
        expected, found = (dict(tree_flatten_with_path(payload)[0]) for payload in payloads)
        expect(expected.keys() == found.keys(), f"{path.name} holds other things")
        for place, value in expected.items():
            if isinstance(value, (float, Tensor)):
                a, b = torch.as_tensor(value), torch.as_tensor(found[place])
                close = torch.allclose(a, b, rtol=1e-9, atol=1e-9)
            else:
                close = value == found[place]
            expect(close, f"{path.name}: {keystr(place)} is {found[place]}, not {value}")


def long(row: Row, settings: Settings, place: Path) -> None:
    """A long run has no more memory at its end than soon after its beginning, and curves and checkpoints, as often
    as they are written by default, take at most 2 % of the time of a step, where an epoch has seconds."""
    names = ("checkpoint_every", "log_every", "histogram_every", "accumulate")
    usual = {name: getattr(TrainingSettings(), name) for name in names}
    for layers in ("ours",) if settings.short else ("ours", "torch"):
        with row.trial("long runs"):
            epochs = max(2, settings.steps // 250)
            run = Run(place / layers, layers=layers, epochs=epochs, rows=4000, **usual).start()
            seen: list[tuple[float, float]] = []
            while run.process.poll() is None:
                status = Path(f"/proc/{run.process.pid}/status").read_text()
                if found := re.search(r"RssAnon:\s+(\d+) kB", status):
                    seen.append((time.monotonic(), int(found[1]) / 1024))
                time.sleep(0.05)
            run.end()
            moments, sizes = np.array(seen[len(seen) * 3 // 10 : -2]).T
            growth = np.polyfit(moments, sizes, 1)[0] * (moments[-1] - moments[0])
            row.notes.append(f"{layers}: {250 * epochs} steps, of which the last 70 % added {growth:.1f} MiB")
            expect(growth < 4 or settings.short, row.notes[-1])

    with row.trial("comparisons with runs that write nothing"):
        epochs, blocks = (2, 5) if settings.short else (10, 25)
        size: dict[str, Any] = {"width": 512, "rows": 1280 * blocks, "batch_size": 128, "workers": 0}
        size["precision"] = "float32"  # not every processor has bfloat16
        job = Job(run_dir=place / "paired", epochs=epochs, progress=False, **size, **usual)
        written, bare = in_turns(job, job.model_copy(update={"run_dir": None}), blocks)
        block = statistics.median(a - b for a, b in zip(written.blocks, bare.blocks, strict=True))
        end = statistics.median(a - b for a, b in zip(written.ends, bare.ends, strict=True))
        step = statistics.median(bare.blocks) / 10
        curves, saving = block / 10 / step, end / (10 * blocks) / step
        row.notes.append(
            f"curves cost {100 * curves:.1f} % and checkpoints {100 * saving:.1f} % of a step of "
            f"{1000 * step:.1f} ms, the medians of {len(bare.blocks)} and {len(bare.ends)} pairs"
        )
        expect(curves + saving < 0.02 or settings.short, row.notes[-1])


class Turn:
    """The time of the processor that a run takes for each ten steps, and for the end of each epoch."""

    def __init__(self) -> None:
        self.blocks: list[float] = []
        self.ends: list[float] = []
        self.mine = threading.Semaphore(0)
        self.over = False


def in_turns(first: Job, second: Job, blocks: int) -> tuple[Turn, Turn]:
    """Two runs that take turns, ten steps of one and ten of the other, so that both meet the same noise.

    What a run gives its threads to write is written in its turn, and counted.
    """
    turns = Turn(), Turn()

    def run(job: Job, turn: Turn, other: Turn) -> None:
        data = Rows(job.rows, job.plain, seed=1)
        batches = list(zip(data.x.split(job.batch_size), data.y.split(job.batch_size), strict=True))
        begin = math.nan

        def pass_on(to: list[float] | None) -> None:
            nonlocal begin
            if made._checkpoints is not None:
                made._checkpoints.wait()
            if to is not None:
                to.append(time.process_time() - begin)
            other.mine.release()
            if not other.over:
                turn.mine.acquire()
            begin = time.process_time()

        class Batches:
            """Those of an epoch: between every ten the other run has its turn."""

            epochs = 0

            def __len__(self) -> int:
                return len(batches)

            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                pass_on(turn.ends if self.epochs else None)
                self.epochs += 1
                for number, batch in enumerate(batches, start=1):
                    yield batch
                    if number % 10 == 0:
                        pass_on(turn.blocks)

        turn.mine.acquire()
        try:
            made = trainer(job, batches=Batches())
            made.validation_loader = batches[:1]  # or its noise would hide what a checkpoint costs
            made.fit()
        finally:
            turn.over = True
            other.mine.release()

    with ThreadPoolExecutor(2) as threads:
        runs = threads.submit(run, first, *turns), threads.submit(run, second, *reversed(turns))
        turns[0].mine.release()
    for ended in runs:
        ended.result()
    return turns


def models(row: Row, settings: Settings, place: Path) -> None:
    """All of it holds for models of torch.nn, of manualgrad.nn, converted, and compiled ones."""
    moments = random.Random(settings.seed)
    for layers in ("converted",) if settings.short else ("torch", "ours", "converted", "compiled"):
        with row.trial("killed runs compared", layers):
            quiet = quiet_run(place / f"{layers}-quiet", layers=layers)
            run = Run(place / layers, layers=layers).start()
            batch = moments.randint(1, BATCHES - 8)
            expect(run.reach(batch, moments.random()), f"it ended before batch {batch}: {run.said()}")
            run.kill()
            run.start().end()
            run.expect_same_end(quiet)


PROMISES = (kill, signals, checkpoints, disk, numbers, processes, long, models)


def try_out(promise: Callable[[Row, Settings, Path], None], settings: Settings, place: Path) -> Row:
    """The row of a promise, whose runs are in a folder of its name."""
    row = Row(" ".join((promise.__doc__ or "").split()))
    with row.trial("promise", "outside of what is counted"):
        folder = place / promise.__name__
        folder.mkdir(parents=True)
        promise(row, settings, folder)
    del row.done["promise"]
    return row


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more workers than cores
    if sys.argv[1:2] == ["job"]:
        run_job(parse_settings(Job, sys.argv[2:]))
        return
    settings = parse_settings(Settings).resolved()
    print(f"seed {settings.seed}, torch {torch.__version__}\n\n| promise | done | result |\n|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        for promise in PROMISES:
            if not settings.only or promise.__name__ in settings.only:
                rows.append(try_out(promise, settings, settings.keep or Path(temporary)))
                print(rows[-1], flush=True)
    sys.exit(1 if any(row.broken for row in rows) else 0)


if __name__ == "__main__":
    main()
