"""How two tensors are compared, and what is said of a difference."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from torch import Tensor

from manualgrad.verification.report import Fails
from manualgrad.verification.subject import Subject, kind, numbers, position


def compare(
    what: str,
    found: Tensor | None,
    expected: Tensor | None,
    tolerance: float = 0.0,
    labels: tuple[str, str] = ("found", "expected"),
    cause: str = "",
) -> None:
    """Fail unless the tensors agree; a missing gradient counts as zero."""
    if found is None and expected is None:
        return
    model = found if found is not None else expected
    assert model is not None
    found = torch.zeros_like(model) if found is None else found
    expected = torch.zeros_like(model) if expected is None else expected
    if found.shape != expected.shape:
        raise Fails(f"{what} has shape {list(found.shape)}, {labels[1]} {list(expected.shape)}", cause)
    a, b = numbers(found).double(), numbers(expected).double()
    if not a.numel():
        return
    scale = b[b.isfinite()].abs().amax().item() if b.isfinite().any() else 0.0
    different = ~((a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance * max(scale, 1e-3)))
    if different.any():
        raise Fails(f"{what} at {told(found, a, b, different, labels)}", cause)


def told(tensor: Tensor, a: Tensor, b: Tensor, different: Tensor, labels: tuple[str, str]) -> str:
    """The worst of the differences: where, and both numbers."""
    distance = (a - b).abs().nan_to_num(torch.inf, torch.inf, torch.inf).where(different, -1)
    worst = int(distance.argmax())
    several = f" ({int(different.sum())} of {different.numel()} elements differ)" if different.numel() > 1 else ""
    return f"{position(tensor, worst)}: {labels[0]} {shown(a[worst])}, {labels[1]} {shown(b[worst])}{several}"


def compare_all(
    subject: Subject,
    found: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    tolerance: float,
    labels: tuple[str, str],
    which: Sequence[int] | None = None,
    what: str = "gradient of",
    cause: str = "",
) -> None:
    for k, a, b in zip(which or range(len(subject.places)), found, expected, strict=True):
        compare(f"{what} {subject.named(k)}", a, b, tolerance, labels, cause)


def shown(value: Tensor | float) -> str:
    return f"{float(value):.6g}"


def first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {textwrap.shorten(text, 160, placeholder=' …')}".rstrip(": ")


def described(subject: Subject, k: int) -> str:
    return f"{subject.named(k)} ({kind(subject.points[k])})"
