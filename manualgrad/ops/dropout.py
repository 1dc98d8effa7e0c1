"""Dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from manualgrad.ops.elementary import choose, drop_in, written
from manualgrad.registry import Call, register
from manualgrad.rule import Rule


class DropoutFunction(Rule):
    r"""y = m x / (1 - p)      m: 1 with probability 1 - p, else 0

    Given m the map is diagonal:      ∂L/∂x = m g / (1 - p)
    The mask is a constant statistic: what the forward drew is what every derivative uses.

    Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout", JMLR 2014.
    """

    statistics = ("mask",)
    complex = True

    def forward(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
        if p == 1:  # torch draws nothing then
            return input * torch.zeros_like(input), torch.zeros_like(input, dtype=torch.bool)
        output, mask = torch.native_dropout(input, p, True)
        return output, mask.bool()  # vmap returns it in the input's dtype

    def grad_input(grad: Tensor, mask: Tensor, p: float) -> Tensor:
        return choose(mask, grad * (0 if p == 1 else 1 / (1 - p)))


@drop_in
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element with probability p, scale the others, as `torch.nn.functional.dropout`. Any shape.

    Draws the same mask as torch does from the same random state.

    Raises:
        ValueError: p is not a probability.
        TypeError: training is not a bool.
    """
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, but is {training!r}")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if input.numel() == 0 or p == 0 or not training:
        return input
    return written(input, DropoutFunction.apply(input, p), inplace)


class Dropout(torch.nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace)


register(
    dropout,
    Dropout,
    samples=lambda t: [
        Call(t(5, 3), p=0.4),
        Call(t(5, 3)),
        Call(t(5, 3), p=1.0),
        Call(t(5, 3), training=False),
    ],
    big=lambda t: Call(t(1024, 1024), p=0.1),
    random=True,
)
