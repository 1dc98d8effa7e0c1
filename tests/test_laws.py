"""Every operation satisfies every law of `manualgrad.verify`, on every sample input."""

from __future__ import annotations

import pytest

from manualgrad import verify
from manualgrad.registry import Op, TensorFactory
from manualgrad.verification import LAWS, Report

DISTRIBUTED = "distributed"  # it starts two processes: tested once, in test_verification.py


def verify_op(op: Op, number: int | None, device: str, law: str) -> Report:
    """Test one law on the sample input with this number, or on the benchmark input."""
    factory = TensorFactory(device=device)
    sample = op.benchmark_input(factory) if number is None else list(op.sample_inputs(factory))[number]
    args, kwargs = sample.with_requires_grad()
    return verify(
        op.function,
        *args,
        kwargs=kwargs,
        reference=op.reference,
        require=[law],
        laws=[law],
        surrogate=not sample.gradient_is_derivative,
    )


@pytest.mark.parametrize("law", [law for law in LAWS if law != DISTRIBUTED])
def test_law(law: str, op: Op, number: int, device: str) -> None:
    verify_op(op, number, device, law).raise_if_failed()


def test_jvp_matches_backward_for_benchmark_input(op: Op, device: str) -> None:
    verify_op(op, None, device, "jvp_matches_backward").raise_if_failed()
