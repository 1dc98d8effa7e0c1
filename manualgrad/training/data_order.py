"""Checking that a resumed run draws the same batches.

Each epoch has a fingerprint of the batches drawn so far, which a checkpoint holds. A resumed run draws them again
and compares. Where a DataLoader has indices, the fingerprint is a hash of the indices, so the data may be
augmented in any way. For a stream, and for any other iterable, it is a sum over some numbers of each batch,
weighted by its position.
"""

import marshal
from collections import deque
from collections.abc import Iterator
from copy import copy
from hashlib import blake2b
from itertools import islice
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .batches import Batch, Loader, checked
from .checkpoint import CheckpointError
from .distributed import ShardSampler
from .random_state import seed_epoch, with_separate_generators
from .state import OrderFingerprint, TrainerState, warn

_SAMPLED_NUMBERS = 1000
"""How many numbers of each tensor the fingerprint sums, evenly spaced."""
_TOLERANCE = 1e-4
"""Relative difference allowed between sums: another processor may round differently."""

_EPOCHS_MUST_REPEAT = (
    "Its order may depend on the seed and the epoch only: let it draw from the global generators of torch, numpy "
    "or python, hold its own generator as an attribute, or have a method set_epoch(epoch)"
)


class DataOrder:
    """Draws the batches of a loader, and computes the fingerprint of their order.

    What a stream or a custom sampler draws from the global generators depends neither on what the model draws
    between two batches, nor on how far the workers of the loader are ahead.

    Args:
        loader: the loader, before several processes split its batches.
        seed: the seed of the run.
        enabled: whether fingerprints are needed.

    Attributes:
        loader: the same loader, with a sampler that records its indices.
    """

    def __init__(self, loader: Loader, seed: int, enabled: bool = True) -> None:
        self.loader, self._sampler = _with_recording_sampler(loader)
        self.seed, self.enabled = seed, enabled
        if self._sampler is not None:
            self._sampler.enabled = enabled
        self._reset(0)

    def begin_epoch(self, epoch: int) -> Iterator[Batch]:
        """Seed everything for this epoch, and return its batches."""
        seed_epoch(self.loader, self.seed, epoch)
        self._reset(epoch)
        return self._record(checked(self.loader, "train_loader"))

    def fingerprint(self) -> OrderFingerprint:
        """Return the fingerprint of the batches drawn in this epoch."""
        return OrderFingerprint(self._digest, self._first, self._sums, self._sizes)

    def check_previous_epoch(self, state: TrainerState, is_main_process: bool) -> None:
        """Begin the previous epoch again, to check that epochs repeat. For a run resumed between two epochs.

        Raises:
            CheckpointError: if its indices differ. For a stream, where noise may change the first batch too, it is
                a warning instead.
        """
        if state.updates_drawn or state.previous_order == OrderFingerprint():
            return
        epoch = state.epoch - 1
        batches = self.begin_epoch(epoch)
        if self._sampler is None:
            for _ in islice(batches, 1):
                pass
        else:
            self._draw_all_indices()
        if _same_start(state.previous_order, self.fingerprint()):
            return
        message = (
            f"train_loader gives other batches than before for epoch {epoch + 1}, which was begun again to check"
        )
        if self._sampler is not None:
            raise CheckpointError(f"{message}: the next epochs would differ too. {_EPOCHS_MUST_REPEAT}")
        if is_main_process:
            warn(
                f"{message}: the next epochs may differ from those of an uninterrupted run. {_EPOCHS_MUST_REPEAT}"
            )

    def skip_drawn(self, updates: Iterator[Any], state: TrainerState, run: object) -> None:
        """Draw the batches of the current epoch again that were drawn before the run was interrupted.

        Raises:
            CheckpointError: if they differ.
        """
        where = f"epoch {state.epoch + 1}, before update {state.updates_drawn + 1}"
        message = f"{run} cannot be resumed ({where}): train_loader gives other batches than before"
        for _ in range(state.updates_drawn):
            if next(updates, None) is None:
                raise CheckpointError(f"{message}, and fewer of them")
        if state.order != OrderFingerprint() and not _same(state.order, self.fingerprint()):
            raise CheckpointError(f"{message}. {_EPOCHS_MUST_REPEAT}")

    def _reset(self, epoch: int) -> None:
        self._epoch = epoch
        if self._sampler is not None:
            self._sampler.seed_epoch = self.seed, epoch
        self._digest, self._batches, self._first = "", 0, []
        self._sums, self._sizes = [0.0] * 4, [0.0] * 4

    def _record(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        if self._sampler is None and not isinstance(self.loader, (list, tuple)):
            batches = with_separate_generators(batches, self.seed, self._epoch)
        for batch in batches:
            if self.enabled:
                self._add(batch)
            yield batch

    def _draw_all_indices(self) -> None:
        """Iterate over the indices of an epoch, without loading data."""
        without_data = copy(self.loader)
        vars(without_data).update(
            dataset=_IndexDataset(), collate_fn=list, num_workers=0, timeout=0, pin_memory=False
        )
        for _ in without_data:
            self._add_indices()

    def _add(self, batch: Batch) -> None:
        if self._sampler is not None and self._add_indices():
            return
        numbers = [number for tensor in batch for number in (float(tensor.numel()), _sum(tensor))]
        self._first = self._first or numbers
        weight = 1 + self._batches * 0.6180339887 % 1  # a different one for each position
        self._sums = [total + weight * number for total, number in zip(self._sums, numbers, strict=True)]
        self._sizes = [total + weight * abs(number) for total, number in zip(self._sizes, numbers, strict=True)]
        self._batches += 1

    def _add_indices(self) -> bool:
        assert self._sampler is not None
        if (indices := self._sampler.recorded.popleft() if self._sampler.recorded else None) is not None:
            self._digest = blake2b(self._digest.encode() + indices, digest_size=16).hexdigest()
        return indices is not None


def _same(a: OrderFingerprint, b: OrderFingerprint) -> bool:
    """Whether these are the same batches in the same order."""
    sums = zip(a.sums, b.sums, a.sizes, strict=True)
    return a.digest == b.digest and all(abs(x - y) <= _TOLERANCE * size + 1e-12 for x, y, size in sums)


def _same_start(a: OrderFingerprint, b: OrderFingerprint) -> bool:
    """Whether these epochs had the same indices, or streams with the same first batch."""
    numbers = zip(a.first, b.first, strict=False)
    return a.digest == b.digest and all(abs(x - y) <= _TOLERANCE * abs(x) + 1e-12 for x, y in numbers)


def _sum(tensor: Tensor) -> float:
    """Return the sum of some of the numbers of a tensor."""
    if tensor.layout != torch.strided or not tensor.numel() or tensor.is_quantized:
        return 0.0
    if not tensor.is_contiguous():  # in the order of its memory, so that reshape copies nothing
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    flat = tensor.detach().reshape(-1)
    flat = flat[:: -(-len(flat) // _SAMPLED_NUMBERS)]
    real = torch.view_as_real(flat.resolve_conj()) if flat.is_complex() else flat
    total = real.sum(dtype=torch.float64).item()
    return total if isfinite(total) else 0.0


def _with_recording_sampler(loader: Loader) -> tuple[Loader, "_RecordingSampler | None"]:
    """Return the loader with a sampler that records its indices, if the loader has indices."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return loader, None
    if isinstance(loader.dataset, IterableDataset):
        return loader, None
    if isinstance(shards := loader.batch_sampler, ShardSampler):
        shards.batches = recording = _RecordingSampler(shards.batches)
        return loader, recording
    loader, name = copy(loader), "sampler" if loader.batch_sampler is None else "batch_sampler"
    recording = _RecordingSampler(getattr(loader, name))
    vars(loader)[name] = recording  # DataLoader.__setattr__ refuses it
    return loader, recording


class _RecordingSampler:
    """Wraps a sampler or batch sampler, and records what it yields as bytes."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.enabled = True
        self.recorded: deque[bytes | None] = deque()
        self.seed_epoch: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self.recorded.clear()
        indices = iter(self.sampler)
        if not _draws_before_first_index(self.sampler):
            indices = with_separate_generators(indices, *self.seed_epoch)
        for item in indices:
            if self.enabled:
                self.recorded.append(_to_bytes(item))
            yield item


class _IndexDataset(Dataset[Any]):
    """Returns the index itself."""

    def __getitem__(self, index: Any) -> Any:
        return index


def _draws_before_first_index(sampler: Any) -> bool:
    """Whether this is a torch sampler that draws all its random numbers before it yields the first index."""
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return type(sampler) in (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def _to_bytes(indices: Any) -> bytes | None:
    """Convert numbers, text, and lists of them to bytes that are the same in every process."""
    try:
        return marshal.dumps(indices, 0)
    except ValueError:
        pass
    try:
        items = indices if isinstance(indices, (list, tuple)) else [indices]
        return marshal.dumps([x.tolist() if isinstance(x, Tensor) else x for x in items], 0)
    except ValueError:
        return None
