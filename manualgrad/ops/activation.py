"""Activations: functions of one number, applied to each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import Pointwise, choose, drop_in, times, written
from manualgrad.registry import Call, register
from manualgrad.rule import Rule


def _own(input: Tensor, inplace: bool) -> Tensor:
    """What a rule that keeps its input may keep when the input is about to be overwritten."""
    return input.clone() if inplace else input


class ReLUFunction(Rule):
    r"""y = max(x, 0)      y′ = 1 where x > 0, that is where y ≠ 0, else 0      (at 0: 0, as torch)

    Chosen, not multiplied: √relu(x) has g = ∞ where y = 0, and must get 0 there.
    """

    def forward(input: Tensor) -> Tensor:
        return F.relu(input)

    def grad_input(grad: Tensor, output: Tensor) -> Tensor:
        return choose(output.bool(), grad)


@drop_in
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0), as `torch.nn.functional.relu`. Any shape."""
    return written(input, ReLUFunction.apply(input), inplace)


class ReLU(torch.nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace)


class LeakyReLUFunction(Rule):
    r"""y = x where x > 0, else s x      y′ = 1 where x > 0, else s"""

    def forward(input: Tensor, negative_slope: float) -> Tensor:
        return F.leaky_relu(input, negative_slope)

    def grad_input(grad: Tensor, input: Tensor, negative_slope: float) -> Tensor:
        return choose(input > 0, grad, grad * negative_slope)


@drop_in
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """x where x > 0, else s x, as `torch.nn.functional.leaky_relu`. Any shape."""
    return written(input, LeakyReLUFunction.apply(_own(input, inplace), negative_slope), inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


class SigmoidFunction(Pointwise):
    r"""y = 1 / (1 + e⁻ˣ)      y′ = y (1 - y)"""

    complex = True

    def forward(input: Tensor) -> Tensor:
        return input.sigmoid()

    def derivative(output: Tensor) -> Tensor:
        return times(1 - output, output)


@drop_in
def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + e⁻ˣ), as `torch.nn.functional.sigmoid`. Any shape."""
    return SigmoidFunction.apply(input)


class Sigmoid(torch.nn.Sigmoid):
    def forward(self, input: Tensor) -> Tensor:
        return sigmoid(input)


class TanhFunction(Pointwise):
    r"""y = tanh x      y′ = 1 - y²"""

    complex = True

    def forward(input: Tensor) -> Tensor:
        return input.tanh()

    def derivative(output: Tensor) -> Tensor:
        return 1 - output * output


@drop_in
def tanh(input: Tensor) -> Tensor:
    """tanh x, as `torch.nn.functional.tanh`. Any shape."""
    return TanhFunction.apply(input)


class Tanh(torch.nn.Tanh):
    def forward(self, input: Tensor) -> Tensor:
        return tanh(input)


class GELUFunction(Pointwise):
    r"""y = x Φ(x),  Φ the normal distribution function, φ = Φ′ = e^(-x²/2) / √2π      y′ = Φ(x) + x φ(x)

    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """

    def forward(input: Tensor) -> Tensor:
        return F.gelu(input)

    def derivative(input: Tensor) -> Tensor:
        cumulative = 0.5 * (1 + torch.erf(input * math.sqrt(0.5)))
        density = torch.exp(-0.5 * input * input) * (1 / math.sqrt(2 * math.pi))
        return cumulative + input * density


class GELUTanhFunction(Pointwise):
    r"""y = ½ x (1 + t),  t = tanh u,  u = √(2/π) (x + 0.044715 x³)

    dt = (1 - t²) du,  du = √(2/π) (1 + 3 · 0.044715 x²) dx      y′ = ½ (1 + t) + ½ x (1 - t²) u′
    """

    def forward(input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")

    def derivative(input: Tensor) -> Tensor:
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        square = input * input
        t = torch.tanh(scale * input * (1 + cubic * square))
        return 0.5 * (1 + t) + 0.5 * input * (1 - t * t) * (scale * (1 + 3 * cubic * square))


@drop_in
def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """x Φ(x), or with ``approximate="tanh"`` its approximation, as `torch.nn.functional.gelu`. Any shape."""
    if approximate == "none":
        return GELUFunction.apply(input)
    if approximate == "tanh":
        return GELUTanhFunction.apply(input)
    raise RuntimeError(f"approximate argument must be either none or tanh, but it is {approximate!r}")


class GELU(torch.nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate=self.approximate)


class SiLUFunction(Pointwise):
    r"""y = x σ(x)      y′ = σ + x σ (1 - σ) = σ (1 + x (1 - σ))"""

    def forward(input: Tensor) -> Tensor:
        return F.silu(input)

    def derivative(input: Tensor) -> Tensor:
        s = torch.sigmoid(input)
        return s * (1 + input * (1 - s))


@drop_in
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x σ(x), as `torch.nn.functional.silu`. Any shape."""
    return written(input, SiLUFunction.apply(_own(input, inplace)), inplace)


class SiLU(torch.nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return silu(input, self.inplace)


class SoftplusFunction(Pointwise):
    r"""y = (1/β) log(1 + e^(βx)),  and x itself where βx > threshold      y′ = σ(βx),  and 1"""

    autocast = {"cuda": "float32"}

    def forward(input: Tensor, beta: float, threshold: float) -> Tensor:
        return F.softplus(input, beta, threshold)

    def derivative(input: Tensor, beta: float, threshold: float) -> Tensor:
        scaled = input * beta
        return choose(scaled > threshold, torch.ones_like(scaled), torch.sigmoid(scaled))


@drop_in
def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """(1/β) log(1 + e^(βx)), as `torch.nn.functional.softplus`. Any shape."""
    return SoftplusFunction.apply(input, beta, threshold)


class Softplus(torch.nn.Softplus):
    def forward(self, input: Tensor) -> Tensor:
        return softplus(input, self.beta, self.threshold)


class ELUFunction(Pointwise):
    r"""y = x where x > 0, else α (eˣ - 1)      y′ = 1 where x > 0, else α eˣ

    e^min(x, 0), so that the branch not taken stays finite and so do its derivatives.
    """

    def forward(input: Tensor, alpha: float) -> Tensor:
        return F.elu(input, alpha)

    def derivative(input: Tensor, alpha: float) -> Tensor:
        return choose(input <= 0, alpha * input.clamp(max=0).exp(), torch.ones_like(input))


@drop_in
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x where x > 0, else α (eˣ - 1), as `torch.nn.functional.elu`. Any shape."""
    return written(input, ELUFunction.apply(_own(input, inplace), alpha), inplace)


class ELU(torch.nn.ELU):
    def forward(self, input: Tensor) -> Tensor:
        return elu(input, self.alpha, self.inplace)


class MishFunction(Pointwise):
    r"""y = x t,  t = tanh s,  s = log(1 + eˣ)

    ds = σ(x) dx,  dt = (1 - t²) ds      y′ = t + x σ(x) (1 - t²)

    Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", 2019.
    """

    def forward(input: Tensor) -> Tensor:
        return F.mish(input)

    def derivative(input: Tensor) -> Tensor:
        t = torch.tanh(F.softplus(input))
        return t + input * torch.sigmoid(input) * (1 - t * t)


@drop_in
def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """x tanh(log(1 + eˣ)), as `torch.nn.functional.mish`. Any shape."""
    return written(input, MishFunction.apply(_own(input, inplace)), inplace)


class Mish(torch.nn.Mish):
    def forward(self, input: Tensor) -> Tensor:
        return mish(input, self.inplace)


for _function, _module, _variants in (
    (relu, ReLU, [{}]),
    (leaky_relu, LeakyReLU, [{}, {"negative_slope": 0.3}, {"negative_slope": 0.0}]),
    (sigmoid, Sigmoid, [{}]),
    (tanh, Tanh, [{}]),
    (gelu, GELU, [{}, {"approximate": "tanh"}]),
    (silu, SiLU, [{}]),
    (softplus, Softplus, [{}, {"beta": 2.0, "threshold": 1.0}]),
    (elu, ELU, [{}, {"alpha": 0.5}]),
    (mish, Mish, [{}]),
):
    register(
        _function,
        _module,
        samples=lambda t, variants=_variants: [Call(t(5, 3), **v) for v in variants] + [Call(t())],
        big=lambda t: Call(t(1024, 1024)),
    )
