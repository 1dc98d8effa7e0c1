"""`verify` finds every planted defect, reports no failure for correct functions, and explains what it found."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from correct_functions import CORRECT_FUNCTIONS, CorrectFunction
from defects import DEFECTS, Defect
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from manualgrad import verify
from manualgrad.verification import LAWS

TESTS = Path(__file__).parent


@pytest.mark.parametrize("defect", [pytest.param(d, id=f"{d.law}: {d.name}") for d in DEFECTS])
def test_planted_defect(defect: Defect) -> None:
    report = verify(defect.function, *defect.inputs(), laws=[defect.law], require=defect.require)
    assert (report.warnings if defect.is_warning else report.failures) == [defect.law]
    (row,) = report.rows
    assert row.evidence
    assert row.likely_cause


def test_each_default_law_has_a_planted_defect() -> None:
    without_defect = {
        "jvp_matches_backward",  # a wrong jvp breaks forward_mode too
        "matches_reference",  # needs reference=
    }
    assert {name for name, law in LAWS.items() if not law.on_request} - without_defect <= {d.law for d in DEFECTS}


def test_laws_are_documented() -> None:
    for law in LAWS.values():
        assert law.property.endswith(".")
        assert law.motivation.endswith(".")
        assert law.likely_cause


@pytest.mark.parametrize("correct", [pytest.param(c, id=c.name) for c in CORRECT_FUNCTIONS])
def test_correct_function(correct: CorrectFunction) -> None:
    verify(correct.function, *correct.inputs()).raise_if_failed()


class DoubledProduct(Function):
    """y = 2 x w, with a wrong gradient for w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return 2 * grad * w, grad * x


class SumUpToLength(Function):
    """The sum of the first numbers of each row, with a wrong gradient."""

    max_excess = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor) -> Tensor:
        SumUpToLength.max_excess = max(SumUpToLength.max_excess, int(lengths.max()) - x.shape[1])
        ctx.save_for_backward(x, lengths)
        return (x * (torch.arange(x.shape[1]) < lengths.unsqueeze(1))).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, _ = ctx.saved_tensors
        return grad.unsqueeze(1).expand_as(x) * 1.5, None


@pytest.mark.parametrize("lengths", [[4, 3, 2], [2, 2, 1]])
def test_reduced_inputs_are_not_shorter_than_integer_arguments(lengths: list[int]) -> None:
    """If a target is shorter than its length argument, torch's ctc_loss reads out of bounds and may crash."""
    report = verify(SumUpToLength, torch.randn(3, 4, dtype=torch.float64), torch.tensor(lengths))
    assert report.failures
    assert SumUpToLength.max_excess <= 0


def make_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    return x, w


def test_report() -> None:
    report = verify(DoubledProduct, *make_inputs())
    assert not report.ok
    assert report.failures[0] == "gradient"
    (row,) = [row for row in report.rows if row.law == "gradient"]
    assert "gradient of 'w' at [" in row.evidence
    assert "finite difference" in row.evidence
    assert row.minimal_example.count("[[") == 2  # reduced to one number each
    with pytest.raises(
        AssertionError,
        match=r"(?s)DoubledProduct: \d+ laws fail.*finite difference.*likely cause: .*minimal example: x = ",
    ):
        report.raise_if_failed()
    assert json.loads(report.to_json())["failures"] == report.failures
    assert verify(DoubledProduct, *make_inputs(), laws=["gradient"]).rows == [row]


def test_reference() -> None:
    """The backward fits the forward; only a reference shows that the forward is wrong."""
    mean = lambda x: x.mean(-1)  # noqa: E731
    x = make_inputs()[0]
    assert verify(lambda x: x.mean(0), x[:, :3], laws=["matches_reference"], reference=mean).failures == [
        "matches_reference"
    ]
    assert verify(mean, x, laws=["matches_reference"], reference=mean).ok


def test_required_feature_must_be_supported() -> None:
    assert verify(DoubledProduct, *make_inputs(), laws=["forward_mode"]).rows[0].verdict == "unsupported"
    assert verify(DoubledProduct, *make_inputs(), laws=["forward_mode"], require=["forward_mode"]).failures == [
        "forward_mode"
    ]


def test_module_parameters_are_inputs() -> None:
    report = verify(
        nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.randn(4, 3), laws=["gradient_of_input_subsets"]
    )
    assert report.rows[0].verdict == "holds"
    frozen = nn.Linear(3, 2).requires_grad_(False)
    (row,) = verify(frozen, torch.randn(4, 3), laws=["gradient_of_input_subsets"]).rows
    assert row.evidence == "only one input is differentiable"


def test_surrogate_gradient() -> None:
    class Sign(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sign()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.clone()

    assert "gradient" in verify(Sign, make_inputs()[0]).failures
    verify(Sign, make_inputs()[0], surrogate=True).raise_if_failed()


def test_global_state_is_unchanged() -> None:
    x, w = make_inputs()
    before = torch.get_rng_state(), x.clone(), DoubledProduct.forward, DoubledProduct.backward, Function.apply
    verify(DoubledProduct, x, w)
    after = torch.get_rng_state(), x, DoubledProduct.forward, DoubledProduct.backward, Function.apply
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert not x.requires_grad


def test_module_state_and_generator_are_unchanged() -> None:
    class NoisyGRU(nn.GRU):
        generator = torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            self.noisy_input = x * torch.rand(x.shape, generator=self.generator, dtype=x.dtype) * random.random()
            return super().forward(self.noisy_input)[0]

    module = NoisyGRU(2, 2).double()
    before = dict(vars(module)), [id(w) for w in module._flat_weights], module.generator.get_state()
    verify(
        module, make_inputs()[0][..., :2], laws=["gradient", "no_memory_leaks", "determinism"]
    ).raise_if_failed()
    assert vars(module) == before[0]
    assert [id(w) for w in module._flat_weights] == before[1]
    assert torch.equal(module.generator.get_state(), before[2])


def test_reentrant_checkpoint_is_not_applicable() -> None:
    report = verify(lambda x: checkpoint(torch.sin, x, use_reentrant=True), make_inputs()[0], laws=["gradient"])
    assert report.rows[0].verdict == "not applicable"
    assert "use_reentrant=False" in report.rows[0].evidence


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (3, torch.ones(2)),
            TypeError,
            "fn must be an autograd.Function, a function or a module, but it is of type int",
        ),
        ((DoubledProduct,), ValueError, "no input is a floating or complex tensor"),
        ((torch.relu, torch.ones(2, dtype=torch.int64)), ValueError, "nothing to differentiate"),
        ((torch.argmax, torch.ones(2)), ValueError, "nothing to differentiate"),
    ],
)
def test_invalid_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        verify(*arguments)


def test_unknown_law() -> None:
    with pytest.raises(ValueError, match="there is no law 'gradients'; the laws are: gradient,"):
        verify(torch.relu, torch.randn(3), laws=["gradients"])


@pytest.mark.parametrize(
    ("arguments", "status", "output"),
    [
        (
            [
                "test_verification:DoubledProduct",
                "--inputs",
                "test_verification:make_inputs",
                "--laws",
                "linear_in_grad_output",
            ],
            0,
            "DoubledProduct: no law fails",
        ),
        (
            [
                "test_verification:DoubledProduct",
                "--inputs",
                "test_verification:make_inputs",
                "--laws",
                "gradient",
                "--json",
            ],
            1,
            '"ok": false',
        ),
        (
            ["test_verification:Missing", "--inputs", "test_verification:make_inputs"],
            2,
            "has no attribute 'Missing'",
        ),
        (["test_verification", "--inputs", "test_verification:make_inputs"], 2, "PACKAGE.MODULE:NAME"),
    ],
)
def test_command_line(arguments: list[str], status: int, output: str) -> None:
    command = [sys.executable, "-m", "manualgrad", "verify", *arguments]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert output in done.stdout + done.stderr
