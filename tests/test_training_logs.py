"""What a run writes for TensorBoard."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.lr_scheduler import LinearLR
from torch.utils.tensorboard import FileWriter, SummaryWriter
from training_helpers import batches, curves, network, trainer

from manualgrad.training import (
    checkpoint,
)
from manualgrad.training.tensorboard_logger import _by_layer

torch.set_num_threads(1)


def test_tensorboard_content(tmp_path: Path) -> None:
    model, data = network(), batches([8] * 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    result = trainer(
        model,
        data,
        batches([6]),
        optimizer=optimizer,
        lr_scheduler=LinearLR(optimizer, 1.0, 0.5, total_iters=10),
        metrics={"absolute_error": lambda p, t: (p - t).abs().mean()},
        on_fit_end=lambda logger, step: {"test_loss": 0.25},
        run_dir=tmp_path,
        max_epochs=3,
        log_every_n_steps=2,
        histograms_every_n_epochs=2,
    ).fit()
    events = EventAccumulator(str(tmp_path)).Reload()
    points = curves(tmp_path)
    steps = {tag: [step for step, _ in values] for tag, values in points.items()}
    updates, epochs = [2, 4, 6, 8, 10, 12, 14], [5, 10, 15]
    final = [f"summary/{part}_{name}" for part in ("train", "validation") for name in ("loss", "absolute_error")]
    assert steps == {
        "loss/train": updates,
        "absolute_error/train": updates,
        "optimizer/learning_rate": updates,
        "optimizer/gradient_norm": updates,
        "loss/train_epoch": epochs,
        "absolute_error/train_epoch": epochs,
        "loss/validation_epoch": epochs,
        "absolute_error/validation_epoch": epochs,
        **{tag: [16] for tag in (*final, "summary/test_loss")},
    }
    assert [rate for _, rate in points["optimizer/learning_rate"]][:3] == pytest.approx([0.095, 0.085, 0.075])
    assert points["loss/train_epoch"][-1][1] == pytest.approx(result.train["loss"])
    best = min(value for _, value in points["loss/validation_epoch"])
    assert points["summary/validation_loss"] == [(16, best)] == [(16, pytest.approx(result.validation["loss"]))]
    assert result.summary == {"test_loss": 0.25}

    names = [name for name, _ in model.named_parameters()]
    kinds = ("weights", "weights_gradient")
    assert set(events.Tags()["histograms"]) == {f"{kind}/{name}" for kind in kinds for name in names}
    assert [histogram.step for histogram in events.Histograms("weights/0.weight")] == [10]
    assert events.Histograms("weights/0.weight")[0].histogram_value.num == 64
    assert min(event.value for event in events.Scalars("speed/examples_per_second")) > 0

    card = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| max grad norm | None |" in card
    assert "| parameters | 97 |" in card
    assert "Linear(in_features=4, out_features=16" in card
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    assert set(events.Tags()["images"]) == {"gradient_flow", "saved_bytes"}
    assert {"custom_scalars__config__", "saved_bytes/text_summary", "summary/text_summary"} <= set(
        events.Tags()["tensors"]
    )


def test_gradient_norms_are_combined_to_a_number_of_modules_that_a_picture_can_show() -> None:
    norms = {f"blocks.{block}.{layer}.weight": 3.0 for block in range(8) for layer in ("mix", "norm", "out")}
    assert _by_layer(norms | {"head.bias": 4.0}) == pytest.approx(
        {**{f"blocks.{i}": 27**0.5 for i in range(8)}, "head": 4.0}
    )
    assert _by_layer({"a.b.weight": 3.0, "a.b.bias": 4.0, "a.c.weight": 1.0}) == {"a.b": 5.0, "a.c": 1.0}
    assert _by_layer({"weight": 3.0}) == {"weight": 3.0}


def test_points_are_flushed_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a kill after the checkpoint loses no points."""
    order: list[str] = []

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **more: (order.append(name), function(*arguments, **more))[1]

    monkeypatch.setattr(FileWriter, "add_summary", recording("point", FileWriter.add_summary))
    monkeypatch.setattr(SummaryWriter, "flush", recording("flush", SummaryWriter.flush))
    monkeypatch.setattr(checkpoint.CheckpointWriter, "save", recording("save", checkpoint.CheckpointWriter.save))
    trainer(network(), batches([8] * 4), run_dir=tmp_path, log_every_n_steps=1, checkpoint_every_n_steps=1).fit()
    saves = [i for i, name in enumerate(order) if name == "save"]
    assert len(saves) == 5  # before the first update and after each
    assert [order[i - 1] for i in saves] == ["flush"] * 5
    assert all("point" in order[a:b] for a, b in itertools.pairwise(saves))


def test_without_run_dir_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer(network(), batches([8]), batches([8])).fit()
    assert list(tmp_path.iterdir()) == []
