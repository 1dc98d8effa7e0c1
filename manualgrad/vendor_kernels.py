"""The switch for vendor kernels.

A few gradients written as torch operations are so much slower than a vendor's kernel that a training step shows
it. The rule of such a gradient names the kernel next to the formula (`Rule.vendor_kernels`). The kernel runs where
nothing observes the backward. A backward that is differentiated, transformed or compiled uses the formula. Both
give the same result to rounding; `tests/test_vendor_kernels.py` checks that.

One switch, for all threads, makes every gradient run from its formula:

    manualgrad.vendor_kernels.enabled = False              for the rest of the process
    with manualgrad.vendor_kernels.flags(enabled=False):   inside the block
    MANUALGRAD_VENDOR_KERNELS=0                            from the start, in the environment
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

enabled: bool = os.environ.get("MANUALGRAD_VENDOR_KERNELS", "1") != "0"
"""One value for all threads: on CUDA, autograd computes gradients in threads of its own."""


@contextmanager
def flags(*, enabled: bool) -> Iterator[None]:
    """Set the switch inside the block."""
    before = globals()["enabled"]
    globals()["enabled"] = enabled
    try:
        yield
    finally:
        globals()["enabled"] = before
