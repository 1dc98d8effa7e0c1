"""The random number generators of python, numpy and torch: seed them for an epoch, save them, restore them."""

import random
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

# ruff: noqa: NPY002 (transforms and datasets draw from numpy's global generator)


Item = TypeVar("Item")
_MAX_CONTAINER = 1000
"""A longer container holds data. It is not searched for samplers and generators."""


def seed_all(*numbers: int) -> int:
    """Seed python, numpy and torch with a seed made from these numbers, and return that seed."""
    seed = _combine(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return seed


def _combine(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seed_epoch(loader: object, seed: int, epoch: int) -> None:
    """Make every random draw of an epoch a function of (seed, epoch).

    Seeds python, numpy and torch, from which a DataLoader draws its shuffling and the seeds of its workers. Seeds
    the generators that the loader holds. Calls `set_epoch` on every part of the loader that has it.
    """
    seed_all(seed, epoch)
    seed_generators(loader, seed, epoch)
    for part in _walk(loader):
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(epoch)


def seed_generators(loader: object, seed: int, epoch: int) -> None:
    """Seed the generators of torch, numpy and python that a loader, its samplers or its dataset hold."""
    combined = _combine(seed, epoch)
    for part in _walk(loader):
        match part:
            case torch.Generator():
                part.manual_seed(combined)
            case random.Random():
                part.seed(combined)
            case np.random.RandomState():
                part.seed(combined % 2**32)
            case np.random.Generator():
                part.bit_generator.state = type(part.bit_generator)(combined).state
            case np.random.BitGenerator():
                part.state = type(part)(combined).state


def _walk(loader: object) -> list[Any]:
    """Return the loader and every object it refers to, at any depth: samplers, datasets, generators."""
    found: dict[int, Any] = {}
    pending: list[Any] = [loader]
    while pending:
        part = pending.pop()
        if id(part) in found or isinstance(part, (type, ModuleType, FunctionType, Tensor, np.ndarray, str, bytes)):
            continue
        found[id(part)] = part
        match part:
            case list() | tuple() | set() | dict() if len(part) > _MAX_CONTAINER:
                continue
            case list() | tuple() | set():
                pending += part
            case dict():
                pending += part.values()
            case MethodType():
                pending.append(part.__self__)
            case partial():
                pending += [part.func, *part.args, *part.keywords.values()]
        pending += getattr(part, "__dict__", {}).values()
        for kind in type(part).__mro__:
            slots = vars(kind).get("__slots__", ())
            pending += [getattr(part, slot, None) for slot in ([slots] if isinstance(slots, str) else slots)]
    return list(found.values())


def with_separate_generators(batches: Iterator[Item], seed: int, epoch: int) -> Iterator[Item]:
    """Yield the same batches. After the first one, each is drawn with generator states used for nothing else.

    The data then do not depend on what the model draws between two batches. So a resumed run can draw the batches
    of an epoch again without the model, and all processes draw the same batches although their dropout differs.
    """
    for first in batches:
        yield first
        break
    combined = _combine(seed, epoch, 2**32 - 1)
    torch_state = torch.Generator().manual_seed(combined).get_state()
    separate = random.Random(combined).getstate(), np.random.MT19937(combined), torch_state
    while True:
        outer = _swap(separate)
        try:
            item = next(batches)
        except StopIteration:
            return
        finally:
            separate = _swap(outer)
        yield item


def _swap(states: tuple[Any, Any, Tensor]) -> tuple[Any, Any, Tensor]:
    """Install these states and return the previous ones. numpy's is its bit generator: swapping that object is a
    hundred times as fast as reading its state."""
    previous = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()  # pyright: ignore
    random.setstate(states[0])
    np.random.set_bit_generator(states[1])  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_rng_state(states[2])
    return previous


def get_torch_states() -> dict[str, Any]:
    """Return the states of torch's generators on the CPU and on every CUDA device: layers draw from these."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_torch_states(states: Mapping[str, Any]) -> None:
    """Restore what `get_torch_states` returned."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_initialized() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def get_random_states() -> tuple[Any, ...]:
    """Return the states of python's, numpy's and torch's global generators, in their fast native form."""
    return random.getstate(), np.random.get_state(legacy=True), get_torch_states()


def to_plain(states: tuple[Any, ...]) -> dict[str, Any]:
    """Convert the result of `get_random_states` to plain data and tensors, for a file."""
    (version, words, gauss), (name, keys, *rest), torch_states = states
    numpy_state = [name, np.asarray(keys).tolist(), *rest]
    return {"python": [version, list(words), gauss], "numpy": numpy_state, **torch_states}


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore every generator from the result of `to_plain`."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(states["numpy"]))
    set_torch_states(states)
