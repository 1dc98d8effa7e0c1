"""What the loop draws from a loader: checked (input, target) pairs, in groups."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor

Batch = tuple[Tensor, Tensor]
Loader = Iterable[Any]


def size(loader: Loader) -> int | None:
    """How many batches a loader gives, where it can tell."""
    try:
        return len(loader)  # pyright: ignore[reportArgumentType]
    except TypeError:  # no __len__, or a DataLoader over a stream
        return None


def pairs(loader: Loader, name: str) -> Iterator[Batch]:
    """The batches of a loader.

    Raises:
        ValueError: where an item is not an (input, target) pair of tensors, or there is none at all.
    """
    empty = True
    for item in loader:
        empty = False
        match item:
            case (Tensor() as input, Tensor() as target):
                if target.ndim == 0 or len(target) == 0:
                    raise ValueError(f"{name} gave a target of shape {tuple(target.shape)}, with no examples")
                yield input, target
            case _:
                raise ValueError(f"{name} must give (input, target) pairs of tensors, not {_describe(item)}")
    if empty:
        raise ValueError(f"{name} gave no batches")


def groups(loader: Loader, name: str, size: int) -> Iterator[list[Batch]]:
    """The batches of a loader by `size`; the last group may have fewer. Nothing is drawn ahead of time."""
    batches = pairs(loader, name)
    while group := list(islice(batches, size)):
        yield group


def _describe(item: object) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {', '.join(type(part).__name__ for part in item) or 'nothing'}"
    return f"a {type(item).__name__}"
