"""The laws of `manualgrad.verify`, which every operation holds, each tried on every sample of the table."""

from __future__ import annotations

import pytest

from manualgrad import verify
from manualgrad.registry import Op, TensorFactory
from manualgrad.verification import LAWS, Report

DISTRIBUTED = "distributed"  # starts two processes: tried once, not for every sample


def verified(op: Op, number: int | None, device: str, law: str) -> Report:
    maker = TensorFactory(device=device)
    call = op.benchmark_input(maker) if number is None else list(op.sample_inputs(maker))[number]
    args, kwargs = call.marked()
    return verify(
        op.function,
        *args,
        kwargs=kwargs,
        reference=op.reference,
        require=[law],
        laws=[law],
        surrogate=not call.gradient_is_derivative,
    )


@pytest.mark.parametrize("law", [law for law in LAWS if law != DISTRIBUTED])
def test_law(law: str, op: Op, number: int, device: str) -> None:
    verified(op, number, device, law).raise_if_failed()


def test_adjoint_at_full_size(op: Op, device: str) -> None:
    verified(op, None, device, "adjoint").raise_if_failed()
