"""Every public name of `torch.nn.functional`: ours, or torch's own calling ours."""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch.nn import functional as _torch

from manualgrad import registry
from manualgrad.rebinding import replaced

if TYPE_CHECKING:  # ours have torch's signatures
    from torch.nn.functional import *  # noqa: F403

for _name, _value in vars(_torch).items():
    if not _name.startswith("_"):
        globals()[_name] = replaced(_value)
for _op in registry.ops().values():
    if hasattr(_torch, f"{_op.name}_"):  # relu_ and its kin
        globals()[f"{_op.name}_"] = partial(_op.function, inplace=True)
if not hasattr(_torch, "linear_cross_entropy"):  # torch has it since 2.13
    from manualgrad.ops.linear_cross_entropy import linear_cross_entropy  # noqa: F401
for _op in registry.ops().values():
    _function = globals().get(_op.name)
    if isinstance(_function, FunctionType) and _function is not vars(_torch).get(_op.name):
        _where = f"Gradient: manualgrad/ops/{_op.area}.py. To read it: python -m manualgrad show {_op.name}"
        _function.__doc__ = f"{_function.__doc__ or ''}\n\n{_where}"


def __getattr__(name: str) -> Any:
    """What torch's modules call besides: private functions of torch.nn.functional."""
    return replaced(getattr(_torch, name))
