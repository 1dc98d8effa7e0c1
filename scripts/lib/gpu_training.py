"""Stage 3 of scripts/check_gpu.py: the main job, and DDP and FSDP2 in one process."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from manualgrad import convert

from .gpu_correctness import Item, Items, Results, compare_results
from .gpu_results import FAILED, PASSED, SKIPPED, Row
from .models import gpt, language_batch

PACKAGES = {
    "PIL": "pillow",
    "numpy": "numpy",
    "pandas": "pandas",
    "pydantic_settings": "pydantic-settings",
    "tensorboard": "tensorboard",
    "tqdm": "tqdm",
}
"""Modules that the main job imports besides torch, and their packages."""


def training_items(options: argparse.Namespace) -> Items:
    device, missing = options.device, missing_packages()

    def requiring_packages(case: str, rows: Item) -> Iterable[Row]:
        detail = f"needs {', '.join(missing)}: pip install -e '.[training]'"
        return [{"status": SKIPPED, "case": case, "detail": detail}] if missing else rows()

    resume = partial(resume_rows, device)
    return {
        "train": partial(requiring_packages, "two epochs, interrupted and resumed", resume),
        "one_process": partial(one_process_rows, device),
        **{
            f"train, {x}": partial(requiring_packages, x, partial(mixed_precision_rows, device, x))
            for x in ("bfloat16", "float16")
        },
    }


def missing_packages() -> list[str]:
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not any(importlib.metadata.distributions(name="manualgrad")):
        missing.append("manualgrad")
    return missing


def fit(device: str, folder: str, **settings: Any) -> Any:
    """Train like the main job, for two epochs."""
    import train_regression

    settings |= {"device": device, "max_epochs": 2, "progress_bar": False, "log_every_n_steps": 5}
    settings |= {"batch_size": 2048} if device == "cpu" else {}
    chosen = train_regression.Settings(run_dir=Path(folder), **settings)
    with redirect_stdout(sys.stderr):
        return train_regression.train(chosen.resolved())


def compare_r2(case: str, manual_fit: Any, torch_fit: Any) -> Row:
    """Compare the R² of the test rows."""
    manual_r2, torch_r2 = (x.summary["test_r2"] for x in (manual_fit, torch_fit))
    detail = f"R² of the test rows {manual_r2:.4f}, with torch.nn {torch_r2:.4f}"
    return {"status": PASSED if manual_r2 > torch_r2 - 0.005 else FAILED, "case": case, "detail": detail}


def resume_rows(device: str) -> Iterator[Row]:
    """A run that is interrupted and resumed has the curves of an uninterrupted one."""
    updates, interrupted_at = 0, 0

    def interrupt(*_: Any) -> None:
        nonlocal updates
        updates += 1
        if updates == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    with tempfile.TemporaryDirectory() as folder:
        uninterrupted = fit(device, f"{folder}/uninterrupted")
        yield compare_r2("two epochs", uninterrupted, fit(device, f"{folder}/torch", model="torch"))
        stop = uninterrupted.global_step * 3 // 4
        hook = register_optimizer_step_post_hook(interrupt)
        try:
            fit(device, f"{folder}/resumed")
        except KeyboardInterrupt as interruption:
            interrupted_at = getattr(interruption, "step", 0)
        finally:
            hook.remove()
        fit(device, f"{folder}/resumed", resume_from_checkpoint=True)
        found, expected = read_curves(f"{folder}/resumed"), read_curves(f"{folder}/uninterrupted")
    different = [tag for tag in {**found, **expected} if found.get(tag) != expected.get(tag)]
    steps = uninterrupted.global_step
    detail = (
        f"interrupted after update {interrupted_at} of {steps}; {len(different)} of {len(expected)} curves differ"
    )
    status = PASSED if stop <= interrupted_at < steps and not different else FAILED
    yield {"status": status, "case": "interrupted and resumed", "detail": ", ".join([detail, *different[:3]])}


def mixed_precision_rows(device: str, precision: str) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        runs = (fit(device, f"{folder}/{x}", model=x, precision=precision) for x in ("manualgrad", "torch"))
        yield compare_r2(f"two epochs, autocast to {precision}", *runs)


def read_curves(folder: str) -> dict[str, list[tuple[int, float]]]:
    """The TensorBoard curves of a run, except for its speed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def one_process_rows(device: str) -> Iterator[Row]:
    """DDP and FSDP2 in a single process have the gradients of the model itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}
    backend = "gloo" if device == "cpu" else "nccl"

    def gradients(wrap: Callable[[torch.nn.Module], Any]) -> Results:
        torch.manual_seed(0)
        model = convert(gpt(64, 32, 2, 2, dropout=0.0), functional=True).to(device)
        wrapped = wrap(model)
        torch.manual_seed(1)
        for _ in range(2):  # DDP reuses its buckets in the second step
            wrapped.zero_grad()
            wrapped(*[x.to(device) for x in language_batch(64, 2, 16)()]).backward()
        grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        full = {name: getattr(g, "full_tensor", lambda g=g: g)().cpu() for name, g in grads.items()}
        return Results([(f"gradient of {name}", g) for name, g in full.items()], False)

    dist.init_process_group(backend)
    try:
        expected = gradients(lambda model: model)
        for name, wrap in (("DDP", DistributedDataParallel), ("FSDP2", fully_shard)):
            row = compare_results(gradients(wrap), expected, expected, torch.float32)
            yield {"case": f"{name}, {backend}", **row}
    finally:
        dist.destroy_process_group()
