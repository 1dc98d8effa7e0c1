"""Training one model in several processes, started by torchrun. In a single process all of this does nothing.

Every process draws the same batches in the same order and works on its own shard of each, so the batch size of a
loader is that of all processes together. Gradients are averaged over the processes, so each process weights its
loss by its share of the examples: the update is the one that a single process would make from the whole batch.
Metrics are summed over the processes. Checkpoints hold full tensors, so any number of processes can load them.
"""

import atexit
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from .batches import Batch, Loader

Item = TypeVar("Item")


class Shard(NamedTuple):
    """The part of a batch that one process works on."""

    input: Tensor
    target: Tensor
    examples: int
    """0 where the batch has fewer examples than there are processes. All processes must run the model, so this one
    runs it on an example of another process, with weight 0."""

    def to(self, device: torch.device) -> "Shard":
        return Shard(self.input.to(device), self.target.to(device), self.examples)


class Distributed:
    """The processes of this training, and their communication.

    Attributes:
        rank: the number of this process. Process 0 prints and writes for all.
        world_size: the number of processes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
        if started and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # After a restart by torchrun the store still has the keys of the previous processes: use another
            # prefix.
            store, rank, world_size = next(rendezvous("env://"))
            store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
            atexit.register(_destroy_process_group)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    # The model

    def wrap_model(self, model: nn.Module, optimizer: Optimizer, strategy: str) -> nn.Module:
        """Give all processes the same weights, and distribute the model.

        Args:
            model: on its device.
            optimizer: of the model's parameters, before its first step.
            strategy: "ddp" (each process holds the whole model) or "fsdp" (each process holds a shard of every
                block in a ModuleList or Sequential, and of the rest).

        Returns:
            The module to call in training.
        """
        if self.world_size == 1 or isinstance(model, FSDPModule):
            return model
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        if strategy == "ddp":
            device_ids = [self.device.index or 0] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for module in _blocks(model):
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        parameters = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [parameters.get(names.get(id(p), ""), p) for p in group["params"]]
        return model

    def gradient_sync(self, network: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """The context of one backward: gradients are averaged over the processes if `enabled`."""
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(enabled)
        elif isinstance(network, DistributedDataParallel) and not enabled:
            return network.no_sync()
        return nullcontext()

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of process 0: the running statistics of each are those of its shards."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def reshard(self, model: nn.Module) -> None:
        """Free the full weights of the outermost module, which FSDP keeps after a forward without backward."""
        if isinstance(model, FSDPModule):
            model.reshard()

    # The data

    def shard_loader(self, loader: Loader) -> Loader:
        """Return a loader of this process's shards, which loads no other examples.

        This is possible where the indices of each batch are known. Other loaders are returned unchanged, and
        `shards` splits their batches.
        """
        if (
            self.world_size == 1
            or not isinstance(loader, DataLoader)
            or isinstance(loader.dataset, IterableDataset)
        ):
            return loader
        if type(loader.batch_sampler) is not BatchSampler or type(loader).__iter__ is not DataLoader.__iter__:
            return loader
        return _ShardLoader(
            loader.dataset,
            batch_sampler=ShardSampler(loader.batch_sampler, self),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            multiprocessing_context=loader.multiprocessing_context,
        )

    def shards(self, loader: Loader, batches: Iterator[Batch]) -> Iterator[Shard]:
        """Yield this process's shard of each batch."""
        counts = loader.batch_sampler.counts if isinstance(loader, _ShardLoader) else None
        for input, target in batches:
            yield self._shard(input, target) if counts is None else Shard(input, target, counts.popleft())

    def _shard(self, input: Tensor, target: Tensor) -> Shard:
        if self.world_size == 1:
            return Shard(input, target, len(target))
        start, stop = self.shard_bounds(len(target))
        if start == stop:
            return Shard(input[:1], target[:1], 0)
        return Shard(input[start:stop], target[start:stop], stop - start)

    def shard_bounds(self, examples: int) -> tuple[int, int]:
        """Return the start and the stop of this process's shard of a batch with so many examples."""
        return examples * self.rank // self.world_size, examples * (self.rank + 1) // self.world_size

    # Communication

    def all_reduce_sum(self, numbers: list[float]) -> list[float]:
        """Sum each number over the processes."""
        if self.world_size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def first_not_none(self, item: Item | None) -> Item | None:
        """Return the item of the first process where it is not None."""
        return next((item for item in self.all_gather(item) if item is not None), None)

    def all_gather(self, item: Any) -> list[Any]:
        """Return the items of all processes, by rank."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Any) -> Any:
        """Return the item of process 0."""
        if self.world_size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, 0)
        return items[0]

    def gather(self, state: Any) -> Any:
        """Return a state dict with full tensors. All processes must call this; only process 0 gets the values, the
        others get empty tensors."""

        def full(value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            tensor = full_tensor(value.detach())
            return tensor.cpu() if self.is_main_process else tensor.new_empty(0)

        gathered = tree_map(full, state)
        for name, part in state.items():
            if (
                versions := getattr(part, "_metadata", None)
            ) is not None:  # module versions, in a model's state_dict
                gathered[name]._metadata = versions
        return gathered


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, in every process. Other tensors are returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(saved: Tensor, like: Any) -> Tensor:
    """Distribute a full tensor like `like`, if that is a DTensor."""
    if not isinstance(like, DTensor) or saved.shape != like.shape:
        return saved
    return distribute_tensor(saved.to(like.device), like.device_mesh, like.placements)


def distribute_model_state(saved: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Distribute a saved state dict like the parameters of the model."""
    current, state = model.state_dict(), copy(saved)
    state.update({name: distribute_like(x, current[name]) for name, x in saved.items() if isinstance(x, Tensor)})
    return state


def distribute_optimizer_state(saved: Mapping[str, Any], optimizer: Optimizer) -> dict[Any, Any]:
    """Distribute a saved state dict like the parameters of the optimizer."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            name: distribute_like(x, parameters[number]) if isinstance(x, Tensor) else x
            for name, x in entry.items()
        }
        for number, entry in saved["state"].items()
    }
    return {**saved, "state": state}


class ShardSampler:
    """Gives the indices of one process's shard of each batch. (It is no subclass of torch's Sampler, which is made
    for a single process.)"""

    def __init__(self, batches: Any, distributed: Distributed) -> None:
        self.batches, self.distributed = batches, distributed
        self.sampler = batches.sampler
        self.counts: deque[int] = deque()
        """The examples of the shards that are drawn but not yet used."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Any]]:
        self.counts.clear()
        for batch in self.batches:
            start, stop = self.distributed.shard_bounds(len(batch))
            self.counts.append(stop - start)
            yield batch[start:stop] or batch[:1]


class _ShardLoader(DataLoader[Any]):
    """A DataLoader with a ShardSampler."""

    batch_sampler: ShardSampler  # pyright: ignore


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model, the innermost first."""
    blocks = [
        child
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for child in module
        if any(True for _ in child.children()) and any(True for _ in child.parameters())
    ]
    return list(dict.fromkeys(reversed(blocks)))


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
