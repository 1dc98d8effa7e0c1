"""Looking into a Function while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function

from manualgrad.verification.subject import class_of, functions_of, patched


class Backward(NamedTuple):
    """One call of one Function's backward."""

    name: str
    upstreams: tuple[Tensor | None, ...]
    results: tuple[Tensor | None, ...]
    edges: list[Any]
    """For each result where the graph goes on: (node, number), or None for what is no tensor."""


@contextmanager
def observing(outputs: Sequence[Tensor]) -> Iterator[list[Backward]]:
    """Watch the Functions under these outputs run once more: what each backward returns to the engine."""
    seen: list[Backward] = []
    tensors: dict[Any, list[bool]] = {}
    with ExitStack() as stack:
        for cls in {class_of(node) for node in functions_of(outputs)}:
            old = cls.setup_context is Function.setup_context
            name = "forward" if old else "setup_context"
            stack.enter_context(patched(cls, name, staticmethod(_noting(getattr(cls, name), old, tensors))))
            name = "vjp" if cls.vjp is not Function.vjp else "backward"
            stack.enter_context(patched(cls, name, staticmethod(_watched(cls, getattr(cls, name), tensors, seen))))
        yield seen


def _noting(original: Any, old: bool, tensors: dict[Any, list[bool]]) -> Any:
    """Notes which arguments are tensors: the graph has an edge for those alone."""

    def run(ctx: Any, *args: Any) -> Any:
        tensors[ctx] = [isinstance(x, Tensor) for x in (args if old else args[0])]
        return original(ctx, *args)

    return run


def _watched(cls: type[Function], backward: Any, tensors: dict[Any, list[bool]], seen: list[Backward]) -> Any:
    def run(ctx: Any, *grads: Any) -> Any:
        results = backward(ctx, *grads)
        told = results if isinstance(results, tuple) else (results,)
        edges = iter(ctx.next_functions)
        which = tensors.get(ctx, [])
        seen.append(
            Backward(cls.__name__, grads, told, [next(edges) if is_tensor else None for is_tensor in which])
        )
        return results

    return run
