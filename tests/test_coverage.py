"""ops/COVERAGE.md matches what is measured, and every operation is in it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

from manualgrad import coverage, ops, registry
from manualgrad.registry import Op

PAGE = (Path(ops.__file__).parent / "COVERAGE.md").read_text()
OPERATIONS, _, OPERATORS = PAGE.partition("## Operators of whole-model programs")
CELLS = {
    line.split("`")[1]: line.strip("| ").split(" | ") for line in OPERATIONS.splitlines() if line.startswith("| `")
}


def measured_with_this_torch() -> bool:
    return f"measured with torch {torch.__version__.partition('+')[0]} " in PAGE


def test_no_public_name_is_missing() -> None:
    assert not coverage.missing_names()


def test_row(op: Op) -> None:
    row = coverage.row(op)
    if measured_with_this_torch():
        assert f"{row}\n" in PAGE
    else:  # torch's own columns may differ, and what fails because of torch
        found = [cell.strip() for cell in str(row).strip("|").split("|")]
        assert found[:4] == CELLS[op.name][:4]
        assert found[5] == CELLS[op.name][5]


def test_table_and_summary() -> None:
    assert list(CELLS) == list(registry.ops())
    assert coverage.summary([(cells[3], cells[4]) for cells in CELLS.values()]) in PAGE


@pytest.mark.slow
def test_table_of_graph_operators() -> None:
    assert coverage.graph_table() in OPERATORS


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main(["no_such_operation"]) == 2
    assert re.search("no operation is called 'no_such_operation'", capsys.readouterr().err)


def test_package_imports_all_its_files() -> None:
    """manualgrad/ops/__init__.py lists them; a file that it does not import registers nothing."""
    source = Path(ops.__file__).read_text()
    for module in pkgutil.iter_modules(ops.__path__):
        if hasattr(importlib.import_module(f"manualgrad.ops.{module.name}"), "register"):
            assert f"import {module.name} as {module.name}\n" in source
