"""scripts/check_gpu.py on the CPU: it names what is wrong and leaves what it found. Its figures are not tested."""

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

import gpu_stages
import pytest
import torch
from check_gpu import MEASURED, NOT_REACHED, NOT_RUN, PASSED, WRONG
from gpu_stages import Tried, judged
from module_inputs import INPUTS, WITHOUT_INPUTS

ROOT = Path(__file__).parents[1]


def command(out: Path, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "check_gpu.py"), "--device", "cpu", "--out", str(out)] + [
        str(x) for x in arguments
    ]


def environment(*paths: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])), "OMP_NUM_THREADS": "1"}


def rows(out: Path, **chosen: Any) -> list[dict[str, Any]]:
    found = json.loads((out / "results.json").read_text())["rows"]
    return [row for row in found if all(row[name] == value for name, value in chosen.items())]


def test_one_minute(tmp_path: Path) -> None:
    """Nothing is wrong, and what there was no time for is listed."""
    done = subprocess.run(
        command(tmp_path, "--minutes", 1), env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "# manualgrad on the CPU: nothing is wrong" in done.stdout
    assert (tmp_path / "report.md").read_text() in done.stdout
    assert rows(tmp_path, stage=1, status=PASSED)
    options = Namespace(device="cpu", minutes=1)
    for stage, items in gpu_stages.STAGES.items():
        assert {row["item"] for row in rows(tmp_path, stage=stage)} == items(options).keys()


def test_every_stage(tmp_path: Path) -> None:
    """Something of each, with time enough."""
    parts = {2: "GELU", 3: "one_process", 4: "mish, float32", 5: "vit_small, eager"}
    arguments = command(tmp_path, "--stages", *parts, "--only", *parts.values(), "train, bfloat16", "liger_swiglu")
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for stage, name in parts.items():
        assert rows(tmp_path, stage=stage, item=name, status=PASSED)
    for stage, name in ((4, "mish, float32"), (5, "vit_small, eager")):
        assert rows(tmp_path, stage=stage, item=name, status=MEASURED, compared="ours / torch")
        assert f"| {name} | ours / torch |" in done.stdout
    assert rows(tmp_path, stage=3, item="train, bfloat16", status=PASSED)
    assert rows(tmp_path, stage=4, item="liger_swiglu, float32", status=NOT_RUN)


FAULTS = """
import os, sys

if "--work" in sys.orig_argv:
    from manualgrad import registry

    ops = registry.ops()
    true_gelu = ops["gelu"].function

    def gelu(x, approximate="none"):
        small = 0.01 * x
        return true_gelu(x, approximate=approximate) + (small - small.detach())

    def relu(x):
        raise RuntimeError("no such relu")

    def silu(x):
        os.kill(os.getpid(), 9)

    for function in (gelu, relu, silu):
        object.__setattr__(ops[function.__name__], "implementation", function)
"""


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    """A wrong gradient, an operation that raises, one that kills the process; the others are tried as well."""
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
    again = "`python scripts/check_gpu.py --device cpu --stages 1 --only"
    (gelu,) = [line for line in lines if line.startswith("- gelu, sample 0 (float32[2,3]): gradient 0 [2, 3]")]
    assert gelu.endswith(f"{again} gelu`")
    assert "- gelu, laws, forward_mode: " in done.stdout
    raised = "it stops with RuntimeError: no such relu"
    assert f"- relu, sample 0 (bfloat16[2,3]): {raised}: {again} relu`" in lines
    assert f"- silu: the process died: SIGKILL: {again} silu`" in lines
    assert {row["item"] for row in rows(tmp_path, status=PASSED)} >= {"tanh", "tanh, laws"}


def test_a_run_that_is_killed_leaves_what_it_found(tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path, "--stages", 1), env=environment(), stdout=subprocess.DEVNULL)
    report = tmp_path / "report.md"
    while not report.exists() or not rows(tmp_path, status=PASSED):
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    assert "nothing is wrong so far" in report.read_text()
    assert rows(tmp_path, status=NOT_REACHED)
    time.sleep(2)  # the process that does the work has ended as well
    size = (tmp_path / "lines.jsonl").stat().st_size
    time.sleep(2)
    assert (tmp_path / "lines.jsonl").stat().st_size == size


def test_wrong_arguments(tmp_path: Path) -> None:
    arguments = command(tmp_path, "--stages", 2, "--only", "GELLU")
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: --only: there is no GELLU\n")


TRUE = torch.linspace(1, 2, 50, dtype=torch.float64)


def verdict(ours: torch.Tensor, torch_s: torch.Tensor, true: torch.Tensor = TRUE) -> str:
    found, expected, exact = (Tried([("output 0", x)], False) for x in (ours, torch_s, true))
    return judged(found, expected, exact, torch.float32)["status"]


def test_no_worse_than_torch() -> None:
    right, off = TRUE.float(), (1.0001 * TRUE).float()
    assert verdict(right, right) == verdict(off, off) == verdict(right, off) == PASSED
    assert verdict((1.00019 * TRUE).float(), off) == PASSED
    assert verdict((1.00021 * TRUE).float(), off) == WRONG
    assert verdict(off, right) == verdict(right * torch.nan, right) == verdict(right * torch.inf, right) == WRONG
    assert verdict(right.double(), right) == verdict(right[None], right) == WRONG  # dtype, shape
    assert verdict(torch.tensor([1]), torch.tensor([2])) == WRONG  # indices are torch's


def test_what_is_missing_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "PACKAGES", {"json": "json", "no_such_module": "such-package"})
    items = gpu_stages.stage_training(Namespace(device="cpu"))
    for name in ("train", "train, bfloat16", "train, float16"):
        (row,) = items[name]()
        assert row["status"] == NOT_RUN
        assert "needs such-package: pip install" in row["detail"]


def test_every_module_has_inputs() -> None:
    kinds = {name for name, x in vars(torch.nn).items() if inspect.isclass(x) and issubclass(x, torch.nn.Module)}
    assert kinds - INPUTS.keys() == WITHOUT_INPUTS.keys()


def test_measured_in_turn() -> None:
    """Of ours and another's that is slower; one that raises is wrong only if it is ours."""

    def failing() -> None:
        raise RuntimeError("no compiler")

    makers = {"ours": lambda: lambda: None, "torch": lambda: lambda: time.sleep(0.001), "other": lambda: failing}
    not_run, row = gpu_stages.measured(makers, "cpu", 0.01, "case")
    assert (row["status"], row["compared"]) == (MEASURED, "ours / torch")
    assert row["ratio"] < 0.5
    assert (not_run["status"], not_run["detail"]) == (NOT_RUN, "other stops with RuntimeError: no compiler")
    (wrong,) = gpu_stages.measured({"ours": lambda: failing}, "cpu", 0.01, "case")
    assert wrong["status"] == WRONG


def test_a_lost_device_needs_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an illegal memory access; an error that leaves the device usable does not."""
    found: list[dict[str, Any]] = []

    def part() -> list[dict[str, Any]]:
        raise RuntimeError("too small")

    assert not gpu_stages.tries(part, "cpu", lambda **row: found.append(row))

    def check(device: str) -> None:
        raise gpu_stages.DeviceLost("an illegal memory access")

    monkeypatch.setattr(gpu_stages, "check_device", check)
    assert gpu_stages.tries(list, "cpu", lambda **row: found.append(row))
    assert [row["detail"] for row in found] == ["RuntimeError: too small", "DeviceLost: an illegal memory access"]
