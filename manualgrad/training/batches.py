"""What the loop draws from a loader: checked (input, target) pairs, in groups; and whether it comes at all."""

import threading
import time
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any, TypeVar

from torch import Tensor

from .progress import warn

Batch = tuple[Tensor, Tensor]
Loader = Iterable[Any]
Item = TypeVar("Item")


def size(loader: Loader) -> int | None:
    """How many batches a loader gives, where it can tell."""
    try:
        return len(loader)  # pyright: ignore[reportArgumentType]
    except (TypeError, NotImplementedError):  # no __len__, or a DataLoader over a stream
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


def groups(batches: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """The batches by `size`; the last group may have fewer. Nothing is drawn ahead of time."""
    while group := list(islice(batches, size)):
        yield group


class Watch:
    """Speaks on stderr of a loader that gives nothing for long; it can only be waited for.

    Args:
        after: seconds.
    """

    def __init__(self, after: float) -> None:
        self.after = after
        self._since: float | None = None
        self._where = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="loader watch")

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def over(self, batches: Iterator[Item], where: str) -> Iterator[Item]:
        """The same batches, each waited for under watch; `where` is what to call their loader.

        What a loader raises is told where it was raised, and raised again as it is.
        """
        for number in count(1):
            self._where = f"{where}, batch {number}"
            self._since = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                error.add_note(f"raised by {self._where}")
                raise
            finally:
                self._since = None
            yield batch

    def _look(self) -> None:
        while not self._ended.wait(min(1.0, self.after)):
            since = self._since
            if since is not None and time.monotonic() - since > self.after:
                self._since = None  # once for each batch
                warn(f"nothing for {self.after:g} s from {self._where}: still waiting")


def _describe(item: object) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {', '.join(type(part).__name__ for part in item) or 'nothing'}"
    return f"a {type(item).__name__}"
