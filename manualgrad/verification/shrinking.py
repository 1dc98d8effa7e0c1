"""The smallest input that still breaks a law."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from manualgrad.verification.report import Fails, Law, NotApplicable, NotOffered, Wastes
from manualgrad.verification.subject import Subject, from_numbers, numbers

_SECONDS = 1.5


def minimal_example(law: Law, subject: Subject) -> str:
    """The inputs, with axes cut and values rounded as long as the law still fails."""
    if law.on_request:
        return ""
    until = time.perf_counter() + _SECONDS
    for size in (1, 2):
        for length in reversed(subject.lengths(size)):
            subject = _if_it_fails(law, subject, subject.cut(length, size), until)
    for digits in (0, 1):
        rounded = {i: _rounded(subject.leaves[i], digits) for i in subject.places}
        other = _if_it_fails(law, subject, subject.replaced(rounded), until)
        if other is not subject:
            return _written(other)
    return _written(subject)


def _rounded(tensor: Tensor, digits: int) -> Tensor:
    return from_numbers(torch.round(numbers(tensor), decimals=digits), tensor)


def _if_it_fails(law: Law, subject: Subject, other: Subject, until: float) -> Subject:
    if time.perf_counter() > until:
        return subject
    try:
        other(*other.tensors())
    except Exception:
        return subject
    try:
        law.check(other)
    except (Wastes, NotApplicable, NotOffered):
        return subject
    except Fails:
        return other
    except Exception:
        return subject
    return subject


def _written(subject: Subject) -> str:
    parts = []
    for i, x in enumerate(subject.leaves):
        value = x
        if isinstance(x, Tensor):
            dtype = str(x.dtype).removeprefix("torch.")
            value = f"{dtype}{list(x.shape)}"
            if x.numel() <= 8 and x.device.type != "meta":
                shown = x.tolist()
                value = f"{_short(shown)} ({dtype})"
        parts.append(f"{subject.names[i]} = {value}")
    return ", ".join(parts)


def _short(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.4g}" if isinstance(value, (float, complex)) else str(value)
