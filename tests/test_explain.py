"""scripts/explain.py: its output, and its numbers compared with an independent computation."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import explain
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import manualgrad.nn
from manualgrad.ops.activation import SigmoidFunction
from manualgrad.ops.linear import LinearFunction

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "explain.py"
ScriptCall = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(call_script: ScriptCall) -> ScriptCall:
    return partial(call_script, SCRIPT)


def step(output: str, heading: str) -> str:
    """The text of the step with this heading (without its number, possibly shortened)."""
    match = re.search(
        rf"^\d+\. {re.escape(heading)}.*\n-+\n((?:.*\n)*?)(?=\d+\. .*\n---|[A-Z, ]+\n====|\Z)", output, re.M
    )
    assert match, heading
    return match[1]


def block(text: str, title: str) -> Tensor:
    """The matrix below a title, from its columns of the text."""
    lines = text.splitlines()
    (row,) = [i for i, line in enumerate(lines) if re.search(rf"(^|  ){re.escape(title)}(  |$)", line)]
    start = re.search(rf"(?:^|  )({re.escape(title)})(?:  |$)", lines[row]).start(1)  # type: ignore[union-attr]
    after = re.search(r"    (?=\S)", lines[row][start:])
    end = start + after.end() if after else None
    rows = []
    for line in lines[row + 1 :]:
        if not line[start:end].strip():
            break
        rows.append([float(number) for number in line[start:end].split()])
    return torch.tensor(rows, dtype=torch.float64)


def test_all_numbers(call: ScriptCall) -> None:
    """Compare them with the chain rule written out for this network, starting from the printed inputs."""
    status, output, error = call("--digits", 6)
    assert (status, error) == (0, "")
    first, second = step(output, "linear1: Linear("), step(output, "linear2: Linear(")
    x, w1, b1 = (block(first, name) for name in ("input", "weight", "bias"))
    w2, b2 = block(second, "weight"), block(second, "bias")
    t = block(step(output, "loss: MSELoss("), "target")
    assert x.shape == (4, 2)
    assert w1.shape == (3, 2)
    assert w2.shape == (1, 3)

    z = x @ w1.T + b1
    h = 1 / (1 + (-z).exp())
    y = h @ w2.T + b2
    loss = ((y - t) ** 2).mean()
    to_y = 2 * (y - t) / 4
    to_h = to_y @ w2
    to_z = to_h * h * (1 - h)
    gradients = {
        "linear1.weight": to_z.T @ x,
        "linear1.bias": to_z.sum(0, keepdim=True),
        "linear2.weight": to_y.T @ h,
        "linear2.bias": to_y.sum(0, keepdim=True),
    }

    def assert_printed(heading: str, title: str, value: Tensor) -> None:
        printed = block(step(output, heading), title)
        torch.testing.assert_close(printed, value.reshape(printed.shape), rtol=0, atol=5e-6)  # rounded inputs

    for heading, title, value in [
        ("linear1: Linear(", "output", z),
        ("activation1: Sigmoid(", "output", h),
        ("linear2: Linear(", "output", y),
        ("loss: MSELoss(", "output", loss),
        ("loss: MSELossFunction", "g = ∂L/∂output", torch.ones_like(loss)),
        ("loss: MSELossFunction", "difference", y - t),
        ("loss: MSELossFunction", "∂L/∂input → linear2", to_y),
        ("linear2: LinearFunction", "g = ∂L/∂output", to_y),
        ("linear2: LinearFunction", "input", h),
        ("linear2: LinearFunction", "weight", w2),
        ("linear2: LinearFunction", "∂L/∂input → activation1", to_h),
        ("linear2: LinearFunction", "∂L/∂weight → linear2.weight", gradients["linear2.weight"]),
        ("linear2: LinearFunction", "∂L/∂bias → linear2.bias", gradients["linear2.bias"]),
        ("activation1: SigmoidFunction", "g = ∂L/∂output", to_h),
        ("activation1: SigmoidFunction", "derivative", h * (1 - h)),
        ("activation1: SigmoidFunction", "∂L/∂input → linear1", to_z),
        ("linear1: LinearFunction", "g = ∂L/∂output", to_z),
        ("linear1: LinearFunction", "∂L/∂weight → linear1.weight", gradients["linear1.weight"]),
        ("linear1: LinearFunction", "∂L/∂bias → linear1.bias", gradients["linear1.bias"]),
    ]:
        assert_printed(heading, title, value)
    assert "∂L/∂input" not in step(output, "linear1: LinearFunction")  # not needed

    new = {}
    for (name, gradient), w in zip(gradients.items(), (w1, b1, w2, b2), strict=True):
        heading, new[name] = f"{name}: w - 0.5 ∂L/∂w", w - 0.5 * gradient
        for title, value in (("w", w), ("∂L/∂w", gradient), ("new w", new[name])):
            assert_printed(heading, title, value)
    after = torch.sigmoid(x @ new["linear1.weight"].T + new["linear1.bias"])
    after = ((after @ new["linear2.weight"].T + new["linear2.bias"] - t) ** 2).mean()
    losses = re.findall(r"\d\.\d+", step(output, "loss of the same batch"))
    assert list(map(float, losses)) == pytest.approx([loss.item(), after.item()], abs=1e-5)

    rows = re.findall(r"^(\S+)\[(.*)\] +(\S+) +(\S+) +(\S+)$", step(output, "each gradient"), re.M)
    assert len(rows) == 13
    for name, index, *numbers in rows:
        value = gradients[name].reshape(w1.shape if name == "linear1.weight" else (1, -1))
        value = value[tuple(map(int, f"0, {index}".split(", ")[-2:]))]
        assert list(map(float, numbers)) == pytest.approx([value.item()] * 3, abs=1e-5)

    descent = [line.split() for line in step(output, "loss after each step").splitlines() if line]
    assert [int(number) for number, _ in descent] == list(range(11))
    values = [float(value) for _, value in descent]
    assert values[:2] == pytest.approx([loss.item(), after.item()], abs=1e-5)
    assert values == sorted(values, reverse=True)


def test_derivations_are_the_docstrings_of_the_rules(call: ScriptCall) -> None:
    """Including those of base classes that a rule uses."""
    _, output, _ = call()
    for heading, *rules in [
        ("linear2: LinearFunction", LinearFunction),
        ("activation1: SigmoidFunction", SigmoidFunction, SigmoidFunction.__bases__[0]),
    ]:
        text = step(output, heading)
        for rule in rules:
            for line in str(rule.__doc__).splitlines():
                assert line.strip() in text
    assert "independent" not in output
    steps = [int(number) for number in re.findall(r"^(\d+)\. .*\n--", output, re.M)]
    assert steps == list(range(1, len(steps) + 1))


def test_excerpt_in_the_readme(call: ScriptCall) -> None:
    """After a change: paste the lines of step 7. A line "..." stands for omitted ones."""
    section = (ROOT / "scripts" / "README.md").read_text().partition("## Backpropagation step by step\n")[2]
    output = call()[1]
    for part in section.split("```")[1].removeprefix("text").split("\n...\n"):
        assert part.strip("\n") in output
    assert "one of sixteen steps" in section
    assert "\n16. " in output
    assert "\n17. " not in output


def to_torch(module: nn.Module) -> nn.Module:
    """A copy with the classes of torch.nn."""
    copy = deepcopy(module)
    for child in copy.modules():
        if hasattr(nn, type(child).__name__):
            child.__class__ = getattr(nn, type(child).__name__)
    return copy


def parameter_gradients(explanation: explain.Explanation, model: nn.Module) -> dict[str, Tensor]:
    """The sums of the input gradients that go to each parameter."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for backward in explanation.backwards:
        for gradient in backward.input_grads:
            if gradient.destination in sums:
                sums[gradient.destination] += gradient.grad
    return sums


def assert_explanation_is_right(model: nn.Module, loss: nn.Module, x: Tensor, t: Tensor) -> explain.Explanation:
    """The gradients are torch.nn's, and the update is w - rate · gradient."""
    before, torch_model = deepcopy(model), to_torch(model)
    explain.compute_loss(torch_model, to_torch(loss), x, t).backward()
    explanation = explain.explain(model, loss, x, t, rate=0.25)
    assert not explanation.wrong
    gradients = parameter_gradients(explanation, model)
    for (name, gradient), torch_parameter in zip(gradients.items(), torch_model.parameters(), strict=True):
        assert torch_parameter.grad is not None
        torch.testing.assert_close(gradient, torch_parameter.grad, rtol=1e-7, atol=1e-12)
        updated = before.get_parameter(name) - 0.25 * torch_parameter.grad
        torch.testing.assert_close(model.get_parameter(name), updated, rtol=1e-7, atol=1e-12)
    return explanation


@pytest.mark.parametrize(
    ("name", "loss"),
    [*((name, "MSELoss") for name in explain.ACTIVATIONS), *(("Tanh", loss) for loss in explain.LOSSES)],
)
def test_every_activation_and_loss(name: str, loss: str) -> None:
    settings = explain.Settings(activation=name, loss=loss, widths=(2, 3, 2))
    torch.manual_seed(1)
    x, t = torch.randn(4, 2, dtype=torch.float64), explain.LOSSES[loss](4, 2)
    model = explain.build_network(settings)
    explanation = assert_explanation_is_right(model, getattr(manualgrad.nn, loss)(), x, t)
    assert {backward.layer for backward in explanation.backwards} == {"loss", *dict(model.named_children())}


def test_all_activations_of_torch_are_supported() -> None:
    """Except those that need arguments or change the shape."""
    others = {"GLU", "MultiheadAttention", "Softmax2d", "Threshold"}
    assert explain.ACTIVATIONS.keys() == set(torch.nn.modules.activation.__all__) - others


class Branching(nn.Module):
    """A residual connection, a layer that is called twice, and a node with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = manualgrad.nn.Linear(3, 3)
        self.norm = manualgrad.nn.LayerNorm(3)
        self.drop = manualgrad.nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.norm(self.inner(x))
        first, second = self.drop(self.inner(y)).split([1, 2], dim=1)
        return torch.cat([2 * first, second], dim=1)


def test_any_module() -> None:
    torch.manual_seed(0)
    model = Branching().double()
    torch_model = to_torch(model)
    x, t = torch.randn(2, 4, 3, dtype=torch.float64)
    explain.compute_loss(torch_model, nn.MSELoss(), x, t).backward()
    explanation = explain.explain(model, manualgrad.nn.MSELoss(), x, t)
    assert not explanation.wrong
    gradients = parameter_gradients(explanation, model).values()
    for gradient, torch_parameter in zip(gradients, torch_model.parameters(), strict=True):
        torch.testing.assert_close(gradient, torch_parameter.grad)
    layers = [backward.layer for backward in explanation.backwards]
    assert layers.count("inner") == 2
    assert "the model" in layers
    (split,) = [backward for backward in explanation.backwards if backward.name == "SplitWithSizes"]
    assert [gradient.shape for gradient in split.grad_outputs] == [(4, 1), (4, 2)]


def test_functional_call_of_manualgrad_cannot_be_checked() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = manualgrad.nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return manualgrad.nn.functional.tanh(self.inner(x))

    x, t = torch.randn(2, 3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"the network reverted to torch\.nn still calls TanhFunction"):
        explain.explain(Functional().double(), manualgrad.nn.MSELoss(), x, t)


# Wrong rules


class DoubledSigmoid(SigmoidFunction):
    def derivative(output: Tensor) -> Tensor:
        return 2 * (1 - output) * output


class SlightlyWrongLinear(LinearFunction):
    """One element of one gradient is wrong, by 1e-5 of its size."""

    def grad_bias(grad: Tensor) -> Tensor:
        return grad.sum(0) * (1 + 1e-5 * (torch.arange(grad.shape[1]) == grad.shape[1] - 1))


class NaNLinear(LinearFunction):
    def grad_weight(grad: Tensor, input: Tensor) -> Tensor:
        return torch.full((grad.shape[1], input.shape[1]), math.nan, dtype=grad.dtype)


@pytest.mark.parametrize(
    ("right", "wrong", "names", "rows"),
    [
        (SigmoidFunction, DoubledSigmoid, "linear1.weight, linear1.bias", 9),
        (LinearFunction, SlightlyWrongLinear, "linear1.bias, linear2.bias", 2),
        (LinearFunction, NaNLinear, "linear1.weight, linear2.weight", 9),
    ],
)
def test_wrong_rule_is_reported(
    right: Any, wrong: Any, names: str, rows: int, call: ScriptCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 1, an error line with the parameters, and marks in the table."""
    monkeypatch.setattr(right, "apply", wrong.apply)
    status, output, error = call()
    line = f"error: the gradient of {names} differs from torch.nn or the finite difference\n"
    assert (status, error) == (1, line)
    assert len(re.findall(r"  differs$", step(output, "each gradient"), re.M)) == rows


# The command line


def test_script_as_a_process(tmp_path: Path) -> None:
    """No warning, no file, and no line longer than 100 columns."""
    warnings = f"error,{os.environ['PYTHONWARNINGS']}"  # for an untested torch: see conftest
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": warnings}
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert not list(tmp_path.iterdir())


def test_options(call: ScriptCall) -> None:
    _, output, _ = call(
        "--widths", "3,2,4,2", "--activation", "ReLU", "--loss", "CrossEntropyLoss", "--batch-size", 5
    )
    assert block(step(output, "linear1: Linear("), "input").shape == (5, 3)
    assert block(step(output, "linear3: Linear("), "output").shape == (5, 2)
    assert "activation2: ReLUFunction" in output
    assert block(step(output, "loss: CrossEntropyLossFunction"), "∂L/∂input → linear3").sum(1) == pytest.approx(
        0, abs=1e-3
    )
    _, other, _ = call("--seed", 1, "--steps", 25, "--learning-rate", 0.001, "--digits", 2)
    assert other != output
    assert "new w" in step(other, "linear1.weight: w - 0.001 ∂L/∂w")
    numbers = re.findall(r"^ *(\d+)  \d\.\d{4}$", step(other, "loss after each step"), re.M)
    assert list(map(int, numbers)) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert call()[1] == call("--seed", 0)[1] != call("--seed", 1)[1]


@pytest.mark.parametrize("value", [1e-7, 0.4, 12.25, 3e9])
def test_format_matrix_keeps_digits_of_any_size(value: float) -> None:
    title, line = explain.format_matrix("x", torch.tensor([[value, -value]], dtype=torch.float64), 4)
    assert title == "x"
    assert [float(cell) for cell in line.split()] == pytest.approx([value, -value], rel=1e-3)


def test_tensorboard(call: ScriptCall, tmp_path: Path) -> None:
    status, output, error = call("--run-dir", "explanation", "--steps", 3)
    assert (status, error) == (0, "")
    assert output.endswith("also in TensorBoard: tensorboard --logdir explanation\n")
    events = EventAccumulator(str(tmp_path / "explanation")).Reload()
    values = [float(line.split()[1]) for line in step(output, "loss after each step").splitlines()[:4]]
    assert [point.value for point in events.Scalars("loss")] == pytest.approx(values, abs=1e-6)
    cards = [f"explanation/{name}/text_summary" for name in CARDS]
    text = [events.Tensors(card)[0].tensor_proto.string_val[0].decode() for card in cards]
    assert events.Tags()["tensors"] == cards
    card_lines = {line.strip() for card in text for line in card.splitlines()}
    headings = re.findall(r"^(\d+\. .*)\n--", output, re.M)
    assert {f"#### {heading}" for heading in headings} <= card_lines
    for title in ("linear1: LinearFunction", "loss after each step"):
        assert {line.strip() for line in step(output, title).splitlines()[:-1]} <= card_lines
    (picture,) = events.Images("gradient_norms")
    assert (picture.width < 800, picture.height) == (True, 80 + 4 * 36)  # readable after TensorBoard shrinks it
    assert call("--run-dir", "explanation") == (
        2,
        "",
        "error: explanation already contains a run: choose another folder\n",
    )


CARDS = ("1_forward", "2_backward", "3_update", "4_gradient_check", "5_further_steps", "6_the_same_in_Python")


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("--activation: choose from CELU, ", ["--activation", "sigmoid"]),
        ("--loss: choose from MSELoss, ", ["--loss", "CTCLoss"]),
        ("--widths: a network has at least inputs and outputs, for example 2,1", ["--widths", "3"]),
        ("--widths: Input should be less than or equal to 8 (got 9)", ["--widths", "9,1"]),
        ("--widths: Input should be greater than 0 (got 0)", ["--widths", "2,0,1"]),
        ("--widths: Input should be a valid integer", ["--widths", "two"]),
        ("--loss CrossEntropyLoss needs several classes", ["--loss", "CrossEntropyLoss"]),
        ("--batch-size: Input should be greater than 0 (got 0)", ["--batch-size", 0]),
        ("--learning-rate: Input should be greater than 0 (got -1)", ["--learning-rate", -1]),
        ("--steps: Input should be greater than 0 (got 0)", ["--steps", 0]),
        ("--digits: Input should be less than or equal to 6 (got 7)", ["--digits", 7]),
        ("--seed: Input should be greater than or equal to 0 (got -1)", ["--seed", -1]),
        ("unrecognized arguments: --epochs", ["--epochs", 3]),
        (f"{SCRIPT}/explanation cannot be written: Not a directory", ["--run-dir", SCRIPT / "explanation"]),
        (f"{SCRIPT} cannot be written: File exists", ["--run-dir", SCRIPT]),
    ],
)
def test_wrong_input_gives_one_error_line(line: str, arguments: list[object], call: ScriptCall) -> None:
    status, output, error = call(*arguments)
    assert (status, output) == (2, "")
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1


def test_divergence_ends_with_one_error_line(call: ScriptCall) -> None:
    status, output, error = call("--learning-rate", 1e10, "--steps", 100)
    assert status == 1
    assert error == "error: the loss is not finite; a lower --learning-rate may help\n"
    assert max(map(len, step(output, "loss after each step").splitlines())) < 20


def test_help_explains_every_option(call: ScriptCall) -> None:
    status, output, _ = call("--help")
    assert status == 0
    assert output.count("\n  --") == output.count("(default:") == 10
