"""Dropout."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from manualgrad.ops.registration import with_torch_errors
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule

_KAPPA = 1.7580993408473766  # κ = α λ of SELU


class DropoutFunction(Rule):
    r"""y = m x / (1 - p)      m: 1 with probability 1 - p, else 0

    Given m the map is diagonal:      ∂L/∂x = m g / (1 - p)
    The mask is random and has no derivative: derivatives of every order use the mask of the forward.

    Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout", JMLR 2014.
    """

    statistics = ("mask",)
    supports_complex = True

    def forward(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
        return _dropout_forward(input, p)

    def forward_(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
        output, mask = _dropout_forward(input, p)
        return input.copy_(output), mask

    def grad_input(grad: Tensor, mask: Tensor, p: float) -> Tensor:
        return torch.where(mask, grad, 0) * dropout_scale(p)

    def recompute(input: Tensor, mask: Tensor, p: float) -> Tensor:
        return torch.where(mask, input, 0) * dropout_scale(p)


def _dropout_forward(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
    if p == 1:  # torch then draws no random numbers and keeps nan
        return input * torch.zeros_like(input), torch.zeros_like(input, dtype=torch.bool)
    output, mask = torch.native_dropout(input, p, True)
    return output, mask.bool()  # vmap returns it in the input's dtype


def dropout_scale(p: float) -> float:
    """1 / (1 - p), or 0 for p = 1."""
    return 0 if p == 1 else 1 / (1 - p)


def _apply_dropout(
    rule: type[Rule], input: Tensor, p: float, training: bool, inplace: bool, *settings: int
) -> Tensor:
    """Apply the rule in training. With `inplace` it overwrites the input. In evaluation return the input."""
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, but is {training!r}")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability must be between 0 and 1, but is {p}")
    if input.numel() == 0 or p == 0 or not training:
        return input
    return rule.apply_(input, p, *settings) if inplace else rule.apply(input, p, *settings)


@with_torch_errors
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element with probability p and scale the others, as `torch.nn.functional.dropout`. Any shape.

    The mask equals torch's for the same random state.

    Raises:
        ValueError: p is not between 0 and 1.
        TypeError: `training` is not a bool.
    """
    return _apply_dropout(DropoutFunction, input, p, training, inplace)


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


class AffineDropoutFunction(Rule):
    r"""y = a x + b      a and b: random along the leading axes, constant along the others      ∂L/∂x = a g

    Channel dropout     a = m / (1-p),  b = 0                      m: 1 with probability 1 - p, else 0
    Alpha dropout       a = m s,        b = s κ (p - (1 - m)),     κ = αλ of SELU,   s = ((1 + p κ²) (1-p))^-½
    Alpha dropout sets dropped elements to -κ. The scale s and the shift s κ p then restore mean 0 and variance 1.

    Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015. Klambauer et al.,
    "Self-Normalizing Neural Networks", 2017.
    """

    statistics = ("slope",)
    supports_complex = True

    def forward(input: Tensor, p: float, leading: int, alpha: bool) -> tuple[Tensor, Tensor]:
        return _affine_dropout_forward(input, p, leading, alpha)

    def forward_(input: Tensor, p: float, leading: int, alpha: bool) -> tuple[Tensor, Tensor]:
        output, slope = _affine_dropout_forward(input, p, leading, alpha)
        return input.copy_(output), slope

    def grad_input(grad: Tensor, slope: Tensor) -> Tensor:
        return grad * slope


def _affine_dropout_forward(input: Tensor, p: float, leading: int, alpha: bool) -> tuple[Tensor, Tensor]:
    shape = [*input.shape[:leading], *[1] * (input.dim() - leading)]
    if p == 1:  # torch draws no random numbers then
        return input * torch.zeros_like(input), input.new_zeros(shape)
    mask = torch.empty_like(input) if leading == input.dim() else input.new_empty(shape)
    mask.bernoulli_(1 - p)
    if not alpha:
        slope = mask.div_(1 - p)
        return input * slope, slope
    scale = 1 / math.sqrt((_KAPPA**2 * p + 1) * (1 - p))
    shift = (mask - 1).mul_(_KAPPA * scale).add_(_KAPPA * scale * p)
    slope = mask.mul_(scale)
    return input * slope + shift, slope


def _warn_of_input_dim(name: str, input: Tensor, expected: tuple[int, int]) -> None:
    if input.dim() not in expected:
        warnings.warn(f"{name}: a {input.dim()}-D input is deprecated: use dropout instead.", stacklevel=4)


@with_torch_errors
def dropout1d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop whole channels, as `torch.nn.functional.dropout1d`. Shape ([N,] C, L).

    Raises:
        RuntimeError: the input does not have 2 or 3 axes.
    """
    if input.dim() not in (2, 3):
        raise RuntimeError(f"dropout1d: expected 2D or 3D input, but received a {input.dim()}D input")
    return _apply_dropout(AffineDropoutFunction, input, p, training, inplace, input.dim() - 1, False)


@with_torch_errors
def dropout2d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop whole channels, as `torch.nn.functional.dropout2d`. Shape (N, C, H, W), or (N, C, L) with a warning."""
    _warn_of_input_dim("dropout2d", input, (4, 4))
    if input.dim() < 2:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return _apply_dropout(AffineDropoutFunction, input, p, training, inplace, 2, False)


@with_torch_errors
def dropout3d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop whole channels, as `torch.nn.functional.dropout3d`. Shape ([N,] C, D, H, W)."""
    _warn_of_input_dim("dropout3d", input, (4, 5))
    return _apply_dropout(AffineDropoutFunction, input, p, training, inplace, 2 if input.dim() == 5 else 1, False)


@with_torch_errors
def alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """Set elements to SELU's lower bound, and keep mean and variance, as `torch.nn.functional.alpha_dropout`.

    Any shape.
    """
    return _apply_dropout(AffineDropoutFunction, input, p, training, inplace, input.dim(), True)


@with_torch_errors
def feature_alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """Alpha dropout of whole channels, as `torch.nn.functional.feature_alpha_dropout`. Shape (N, C, ...)."""
    if input.dim() < 2 and training:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return _apply_dropout(AffineDropoutFunction, input, p, training, inplace, 2, True)


for _function, _shapes, _benchmark_shape in (
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
        benchmark_input=lambda t, shape=_benchmark_shape: SampleInput(t(*shape), p=0.2, training=True),
        random=True,
    )
