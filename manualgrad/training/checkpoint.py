"""Checkpoints: written whole or not at all, plain data and tensors, checked to the last bit before they are used.

A run keeps `step-0000001200.pt`, the newest few of them, and `best.pt`. Each is a file of torch.save, and the
comment at the end of that zip archive is the SHA-256 of all the bytes before it.
"""

import hashlib
import os
import pickle
import shutil
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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
            CheckpointError: for something in it that `load` could not read, before anything is written; and unless
                `go_on`, if it, or the one before it, cannot be written.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, step, plain(payload), best)

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
            write_unchecked(self.folder / BEST, self._best)
            self._best = None
        if best:  # the same, and bytes are copied in a fifth of the time
            with _replacing(newest) as temporary:
                shutil.copyfile(self.folder / BEST, temporary)
                _to_the_disk(temporary)
        else:
            write_unchecked(newest, payload)
        for old in all_in(self.folder)[self.keep :]:
            old.unlink()


def save(path: Path, payload: Mapping[str, Any]) -> None:
    """Write `payload` to `path` so that whatever happens, `path` holds the old checkpoint or the new one.

    Raises:
        OSError: where it cannot be written.
        CheckpointError: for what `load` could not read (see `plain`).
    """
    write_unchecked(path, plain(payload, copy=False))


def write_unchecked(path: Path, payload: Mapping[str, Any]) -> None:
    """The same of what `plain` has made: it is not looked at again."""
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

    What `plain` made of numpy's arrays and numbers is numpy's again.

    Raises:
        CheckpointError: where the file is missing, cut short, damaged, or not a checkpoint of this kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no checkpoint")
    try:
        _check_seal(path)
        payload = _load(path)
    except Exception as error:  # a file that is none of ours raises half a dozen kinds, all of them meaning this
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds something else than tensors and plain data, which was not looked at"
        raise CheckpointError(f"{path} is not a whole checkpoint ({reason})") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        found = payload.get("format") if isinstance(payload, dict) else None
        raise CheckpointError(f"{path} is not a checkpoint of this trainer (format {found!r}, not {FORMAT})")
    return _with_numpys(payload)


def _load(file: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch tells that it checks sparse tensors: such a file is whole all the same
        return torch.load(file, map_location="cpu", weights_only=True)


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


_ARRAY, _SCALAR = "numpy.ndarray", "numpy.generic"
"""The one key of a dictionary that stands in a file for what numpy's was, with its numbers as a tensor."""


def plain(payload: Mapping[str, Any], copy: bool = True) -> dict[str, Any]:
    """The same as `save` writes it and `load` reads it: copies of its tensors in the memory of the CPU, and data.

    Tensors that are one stay one. Numbers and arrays of numpy's come back from `load` as they were, as their
    arithmetic is not python's; in the file they are tensors. (As a key or in a set, where only the value counts,
    such a number becomes python's.) All else must be of a kind that ``torch.load(weights_only=True)`` reads.

    Args:
        payload: of anything.
        copy: or only look whether it can be saved, where tensors may still be in the parts of several processes.

    Raises:
        CheckpointError: naming the first entry that cannot be saved, and its type.
    """
    copies: dict[Any, Tensor] = {}

    def of(value: Any, path: str, around: tuple[int, ...]) -> Any:
        kind = type(value)
        if value is None or kind in (bool, float, str) or (kind is int and value.bit_length() < 1024):
            return value
        if isinstance(value, Tensor):
            return of_tensor(value, path)
        if isinstance(value, np.generic) or kind is np.ndarray:
            return _of_numpy(value, path)
        if kind not in (dict, OrderedDict, Counter, list, tuple, set):
            return _read_back(value, path)
        if id(value) in around:
            raise CheckpointError(f"{path} contains itself, which a checkpoint cannot hold")
        around = (*around, id(value))
        if isinstance(value, dict):
            made = kind({of_key(key, path): of(x, _entry(path, key), around) for key, x in value.items()})
            if kind is OrderedDict and vars(value):  # the versions of the modules, in a model's state
                vars(made).update(of(vars(value), path, around))
            return made
        if kind is set:
            return {of_key(item, path) for item in value}
        return kind(of(item, f"{path}[{place}]", around) for place, item in enumerate(value))

    def of_key(key: Any, path: str) -> Any:
        """Where only what has a hash may be: a number of numpy's has that of python's."""
        if type(key) is tuple:
            return tuple(of_key(part, path) for part in key)
        return of(key.item() if isinstance(key, np.generic) else key, f"{path}, the key {key!r}", ())

    def of_tensor(tensor: Tensor, path: str) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter) and not (isinstance(tensor, DTensor) and not copy):
            return _read_back(tensor.detach().cpu(), path)
        if not copy:
            return tensor
        if not tensor.numel() or tensor.layout != torch.strided or not tensor.data_ptr():
            return tensor.detach().clone().cpu()
        flags = (tensor.is_conj(), tensor.is_neg(), tensor.device)
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, *flags)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    return {name: of(value, name, ()) for name, value in payload.items()}


def _entry(path: str, key: Any) -> str:
    return f"{path}.{key}" if isinstance(key, str) and key.isidentifier() else f"{path}[{key!r}]"


def _of_numpy(value: Any, path: str) -> Any:
    scalar = not isinstance(value, np.ndarray)
    if scalar and value.dtype.kind in "US":  # text
        return value.item()
    try:
        tensor = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    except TypeError:
        raise _refused(f"{path} is a {type(value).__name__} of numpy's of dtype {value.dtype}") from None
    return {_SCALAR if scalar else _ARRAY: tensor}


def _with_numpys(value: Any) -> Any:
    """The inverse, in the very dictionaries and lists."""
    if isinstance(value, dict):
        if len(value) == 1 and (key := next(iter(value))) in (_ARRAY, _SCALAR):
            array = value[key].numpy()
            return array if key == _ARRAY else array[()]
        for key, entry in value.items():
            value[key] = _with_numpys(entry)
        if isinstance(value, OrderedDict):
            _with_numpys(vars(value))
    elif type(value) is list:
        value[:] = map(_with_numpys, value)
    elif type(value) is tuple:
        return tuple(map(_with_numpys, value))
    return value


def _read_back(value: Any, path: str) -> Any:
    """Something rare as `load` would give it."""
    file = BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        return _load(file)
    except Exception as error:  # whatever its methods for pickle raise
        kind = type(value)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        raise _refused(f"{path} is a {name}") from error


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}, which no checkpoint can hold: only tensors, arrays of numbers and plain data are read again. "
        "Leave it out of the state_dict() that gives it, or put plain data in its place"
    )


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
