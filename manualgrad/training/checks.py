"""What the trainer refuses, and in which words: mistakes that would otherwise train the wrong thing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from .batches import Loader, size
from .processes import Part
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
    if isinstance(model, DistributedDataParallel):
        raise ValueError("give the model itself: the trainer puts DistributedDataParallel around it")
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
    train_loader = loaders["train_loader"]
    if settings.run_dir is not None and not getattr(train_loader, "in_order", True):
        raise ValueError("train_loader has in_order=False: no resumed run can draw its batches in the same order")
    if settings.on_nonfinite == "back_up" and settings.run_dir is None:
        raise ValueError("on_nonfinite='back_up' needs run_dir, where the checkpoints are")
    if loaders["validation_loader"] is None:
        if settings.patience is not None:
            raise ValueError("patience needs a validation_loader")
        if isinstance(schedule, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau needs a validation_loader")


def check_last_batch(model: nn.Module, loader: Loader, part: Part, processes: int) -> None:
    """Refuse a last batch that leaves one example for a batch norm, before the first one is trained on.

    Raises:
        ValueError: saying what to do.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if not isinstance(batches, BatchSampler) or batches.drop_last or not (examples := size(batches.sampler)):
        return
    last = examples % batches.batch_size or batches.batch_size
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if last // processes > 1 or not norms or isinstance(model, FSDPModule):
        return
    try:  # on a copy, as running statistics would count it
        with torch.random.fork_rng(), torch.no_grad():
            deepcopy(model)(part.input[:1].to(next(model.parameters()).device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        each = f" for {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"train_loader ends with {last} example{'s' * (last > 1)}{each}, and batch norm needs two: "
            "give the loader drop_last=True or another batch_size"
        ) from None


@contextmanager
def explained(model: nn.Module, part: Part, name: str) -> Iterator[None]:
    """Whatever the model raises is told what it was given, and raised as it is."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first = next(iter(model.named_parameters()), None)
        weight = f"; the first parameter, {first[0]}, is {_told(first[1])}" if first else ""
        error.add_note(f"{name} gave an input {_told(part.input)} and a target {_told(part.target)}{weight}")
        raise


def _told(tensor: Tensor) -> str:
    return f"of shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}, on {tensor.device}"


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
