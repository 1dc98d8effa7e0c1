"""Every random generator at once: seeded for an epoch, saved, put back."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# ruff: noqa: NPY002 (numpy's global generator is the one that transforms and datasets draw from)


def seed_all(*numbers: int) -> int:
    """Seed python, numpy and torch by these numbers together; the seed is returned."""
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    random.seed(state)
    np.random.seed(state % 2**32)
    torch.manual_seed(state)
    return state


def seed_epoch(loader: object, seed: int, epoch: int) -> None:
    """Make every random draw of an epoch a function of (seed, epoch), whatever happened before it.

    Seeds python, numpy and torch, from which a DataLoader draws its shuffling and the seeds of its workers,
    and the generators that the loader or its sampler brings along; tells a sampler that has `set_epoch`.
    """
    state = seed_all(seed, epoch)
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(state)
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(epoch)


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
