"""The program as a module: one autograd Function over the model's own parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

Compute = Callable[..., Any]


class ProgramModule(nn.Module):
    """Runs a program's ``forward`` and ``backward`` for a model, with the model's own parameters and buffers.

    Its arguments and results are those of the model. Shapes must be those of the program.
    """

    def __init__(
        self,
        model: nn.Module,
        state: Sequence[str],
        forward: Compute,
        backward: Compute,
        differentiable: Callable[[], Compute],
        check_inputs: Callable[..., list[Tensor]],
        outputs: Callable[[Any], Any],
    ) -> None:
        super().__init__()
        self.model = model
        self._tensors = [_find(model, path) for path in state]
        self._apply_program = make_apply(forward, backward, differentiable)
        self._check_inputs, self._outputs = check_inputs, outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self._check_inputs(args, kwargs)
        return self._outputs(self._apply_program(*[tensors[name] for tensors, name in self._tensors], *inputs))


def _find(model: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """Where a module holds a parameter or buffer."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    return (module._parameters if name in module._parameters else module._buffers), name


def make_apply(forward: Compute, backward: Compute, differentiable: Callable[[], Compute]) -> Compute:
    """The entry point of the Function.

    Args:
        differentiable: gives the function (tensors, grads) -> gradients that runs if the backward is itself
            differentiated. It computes again what the backward reads, so its derivative takes all paths.
    """
    run_forward, run_backward = forward, backward

    class ProgramFunction(Function):
        clear_saved_tensors_on_access = True

        @staticmethod
        def forward(ctx: Any, *tensors: Any) -> Any:
            outputs, saved = run_forward(*tensors)
            ctx.save_for_backward(*saved)
            ctx.arguments = tensors  # only a second derivative reads them
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                return differentiable()(ctx.arguments, grads)
            return run_backward([*ctx.saved_tensors], *grads)

    parent: Any = super(Function, ProgramFunction)
    return parent.apply
