"""What the trainer refuses, and in which words: mistakes that would otherwise train the wrong thing."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .batches import Loader, size
from .settings import TrainingSettings


def check_parts(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    loaders: Mapping[str, Loader | None],
    metrics: Mapping[str, Any],
    settings: TrainingSettings,
) -> None:
    """Refuse parts that do not belong together.

    Raises:
        ValueError: saying which, in one line.
    """
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient")
    if not trainable & held:
        raise ValueError("the optimizer holds no parameter of the model: make it from model.parameters()")
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS evaluates the loss several times per step, which this trainer does not do")
    if schedule is not None and schedule.optimizer is not optimizer:
        raise ValueError("the schedule is of another optimizer")
    if "loss" in metrics:
        raise ValueError("a metric cannot be called 'loss', as the loss is")

    for name, loader in loaders.items():
        if isinstance(loader, Iterator):
            raise ValueError(f"{name} is an iterator, good for one epoch only: use a list or a DataLoader")
        if loader is not None and size(loader) == 0:
            raise ValueError(f"{name} is empty")
        if settings.run_dir is not None and getattr(loader, "persistent_workers", False):
            raise ValueError(f"{name} has persistent_workers, whose random states no checkpoint can hold")
    if loaders["validation_loader"] is None:
        if settings.patience is not None:
            raise ValueError("patience needs a validation_loader")
        if isinstance(schedule, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau needs a validation_loader")


def check_shapes(prediction: Any, target: Tensor) -> None:
    """Refuse a float target whose shape only broadcasts to that of the prediction.

    Of (64, 1) and (64,) an elementwise loss makes 64×64 differences, and learns the mean of the targets.

    Raises:
        ValueError: showing both shapes.
    """
    if not isinstance(prediction, Tensor) or not target.is_floating_point():
        return
    if prediction.shape == target.shape:
        return
    try:
        torch.broadcast_shapes(prediction.shape, target.shape)
    except RuntimeError:
        return  # then the loss knows what to make of them, or says so
    shapes = f"the prediction has shape {tuple(prediction.shape)} and the target {tuple(target.shape)}"
    raise ValueError(f"{shapes}: the loss would broadcast them; give the target the shape of the prediction")


def check_loss(loss: Any, training: bool) -> None:
    """Refuse a loss that is not one number, or in training one that no parameter has a part in.

    Raises:
        ValueError: saying what it is instead.
    """
    if not isinstance(loss, Tensor):
        raise ValueError(f"the loss must be a scalar tensor, not a {type(loss).__name__}")
    if loss.ndim != 0:
        raise ValueError(f"the loss must be a scalar, the mean over the batch, not of shape {tuple(loss.shape)}")
    if training and not loss.requires_grad:
        raise ValueError("the loss depends on no parameter that requires a gradient")
