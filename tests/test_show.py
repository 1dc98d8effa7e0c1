"""`manualgrad.show` and `python -m manualgrad show`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import manualgrad
from manualgrad import nn
from manualgrad.__main__ import main
from manualgrad.ops.activation import GELUFunction
from manualgrad.registry import Op
from manualgrad.show import find_operations, find_rules, show


def test_every_operation_is_shown(op: Op) -> None:
    text = show(op.name)
    rules = find_rules(op)
    assert rules
    for rule in rules:
        assert f"{rule.__name__}      manualgrad/ops/" in text
        assert "def forward" in text
        assert "def backward" in text
    for law, reason in op.expected_failures.items():
        assert f"{law}: {reason}" in text


@pytest.mark.parametrize(
    "target",
    ["layer_norm", "LayerNorm", nn.LayerNorm, torch.nn.LayerNorm, torch.nn.LayerNorm(3), nn.functional.layer_norm],
)
def test_names_and_objects(target: object) -> None:
    text = manualgrad.show(target)
    assert text.startswith("layer_norm, called by LayerNorm")
    assert "∂L/∂x = r (h - E h - x̂ E[x̂ h])" in text
    assert "grad_input = (rstd * (h - E(h) - xhat * E(xhat * h))).reshape(grad.shape)" in text
    assert "grad_bias: no tensor" in text


def test_converted_module() -> None:
    (model,) = manualgrad.convert(torch.nn.Sequential(torch.nn.GELU()))
    assert "GELUFunction" in show(model)


def test_rule() -> None:
    assert show(GELUFunction).startswith("GELUFunction      manualgrad/ops/activation.py, line ")


def test_generated_lines_are_wrapped() -> None:
    text = show("conv2d")
    program = text.partition("Generated backward")[2].partition("\n\n")[2]
    assert max(map(len, program.splitlines())) <= 140


def test_module_with_several_operations() -> None:
    assert {op.name for op in find_operations(nn.RNN)} >= {"rnn_tanh", "rnn_relu"}


@pytest.mark.parametrize("name", ["laier_norm", "LaierNorm"])
def test_unknown_name_raises_with_a_suggestion(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"did you mean '[Ll]ayer_?[Nn]orm'"):
        show(name)
    monkeypatch.setattr(sys, "argv", ["manualgrad", "show", name])
    assert main() == 2
    assert "did you mean" in capsys.readouterr().err


def test_docstrings_mention_the_command(op: Op) -> None:
    function = getattr(nn.functional, op.name, None)
    if function is not None:
        assert f"python -m manualgrad show {op.name}" in str(function.__doc__)
    assert "python -m manualgrad show GELU" in str(nn.GELU.__doc__)


def test_command_with_standalone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["manualgrad", "show", "GELU", "--standalone"])
    assert main() == 0
    assert "class GELUFunction(torch.autograd.Function)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="several operations: show one of"):
        show("RNN", standalone=True)


def test_command_without_a_name_lists_all() -> None:
    run = subprocess.run([sys.executable, "-m", "manualgrad", "show"], capture_output=True, text=True, check=True)
    assert "layer_norm " in run.stdout
    assert "LayerNorm" in run.stdout
