"""Finding where a NaN or an infinity came from: the batch is run once more, with every layer watched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

Kind = Literal["input data", "target data", "parameter", "output", "loss", "gradient"]
Found = tuple[Kind, str]


class NonFiniteError(RuntimeError):
    """A NaN or an infinity appeared in training.

    Attributes:
        step: the update it happened in, counted from 1.
        where: the epoch, and the update within it, counted from 1.
        path: the file in the run folder that holds the batches, the weights before and the random states, as
            "batches", "model" and "random" of torch.load(path); None without a run folder.
        kind: what went bad first: "input data" or "target data" of the batch, a "parameter", the "output"
            of a layer, the "loss", or else the "gradient" that a layer's backward produced.
        layer: the qualified name of that layer or parameter ("model" for the model itself, "loss" for the
            loss); empty for data, and where a second run of the batch came out finite.
    """

    path: Path | None = None

    def __init__(self, step: int, where: str, kind: Kind, layer: str) -> None:
        self.step, self.where, self.kind, self.layer = step, where, kind, layer
        subject = f"the {kind} of {layer!r}" if layer and layer != kind else f"the {kind}"
        super().__init__(f"step {step} ({where}): {subject} is NaN or infinite")


def is_bad(tensor: Tensor) -> bool:
    """Whether any element is NaN or infinite."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return not bool(torch.isfinite(tensor).all())


def any_bad(value: Any) -> bool:
    """Whether any tensor in nested tuples, lists and dictionaries is bad."""
    return any(isinstance(leaf, Tensor) and is_bad(leaf) for leaf in tree_leaves(value))


def find_nonfinite(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    run: Callable[[Tensor, Tensor], Tensor],
    first_found: Callable[[Found | None], Found | None] = lambda found: found,
) -> Found:
    """Run the batches again and name the first thing that goes bad.

    Args:
        model: the model; its gradients are cleared and hold those of the batches afterwards.
        batches: the (input, target) pairs of the update, or of the evaluation.
        run: from an (input, target) pair to the loss, to be back-propagated where it carries a gradient.
        first_found: what the first of several processes found, of this one's.

    Returns:
        The kind and the layer as in NonFiniteError.
    """
    if found := first_found(_bad_already(model, batches)):
        return found
    model.zero_grad()
    with _Watch(model) as watch:
        for input, target in batches:  # all of them: other processes may wait for this one
            loss = run(input, target)
            if is_bad(loss):
                watch.report("loss", "loss")
            if loss.requires_grad:
                loss.backward()
    if found := first_found(watch.found):
        return found

    # Every gradient of every batch is finite: their sum or its norm overflowed, at the largest one.
    size = {name: p.grad.abs().max().item() for name, p in model.named_parameters() if p.grad is not None}
    largest = max(size, key=lambda name: size[name], default="")
    return "gradient", largest.rpartition(".")[0] or "model"


def _bad_already(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Found | None:
    for input, target in batches:
        if is_bad(input):
            return "input data", ""
        if is_bad(target):
            return "target data", ""
    return next((("parameter", name) for name, parameter in model.named_parameters() if is_bad(parameter)), None)


class _Watch:
    """Hooks on every module that keep the first bad thing they see.

    Every module gets its inputs, and gives its outputs, through an identity of its own, whose backward
    sees the gradient exactly there: going backwards, the first bad gradient at the input of a layer means
    that this layer's backward made it; one at the output of a layer, with no layer accused yet, that the
    code around the layer did.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: Found | None = None
        self.running: list[str] = []
        self.handles: list[Any] = []

    def __enter__(self) -> "_Watch":
        for name, module in self.model.named_modules():
            self.handles += [
                module.register_forward_pre_hook(self._before(name or "model")),
                module.register_forward_hook(self._after(name or "model")),
            ]
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    self.handles.append(parameter.register_hook(self._on_gradient(name or "model")))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def report(self, kind: Kind, layer: str) -> None:
        """Keep the first report only."""
        self.found = self.found or (kind, layer)

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            if any_bad(inputs):  # no layer gave it, so the code of the module around this one did
                self.report("output", self._around())
            self.running.append(name)
            return self._watched(inputs, name)

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            self.running.pop()
            if any_bad(output):
                self.report("output", name)
            return self._watched(output, self._around())

        return hook

    def _around(self) -> str:
        return self.running[-1] if self.running else "loss"

    def _watched(self, value: Any, culprit: str) -> Any:
        """The same tensors through identities that accuse `culprit` when a bad gradient comes through."""

        def identity(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            seen = tensor.view_as(tensor)
            seen.register_hook(self._on_gradient(culprit))
            return seen

        return tree_map_only(Tensor, identity, value)

    def _on_gradient(self, culprit: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if is_bad(gradient):
                self.report("gradient", culprit)

        return hook
