"""Checkpoint files: written completely or not at all, plain data and tensors, verified before they are used.

A run keeps the newest few `step-0000001200.pt`, and `best.pt`. Each is a file of torch.save. The comment at the
end of that zip archive is the SHA-256 of all bytes before it.
"""

import hashlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .serialization import CheckpointError, load_plain, restore_numpy, to_serializable
from .state import warn

FORMAT = 4
BEST_CHECKPOINT = "best.pt"
_MARK = b"sha256 "
_DIGITS = 64


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the step checkpoints of a run, the newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


class CheckpointWriter:
    """Writes the checkpoints of one run in a background thread. `save` copies the state and returns.

    Args:
        folder: the run folder.
        keep: how many of the newest checkpoints to keep.
        ignore_disk_errors: warn on stderr when a file cannot be written, instead of raising.
    """

    def __init__(self, folder: Path, keep: int, ignore_disk_errors: bool) -> None:
        self.folder, self.keep, self.ignore_disk_errors = folder, keep, ignore_disk_errors
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None
        self._unwritten_best: Any = None

    def save(self, step: int, payload: Mapping[str, Any], best: bool = False) -> None:
        """Write the newest checkpoint, after `step` optimizer steps. If it is the best one, write `best.pt` too.

        Raises:
            CheckpointError: if the payload holds what `load` cannot read, before anything is written; and if this
                or the previous checkpoint cannot be written, unless `ignore_disk_errors`.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, step, to_serializable(payload), best)

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file into the run folder, under the same conditions."""
        self.wait()

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text, "utf-8")

        self._pending = self._thread.submit(write)

    def wait(self) -> None:
        """Wait until everything is on the disk."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            message = (
                f"{error.filename or self.folder} could not be written ({error.strerror or error}); the "
                "previous checkpoints are intact. Make room, or make the folder writable"
            )
            if not self.ignore_disk_errors:
                raise CheckpointError(f"{message}, and resume") from error
            warn(f"{message}: training continues, and tries again at the next checkpoint")

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(self, step: int, payload: Mapping[str, Any], best: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = self.folder / f"step-{step:010}.pt"
        if best:
            self._unwritten_best = payload
        if self._unwritten_best is not None:  # first: the newest checkpoint must not refer to a missing best one
            write(self.folder / BEST_CHECKPOINT, self._unwritten_best)
            self._unwritten_best = None
        if best:  # copying the file takes a fifth of the time of writing it again
            with _atomic_write(newest) as temporary:
                shutil.copyfile(self.folder / BEST_CHECKPOINT, temporary)
                _fsync(temporary)
        else:
            write(newest, payload)
        for old in list_checkpoints(self.folder)[self.keep :]:
            old.unlink()


def save(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a checkpoint. At any moment `path` holds the old checkpoint or the new one, complete.

    Raises:
        OSError: if it cannot be written.
        CheckpointError: if the payload holds what `load` cannot read.
    """
    write(path, to_serializable(payload, copy=False))


def write(path: Path, payload: Mapping[str, Any]) -> None:
    """Write the result of `to_serializable` like `save`."""
    with _atomic_write(path) as temporary:
        with temporary.open("wb") as file:  # given a path, torch hides the reason of an error
            torch.save({"format": FORMAT, **payload}, file)
        _append_checksum(temporary)


@contextmanager
def _atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary file, and rename it to `path` at the end. The caller must fsync it.

    The folder is synced last, so that the new name survives a power failure too.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # after an error: it would use space on a full disk
    if os.name == "posix":  # other systems cannot open a folder
        _fsync(path.parent)


def _append_checksum(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = _MARK + b"0" * _DIGITS
    with path.open("r+b") as file:
        digest = _sha256(file, path.stat().st_size - _DIGITS)
        file.seek(-_DIGITS, os.SEEK_END)
        file.write(digest)
    _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(file: Any, size: int) -> bytes:
    """Return the SHA-256 of the first `size` bytes, in hexadecimal digits."""
    hashed = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(size, 2**20))):
        hashed.update(chunk)
        size -= len(chunk)
    return hashed.hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote. Its tensors are on the CPU, and nothing in it is executed.

    Raises:
        CheckpointError: if the file is missing, truncated, damaged, or no checkpoint of this trainer.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no checkpoint")
    try:
        _verify_checksum(path)
        payload = load_plain(path)
    except Exception as error:  # a foreign file raises errors of many types
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors and plain data, and was not executed"
        raise CheckpointError(f"{path} is not an intact checkpoint ({reason})") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        found = payload.get("format") if isinstance(payload, dict) else None
        raise CheckpointError(f"{path} is not a checkpoint of this trainer (format {found!r}, not {FORMAT})")
    return restore_numpy(payload)


def _verify_checksum(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = _sha256(file, size - _DIGITS)
        if file.read() != digest:
            file.seek(max(0, size - _DIGITS - len(_MARK)))
            has_checksum = file.read(len(_MARK)) == _MARK
            raise ValueError(
                "its bytes have changed" if has_checksum else "truncated, or written by another program"
            )


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest intact checkpoint of a run. Returns None if the run has no checkpoints.

    Each newer checkpoint that is damaged gets one warning line on stderr.

    Raises:
        CheckpointError: if there are checkpoints and all of them are damaged.
    """
    damaged: list[CheckpointError] = []
    for path in (*list_checkpoints(folder), *folder.glob(BEST_CHECKPOINT)):
        try:
            payload = load(path)
        except CheckpointError as error:
            damaged.append(error)
        else:
            for error in damaged:
                warn(f"{error}: resuming from {path.name}")
            return path, payload
    if damaged:
        raise CheckpointError("; ".join(map(str, damaged)))
    return None


def check_compatible(path: Path, what: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare the entries of a checkpoint with those they are loaded into, before anything is loaded.

    Tensors are compared by shape and dtype, everything else by value.

    Raises:
        CheckpointError: names the file and the first entry that differs.
    """

    def describe(entries: Mapping[str, Any], name: str) -> str:
        if name not in entries:
            return "absent"
        value = entries[name]
        if isinstance(value, Tensor):
            return f"{'×'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
        return repr(value)

    names = [*saved, *(name for name in current if name not in saved)]
    differing = [name for name in names if describe(saved, name) != describe(current, name)]
    if differing:
        name = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise CheckpointError(
            f"{path} is of a different {what}: {name} is {describe(saved, name)} in the checkpoint"
            f" and {describe(current, name)} here{more}"
        )
