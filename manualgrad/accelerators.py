"""The few vendor kernels that may take a formula's place.

Some gradients, written as torch operations, lose to a vendor's kernel by enough to matter in a training step. For
these the kernel stands beside the formula that the rule gives, and is taken where nothing looks on (see
`rule.nothing_looks_on`): a backward that is differentiated, transformed or compiled runs from the formula. The two
are the same to rounding, which `tests/test_accelerators.py` holds.

One switch turns all of them off, for all threads, and every gradient runs from its formula alone:

    manualgrad.accelerators.enabled = False         from here on
    with manualgrad.accelerators.switched(False):   for a while
    MANUALGRAD_ACCELERATORS=0                       from the start, in the environment

This is the only file that names a backward kernel of torch's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manualgrad.rule import nothing_looks_on

if TYPE_CHECKING:
    from manualgrad.ops.convolution import Geometry

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


def convolution_weight(grad: Tensor, input: Tensor, geometry: Geometry) -> Tensor | None:
    """The gradient of a convolution's weight, by oneDNN, cuDNN or what else torch has (None: by the formula)."""
    at = geometry
    # with a longer rest the windows of a convolution are not all that the kernel would count
    fits = at.transposed or all(rest < step for rest, step in zip(at.rest, at.stride, strict=True))
    if not (enabled and fits and grad.is_floating_point() and nothing_looks_on(grad, input)):
        return None
    rows, columns = (input, grad) if at.transposed else (grad, input)
    weight = grad.new_empty((rows.shape[1], columns.shape[1] // at.groups, *at.kernel))  # its shape alone is read
    beyond = at.rest if at.transposed else (0,) * len(at.kernel)
    how = (at.stride, at.padding, at.dilation, at.transposed, beyond, at.groups)
    return torch.ops.aten.convolution_backward(grad, input, weight, None, *how, (False, True, False))[1]
