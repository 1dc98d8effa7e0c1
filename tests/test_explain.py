"""scripts/explain.py, run as a user runs it, and its numbers computed again without it."""

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
SampleInput = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(call_script: SampleInput) -> SampleInput:
    return partial(call_script, SCRIPT)


def step(output: str, heading: str) -> str:
    """The text under the heading that begins so, after its number."""
    found = re.search(
        rf"^\d+\. {re.escape(heading)}.*\n-+\n((?:.*\n)*?)(?=\d+\. .*\n---|[A-Z, ]+\n====|\Z)", output, re.M
    )
    assert found, heading
    return found[1]


def block(text: str, title: str) -> Tensor:
    """The matrix below a title, by the columns of the page where it stands."""
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


def test_every_number_of_the_story_computed_again(call: SampleInput) -> None:
    """By the chain rule written out for this one network, from the numbers that the page begins with."""
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

    def shown(heading: str, title: str, value: Tensor) -> None:
        there = block(step(output, heading), title)
        torch.testing.assert_close(there, value.reshape(there.shape), rtol=0, atol=5e-6)  # from rounded numbers

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
        shown(heading, title, value)
    assert "∂L/∂input" not in step(output, "linear1: LinearFunction")  # nobody needs it

    new = {}
    for (name, gradient), w in zip(gradients.items(), (w1, b1, w2, b2), strict=True):
        heading, new[name] = f"{name}: w - 0.5 ∂L/∂w", w - 0.5 * gradient
        for title, value in (("w", w), ("∂L/∂w", gradient), ("new w", new[name])):
            shown(heading, title, value)
    after = torch.sigmoid(x @ new["linear1.weight"].T + new["linear1.bias"])
    after = ((after @ new["linear2.weight"].T + new["linear2.bias"] - t) ** 2).mean()
    before_and_after = re.findall(r"\d\.\d+", step(output, "the loss on the same batch"))
    assert list(map(float, before_and_after)) == pytest.approx([loss.item(), after.item()], abs=1e-5)

    rows = re.findall(r"^(\S+)\[(.*)\] +(\S+) +(\S+) +(\S+)$", step(output, "each gradient"), re.M)
    assert len(rows) == 13
    for name, place, *numbers in rows:
        value = gradients[name].reshape(w1.shape if name == "linear1.weight" else (1, -1))
        value = value[tuple(map(int, f"0, {place}".split(", ")[-2:]))]
        assert list(map(float, numbers)) == pytest.approx([value.item()] * 3, abs=1e-5)

    descent = [line.split() for line in step(output, "the loss after each step").splitlines() if line]
    assert [int(number) for number, _ in descent] == list(range(11))
    values = [float(value) for _, value in descent]
    assert values[:2] == pytest.approx([loss.item(), after.item()], abs=1e-5)
    assert values == sorted(values, reverse=True)


def test_the_derivations_are_those_of_the_rules(call: SampleInput) -> None:
    """Read off their docstrings, word for word, the inherited ones that they use too."""
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


def test_the_excerpt_in_the_readme(call: SampleInput) -> None:
    section = (ROOT / "README.md").read_text().partition("## Backpropagation step by step\n")[2]
    output = call()[1]
    assert f"{section.split('```')[1]}\n" in output
    assert "one of its fifteen steps" in section
    assert "\n15. " in output
    assert "\n16. " not in output


def as_torchs(module: nn.Module) -> nn.Module:
    """The same module with the classes of torch.nn."""
    twin = deepcopy(module)
    for part in twin.modules():
        part.__class__ = getattr(nn, type(part).__name__)
    return twin


def sent_to_parameters(lesson: explain.Lesson, model: nn.Module) -> dict[str, Tensor]:
    """What the arrows that end in parameters add up to."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for passage in lesson.passages:
        for arrow in passage.sent:
            if arrow.to in sums:
                sums[arrow.to] += arrow.grad
    return sums


def assert_right(model: nn.Module, loss: nn.Module, x: Tensor, t: Tensor) -> explain.Lesson:
    """The gradients in the lesson are those that torch.nn takes, and the update is w - rate · gradient."""
    before, theirs = deepcopy(model), as_torchs(model)
    explain.run(theirs, as_torchs(loss), x, t).backward()
    lesson = explain.explain(model, loss, x, t, rate=0.25)
    assert not lesson.wrong
    for (name, gradient), judge in zip(
        sent_to_parameters(lesson, model).items(), theirs.parameters(), strict=True
    ):
        assert judge.grad is not None
        torch.testing.assert_close(gradient, judge.grad, rtol=1e-7, atol=1e-12)
        moved = before.get_parameter(name) - 0.25 * judge.grad
        torch.testing.assert_close(model.get_parameter(name), moved, rtol=1e-7, atol=1e-12)
    return lesson


@pytest.mark.parametrize(
    ("name", "loss"),
    [*((name, "MSELoss") for name in explain.ACTIVATIONS), *(("Tanh", loss) for loss in explain.LOSSES)],
)
def test_every_activation_and_loss(name: str, loss: str) -> None:
    settings = explain.Settings(activation=name, loss=loss, widths=(2, 3, 2))
    torch.manual_seed(1)
    x, t = torch.randn(4, 2, dtype=torch.float64), explain.LOSSES[loss](4, 2)
    model = explain.network(settings)
    lesson = assert_right(model, getattr(manualgrad.nn, loss)(), x, t)
    assert {passage.layer for passage in lesson.passages} == {"loss", *dict(model.named_children())}


def test_all_activations_of_torch_are_there() -> None:
    """But for those that need settings or change the shape."""
    others = {"GLU", "MultiheadAttention", "Softmax2d", "Threshold"}
    assert explain.ACTIVATIONS.keys() == set(torch.nn.modules.activation.__all__) - others


class Branching(nn.Module):
    """A branch that joins again, a layer used twice, and two outputs of one node."""

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
    theirs = deepcopy(model)
    for part in theirs.children():
        part.__class__ = getattr(nn, type(part).__name__)
    x, t = torch.randn(2, 4, 3, dtype=torch.float64)
    explain.run(theirs, nn.MSELoss(), x, t).backward()
    lesson = explain.explain(model, manualgrad.nn.MSELoss(), x, t)
    assert not lesson.wrong
    for gradient, judge in zip(sent_to_parameters(lesson, model).values(), theirs.parameters(), strict=True):
        torch.testing.assert_close(gradient, judge.grad)
    layers = [passage.layer for passage in lesson.passages]
    assert layers.count("inner") == 2
    assert "the model" in layers
    (split,) = [passage for passage in lesson.passages if passage.name == "SplitWithSizes"]
    assert [gradient.shape for gradient in split.arrived] == [(4, 1), (4, 2)]


def test_a_functional_call_of_ours_has_no_judge() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = manualgrad.nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return manualgrad.nn.functional.tanh(self.inner(x))

    x, t = torch.randn(2, 3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"the network in torch\.nn still calls TanhFunction"):
        explain.explain(Functional().double(), manualgrad.nn.MSELoss(), x, t)


# A rule that is wrong


class DoubledSigmoid(SigmoidFunction):
    def derivative(output: Tensor) -> Tensor:
        return 2 * (1 - output) * output


class LateLinear(LinearFunction):
    """Right in all but one number, and that by little."""

    def grad_bias(grad: Tensor) -> Tensor:
        return grad.sum(0) * (1 + 1e-5 * (torch.arange(grad.shape[1]) == grad.shape[1] - 1))


class NoSlopeLinear(LinearFunction):
    def grad_weight(grad: Tensor, input: Tensor) -> Tensor:
        return torch.full((grad.shape[1], input.shape[1]), math.nan, dtype=grad.dtype)


@pytest.mark.parametrize(
    ("right", "wrong", "names", "rows"),
    [
        (SigmoidFunction, DoubledSigmoid, "linear1.weight, linear1.bias", 9),
        (LinearFunction, LateLinear, "linear1.bias, linear2.bias", 2),
        (LinearFunction, NoSlopeLinear, "linear1.weight, linear2.weight", 9),
    ],
)
def test_a_wrong_rule_is_found(
    right: Any, wrong: Any, names: str, rows: int, call: SampleInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit status is 1, the last line names the parameters, and the table marks their numbers."""
    monkeypatch.setattr(right, "apply", wrong.apply)
    status, output, error = call()
    line = f"error: the gradient of {names} disagrees with torch.nn or the finite difference\n"
    assert (status, error) == (1, line)
    assert len(re.findall(r"  disagrees$", step(output, "each gradient"), re.M)) == rows


# The command line


def test_as_a_process(tmp_path: Path) -> None:
    """Without a warning; it writes nothing, and nothing wider than a page."""
    warnings = f"error,{os.environ['PYTHONWARNINGS']}"  # of an untried torch: see conftest
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": warnings}
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert not list(tmp_path.iterdir())


def test_options(call: SampleInput) -> None:
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
    numbers = re.findall(r"^ *(\d+)  \d\.\d{4}$", step(other, "the loss after each step"), re.M)
    assert list(map(int, numbers)) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert call()[1] == call("--seed", 0)[1] != call("--seed", 1)[1]


@pytest.mark.parametrize("value", [1e-7, 0.4, 12.25, 3e9])
def test_numbers_of_any_size_keep_their_digits(value: float) -> None:
    title, line = explain.matrix("x", torch.tensor([[value, -value]], dtype=torch.float64), 4)
    assert title == "x"
    assert [float(cell) for cell in line.split()] == pytest.approx([value, -value], rel=1e-3)


def test_tensorboard(call: SampleInput, tmp_path: Path) -> None:
    status, output, error = call("--run-dir", "lesson", "--steps", 3)
    assert (status, error) == (0, "")
    assert output.endswith("the same with pictures: tensorboard --logdir lesson\n")
    events = EventAccumulator(str(tmp_path / "lesson")).Reload()
    values = [float(line.split()[1]) for line in step(output, "the loss after each step").splitlines()[:4]]
    assert [point.value for point in events.Scalars("loss")] == pytest.approx(values, abs=1e-6)
    cards = [f"lesson/{name}/text_summary" for name in CARDS]
    text = [events.Tensors(card)[0].tensor_proto.string_val[0].decode() for card in cards]
    assert events.Tags()["tensors"] == cards
    shown = {line.strip() for card in text for line in card.splitlines()}
    headings = re.findall(r"^(\d+\. .*)\n--", output, re.M)
    assert {f"#### {heading}" for heading in headings} <= shown
    for title in ("linear1: LinearFunction", "the loss after each step"):
        assert {line.strip() for line in step(output, title).splitlines()[:-1]} <= shown
    (picture,) = events.Images("gradient_norms")
    assert (picture.width < 800, picture.height) == (True, 80 + 4 * 36)  # legible where TensorBoard shrinks it
    assert call("--run-dir", "lesson") == (2, "", "error: lesson holds a run already: take another folder\n")


CARDS = ("1_forward", "2_backward", "3_the_update", "4_the_check", "5_the_descent")


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("--activation: there is CELU, ", ["--activation", "sigmoid"]),
        ("--loss: there is MSELoss, ", ["--loss", "CTCLoss"]),
        ("--widths: a network has at least inputs and outputs, as 2,1", ["--widths", "3"]),
        ("--widths: Input should be less than or equal to 8 (got 9)", ["--widths", "9,1"]),
        ("--widths: Input should be greater than 0 (got 0)", ["--widths", "2,0,1"]),
        ("--widths: Input should be a valid integer", ["--widths", "two"]),
        ("--loss CrossEntropyLoss chooses between the outputs", ["--loss", "CrossEntropyLoss"]),
        ("--batch-size: Input should be greater than 0 (got 0)", ["--batch-size", 0]),
        ("--learning-rate: Input should be greater than 0 (got -1)", ["--learning-rate", -1]),
        ("--steps: Input should be greater than 0 (got 0)", ["--steps", 0]),
        ("--digits: Input should be less than or equal to 6 (got 7)", ["--digits", 7]),
        ("--seed: Input should be greater than or equal to 0 (got -1)", ["--seed", -1]),
        ("unrecognized arguments: --epochs", ["--epochs", 3]),
        (f"{SCRIPT}/lesson cannot be written: Not a directory", ["--run-dir", SCRIPT / "lesson"]),
        (f"{SCRIPT} cannot be written: File exists", ["--run-dir", SCRIPT]),
    ],
)
def test_wrong_input_gives_one_line(line: str, arguments: list[object], call: SampleInput) -> None:
    status, output, error = call(*arguments)
    assert (status, output) == (2, "")
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1


def test_divergence_ends_with_one_line(call: SampleInput) -> None:
    status, output, error = call("--learning-rate", 1e10, "--steps", 100)
    assert status == 1
    assert error == "error: the loss has grown beyond all numbers; a lower --learning-rate may help\n"
    assert max(map(len, step(output, "the loss after each step").splitlines())) < 20


def test_help_explains_every_option(call: SampleInput) -> None:
    status, output, _ = call("--help")
    assert status == 0
    assert output.count("\n  --") == output.count("(default:") == 10
