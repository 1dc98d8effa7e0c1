"""Small data, models, trainers and comparisons for the tests of manualgrad.training."""

import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fault_job import differences, read_scalars
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

import manualgrad.nn
from manualgrad.training import Trainer, TrainingSettings
from manualgrad.training.checkpoint import list_checkpoints, load

Pairs = list[tuple[Tensor, Tensor]]


def regression(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return rows of four columns, and a target that a small network can learn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator, dtype=dtype)
    return x, (x[:, :1] * x[:, 1:2]).sin() + x[:, 2:3]


def batches(sizes: list[int], dtype: torch.dtype = torch.float32) -> Pairs:
    """Return the rows of `regression`, split into batches of these sizes."""
    x, y = regression(sum(sizes), dtype=dtype)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


DATA = batches([8])


def network(layers: Any = nn, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    hidden = layers.Linear(4, 16), layers.ReLU(), layers.Dropout(dropout)
    return nn.Sequential(*hidden, layers.Linear(16, 1)).to(dtype)


class BatchNormNetwork(nn.Module):
    """Has running statistics, which a batch with a NaN would spoil."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(self.norm(input))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def trainer(model: nn.Module, loader: Any, validation: Any = None, **options: Any) -> Trainer:
    """Return a trainer for one epoch with MSELoss and SGD. Options are arguments of Trainer or
    TrainingSettings."""
    names = ("loss", "optimizer", "lr_scheduler", "metrics", "on_fit_end")
    arguments = {name: options.pop(name) for name in names if name in options}
    loss = arguments.pop("loss", nn.MSELoss())
    optimizer = arguments.pop("optimizer", None) or sgd(model)
    settings = TrainingSettings(device="cpu", progress_bar=False, **{"max_epochs": 1, **options})
    return Trainer(model, loss, optimizer, loader, validation, settings=settings, **arguments)


def run_in(folder: Path, model: nn.Module | None = None, **options: Any) -> Trainer:
    """Return a trainer for two epochs that writes to a run folder."""
    data = options.pop("data", batches([8, 8]))
    return trainer(model or network(), data, batches([8]), run_dir=folder, max_epochs=2, **options)


class NoisyRows(Dataset[tuple[Tensor, Tensor]]):
    """Adds noise at every access, drawn from python, numpy and torch like an augmentation."""

    def __init__(self, rows: int) -> None:
        self.x, self.y = regression(rows)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import numpy as np

        noise = torch.randn(4) + random.random() + np.random.rand()  # noqa: NPY002
        return self.x[index] + 0.1 * noise, self.y[index]


class Interruption(Exception):
    """A test raises this in the middle of an epoch."""


def interrupt() -> None:
    raise Interruption


def send_signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def loss_with_action(
    loss: Any, call: int | None, action: Callable[[], None], training: bool = True
) -> Callable[..., Tensor]:
    """Return the loss. It runs the action before the call of this number, counted in training or in validation."""
    calls = itertools.count(1)

    def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.requires_grad == training and next(calls) == call:
            action()
        return loss(prediction, target)

    return mean_squared_error


def train(
    folder: Path,
    *,
    resume: bool = False,
    at_call: int | None = None,
    action: Callable[[], None] = interrupt,
    training: bool = True,
    workers: int = 0,
    layers: Any = manualgrad.nn,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> None:
    """Train with everything that a resume has to restore: dropout, shuffling, noise, accumulation, a scheduler.

    The action runs before the call of the loss with number `at_call`.
    """
    torch.set_num_threads(1)
    model = change(network(layers, dropout=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    trainer(
        model,
        DataLoader(NoisyRows(50), batch_size=8, shuffle=True, num_workers=workers),
        DataLoader(TensorDataset(*regression(20, seed=1)), batch_size=16),
        loss=loss_with_action(manualgrad.nn.MSELoss(), at_call, action, training),
        optimizer=optimizer,
        lr_scheduler=OneCycleLR(optimizer, 0.01, total_steps=16),
        metrics={"absolute_error": lambda p, t: (p - t).abs().mean()},
        max_epochs=4,
        accumulate_grad_batches=2,
        max_grad_norm=1.0,
        run_dir=folder,
        resume_from_checkpoint=resume,
        checkpoint_every_n_steps=1,
        log_every_n_steps=1,
        histograms_every_n_epochs=1,
    ).fit()


def newest(folder: Path) -> dict[str, Any]:
    """Return the content of the newest checkpoint of a run."""
    return load(list_checkpoints(folder)[0])


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return every curve of a run as (step, value) points, without the speeds."""
    return {tag: points for tag, points in read_scalars(folder).items() if not tag.startswith("speed/")}


def assert_same(a: Any, b: Any) -> None:
    """Nested containers, tensors and numbers are equal to the last bit."""
    assert differences(a, b) == []


def assert_same_run(a: Path, b: Path) -> None:
    """Checkpoints (weights, optimizer, scheduler, random states) and curves are equal to the last bit."""
    assert_same(newest(a), newest(b))
    assert_same(load(a / "best.pt"), load(b / "best.pt"))
    assert curves(a) == curves(b)
