"""The README says what the code says."""

from __future__ import annotations

import inspect
import re
import runpy
import textwrap
from pathlib import Path

import pytest
import torch

import manualgrad
from manualgrad import coverage
from manualgrad.ops import activation
from manualgrad.ops.activation import LogSigmoidFunction
from manualgrad.ops.linear import LinearFunction
from manualgrad.registry import Op, ops

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ON_PAGES_TORCH = f"torch=={torch.__version__.partition('+')[0]}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.filterwarnings("ignore:ctx.mark_dirty")
def test_generated_tables() -> None:
    """After a change: run the command that stands above the table, and paste what it prints."""
    script = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))
    assert script["layer_norm_table"]() in README


def test_nothing_is_missing() -> None:
    assert not coverage.missing()


def test_coverage(op: Op) -> None:
    """Its row, as `python -m manualgrad coverage NAME` prints it. The page is of one torch: with another
    version torch's own columns may differ."""
    row = coverage.row(op)
    if not ON_PAGES_TORCH:
        (shown,) = re.findall(rf"^\| `{op.name}` \| .*", README, re.M)
        cells = shown.split(" | ")
        row = row._replace(orders_of_torch=cells[4], kept_by_torch=float(cells[6]))
    assert f"{row}\n" in README


def test_summary_of_coverage() -> None:
    rows = [line.split(" | ") for line in README.splitlines() if re.match(r"\| `\w+` \| .*`\w+\.py` \|", line)]
    assert [name.strip("|` ") for name, *_ in rows] == list(ops())
    assert coverage.summary([(marks[3], marks[4]) for marks in rows]) in README


def test_the_rule_shown_is_the_rule() -> None:
    """Up to the conjugates, which only complex numbers need."""
    shown = README[README.index("class LinearFunction") : README.index("A rule is a set of pure functions")]
    for name in ("forward", "grad_input", "grad_weight", "grad_bias"):
        body = inspect.getsource(getattr(LinearFunction, name)).splitlines()[-1].strip().replace(".conj()", "")
        assert body in shown


def test_the_operation_shown_is_the_operation() -> None:
    assert textwrap.indent(inspect.getsource(LogSigmoidFunction), " " * 3) in README
    for line in ('logsigmoid = _activation("logsigmoid", LogSigmoidFunction)', "(logsigmoid, [{}])"):
        assert line in README
        assert line in inspect.getsource(activation)


def test_the_program_shown_is_the_program() -> None:
    shown = re.findall(r"```python\n(def backward.*?)```", README, re.S)
    assert len(shown) == 1
    assert textwrap.indent(shown[0], "    ") in manualgrad.show("layer_norm")


def test_links_and_commands() -> None:
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"(?:python )((?:scripts|tests)/\S+\.py)", README):
        assert (ROOT / target).exists(), target
    assert inspect.getdoc(manualgrad)
