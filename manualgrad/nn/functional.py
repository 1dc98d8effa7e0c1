"""Every public name of `torch.nn.functional`: ours where a rule exists, torch's own otherwise."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch.nn import functional as _torch

from manualgrad import registry

if TYPE_CHECKING:  # ours have torch's signatures
    from torch.nn.functional import *  # noqa: F403

globals().update({name: value for name, value in vars(_torch).items() if not name.startswith("_")})
for _op in registry.ops().values():
    globals()[_op.name] = _op.function
    if hasattr(_torch, f"{_op.name}_"):  # relu_ and its kin
        globals()[f"{_op.name}_"] = partial(_op.function, inplace=True)
