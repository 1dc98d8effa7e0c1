"""Backpropagation written by hand, inside PyTorch, good enough to train on.

    import manualgrad.nn as nn      # instead of import torch.nn as nn
    manualgrad.convert(model)       # or a model that exists, in place; `revert` gives it back
    with manualgrad.override_torch_functions(): ...  # or torch's own functions, called in here
    print(manualgrad.show(nn.GELU)) # the derivation, the gradient as written, and the program made of it

Each layer and loss is a `torch.autograd.Function` whose gradient is written by hand, its derivation beside it
(`manualgrad.ops`). `Rule` makes one from pure functions; `registry.ops` lists them all; `verify` tries the laws
that they hold on anyone's; `saved_bytes` counts what any model keeps for its backward, layer by layer.
"""

import manualgrad.torch_internals  # isort: skip  (first: it checks what the others need)
import manualgrad.ops  # noqa: F401  # isort: skip  (nn uses the operations that it registers)
from manualgrad import nn, registry
from manualgrad.adapters import register_adapter
from manualgrad.conversion import conversion_report, convert, revert
from manualgrad.fallback import FallbackError, record_fallbacks
from manualgrad.meter import saved_bytes
from manualgrad.override import override_torch_functions
from manualgrad.rule import Rule
from manualgrad.show import show
from manualgrad.verification import verify

__version__ = "0.2.0"

__all__ = [
    "FallbackError",
    "Rule",
    "conversion_report",
    "convert",
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
