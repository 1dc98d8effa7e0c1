"""Modules in eval mode stay in eval mode."""

import importlib.metadata
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)
from training_helpers import DATA, assert_same, network, newest, trainer

import manualgrad
from manualgrad.training import Interrupted, Trainer, TrainingSettings

torch.set_num_threads(1)

X = torch.arange(24.0)[:, None]


class FreezesItsNorm(nn.Module):
    """Overrides `train` to keep its norm in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(1), nn.Dropout(0.5), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(x)))

    def train(self, mode: bool = True) -> "FreezesItsNorm":
        super().train(mode)
        self.norm.eval()
        return self


def frozen_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 4), nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Dropout(0.5)), nn.Linear(4, 1)
    )


def frozen_body() -> nn.Module:
    model = frozen_norm().eval()
    model[2].train()  # pyright: ignore
    return model


@pytest.mark.parametrize(
    ("make", "training"),
    [
        (frozen_norm, {"", "0", "1", "1.1", "2"}),
        (frozen_body, {"2"}),
        (lambda: frozen_norm().eval(), {"", "0", "1", "1.0", "1.1", "2"}),
        (FreezesItsNorm, {"", "drop", "out"}),
    ],
    ids=["norm", "all but the head", "all", "train is overridden"],
)
def test_modules_keep_their_mode(make: Callable[[], nn.Module], training: set[str], tmp_path: Path) -> None:
    """In training, validation and callbacks, after an interruption, and with a last batch of one."""
    rows = TensorDataset(X[:17], X[:17])

    def run(folder: str, stop: int | None = None) -> nn.Module:
        model = make()
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        updates = iter(range(1, 100))

        def loss(prediction: Tensor, target: Tensor) -> Tensor:
            found = {name for name, module in model.named_modules() if module.training}
            assert found == (training if prediction.requires_grad else set())
            if prediction.requires_grad and next(updates) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return (prediction - target).square().mean()

        settings = TrainingSettings(
            device="cpu",
            max_epochs=3,
            run_dir=tmp_path / folder,
            resume_from_checkpoint=True,
            progress_bar=False,
            histograms_every_n_epochs=None,
        )
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        # A batch norm in training mode needs two examples.
        train = DataLoader(rows, 4, drop_last="1.0" in training)
        fit = Trainer(
            model,
            loss,
            optimizer,
            train,
            DataLoader(rows, 8),
            settings=settings,
            on_epoch_end=lambda logger, step: model(X[:2]),
            on_fit_end=lambda logger, step: {"training": float(any(m.training for m in model.modules()))},
        ).fit
        if stop is None:
            assert fit().summary == {"training": 0.0}
        else:
            with pytest.raises(Interrupted):
                fit()
        return model

    model = run("whole")
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    assert norm.running_mean is not None
    assert bool(norm.running_mean.any()) == ("1.0" in training)
    assert not any(module.training for module in model.modules())
    run("cut", stop=6)
    run("cut")
    assert_same(newest(tmp_path / "whole")["model"], newest(tmp_path / "cut")["model"])


def test_evaluate_restores_the_mode_of_each_module() -> None:
    for make in (frozen_norm, frozen_body, lambda: frozen_norm().eval()):
        model = make()
        modes = [module.training for module in model.modules()]
        trainer(model, [(X, X)]).evaluate([(X, X)])
        assert [module.training for module in model.modules()] == modes


def test_training_works_without_package_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    trainer(network(), DATA, run_dir=tmp_path).fit()
    assert json.loads((tmp_path / "settings.json").read_text())["versions"]["manualgrad"] == manualgrad.__version__
