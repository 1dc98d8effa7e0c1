"""The minimal example: smaller inputs that still break a law."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from manualgrad.verification.function_under_test import FunctionUnderTest
from manualgrad.verification.report import Law, LawFailure
from manualgrad.verification.tensors import dtype_and_shape, dtype_name, from_real_vector, real_vector

_SECONDS = 1.5


def minimal_example(law: Law, fn: FunctionUnderTest) -> str:
    """The inputs, with axes reduced and values rounded as long as the law still fails."""
    if law.on_request:
        return ""
    deadline = time.perf_counter() + _SECONDS
    for size in (1, 2):
        for length in reversed(fn.reducible_lengths(size)):
            smaller = fn.with_axes_reduced(length, size)
            if _still_fails(law, smaller, deadline):
                fn = smaller
    for decimals in (0, 1):
        rounded = fn.with_leaves({i: _round(fn.leaves[i], decimals) for i in fn.input_indices})
        if _still_fails(law, rounded, deadline):
            return _format_inputs(rounded)
    return _format_inputs(fn)


def _still_fails(law: Law, fn: FunctionUnderTest, deadline: float) -> bool:
    if time.perf_counter() > deadline:
        return False
    try:
        fn(*fn.make_inputs())
        law.check(fn)
    except LawFailure:
        return True
    except Exception:
        return False
    return False


def _round(tensor: Tensor, decimals: int) -> Tensor:
    return from_real_vector(torch.round(real_vector(tensor), decimals=decimals), tensor)


def _format_inputs(fn: FunctionUnderTest) -> str:
    formatted = []
    for name, x in zip(fn.names, fn.leaves, strict=True):
        value = x
        if isinstance(x, Tensor):
            value = dtype_and_shape(x)
            if x.numel() <= 8 and x.device.type != "meta":
                value = f"{_format_numbers(x.tolist())} ({dtype_name(x.dtype)})"
        formatted.append(f"{name} = {value}")
    return ", ".join(formatted)


def _format_numbers(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_format_numbers, value))}]"
    return f"{value:.4g}" if isinstance(value, (float, complex)) else str(value)
