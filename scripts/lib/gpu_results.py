"""The results of scripts/check_gpu.py: one JSON object per line in a file, and the report made from them.

This module does not import torch.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
"""A result. "status" is one of `STATUSES`, "item" the operation, module or model, "case" how it was tested,
"detail" an explanation."""

PASSED, FAILED, MEASURED, SKIPPED, NOT_REACHED = "passed", "failed", "measured", "skipped", "not reached"
STATUSES = (PASSED, FAILED, MEASURED, SKIPPED, NOT_REACHED)


class Stage(NamedTuple):
    """A part of the check."""

    title: str
    share: float
    """Its share of the time."""
    timeout_fails: bool
    """Whether an item that exceeds its time limit has failed. A compiler may take that long."""


STAGES = {
    1: Stage("operations: value and gradients", 0.25, True),
    2: Stage("modules: forward and backward", 0.1, True),
    3: Stage("training", 0.15, True),
    4: Stage("speed of operations", 0.3, False),
    5: Stage("speed of models", 0.2, False),
}


def deadline(stage: int, options: argparse.Namespace) -> float:
    """The time after which no item of a stage starts, except its first."""
    shares = [(n, STAGES[n].share) for n in options.stages]
    part = sum(share for n, share in shares if n <= stage) / sum(share for _, share in shares)
    return options.start + 60 * options.minutes * part


class ResultsFile:
    """A file with a JSON object per line. The supervisor and the workers write to it in turn."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lines.jsonl"

    def append(self, **line: Any) -> None:
        with self.path.open("a") as file:  # the first newline ends a line that a killed process left unfinished
            file.write(f"\n{json.dumps(line)}\n")

    def lines(self) -> list[Row]:
        lines = []
        for text in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:  # empty or unfinished
                continue
        return lines

    def values(self, stage: int, key: str) -> list[Any]:
        """The values of "items", "begin", "end" or "status" in the lines of a stage."""
        return [line[key] for line in self.lines() if line.get("stage") == stage and key in line]

    def running(self) -> tuple[int, str, float]:
        """Stage, name and start time of the item that is running; stage 0 if there is none."""
        events = [line for line in self.lines() if "begin" in line or "end" in line]
        if not events or "end" in events[-1]:
            return 0, "", time.time()
        return events[-1]["stage"], events[-1]["begin"], events[-1]["time"]


# The report


def write_report(options: argparse.Namespace, finished: bool) -> tuple[str, int]:
    """Write report.md and results.json. Return the report's text and the exit status."""
    lines = ResultsFile(options.out).lines()
    rows = [line for line in lines if "status" in line] + rows_not_reached(options)
    counts = {n: Counter(row["status"] for row in rows if row["stage"] == n) for n in options.stages}
    environment = next((x["environment"] for x in lines if "environment" in x), {"device": options.device})
    failures = [row for row in rows if row["status"] == FAILED]
    nothing_ran = not any(row["status"] in (PASSED, MEASURED) for row in rows)

    number = f"{len(failures)} failure{'s' * (len(failures) > 1)}"
    result = number if failures else "nothing ran" if nothing_ran else "no failures"
    text = [f"# manualgrad on {environment['device']}: {result}{'' if finished else ' so far'}", ""]
    text += [", ".join(f"{name} {value}" for name, value in environment.items() if name != "device")]
    text += ["", f"| stage | {' | '.join(STATUSES)} |", f"|---|{'---|' * len(STATUSES)}"]
    text += [f"| {n} {STAGES[n].title} | {' | '.join(str(x[y]) for y in STATUSES)} |" for n, x in counts.items()]
    if failures:
        text += ["", "## Failures", "", *(failure_line(row, options.device) for row in failures)]
    for status in (SKIPPED, NOT_REACHED):
        text += lines_by_reason(status, [row for row in rows if row["status"] == status])
    if measured := [row for row in rows if row["status"] == MEASURED]:
        text += ["", "## Time and peak memory of forward and backward", "", MEASURED_HEADER]
        text += map(measured_line, measured)

    content = {"environment": environment, "counts": counts, "finished": finished, "rows": rows}
    report = "\n".join(text) + "\n"
    for name, what in (("report.md", report), ("results.json", json.dumps(content, indent=1))):
        (options.out / "new").write_text(what)
        (options.out / "new").replace(options.out / name)
    return report, 1 if failures or nothing_ran else 0


def rows_not_reached(options: argparse.Namespace) -> list[Row]:
    """A row for each item that has not started."""
    results, rows = ResultsFile(options.out), []
    for stage in options.stages:
        begun, items = results.values(stage, "begin"), results.values(stage, "items")
        waiting = [name for name in (items[0] if items else ["the whole stage"]) if name not in begun]
        if not any(x.get("stage") == stage and x.get("item") == "start" for x in results.lines()):
            rows += [{"stage": stage, "item": name, "status": NOT_REACHED, "case": ""} for name in waiting]
    return rows


def failure_line(row: Row, device: str) -> str:
    """What failed, and the command that runs it again."""
    arguments = f"--device {device} --stages {row['stage']}"
    if row["item"] != "start":
        arguments += f" --only {shlex.quote(row['item'])}"
    title = ", ".join(filter(None, (row["item"], row["case"])))
    return f"- {title}: {row['detail']}: `python scripts/check_gpu.py {arguments}`"


def lines_by_reason(status: str, rows: Sequence[Row]) -> list[str]:
    """A section with a line for each reason."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        reason = f"stage {row['stage']}" + (f", {row['detail']}" if row.get("detail") else "")
        reasons.setdefault(reason, {})[row["item"]] = None
    lines = [f"- {reason}: {'; '.join(names)}" for reason, names in reasons.items()]
    return ["", f"## {status.capitalize()}", "", *lines] if lines else []


MEASURED_HEADER = """\
| item | compared | manualgrad, ms | other, ms | time ratio | manualgrad, peak MiB | other, peak MiB | peak ratio |
|---|---|---|---|---|---|---|---|"""


def measured_line(row: Row) -> str:
    times, (manual_peak, other_peak) = [f"{x:.3f}" for x in row["ms"]], row["peak"]
    if manual_peak is None:
        memory = ["not measured", "not measured", ""]
    else:
        ratio = f"{manual_peak / other_peak:.2f}" if other_peak else ""
        memory = [f"{manual_peak / 2**20:.1f}", f"{other_peak / 2**20:.1f}", ratio]
    return f"| {' | '.join([row['item'], row['compared'], *times, format(row['ratio'], '.2f'), *memory])} |"
