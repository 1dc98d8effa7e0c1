"""One law a function, one table: a test that asks for `op` (and `number`) runs on every operation (and sample)."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from manualgrad.registry import Op, TensorFactory, ops

os.environ.setdefault("PYTHONWARNINGS", "ignore:manualgrad was not tested with torch")  # in processes of tests

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

SAMPLES = [
    pytest.param(op, number, id=f"{op.name}-{number}")
    for op in ops().values()
    for number, _ in enumerate(op.sample_inputs(TensorFactory()))
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the laws are tried: cpu or cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize(("op", "number"), SAMPLES)
    elif "op" in metafunc.fixturenames:
        metafunc.parametrize("op", [pytest.param(op, id=op.name) for op in ops().values()])


@pytest.fixture(autouse=True)
def declared(request: pytest.FixtureRequest) -> None:
    """A law that an operation declares to lack must fail: xfail_strict finds a stale declaration."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    op = parameters.get("op")
    if isinstance(op, Op):
        name = parameters.get("law", request.function.__name__.removeprefix("test_"))
        reason = op.expected_failures.get(name) or op.expected_failures.get(f"{name}-{parameters.get('number')}")
        if reason:
            request.node.add_marker(pytest.mark.xfail(reason=reason, run="kills the process" not in reason))


@pytest.fixture
def call_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a script within this process, which saves the start of one: to its exit status, output and errors."""

    def run_here(script: Path, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        status: object = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            status = end.code
        output, error = capsys.readouterr()
        if isinstance(status, str):  # as the interpreter does with it
            status, error = 1, f"{error}{status}\n"
        assert isinstance(status, int)
        return status, output, error

    return run_here
