"""A model's forward and backward as one readable Python program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from manualgrad.program.backward import Backward
from manualgrad.program.capture import Capture
from manualgrad.program.file import name_steps, write
from manualgrad.program.trace import Variable


def export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = None) -> str:
    exported = torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    inputs = pytree.tree_leaves((args, dict(kwargs or {})))
    graph = Capture(model, exported, inputs).run()
    name_steps(graph)
    outputs = [x for x in graph.outputs if isinstance(x, Variable)]
    fake = torch._guards.detect_fake_mode([x.tensor for x in graph.state.values()])
    with fake:
        backward = Backward(graph.trace, graph.steps, outputs)
    return write(graph, backward, f"Forward and backward of {type(model).__name__}.")
