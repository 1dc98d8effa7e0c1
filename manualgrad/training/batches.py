"""Drawing batches: checked (input, target) pairs, in groups of one update, with a warning when a loader is
slow."""

import threading
import time
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any, TypeVar

from torch import Tensor

from .state import warn

Batch = tuple[Tensor, Tensor]
Loader = Iterable[Any]
Item = TypeVar("Item")


def num_batches(loader: Loader) -> int | None:
    """Return the number of batches, or None if the loader does not know it."""
    try:
        return len(loader)  # pyright: ignore[reportArgumentType]
    except (TypeError, NotImplementedError):  # no __len__, or a DataLoader over an IterableDataset
        return None


def checked(loader: Loader, name: str) -> Iterator[Batch]:
    """Yield the batches of a loader.

    Raises:
        ValueError: for an item that is not an (input, target) pair of tensors, and for a loader without batches.
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


def grouped(batches: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` batches; the last list may be shorter. Nothing is drawn ahead of time."""
    while group := list(islice(batches, size)):
        yield group


class LoaderWatchdog:
    """Warns on stderr when a loader gives no batch for a long time. It never stops the loader.

    Args:
        seconds: the time to wait before the warning.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._waiting_since: float | None = None
        self._batch = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True, name="loader watchdog")

    def __enter__(self) -> "LoaderWatchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def watch(self, batches: Iterator[Item], loader_name: str) -> Iterator[Item]:
        """Yield the same batches. An exception of the loader gets a note with the number of the batch."""
        for number in count(1):
            self._batch = f"{loader_name}, batch {number}"
            self._waiting_since = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                error.add_note(f"raised by {self._batch}")
                raise
            finally:
                self._waiting_since = None
            yield batch

    def _poll(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds)):
            since = self._waiting_since
            if since is not None and time.monotonic() - since > self.seconds:
                self._waiting_since = None  # warn once for each batch
                warn(f"no batch for {self.seconds:g} s from {self._batch}: still waiting")


def _describe(item: object) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {', '.join(type(part).__name__ for part in item) or 'nothing'}"
    return f"a {type(item).__name__}"
