"""Forward and backward of a model or an operation, ready to be measured. Needs torch only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from manualgrad import convert, export, registry

from . import models


def synchronized_time(device: str) -> float:
    """The time after all work on the device has finished."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


# Whole models


class Variant(NamedTuple):
    """One way to run a model."""

    title: str
    convert: bool = False
    """Whether to convert the model to manualgrad."""
    compile: bool = False
    program: bool = False
    """Whether to run the model's program (`manualgrad.export`)."""
    attributes: dict[str, Any] = {}
    """Set on each module of the model that has them."""
    optional: bool = False
    """Whether it may fail, for example because the machine has no compiler."""


VARIANTS = {
    "torch": Variant("torch.nn"),
    "manualgrad": Variant("**manualgrad**", convert=True, attributes={"implementation": "fused"}),
    "torch_checkpointed": Variant("torch.nn, blocks checkpointed", attributes={"checkpointed": True}),
    "manualgrad_checkpointed": Variant(
        "manualgrad, blocks checkpointed",
        convert=True,
        attributes={"implementation": "fused", "checkpointed": True},
    ),
    "torch_compiled": Variant("torch.nn, torch.compile", compile=True, optional=True),
    "manualgrad_compiled": Variant(
        "manualgrad, torch.compile", convert=True, compile=True, attributes={"implementation": "fused"}
    ),
    "program": Variant("program", program=True),
    "torch_chunked": Variant("torch.nn, head in chunks", attributes={"implementation": "chunked"}),
    "liger": Variant("torch.nn, Liger-Kernel", attributes={"implementation": "liger"}, optional=True),
}


class ModelStep:
    """Forward and backward of one variant of a model."""

    def __init__(self, case: models.Case, variant_name: str, device: str, dtype: torch.dtype) -> None:
        variant = VARIANTS[variant_name]
        torch.manual_seed(0)
        self.model = case.make()
        if variant.convert:
            fused_loss = getattr(self.model, "language", False)
            self.model = convert(self.model, functional=case.functional, fused_loss=fused_loss)
        for module in self.model.modules():
            for name, value in variant.attributes.items():
                if hasattr(module, name):
                    setattr(module, name, value)
        self.model.to(device, dtype)
        torch.manual_seed(1)
        self.batch = [x.to(device, dtype if x.is_floating_point() else None) for x in case.batch()]
        self.function: Callable[..., Tensor] = torch.compile(self.model) if variant.compile else self.model
        if variant.program:
            self.function = export(self.model, tuple(self.batch)).module()
        self.grad_output: Tensor | None = None
        self.device = device

    def step(self) -> None:
        """Run forward and backward."""
        output = self.function(*self.batch)
        if self.grad_output is None and output.dim() > 0:  # of a single layer; a model returns its loss
            torch.manual_seed(2)
            self.grad_output = torch.randn_like(output)
        output.backward(self.grad_output)

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor]:
        torch.manual_seed(3)
        self.zero_grad()
        self.step()
        return [x.grad for x in self.model.parameters() if x.grad is not None]

    def seconds(self) -> float:
        """Run a step and return its duration."""
        self.zero_grad()
        start = synchronized_time(self.device)
        self.step()
        return synchronized_time(self.device) - start


# Single operations


class OperationStep(NamedTuple):
    """Forward and backward of one operation."""

    step: Callable[[], list[Tensor]]
    """Runs forward and backward and returns the gradients."""
    forward: Callable[[], list[Tensor]]
    """Runs the forward only and returns the differentiable outputs."""


def operation_step(
    op: registry.Op, function: Callable[..., Any], device: str, dtype: torch.dtype
) -> OperationStep:
    """Prepare a function of `op` on its benchmark input, with a gradient for every differentiable input."""
    args, kwargs = op.benchmark_input(registry.TensorFactory(dtype, device)).with_requires_grad()
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    grad_outputs: list[Tensor] = []

    def forward() -> list[Tensor]:
        if op.random:  # only then: on CUDA, seeding takes as long as a small kernel
            torch.manual_seed(0)
        outputs = tree_leaves(function(*args, **kwargs))
        return [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]

    def step() -> list[Tensor]:
        outputs = forward()
        if not grad_outputs:
            generator = torch.Generator().manual_seed(1)
            grad_outputs.extend(torch.randn(x.shape, generator=generator).to(x) for x in outputs)
        return list(torch.autograd.grad(outputs, tensors, grad_outputs))

    return OperationStep(step, forward)
