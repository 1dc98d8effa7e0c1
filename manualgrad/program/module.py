"""The program as a module: one autograd Function over the model's own parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils import _pytree as pytree

Compute = Callable[..., Any]


class ProgramModule(nn.Module):
    """Runs a program's ``forward`` and ``backward`` for a model, with the model's own parameters and buffers.

    Its arguments and results are those of the model. Shapes must be those of the program.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        run: Any,
        check_inputs: Callable[[Sequence[Any]], list[Tensor]],
        outputs: Callable[[Any], Any],
    ) -> None:
        super().__init__()
        self.model = model
        self._tensors = [_find(model, name) for name in names]
        self._names = tuple(names)
        self._apply: Any = super(Function, run).apply
        self._check_inputs, self._outputs = check_inputs, outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self._check_inputs((args, kwargs))
        tensors = [getattr(owner, name) for owner, name in self._tensors]
        return self._outputs(self._apply(self._names, *tensors, *inputs))


def _find(model: nn.Module, path: str) -> tuple[Any, str]:
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name
