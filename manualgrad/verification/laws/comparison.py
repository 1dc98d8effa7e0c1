"""Comparisons of tensors, and the messages about differences."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from torch import Tensor

from manualgrad.verification.function_under_test import FunctionUnderTest
from manualgrad.verification.report import LawFailure
from manualgrad.verification.tensors import dtype_and_shape, element_position, real_vector


def compare(
    name: str,
    result: Tensor | None,
    expected: Tensor | None,
    tolerance: float = 0.0,
    labels: tuple[str, str] = ("got", "expected"),
    likely_cause: str = "",
) -> None:
    """Raise LawFailure unless the tensors agree. A gradient None counts as zero.

    Args:
        name: of the compared quantity, for the message.
        result, expected: the tensors.
        tolerance: the allowed difference, relative to the largest element of `expected`.
        labels: of `result` and `expected`, for the message.
        likely_cause: of a difference.
    """
    if result is None and expected is None:
        return
    template = result if result is not None else expected
    assert template is not None
    result = torch.zeros_like(template) if result is None else result
    expected = torch.zeros_like(template) if expected is None else expected
    if result.shape != expected.shape:
        raise LawFailure(
            f"{name}: {labels[0]} shape {list(result.shape)}, {labels[1]} {list(expected.shape)}", likely_cause
        )
    a, b = real_vector(result).double(), real_vector(expected).double()
    if not a.numel():
        return
    scale = b[b.isfinite()].abs().amax().item() if b.isfinite().any() else 0.0
    different = ~((a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance * max(scale, 1e-3)))
    if different.any():
        raise LawFailure(f"{name} at {largest_difference(result, a, b, different, labels)}", likely_cause)


def largest_difference(
    tensor: Tensor, a: Tensor, b: Tensor, different: Tensor, labels: tuple[str, str] = ("got", "expected")
) -> str:
    """Where `a` and `b`, both real vectors of `tensor`, differ most, and both numbers."""
    distance = (a - b).abs().nan_to_num(torch.inf, torch.inf, torch.inf).where(different, -1)
    index = int(distance.argmax())
    numbers = f"{labels[0]} {format_number(a[index])}, {labels[1]} {format_number(b[index])}"
    return f"{element_position(tensor, index)}: {numbers}{count_of_differences(different)}"


def count_of_differences(different: Tensor) -> str:
    n = different.numel()
    return f" ({int(different.sum())} of {n} elements differ)" if n > 1 else ""


def compare_gradients(
    fn: FunctionUnderTest,
    result: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    tolerance: float,
    labels: tuple[str, str] = ("got", "expected"),
    inputs: Sequence[int] | None = None,
    prefix: str = "",
    likely_cause: str = "",
) -> None:
    """`compare` for the gradients of all inputs, or of those with these numbers."""
    for k, a, b in zip(inputs or range(len(fn.input_indices)), result, expected, strict=True):
        compare(f"{prefix}gradient of {fn.input_name(k)}", a, b, tolerance, labels, likely_cause)


def format_number(value: Tensor | float) -> str:
    return f"{float(value):.6g}"


def format_error(error: BaseException) -> str:
    """The type and the shortened first line of the message."""
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {textwrap.shorten(message, 160, placeholder=' …')}".rstrip(": ")


def format_input(fn: FunctionUnderTest, k: int) -> str:
    return f"{fn.input_name(k)} ({dtype_and_shape(fn.primals[k])})"
