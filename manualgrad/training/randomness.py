"""Every random generator at once: seeded for an epoch, saved, put back."""

import random
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

# ruff: noqa: NPY002 (numpy's global generator is the one that transforms and datasets draw from)


Item = TypeVar("Item")
_LONG = 1000
"""A container with more entries holds data, and no samplers or generators."""


def seed_all(*numbers: int) -> int:
    """Seed python, numpy and torch by these numbers together; the seed is returned."""
    state = _seed(*numbers)
    random.seed(state)
    np.random.seed(state % 2**32)
    torch.manual_seed(state)
    return state


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seed_epoch(loader: object, seed: int, epoch: int) -> None:
    """Make every random draw of an epoch a function of (seed, epoch), whatever happened before it.

    Seeds python, numpy and torch, from which a DataLoader draws its shuffling and the seeds of its workers,
    and the generators that the loader brings along; calls `set_epoch` on all of its parts that have it.
    """
    seed_all(seed, epoch)
    seed_generators(loader, seed, epoch)
    for part in _parts(loader):
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(epoch)


def seed_generators(loader: object, seed: int, epoch: int) -> None:
    """Seed the generators of torch, numpy and python that a loader, its samplers or its dataset hold."""
    state = _seed(seed, epoch)
    for part in _parts(loader):
        match part:
            case torch.Generator():
                part.manual_seed(state)
            case random.Random():
                part.seed(state)
            case np.random.RandomState():
                part.seed(state % 2**32)
            case np.random.Generator():
                part.bit_generator.state = type(part.bit_generator)(state).state
            case np.random.BitGenerator():
                part.state = type(part)(state).state


def _parts(loader: object) -> list[Any]:
    """The loader and all that it holds, however deep: samplers, samplers in samplers, datasets, generators."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [loader]
    while waiting:
        part = waiting.pop()
        if id(part) in found or isinstance(part, (type, ModuleType, FunctionType, Tensor, np.ndarray, str, bytes)):
            continue
        found[id(part)] = part
        match part:
            case list() | tuple() | set() | dict() if len(part) > _LONG:
                continue
            case list() | tuple() | set():
                waiting += part
            case dict():
                waiting += part.values()
            case MethodType():
                waiting.append(part.__self__)
            case partial():
                waiting += [part.func, *part.args, *part.keywords.values()]
        waiting += getattr(part, "__dict__", {}).values()
        for kind in type(part).__mro__:
            slots = vars(kind).get("__slots__", ())
            waiting += [getattr(part, slot, None) for slot in ([slots] if isinstance(slots, str) else slots)]
    return list(found.values())


def apart(batches: Iterator[Item], seed: int, epoch: int) -> Iterator[Item]:
    """The same, where all that is drawn after the first comes from states of the generators that are theirs alone.

    What the model draws in between has no part in the data then: the batches of an epoch can be drawn once more
    without it, and in each of several processes, of which every one has another dropout.
    """
    for first in batches:
        yield first
        break
    state = _seed(seed, epoch, 2**32 - 1)
    torchs = torch.Generator().manual_seed(state)
    own = random.Random(state).getstate(), np.random.MT19937(state), torchs.get_state()
    while True:
        outside = _exchanged(own)
        try:
            item = next(batches)
        except StopIteration:
            return
        finally:
            own = _exchanged(outside)
        yield item


def _exchanged(states: tuple[Any, Any, Tensor]) -> tuple[Any, Any, Tensor]:
    """Put these states in place, and return those that were there. (numpy's as its generator of bits: its state
    takes a hundred times as long.)"""
    before = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()  # pyright: ignore
    random.setstate(states[0])
    np.random.set_bit_generator(states[1])  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_rng_state(states[2])
    return before


def torch_states() -> dict[str, Any]:
    """The states of torch's generators, on the CPU and on every CUDA device: what layers draw from."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_torch_states(states: Mapping[str, Any]) -> None:
    """Put torch's generators back where `torch_states` found them."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_initialized() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def random_states() -> tuple[Any, ...]:
    """The states of the generators of python, numpy and torch, quickly taken."""
    return random.getstate(), np.random.get_state(legacy=True), torch_states()


def as_plain(states: tuple[Any, ...]) -> dict[str, Any]:
    """Those as plain data and tensors, for a file."""
    (version, words, gauss), (name, keys, *rest), torchs = states
    return {"python": [version, list(words), gauss], "numpy": [name, np.asarray(keys).tolist(), *rest], **torchs}


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put every generator back where `as_plain` says it was."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(states["numpy"]))
    set_torch_states(states)
