"""Converting a state dict to what a checkpoint can hold: tensors, plain data, and the numbers and arrays of numpy.

`torch.load(weights_only=True)` reads tensors and plain data only. Numbers and arrays of numpy are stored as
tensors in marked dictionaries, and converted back on loading, because their arithmetic differs from python's.
"""

import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, cannot be written, or does not fit what it is loaded into."""


_ARRAY, _SCALAR = "numpy.ndarray", "numpy.generic"
"""The only key of a dictionary that stores an array or a number of numpy as a tensor."""


def to_serializable(payload: Mapping[str, Any], copy: bool = True) -> dict[str, Any]:
    """Convert a payload to the form that is written to a file.

    A number of numpy that is a dictionary key or in a set becomes a number of python.

    Args:
        copy: copy tensors to the CPU, one that occurs twice only once. False keeps the tensors, which may be
            DTensors.

    Raises:
        CheckpointError: names the first entry that cannot be saved, and its type.
    """
    converter = _Converter(copy)
    return {name: converter.convert(value, name, ()) for name, value in payload.items()}


class _Converter:
    """Converts nested containers. Every method gets the path of its value for the error message."""

    def __init__(self, copy: bool) -> None:
        self.copy = copy
        self.copies: dict[Any, Tensor] = {}

    def convert(self, value: Any, path: str, parents: tuple[int, ...]) -> Any:
        kind = type(value)
        if value is None or kind in (bool, float, str) or (kind is int and value.bit_length() < 1024):
            return value
        if isinstance(value, Tensor):
            return self.convert_tensor(value, path)
        if isinstance(value, np.generic) or kind is np.ndarray:
            return _from_numpy(value, path)
        if kind not in (dict, OrderedDict, Counter, list, tuple, set):
            return _round_trip(value, path)
        if id(value) in parents:
            raise CheckpointError(f"{path} contains itself, which a checkpoint cannot hold")
        parents = (*parents, id(value))
        if isinstance(value, dict):
            items = value.items()
            found = kind(
                {self.convert_key(key, path): self.convert(x, _entry(path, key), parents) for key, x in items}
            )
            if kind is OrderedDict and vars(value):  # the versions of the modules, in a model's state_dict
                vars(found).update(self.convert(vars(value), path, parents))
            return found
        if kind is set:
            return {self.convert_key(item, path) for item in value}
        return kind(self.convert(item, f"{path}[{index}]", parents) for index, item in enumerate(value))

    def convert_key(self, key: Any, path: str) -> Any:
        """Convert a dictionary key or a set item. A number of numpy has the same hash as that of python."""
        if type(key) is tuple:
            return tuple(self.convert_key(part, path) for part in key)
        return self.convert(key.item() if isinstance(key, np.generic) else key, f"{path}, the key {key!r}", ())

    def convert_tensor(self, tensor: Tensor, path: str) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter) and not (isinstance(tensor, DTensor) and not self.copy):
            return _round_trip(tensor.detach().cpu(), path)
        if not self.copy:
            return tensor
        if not tensor.numel() or tensor.layout != torch.strided or not tensor.data_ptr():
            return tensor.detach().clone().cpu()
        flags = (tensor.is_conj(), tensor.is_neg(), tensor.device)
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, *flags)
        if key not in self.copies:
            self.copies[key] = tensor.detach().to("cpu", copy=True)
        return self.copies[key]


def _entry(path: str, key: Any) -> str:
    return f"{path}.{key}" if isinstance(key, str) and key.isidentifier() else f"{path}[{key!r}]"


def _from_numpy(value: Any, path: str) -> Any:
    scalar = not isinstance(value, np.ndarray)
    if scalar and value.dtype.kind in "US":  # text
        return value.item()
    try:
        tensor = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    except TypeError:
        raise _refusal(f"{path} is a numpy {type(value).__name__} of dtype {value.dtype}") from None
    return {_SCALAR if scalar else _ARRAY: tensor}


def restore_numpy(value: Any) -> Any:
    """Convert the marked dictionaries back to numbers and arrays of numpy, in place."""
    if isinstance(value, dict):
        if len(value) == 1 and (key := next(iter(value))) in (_ARRAY, _SCALAR):
            array = value[key].numpy()
            return array if key == _ARRAY else array[()]
        for key, entry in value.items():
            value[key] = restore_numpy(entry)
        if isinstance(value, OrderedDict):
            restore_numpy(vars(value))
    elif type(value) is list:
        value[:] = map(restore_numpy, value)
    elif type(value) is tuple:
        return tuple(map(restore_numpy, value))
    return value


def load_plain(file: Any) -> Any:
    """Load tensors and plain data to the CPU. Nothing in the file is executed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it validates sparse tensors
        return torch.load(file, map_location="cpu", weights_only=True)


def _round_trip(value: Any, path: str) -> Any:
    """Return a value of a rare type as `load_plain` would return it."""
    file = BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        return load_plain(file)
    except Exception as error:  # its pickle methods may raise anything
        kind = type(value)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        raise _refusal(f"{path} is a {name}") from error


def _refusal(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}, which a checkpoint cannot hold: it holds tensors, arrays of numbers and plain data only. "
        "Leave it out of the state_dict() that returns it, or replace it by plain data"
    )
