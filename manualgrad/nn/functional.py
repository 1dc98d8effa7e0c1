"""Every public name of `torch.nn.functional`: manualgrad's functions, and torch's own code that calls them."""

from __future__ import annotations

import sys as _sys
from functools import partial as _partial
from types import FunctionType as _FunctionType
from typing import TYPE_CHECKING

from torch.nn import functional as _torch

from manualgrad import registry as _registry
from manualgrad.rebinding import shadow_module as _shadow_module

if TYPE_CHECKING:  # the signatures are torch's
    from torch.nn.functional import *  # noqa: F403

_registry.functional_namespace = globals()
_ops = _registry.ops()
_shadow_module(_torch, _sys.modules[__name__])
for _name, _op in _ops.items():
    if hasattr(_torch, f"{_name}_"):  # relu_, for example
        globals()[f"{_name}_"] = _partial(_op.function, inplace=True)
if not hasattr(_torch, "linear_cross_entropy"):  # torch has it since 2.13
    from manualgrad.ops.linear_cross_entropy import linear_cross_entropy  # noqa: F401
for _name, _op in _ops.items():
    _function = globals().get(_name)
    if isinstance(_function, _FunctionType) and _function is not vars(_torch).get(_name):
        _where = f"Gradient: manualgrad/ops/{_op.file}.py. To read it: python -m manualgrad show {_name}"
        _function.__doc__ = f"{_function.__doc__ or ''}\n\n{_where}"
