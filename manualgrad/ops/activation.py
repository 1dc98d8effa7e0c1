"""Activations: elementwise functions of one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.arithmetic import Elementwise, Pointwise
from manualgrad.ops.registration import implements, with_errors_of, with_torch_errors
from manualgrad.recomputation import find_usable_recipe, is_large
from manualgrad.registry import SampleInput, register
from manualgrad.rule import LOWER_PRECISION, Rule, replaces, with_reuse

_elu = torch._C._nn.elu  # F.elu with a scale and an input scale  # pyright: ignore[reportAttributeAccessIssue]
_elu_ = torch._C._nn.elu_  # pyright: ignore[reportAttributeAccessIssue]
LOG2_E = math.log2(math.e)
"""eˣ = 2^(x log₂ e). On the CPU torch's exp2 is faster than its exp."""

_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)  # α and scale


def _apply_activation(
    rule: type[Rule], input: Tensor, *settings: float, inplace: bool, from_output: type[Rule] | None = None
) -> Tensor:
    """Apply the rule. With `inplace` it overwrites the input.

    In place, the rule needs no memory if the input can be recomputed. Otherwise it saves the input or a mask, and
    `from_output` saves the output. That needs no memory if the next layer saves the output too.
    """
    if not inplace:
        return rule.apply(input, *settings)
    recomputable = not torch.compiler.is_compiling() and is_large(input) and find_usable_recipe(input) is not None
    return (rule if recomputable or from_output is None else from_output).apply_(input, *settings)


def _activation(name: str, rule: type[Rule]) -> Callable[[Tensor], Tensor]:
    """The function of this name that applies the rule."""

    def function(input: Tensor) -> Tensor:
        return rule.apply(input)

    return _with_name_and_doc(function, name, rule)


def _activation_inplace(name: str, rule: type[Rule]) -> Callable[..., Tensor]:
    """The function of this name that applies the rule, with the option `inplace`."""

    def function(input: Tensor, inplace: bool = False) -> Tensor:
        return _apply_activation(rule, input, inplace=inplace)

    return _with_name_and_doc(function, name, rule)


def _with_name_and_doc(function: Callable[..., Tensor], name: str, rule: type[Rule]) -> Callable[..., Tensor]:
    """The function with torch's errors. Its docstring is the rule's formula of y, which ends at the wide space."""
    formula = str(rule.__doc__).partition("\n")[0].partition("      ")[0]
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{formula}, as `torch.nn.functional.{name}`. Any shape."
    return with_torch_errors(function)


class SigmoidFunction(Pointwise):
    r"""y = σ(x) = 1 / (1 + e⁻ˣ)      y′ = y (1 - y)"""

    supports_complex = True

    def forward(input: Tensor) -> Tensor:
        return input.sigmoid()

    def forward_(input: Tensor) -> Tensor:
        return input.sigmoid_()

    def derivative(output: Tensor) -> Tensor:
        return output * (1 - output)


class TanhFunction(Pointwise):
    r"""y = tanh x      y′ = 1 - y²"""

    supports_complex = True

    def forward(input: Tensor) -> Tensor:
        return input.tanh()

    def forward_(input: Tensor) -> Tensor:
        return input.tanh_()

    def derivative(output: Tensor) -> Tensor:
        return 1 - output * output


class TanhshrinkFunction(Pointwise):
    r"""y = x - tanh x      y′ = tanh² x"""

    supports_complex = True

    def forward(input: Tensor) -> Tensor:
        return F.tanhshrink(input)

    def derivative(input: Tensor) -> Tensor:
        t = input.tanh()
        return t * t


class LogSigmoidFunction(Pointwise):
    r"""y = log σ(x)      y′ = 1 - σ(x) = σ(-x)"""

    def forward(input: Tensor) -> Tensor:
        return F.logsigmoid(input)

    def derivative(input: Tensor) -> Tensor:
        return torch.sigmoid(-input)


class SoftsignFunction(Pointwise):
    r"""y = x r,  r = 1 / (1 + |x|)      for real x: dr = -r² sgn(x) dx,  so  y′ = r - r² |x| = r²"""

    def forward(input: Tensor) -> Tensor:
        return F.softsign(input)

    def derivative(input: Tensor) -> Tensor:
        r = 1 / (1 + input.abs())
        return r * r


class ComplexSoftsignFunction(Elementwise):
    r"""y = x r,  r = 1 / (1 + |x|)

    d|x| = ⟨sgn x, dx⟩,  dr = -r² d|x|      ∂L/∂x = r g - r² ⟨x, g⟩ sgn x,   ⟨a, b⟩ = Re ā b
    """

    supports_complex = True

    def forward(input: Tensor) -> Tensor:
        return F.softsign(input)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        r = 1 / (1 + input.abs())
        return r * grad - r * r * (input.conj() * grad).real * input.sgn()


class SiLUFunction(Pointwise):
    r"""y = x s,  s = σ(x)      ds = s (1 - s) dx,  so  y′ = s (1 + x (1 - s))"""

    def forward(input: Tensor) -> Tensor:
        return F.silu(input)

    def forward_(input: Tensor) -> Tensor:
        return F.silu(input, inplace=True)

    def derivative(input: Tensor) -> Tensor:
        s = torch.sigmoid(input)
        return s * (1 + input * (1 - s))


class SwishFunction(Pointwise):
    r"""y = x s,  s = σ(βx)      ds = β s (1 - s) dx,  so  y′ = s (1 + βx (1 - s))

    Ramachandran, Zoph and Le, "Searching for Activation Functions", 2017. (`SiLUFunction` is β = 1.)
    """

    def forward(input: Tensor, beta: float) -> Tensor:
        return input * torch.sigmoid(beta * input)

    def derivative(input: Tensor, beta: float) -> Tensor:
        s = torch.sigmoid(beta * input)
        return s * (1 + beta * input * (1 - s))


class MishFunction(Pointwise):
    r"""y = x t,  t = tanh log(1 + eˣ)

    s = σ(x),  q = 1 - s = 1 / (1 + eˣ):   t = tanh(-log q) = (1 - q²) / (1 + q²) = s (1 + q) r,   r = 1 / (1 + q²)
    dq = -q s dx,  dt = -4 q r² dq = 4 s q² r² dx      y′ = t + x t′ = s r (1 + q + 4 x q² r)

    Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", 2019.
    """

    def forward(input: Tensor) -> Tensor:
        return F.mish(input)

    def forward_(input: Tensor) -> Tensor:
        return F.mish(input, inplace=True)

    def derivative(input: Tensor) -> Tensor:
        s = torch.sigmoid(input)
        q = 1 - s
        r = 1 / (1 + q * q)
        return s * r * (1 + q + 4 * input * (q * q * r))


sigmoid = _activation("sigmoid", SigmoidFunction)
tanh = _activation("tanh", TanhFunction)
tanhshrink = _activation("tanhshrink", TanhshrinkFunction)
logsigmoid = _activation("logsigmoid", LogSigmoidFunction)
silu = _activation_inplace("silu", SiLUFunction)
mish = _activation_inplace("mish", MishFunction)


@with_torch_errors
def softsign(input: Tensor) -> Tensor:
    """x / (1 + |x|), as `torch.nn.functional.softsign`. Any shape."""
    return (ComplexSoftsignFunction if input.is_complex() else SoftsignFunction).apply(input)


def normal_cdf(x: Tensor) -> Tensor:
    """Φ(x) = ½ (1 + erf(x / √2)), the normal distribution function."""
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


@replaces(normal_cdf)
def _normal_cdf_by_gelu(x: Tensor) -> Tensor:
    """Φ(x) = gelu(x) / x. On the CPU torch's gelu is faster than its erf."""
    if not x.is_cpu:
        return with_reuse(normal_cdf)(x)
    shifted = x + 1e-20  # avoids 0 / 0 at x = 0. At x = -1e-20 the nan becomes Φ = 0.5
    return F.gelu(shifted).div_(shifted).nan_to_num_(0.5)


def normal_density(x: Tensor) -> Tensor:
    """φ(x) = e^(-x²/2) / √2π"""
    return torch.exp(-0.5 * (x * x)) / math.sqrt(2 * math.pi)


@replaces(normal_density)
def _normal_density_by_exp2(x: Tensor) -> Tensor:
    return (x * x).mul_(-0.5 * LOG2_E).exp2_().mul_(1 / math.sqrt(2 * math.pi))


class GELUFunction(Pointwise):
    r"""y = x Φ(x),  Φ the normal distribution function, Φ′ = φ      y′ = Φ(x) + x φ(x)

    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """

    def forward(input: Tensor) -> Tensor:
        return F.gelu(input)

    def derivative(input: Tensor) -> Tensor:
        return normal_cdf(input) + input * normal_density(input)


class GELUTanhFunction(Pointwise):
    r"""y = ½ x (1 + tanh u) = x s,  s = σ(2u),  2u = x (2k + 2kc x²),  k = √(2/π),  c = 0.044715

    ds = s (1 - s) d(2u),  d(2u) = (2k + 6kc x²) dx      y′ = s (1 + x (1 - s) (2k + 6kc x²))
    """

    def forward(input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")

    def derivative(input: Tensor) -> Tensor:
        k, c, square = math.sqrt(2 / math.pi), 0.044715, input * input
        s = torch.sigmoid(input * (2 * k + 2 * k * c * square))
        return s * (1 + input * (1 - s) * (2 * k + 6 * k * c * square))


@with_torch_errors
def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """x Φ(x), or its approximation with ``approximate="tanh"``, as `torch.nn.functional.gelu`. Any shape."""
    if approximate == "none":
        return GELUFunction.apply(input)
    if approximate == "tanh":
        return GELUTanhFunction.apply(input)
    raise RuntimeError(f"approximate must be 'none' or 'tanh', but is {approximate!r}")


class SoftplusFunction(Pointwise):
    r"""y = (1/β) log(1 + e^(βx)),  or x where βx > threshold      y′ = σ(βx),  or 1"""

    autocast = {"cuda": "float32"}

    def forward(input: Tensor, beta: float, threshold: float) -> Tensor:
        return F.softplus(input, beta, threshold)

    def derivative(input: Tensor, beta: float, threshold: float) -> Tensor:
        z = beta * input
        return torch.where(z > threshold, 1, torch.sigmoid(z))


@with_torch_errors
def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """(1/β) log(1 + e^(βx)), as `torch.nn.functional.softplus`. Any shape."""
    return SoftplusFunction.apply(input, beta, threshold)


class ELUFunction(Pointwise):
    r"""y = s x where x > 0, else s α (e^(κx) - 1)      y′ = s where x > 0, else c e^(κx),  c = s α κ

    The exponent is κ min(x, 0), so that the unused branch and its derivatives stay finite.
    ELU: s = κ = 1.   CELU: s = α κ = 1.   SELU: κ = 1, and the α and s that keep mean 0 and variance 1.

    Clevert, Unterthiner and Hochreiter, "Fast and Accurate Deep Network Learning by ELUs", 2016. Barron,
    "Continuously Differentiable Exponential Linear Units", 2017. Klambauer et al., "Self-Normalizing Neural
    Networks", 2017.
    """

    def forward(input: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
        return _elu(input, alpha, scale, input_scale)

    def forward_(input: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
        return _elu_(input, alpha, scale, input_scale)

    def derivative(input: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
        c = scale * alpha * input_scale
        return elu_derivative(input, c, scale, input_scale)


def elu_derivative(x: Tensor, c: float, s: float, k: float) -> Tensor:
    """s where x > 0, else c e^(κx)"""
    return torch.where(x > 0, s, c * torch.exp(k * x.clamp(max=0)))


@replaces(elu_derivative)
def _elu_derivative_by_exp2(x: Tensor, c: float, s: float, k: float) -> Tensor:
    """c e^(κ min(x, 0)) + (s - c) [x > 0]"""
    exponential = x.clamp(max=0).mul_(k * LOG2_E).exp2_().mul_(c)
    if c == s:
        return exponential
    is_positive = torch.gt(x, 0, out=torch.empty_like(x))  # 0 or 1
    return is_positive.mul_(s - c).add_(exponential)


class ELUFromOutputFunction(ELUFunction):
    r"""The derivative of ELU from y, for α κ ≥ 0: y > 0 exactly where x > 0, else s α e^(κx) = y + s α

    y′ = s where y > 0, else κ y + c
    """

    def derivative(output: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
        c = scale * alpha * input_scale
        return torch.where(output > 0, scale, input_scale * output + c)


def _apply_elu(input: Tensor, alpha: float, scale: float, input_scale: float, inplace: bool) -> Tensor:
    from_output = ELUFromOutputFunction if alpha * input_scale >= 0 else None
    return _apply_activation(
        ELUFunction, input, alpha, scale, input_scale, inplace=inplace, from_output=from_output
    )


@with_torch_errors
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x where x > 0, else α (eˣ - 1), as `torch.nn.functional.elu`. Any shape."""
    return _apply_elu(input, alpha, 1.0, 1.0, inplace)


@with_torch_errors
def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x where x > 0, else α (e^(x/α) - 1), as `torch.nn.functional.celu`. Any shape.

    Raises:
        RuntimeError: α is 0.
    """
    if alpha == 0:
        raise RuntimeError("ZeroDivisionError: alpha cannot be 0 for CELU")
    return _apply_elu(input, alpha, 1.0, 1 / alpha, inplace)


@with_torch_errors
def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """ELU with the α and scale that keep mean 0 and variance 1, as `torch.nn.functional.selu`. Any shape."""
    return _apply_elu(input, *_SELU, 1.0, inplace)


class LeakyReLUFunction(Rule):
    r"""y = x where x > 0, else s x      ∂L/∂x = g where x > 0, else s g"""

    save_instead = ("positive",)
    recomputable = True

    def forward(input: Tensor, negative_slope: float) -> Tensor:
        return F.leaky_relu(input, negative_slope)

    def forward_(input: Tensor, negative_slope: float) -> Tensor:
        return F.leaky_relu(input, negative_slope, inplace=True)

    def positive(input: Tensor) -> Tensor:
        return input > 0

    def grad_input(grad: Tensor, positive: Tensor, negative_slope: float) -> Tensor:
        return torch.where(positive, grad, grad * negative_slope)


class LeakyReLUFromOutputFunction(LeakyReLUFunction):
    r"""The derivative of leaky ReLU from y, for s ≥ 0: y > 0 exactly where x > 0"""

    save_instead = ()

    def positive(output: Tensor) -> Tensor:
        return output > 0


@with_torch_errors
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """x where x > 0, else s x, as `torch.nn.functional.leaky_relu`. Any shape."""
    from_output = LeakyReLUFromOutputFunction if negative_slope >= 0 else None
    return _apply_activation(LeakyReLUFunction, input, negative_slope, inplace=inplace, from_output=from_output)


class PReLUFunction(Rule):
    r"""y = x where x > 0, else w x      w: a slope for each x

    ∂L/∂x = g where x > 0, else w g            ∂L/∂w = 0 where x > 0, else x g

    He, Zhang, Ren and Sun, "Delving Deep into Rectifiers", 2015.
    """

    autocast = LOWER_PRECISION
    recomputable = True

    def forward(input: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten._prelu_kernel(input, weight)

    def grad_input(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return torch.where(input > 0, grad, grad * weight)

    def grad_weight(grad: Tensor, input: Tensor) -> Tensor:
        return torch.where(input > 0, 0, grad * input)


@with_torch_errors
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """x where x > 0, else w x, as `torch.nn.functional.prelu`.

    Shapes: input (N, C, ...), weight (C) or a single number.
    """
    if weight.dim() > 1 or (weight.numel() != 1 and (input.dim() < 2 or weight.numel() != input.shape[1])):
        return F.prelu(input, weight)  # raises torch's error
    slopes = weight.reshape(-1, *[1] * (input.dim() - 2)) if weight.numel() > 1 else weight.reshape(())
    return PReLUFunction.apply(input, slopes.expand_as(input))


class RReLUFunction(Rule):
    r"""y = a x      a: 1 where x > 0, else drawn uniformly from [lower, upper)      ∂L/∂x = a g

    Xu, Wang, Chen and Li, "Empirical Evaluation of Rectified Activations in Convolutional Network", 2015.
    """

    statistics = ("slope",)

    def forward(input: Tensor, lower: float, upper: float) -> tuple[Tensor, Tensor]:
        return _rrelu_forward(input, lower, upper)

    def forward_(input: Tensor, lower: float, upper: float) -> tuple[Tensor, Tensor]:
        output, slope = _rrelu_forward(input, lower, upper)
        return input.copy_(output), slope

    def grad_input(grad: Tensor, slope: Tensor) -> Tensor:
        return grad * slope


def _rrelu_forward(input: Tensor, lower: float, upper: float) -> tuple[Tensor, Tensor]:
    slope = torch.zeros_like(input, memory_format=torch.contiguous_format)  # the kernel assumes it
    return torch.ops.aten.rrelu_with_noise_functional(input, slope, lower, upper, True)


@with_torch_errors
def rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    """x where x > 0, else a x, as `torch.nn.functional.rrelu`. Any shape.

    In training a is random for each x, and equal to torch's for the same random state. Otherwise a is the mean
    of the bounds.

    Raises:
        RuntimeError: `lower` is above `upper`.
        TypeError: `training` is not a bool.
    """
    if lower > upper:
        raise RuntimeError("Lower bound should be less than or equal to the upper bound")
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, but is {training!r}")
    if training:
        return _apply_activation(RReLUFunction, input, lower, upper, inplace=inplace)
    return leaky_relu(input, (lower + upper) / 2, inplace)


class ZeroOneDerivative(Rule):
    r"""y′ = 0 or 1      the rule defines ``is_zero``: where y′ = 0

    ∂L/∂x = 0 where y′ = 0, else g.  The product g y′ would be nan where g = ∞: for √relu6(x), at x < 0.
    Where x is nan, y′ = 1.
    """

    save_instead = ("is_zero",)
    recomputable = True

    def grad_input(grad: Tensor, is_zero: Tensor) -> Tensor:
        return torch.where(is_zero, 0, grad)


class ReLUFunction(Rule):
    r"""y = max(x, 0)      ∂L/∂x = g where y ≠ 0, else 0      (at x = 0: 0, as torch; where x is nan: g)"""

    save_instead = ("positive",)
    recomputable = True

    def forward(input: Tensor) -> Tensor:
        return F.relu(input)

    def forward_(input: Tensor) -> Tensor:
        return F.relu(input, inplace=True)

    def positive(output: Tensor) -> Tensor:
        return output.bool()  # true for nan

    def grad_input(grad: Tensor, positive: Tensor) -> Tensor:
        return torch.where(positive, grad, 0)


class ReLUFromOutputFunction(ReLUFunction):
    """ReLU that saves y, which the next layer saves too."""

    save_instead = ()


class ThresholdFunction(ZeroOneDerivative):
    r"""y = x where x > threshold, else a constant"""

    def forward(input: Tensor, threshold: float, value: float) -> Tensor:
        return torch.threshold(input, threshold, value)

    def forward_(input: Tensor, threshold: float, value: float) -> Tensor:
        return torch.threshold_(input, threshold, value)

    def is_zero(input: Tensor, threshold: float) -> Tensor:
        return input <= threshold


class HardtanhFunction(ZeroOneDerivative):
    r"""y = x, clamped to [low, high]      (at low and high: y′ = 0)"""

    def forward(input: Tensor, low: float, high: float) -> Tensor:
        return F.hardtanh(input, low, high)

    def forward_(input: Tensor, low: float, high: float) -> Tensor:
        return F.hardtanh(input, low, high, inplace=True)

    def is_zero(input: Tensor, low: float, high: float) -> Tensor:
        return (input <= low) | (input >= high)


class HardshrinkFunction(ZeroOneDerivative):
    r"""y = x where |x| > λ, else 0"""

    def forward(input: Tensor, lambd: float) -> Tensor:
        return F.hardshrink(input, lambd)

    def is_zero(input: Tensor, lambd: float) -> Tensor:
        return input.abs() <= lambd


class SoftshrinkFunction(HardshrinkFunction):
    r"""y = x - λ sign x where |x| > λ, else 0"""

    def forward(input: Tensor, lambd: float) -> Tensor:
        return F.softshrink(input, lambd)


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return _apply_activation(ReLUFunction, input, inplace=inplace, from_output=ReLUFromOutputFunction)


relu = _with_name_and_doc(_relu, "relu", ReLUFunction)


@partial(with_errors_of, partial(F.relu, inplace=True))
def relu_with_mask(input: Tensor) -> Tensor:
    """`relu` in place that saves a bit mask instead of the output. It suits a next layer that does not save it."""
    return _apply_activation(ReLUFunction, input, inplace=True)


@partial(with_errors_of, partial(F.leaky_relu, inplace=True))
def leaky_relu_with_mask(input: Tensor, negative_slope: float) -> Tensor:
    """`leaky_relu` in place that saves a bit mask, as `relu_with_mask`."""
    return _apply_activation(LeakyReLUFunction, input, negative_slope, inplace=True)


@with_torch_errors
def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """x where x > threshold, else `value`, as `torch.nn.functional.threshold`. Any shape."""
    return _apply_activation(ThresholdFunction, input, threshold, value, inplace=inplace)


@with_torch_errors
def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """x, clamped to [min_val, max_val], as `torch.nn.functional.hardtanh`. Any shape.

    Raises:
        ValueError: `min_val` is above `max_val`.
    """
    return _apply_activation(HardtanhFunction, input, min_val, max_val, inplace=inplace)


@with_torch_errors
def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """x, clamped to [0, 6], as `torch.nn.functional.relu6`. Any shape."""
    return hardtanh(input, 0.0, 6.0, inplace)


@with_torch_errors
def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """x where |x| > λ, else 0, as `torch.nn.functional.hardshrink`. Any shape."""
    return HardshrinkFunction.apply(input, lambd)


@with_torch_errors
def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """x, shrunk towards 0 by λ, as `torch.nn.functional.softshrink`. Any shape.

    Raises:
        RuntimeError: λ is negative.
    """
    return SoftshrinkFunction.apply(input, lambd)


class HardsigmoidFunction(Elementwise):
    r"""y = x/6 + 1/2, clamped to [0, 1]      ∂L/∂x = g/6 where |x| < 3, else 0

    Howard et al., "Searching for MobileNetV3", 2019. (Hardswish too.)
    """

    save_instead = ("rising",)

    def forward(input: Tensor) -> Tensor:
        return F.hardsigmoid(input)

    def forward_(input: Tensor) -> Tensor:
        return F.hardsigmoid(input, inplace=True)

    def rising(input: Tensor) -> Tensor:
        return input.abs() < 3

    def grad_input(grad: Tensor, rising: Tensor) -> Tensor:
        return torch.where(rising, grad, 0) * (1 / 6)


class HardswishFunction(Elementwise):
    r"""y = x h,  h = x/6 + 1/2, clamped to [0, 1]      y′ = 0 where x ≤ -3, else x/3 + 1/2 where x < 3, else 1"""

    def forward(input: Tensor) -> Tensor:
        return F.hardswish(input)

    def forward_(input: Tensor) -> Tensor:
        return F.hardswish(input, inplace=True)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        return torch.where(input <= -3, 0, grad * hardswish_derivative(input))


def hardswish_derivative(x: Tensor) -> Tensor:
    """x/3 + 1/2 where x < 3, else 1      (for x > -3)"""
    return torch.where(x < 3, x / 3 + 0.5, 1)


@replaces(hardswish_derivative)
def _hardswish_derivative_by_threshold(x: Tensor) -> Tensor:
    """-z/3 + 1/2,  z = -x where x < 3, else -1.5 (then the result is 1). torch's threshold is fast on the CPU."""
    return torch.threshold_(-x, -3, -1.5).nan_to_num_(-1.5).mul_(-1 / 3).add_(0.5)


hardsigmoid = _activation_inplace("hardsigmoid", HardsigmoidFunction)
hardswish = _activation_inplace("hardswish", HardswishFunction)


class GLUFunction(Rule):
    r"""y = a s,  s = σ(b)      a, b: the halves of x along an axis      ∂L/∂a = g s      ∂L/∂b = g a s (1 - s)

    Dauphin, Fan, Auli and Grangier, "Language Modeling with Gated Convolutional Networks", 2017.
    """

    recomputable = True

    def forward(input: Tensor, dim: int) -> Tensor:
        return F.glu(input, dim)

    def grad_input(grad: Tensor, input: Tensor, dim: int) -> Tensor:
        a, b = input.chunk(2, dim)
        s = b.sigmoid()
        grad_a = grad * s
        return torch.cat([grad_a, grad_a * a * (1 - s)], dim)


@with_torch_errors
def glu(input: Tensor, dim: int = -1) -> Tensor:
    """The first half of x along `dim` times σ of the second half, as `torch.nn.functional.glu`.

    Raises:
        RuntimeError: the size along `dim` is odd.
    """
    return GLUFunction.apply(input, dim)


for _function, _variants in (
    (relu, [{}]),
    (leaky_relu, [{}, {"negative_slope": 0.0}]),
    (gelu, [{}, {"approximate": "tanh"}]),
    (silu, [{}]),
    (softplus, [{}, {"beta": 2.0, "threshold": 1.0}]),
    (elu, [{}, {"alpha": 0.5}]),
    (mish, [{}]),
    (celu, [{"alpha": 0.5}]),
    (selu, [{}]),
    (hardtanh, [{}, {"min_val": -0.7, "max_val": 0.4}]),
    (relu6, [{}]),
    (threshold, [{"threshold": 0.2, "value": 7.0}]),
    (hardshrink, [{}]),
    (softshrink, [{"lambd": 0.2}]),
    (hardswish, [{}]),
    (logsigmoid, [{}]),
    (softsign, [{}]),
    (tanhshrink, [{}]),
):
    register(
        _function,
        # six elements are too few for torch's vectorized kernels, which treat nan differently
        sample_inputs=lambda t, variants=_variants: [SampleInput(t(2, 3), **variant) for variant in variants],
        benchmark_input=lambda t, variants=_variants: SampleInput(t(1024, 1024), **variants[0]),
    )

implements(torch.sigmoid_)(SigmoidFunction.apply_)
implements(torch.tanh_)(TanhFunction.apply_)

for _function, _kernel in ((sigmoid, torch.sigmoid), (tanh, torch.tanh)):
    implements(_kernel)(_function)
    register(
        _function,
        sample_inputs=lambda t: [SampleInput(t(5, 3)), SampleInput(t())],
        benchmark_input=lambda t: SampleInput(t(1024, 1024)),
    )

register(
    hardsigmoid,
    sample_inputs=lambda t: [SampleInput(t(2, 3))],
    benchmark_input=lambda t: SampleInput(t(1024, 1024)),
    supports_special_values=False,  # torch's slope in float64 is 1/6 rounded to float32
)

register(
    prelu,
    sample_inputs=lambda t: [SampleInput(t(5, 3), t(3)), SampleInput(t(2, 3, 2, 2), t(1)), SampleInput(t(4), t())],
    benchmark_input=lambda t: SampleInput(t(16, 64, 32, 32), t(64)),
)

register(
    rrelu,
    sample_inputs=lambda t: [SampleInput(t(5, 3), training=True), SampleInput(t(5, 3), 0.2, 0.6, training=True)],
    benchmark_input=lambda t: SampleInput(t(1024, 1024), training=True),
    random=True,
    expected_failures={
        "vmap": "torch draws random numbers only for x ≤ 0, so the numbers of an example depend on the examples "
        'before it, and `randomness="same"` differs from a loop'
    },
)

register(
    glu,
    sample_inputs=lambda t: [SampleInput(t(5, 4)), SampleInput(t(2, 6, 3), 1)],
    benchmark_input=lambda t: SampleInput(t(1024, 1024)),
)
