"""The work of a worker process of scripts/check_gpu.py: the items of each stage, and how one is run."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import manualgrad

from .gpu_correctness import DeviceLost, Item, check_device, module_items, one_line, operation_items
from .gpu_results import FAILED
from .gpu_speed import model_items, speed_items
from .gpu_training import training_items

STAGE_ITEMS = {1: operation_items, 2: module_items, 3: training_items, 4: speed_items, 5: model_items}


def environment(device: str) -> dict[str, Any]:
    """Versions, environment variables and the device."""
    prefixes = ("MANUALGRAD", "CUDA", "TORCH", "NVIDIA_TF32", "PYTORCH")
    common: dict[str, Any] = {
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "manualgrad in": str(Path(manualgrad.__file__).parent),
        "threads": torch.get_num_threads(),
        **{name: value for name, value in os.environ.items() if name.startswith(prefixes)},
    }
    if device == "cpu":
        return {"device": "the CPU", **common}
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {
        "device": f"{torch.cuda.get_device_name()} ({memory:.0f} GiB)",
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "TF32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        **common,
    }


def has_device(device: str) -> bool:
    return device == "cpu" or torch.cuda.is_available()


def run_item(item: Item, device: str, put_row: Callable[..., None]) -> bool:
    """Run an item and pass each of its rows to `put_row`. Return whether the device is lost."""
    if device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device_lost = False
    try:
        for row in item():
            put_row(**row)
        check_device(device)
    except Exception as error:
        put_row(status=FAILED, case="", detail=one_line(error))
        try:
            check_device(device)
        except DeviceLost:
            device_lost = True
    gc.collect()
    if device != "cpu" and not device_lost:
        torch.cuda.empty_cache()
    return device_lost
