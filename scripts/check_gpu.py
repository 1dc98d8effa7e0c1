"""Check manualgrad on a GPU in one command: correctness first, then speed and memory.

    python scripts/check_gpu.py --device cuda --minutes 8 --out check-gpu
    python scripts/check_gpu.py --device cuda --stages 1 --only gelu            repeat one item

The check needs torch only. Stage 3 also needs the packages of `pip install -e '.[training]'`. The stages:

    1 operations   value and gradients of every operation and sample in float32 (without TF32), bfloat16 and
                   float16; then double backward, forward mode, autocast and vmap
    2 modules      forward and backward of every module of torch.nn, in training and evaluation mode
    3 training     the main job, interrupted and resumed, and in mixed precision; DDP and FSDP2 in one process
    4 speed        time and peak memory of each operation, compared with torch, torch.compile and Liger-Kernel
    5 models       time and peak memory of a training step of four models, small and large, eager and compiled

The reference is float64, on the CPU in stages 1 to 3 and on the device in stages 4 and 5. A result fails if the
norm of its error exceeds 2 times that of torch's result on the device plus 4 units in the last place. Functions
that draw random numbers are compared with torch's result from the same seed, up to 16 units. Low speed is not a
failure.

A separate process does the work and writes each result to `lines.jsonl` immediately. `report.md` and
`results.json` are updated every second, so a killed run keeps its results. An item that raises, crashes or hangs
has failed, and a new process continues with the next one. Items for which there was no time are listed as not
reached. Exit status: 0 without failures, 1 if anything failed or nothing ran, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lib.gpu_results import FAILED, NOT_REACHED, SKIPPED, STAGES, ResultsFile, deadline, write_report

# The supervisor, which starts the workers, does not import torch.

USAGE_ERROR, DEVICE_LOST = 2, 3
"""Exit statuses of a worker."""


def selected(name: str, only: Sequence[str]) -> bool:
    """Whether --only includes an item."""
    return not only or any(name == x or name.startswith(f"{x},") for x in only)


def work(options: argparse.Namespace) -> int:
    """Run the items that no earlier worker has started."""
    threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
    from lib import gpu_stages

    results = ResultsFile(options.out)
    if not gpu_stages.has_device(options.device):
        print(f"--device: torch finds no {options.device} device", file=sys.stderr)
        return USAGE_ERROR
    results.append(environment=gpu_stages.environment(options.device))
    stages = {n: gpu_stages.STAGE_ITEMS[n](options) for n in options.stages}
    names = [name for items in stages.values() for name in items]
    if unknown := [x for x in options.only if not any(selected(name, [x]) for name in names)]:
        print("--only: there is no", ", ".join(unknown), file=sys.stderr)
        return USAGE_ERROR
    for n, items in stages.items():
        results.append(stage=n, items=[name for name in items if selected(name, options.only)])
    for n, items in stages.items():
        begun = set(results.values(n, "begin"))
        for name, run in items.items():
            if name in begun or not selected(name, options.only):
                continue
            if begun and time.time() > deadline(n, options):
                break
            begun.add(name)
            results.append(stage=n, begin=name, time=time.time())
            device_lost = gpu_stages.run_item(run, options.device, partial(results.append, stage=n, item=name))
            results.append(stage=n, end=name)
            if device_lost:
                return DEVICE_LOST
    return 0


def exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def supervise(options: argparse.Namespace) -> int:
    """Start a worker, and a new one after each crash or timeout. Return the exit status."""
    results, log = ResultsFile(options.out), options.out / "log.txt"
    time_limit, grace = 60 if options.device == "cuda" else 300, 10 + 2 * options.minutes
    end, stage_shown = deadline(options.stages[-1], options) + grace, 0
    while time.time() < end:
        lines_before = len(results.lines())
        with log.open("ab") as file:
            process = subprocess.Popen(worker_command(options), stdout=file, stderr=file, start_new_session=True)
        out_of_time = hangs = False
        while process.poll() is None and not (out_of_time or hangs):
            write_report(options, finished=False)
            time.sleep(1)
            (stage, item, since), now = results.running(), time.time()
            if stage > stage_shown:
                stage_shown = stage
                print(f"{now - options.start:4.0f} s  stage {stage}, {STAGES[stage].title}", flush=True)
            out_of_time = now > end or (bool(item) and now > max(deadline(stage, options), since) + grace)
            hangs = bool(item) and now > since + time_limit
        if out_of_time or hangs:
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        if status in (0, USAGE_ERROR):
            return status
        stage, item, since = results.running()
        if item:
            if hangs:
                detail = f"stopped after {time_limit} s"
                row_status = FAILED if STAGES[stage].timeout_fails else SKIPPED
            elif out_of_time:
                detail, row_status = f"stopped after {time.time() - since:.0f} s: out of time", NOT_REACHED
            else:
                detail, row_status = f"the process died: {exit_reason(status, log)}", FAILED
            results.append(stage=stage, item=item, status=row_status, case="", detail=detail)
            results.append(stage=stage, end=item)
        elif status != DEVICE_LOST and not (
            out_of_time or any("begin" in x for x in results.lines()[lines_before:])
        ):
            detail = f"the process does not start: {exit_reason(status, log)}"
            results.append(stage=options.stages[0], item="start", status=FAILED, case="", detail=detail)
            return status
    return 0


def worker_command(options: argparse.Namespace) -> list[str]:
    command = [sys.executable, __file__, "--work", "--start", options.start, "--device", options.device]
    command += ["--minutes", options.minutes, "--out", options.out]
    command += ["--stages", *options.stages, "--only", *options.only]
    return [str(x) for x in command]


def exit_reason(status: int, log: Path) -> str:
    """The signal or exit status of a process, and the last line of its log."""
    last_line = log.read_text(errors="replace").strip().splitlines()[-1:]
    reason = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return ", ".join([reason, *last_line])[:300]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="the device to check (default: cuda)"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="how long the check may take (default: 8)")
    parser.add_argument(
        "--out", type=Path, default=Path("check-gpu"), help="the folder of the report (default: check-gpu)"
    )
    parser.add_argument(
        "--stages",
        type=int,
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        help="the stages to run (default: all)",
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        metavar="NAME",
        help="names of operations, modules and models to check (default: all)",
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.stages = sorted(set(options.stages))
    if options.work:
        return work(options)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("lines.jsonl", "log.txt"):
        (options.out / name).write_text("")
    if supervise(options) == USAGE_ERROR:
        print("error:", (options.out / "log.txt").read_text().splitlines()[-1], file=sys.stderr)
        return USAGE_ERROR
    text, status = write_report(options, finished=True)
    print(f"\n{text}\nwritten to {options.out}: report.md, results.json, lines.jsonl, log.txt")
    return status


if __name__ == "__main__":
    sys.exit(main())
