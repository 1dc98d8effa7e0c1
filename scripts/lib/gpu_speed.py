"""Stages 4 and 5 of scripts/check_gpu.py: time and peak memory of operations and models. Needs torch only."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manualgrad.registry import Op, TensorFactory

from . import models
from .gpu_correctness import (
    DTYPES,
    Items,
    Results,
    check_device,
    compare_calls,
    compare_results,
    has_wrong_torch_gradient,
    one_line,
    operation_call,
    ordered_operations,
)
from .gpu_results import FAILED, MEASURED, SKIPPED, Row
from .models import BERT, Case, ResNet, ViT, classification_batch, gpt, language_batch
from .steps import ModelStep, operation_step

Step = Callable[[], Any]


def time_in_turn(steps: dict[str, Step], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds per step for each of `steps`, turn by turn. A turn has several calls of short steps."""

    def seconds_per_call(step: Step, calls: int) -> float:
        if device == "cpu":
            start = time.perf_counter()
            for _ in range(calls):
                step()
            return (time.perf_counter() - start) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    for step in steps.values():  # warm-up
        seconds_per_call(step, 3)
    calls = max(1, min(50, round(2e-3 / min(seconds_per_call(step, 1) for step in steps.values()))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    names, start = list(steps), time.perf_counter()
    while len(times[names[0]]) < 5 or time.perf_counter() - start < seconds:
        names = [*names[1:], names[0]]
        for name in names:
            times[name].append(seconds_per_call(steps[name], calls))
    return times


def peak_memory(step: Step, device: str) -> int | None:
    """The most bytes allocated during a step, above those before it. Not measured on the CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(makers: dict[str, Callable[[], Step]], device: str, seconds: float, case: str) -> Iterator[Row]:
    """A row for each pair of a manualgrad step (its name begins with "manualgrad") and another one."""
    steps: dict[str, Step] = {}
    for name, make in makers.items():
        try:
            step = make()
            step()
        except Exception as error:
            check_device(device)
            status = FAILED if name.startswith("manualgrad") else SKIPPED
            yield {"status": status, "case": case, "detail": f"{name} raises {one_line(error)}"}
        else:
            steps[name] = step
    if not steps:
        return
    times = time_in_turn(steps, device, seconds)
    peaks = {name: peak_memory(step, device) for name, step in steps.items()}
    for manual in (name for name in steps if name.startswith("manualgrad")):
        for other in (name for name in steps if not name.startswith("manualgrad")):
            ratio = statistics.median(a / b for a, b in zip(times[manual], times[other], strict=True))
            ms = [1e3 * statistics.median(times[name]) for name in (manual, other)]
            figures = {"ms": ms, "ratio": ratio, "peak": [peaks[manual], peaks[other]]}
            yield {"status": MEASURED, "case": case, "compared": f"{manual} / {other}", **figures}


# Stage 4: operations


def speed_items(options: argparse.Namespace) -> Items:
    device, seconds = options.device, 0.02 * options.minutes
    ops = ordered_operations().values()
    items: Items = {}
    for name in ["float32"] if device == "cpu" else ["bfloat16", "float32"]:
        items |= {f"{op}, {name}": partial(eager_rows, op, name, device, seconds) for op in ops}
        items |= {
            f"{case.name}, {name}": partial(liger_rows, case, name, device, seconds) for case in models.LAYERS
        }
        items |= {f"{op}, compiled, {name}": partial(compiled_rows, op, name, device, seconds) for op in ops}
    return items


def operation_makers(
    op: Op, functions: dict[str, Callable[..., Any]], device: str, dtype: torch.dtype
) -> dict[str, Callable[[], Step]]:
    def make(function: Callable[..., Any]) -> Step:
        return operation_step(op, function, device, dtype).step

    return {name: partial(make, function) for name, function in functions.items()}


def eager_rows(op: Op, dtype_name: str, device: str, seconds: float) -> Iterator[Row]:
    dtype = DTYPES[dtype_name]
    call = op.benchmark_input(TensorFactory(dtype))
    wrong = has_wrong_torch_gradient(op)
    yield {"case": str(call), **compare_calls(operation_call(op, call), device, dtype, wrong, exact_device=device)}
    functions = {"manualgrad": op.function, "torch": op.reference}
    yield from measure(operation_makers(op, functions, device, dtype), device, seconds, dtype_name)


def compiled_rows(op: Op, dtype_name: str, device: str, seconds: float) -> Iterator[Row]:
    torch.compiler.reset()
    dtype = DTYPES[dtype_name]
    functions = {"manualgrad": op.function, "torch.compile": torch.compile(op.reference)}
    if "compile" not in op.expected_failures:
        compiled = functions["manualgrad compiled"] = torch.compile(op.function)
        if not op.random:  # compiled code draws other random numbers
            call = operation_call(op, op.benchmark_input(TensorFactory(dtype)), compiled)
            row = compare_calls(call, device, dtype, has_wrong_torch_gradient(op), exact_device=device)
            yield {"case": f"manualgrad compiled, {dtype_name}", **row}
    yield from measure(operation_makers(op, functions, device, dtype), device, seconds, dtype_name)


def liger_rows(case: Case, dtype_name: str, device: str, seconds: float) -> Iterator[Row]:
    if device == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        needs = "CUDA" if device == "cpu" else "pip install liger-kernel"
        yield {"status": SKIPPED, "case": case.title, "detail": f"Liger-Kernel needs {needs}"}
        return
    variants = {"manualgrad": "manualgrad", "torch": "torch", "Liger-Kernel": "liger"}
    makers = model_makers(case, variants, device, DTYPES[dtype_name])
    yield from measure(makers, device, seconds, f"{case.title}, {dtype_name}")


# Stage 5: models


def model_items(options: argparse.Namespace) -> Items:
    device, seconds = options.device, 0.1 * options.minutes
    cases = [*small_cases(), *(large_cpu_cases() if device == "cpu" else large_gpu_cases())]
    compiled = {"manualgrad compiled": "manualgrad_compiled", "torch.compile": "torch_compiled"}
    items: Items = {f"{case.name}, eager": partial(eager_model_rows, case, device, seconds) for case in cases}
    return items | {
        f"{case.name}, compiled": partial(model_times, case, compiled, device, seconds) for case in cases
    }


def token_batch(vocabulary: int, *shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Random tokens and labels of two classes."""
    return lambda: (torch.randint(vocabulary, shape), torch.randint(2, shape[:1]))


def small_cases() -> list[Case]:
    images = classification_batch(4, 3, 64, 64)
    return [
        Case("gpt_small", "GPT, width 128, 2 blocks", lambda: gpt(256, 128, 2, 4), language_batch(256, 4, 64)),
        Case("bert_small", "BERT, width 128, 2 blocks", lambda: BERT(1000, 128, 2, 4), token_batch(1000, 4, 64)),
        Case("vit_small", "ViT, width 128, 2 blocks", lambda: ViT(64, 8, 128, 2, 4), images),
        Case("resnet_small", "ResNet, batch 8, 32x32", ResNet, classification_batch(8, 3, 32, 32)),
    ]


def large_cpu_cases() -> list[Case]:
    cases = {f"{x}_large": models.CASES_BY_NAME[x] for x in ("gpt", "bert", "vit", "resnet")}
    return [Case(name, case.title, case.make, case.batch) for name, case in cases.items()]


def large_gpu_cases() -> list[Case]:
    large_gpt, large_bert = partial(gpt, 50257, 1024, 12, 16), partial(BERT, 30522, 1024, 12, 16)
    large_vit = partial(ViT, 128, 8, 768, 12, 12)
    return [
        Case("gpt_large", "GPT, width 1024, 12 blocks, V=50257", large_gpt, language_batch(50257, 8, 256)),
        Case("bert_large", "BERT, width 1024, 12 blocks", large_bert, token_batch(30522, 16, 256)),
        Case("vit_large", "ViT, width 768, 12 blocks", large_vit, classification_batch(32, 3, 128, 128)),
        Case("resnet_large", "ResNet, batch 256, 64x64", ResNet, classification_batch(256, 3, 64, 64)),
    ]


def model_dtype(device: str) -> str:
    return "float32" if device == "cpu" else "bfloat16"


def model_gradients(case: Case, variant: str, device: str, dtype: torch.dtype) -> Results:
    """The gradients without dropout, which draws other numbers in another dtype."""
    run = ModelStep(case, variant, device, dtype)
    for module in run.model.modules():
        for rate in ("p", "dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    names = [f"gradient of {x}" for x, _ in run.model.named_parameters()]
    return Results(list(zip(names, [g.cpu() for g in run.gradients()], strict=True)), False)


def eager_model_rows(case: Case, device: str, seconds: float) -> Iterator[Row]:
    dtype_name = model_dtype(device)
    dtype = DTYPES[dtype_name]
    manual, reference = (model_gradients(case, variant, device, dtype) for variant in ("manualgrad", "torch"))
    exact = model_gradients(case, "torch", device, torch.float64)
    yield {"case": f"{case.title}, {dtype_name}", **compare_results(manual, reference, exact, dtype)}
    yield from model_times(case, {"manualgrad": "manualgrad", "torch": "torch"}, device, seconds)


def model_times(case: Case, variants: dict[str, str], device: str, seconds: float) -> Iterator[Row]:
    torch.compiler.reset()
    dtype_name = model_dtype(device)
    makers = model_makers(case, variants, device, DTYPES[dtype_name])
    yield from measure(makers, device, seconds, f"{case.title}, {dtype_name}")


def model_makers(
    case: Case, variants: dict[str, str], device: str, dtype: torch.dtype
) -> dict[str, Callable[[], Step]]:
    """A training step without an optimizer for each title and variant (a name in lib/steps.py)."""

    def make(variant: str) -> Step:
        run = ModelStep(case, variant, device, dtype)
        return lambda: (run.zero_grad(), run.step())

    return {title: partial(make, variant) for title, variant in variants.items()}
