"""Several processes that train one model, started by torchrun; alone, all of this does nothing.

Every process draws the same batches in the same order and works on its own part of each, so that the batch size
of a loader is that of them all. A gradient is the mean over the processes, so each weighs its loss by the share
of the examples that it has: the update is the one that a single process would make of the whole batch. What is
told, and what is saved, is of the whole: sums over the processes, and tensors put together, which any number of
processes can take up again.
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

Found = TypeVar("Found")


class Part(NamedTuple):
    """What one process works on of a batch."""

    input: Tensor
    target: Tensor
    examples: int
    """0 where the batch had too few for all processes: this one then takes an example of another, and counts it as
    nothing, as all must run the model alike."""

    def to(self, device: torch.device) -> "Part":
        return Part(self.input.to(device), self.target.to(device), self.examples)


class Processes:
    """The processes of this training.

    Attributes:
        rank: which of them this is; 0 speaks and writes for all.
        size: how many there are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
        if started and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # Names of its own for each restart by torchrun: those of the processes before are still in the store.
            store, rank, size = next(rendezvous("env://"))
            store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            atexit.register(_leave)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1

    @property
    def first(self) -> bool:
        """This is the process that speaks and writes for all."""
        return self.rank == 0

    # The model

    def share(self, model: nn.Module, optimizer: Optimizer, parallel: str) -> nn.Module:
        """Begin with the same weights everywhere.

        Args:
            model: on its device.
            optimizer: of its parameters, before its first update.
            parallel: "ddp" (each process holds all) or "fsdp" (each holds a part: of every block in a
                ModuleList or Sequential, and of the rest).

        Returns:
            What to call in training.
        """
        if self.size == 1 or isinstance(model, FSDPModule):
            return model
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        if parallel == "ddp":
            cuda = [self.device.index or 0] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=cuda, gradient_as_bucket_view=True)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        mesh = init_device_mesh(self.device.type, (self.size,))
        for module in _blocks(model):
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        parameters = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [parameters.get(names.get(id(p), ""), p) for p in group["params"]]
        return model

    def without_sending(self, network: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """The backward of one of several batches of an update: gradients are averaged with the last."""
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        elif isinstance(network, DistributedDataParallel) and not last:
            return network.no_sync()
        return nullcontext()

    def agree_on_buffers(self, model: nn.Module) -> None:
        """Running statistics, which each process gathers from its own part, as the first has them."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def part_again(self, model: nn.Module) -> None:
        """After an evaluation FSDP still has the outermost weights whole, for a backward that does not come."""
        if isinstance(model, FSDPModule):
            model.reshard()

    # The data

    def loader(self, loader: Loader) -> Loader:
        """The loader of this process's part, where it is known which examples a batch will have: nothing is loaded
        that another works on. (Of any other loader each process takes its part of the batches.)"""
        if self.size == 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return loader
        if type(loader.batch_sampler) is not BatchSampler or type(loader).__iter__ is not DataLoader.__iter__:
            return loader
        return _PartLoader(
            loader.dataset,
            batch_sampler=PartSampler(loader.batch_sampler, self),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            multiprocessing_context=loader.multiprocessing_context,
        )

    def parts(self, loader: Loader, batches: Iterator[Batch]) -> Iterator[Part]:
        """This process's part of each batch."""
        counts = loader.batch_sampler.counts if isinstance(loader, _PartLoader) else None
        for input, target in batches:
            yield self._part(input, target) if counts is None else Part(input, target, counts.popleft())

    def _part(self, input: Tensor, target: Tensor) -> Part:
        if self.size == 1:
            return Part(input, target, len(target))
        start, stop = self.range(len(target))
        if start == stop:
            return Part(input[:1], target[:1], 0)
        return Part(input[start:stop], target[start:stop], stop - start)

    def range(self, examples: int) -> tuple[int, int]:
        """Which of so many examples are this process's: from, up to."""
        return examples * self.rank // self.size, examples * (self.rank + 1) // self.size

    # What they tell each other

    def sum(self, numbers: list[float]) -> list[float]:
        """Over the processes."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def first_found(self, found: Found | None) -> Found | None:
        """What the first process that has found something found."""
        return next((item for item in self.gathered(found) if item is not None), None)

    def gathered(self, item: Any) -> list[Any]:
        """Everyone's, in the order of the processes."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def told(self, item: Any) -> Any:
        """What the first process says."""
        if self.size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, 0)
        return items[0]

    # Tensors in parts

    def put_together(self, state: Any) -> Any:
        """A state whose tensors are whole. All processes call this; the first is given them, the others empty
        ones."""

        def put(value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            full = whole(value.detach())
            return full.cpu() if self.first else full.new_empty(0)

        found = tree_map(put, state)
        for name, part in state.items():
            if (versions := getattr(part, "_metadata", None)) is not None:  # of the modules, in a model's state
                found[name]._metadata = versions
        return found


def as_parted(saved: Tensor, like: Any) -> Tensor:
    """A whole tensor as one of the same parts as `like`, if that is in parts."""
    if not isinstance(like, DTensor) or saved.shape != like.shape:
        return saved
    return distribute_tensor(saved.to(like.device), like.device_mesh, like.placements)


def parted_model(saved: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A saved state of a model, in the parts of this one."""
    present, found = model.state_dict(), copy(saved)
    found.update({name: as_parted(x, present[name]) for name, x in saved.items() if isinstance(x, Tensor)})
    return found


def parted_optimizer(saved: Mapping[str, Any], optimizer: Optimizer) -> dict[Any, Any]:
    """A saved state of an optimizer, in the parts of its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            name: as_parted(x, parameters[number]) if isinstance(x, Tensor) else x for name, x in slot.items()
        }
        for number, slot in saved["state"].items()
    }
    return {**saved, "state": state}


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class PartSampler:
    """Of each batch the indices of one process. (Not a Sampler of torch's: its base class is for one only.)"""

    def __init__(self, batches: Any, processes: Processes) -> None:
        self.batches, self.processes = batches, processes
        self.sampler = batches.sampler
        self.counts: deque[int] = deque()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Any]]:
        self.counts.clear()
        for batch in self.batches:
            start, stop = self.processes.range(len(batch))
            self.counts.append(stop - start)
            yield batch[start:stop] or batch[:1]


class _PartLoader(DataLoader[Any]):
    """A loader of parts."""

    batch_sampler: PartSampler  # pyright: ignore


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, the innermost first."""
    found = [
        child
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for child in module
        if any(True for _ in child.children()) and any(True for _ in child.parameters())
    ]
    return list(dict.fromkeys(reversed(found)))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
