"""scripts/check_gpu.py on the CPU: it reports failures and keeps its results. The figures are not tested."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from lib import gpu_stages, gpu_training
from lib.gpu_correctness import DeviceLost, Results, compare_results
from lib.gpu_results import FAILED, MEASURED, NOT_REACHED, PASSED, SKIPPED
from lib.gpu_speed import measure
from lib.module_inputs import INPUTS, WITHOUT_INPUTS

ROOT = Path(__file__).parents[1]


def command(out: Path, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "check_gpu.py"), "--device", "cpu", "--out", str(out)] + [
        str(x) for x in arguments
    ]


def environment(*paths: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])), "OMP_NUM_THREADS": "1"}


def rows(out: Path, **conditions: Any) -> list[dict[str, Any]]:
    all_rows = json.loads((out / "results.json").read_text())["rows"]
    return [row for row in all_rows if all(row[name] == value for name, value in conditions.items())]


def test_one_minute(tmp_path: Path) -> None:
    """No failures, and items for which there was no time are listed."""
    done = subprocess.run(
        command(tmp_path, "--minutes", 1), env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "# manualgrad on the CPU: no failures" in done.stdout
    assert (tmp_path / "report.md").read_text() in done.stdout
    assert rows(tmp_path, stage=1, status=PASSED)
    options = Namespace(device="cpu", minutes=1)
    for stage, items in gpu_stages.STAGE_ITEMS.items():
        assert {row["item"] for row in rows(tmp_path, stage=stage)} == items(options).keys()


def test_every_stage(tmp_path: Path) -> None:
    """An item of each stage, without time pressure."""
    items = {2: "GELU", 3: "one_process", 4: "mish, float32", 5: "vit_small, eager"}
    arguments = command(tmp_path, "--stages", *items, "--only", *items.values(), "train, bfloat16", "liger_swiglu")
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for stage, name in items.items():
        assert rows(tmp_path, stage=stage, item=name, status=PASSED)
    for stage, name in ((4, "mish, float32"), (5, "vit_small, eager")):
        assert rows(tmp_path, stage=stage, item=name, status=MEASURED, compared="manualgrad / torch")
        assert f"| {name} | manualgrad / torch |" in done.stdout
    assert rows(tmp_path, stage=3, item="train, bfloat16", status=PASSED)
    assert rows(tmp_path, stage=4, item="liger_swiglu, float32", status=SKIPPED)


FAULTS = """
import os, sys

if "--work" in sys.orig_argv:
    from manualgrad import registry

    ops = registry.ops()
    original_gelu = ops["gelu"].function

    def gelu(x, approximate="none"):
        small = 0.01 * x
        return original_gelu(x, approximate=approximate) + (small - small.detach())

    def relu(x):
        raise RuntimeError("no such relu")

    def silu(x):
        os.kill(os.getpid(), 9)

    for function in (gelu, relu, silu):
        object.__setattr__(ops[function.__name__], "implementation", function)
"""


def test_failures_are_reported(tmp_path: Path) -> None:
    """A wrong gradient, an exception, and a killed process. The other items still run."""
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    done = subprocess.run(
        command(tmp_path, "--stages", 1, "--only", "gelu", "relu", "silu", "tanh"),
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("- ")]
    rerun = "`python scripts/check_gpu.py --device cpu --stages 1 --only"
    (gelu,) = [line for line in lines if line.startswith("- gelu, sample 0 (float32[2,3]): gradient 0 [2, 3]")]
    assert gelu.endswith(f"{rerun} gelu`")
    assert "- gelu, laws, forward_mode: " in done.stdout
    raised = "it raises RuntimeError: no such relu"
    assert f"- relu, sample 0 (bfloat16[2,3]): {raised}: {rerun} relu`" in lines
    assert f"- silu: the process died: SIGKILL: {rerun} silu`" in lines
    assert {row["item"] for row in rows(tmp_path, status=PASSED)} >= {"tanh", "tanh, laws"}


def test_killed_run_keeps_its_results(tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path, "--stages", 1), env=environment(), stdout=subprocess.DEVNULL)
    report = tmp_path / "report.md"
    while not report.exists() or not rows(tmp_path, status=PASSED):
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    assert "no failures so far" in report.read_text()
    assert rows(tmp_path, status=NOT_REACHED)
    time.sleep(2)  # until the worker has ended as well
    size = (tmp_path / "lines.jsonl").stat().st_size
    time.sleep(2)
    assert (tmp_path / "lines.jsonl").stat().st_size == size


def test_wrong_arguments(tmp_path: Path) -> None:
    arguments = command(tmp_path, "--stages", 2, "--only", "GELLU")
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: --only: there is no GELLU\n")


EXACT = torch.linspace(1, 2, 50, dtype=torch.float64)


def status(manual: torch.Tensor, reference: torch.Tensor) -> str:
    first, second, exact = (Results([("output 0", x)], False) for x in (manual, reference, EXACT))
    return compare_results(first, second, exact, torch.float32)["status"]


def test_errors_up_to_twice_torchs_are_accepted() -> None:
    right, off = EXACT.float(), (1.0001 * EXACT).float()
    assert status(right, right) == status(off, off) == status(right, off) == PASSED
    assert status((1.00019 * EXACT).float(), off) == PASSED
    assert status((1.00021 * EXACT).float(), off) == FAILED
    assert status(off, right) == status(right * torch.nan, right) == status(right * torch.inf, right) == FAILED
    assert status(right.double(), right) == status(right[None], right) == FAILED  # dtype, shape
    assert status(torch.tensor([1]), torch.tensor([2])) == FAILED  # indices must equal torch's


def test_training_is_skipped_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_training, "PACKAGES", {"json": "json", "no_such_module": "such-package"})
    items = gpu_training.training_items(Namespace(device="cpu"))
    for name in ("train", "train, bfloat16", "train, float16"):
        (row,) = items[name]()
        assert row["status"] == SKIPPED
        assert "needs such-package: pip install" in row["detail"]


def test_every_module_has_inputs() -> None:
    kinds = {name for name, x in vars(torch.nn).items() if inspect.isclass(x) and issubclass(x, torch.nn.Module)}
    assert kinds - INPUTS.keys() == WITHOUT_INPUTS.keys()


def test_measure() -> None:
    """Only manualgrad's steps must not raise."""

    def failing() -> None:
        raise RuntimeError("no compiler")

    makers = {
        "manualgrad": lambda: lambda: None,
        "torch": lambda: lambda: time.sleep(0.001),
        "other": lambda: failing,
    }
    skipped, row = measure(makers, "cpu", 0.01, "case")
    assert (row["status"], row["compared"]) == (MEASURED, "manualgrad / torch")
    assert row["ratio"] < 0.5
    assert (skipped["status"], skipped["detail"]) == (SKIPPED, "other raises RuntimeError: no compiler")
    (failed,) = measure({"manualgrad": lambda: failing}, "cpu", 0.01, "case")
    assert failed["status"] == FAILED


def test_run_item_reports_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal memory access makes the device unusable; most errors do not."""
    results: list[dict[str, Any]] = []

    def item() -> list[dict[str, Any]]:
        raise RuntimeError("too small")

    assert not gpu_stages.run_item(item, "cpu", lambda **row: results.append(row))

    def check(device: str) -> None:
        raise DeviceLost("an illegal memory access")

    monkeypatch.setattr(gpu_stages, "check_device", check)
    assert gpu_stages.run_item(list, "cpu", lambda **row: results.append(row))
    assert [row["detail"] for row in results] == [
        "RuntimeError: too small",
        "DeviceLost: an illegal memory access",
    ]
