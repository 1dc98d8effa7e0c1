"""Helpers for nn.Module: training mode that respects frozen modules, and the module inside of torch.compile."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


class ModuleModes:
    """Switches a model to training mode, except its frozen modules.

    The frozen modules are those in eval mode when this object is made. If the whole model is in eval mode, as
    `from_pretrained` returns it, no module is frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modes = _modes(model)
        self._frozen = {key for key, training in modes.items() if not training} if any(modes.values()) else set()

    def train(self) -> None:
        """Call `model.train()`, then put the frozen modules back into eval mode."""
        self.model.train()
        _set_modes(self.model, _modes(self.model) | dict.fromkeys(self._frozen, False))


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """Return the original module of the result of torch.compile."""
    return getattr(model, "_orig_mod", model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; afterwards restore the mode of each module."""
    modes = _modes(model)
    model.eval()
    try:
        yield
    finally:
        _set_modes(model, modes)


def _modes(model: nn.Module) -> dict[int, bool]:
    """Return whether each module is in training mode, by its id."""
    return {id(module): module.training for module in model.modules()}


def _set_modes(model: nn.Module, modes: Mapping[int, bool]) -> None:
    """Call `train(mode)` of each module with another mode, from the outermost module inwards."""
    for module in model.modules():
        if module.training != modes.get(id(module), module.training):
            module.train(not module.training)
