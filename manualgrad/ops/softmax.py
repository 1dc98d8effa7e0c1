"""Softmax and its logarithm."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.registration import with_torch_errors
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule


class AlongAxis(Rule):
    """A function of each vector along the axis ``dim``. The axes before ``dim`` are batch axes."""

    autocast = {"cuda": "float32"}

    def batch_dims(grad: Tensor, dim: int) -> int:
        return dim % max(grad.dim(), 1)


class SoftmaxFunction(AlongAxis):
    r"""yᵢ = e^xᵢ / Σ e^x      (along one axis)

    dyᵢ = yᵢ (dxᵢ - Σⱼ yⱼ dxⱼ),  so J = diag y - y yᵀ, which is symmetric:      ∂L/∂x = y (g - Σ g y)
    """

    def forward(input: Tensor, dim: int) -> Tensor:
        return torch.softmax(input, dim)

    def grad_input(grad: Tensor, output: Tensor, dim: int) -> Tensor:
        return output * (grad - (grad * output).sum(dim, keepdim=True))


class SoftminFunction(SoftmaxFunction):
    r"""y = softmax(-x)      ∂L/∂x = -y (g - Σ g y) = y (Σ g y - g)"""

    def forward(input: Tensor, dim: int) -> Tensor:
        return torch.softmax(-input, dim)

    def grad_input(grad: Tensor, output: Tensor, dim: int) -> Tensor:
        return output * ((grad * output).sum(dim, keepdim=True) - grad)


class LogSoftmaxFunction(AlongAxis):
    r"""yᵢ = xᵢ - log Σ e^x      (along one axis)

    dyᵢ = dxᵢ - Σⱼ pⱼ dxⱼ,  p = eʸ,  so J = I - 1 pᵀ:      ∂L/∂x = Jᵀ g = g - p Σ g
    """

    def forward(input: Tensor, dim: int) -> Tensor:
        return torch.log_softmax(input, dim)

    def grad_input(grad: Tensor, output: Tensor, dim: int) -> Tensor:
        return grad - output.exp() * grad.sum(dim, keepdim=True)


def _dim_or_default(name: str, input: Tensor, dim: int | None, stacklevel: int) -> int:
    """``dim``, or if it is None, torch's deprecated default, with torch's warning."""
    return getattr(F, "_get_softmax_dim")(name, input.dim(), stacklevel + 1) if dim is None else dim  # noqa: B009


@with_torch_errors
def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """e^xᵢ / Σ e^x along ``dim``, as `torch.nn.functional.softmax`. Any shape; computed in `dtype` if given."""
    dim = _dim_or_default("softmax", input, dim, _stacklevel)
    return SoftmaxFunction.apply(input if dtype is None else input.to(dtype), dim)


@with_torch_errors
def softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """softmax(-x) along ``dim``, as `torch.nn.functional.softmin`. Any shape; computed in `dtype` if given."""
    if input.dtype == torch.bool:
        return F.softmin(input, 0)  # raises torch's error: torch negates before it converts to `dtype`
    dim = _dim_or_default("softmin", input, dim, _stacklevel)
    return SoftminFunction.apply(input if dtype is None else input.to(dtype), dim)


@with_torch_errors
def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """log softmax along ``dim``, as `torch.nn.functional.log_softmax`. Any shape; computed in `dtype` if given."""
    dim = _dim_or_default("log_softmax", input, dim, _stacklevel)
    return LogSoftmaxFunction.apply(input if dtype is None else input.to(dtype), dim)


for _function in (softmax, softmin, log_softmax):
    register(
        _function,
        sample_inputs=lambda t: [
            SampleInput(t(2, 3, 2), dim=1),
            SampleInput(t(), dim=0),
            SampleInput(t(5, 3), dim=1, dtype=torch.float64),
        ],
        benchmark_input=lambda t: SampleInput(t(1024, 1024), dim=-1),
    )


@with_torch_errors
def gumbel_softmax(
    logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    """softmax((x + G) / τ) with G from Gumbel's distribution, as `torch.nn.functional.gumbel_softmax`. Any shape.

    With ``hard`` the output is the one-hot vector of the largest element, and the gradient is that of the softmax.
    The random numbers are those that torch draws from the same state.
    """
    if eps != 1e-10:
        warnings.warn("`eps` is deprecated and has no effect.", stacklevel=3)
    noise = -torch.empty_like(logits, memory_format=torch.legacy_contiguous_format).exponential_().log()
    soft = softmax((logits + noise) / tau, dim)
    if not hard:
        return soft
    largest = soft.detach().argmax(dim, keepdim=True)
    one_hot = torch.zeros_like(soft, memory_format=torch.legacy_contiguous_format).scatter_(dim, largest, 1.0)
    return one_hot - soft.detach() + soft  # the value of one_hot, the gradient of soft


register(
    gumbel_softmax,
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), tau=0.7),
        SampleInput(t(2, 3, 2), hard=True, dim=1).with_surrogate_gradient(),
    ],
    benchmark_input=lambda t: SampleInput(t(1024, 1024)),
    random=True,
)
