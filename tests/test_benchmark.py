"""scripts/benchmark.py: what would make its figures worthless. The figures themselves are no test's business."""

from __future__ import annotations

from dataclasses import replace

import benchmark
import models
import pytest
import torch
from graph import nodes

import manualgrad.nn

F32 = torch.float32


def test_a_wrong_gradient_ends_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    true = torch.randn(50, dtype=torch.float64)
    right, wrong = true.float(), (1.001 * true).float()
    benchmark.compare("name", [right, right], [right, right], lambda: [true, true], F32)
    for bad in (wrong, torch.full_like(right, torch.nan)):
        with pytest.raises(SystemExit):
            benchmark.compare("name", [right, bad], [right, right], lambda: [true, true], F32)
        assert "name: gradient 1 differs" in capsys.readouterr().err


def test_a_gradient_that_differs_from_torchs_may_be_as_near_to_the_true_one() -> None:
    true = torch.randn(50, dtype=torch.float64)
    ours, torchs = (true + 1e-4).float(), (true - 1e-4).float()
    benchmark.compare("name", [ours], [torchs], lambda: [true], F32)
    with pytest.raises(SystemExit):
        benchmark.compare("name", [(true + 3e-4).float()], [torchs], lambda: [true], F32)


@pytest.mark.parametrize("name", ["ours", "ours_checkpointed", "checkpointed", "torch"])
def test_each_contestant_is_what_it_says(name: str) -> None:
    run = benchmark.Run(models.NAMED["mlp_tiny"], name, "cpu", F32)
    assert ("LinearFunctionBackward" in nodes(run.model(*run.batch))) == name.startswith("ours")
    assert (type(run.model.get_submodule("layers.1")) is manualgrad.nn.ReLU) == name.startswith("ours")
    first, again = run.gradients(), run.gradients()
    assert len(first) == len(list(run.model.parameters()))
    assert all(map(torch.equal, first, again))


def test_checkpointed_blocks_keep_their_inputs_alone() -> None:
    case = replace(models.NAMED["gpt"], make=lambda: models.gpt(11, 16, 2, 2), batch=models.text(11, 2, 8))
    kept = {}
    for name in ("torch", "checkpointed"):
        run = benchmark.Run(case, name, "cpu", F32)
        kept[name] = {row.name for row in manualgrad.saved_bytes(run.model, *run.batch).rows}
    assert not any(name.startswith("blocks.") for name in kept["checkpointed"])
    assert any(name.startswith("blocks.") for name in kept["torch"])


def test_the_peak_is_that_of_a_step() -> None:
    settings = benchmark.Settings(what="models")
    least = 5 * 4096 * 512 * 4  # the outputs of five layers of the next size
    found = benchmark.peak("mlp_relu", "torch", settings)
    assert found is None or least < found < 6 * least
