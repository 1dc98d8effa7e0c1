"""The nodes of an autograd graph, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

STRUCTURAL_NODES = {
    f"{name}Backward{n}"
    for n in (0, 1)
    for name in (
        *("Alias", "Clone", "Expand", "Permute", "Repeat", "ReshapeAlias", "Squeeze", "T", "ToCopy", "Transpose"),
        *("Unsqueeze", "UnsafeView", "Unflatten", "View", "Cat", "Select", "Slice", "Split", "SplitWithSizes"),
        *("Stack", "Unbind", "Gather", "IndexCopy", "IndexSelect"),
        *("Add", "Div", "Mean", "Mul", "Neg", "Rsub", "Sub", "Sum"),
    )
} | {"AccumulateGrad", "CopyBackwards", "CopySlices"}
"""Nodes of torch that move data or do arithmetic."""


def nodes(outputs: Any) -> set[str]:
    """The names of all nodes in the graph of the outputs."""
    found: dict[Any, str] = {}
    pending = [x.grad_fn for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found[node] = node.name().removeprefix("torch::autograd::")
            pending += [previous for previous, _ in node.next_functions]
    return set(found.values())


def torch_derivatives(outputs: Any) -> set[str]:
    """The nodes that use a derivative of torch: they are neither manualgrad's rules nor structural."""
    return {name for name in nodes(outputs) if not name.endswith("FunctionBackward")} - STRUCTURAL_NODES
