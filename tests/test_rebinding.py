"""torch.nn's code with manualgrad's functions in its globals."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

from manualgrad import nn, rebinding


def test_the_table_of_rebound_names() -> None:
    """After a change of torch or of an operation: edit manualgrad/rebound_names.py."""
    found, expected = rebinding.rebound_names(), rebinding.expected_names()
    for module in sorted(found.keys() | expected.keys()):
        names, listed = found.get(module, set()), expected.get(module, set())
        assert not names - listed, f"to add to {module}"
        assert not listed - names, f"to remove from {module}"


@pytest.mark.parametrize("name", ["Linear.gone", "Identity.forward"])
def test_a_name_that_is_not_rebound_any_more(name: str) -> None:
    message = rf"torch .* does not have torch\.nn\.modules\.linear\.{name}.*Install a tested version"
    with pytest.raises(ImportError, match=message):
        rebinding.check({"torch.nn.modules.linear": {"Linear.forward", name}})


def test_one_namespace_for_each_module_of_torch() -> None:
    assert vars(nn.Linear)["forward"].__globals__ is vars(nn.modules.linear)
    assert vars(nn.Bilinear)["forward"].__globals__ is vars(nn.modules.linear)
    assert nn.functional.mse_loss.__globals__ is vars(nn.functional)
    assert vars(nn.modules.linear)["F"] is nn.functional
    assert nn.Linear is nn.modules.Linear is nn.modules.linear.Linear
    assert nn.modules.linear.Identity is torch.nn.Identity
    assert vars(torch.nn.modules.linear)["F"] is torch.nn.functional


def test_the_source_is_found() -> None:
    for manual, original in (
        (nn.Linear, torch.nn.Linear),
        (nn.Linear.forward, torch.nn.Linear.forward),
        (nn.functional.mse_loss, torch.nn.functional.mse_loss),
    ):
        assert inspect.getsource(manual) == inspect.getsource(original)
        assert inspect.getsourcefile(manual) == inspect.getsourcefile(original)


def test_the_modules_can_be_imported_in_a_new_process() -> None:
    code = """
import pickle, sys
from manualgrad.nn.modules.linear import Linear
import manualgrad.nn
assert Linear is manualgrad.nn.Linear
sys.stdout.buffer.write(pickle.dumps([Linear, manualgrad.nn.functional.mse_loss]))
"""
    warnings = ["-W", "ignore:manualgrad was not tested with torch"]
    written = subprocess.run([sys.executable, *warnings, "-c", code], check=True, capture_output=True).stdout
    read = [sys.executable, *warnings, "-c", "import pickle, sys; print(pickle.load(sys.stdin.buffer))"]
    output = subprocess.run(read, input=written, check=True, capture_output=True).stdout
    assert b"manualgrad.nn.modules.linear.Linear" in output
