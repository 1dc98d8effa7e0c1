"""A test with the argument `op` runs for every operation, a test with `op` and `number` for every sample input."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manualgrad.registry import Op, TensorFactory, graph_ops, ops
from manualgrad.verification import LAWS

os.environ.setdefault("PYTHONWARNINGS", "ignore:manualgrad was not tested with torch")  # for subprocesses

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def samples(table: dict[str, Op]) -> list[Any]:
    return [
        pytest.param(op, number, id=f"{op.name}-{number}")
        for op in table.values()
        for number, _ in enumerate(op.sample_inputs(TensorFactory()))
    ]


SAMPLES = samples(ops())
GRAPH_SAMPLES = samples(graph_ops())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="the device of the tests that take one: cpu or cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        is_law = metafunc.function.__name__ == "test_law"
        metafunc.parametrize(("op", "number"), [*SAMPLES, *GRAPH_SAMPLES] if is_law else SAMPLES)
    elif "op" in metafunc.fixturenames:
        metafunc.parametrize("op", [pytest.param(op, id=op.name) for op in ops().values()])


MARKERS_OF_FILES = {
    "test_check_gpu.py": ("scripts", "slow"),
    "test_distributed.py": ("multiprocess", "slow"),
    "test_faults.py": ("multiprocess", "slow"),
    "test_standalone.py": ("slow",),
    "test_sync_batch_norm.py": ("multiprocess",),
    "test_transformers.py": ("slow",),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the markers that follow from the file, the fixtures and the parameters of a test."""
    for item in items:
        markers = [*MARKERS_OF_FILES.get(item.path.name, ())]
        if "call_script" in getattr(item, "fixturenames", ()):
            markers.append("scripts")
        parameters = item.callspec.params if hasattr(item, "callspec") else {}  # pyright: ignore
        law = LAWS.get(str(parameters.get("law")))
        is_graph_op = getattr(parameters.get("op"), "name", "") in graph_ops()
        if (
            parameters.get("number") or is_graph_op or (law is not None and law.on_request)
        ):  # each law on one sample is enough
            markers.append("slow")
        for marker in markers:
            item.add_marker(marker)


@pytest.fixture(autouse=True)
def apply_declarations(request: pytest.FixtureRequest) -> None:
    """Apply the expected failures and skips of the operation. xfail_strict finds stale declarations."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    op = parameters.get("op")
    if isinstance(op, Op):
        name = parameters.get("law", request.function.__name__.removeprefix("test_"))
        keys = (name, f"{name}-{parameters.get('number')}")
        if reason := next((op.skips[key] for key in keys if key in op.skips), ""):
            pytest.skip(reason)
        if reason := next((op.expected_failures[key] for key in keys if key in op.expected_failures), ""):
            request.node.add_marker(pytest.mark.xfail(reason=reason))


@pytest.fixture
def call_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a script in this process, which is faster than a new one. Returns exit status, stdout and stderr."""

    def run(script: Path, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        status: object = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        output, error = capsys.readouterr()
        if isinstance(status, str):  # the interpreter prints it and exits with 1
            status, error = 1, f"{error}{status}\n"
        assert isinstance(status, int)
        return status, output, error

    return run
