"""The autograd graph: its nodes, the Functions that made them, and those Functions' plain forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction, FunctionCtx


def graph_nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """All nodes of the graph of these outputs."""
    visited: set[Any] = set()
    stack: list[Any] = [y.grad_fn for y in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield node
        stack += [next_node for next_node, _ in node.next_functions]


def function_nodes(outputs: Sequence[Tensor]) -> list[BackwardCFunction]:
    """The nodes of Functions written in Python. Each is the `ctx` of its call."""
    return [node for node in graph_nodes(outputs) if isinstance(node, BackwardCFunction)]


def function_class(node: Any) -> type[Function]:
    return node._forward_cls


def depends_on_parameters(outputs: Sequence[Tensor], module: nn.Module) -> bool:
    """Whether the graph of the outputs ends at the module's own parameters."""
    parameters = {id(p) for p in module.parameters()}
    return any(id(getattr(node, "variable", None)) in parameters for node in graph_nodes(outputs))


@contextmanager
def patch_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute within the context."""
    original = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def with_plain_forwards(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with each Function's forward called as a plain function that torch differentiates."""

    def forward(cls: Any, *args: Any) -> Any:
        ctx: Any = FunctionCtx()
        ctx.needs_input_grad = tuple(isinstance(x, Tensor) and x.requires_grad for x in args)
        if cls.setup_context is Function.setup_context:
            return cls.forward(ctx, *args)
        return cls.forward(*args)

    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, Function):
        return lambda *args: forward(owner, *args)

    def run(*args: Any, **kwargs: Any) -> Any:
        with patch_attribute(Function, "apply", classmethod(forward)):
            return function(*args, **kwargs)

    return run
