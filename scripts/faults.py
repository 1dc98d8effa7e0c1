"""Checks what happens to a training run when things go wrong: kill it, break its files, fill its disk, and
compare.

    python scripts/faults.py                             every check
    python scripts/faults.py --only kill --kills 1000    one check, for longer
    python scripts/faults.py --short                     every check in its shortest form

A small job (fault_job.py) trains in its own processes. Faults come from outside, at random moments drawn from the
printed seed. The outcome is compared with that of an undisturbed run. Each check is a function below; its
docstring is what it checks. The table says what was done, how often, and what failed. The exit status is 1 after a
failure. (Linux only. The checks of a full and a read-only disk need the right to mount.)
"""

import io
import itertools
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
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from fault_job import (
    TIMEOUT,
    TOTAL_BATCHES,
    Failure,
    Job,
    Rows,
    Run,
    expect,
    network,
    read_points,
    trainer,
    undisturbed_run,
)
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

import manualgrad.nn
from manualgrad.training import (
    CheckpointError,
    CliSettings,
    NonFiniteError,
    TrainingSettings,
    checkpoint,
    parse_settings,
)
from manualgrad.training.random_state import set_random_states


class Row:
    """A row of the table: what was checked, how often, and the failures."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self.failures: list[str] = []

    @contextmanager
    def trial(self, what: str, detail: str = "") -> Iterator[None]:
        """Count a trial. An error in it is a failure, and is printed immediately."""
        self.counts[what] += 1
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            shown = text if len(text) < 800 else f"{text[:400]} ... {text[-400:]}"
            self.failures.append(f"{what}{detail and f' ({detail})'}: {type(error).__name__}: {shown}")
            print("FAILED", self.failures[-1], file=sys.stderr, flush=True)

    def __str__(self) -> str:
        done = "; ".join([*(f"{count} {what}" for what, count in self.counts.items()), *self.notes])
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        result = f"**failed** {self.failures[0]}{more}".replace("|", "\\|") if self.failures else "passed"
        return f"| {self.title} | {done} | {result} |"


class Settings(CliSettings):
    """Disturb training runs in many ways, and compare their outcome with that of undisturbed runs."""

    only: list[Literal["kill", "signals", "checkpoints", "disk", "nonfinite", "processes", "long", "models"]] = []
    """The checks to run; by default all."""
    kills: PositiveInt = 100
    """How often to send SIGKILL."""
    signals: PositiveInt = 5
    """How often to send each signal."""
    flips: PositiveInt = 200
    """How many bits of a checkpoint to flip, one at a time."""
    steps: PositiveInt = 10_000
    """Optimizer steps of a long run."""
    short: bool = False
    """Run each check in its shortest form."""
    seed: NonNegativeInt | None = None
    """Seeds the moments of the faults and the flipped bits; by default random, and printed."""
    keep: Path | None = None
    """An empty folder to keep the runs in; by default they are removed."""

    def resolved(self) -> Self:
        """Return these settings with a seed, and with small counts for the short form."""
        values: dict[str, Any] = {"kills": 2, "signals": 1, "flips": 20, "steps": 500} if self.short else {}
        values["seed"] = random.SystemRandom().randrange(10**6)
        return self.model_copy(update={k: v for k, v in values.items() if k not in self.model_fields_set})


def kill(row: Row, settings: Settings, folder: Path) -> None:
    """After kill -9 at any moment the same command resumes the run, with the same outcome and curves to the last
    bit."""
    undisturbed = undisturbed_run(folder / "undisturbed")
    generator = random.Random(settings.seed)
    kills = 0
    for number in itertools.count():
        run, batches = Run(folder / f"killed{number}"), []
        while kills < settings.kills and len(batches) < 12:
            run.start()
            batches.append(batch := generator.randrange(TOTAL_BATCHES // 4))
            if batch:
                run.wait_for_batch(batch, generator.random())
            else:  # before the first batch
                time.sleep(generator.uniform(0, 0.2))
            while kills % 3 == 0 and not run.is_writing() and run.process.poll() is None:
                time.sleep(0.0002)
            if run.process.poll() is not None:  # the run ended
                break
            run.kill()
            kills += 1
            with row.trial("kills while writing a checkpoint" if run.is_writing() else "other kills"):
                if run.step():  # not before the first checkpoint
                    run.expect_intact_checkpoints()
        with row.trial("killed runs compared", f"in batches {batches}, each counted from the previous kill"):
            if run.process.returncode == -signal.SIGKILL:
                run.start()
            run.finish()
            run.expect_same_outcome(undisturbed)
        if kills == settings.kills:
            return


def signals(row: Row, settings: Settings, folder: Path) -> None:
    """On SIGTERM or Ctrl-C the update completes, a checkpoint is written, one line says how to continue, the
    status is 143 or 130. A second Ctrl-C stops immediately. Checkpoints stay intact; the resumed run has the same
    outcome."""
    generator = random.Random(settings.seed)
    sparse: dict[str, Any] = {"checkpoint_every_n_steps": None, "max_epochs": 12}
    undisturbed = undisturbed_run(folder / "undisturbed", **sparse)
    ways = [("SIGTERM", os.killpg, 143), ("SIGINT", os.killpg, 130)]
    ways += [] if settings.short else [("SIGTERM", os.kill, 143)]
    for number in range(settings.signals):
        run = Run(folder / f"run{number}", pause=0.03, **sparse)
        for name, send, status in ways:  # a terminal and a cluster send it to the workers too
            delay, before = generator.uniform(0, 0.6), run.step()
            to = "all processes" if send is os.killpg else "the trainer only"
            with row.trial(f"{name} to {to}", f"{delay:.4f} s after an epoch"):
                run.start()
                run.wait_for(lambda run=run, before=before: run.step() > before)
                time.sleep(delay)
                send(run.process.pid, getattr(signal, name))
                expect(
                    run.process.wait(TIMEOUT) == status, f"the status is {run.process.returncode}: {run.stderr()}"
                )
                expect(
                    re.fullmatch(r"[^\n]*resume[^\n]*", run.stderr()),
                    f"not one line that says how to resume: {run.stderr()}",
                )
                steps = [
                    int(name.split()[-1]) for name in read_points(run.folder) if name.startswith("loss/train at")
                ]
                expect(run.step() == max(steps), f"step {max(steps)} was done, but {run.step()} saved")
                run.expect_intact_checkpoints()
        with row.trial("second Ctrl-C"):
            run.options["pause"], logs = 20, len(list(run.folder.iterdir()))
            run.start()
            run.wait_for(lambda run=run, logs=logs: len(list(run.folder.iterdir())) > logs)
            run.wait_for(run.batches)  # in the middle of an update
            os.killpg(run.process.pid, signal.SIGINT)
            time.sleep(1)
            expect(run.process.poll() is None, f"the first one ended it: {run.stderr()}")
            os.killpg(run.process.pid, signal.SIGINT)
            expect(run.process.wait(TIMEOUT) == 130, f"the status is {run.process.returncode}: {run.stderr()}")
            run.expect_intact_checkpoints()
        with row.trial("stopped runs compared"):
            run.kill()
            run.options["pause"] = 0
            run.start().finish()
            run.expect_same_outcome(undisturbed)


class MaliciousPickle:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def checkpoints(row: Row, settings: Settings, folder: Path) -> None:
    """A checkpoint that is truncated, changed, foreign or malicious is refused in one line with its name and the
    reason. Nothing in it is executed. The run resumes from the newest intact one."""
    undisturbed, run = (
        undisturbed_run(folder / "undisturbed", workers=0),
        undisturbed_run(folder / "broken", workers=0),
    )
    older, newest = run.checkpoints()
    intact, marker = newest.read_bytes(), folder / "executed"

    def write(content: bytes) -> None:
        newest.unlink()  # it may be a hard link of best.pt
        newest.write_bytes(content)

    def expect_refusal(
        what: str, reason: str, detail: str = "", uses_older: bool = True, **arguments: Any
    ) -> None:
        """Make a trainer, which must refuse the current newest checkpoint."""
        with row.trial(what, detail), redirect_stderr(io.StringIO()) as stderr:
            try:
                step = trainer(run.job(), **arguments).state.global_step
            except CheckpointError as error:
                expect(not uses_older, f"the older one was not used: {error}")
                print(error, file=sys.stderr)
            else:
                expect(uses_older and older.stem == f"step-{step:010}", f"the run resumes from step {step}")
            pattern = rf"[^\n]*{re.escape(str(newest))}[^\n]*({reason})[^\n]*\n"
            expect(
                re.fullmatch(pattern, stderr.getvalue()), f"not one line with name and reason: {stderr.getvalue()}"
            )
            expect(not marker.exists(), "something in it was executed")

    for size in range(0, len(intact), 1024):
        write(intact[:size])
        expect_refusal("truncated", "truncated", f"to {size} bytes")
    bits = random.Random(settings.seed)
    for _ in range(settings.flips):
        byte, bit = bits.randrange(len(intact)), bits.randrange(8)
        write(intact[:byte] + bytes([intact[byte] ^ 1 << bit]) + intact[byte + 1 :])
        expect_refusal("with a bit flipped", "changed|truncated", f"bit {bit} of byte {byte}")
    payload = checkpoint.load(older)
    checkpoint.save(newest, payload | {"format": 99})
    expect_refusal("of another version", "format")
    checkpoint.write(newest, payload | {"model": MaliciousPickle(f"touch {marker}")})
    expect_refusal("malicious", "plain data")
    torch.save(MaliciousPickle(f"touch {marker}"), newest)
    expect_refusal("malicious", "truncated", "without a checksum")
    write(intact)
    wider = network(run.job().model_copy(update={"width": 17}))
    expect_refusal("of another model", "different model", uses_older=False, model=wider)

    write(intact[: len(intact) // 2])
    with row.trial("runs resumed from the older one, compared"), redirect_stderr(io.StringIO()):
        undisturbed_run(run.folder, workers=0).expect_same_outcome(undisturbed)
    with row.trial("runs without an intact one"):
        for path in (*run.checkpoints(), run.folder / "best.pt"):
            path.write_bytes(path.read_bytes()[:-1])
        with suppress(CheckpointError):
            trainer(run.job())
            raise Failure("the run begins again")


@contextmanager
def mount(folder: Path, *arguments: str) -> Iterator[bool]:
    """Mount a disk of 8 MiB in memory, or something else. Gives whether mounting is allowed."""
    folder.mkdir(exist_ok=True)
    arguments = arguments or ("-t", "tmpfs", "-o", "size=8m", "tmpfs")
    allowed = (
        os.geteuid() == 0 and subprocess.run(["mount", *arguments, folder], capture_output=True).returncode == 0
    )
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def full_disk(run: Run) -> Iterator[None]:
    """Fill the disk."""
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
    """Mount the folder over itself, read-only: this works for root too."""
    with mount(run.folder, "--bind", str(run.folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", run.folder], check=True)
        yield


@contextmanager
def file_limit(run: Run) -> Iterator[None]:
    """Limit the files of the process to 16 KiB."""
    pid = run.pids()[-1]
    previous = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (16 * 1024, previous[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, previous)


def disk(row: Row, settings: Settings, folder: Path) -> None:
    """On a full or read-only disk a run continues or stops, as set, and says what to do. The last checkpoint stays
    intact. When there is room again checkpoints are written again, and the outcome is the same."""
    undisturbed, advice = (
        undisturbed_run(folder / "undisturbed", max_epochs=16),
        re.compile("[Mm]ake (room|the folder writable)"),
    )
    for policy in ("continue",) if settings.short else ("continue", "stop"):
        run = Run(folder / policy, pause=0.02, max_epochs=16, on_disk_error=policy)
        with mount(run.folder) as allowed:
            faults = (full_disk, read_only_disk, file_limit) if allowed else (file_limit,)
            if not allowed:
                row.notes.append("no full and no read-only disk: mounting is not allowed here")
            run.start()
            for fault in faults:
                step, length = run.step(), len(run.stderr())
                with row.trial(f"{fault.__name__.replace('_', ' ')}, {policy}"):
                    run.wait_for(lambda run=run, step=step: run.step() > step)
                    with fault(run):
                        if policy == "continue":  # it says what to do, and continues
                            run.wait_for(lambda run=run, length=length: advice.search(run.stderr(), length))
                            batches = run.batches()
                            run.wait_for(lambda run=run, batches=batches: run.batches() > batches + 4)
                        else:
                            expect((status := run.process.wait(TIMEOUT)) == 1, f"the status is {status}")
                            expect(advice.search(run.stderr()), f"stderr does not say what to do: {run.stderr()}")
                        run.expect_intact_checkpoints()
                        stderr, step = run.stderr()[length:], run.step()
                    if policy == "stop":
                        run.start()
                    run.wait_for(lambda run=run, step=step: run.step() > step)
                    expect("Traceback" not in stderr, f"stderr has a traceback: {stderr}")
            with row.trial("runs on such disks compared", policy):
                run.finish()
                run.expect_same_outcome(undisturbed)


MARK = 77.0


class BadGradient(nn.Module):
    """Adds a zero weight. Its gradient is `bad` if the batch has a marked row."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.w, self.bad = nn.Parameter(torch.zeros(())), bad

    def forward(self, x: Tensor) -> Tensor:
        w = self.w * 1
        if w.requires_grad and (x == MARK).any():
            w.register_hook(lambda grad: torch.full_like(grad, self.bad))
        return x + w


def network_with_bad_gradient(job: Job, bad: float) -> nn.Module:
    return nn.Sequential(OrderedDict(first=BadGradient(bad), body=network(job)))


def nonfinite(row: Row, settings: Settings, folder: Path) -> None:
    """On a NaN or infinity in data, target, gradient or weights training stops, skips the update or rolls back, as
    set. The report names step, batch and first layer, and the saved file reproduces it."""
    sources = {"data": "input data", "target": "target data", "gradient": "'first'", "weight": "'body.1.weight'"}
    policies = ("stop", "skip", "rollback")
    small = {"nonfinite_limit": 3, "accumulate_grad_batches": 1, "precision": "float32", "max_epochs": 2}
    for (kind, name), bad, policy in itertools.product(sources.items(), (math.nan, math.inf), policies):
        job = Run(folder / f"{kind}-{bad}-{policy}", on_nonfinite=policy, **small).job()
        rows = Rows(job.rows, True, seed=1)
        batches = [[rows.x[i : i + 16].float(), rows.y[i : i + 16].float()] for i in range(0, job.rows, 16)]
        tensor = batches[6][1 if kind == "target" else 0]
        tensor[3, 0] = bad if kind in ("data", "target") else MARK
        model = network_with_bad_gradient(job, bad if kind == "gradient" else 0.0)
        pending = iter([kind == "weight"])

        def corrupt(module: nn.Module, inputs: tuple[Tensor], pending: Any = pending, bad: float = bad) -> None:
            """Change one weight once, like a memory fault."""
            if (inputs[0] == MARK).any() and next(pending, False):
                with torch.no_grad():
                    module.get_parameter("body.1.weight")[0, 2] = bad

        model.register_forward_pre_hook(corrupt)
        stops = policy == "stop" or (kind, policy) == ("weight", "skip")  # skipping does not help here
        with row.trial(f"{kind}, {policy}", str(bad)):
            with redirect_stderr(io.StringIO()) as stderr:
                try:
                    trainer(job, model, [tuple(batch) for batch in batches]).fit()
                except NonFiniteError as error:
                    expect(stops, f"training stopped: {error}")
                    print(error, file=sys.stderr)
                else:
                    expect(not stops, "training continued")
                    expect(all(p.isfinite().all() for p in model.parameters()), "the weights are not finite")
            report = stderr.getvalue().partition("\n")[0]
            expect(re.search(rf"step 7 \(epoch 1, (update|batch) 7\).*{name}", report), report)
            saved = torch.load(job.run_dir / "nonfinite-step-7.pt", weights_only=True)  # pyright: ignore
            model = network_with_bad_gradient(job, bad if kind == "gradient" else 0.0)
            model.load_state_dict(saved["model"])
            set_random_states(saved["random"])
            ((input, target),) = saved["batches"]
            loss = manualgrad.nn.functional.mse_loss(model(input), target)
            loss.backward()
            values = (loss, *(p.grad for p in model.parameters() if p.grad is not None))
            expect(not all(x.isfinite().all() for x in values), "the saved file gives finite numbers")


def processes(row: Row, settings: Settings, folder: Path) -> None:
    """Two processes under torchrun (DDP or FSDP) make the updates of one, to 1e-9 in float64. Any number of
    processes can resume a checkpoint. If one is killed torchrun restarts them, with the same outcome to the last
    bit."""
    plain: dict[str, Any] = {"plain": True, "precision": "float32", "workers": 0, "max_epochs": 3}
    plain |= {"checkpoint_every_n_steps": 1, "keep_last": 1000}  # to compare every step
    one = undisturbed_run(folder / "one", **plain)
    for first, then in (
        [("one", "fsdp")] if settings.short else itertools.product(("one", "ddp", "fsdp"), repeat=2)
    ):
        with row.trial("runs killed, resumed with other processes, and compared", f"{first}, then {then}"):
            run = Run(folder / f"{first}-{then}", **plain)
            for kind in (first, then):
                run.processes = 0 if kind == "one" else 2
                run.options["strategy"] = "fsdp" if kind == "fsdp" else "ddp"
                run.start()
                if run.step() < 9:  # the first of the two
                    run.wait_for(lambda run=run: run.step() > 9)
                    run.kill()
            run.finish()
            expect_close(run, one)
    for strategy in ("ddp",) if settings.short else ("ddp", "fsdp"):
        undisturbed = Run(folder / strategy, 2, strategy=strategy).start().finish()
        for victim in (-1,) if settings.short else (-1, -2):
            with row.trial("processes killed under torchrun", strategy):
                run = Run(folder / f"{strategy}{victim}", 2, strategy=strategy).start()
                run.wait_for(lambda run=run: run.step() > 9)
                os.kill(run.pids()[victim], signal.SIGKILL)
                run.finish()
                expect(len(run.pids()) > 2, "torchrun did not restart them")
                run.expect_same_outcome(undisturbed)


def expect_close(run: Run, one: Run) -> None:
    """After every step states and losses equal those of one process up to rounding; the curves have the same
    points."""
    differing = read_points(run.folder).keys() ^ read_points(one.folder).keys()
    expect(not differing, f"points in one run only: {', '.join(sorted(differing))}")
    for path in one.checkpoints():
        payloads = [checkpoint.load(r.folder / path.name) | {"random": 0} for r in (one, run)]
        expected, found = (dict(tree_flatten_with_path(payload)[0]) for payload in payloads)
        expect(expected.keys() == found.keys(), f"{path.name} has other entries")
        for key, value in expected.items():
            if isinstance(value, (float, Tensor)):
                a, b = torch.as_tensor(value), torch.as_tensor(found[key])
                close = torch.allclose(a, b, rtol=1e-9, atol=1e-9)
            else:
                close = value == found[key]
            expect(close, f"{path.name}: {keystr(key)} is {found[key]}, not {value}")


def long(row: Row, settings: Settings, folder: Path) -> None:
    """The memory of a long run does not grow. Curves and checkpoints at their default frequency take at most 2 %
    of the time of a step, if an epoch takes seconds."""
    names = (
        "checkpoint_every_n_steps",
        "log_every_n_steps",
        "histograms_every_n_epochs",
        "accumulate_grad_batches",
    )
    defaults = {name: getattr(TrainingSettings(), name) for name in names}
    for layers in ("manualgrad",) if settings.short else ("manualgrad", "torch"):
        with row.trial("long runs"):
            epochs = max(2, settings.steps // 250)
            run = Run(folder / layers, layers=layers, max_epochs=epochs, rows=4000, **defaults).start()
            samples: list[tuple[float, float]] = []
            while run.process.poll() is None:
                status = Path(f"/proc/{run.process.pid}/status").read_text()
                if found := re.search(r"RssAnon:\s+(\d+) kB", status):
                    samples.append((time.monotonic(), int(found[1]) / 1024))
                time.sleep(0.05)
            run.finish()
            times, sizes = np.array(samples[len(samples) * 3 // 10 : -2]).T
            growth = np.polyfit(times, sizes, 1)[0] * (times[-1] - times[0])
            row.notes.append(f"{layers}: {250 * epochs} steps; memory grew by {growth:.1f} MiB in the last 70 %")
            expect(growth < 4 or settings.short, row.notes[-1])

    with row.trial("comparisons with runs that write nothing"):
        epochs, blocks = (2, 5) if settings.short else (10, 25)
        size: dict[str, Any] = {"width": 512, "rows": 1280 * blocks, "batch_size": 128, "workers": 0}
        size["precision"] = "float32"  # not every processor has bfloat16
        job = Job(run_dir=folder / "paired", max_epochs=epochs, progress_bar=False, **size, **defaults)
        logged, bare = alternate(job, job.model_copy(update={"run_dir": None}))
        block = statistics.median(a - b for a, b in zip(logged.blocks, bare.blocks, strict=True))
        end = statistics.median(a - b for a, b in zip(logged.ends, bare.ends, strict=True))
        step = statistics.median(bare.blocks) / 10
        curves, saving = block / 10 / step, end / (10 * blocks) / step
        row.notes.append(
            f"curves cost {100 * curves:.1f} % and checkpoints {100 * saving:.1f} % of a step of "
            f"{1000 * step:.1f} ms, the medians of {len(bare.blocks)} and {len(bare.ends)} pairs"
        )
        expect(curves + saving < 0.02 or settings.short, row.notes[-1])


class Timings:
    """CPU time of a run: for each ten steps, and for the end of each epoch."""

    def __init__(self) -> None:
        self.blocks: list[float] = []
        self.ends: list[float] = []
        self.turn = threading.Semaphore(0)
        self.finished = False


def alternate(first: Job, second: Job) -> tuple[Timings, Timings]:
    """Alternate between two runs every ten steps, so that both are disturbed by the same noise.

    The time includes what a run's threads write.
    """
    timings = Timings(), Timings()

    def run(job: Job, own: Timings, other: Timings) -> None:
        data = Rows(job.rows, job.plain, seed=1)
        batches = list(zip(data.x.split(job.batch_size), data.y.split(job.batch_size), strict=True))
        begin = math.nan

        def switch(times: list[float] | None) -> None:
            nonlocal begin
            job_trainer.checkpoints.wait()
            if times is not None:
                times.append(time.process_time() - begin)
            other.turn.release()
            if not other.finished:
                own.turn.acquire()
            begin = time.process_time()

        class Batches:
            """The batches of an epoch. After every ten it switches to the other run."""

            epochs = 0

            def __len__(self) -> int:
                return len(batches)

            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                switch(own.ends if self.epochs else None)
                self.epochs += 1
                for number, batch in enumerate(batches, start=1):
                    yield batch
                    if number % 10 == 0:
                        switch(own.blocks)

        own.turn.acquire()
        try:
            job_trainer = trainer(job, batches=Batches())
            job_trainer.validation_loader = batches[:1]  # its noise would hide the cost of a checkpoint
            job_trainer.fit()
        finally:
            own.finished = True
            other.turn.release()

    with ThreadPoolExecutor(2) as threads:
        runs = threads.submit(run, first, *timings), threads.submit(run, second, *reversed(timings))
        timings[0].turn.release()
    for future in runs:
        future.result()
    return timings


def models(row: Row, settings: Settings, folder: Path) -> None:
    """The same is true for models of torch.nn, of manualgrad.nn, converted and compiled ones."""
    generator = random.Random(settings.seed)
    for layers in ("converted",) if settings.short else ("torch", "manualgrad", "converted", "compiled"):
        with row.trial("killed runs compared", layers):
            undisturbed = undisturbed_run(folder / f"{layers}-undisturbed", layers=layers)
            run = Run(folder / layers, layers=layers).start()
            batch = generator.randint(1, TOTAL_BATCHES - 8)
            expect(
                run.wait_for_batch(batch, generator.random()),
                f"the run ended before batch {batch}: {run.stderr()}",
            )
            run.kill()
            run.start().finish()
            run.expect_same_outcome(undisturbed)


CHECKS = (kill, signals, checkpoints, disk, nonfinite, processes, long, models)


def run_check(check: Callable[[Row, Settings, Path], None], settings: Settings, folder: Path) -> Row:
    """Run a check, and return its row. The runs are in a subfolder with its name."""
    row = Row(" ".join((check.__doc__ or "").split()))
    with row.trial("check", "outside of a trial"):
        subfolder = folder / check.__name__
        subfolder.mkdir(parents=True)
        check(row, settings, subfolder)
    del row.counts["check"]
    return row


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more workers than cores
    settings = parse_settings(Settings).resolved()
    print(f"seed {settings.seed}, torch {torch.__version__}\n\n| check | done | result |\n|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        for check in CHECKS:
            if not settings.only or check.__name__ in settings.only:
                rows.append(run_check(check, settings, settings.keep or Path(temporary)))
                print(rows[-1], flush=True)
    sys.exit(1 if any(row.failures for row in rows) else 0)


if __name__ == "__main__":
    main()
