"""Which batches an epoch has drawn, in short: a resumed run compares them with those that it draws once more."""

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

from .batches import Batch, Loader, pairs
from .processes import PartSampler
from .progress import Drawn
from .randomness import apart

_NUMBERS = 1000
"""So many of each tensor are added up, evenly taken."""
_TOLERANCE = 1e-4
"""By how much they may differ: another processor may round otherwise."""


class Order:
    """The batches that are drawn from a loader, before several processes divide them.

    Where a DataLoader has indices, these count, so that the data itself may be augmented in any way. Of a stream,
    and of any other loader, some numbers of each batch count, in sums that depend on the order of the batches.

    What a stream, or a sampler of one's own, draws from the global generators does not depend on what the model
    draws from them in between, nor on how far the workers of the loader are ahead.

    Args:
        loader: what to draw from.
        counts: whether anybody will ask what was drawn.

    Attributes:
        loader: the same loader, whose sampler now notes what it gives.
    """

    def __init__(self, loader: Loader, counts: bool = True) -> None:
        self.loader, self._indices = _noting(loader)
        self.counts = counts
        if self._indices is not None:
            self._indices.notes = counts
        self.begin(0, 0)

    @property
    def by_indices(self) -> bool:
        """It is indices that count."""
        return self._indices is not None

    def begin(self, seed: int, epoch: int) -> None:
        """Nothing of this epoch is drawn yet."""
        self._seed_epoch = (seed, epoch)
        if self._indices is not None:
            self._indices.seed_epoch = self._seed_epoch
        self._digest, self._batches, self._first = "", 0, []
        self._sums, self._sizes = [0.0] * 4, [0.0] * 4

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, of which each counts when it is drawn."""
        if self._indices is None and not isinstance(self.loader, (list, tuple)):
            batches = apart(batches, *self._seed_epoch)
        for batch in batches:
            if self.counts:
                self._count(batch)
            yield batch

    def drawn(self) -> Drawn:
        """What was drawn since the beginning."""
        return Drawn(self._digest, self._first, self._sums, self._sizes)

    def again(self) -> Drawn:
        """What an epoch gives that is begun only to see it: all of its indices, or the first batch of a stream."""
        if self._indices is None:
            for _ in islice(self.over(pairs(self.loader, "train_loader")), 1):
                pass
        else:
            without_data = copy(self.loader)
            vars(without_data).update(
                dataset=_Itself(), collate_fn=list, num_workers=0, timeout=0, pin_memory=False
            )
            for _ in without_data:
                self._count_indices()
        return self.drawn()

    def _count(self, batch: Batch) -> None:
        if self._indices is not None and self._count_indices():
            return
        numbers = [number for tensor in batch for number in (float(tensor.numel()), _sum(tensor))]
        self._first = self._first or numbers
        weight = 1 + self._batches * 0.6180339887 % 1  # another for each batch
        self._sums = [total + weight * number for total, number in zip(self._sums, numbers, strict=True)]
        self._sizes = [total + weight * abs(number) for total, number in zip(self._sizes, numbers, strict=True)]
        self._batches += 1

    def _count_indices(self) -> bool:
        assert self._indices is not None
        if (indices := self._indices.given.popleft() if self._indices.given else None) is not None:
            self._digest = blake2b(self._digest.encode() + indices, digest_size=16).hexdigest()
        return indices is not None


def same(one: Drawn, other: Drawn) -> bool:
    """Whether these are the same batches in the same order."""
    pairs = zip(one.sums, other.sums, one.sizes, strict=True)
    return one.digest == other.digest and all(abs(a - b) <= _TOLERANCE * size + 1e-12 for a, b, size in pairs)


def begin_alike(one: Drawn, other: Drawn) -> bool:
    """Whether these epochs had the same indices, or streams that began with the same batch."""
    pairs = zip(one.first, other.first, strict=False)
    return one.digest == other.digest and all(abs(a - b) <= _TOLERANCE * abs(a) + 1e-12 for a, b in pairs)


def _sum(tensor: Tensor) -> float:
    """Of some of its numbers."""
    if tensor.layout != torch.strided or not tensor.numel() or tensor.is_quantized:
        return 0.0
    if not tensor.is_contiguous():  # in the order of its memory, nothing need be copied
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    flat = tensor.detach().reshape(-1)
    flat = flat[:: -(-len(flat) // _NUMBERS)]
    found = (
        (torch.view_as_real(flat.resolve_conj()) if flat.is_complex() else flat).sum(dtype=torch.float64).item()
    )
    return found if isfinite(found) else 0.0


def _noting(loader: Loader) -> tuple[Loader, "_Noting | None"]:
    """The loader with a sampler that notes what it gives, where one gives it indices."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return loader, None
    if isinstance(loader.dataset, IterableDataset):
        return loader, None
    if isinstance(parts := loader.batch_sampler, PartSampler):
        parts.batches = noting = _Noting(parts.batches)
        return loader, noting
    loader, name = copy(loader), "sampler" if loader.batch_sampler is None else "batch_sampler"
    noting = _Noting(getattr(loader, name))
    vars(loader)[name] = noting  # DataLoader itself lets nobody set it
    return loader, noting


class _Noting:
    """A sampler, or a sampler of batches, that notes what it gives."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.notes = True
        self.given: deque[bytes | None] = deque()
        self.seed_epoch: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self.given.clear()
        indices = iter(self.sampler)
        for item in indices if _draws_at_once(self.sampler) else apart(indices, *self.seed_epoch):
            if self.notes:
                self.given.append(_as_bytes(item))
            yield item


class _Itself(Dataset[Any]):
    """Gives the index that it is asked for."""

    def __getitem__(self, index: Any) -> Any:
        return index


def _draws_at_once(sampler: Any) -> bool:
    """One of torch's samplers, which draws all that it needs of the global generators before its first index."""
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return type(sampler) in (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def _as_bytes(indices: Any) -> bytes | None:
    """Numbers and text, and lists of them, as the same bytes in every process."""
    try:
        return marshal.dumps(indices, 0)
    except ValueError:
        pass
    try:
        tensors = indices if isinstance(indices, (list, tuple)) else [indices]
        return marshal.dumps([x.tolist() if isinstance(x, Tensor) else x for x in tensors], 0)
    except ValueError:
        return None
