"""Time and memory of manualgrad beside torch.nn, torch.compile, checkpointed blocks and, on CUDA, Liger-Kernel.

    python scripts/benchmark.py                  whole models (scripts/models.py), then single operations
    python scripts/benchmark.py --what models --only gpt --only llama --device cuda --dtype bfloat16

Gradients are compared first, and a difference ends the report. Then forward and backward of all run in turn, in
one process and without an optimizer: shown is each one's median, and that of its ratios to torch.nn, turn by turn.

Kept for backward is what `manualgrad.saved_bytes` counts: of a model without its parameters and its batch, of an
operation with its inputs. The peak is the most memory during a step above that before it, measured in a fresh
process for each: on the CPU what the process has of the machine's, on CUDA what tensors have of the device's.
On the CPU the process is told to give back what it frees: glibc keeps blocks of up to 32 MiB for later, by a
threshold that moves, which may double the figure from one run to the next.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import models
import torch
from pydantic import PositiveFloat
from steps import CONTESTANTS, Run, Step, operation, synchronized
from torch import Tensor
from torch.testing import assert_close

from manualgrad import nn, registry, saved_bytes
from manualgrad.training import CliSettings, fail, parse_settings
from manualgrad.verification.derivatives import along_line, derivative


class Settings(CliSettings):
    """Time and memory of manualgrad beside torch.nn and others, as ratios: below 1 for the better."""

    what: Literal["all", "models", "operations", "orders"] = "all"
    """Whole models, single operations at the size that real models have, both of these, or the derivatives of
    layer norm of orders 1 to 4."""
    only: list[str] = []
    """The models and operations to measure, by name; by default all."""
    device: str = "cpu"
    """Where to measure: cpu or cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of inputs and parameters."""
    seconds: PositiveFloat = 3.0
    """How long to measure each row."""
    json_file: Path | None = None
    """Write the figures there as well."""

    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def compare(
    name: str,
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    exact: Callable[[], Sequence[Tensor]],
    dtype: torch.dtype,
) -> None:
    """End the report where a gradient differs from torch's by more than rounding: unless torch's is no nearer to
    its own in float64, `exact`."""
    tolerance = 16 * torch.finfo(dtype).eps
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        try:
            assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
        except AssertionError as difference:
            true = exact()
            ours, torch_s = ((x.double() - true[i]).norm().item() for x in (a, b))
            rounding = tolerance * max(x.abs().max().item() for x in true)  # a gradient of zero is nothing else
            if not ours <= 2 * torch_s + rounding:
                fail(f"{name}: gradient {i} differs from torch's: {difference}")


# Whole models


def contestants(case: models.Case, settings: Settings) -> list[str]:
    """Who can run here."""
    missing = set()
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since torch 2.13
        missing.add("chunked")
    if settings.device == "cpu" or not importlib.util.find_spec("liger_kernel"):
        missing.add("liger")
    return ["torch", *(name for name in case.contestants if name not in missing)]


def peak(case_name: str, contestant: str, settings: Settings) -> int | None:
    """Bytes that a step needs at most above those that are there before it; to be called in a fresh process."""
    run = Run(models.NAMED[case_name], contestant, settings.device, settings.torch_dtype())
    for _ in range(2):  # libraries are loaded, kernels compiled
        run.clear()
        run.step()
    run.clear()
    gc.collect()
    if settings.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.step()
        return torch.cuda.max_memory_allocated() - before
    if not (reset := Path("/proc/self/clear_refs")).exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    reset.write_text("5")  # the high-water mark (that of getrusage would also know the parent's)
    before = _memory("VmRSS")
    run.step()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


class ModelRow(NamedTuple):
    model: str
    contestant: str
    first_s: float
    """The first step, in which torch.compile compiles."""
    ms: float
    time_ratio: float
    kept: int
    peak: int | None


def measure_model(case: models.Case, settings: Settings) -> list[ModelRow]:
    """The rows of one case, torch.nn's first."""
    runs: dict[str, Run] = {}
    first: dict[str, float] = {}
    kept: dict[str, int] = {}
    expected: list[Tensor] = []

    @cache
    def exact() -> list[Tensor]:
        return Run(case, "torch", settings.device, torch.float64).gradients()

    for name in contestants(case, settings):
        run = Run(case, name, settings.device, settings.torch_dtype())
        try:
            first[name] = run.seconds()
        except Exception as error:
            if not CONTESTANTS[name].foreign:
                raise
            print(f"{case.name}: {name} does not run here: {error!r:.200}", file=sys.stderr)
            continue
        found = run.gradients()
        if name == "torch":
            expected = found
        elif not CONTESTANTS[name].compiled:  # which draws other random numbers for dropout
            compare(f"{case.title}, {name}", found, expected, exact, settings.torch_dtype())
        kept[name] = saved_bytes(run.function, *run.batch).total
        runs[name] = run
    times: list[dict[str, float]] = []
    begin, names = time.perf_counter(), list(runs)
    while len(times) < FEWEST or time.perf_counter() - begin < settings.seconds * len(runs):
        names = [*names[1:], names[0]]  # each after another
        times.append({name: runs[name].seconds() for name in names})
    del times[: 1 + len(times) // 10]  # warm-up
    rows = []
    for name in runs:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            most = fresh.submit(peak, case.name, name, settings).result()
        ratio = statistics.median(turn[name] / turn["torch"] for turn in times)
        ms = 1e3 * statistics.median(turn[name] for turn in times)
        rows.append(ModelRow(case.name, name, first[name], ms, ratio, kept[name], most))
    return rows


FEWEST = 4
"""Turns, the first of which is warm-up."""

MODEL_HEAD = """\
| forward + backward | | ms | / torch.nn | kept, MiB | / torch.nn | peak, MiB | / torch.nn |
|---|---|---|---|---|---|---|---|"""


def model_lines(case: models.Case, rows: Sequence[ModelRow]) -> Iterator[str]:
    """The rows of one case as lines of the table."""
    base = rows[0]
    for row in rows:
        contestant = CONTESTANTS[row.contestant]
        title = f"{contestant.title}, ready in {row.first_s:.0f} s" if contestant.compiled else contestant.title
        cells = [case.title if row is base else "", title, f"{row.ms:.1f}", f"{row.time_ratio:.2f}"]
        for mine, torchs in ((row.kept, base.kept), (row.peak, base.peak)):
            figures = (
                ("", "") if mine is None else (f"{mine / 2**20:.1f}", f"{mine / torchs:.2f}" if torchs else "")
            )
            cells += figures
        yield f"| {' | '.join(cells)} |"


# Single operations


REPEATS = 5
"""How often a row is made anew: how its memory happens to lie counts for a few percent."""

OPERATION_HEAD = """\
| forward + backward | ours, ms | torch, ms | time, ours / torch | kept for backward, ours / torch |
|---|---|---|---|---|"""


class OperationRow(NamedTuple):
    name: str
    ours_ms: float
    torch_ms: float
    time_ratio: float
    kept_ratio: float

    def __str__(self) -> str:
        figures = [f"{x:.3f}" for x in self[1:3]] + [f"{x:.2f}" for x in self[3:]]
        return f"| {self.name} | {' | '.join(figures)} |"


def measure_operation(op: registry.Op, settings: Settings) -> OperationRow:
    times: list[tuple[float, float]] = []
    kept = 1.0
    make = partial(operation, op, device=settings.device)
    dtype = settings.torch_dtype()
    for _ in range(REPEATS):
        (ours, our_forward), (torch_s, torch_forward) = (make(f, dtype=dtype) for f in (op.function, op.reference))
        if "torchs_gradient_of_each_subset" not in op.expected_failures:  # where torch's is wrong
            compare(op.name, ours(), torch_s(), lambda: make(op.reference, dtype=torch.float64)[0](), dtype)
        our_kept, torchs_kept = (saved_bytes(forward).grand_total for forward in (our_forward, torch_forward))
        kept = (1 + our_kept) / (1 + torchs_kept)  # 1: both may keep nothing
        begin = time.perf_counter()
        fresh: list[tuple[float, float]] = []
        while len(fresh) < 5 or time.perf_counter() - begin < settings.seconds / REPEATS:
            fresh.append((timed(ours, settings), timed(torch_s, settings)))
        times += fresh[1 + len(fresh) // 10 :]  # the first are warm-up
    return OperationRow(
        op.name,
        1e3 * statistics.median(a for a, _ in times),
        1e3 * statistics.median(b for _, b in times),
        statistics.median(a / b for a, b in times),
        kept,
    )


def timed(step: Step, settings: Settings) -> float:
    begin = synchronized(settings.device)
    step()
    return synchronized(settings.device) - begin


# Orders


def layer_norm_derivatives() -> list[tuple[str, float, float, float]]:
    """Derivatives along a line, by the modes they are taken in ("rf": forward over reverse): of the plain formula,
    whose every step torch differentiates, of ours, and of torch's layer norm."""
    make = registry.TensorFactory()
    points, directions, upstream = [make(4, 6)], [make(4, 6)], make(4, 6)

    def plain(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    functions = [
        plain,
        lambda x: nn.functional.layer_norm(x, (6,)),
        lambda x: torch.nn.functional.layer_norm(x, (6,)),
    ]
    lines = [along_line(function, points, directions, lambda y: (upstream * y).sum()) for function in functions]
    rows = []
    for modes in ("r", "f", "rr", "rf", "fr", "ff", "rrr", "rrf", "fff", "rrrr", "ffff"):
        plain_s, ours, torch_s = (derivative(along, modes) for along in lines)
        rows.append((modes, plain_s, ours, torch_s))
    return rows


def layer_norm_table() -> str:
    rows = ["| derivative of layer norm | plain formula | ours | torch |", "|---|---|---|---|"]
    for modes, *figures in layer_norm_derivatives():
        words = " over ".join({"r": "reverse", "f": "forward"}[mode] for mode in reversed(modes))
        rows.append(f"| {len(modes)}: {words} | {' | '.join(f'{figure:.4f}' for figure in figures)} |")
    return "\n".join(rows)


def main() -> None:
    settings = parse_settings(Settings)
    if settings.what == "orders":
        print(layer_norm_table())
        return
    ops = {} if settings.what == "models" else registry.ops()
    cases = {} if settings.what == "operations" else models.NAMED
    if unknown := set(settings.only) - {*cases, *ops}:
        fail(f"--only: {', '.join(sorted(unknown))} not found among {', '.join([*cases, *ops])}")
    if settings.only:
        cases = {name: cases[name] for name in settings.only if name in cases}
        ops = {name: ops[name] for name in settings.only if name in ops}
    elif settings.device == "cpu":
        cases = {name: case for name, case in cases.items() if case not in models.LAYERS}
    where = "CPU" if settings.device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, {settings.dtype}")
    rows: list[Any] = []
    if cases:
        print(f"\n{MODEL_HEAD}")
    for case in cases.values():
        found = measure_model(case, settings)
        print(*model_lines(case, found), sep="\n", flush=True)
        rows += found
    if ops:
        print(f"\n{OPERATION_HEAD}")
    for op in ops.values():
        rows.append(row := measure_operation(op, settings))
        print(row, flush=True)
    if settings.json_file:
        settings.json_file.write_text(json.dumps([row._asdict() for row in rows], indent=1))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty  # what torch.compile has cached would not be compiled
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # for the fresh processes
        main()
