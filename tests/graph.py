"""What stands in an autograd graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

MOVES_OR_ADDS = {
    f"{name}Backward{n}"
    for n in (0, 1)
    for name in (
        *("Alias", "Clone", "Expand", "Permute", "Repeat", "ReshapeAlias", "Squeeze", "T", "ToCopy", "Transpose"),
        *("Unsqueeze", "UnsafeView", "Unflatten", "View", "Cat", "Select", "Slice", "Split", "SplitWithSizes"),
        *("Stack", "Unbind", "Gather", "IndexCopy", "IndexSelect"),
        *("Add", "Div", "Mean", "Mul", "Neg", "Rsub", "Sub", "Sum"),
    )
} | {"AccumulateGrad", "CopyBackwards", "CopySlices"}
"""Nodes of torch's that only move data or do arithmetic."""


def nodes(outputs: Any) -> set[str]:
    """Names of all nodes behind the outputs."""
    found: dict[Any, str] = {}
    waiting = [x.grad_fn for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = node.name().removeprefix("torch::autograd::")
            waiting += [before for before, _ in node.next_functions]
    return set(found.values())


def foreign(outputs: Any) -> set[str]:
    """Nodes that are neither our rules nor plain movement or arithmetic: derivatives that torch takes."""
    return {name for name in nodes(outputs) if not name.endswith("FunctionBackward")} - MOVES_OR_ADDS
