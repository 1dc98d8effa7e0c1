"""Checkpoints: written whole or not at all, plain data and tensors, checked before they are used."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
LAST, BEST = "last.pt", "best.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, broken, or of something else than what it is loaded into."""


def save(path: Path, payload: Mapping[str, Any]) -> None:
    """Write `payload` to `path` so that whatever happens, `path` holds the old checkpoint or the new one.

    The bytes go to a file beside it and reach the disk before that file takes the name; the folder is
    written last, so that the name survives a loss of power too.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **payload}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote, with its tensors on the CPU; nothing in it is executed.

    Raises:
        CheckpointError: where the file is missing, cut short, damaged, or not a checkpoint of this kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no checkpoint to resume from")
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, but does not read them
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises half a dozen kinds, all of them meaning this
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path} is not a whole checkpoint ({reason}){_other(path)}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this trainer (format {FORMAT})")
    return payload


def _other(path: Path) -> str:
    """What to do about a broken last checkpoint: the best one may be older, but it holds as much."""
    best = path.with_name(BEST)
    if path.name == BEST or not best.is_file():
        return ""
    try:
        step = load(best)["progress"]["step"]
    except CheckpointError:
        return ""
    return f"; {best} is whole and holds step {step}: copy it over {path.name} to go on from there"


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
