"""Records what the backward of each Function receives and returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function

from manualgrad.verification.graph import function_class, function_nodes, patch_attribute


class BackwardCall(NamedTuple):
    """One call of a Function's backward."""

    name: str
    """Of the Function."""
    grad_outputs: tuple[Tensor | None, ...]
    grad_inputs: tuple[Tensor | None, ...]
    edges: list[Any]
    """For each argument of forward: the next node with its input number, or None if it is no tensor."""


@contextmanager
def record_backward_calls(outputs: Sequence[Tensor]) -> Iterator[list[BackwardCall]]:
    """Within the context, record new backward calls of the Functions in the graph of these outputs."""
    calls: list[BackwardCall] = []
    is_tensor: dict[Any, list[bool]] = {}
    with ExitStack() as stack:
        for cls in {function_class(node) for node in function_nodes(outputs)}:
            forward_has_ctx = cls.setup_context is Function.setup_context
            setup = "forward" if forward_has_ctx else "setup_context"
            stack.enter_context(
                patch_attribute(
                    cls, setup, staticmethod(_recording_setup(getattr(cls, setup), forward_has_ctx, is_tensor))
                )
            )
            backward = "vjp" if cls.vjp is not Function.vjp else "backward"
            stack.enter_context(
                patch_attribute(
                    cls, backward, staticmethod(_recording_backward(cls, getattr(cls, backward), is_tensor, calls))
                )
            )
        yield calls


def _recording_setup(setup: Any, is_forward: bool, is_tensor: dict[Any, list[bool]]) -> Any:
    """Records which arguments are tensors: only these have an edge in the graph."""

    def run(ctx: Any, *args: Any) -> Any:
        is_tensor[ctx] = [isinstance(x, Tensor) for x in (args if is_forward else args[0])]
        return setup(ctx, *args)

    return run


def _recording_backward(
    cls: type[Function], backward: Any, is_tensor: dict[Any, list[bool]], calls: list[BackwardCall]
) -> Any:
    def run(ctx: Any, *grad_outputs: Any) -> Any:
        result = backward(ctx, *grad_outputs)
        grad_inputs = result if isinstance(result, tuple) else (result,)
        next_functions = iter(ctx.next_functions)
        edges = [next(next_functions) if tensor else None for tensor in is_tensor.get(ctx, [])]
        calls.append(BackwardCall(cls.__name__, grad_outputs, grad_inputs, edges))
        return result

    return run
