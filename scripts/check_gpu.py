"""Is manualgrad right on this GPU, and how fast is it there? One command; the most valuable answers come first.

    python scripts/check_gpu.py --device cuda --minutes 8 --out check-gpu
    python scripts/check_gpu.py --device cuda --stages 1 --only gelu            one part of it again

It needs torch only. The stage that trains also needs what `pip install -e '.[examples]'` brings. The stages:

    1 operations   value and each gradient of every operation and sample in float32 (without TF32), bfloat16 and
                   float16; then double backward, forward mode, autocast and vmap
    2 modules      forward and backward of every module of torch.nn, in training and in evaluation
    3 training     the main job: interrupted and resumed, in mixed precision; DDP and FSDP2 in one process
    4 speed        time and peak memory of each operation, next to torch, torch.compile and Liger-Kernel
    5 models       time and peak memory of a training step of four models, small and large, eager and compiled

The truth is float64 on the CPU, in stages 4 and 5 on the device. A result is wrong where its error, as a norm, is
more than 2 times that of torch's own result on the device plus 4 units in the last place. Where random numbers are
drawn, torch's result from the same seed is the truth, to 16 units. Speed is never wrong, only listed.

A process of its own does the work and writes each result to `lines.jsonl` immediately. `report.md` and
`results.json` are written every second. So a run that is killed leaves what it found. A part that raises, crashes
or hangs is wrong, and another process continues with the next part. What the time did not suffice for is listed as
not reached, never as passed. Exit status: 0; 1 if anything is wrong or nothing was tried; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# This process imports no torch: it starts the others.

Row = dict[str, Any]
"""A result: "status" is one of `STATUSES`, "item" the part, "case" what was tried of it, "detail" what to say."""

PASSED, WRONG, MEASURED, NOT_RUN, NOT_REACHED = "passed", "wrong", "measured", "not run", "not reached"
STATUSES = (PASSED, WRONG, MEASURED, NOT_RUN, NOT_REACHED)


class Stage(NamedTuple):
    title: str
    share: float
    """Of the time."""
    wrong_if_slow: bool
    """A part that exceeds its time limit hangs. (A compiler may take that long.)"""


STAGES = {
    1: Stage("operations: value and gradients", 0.25, True),
    2: Stage("modules: forward and backward", 0.1, True),
    3: Stage("training", 0.15, True),
    4: Stage("speed of operations", 0.3, False),
    5: Stage("speed of models", 0.2, False),
}


class Lines:
    """The file of results, one in a line. Processes write it in turn."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lines.jsonl"

    def put(self, **line: Any) -> None:
        with self.path.open("a") as file:  # first ends a line that a killed process left unfinished
            file.write(f"\n{json.dumps(line)}\n")

    def all(self) -> list[Row]:
        found = []
        for text in self.path.read_text().splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:  # empty or unfinished
                continue
        return found

    def of(self, stage: int, kind: str) -> list[Any]:
        """What the lines of one kind say: "items", "begin", "end", "status"."""
        return [line[kind] for line in self.all() if line.get("stage") == stage and kind in line]

    def running(self) -> tuple[int, str, float]:
        """The part that has begun and not ended: its stage, its name and when it began; else stage 0."""
        steps = [line for line in self.all() if "begin" in line or "end" in line]
        if not steps or "end" in steps[-1]:
            return 0, "", time.time()
        return steps[-1]["stage"], steps[-1]["begin"], steps[-1]["time"]


def wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(name == x or name.startswith(f"{x},") for x in only)


def deadline(stage: int, options: argparse.Namespace) -> float:
    """When no other part of a stage is begun, but for its first."""
    shares = [(n, STAGES[n].share) for n in options.stages]
    part = sum(share for n, share in shares if n <= stage) / sum(share for _, share in shares)
    return options.begin + 60 * options.minutes * part


# The process that does the work

UNUSABLE, AGAIN = 2, 3
"""Its exit status for wrong arguments, and where it lost the device: another process continues."""


def work(options: argparse.Namespace) -> int:
    parent = os.getppid()

    def end_with_the_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package of this checkout, installed or not
    import gpu_stages

    lines = Lines(options.out)
    if not gpu_stages.has(options.device):
        print(f"--device: torch finds no {options.device} device here", file=sys.stderr)
        return UNUSABLE
    lines.put(environment=gpu_stages.environment(options.device))
    stages = {n: gpu_stages.STAGES[n](options) for n in options.stages}
    names = [name for items in stages.values() for name in items]
    if unknown := [x for x in options.only if not any(wanted(name, [x]) for name in names)]:
        print("--only: there is no", ", ".join(unknown), file=sys.stderr)
        return UNUSABLE
    for n, items in stages.items():
        lines.put(stage=n, items=[name for name in items if wanted(name, options.only)])
    for n, items in stages.items():
        begun = set(lines.of(n, "begin"))
        for name, run in items.items():
            if name in begun or not wanted(name, options.only):
                continue
            if begun and time.time() > deadline(n, options):
                break
            begun.add(name)
            lines.put(stage=n, begin=name, time=time.time())
            lost = gpu_stages.tries(run, options.device, partial(lines.put, stage=n, item=name))
            lines.put(stage=n, end=name)
            if lost:
                return AGAIN
    return 0


def supervise(options: argparse.Namespace) -> int:
    """Start that process, and another one behind each part in which it crashes or hangs; its exit status."""
    lines, log = Lines(options.out), options.out / "log.txt"
    limit, grace = 60 if options.device == "cuda" else 300, 10 + 2 * options.minutes
    end, shown = deadline(options.stages[-1], options) + grace, 0
    command = [sys.executable, __file__, "--work", "--begin", options.begin, "--device", options.device]
    command += ["--minutes", options.minutes, "--out", options.out]
    command += ["--stages", *options.stages, "--only", *options.only]
    while time.time() < end:
        steps = len(lines.all())
        with log.open("ab") as file:
            process = subprocess.Popen([str(x) for x in command], stdout=file, stderr=file, start_new_session=True)
        late = hangs = False
        while process.poll() is None and not (late or hangs):
            report(options, finished=False)
            time.sleep(1)
            (stage, part, since), now = lines.running(), time.time()
            if stage > shown:
                shown = stage
                print(f"{now - options.begin:4.0f} s  stage {stage}, {STAGES[stage].title}", flush=True)
            late = now > end or (bool(part) and now > max(deadline(stage, options), since) + grace)
            hangs = bool(part) and now > since + limit
        if late or hangs:
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        if status in (0, UNUSABLE):
            return status
        stage, part, since = lines.running()
        if part:
            if hangs:
                detail, verdict = f"stopped after {limit} s", WRONG if STAGES[stage].wrong_if_slow else NOT_RUN
            elif late:
                detail = f"stopped after {time.time() - since:.0f} s, at the end of the time"
                verdict = NOT_REACHED
            else:
                detail, verdict = f"the process died: {ending(status, log)}", WRONG
            lines.put(stage=stage, item=part, status=verdict, case="", detail=detail)
            lines.put(stage=stage, end=part)
        elif status != AGAIN and not late and not any("begin" in line for line in lines.all()[steps:]):
            detail = f"the process does not start: {ending(status, log)}"
            lines.put(stage=options.stages[0], item="start", status=WRONG, case="", detail=detail)
            return status
    return 0


def ending(status: int, log: Path) -> str:
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return ", ".join([how, *last])[:300]


# The report


def report(options: argparse.Namespace, finished: bool) -> tuple[str, int]:
    """Write what is known so far; the text, and the exit status."""
    lines = Lines(options.out)
    rows = [line for line in lines.all() if "status" in line]
    for stage in options.stages:
        begun, items = lines.of(stage, "begin"), lines.of(stage, "items")
        left = [name for name in (items[0] if items else ["all of it"]) if name not in begun]
        if not any(row["stage"] == stage and row["item"] == "start" for row in rows):
            rows += [{"stage": stage, "item": name, "status": NOT_REACHED, "case": ""} for name in left]
    counts = {n: Counter(row["status"] for row in rows if row["stage"] == n) for n in options.stages}
    where = next(
        (line["environment"] for line in lines.all() if "environment" in line), {"device": options.device}
    )
    wrong = [row for row in rows if row["status"] == WRONG]
    nothing = not any(row["status"] in (PASSED, MEASURED) for row in rows)
    heading = f"{len(wrong)} wrong" if wrong else "nothing was tried" if nothing else "nothing is wrong"
    text = [f"# manualgrad on {where['device']}: {heading}{'' if finished else ' so far'}", ""]
    text += [", ".join(f"{name} {value}" for name, value in where.items() if name != "device")]
    text += ["", f"| stage | {' | '.join(STATUSES)} |", f"|---|{'---|' * len(STATUSES)}"]
    text += [f"| {n} {STAGES[n].title} | {' | '.join(str(x[y]) for y in STATUSES)} |" for n, x in counts.items()]
    if wrong:
        text += ["", "## Wrong", ""]
    for row in wrong:
        again = f"--device {options.device} --stages {row['stage']}"
        again += f" --only {shlex.quote(row['item'])}" if row["item"] != "start" else ""
        named = ", ".join(filter(None, (row["item"], row["case"])))
        text.append(f"- {named}: {row['detail']}: `python scripts/check_gpu.py {again}`")
    for status in (NOT_RUN, NOT_REACHED):
        text += by_reason(status, [row for row in rows if row["status"] == status])
    if figures := [row for row in rows if row["status"] == MEASURED]:
        text += ["", "## Time and peak memory of forward and backward", "", HEAD, *map(figures_line, figures)]
    content = {"environment": where, "counts": counts, "finished": finished, "rows": rows}
    written = "\n".join(text) + "\n"
    for name, what in (("report.md", written), ("results.json", json.dumps(content, indent=1))):
        (options.out / "new").write_text(what)
        (options.out / "new").replace(options.out / name)
    return written, 1 if wrong or nothing else 0


def by_reason(status: str, rows: Sequence[Row]) -> list[str]:
    """What was not run or not reached, a line for each reason."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        reason = f"stage {row['stage']}" + (f", {row['detail']}" if row.get("detail") else "")
        reasons.setdefault(reason, {})[row["item"]] = None
    lines = [f"- {reason}: {'; '.join(names)}" for reason, names in reasons.items()]
    return ["", f"## {status.capitalize()}", "", *lines] if lines else []


HEAD = """\
| what | compared | ours, ms | other, ms | ratio | ours, peak MiB | other, peak MiB | ratio |
|---|---|---|---|---|---|---|---|"""


def figures_line(row: Row) -> str:
    times, (ours, other) = [f"{x:.3f}" for x in row["ms"]], row["peak"]
    if ours is None:
        memory = ["not measured", "not measured", ""]
    else:
        memory = [f"{ours / 2**20:.1f}", f"{other / 2**20:.1f}", f"{ours / other:.2f}" if other else ""]
    return f"| {' | '.join([row['item'], row['compared'], *times, format(row['ratio'], '.2f'), *memory])} |"


# The command


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="what to check (default: cuda)")
    parser.add_argument("--minutes", type=float, default=8.0, help="how long it may take (default: 8)")
    parser.add_argument(
        "--out", type=Path, default=Path("check-gpu"), help="folder of the report (default: check-gpu)"
    )
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="NAME", help="operations, modules, models (default: all)"
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.stages = sorted(set(options.stages))
    if options.work:
        return work(options)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("lines.jsonl", "log.txt"):
        (options.out / name).write_text("")
    if supervise(options) == UNUSABLE:
        print("error:", (options.out / "log.txt").read_text().splitlines()[-1], file=sys.stderr)
        return UNUSABLE
    text, status = report(options, finished=True)
    print(f"\n{text}\nwritten to {options.out}: report.md, results.json, lines.jsonl, log.txt")
    return status


if __name__ == "__main__":
    sys.exit(main())
