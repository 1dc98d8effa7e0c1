"""The setting that enables vendor kernels.

For a few gradients, the formula is so much slower than a vendor's kernel that a training step is measurably
slower. The rule of such a gradient names the kernel next to the formula (`Rule.vendor_kernels`). The kernel runs
in a plain eager backward. A backward that is differentiated, transformed or compiled uses the formula. Both give
the same result up to rounding; `tests/test_vendor_kernels.py` checks that.

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
"""One value for all threads. (On CUDA, autograd runs backward in other threads than forward.)"""


@contextmanager
def flags(*, enabled: bool) -> Iterator[None]:
    """Set `enabled` inside the block."""
    before = globals()["enabled"]
    globals()["enabled"] = enabled
    try:
        yield
    finally:
        globals()["enabled"] = before
