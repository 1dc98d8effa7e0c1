"""PyTorch layers and losses with gradients that are derived and written by hand.

    import manualgrad.nn as nn          # instead of: import torch.nn as nn
    manualgrad.convert(model)           # convert an existing model in place; `revert` undoes it
    with manualgrad.override_torch_functions(): ...  # torch's functions are manualgrad's inside
    print(manualgrad.show(nn.GELU))     # the derivation, the gradient, and the generated program
    print(manualgrad.saved_bytes(model, x))  # what the forward saves for the backward, by layer
    print(manualgrad.export(model, (x,)).code)  # forward and backward of the whole model, as one Python program

Each layer and loss is a `torch.autograd.Function`. `manualgrad.ops` has its derivation and its gradient in one
place. `Rule` makes such a Function from pure functions, `registry.ops` lists all operations, and `verify` tests
the laws that they obey on any autograd.Function.
"""

import manualgrad.torch_internals  # isort: skip  (first: it checks the version of torch)
import manualgrad.ops  # noqa: F401  # isort: skip  (nn uses the operations that it registers)
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from manualgrad import nn, registry
from manualgrad.adapters import register_adapter
from manualgrad.conversion import conversion_report, convert, revert
from manualgrad.fallback import FallbackError, record_fallbacks
from manualgrad.meter import saved_bytes
from manualgrad.override import override_torch_functions
from manualgrad.rule import Rule
from manualgrad.show import show
from manualgrad.verification import verify

if _TYPE_CHECKING:
    from manualgrad.program import export

__version__ = "0.2.0"

__all__ = [
    "FallbackError",
    "Rule",
    "conversion_report",
    "convert",
    "export",
    "nn",
    "override_torch_functions",
    "record_fallbacks",
    "register_adapter",
    "registry",
    "revert",
    "saved_bytes",
    "show",
    "verify",
]


def __getattr__(name: str) -> _Any:
    if name == "export":  # torch.export takes a while to import
        from manualgrad.program import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
