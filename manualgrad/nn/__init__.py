"""Every public name of `torch.nn`: ours where a rule exists, torch's own otherwise.

import manualgrad.nn as nn      # instead of import torch.nn as nn
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch.nn as _torch

from manualgrad import registry

if TYPE_CHECKING:  # ours have torch's signatures
    from torch.nn import *  # noqa: F403

globals().update({name: value for name, value in vars(_torch).items() if not name.startswith("_")})
globals().update({name: module for name, module in registry.modules().items() if hasattr(_torch, name)})

functional = importlib.import_module("manualgrad.nn.functional")  # in place of torch's, taken over above
