"""verify itself: it finds every planted defect, raises no alarm over what is sound, and says what it found."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from defects import DEFECTS, Defect
from sound import SOUND, Sound
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from manualgrad import verify
from manualgrad.verification import LAWS

TESTS = Path(__file__).parent


@pytest.mark.parametrize("defect", [pytest.param(d, id=f"{d.law}: {d.name}") for d in DEFECTS])
def test_a_planted_defect_is_found(defect: Defect) -> None:
    report = verify(defect.function, *defect.inputs(), laws=[defect.law], require=defect.require)
    assert (report.warnings if defect.warns else report.failures) == [defect.law]
    (row,) = report.rows
    assert row.evidence
    assert row.cause


def test_every_default_law_has_a_defect_planted() -> None:
    exempt = {
        "adjoint",
        "matches_reference",
    }  # what breaks the first breaks forward_mode; the second needs a reference
    assert {name for name, law in LAWS.items() if not law.on_request} - exempt <= {d.law for d in DEFECTS}


@pytest.mark.parametrize("sound", [pytest.param(s, id=s.name) for s in SOUND])
def test_no_alarm_over_a_sound_function(sound: Sound) -> None:
    verify(sound.function, *sound.inputs()).raise_if_failed()


class Doubled(Function):
    """y = 2 x w, with a wrong gradient for w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return 2 * grad * w, grad * x


class Lengths(Function):
    """The sum of the first numbers of each row, with a wrong gradient."""

    longest_beyond = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor) -> Tensor:
        Lengths.longest_beyond = max(Lengths.longest_beyond, int(lengths.max()) - x.shape[1])
        ctx.save_for_backward(x, lengths)
        return (x * (torch.arange(x.shape[1]) < lengths.unsqueeze(1))).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, _ = ctx.saved_tensors
        return grad.unsqueeze(1).expand_as(x) * 1.5, None


@pytest.mark.parametrize("lengths", [[4, 3, 2], [2, 2, 1]])
def test_a_smaller_input_keeps_the_lengths_that_an_argument_counts(lengths: list[int]) -> None:
    """torch's ctc_loss, of a target cut and its length not, reads past the end and may kill the process."""
    report = verify(Lengths, torch.randn(3, 4, dtype=torch.float64), torch.tensor(lengths))
    assert report.failures
    assert Lengths.longest_beyond <= 0


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    return x, w


def test_the_report() -> None:
    report = verify(Doubled, *pair())
    assert not report.ok
    assert report.failures[0] == "gradient"
    (row,) = [row for row in report.rows if row.law == "gradient"]
    assert "gradient of 'w' at [" in row.evidence
    assert "finite difference" in row.evidence
    assert row.minimal_example.count("[[") == 2  # cut to one number each
    with pytest.raises(
        AssertionError, match=r"(?s)Doubled: \d+ laws fail.*finite difference.*minimal example: x = "
    ):
        report.raise_if_failed()
    assert json.loads(report.to_json())["failures"] == report.failures
    assert verify(Doubled, *pair(), laws=["gradient"]).rows == [row]


def test_a_reference_judges_where_nothing_else_can() -> None:
    """Forward and backward agree with each other; only what was meant tells."""
    mean = lambda x: x.mean(-1)  # noqa: E731
    x = pair()[0]
    assert verify(lambda x: x.mean(0), x[:, :3], laws=["matches_reference"], reference=mean).failures == [
        "matches_reference"
    ]
    assert verify(mean, x, laws=["matches_reference"], reference=mean).ok


def test_what_is_required_must_be_offered() -> None:
    assert verify(Doubled, *pair(), laws=["forward_mode"]).rows[0].verdict == "not offered"
    assert verify(Doubled, *pair(), laws=["forward_mode"], require=["forward_mode"]).failures == ["forward_mode"]


def test_a_module_is_tried_with_its_parameters() -> None:
    report = verify(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.randn(4, 3), laws=["gradient_of_each_subset"])
    assert report.rows[0].verdict == "holds"
    frozen = nn.Linear(3, 2).requires_grad_(False)
    (row,) = verify(frozen, torch.randn(4, 3), laws=["gradient_of_each_subset"]).rows
    assert row.evidence == "one differentiable input"


def test_a_surrogate_is_not_held_to_the_derivative() -> None:
    class Sign(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sign()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.clone()

    assert "gradient" in verify(Sign, pair()[0]).failures
    verify(Sign, pair()[0], surrogate=True).raise_if_failed()


def test_the_world_is_left_as_it_was() -> None:
    x, w = pair()
    before = torch.get_rng_state(), x.clone(), Doubled.forward, Doubled.backward, Function.apply
    verify(Doubled, x, w)
    after = torch.get_rng_state(), x, Doubled.forward, Doubled.backward, Function.apply
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert not x.requires_grad


def test_a_module_and_its_generator_are_left_as_they_were() -> None:
    class Noisy(nn.GRU):
        generator = torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            self.latest = x * torch.rand(x.shape, generator=self.generator, dtype=x.dtype) * random.random()
            return super().forward(self.latest)[0]

    module = Noisy(2, 2).double()
    before = dict(vars(module)), [id(w) for w in module._flat_weights], module.generator.get_state()
    verify(module, pair()[0][..., :2], laws=["gradient", "no_memory_leaks", "deterministic"]).raise_if_failed()
    assert vars(module) == before[0]
    assert [id(w) for w in module._flat_weights] == before[1]
    assert torch.equal(module.generator.get_state(), before[2])


def test_a_reentrant_checkpoint_is_not_applicable() -> None:
    report = verify(lambda x: checkpoint(torch.sin, x, use_reentrant=True), pair()[0], laws=["gradient"])
    assert report.rows[0].verdict == "not applicable"
    assert "use_reentrant=False" in report.rows[0].evidence


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((3, torch.ones(2)), TypeError, "is verified, not a int"),
        ((Doubled,), ValueError, "no input is a tensor"),
        ((torch.relu, torch.ones(2, dtype=torch.int64)), ValueError, "nothing to differentiate"),
        ((torch.argmax, torch.ones(2)), ValueError, "nothing to differentiate"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        verify(*arguments)


def test_an_unknown_law() -> None:
    with pytest.raises(ValueError, match="no law is called 'gradients'; there are: gradient,"):
        verify(torch.relu, torch.randn(3), laws=["gradients"])


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (
            ["test_verification:Doubled", "--inputs", "test_verification:pair", "--laws", "upstream"],
            0,
            "Doubled: sound",
        ),
        (
            ["test_verification:Doubled", "--inputs", "test_verification:pair", "--laws", "gradient", "--json"],
            1,
            '"ok": false',
        ),
        (["test_verification:Missing", "--inputs", "test_verification:pair"], 2, "has no attribute 'Missing'"),
        (["test_verification", "--inputs", "test_verification:pair"], 2, "package.module:name"),
    ],
)
def test_the_command_line(arguments: list[str], status: int, says: str) -> None:
    command = [sys.executable, "-m", "manualgrad", "verify", *arguments]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert says in done.stdout + done.stderr
