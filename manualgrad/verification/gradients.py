"""Gradients of a function under test, for random grad_outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from manualgrad.verification.function_under_test import FunctionUnderTest


def random_grad_output(output: Tensor, seed: int = 3) -> Tensor:
    """A gradient for this output, with a different number for each element."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*output.shape, 2) if output.is_complex() else output.shape
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    values = torch.view_as_complex(values) if output.is_complex() else values
    return values.to(output.dtype).to(output.device)


def with_grad_outputs(outputs: Sequence[Tensor], seed: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that require a gradient, and a random grad_output for each.

    An output's grad_output depends on its index among all outputs, not on which others require a gradient.
    """
    selected = [(i, y) for i, y in enumerate(outputs) if y.requires_grad]
    return [y for _, y in selected], [random_grad_output(y, seed + i) for i, y in selected]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies for a backward that may write into its grad_outputs: only `no_grad_output_mutation` tests that."""
    return [x.clone() for x in tensors]


def gradients(
    fn: FunctionUnderTest, inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """The gradients of those inputs that require one."""
    outputs, default = with_grad_outputs(fn(*inputs))
    wanted = [x for x in inputs if x.requires_grad]
    if not outputs:
        return [None] * len(wanted)
    return list(
        torch.autograd.grad(outputs, wanted, default if grad_outputs is None else grad_outputs, allow_unused=True)
    )


def zeros_for_none(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]
