"""Forward and backward of a model or of an operation, ready to be measured: by scripts/benchmark.py and by
scripts/check_gpu.py, which has torch only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import models
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from manualgrad import convert, registry


def synchronized(device: str) -> float:
    """The time, all done that was to be done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


# Whole models


class Contestant(NamedTuple):
    title: str
    ours: bool = False
    compiled: bool = False
    switches: dict[str, Any] = {}
    """What is set on those modules of the model that have it."""
    foreign: bool = False
    """May fail, without a compiler on the machine, say."""


CONTESTANTS = {
    "torch": Contestant("torch.nn"),
    "ours": Contestant("**ours**", ours=True, switches={"form": "whole"}),
    "checkpointed": Contestant("torch.nn, blocks checkpointed", switches={"checkpointed": True}),
    "ours_checkpointed": Contestant(
        "ours, blocks checkpointed", ours=True, switches={"form": "whole", "checkpointed": True}
    ),
    "compiled": Contestant("torch.compile", compiled=True, foreign=True),
    "ours_compiled": Contestant("ours, torch.compile", ours=True, compiled=True, switches={"form": "whole"}),
    "chunked": Contestant("torch.nn, its head in chunks", switches={"form": "chunked"}),
    "liger": Contestant("torch.nn, Liger-Kernel", switches={"form": "liger"}, foreign=True),
}


def of_ours(case: models.Case) -> torch.nn.Module:
    """The model of a case with our layers and functions."""
    model = case.make()
    return convert(model, functional=case.functional, fused_loss=getattr(model, "language", False))


class Run:
    """One contestant at one case: its model, ready to step."""

    def __init__(self, case: models.Case, name: str, device: str, dtype: torch.dtype) -> None:
        contestant = CONTESTANTS[name]
        torch.manual_seed(0)
        self.model = of_ours(case) if contestant.ours else case.make()
        for module in self.model.modules():
            for switch, value in contestant.switches.items():
                if hasattr(module, switch):
                    setattr(module, switch, value)
        self.model.to(device, dtype)
        self.function: Callable[..., Tensor] = torch.compile(self.model) if contestant.compiled else self.model
        torch.manual_seed(1)
        self.batch = [x.to(device, dtype if x.is_floating_point() else None) for x in case.batch()]
        self.upstream: Tensor | None = None
        self.device = device

    def step(self) -> None:
        """Forward and backward."""
        output = self.function(*self.batch)
        if self.upstream is None and output.dim() > 0:  # a layer's; a model's is its loss
            torch.manual_seed(2)
            self.upstream = torch.randn_like(output)
        output.backward(self.upstream)

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor]:
        torch.manual_seed(3)
        self.clear()
        self.step()
        return [x.grad for x in self.model.parameters() if x.grad is not None]

    def seconds(self) -> float:
        self.clear()
        begin = synchronized(self.device)
        self.step()
        return synchronized(self.device) - begin


# Single operations


Step = Callable[[], list[Tensor]]
"""Forward and backward; gives the gradients."""

Subject = tuple[Step, Callable[[], Any]]
"""The step, and its forward alone."""


def operation(op: registry.Op, function: Callable[..., Any], device: str, dtype: torch.dtype) -> Subject:
    """One operation on its big sample, and a gradient for every input that has one."""
    call = op.benchmark_input(registry.TensorFactory(dtype, device))
    args, kwargs = call.with_requires_grad()
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    upstream: list[Tensor] = []

    def forward() -> list[Tensor]:
        if op.random:  # on CUDA seeding takes as long as a small kernel
            torch.manual_seed(0)
        outputs = tree_leaves(function(*args, **kwargs))
        return [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]

    def step() -> list[Tensor]:
        outputs = forward()
        if not upstream:
            generator = torch.Generator().manual_seed(1)
            upstream.extend(torch.randn(x.shape, generator=generator).to(x) for x in outputs)
        return list(torch.autograd.grad(outputs, tensors, upstream))

    return step, forward
