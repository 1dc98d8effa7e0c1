"""scripts/benchmark.py: its checks and variants. The measured figures are not tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import benchmark
import pytest
import torch
from graph import nodes
from lib import models
from lib.steps import ModelStep

import manualgrad.nn

F32 = torch.float32
PAGE = Path(benchmark.__file__).with_name("README.md").read_text()


def test_wrong_gradient_ends_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    exact = torch.randn(50, dtype=torch.float64)
    right, wrong = exact.float(), (1.001 * exact).float()
    benchmark.compare_gradients("name", [right, right], [right, right], lambda: [exact, exact], F32)
    for bad in (wrong, torch.full_like(right, torch.nan)):
        with pytest.raises(SystemExit):
            benchmark.compare_gradients("name", [right, bad], [right, right], lambda: [exact, exact], F32)
        assert "name: gradient 1 differs" in capsys.readouterr().err


def test_gradient_as_accurate_as_torchs_is_accepted() -> None:
    exact = torch.randn(50, dtype=torch.float64)
    manual_grad, torch_grad = (exact + 1e-4).float(), (exact - 1e-4).float()
    benchmark.compare_gradients("name", [manual_grad], [torch_grad], lambda: [exact], F32)
    with pytest.raises(SystemExit):
        benchmark.compare_gradients("name", [(exact + 3e-4).float()], [torch_grad], lambda: [exact], F32)


@pytest.mark.parametrize("name", ["manualgrad", "manualgrad_checkpointed", "torch_checkpointed", "torch"])
def test_variant_uses_the_layers_in_its_name(name: str) -> None:
    run = ModelStep(models.CASES_BY_NAME["mlp_tiny"], name, "cpu", F32)
    converted = name.startswith("manualgrad")
    assert ("LinearFunctionBackward" in nodes(run.model(*run.batch))) == converted
    assert (type(run.model.get_submodule("layers.1")) is manualgrad.nn.ReLU) == converted
    first, second = run.gradients(), run.gradients()
    assert len(first) == len(list(run.model.parameters()))
    assert all(map(torch.equal, first, second))


def test_checkpointed_blocks_save_only_their_inputs() -> None:
    gpt = models.CASES_BY_NAME["gpt"]
    case = replace(gpt, make=lambda: models.gpt(11, 16, 2, 2), batch=models.language_batch(11, 2, 8))
    saved = {}
    for name in ("torch", "torch_checkpointed"):
        run = ModelStep(case, name, "cpu", F32)
        saved[name] = {row.name for row in manualgrad.saved_bytes(run.model, *run.batch).rows}
    assert not any(name.startswith("blocks.") for name in saved["torch_checkpointed"])
    assert any(name.startswith("blocks.") for name in saved["torch"])


def test_peak_memory_is_that_of_a_step() -> None:
    settings = benchmark.Settings(suite="models")
    outputs = 5 * 4096 * 512 * 4  # bytes of the outputs of five layers
    peak = benchmark.peak_memory("mlp_relu", "torch", settings)
    assert peak is None or outputs < peak < 6 * outputs


def test_readme_tables_have_the_current_headers() -> None:
    assert benchmark.MODEL_HEADER in PAGE
    assert benchmark.OPERATION_HEADER in PAGE


def test_readme_table_of_layer_norm() -> None:
    """After a change: paste the output of `python scripts/benchmark.py --suite orders`."""
    assert benchmark.layer_norm_table() in PAGE
