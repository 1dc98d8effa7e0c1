"""Time and memory of manualgrad compared with torch.nn, torch.compile, checkpointing and (on CUDA) Liger-Kernel.

    python scripts/benchmark.py                  whole models (scripts/lib/models.py), then single operations
    python scripts/benchmark.py --suite models --only gpt --only llama --device cuda --dtype bfloat16

The script first compares the gradients. A difference ends the report. It then runs forward and backward of all
variants in turn, in one process and without an optimizer. It prints the median time of each variant, and the
median over turns of its ratio to torch.nn.

Saved for backward: bytes that `manualgrad.saved_bytes` counts, for a model without parameters and batch, for an
operation with its inputs. Peak: the most memory during a step above that before it, measured in a fresh process.
This is the process's resident memory on the CPU, and allocated tensors on CUDA. On the CPU, malloc is set to
return freed memory to the system. By default glibc keeps blocks of up to 32 MiB, which can double the figure from
one run to the next.
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

import torch
from lib import models
from lib.steps import VARIANTS, ModelStep, operation_step, synchronized_time
from pydantic import PositiveFloat
from torch import Tensor
from torch.testing import assert_close

from manualgrad import nn, registry, saved_bytes
from manualgrad.training import CliSettings, fail, parse_settings
from manualgrad.verification.derivatives import along_line, derivative


class Settings(CliSettings):
    """Time and memory of manualgrad compared with torch.nn and others. A ratio below 1 means less."""

    suite: Literal["all", "operations", "models", "small", "orders"] = "all"
    """Single operations at sizes of real models, whole models, or both (all); small models, one thread (small);
    or the derivatives of layer norm of orders 1 to 4 (orders)."""
    only: list[str] = []
    """Names of the models and operations to measure; by default all."""
    device: str = "cpu"
    """The device to measure on: cpu or cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of inputs and parameters."""
    seconds: PositiveFloat = 3.0
    """How long to measure each row."""
    json_file: Path | None = None
    """Also write the figures to this file."""

    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def compare_gradients(
    name: str,
    manual_grads: Sequence[Tensor],
    torch_grads: Sequence[Tensor],
    exact_grads: Callable[[], Sequence[Tensor]],
    dtype: torch.dtype,
) -> None:
    """End the report if a gradient differs from torch's by more than rounding.

    A larger difference is accepted if the error relative to `exact_grads` (torch's in float64) is at most twice
    torch's.
    """
    tolerance = 16 * torch.finfo(dtype).eps
    for i, (manual_grad, torch_grad) in enumerate(zip(manual_grads, torch_grads, strict=True)):
        try:
            assert_close(manual_grad, torch_grad, rtol=tolerance, atol=tolerance * torch_grad.abs().max().item())
        except AssertionError as difference:
            exact = exact_grads()
            manual_error, torch_error = ((x.double() - exact[i]).norm().item() for x in (manual_grad, torch_grad))
            rounding = tolerance * max(x.abs().max().item() for x in exact)  # for gradients that are exactly 0
            if not manual_error <= 2 * torch_error + rounding:
                fail(f"{name}: gradient {i} differs from torch's: {difference}")


# Whole models


def available_variants(case: models.Case, settings: Settings) -> list[str]:
    """The names of the variants of a case that this machine can run, torch.nn first."""
    missing = set()
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since torch 2.13
        missing.add("torch_chunked")
    if settings.device == "cpu" or not importlib.util.find_spec("liger_kernel"):
        missing.add("liger")
    return ["torch", *(name for name in case.variants if name not in missing)]


def peak_memory(case_name: str, variant: str, settings: Settings) -> int | None:
    """The most bytes in use during a step, above those before it. Call it in a fresh process.

    None if the system cannot report it.
    """
    run = ModelStep(models.CASES_BY_NAME[case_name], variant, settings.device, settings.torch_dtype())
    for _ in range(2):  # warm-up: load libraries, compile kernels
        run.zero_grad()
        run.step()
    run.zero_grad()
    gc.collect()
    if settings.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.step()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # return free memory to the system
    reset.write_text("5")  # reset VmHWM; the peak of getrusage would include the parent process
    before = _process_memory("VmRSS")
    run.step()
    return _process_memory("VmHWM") - before


def _process_memory(name: str) -> int:
    """A field of Linux's status of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


class ModelRow(NamedTuple):
    """The figures of one variant of a model."""

    model: str
    variant: str
    first_step_seconds: float
    """Includes compilation."""
    ms: float
    time_ratio: float
    saved_bytes: int
    peak_bytes: int | None


MIN_TURNS = 4
"""The first turn is warm-up."""


def measure_model(case: models.Case, settings: Settings) -> list[ModelRow]:
    """Return a row for each variant of a case, torch.nn first."""
    runs: dict[str, ModelStep] = {}
    first_step: dict[str, float] = {}
    saved: dict[str, int] = {}
    torch_grads: list[Tensor] = []

    @cache
    def exact_grads() -> list[Tensor]:
        return ModelStep(case, "torch", settings.device, torch.float64).gradients()

    for name in available_variants(case, settings):
        run = ModelStep(case, name, settings.device, settings.torch_dtype())
        try:
            first_step[name] = run.seconds()
        except Exception as error:
            if not VARIANTS[name].optional:
                raise
            print(f"{case.name}: {name} does not run here: {error!r:.200}", file=sys.stderr)
            continue
        gradients = run.gradients()
        if name == "torch":
            torch_grads = gradients
        elif not VARIANTS[name].compile:  # compiled code draws other random numbers for dropout
            compare_gradients(f"{case.title}, {name}", gradients, torch_grads, exact_grads, settings.torch_dtype())
        saved[name] = saved_bytes(run.function, *run.batch).total
        runs[name] = run
    turns = run_in_turn(runs, settings.seconds * len(runs))
    rows = []
    for name in runs:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
            peak = fresh_process.submit(peak_memory, case.name, name, settings).result()
        ratio = statistics.median(turn[name] / turn["torch"] for turn in turns)
        ms = 1e3 * statistics.median(turn[name] for turn in turns)
        rows.append(ModelRow(case.name, name, first_step[name], ms, ratio, saved[name], peak))
    return rows


def run_in_turn(runs: dict[str, ModelStep], seconds: float) -> list[dict[str, float]]:
    """Return the duration of a step of each run in each turn, without warm-up."""
    turns: list[dict[str, float]] = []
    start, names = time.perf_counter(), list(runs)
    while len(turns) < MIN_TURNS or time.perf_counter() - start < seconds:
        names = [*names[1:], names[0]]  # a step can be faster or slower after a certain other one
        turns.append({name: runs[name].seconds() for name in names})
    return turns[1 + len(turns) // 10 :]


MODEL_HEADER = """\
| model | variant | ms | time / torch | saved, MiB | saved / torch | peak, MiB | peak / torch |
|---|---|---|---|---|---|---|---|"""


def model_lines(case: models.Case, rows: Sequence[ModelRow]) -> Iterator[str]:
    """The rows of one case as lines of the table."""
    torch_row = rows[0]
    for row in rows:
        variant = VARIANTS[row.variant]
        title = variant.title
        if variant.compile:
            title += f", first step {row.first_step_seconds:.0f} s"
        cells = [case.title if row is torch_row else "", title, f"{row.ms:.1f}", f"{row.time_ratio:.2f}"]
        for size, torch_size in (
            (row.saved_bytes, torch_row.saved_bytes),
            (row.peak_bytes, torch_row.peak_bytes),
        ):
            if size is None:
                cells += ["", ""]
            else:
                cells += [f"{size / 2**20:.1f}", f"{size / torch_size:.2f}" if torch_size else ""]
        yield f"| {' | '.join(cells)} |"


# Single operations


REPEATS = 5
"""How often the inputs of a row are allocated again: their place in memory changes times by a few percent."""

OPERATION_HEADER = """\
| operation | manualgrad, ms | torch, ms | time / torch | saved for backward / torch |
|---|---|---|---|---|"""


class OperationRow(NamedTuple):
    """The figures of one operation."""

    name: str
    manual_ms: float
    torch_ms: float
    time_ratio: float
    saved_ratio: float

    def __str__(self) -> str:
        figures = [f"{x:.3f}" for x in self[1:3]] + [f"{x:.2f}" for x in self[3:]]
        return f"| {self.name} | {' | '.join(figures)} |"


def measure_operation(op: registry.Op, settings: Settings) -> OperationRow:
    """Measure an operation on its benchmark input."""
    times: list[tuple[float, float]] = []
    saved_ratio = 1.0
    make = partial(operation_step, op, device=settings.device)
    dtype = settings.torch_dtype()

    def exact_grads() -> list[Tensor]:
        return make(op.reference, dtype=torch.float64).step()

    for _ in range(REPEATS):
        manual, reference = make(op.function, dtype=dtype), make(op.reference, dtype=dtype)
        if "gradients_match_torch" not in op.expected_failures:  # there torch's gradient is wrong
            compare_gradients(op.name, manual.step(), reference.step(), exact_grads, dtype)
        manual_bytes, torch_bytes = (saved_bytes(x.forward).grand_total for x in (manual, reference))
        saved_ratio = (1 + manual_bytes) / (1 + torch_bytes)  # defined if both save nothing
        start = time.perf_counter()
        pairs: list[tuple[float, float]] = []
        while len(pairs) < 5 or time.perf_counter() - start < settings.seconds / REPEATS:
            pairs.append((duration(manual.step, settings.device), duration(reference.step, settings.device)))
        times += pairs[1 + len(pairs) // 10 :]  # without warm-up
    return OperationRow(
        op.name,
        1e3 * statistics.median(a for a, _ in times),
        1e3 * statistics.median(b for _, b in times),
        statistics.median(a / b for a, b in times),
        saved_ratio,
    )


def duration(step: Callable[[], object], device: str) -> float:
    start = synchronized_time(device)
    step()
    return synchronized_time(device) - start


# Derivatives of higher order


def layer_norm_derivatives() -> list[tuple[str, float, float, float]]:
    """Directional derivatives of layer norm: modes, and the values of a plain formula, manualgrad and torch.

    "rf" means reverse mode first, then forward mode over it. The plain formula is made of operations that torch
    differentiates one by one.
    """
    make = registry.TensorFactory()
    points, directions, grad_output = [make(4, 6)], [make(4, 6)], make(4, 6)

    def plain(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    functions = [
        plain,
        lambda x: nn.functional.layer_norm(x, (6,)),
        lambda x: torch.nn.functional.layer_norm(x, (6,)),
    ]
    lines = [along_line(function, points, directions, lambda y: (grad_output * y).sum()) for function in functions]
    rows = []
    for modes in ("r", "f", "rr", "rf", "fr", "ff", "rrr", "rrf", "fff", "rrrr", "ffff"):
        plain_value, manual_value, torch_value = (derivative(along, modes) for along in lines)
        rows.append((modes, plain_value, manual_value, torch_value))
    return rows


def layer_norm_table() -> str:
    rows = ["| derivative of layer norm | plain formula | manualgrad | torch |", "|---|---|---|---|"]
    for modes, *values in layer_norm_derivatives():
        names = " over ".join({"r": "reverse", "f": "forward"}[mode] for mode in reversed(modes))
        rows.append(f"| {len(modes)}: {names} | {' | '.join(f'{value:.4f}' for value in values)} |")
    return "\n".join(rows)


def main() -> None:
    settings = parse_settings(Settings)
    if settings.suite == "orders":
        print(layer_norm_table())
        return
    if settings.suite == "small":
        torch.set_num_threads(1)
    ops = registry.ops() if settings.suite in ("all", "operations") else {}
    cases = {} if settings.suite == "operations" else models.CASES_BY_NAME
    if unknown := set(settings.only) - {*cases, *ops}:
        fail(f"--only: {', '.join(sorted(unknown))} not found among {', '.join([*cases, *ops])}")
    if settings.only:
        cases = {name: cases[name] for name in settings.only if name in cases}
        ops = {name: ops[name] for name in settings.only if name in ops}
    elif settings.suite == "small":
        cases = {case.name: case for case in models.SMALL}
    else:
        excluded = models.SMALL + (models.LAYERS if settings.device == "cpu" else [])
        cases = {name: case for name, case in cases.items() if case not in excluded}
    where = "CPU" if settings.device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, {settings.dtype}")
    print("Each row is one forward and backward.")
    rows: list[Any] = []
    if cases:
        print(f"\n{MODEL_HEADER}")
    for case in cases.values():
        model_rows = measure_model(case, settings)
        print(*model_lines(case, model_rows), sep="\n", flush=True)
        rows += model_rows
    if ops:
        print(f"\n{OPERATION_HEADER}")
    for op in ops.values():
        rows.append(row := measure_operation(op, settings))
        print(row, flush=True)
    if settings.json_file:
        settings.json_file.write_text(json.dumps([row._asdict() for row in rows], indent=1))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache_folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_folder  # so that torch.compile compiles in each run
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # for the fresh processes
        main()
