"""Channels-last memory formats, by the number of axes."""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The channels-last format of a tensor with this number of axes."""


def is_channels_last(tensor: Tensor) -> bool:
    """The tensor is a batch of images or volumes, and its channels are innermost in memory."""
    memory_format = CHANNELS_LAST.get(tensor.dim())
    if memory_format is None or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=memory_format)
