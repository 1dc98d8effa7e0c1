"""Finding the source of a NaN or an infinity: the batch is run again, with hooks on every layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .distributed import Distributed, Shard
from .modules import unwrap_compiled
from .random_state import get_random_states, get_torch_states, set_torch_states, to_plain
from .serialization import to_serializable

Kind = Literal["input data", "target data", "parameter", "output", "loss", "gradient"]
Source = tuple[Kind, str]


class NonFiniteError(RuntimeError):
    """A NaN or an infinity appeared in training.

    Attributes:
        step: the optimizer step, counted from 1.
        where: the epoch, and the update within it, counted from 1.
        path: the file in the run folder with the batches, the weights before the update and the random states:
            "batches", "model" and "random" of torch.load(path). None without a run folder.
        kind: what was not finite first: "input data" or "target data" of the batch, a "parameter", the "output" of
            a layer, the "loss", or the "gradient" that a layer's backward computed.
        layer: the qualified name of that layer or parameter ("model" for the model itself, "loss" for the loss).
            Empty for data, and if the second run of the batch was finite.
    """

    path: Path | None = None

    def __init__(self, step: int, where: str, kind: Kind, layer: str) -> None:
        self.step, self.where, self.kind, self.layer = step, where, kind, layer
        subject = f"the {kind} of {layer!r}" if layer and layer != kind else f"the {kind}"
        super().__init__(f"step {step} ({where}): {subject} is NaN or infinite")


class Snapshot:
    """The buffers of a model and torch's random states before an update, to undo it or to run it again."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self._random_states = get_torch_states()

    @contextmanager
    def rerun(self) -> Iterator[None]:
        """Run code as at the time of the snapshot, with the same dropout. Buffers are restored before and
        after."""
        current = get_torch_states()
        self._restore_buffers()
        set_torch_states(self._random_states)
        yield
        set_torch_states(current)
        self._restore_buffers()

    def _restore_buffers(self) -> None:
        for buffer, value in self._buffers:
            buffer.copy_(value)


def diagnose(
    model: nn.Module,
    shards: list[Shard],
    run: Callable[[Tensor, Tensor], Tensor],
    step: int,
    where: str,
    distributed: Distributed,
    run_dir: Path | None,
) -> NonFiniteError:
    """Run the batches again, and return the error that names the source. All processes must call this.

    Process 0 writes the batches of all processes, the weights and the random states to the run folder.

    Args:
        run: maps (input, target) to the loss, like in `find_nonfinite`.
    """
    weights = distributed.gather(unwrap_compiled(model).state_dict())
    states = to_plain(get_random_states())
    batches = [(shard.input, shard.target) for shard in shards]
    error = NonFiniteError(step, where, *find_nonfinite(model, batches, run, distributed.first_not_none))
    all_batches = distributed.all_gather([(input.cpu(), target.cpu()) for input, target in batches])
    if distributed.is_main_process and run_dir is not None:
        path = run_dir / f"nonfinite-step-{step}.pt"
        batches = [batch for batches in all_batches for batch in batches]
        report = {"report": str(error), "batches": batches, "model": weights, "random": states}
        try:
            torch.save(to_serializable(report), path)
        except (OSError, RuntimeError) as failure:
            error.add_note(f"{path} could not be written: {failure}")
        else:
            error.path = path
            error.add_note(f"the batches, the weights before the update and the random states are in {path}")
    return error


def is_nonfinite(tensor: Tensor) -> bool:
    """Whether any element is NaN or infinite."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return not bool(torch.isfinite(tensor).all())


def any_nonfinite(value: Any) -> bool:
    """Whether any tensor in nested tuples, lists and dictionaries has a NaN or an infinity."""
    return any(isinstance(leaf, Tensor) and is_nonfinite(leaf) for leaf in tree_leaves(value))


def find_nonfinite(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    run: Callable[[Tensor, Tensor], Tensor],
    first_not_none: Callable[[Source | None], Source | None] = lambda source: source,
) -> Source:
    """Run the batches again and name the first thing that is not finite.

    Args:
        model: its gradients are overwritten by those of the batches.
        batches: the (input, target) pairs of the update, or of the evaluation.
        run: maps (input, target) to the loss. If the loss requires a gradient, its backward is run.
        first_not_none: returns the result of the first process that has one.

    Returns:
        The kind and the layer, as in NonFiniteError.
    """
    if source := first_not_none(_find_before_forward(model, batches)):
        return source
    model.zero_grad()
    with _NonFiniteHooks(model) as hooks:
        for input, target in batches:  # all of them: with several processes each must run the same forwards
            loss = run(input, target)
            if is_nonfinite(loss):
                hooks.report("loss", "loss")
            if loss.requires_grad:
                loss.backward()
    if source := first_not_none(hooks.source):
        return source

    # The gradients of each batch are finite: their sum or its norm overflowed. Name the largest gradient.
    size = {name: p.grad.abs().max().item() for name, p in model.named_parameters() if p.grad is not None}
    largest = max(size, key=lambda name: size[name], default="")
    return "gradient", largest.rpartition(".")[0] or "model"


def _find_before_forward(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Source | None:
    for input, target in batches:
        if is_nonfinite(input):
            return "input data", ""
        if is_nonfinite(target):
            return "target data", ""
    names = (name for name, parameter in model.named_parameters() if is_nonfinite(parameter))
    return next((("parameter", name) for name in names), None)


class _NonFiniteHooks:
    """Hooks on every module that keep the first NaN or infinity.

    The inputs and outputs of every module pass through identities with a gradient hook. Backward reaches them from
    the loss on. So the first non-finite gradient at the input of a layer comes from this layer's backward. If it
    is at the output of a layer, and no layer is reported yet, it comes from the code of the surrounding module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.source: Source | None = None
        self.running: list[str] = []
        self.handles: list[Any] = []

    def __enter__(self) -> "_NonFiniteHooks":
        for name, module in self.model.named_modules():
            self.handles += [
                module.register_forward_pre_hook(self._before_forward(name or "model")),
                module.register_forward_hook(self._after_forward(name or "model")),
            ]
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    self.handles.append(parameter.register_hook(self._gradient_hook(name or "model")))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def report(self, kind: Kind, layer: str) -> None:
        """Keep the first report only."""
        self.source = self.source or (kind, layer)

    def _before_forward(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            if any_nonfinite(inputs):  # no layer returned it: the code of the surrounding module computed it
                self.report("output", self._surrounding())
            self.running.append(name)
            return self._with_gradient_hooks(inputs, name)

        return hook

    def _after_forward(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            self.running.pop()
            if any_nonfinite(output):
                self.report("output", name)
            return self._with_gradient_hooks(output, self._surrounding())

        return hook

    def _surrounding(self) -> str:
        return self.running[-1] if self.running else "loss"

    def _with_gradient_hooks(self, value: Any, layer: str) -> Any:
        """Return the same tensors through identities that report `layer` for a non-finite gradient."""

        def identity(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            view = tensor.view_as(tensor)
            view.register_hook(self._gradient_hook(layer))
            return view

        return tree_map_only(Tensor, identity, value)

    def _gradient_hook(self, layer: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if is_nonfinite(gradient):
                self.report("gradient", layer)

        return hook
