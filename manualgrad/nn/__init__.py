"""Every public name of `torch.nn`. The modules call manualgrad's functions.

import manualgrad.nn as nn      # instead of import torch.nn as nn
"""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING

import torch.nn as _torch

from manualgrad import rebinding as _rebinding

if TYPE_CHECKING:  # the signatures are torch's
    from torch.nn import *  # noqa: F403

functional = _importlib.import_module("manualgrad.nn.functional")
for _name, _value in vars(_torch).items():
    if not _name.startswith("_"):
        globals()[_name] = _rebinding.rebind(_value)
modules = _rebinding.rebind(_torch.modules)
if not hasattr(_torch, "LinearCrossEntropyLoss"):  # torch has it since 2.13
    from manualgrad.ops.linear_cross_entropy import LinearCrossEntropyLoss, LinearCrossEntropyOptions  # noqa: F401
_rebinding.check()
