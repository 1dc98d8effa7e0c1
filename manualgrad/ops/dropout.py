"""Dropout."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from manualgrad.ops.elementary import with_torch_errors
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule

_SELU_FLOOR = 1.7580993408473766  # α λ of SELU


class DropoutFunction(Rule):
    r"""y = m x / (1 - p)      m: 1 with probability 1 - p, else 0

    Given m the map is diagonal:      ∂L/∂x = m g / (1 - p)
    The mask is a constant statistic: every derivative uses the one that the forward drew.

    Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout", JMLR 2014.
    """

    statistics = ("mask",)
    supports_complex = True

    def forward(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
        return _with_mask(input, p)

    def forward_(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
        output, mask = _with_mask(input, p)
        return input.copy_(output), mask

    def grad_input(grad: Tensor, mask: Tensor, p: float) -> Tensor:
        return torch.where(mask, grad, 0) * kept_scale(p)

    def recompute(input: Tensor, mask: Tensor, p: float) -> Tensor:
        return torch.where(mask, input, 0) * kept_scale(p)


def _with_mask(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
    if p == 1:  # torch draws nothing then
        return input * torch.zeros_like(input), torch.zeros_like(input, dtype=torch.bool)
    output, mask = torch.native_dropout(input, p, True)
    return output, mask.bool()  # vmap returns it in the input's dtype


def kept_scale(p: float) -> float:
    """1 / (1 - p), or 0 where nothing is kept."""
    return 0 if p == 1 else 1 / (1 - p)


def _dropped(rule: type[Rule], input: Tensor, p: float, training: bool, inplace: bool, *settings: int) -> Tensor:
    """The output of the rule while training, or with `inplace` the input, which it is written into."""
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, but is {training!r}")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if input.numel() == 0 or p == 0 or not training:
        return input
    return rule.apply_(input, p, *settings) if inplace else rule.apply(input, p, *settings)


@with_torch_errors
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element with probability p, scale the others, as `torch.nn.functional.dropout`. Any shape.

    Draws the same mask as torch does from the same random state.

    Raises:
        ValueError: p is not a probability.
        TypeError: training is not a bool.
    """
    return _dropped(DropoutFunction, input, p, training, inplace)


register(
    dropout,
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), p=0.4),
        SampleInput(t(5, 3), p=1.0),
        SampleInput(t(5, 3), training=False),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), p=0.1),
    random=True,
)


class NoiseFunction(Rule):
    r"""y = a x + b      a and b: drawn for each of the leading axes, the same along the others      ∂L/∂x = a g

    Dropout of channels     a = m / (1-p),  b = 0                      m: 1 with probability 1 - p, else 0
    Alpha dropout           a = m s,        b = s κ (p - (1 - m)),     κ = αλ of SELU:  what is dropped becomes -κ,
                            s = ((1 + p κ²) (1-p))^-½                  then mean 0 and variance 1 are restored

    Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015. Klambauer et al.,
    "Self-Normalizing Neural Networks", 2017.
    """

    statistics = ("slope",)
    supports_complex = True

    def forward(input: Tensor, p: float, leading: int, alpha: bool) -> tuple[Tensor, Tensor]:
        return _with_slope(input, p, leading, alpha)

    def forward_(input: Tensor, p: float, leading: int, alpha: bool) -> tuple[Tensor, Tensor]:
        output, slope = _with_slope(input, p, leading, alpha)
        return input.copy_(output), slope

    def grad_input(grad: Tensor, slope: Tensor) -> Tensor:
        return grad * slope


def _with_slope(input: Tensor, p: float, leading: int, alpha: bool) -> tuple[Tensor, Tensor]:
    shape = [*input.shape[:leading], *[1] * (input.dim() - leading)]
    if p == 1:  # torch draws nothing then
        return input * torch.zeros_like(input), input.new_zeros(shape)
    mask = torch.empty_like(input) if leading == input.dim() else input.new_empty(shape)
    mask.bernoulli_(1 - p)
    if not alpha:
        slope = mask.div_(1 - p)
        return input * slope, slope
    scale = 1 / math.sqrt((_SELU_FLOOR**2 * p + 1) * (1 - p))
    shift = (mask - 1).mul_(_SELU_FLOOR * scale).add_(_SELU_FLOOR * scale * p)
    slope = mask.mul_(scale)
    return input * slope + shift, slope


def _warn_of_axes(name: str, input: Tensor, expected: tuple[int, int]) -> None:
    if input.dim() not in expected:
        warnings.warn(f"{name}: a {input.dim()}-D input is deprecated: use dropout instead.", stacklevel=4)


@with_torch_errors
def dropout1d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop whole channels, as `torch.nn.functional.dropout1d`. Shape ([N,] C, L).

    Raises:
        RuntimeError: another number of axes.
    """
    if input.dim() not in (2, 3):
        raise RuntimeError(f"dropout1d: expected 2D or 3D input, but received a {input.dim()}D input")
    return _dropped(NoiseFunction, input, p, training, inplace, input.dim() - 1, False)


@with_torch_errors
def dropout2d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop whole channels, as `torch.nn.functional.dropout2d`. Shape (N, C, H, W), or (N, C, L) with a warning."""
    _warn_of_axes("dropout2d", input, (4, 4))
    if input.dim() < 2:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return _dropped(NoiseFunction, input, p, training, inplace, 2, False)


@with_torch_errors
def dropout3d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop whole channels, as `torch.nn.functional.dropout3d`. Shape ([N,] C, D, H, W)."""
    _warn_of_axes("dropout3d", input, (4, 5))
    return _dropped(NoiseFunction, input, p, training, inplace, 2 if input.dim() == 5 else 1, False)


@with_torch_errors
def alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """Drop to SELU's lower bound and keep mean and variance, as `torch.nn.functional.alpha_dropout`. Any shape."""
    return _dropped(NoiseFunction, input, p, training, inplace, input.dim(), True)


@with_torch_errors
def feature_alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """Alpha dropout of whole channels, as `torch.nn.functional.feature_alpha_dropout`. Shape (N, C, ...)."""
    if input.dim() < 2 and training:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return _dropped(NoiseFunction, input, p, training, inplace, 2, True)


for _function, _shapes, _big in (
    (dropout1d, [(3, 2, 2), (4, 3)], (16, 64, 1024)),
    (dropout2d, [(2, 3, 2, 2)], (16, 64, 32, 32)),
    (dropout3d, [(2, 3, 1, 2, 1), (4, 1, 2, 1)], (4, 64, 16, 16, 16)),
    (alpha_dropout, [(5, 3)], (1024, 1024)),
    (feature_alpha_dropout, [(2, 3, 2)], (16, 64, 32, 32)),
):
    register(
        _function,
        sample_inputs=lambda t, shapes=_shapes: [
            *(SampleInput(t(*shape), p=0.4, training=True) for shape in shapes),
            SampleInput(t(*shapes[0]), p=1.0, training=True),
        ],
        benchmark_input=lambda t, shape=_big: SampleInput(t(*shape), p=0.2, training=True),
        random=True,
    )
