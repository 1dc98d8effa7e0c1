"""What is kept between forward and backward, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def kept_bytes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes that autograd keeps for the backward of ``function(*args, **kwargs)``: storages, each once."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = function(*args, **kwargs)
    del output  # until here it holds every storage counted, so that none is counted under another's address
    return sum(kept.values())
