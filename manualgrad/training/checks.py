"""Checks of arguments and batches, against mistakes that would otherwise train something else without an error."""

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

from .batches import Loader, num_batches
from .distributed import Shard
from .settings import TrainingSettings


def check_arguments(
    model: nn.Module,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler | None,
    loaders: Mapping[str, Loader | None],
    metrics: Mapping[str, Any],
    settings: TrainingSettings,
) -> None:
    """Check that the arguments of the trainer belong together.

    Raises:
        ValueError: says in one line what does not.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError("pass the model itself: the trainer wraps it in DistributedDataParallel")
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient")
    if not trainable & held:
        raise ValueError("the optimizer holds no parameter of the model: make it from model.parameters()")
    if isinstance(optimizer, LBFGS):
        raise ValueError("the trainer does not support LBFGS, which evaluates the loss several times per step")
    if lr_scheduler is not None and lr_scheduler.optimizer is not optimizer:
        raise ValueError("the lr_scheduler has another optimizer")
    if "loss" in metrics:
        raise ValueError("a metric cannot have the name 'loss'")

    for name, loader in loaders.items():
        if isinstance(loader, Iterator):
            raise ValueError(f"{name} is an iterator, which lasts for one epoch only: use a list or a DataLoader")
        if loader is not None and num_batches(loader) == 0:
            raise ValueError(f"{name} is empty")
        if settings.run_dir is not None and getattr(loader, "persistent_workers", False):
            raise ValueError(f"{name} has persistent_workers: a checkpoint cannot hold their random states")
    train_loader = loaders["train_loader"]
    if settings.run_dir is not None and not getattr(train_loader, "in_order", True):
        raise ValueError(
            "train_loader has in_order=False: a resumed run could not draw its batches in the same order"
        )
    if settings.on_nonfinite == "rollback" and settings.run_dir is None:
        raise ValueError("on_nonfinite='rollback' needs a run_dir, the folder of the checkpoints")
    if loaders["validation_loader"] is None:
        if settings.patience is not None:
            raise ValueError("patience needs a validation_loader")
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau needs a validation_loader")


def check_last_batch(model: nn.Module, loader: Loader, shard: Shard, world_size: int) -> None:
    """Check, before the first update, that the last batch of an epoch has enough examples for batch norm.

    Raises:
        ValueError: says what to change.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if (
        not isinstance(batches, BatchSampler)
        or batches.drop_last
        or not (examples := num_batches(batches.sampler))
    ):
        return
    last = examples % batches.batch_size or batches.batch_size
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if last // world_size > 1 or not norms or isinstance(model, FSDPModule):
        return
    try:  # on a copy, to keep the running statistics
        with torch.random.fork_rng(), torch.no_grad():
            deepcopy(model)(shard.input[:1].to(next(model.parameters()).device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        processes = f" for {world_size} processes" if world_size > 1 else ""
        raise ValueError(
            f"train_loader ends with {last} example{'s' * (last > 1)}{processes}, and batch norm needs two: "
            "set drop_last=True or another batch_size"
        ) from None


@contextmanager
def noting_shapes(model: nn.Module, shard: Shard, loader_name: str) -> Iterator[None]:
    """Add shapes, dtypes and devices of the batch as a note to an exception of the model."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first = next(iter(model.named_parameters()), None)
        weight = f"; the first parameter, {first[0]}, is {_describe(first[1])}" if first else ""
        batch = f"an input {_describe(shard.input)} and a target {_describe(shard.target)}"
        error.add_note(f"{loader_name} gave {batch}{weight}")
        raise


def _describe(tensor: Tensor) -> str:
    return f"of shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}, on {tensor.device}"


def check_shapes(prediction: Any, target: Tensor) -> None:
    """Refuse a float target that has another shape than the prediction but broadcasts with it.

    An elementwise loss of (64, 1) and (64,) has 64×64 differences, and the model would learn the mean of the
    targets.

    Raises:
        ValueError: shows both shapes.
    """
    if not isinstance(prediction, Tensor) or not target.is_floating_point():
        return
    if prediction.shape == target.shape:
        return
    try:
        torch.broadcast_shapes(prediction.shape, target.shape)
    except RuntimeError:
        return  # the loss handles them, or raises
    shapes = f"the prediction has shape {tuple(prediction.shape)} and the target {tuple(target.shape)}"
    raise ValueError(f"{shapes}: the loss would broadcast them; give the target the shape of the prediction")


def check_loss(loss: Any, training: bool) -> None:
    """Check that the loss is a scalar, and in training that it depends on a parameter.

    Raises:
        ValueError: says what it is instead.
    """
    if not isinstance(loss, Tensor):
        raise ValueError(f"the loss must be a scalar tensor, not a {type(loss).__name__}")
    if loss.ndim != 0:
        raise ValueError(f"the loss must be a scalar, the mean over the batch, not of shape {tuple(loss.shape)}")
    if training and not loss.requires_grad:
        raise ValueError("the loss depends on no parameter that requires a gradient")
