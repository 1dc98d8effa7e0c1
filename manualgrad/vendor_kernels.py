"""The setting that enables vendor kernels.

A vendor kernel is a compiled kernel that computes the same gradient as a formula. For some gradients, the formula
makes a training step measurably slower than the kernel does. The rule of such a gradient names the kernel next to
the formula (`Rule.vendor_kernels`). The kernel runs in a plain eager backward. A backward that is differentiated,
transformed or compiled uses the formula. Both give the same result up to rounding; `tests/test_vendor_kernels.py`
checks that.

To compute every gradient by its formula, disable vendor kernels for all threads:

    manualgrad.vendor_kernels.enabled = False              for the rest of the process
    with manualgrad.vendor_kernels.flags(enabled=False):   inside the block
    MANUALGRAD_VENDOR_KERNELS=0                            in the environment, from the start
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

enabled: bool = os.environ.get("MANUALGRAD_VENDOR_KERNELS", "1") != "0"
"""One value for all threads, because autograd runs a backward on CUDA in another thread than the forward."""


@contextmanager
def flags(*, enabled: bool) -> Iterator[None]:
    """Set `enabled` inside the block."""
    module = globals()  # the parameter has the same name as the setting
    before = module["enabled"]
    module["enabled"] = enabled
    try:
        yield
    finally:
        module["enabled"] = before
