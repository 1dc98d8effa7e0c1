"""The switch of the vendor kernels.

Some gradients, written as torch operations, lose to a vendor's kernel by enough to matter in a training step. The
rule of these names the kernel next to the formula (`Rule.vendor_kernels`). It is used where nothing observes the
backward: one that is differentiated, transformed or compiled is computed by the formula. Both give the same to
rounding, which `tests/test_accelerators.py` checks.

One switch turns all of them off, for all threads, and every gradient runs from its formula alone:

    manualgrad.accelerators.enabled = False         from here on
    with manualgrad.accelerators.switched(False):   for a while
    MANUALGRAD_ACCELERATORS=0                       from the start, in the environment
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

enabled: bool = os.environ.get("MANUALGRAD_ACCELERATORS", "1") != "0"
"""The switch. One for all threads: on CUDA autograd computes gradients in threads of its own."""


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """The switch set for a while."""
    global enabled
    before, enabled = enabled, on
    try:
        yield
    finally:
        enabled = before
