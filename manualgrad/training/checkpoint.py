"""Checkpoints: written whole or not at all, plain data and tensors, checked to the last bit before they are used.

A run keeps `step-0000001200.pt`, the newest few of them, and `best.pt`. Each is a file of torch.save, and the
comment at the end of that zip archive is the SHA-256 of all the bytes before it.
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
from torch.utils._pytree import tree_map_only

from .progress import warn

FORMAT = 3
BEST = "best.pt"
_MARK = b"sha256 "
_DIGITS = 64


class CheckpointError(RuntimeError):
    """A checkpoint that is broken, cannot be written, or is of something else than what it is loaded into."""


def all_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


class Checkpoints:
    """The checkpoints of one run, written beside the training: the state is copied, and a thread does the rest.

    Args:
        folder: of the run.
        keep: how many of the newest to keep.
        go_on: speak on stderr of what cannot be written, rather than raise.
    """

    def __init__(self, folder: Path, keep: int, go_on: bool) -> None:
        self.folder, self.keep, self.go_on = folder, keep, go_on
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        self._best: Any = None  # still to be written

    def save(self, step: int, payload: Mapping[str, Any], best: bool = False) -> None:
        """Write the state after `step` updates as the newest checkpoint, and if it is the best as that too.

        Raises:
            CheckpointError: unless `go_on`, if it, or the one before it, cannot be written.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, step, _copied(payload), best)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file beside the checkpoints, on the same terms."""
        self.wait()

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text, "utf-8")

        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Return when all that was saved is on the disk."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            message = (
                f"{error.filename or self.folder} could not be written ({error.strerror or error}); the "
                "checkpoints before are whole. Make room, or make the folder writable"
            )
            if not self.go_on:
                raise CheckpointError(f"{message}, and resume") from error
            warn(f"{message}: training goes on, and tries again with the next")

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(self, step: int, payload: Mapping[str, Any], best: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = self.folder / f"step-{step:010}.pt"
        if best:
            self._best = payload
        if self._best is not None:  # first, as the newest must not speak of a best that is not there
            save(self.folder / BEST, self._best)
            self._best = None
        if best:  # the same, and bytes are copied in a fifth of the time
            with _replacing(newest) as temporary:
                shutil.copyfile(self.folder / BEST, temporary)
                _to_the_disk(temporary)
        else:
            save(newest, payload)
        for old in all_in(self.folder)[self.keep :]:
            old.unlink()


def save(path: Path, payload: Mapping[str, Any]) -> None:
    """Write `payload` to `path` so that whatever happens, `path` holds the old checkpoint or the new one.

    Raises:
        OSError: where it cannot be written.
    """
    with _replacing(path) as temporary:
        with temporary.open("wb") as file:  # given a name, torch would not say why it could not write
            torch.save({"format": FORMAT, **payload}, file)
        _seal(temporary)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """The file that is to take the name of `path`: its bytes must have reached the disk by then.

    The folder is written last, so that the name survives a loss of power too.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # of no use, and in the way where the disk is full
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _to_the_disk(path.parent)


def _seal(path: Path) -> None:
    """Write the digest of the file at its end, and all of it to the disk."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = _MARK + b"0" * _DIGITS
    with path.open("r+b") as file:
        digest = _digest(file, path.stat().st_size - _DIGITS)
        file.seek(-_DIGITS, os.SEEK_END)
        file.write(digest)
    _to_the_disk(path)


def _to_the_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Any, size: int) -> bytes:
    """The SHA-256 of the first `size` bytes, in hexadecimal digits."""
    hashed = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(size, 2**20))):
        hashed.update(chunk)
        size -= len(chunk)
    return hashed.hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote, with its tensors on the CPU; nothing in it is executed.

    Raises:
        CheckpointError: where the file is missing, cut short, damaged, or not a checkpoint of this kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no checkpoint")
    try:
        _check_seal(path)
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is none of ours raises half a dozen kinds, all of them meaning this
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds something else than tensors and plain data, which was not looked at"
        raise CheckpointError(f"{path} is not a whole checkpoint ({reason})") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        found = payload.get("format") if isinstance(payload, dict) else None
        raise CheckpointError(f"{path} is not a checkpoint of this trainer (format {found!r}, not {FORMAT})")
    return payload


def _check_seal(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = _digest(file, size - _DIGITS)
        if file.read() != digest:
            file.seek(max(0, size - _DIGITS - len(_MARK)))
            sealed = file.read(len(_MARK)) == _MARK
            raise ValueError("its bytes have changed" if sealed else "cut short, or nothing that was saved here")


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run and what it holds; None where there is none at all.

    A newer one that is broken is spoken of on stderr, in one line.

    Raises:
        CheckpointError: where there are some, and none of them is whole.
    """
    broken: list[CheckpointError] = []
    for path in (*all_in(folder), *folder.glob(BEST)):
        try:
            payload = load(path)
        except CheckpointError as error:
            broken.append(error)
        else:
            for error in broken:
                warn(f"{error}: going on from {path.name}")
            return path, payload
    if broken:
        raise CheckpointError("; ".join(map(str, broken)))
    return None


def _copied(payload: Mapping[str, Any]) -> Any:
    """The same with copies of its tensors, in the memory of the CPU; tensors that are one stay one."""
    copies: dict[Any, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if not tensor.numel() or tensor.layout != torch.strided:
            return tensor.detach().clone().cpu()
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    return tree_map_only(Tensor, copy, dict(payload))


def check_same(path: Path, what: str, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Compare the entries of a checkpoint with those they are loaded into, before anything is loaded.

    Tensors are compared by shape and dtype, everything else by value.

    Raises:
        CheckpointError: naming the file and the first entry that differs.
    """

    def describe(entries: Mapping[str, Any], name: str) -> str:
        if name not in entries:
            return "absent"
        value = entries[name]
        if isinstance(value, Tensor):
            return f"{'×'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
        return repr(value)

    names = [*saved, *(name for name in present if name not in saved)]
    differing = [name for name in names if describe(saved, name) != describe(present, name)]
    if differing:
        name = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise CheckpointError(
            f"{path} is of a different {what}: {name} is {describe(saved, name)} in the checkpoint"
            f" and {describe(present, name)} here{more}"
        )
