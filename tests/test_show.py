"""`manualgrad.show`: what it finds, and that each operation can be shown."""

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
from manualgrad.show import WIDTH, operations_of, rules_of, show


def test_every_operation_is_shown(op: Op) -> None:
    text = show(op.name)
    rules = rules_of(op)
    assert rules
    for rule in rules:
        assert f"{rule.__name__}      manualgrad/ops/" in text
        assert "def forward" in text
        assert "def backward" in text
    for law, reason in op.expected_failures.items():
        assert f"{law}: {reason}" in text


@pytest.mark.parametrize(
    "thing",
    ["layer_norm", "LayerNorm", nn.LayerNorm, torch.nn.LayerNorm, torch.nn.LayerNorm(3), nn.functional.layer_norm],
)
def test_what_an_operation_is_called(thing: object) -> None:
    text = manualgrad.show(thing)
    assert text.startswith("layer_norm, called by LayerNorm")
    assert "∂L/∂x = r (h - E h - x̂ E[x̂ h])" in text
    assert "grad_input = (rstd * (h - E(h) - xhat * E(xhat * h))).reshape(grad.shape)" in text
    assert "grad_bias: no tensor" in text


def test_a_converted_module_is_shown() -> None:
    (model,) = manualgrad.convert(torch.nn.Sequential(torch.nn.GELU()))
    assert "GELUFunction" in show(model)


def test_a_rule_is_shown() -> None:
    assert show(GELUFunction).startswith("GELUFunction      manualgrad/ops/activation.py, line ")


def test_the_generated_program_is_python_and_fits_a_page() -> None:
    text = show("conv2d")
    program = text.partition("Generated backward")[2].partition("\n\n")[2]
    assert max(map(len, program.splitlines())) <= WIDTH + 40


def test_a_module_that_calls_several() -> None:
    assert {op.name for op in operations_of(nn.RNN)} >= {"rnn_tanh", "rnn_relu"}


@pytest.mark.parametrize("name", ["laier_norm", "LaierNorm"])
def test_an_unknown_name_is_refused_with_a_suggestion(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"did you mean '[Ll]ayer_?[Nn]orm'"):
        show(name)
    monkeypatch.setattr(sys, "argv", ["manualgrad", "show", name])
    assert main() == 2
    assert "did you mean" in capsys.readouterr().err


def test_the_documentation_says_how_to_show_the_gradient(op: Op) -> None:
    function = getattr(nn.functional, op.name, None)
    if function is not None:
        assert f"python -m manualgrad show {op.name}" in str(function.__doc__)
    assert "python -m manualgrad show GELU" in str(nn.GELU.__doc__)


def test_the_command_prints_a_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["manualgrad", "show", "GELU", "--standalone"])
    assert main() == 0
    assert "class GELUFunction(torch.autograd.Function)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="several operations: show one of"):
        show("RNN", standalone=True)


def test_the_command_lists_all() -> None:
    run = subprocess.run([sys.executable, "-m", "manualgrad", "show"], capture_output=True, text=True, check=True)
    assert "layer_norm " in run.stdout
    assert "LayerNorm" in run.stdout
