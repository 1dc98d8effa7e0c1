"""Every public name of `torch.nn`; modules call our functions.

import manualgrad.nn as nn      # instead of import torch.nn as nn
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch.nn as _torch

from manualgrad.rebinding import derived, is_module

if TYPE_CHECKING:  # ours have torch's signatures
    from torch.nn import *  # noqa: F403

for _name, _value in vars(_torch).items():
    if not _name.startswith("_"):
        globals()[_name] = derived(_value) if is_module(_value) else _value
if not hasattr(_torch, "LinearCrossEntropyLoss"):  # torch has it since 2.13
    from manualgrad.ops.linear_cross_entropy import LinearCrossEntropyLoss, LinearCrossEntropyOptions  # noqa: F401

functional = importlib.import_module("manualgrad.nn.functional")  # in place of torch's, taken over above
