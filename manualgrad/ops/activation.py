"""Activations: functions of one number, applied to each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import Pointwise, choose, drop_in, scaled, times, written
from manualgrad.registry import Call, register
from manualgrad.rule import LOWER, Rule

_elu = torch._C._nn.elu  # F.elu with its two scales  # pyright: ignore[reportAttributeAccessIssue]
_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)  # α and scale


def _own(input: Tensor, inplace: bool) -> Tensor:
    """What a rule that keeps its input may keep when the input is about to be overwritten."""
    return input.clone() if inplace else input


class Gate(Rule):
    r"""y with y′ = 1 or 0      the rule gives ``passes``, a mask: where y′ = 1

    Chosen, not multiplied: √relu(x) has g = ∞ where y = 0, and must get 0 there.
    """

    def grad_input(grad: Tensor, passes: Tensor) -> Tensor:
        return choose(passes, grad)


class ReLUFunction(Gate):
    r"""y = max(x, 0)      y′ = 1 where x > 0, that is where y ≠ 0, else 0      (at 0: 0, as torch)"""

    def forward(input: Tensor) -> Tensor:
        return F.relu(input)

    def passes(output: Tensor) -> Tensor:
        return output.bool()


@drop_in
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0), as `torch.nn.functional.relu`. Any shape."""
    return written(input, ReLUFunction.apply(input), inplace)


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


class ELUFunction(Pointwise):
    r"""y = s x where x > 0, else s α (e^(κx) - 1)      y′ = s where x > 0, else s α κ e^(κx)

    e^min(κx, 0), so that the branch not taken stays finite and so do its derivatives.
    ELU has s = κ = 1, CELU α κ = 1, SELU an α and s that keep mean 0 and variance 1.

    Clevert, Unterthiner and Hochreiter, "Fast and Accurate Deep Network Learning by ELUs", 2016. Barron,
    "Continuously Differentiable Exponential Linear Units", 2017. Klambauer et al., "Self-Normalizing Neural
    Networks", 2017.
    """

    def forward(input: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
        return _elu(input, alpha, scale, input_scale)

    def derivative(input: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
        falling = (scaled(input, input_scale).clamp(max=0)).exp() * (scale * alpha * input_scale)
        return choose(input <= 0, falling, torch.full_like(input, scale))


@drop_in
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x where x > 0, else α (eˣ - 1), as `torch.nn.functional.elu`. Any shape."""
    return written(input, ELUFunction.apply(_own(input, inplace), alpha, 1.0, 1.0), inplace)


@drop_in
def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x where x > 0, else α (e^(x/α) - 1), as `torch.nn.functional.celu`. Any shape.

    Raises:
        RuntimeError: α is 0.
    """
    if alpha == 0:
        raise RuntimeError("ZeroDivisionError: alpha cannot be 0 for CELU")
    return written(input, ELUFunction.apply(_own(input, inplace), alpha, 1.0, 1 / alpha), inplace)


@drop_in
def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """ELU with the α and the scale that keep mean 0 and variance 1, as `torch.nn.functional.selu`. Any shape."""
    return written(input, ELUFunction.apply(_own(input, inplace), *_SELU, 1.0), inplace)


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


class HardtanhFunction(Gate):
    r"""y = x, clamped to [low, high]      y′ = 1 strictly between, else 0"""

    def forward(input: Tensor, low: float, high: float) -> Tensor:
        return F.hardtanh(input, low, high)

    def passes(input: Tensor, low: float, high: float) -> Tensor:
        return (input <= low).logical_or_(input >= high).logical_not_()  # nan passes


@drop_in
def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """x, clamped to [min_val, max_val], as `torch.nn.functional.hardtanh`. Any shape.

    Raises:
        ValueError: `min_val` is above `max_val`.
    """
    return written(input, HardtanhFunction.apply(_own(input, inplace), min_val, max_val), inplace)


@drop_in
def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """x, clamped to [0, 6], as `torch.nn.functional.relu6`. Any shape."""
    return hardtanh(input, 0.0, 6.0, inplace)


class ThresholdFunction(Gate):
    r"""y = x where x > threshold, else a constant      y′ = 1 where x > threshold, else 0"""

    def forward(input: Tensor, threshold: float, value: float) -> Tensor:
        return torch.threshold(input, threshold, value)

    def passes(input: Tensor, threshold: float) -> Tensor:
        return (input <= threshold).logical_not_()


@drop_in
def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """x where x > threshold, else `value`, as `torch.nn.functional.threshold`. Any shape."""
    return written(input, ThresholdFunction.apply(_own(input, inplace), threshold, value), inplace)


class HardshrinkFunction(Gate):
    r"""y = x where |x| > λ, else 0      y′ = 1 where |x| > λ, else 0"""

    def forward(input: Tensor, lambd: float) -> Tensor:
        return F.hardshrink(input, lambd)

    def passes(input: Tensor, lambd: float) -> Tensor:
        return (input.abs() <= lambd).logical_not_()


class SoftshrinkFunction(HardshrinkFunction):
    r"""y = x - λ sign x where |x| > λ, else 0      y′ as without the shift"""

    def forward(input: Tensor, lambd: float) -> Tensor:
        return F.softshrink(input, lambd)


@drop_in
def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """x where |x| > λ, else 0, as `torch.nn.functional.hardshrink`. Any shape."""
    return HardshrinkFunction.apply(input, lambd)


@drop_in
def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """x moved towards 0 by λ, as `torch.nn.functional.softshrink`. Any shape.

    Raises:
        RuntimeError: λ is negative.
    """
    return SoftshrinkFunction.apply(input, lambd)


class HardsigmoidFunction(Rule):
    r"""y = x/6 + 1/2, clamped to [0, 1]      y′ = 1/6 where |x| < 3, else 0

    Howard et al., "Searching for MobileNetV3", 2019, as the next.
    """

    def forward(input: Tensor) -> Tensor:
        return F.hardsigmoid(input)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        return choose(input.abs() < 3, grad * (1 / 6))


@drop_in
def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """x/6 + 1/2, clamped to [0, 1], as `torch.nn.functional.hardsigmoid`. Any shape."""
    return written(input, HardsigmoidFunction.apply(_own(input, inplace)), inplace)


class HardswishFunction(Rule):
    r"""y = x h,  h = x/6 + 1/2, clamped to [0, 1]      y′ = 0 where x ≤ -3, x/3 + 1/2 between, 1 where x ≥ 3"""

    def forward(input: Tensor) -> Tensor:
        return F.hardswish(input)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        return choose(input.abs() < 3, times(input / 3 + 0.5, grad), choose((input <= -3).logical_not_(), grad))


@drop_in
def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """x hardsigmoid(x), as `torch.nn.functional.hardswish`. Any shape."""
    return written(input, HardswishFunction.apply(_own(input, inplace)), inplace)


class PReLUFunction(Rule):
    r"""y = x where x > 0, else w x      w: a slope for each x

    ∂L/∂x = g where x > 0, else w g            ∂L/∂w = 0 where x > 0, else x g

    He, Zhang, Ren and Sun, "Delving Deep into Rectifiers", 2015.
    """

    autocast = LOWER

    def forward(input: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten._prelu_kernel(input, weight)

    def grad_input(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return choose(input > 0, grad, grad * weight)

    def grad_weight(grad: Tensor, input: Tensor) -> Tensor:
        return choose(input <= 0, grad * input)


@drop_in
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """x where x > 0, else w x, as `torch.nn.functional.prelu`.

    Shapes: input (N, C, ...), weight (C) or a single number.
    """
    if weight.dim() > 1 or (weight.numel() != 1 and (input.dim() < 2 or weight.numel() != input.shape[1])):
        return F.prelu(input, weight)  # raises what torch raises
    slopes = weight.reshape(-1, *[1] * (input.dim() - 2)) if weight.numel() > 1 else weight.reshape(())
    return PReLUFunction.apply(input, slopes.expand_as(input))


class RReLUFunction(Rule):
    r"""y = a x      a: 1 where x > 0, else drawn uniformly from [lower, upper)      ∂L/∂x = a g

    Xu, Wang, Chen and Li, "Empirical Evaluation of Rectified Activations in Convolutional Network", 2015.
    """

    statistics = ("slope",)

    def forward(input: Tensor, lower: float, upper: float) -> tuple[Tensor, Tensor]:
        slope = torch.zeros_like(input, memory_format=torch.contiguous_format)  # the kernel takes no other
        return torch.ops.aten.rrelu_with_noise_functional(input, slope, lower, upper, True)

    def grad_input(grad: Tensor, slope: Tensor) -> Tensor:
        return grad * slope


@drop_in
def rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    """x where x > 0, else a x with a drawn for each x (outside of training their mean), as
    `torch.nn.functional.rrelu`. Any shape.

    Draws the same slopes as torch does from the same random state.

    Raises:
        RuntimeError: `lower` is above `upper`.
        TypeError: training is not a bool.
    """
    if lower > upper:
        raise RuntimeError("Lower bound should be less than or equal to the upper bound")
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, but is {training!r}")
    if training:
        return written(input, RReLUFunction.apply(input, lower, upper), inplace)
    return leaky_relu(input, (lower + upper) / 2, inplace)


class GLUFunction(Rule):
    r"""y = a s,  s = σ(b)      a, b: the halves of x along an axis      ∂L/∂a = g s      ∂L/∂b = g a s (1 - s)

    Dauphin, Fan, Auli and Grangier, "Language Modeling with Gated Convolutional Networks", 2017.
    """

    def forward(input: Tensor, dim: int) -> Tensor:
        return F.glu(input, dim)

    def grad_input(grad: Tensor, input: Tensor, dim: int) -> Tensor:
        a, b = input.chunk(2, dim)
        s = b.sigmoid()
        grad_a = grad * s
        return torch.cat([grad_a, times(1 - s, grad_a) * a], dim)


@drop_in
def glu(input: Tensor, dim: int = -1) -> Tensor:
    """The first half of x along `dim` times σ of the second, as `torch.nn.functional.glu`.

    Raises:
        RuntimeError: the axis has no halves.
    """
    return GLUFunction.apply(input, dim)


class SoftsignFunction(Rule):
    r"""y = x r,  r = 1 / (1 + |x|)

    d|x| = ⟨sgn x, dx⟩,  dr = -r² d|x|      ∂L/∂x = r g - r² ⟨x, g⟩ sgn x      (for real x: r² g)
    """

    complex = True

    def forward(input: Tensor) -> Tensor:
        return F.softsign(input)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        r = 1 / (1 + input.abs())
        if not input.is_complex():
            return times(r * r, grad)
        return r * grad - (r * r * (input.conj() * grad).real) * input.sgn()


@drop_in
def softsign(input: Tensor) -> Tensor:
    """x / (1 + |x|), as `torch.nn.functional.softsign`. Any shape."""
    return SoftsignFunction.apply(input)


class TanhshrinkFunction(Pointwise):
    r"""y = x - tanh x      y′ = tanh² x"""

    complex = True

    def forward(input: Tensor) -> Tensor:
        return F.tanhshrink(input)

    def derivative(input: Tensor) -> Tensor:
        return input.tanh().square()


@drop_in
def tanhshrink(input: Tensor) -> Tensor:
    """x - tanh x, as `torch.nn.functional.tanhshrink`. Any shape."""
    return TanhshrinkFunction.apply(input)


class LogSigmoidFunction(Pointwise):
    r"""y = log σ(x)      y′ = 1 - σ(x) = σ(-x)"""

    def forward(input: Tensor) -> Tensor:
        return F.logsigmoid(input)

    def derivative(input: Tensor) -> Tensor:
        return torch.sigmoid(-input)


@drop_in
def logsigmoid(input: Tensor) -> Tensor:
    """log σ(x), as `torch.nn.functional.logsigmoid`. Any shape."""
    return LogSigmoidFunction.apply(input)


for _function, _variants in (
    (relu, [{}]),
    (leaky_relu, [{}, {"negative_slope": 0.3}, {"negative_slope": 0.0}]),
    (sigmoid, [{}]),
    (tanh, [{}]),
    (gelu, [{}, {"approximate": "tanh"}]),
    (silu, [{}]),
    (softplus, [{}, {"beta": 2.0, "threshold": 1.0}]),
    (elu, [{}, {"alpha": 0.5}]),
    (mish, [{}]),
    (celu, [{}, {"alpha": 0.5}]),
    (selu, [{}]),
    (hardtanh, [{}, {"min_val": -0.7, "max_val": 0.4}]),
    (relu6, [{}]),
    (threshold, [{"threshold": 0.2, "value": 7.0}]),
    (hardshrink, [{}, {"lambd": 0.2}]),
    (softshrink, [{}, {"lambd": 0.2}]),
    (hardswish, [{}]),
    (logsigmoid, [{}]),
):
    register(
        _function,
        samples=lambda t, variants=_variants: [Call(t(5, 3), **v) for v in variants] + [Call(t(), **variants[0])],
        big=lambda t, variants=_variants: Call(t(1024, 1024), **variants[0]),
    )

# One number would show where torch's formulas cancel (both at 1e-38 and 1e30) and ours do not.
for _function in (softsign, tanhshrink):
    register(_function, samples=lambda t: [Call(t(5, 3))], big=lambda t: Call(t(1024, 1024)))

register(
    hardsigmoid,
    samples=lambda t: [Call(t(5, 3)), Call(t())],
    big=lambda t: Call(t(1024, 1024)),
    special=False,  # torch's slope is 1/6 rounded to float32, in float64 too
)

register(
    prelu,
    samples=lambda t: [Call(t(5, 3), t(3)), Call(t(2, 3, 2, 2), t(1)), Call(t(4), t())],
    big=lambda t: Call(t(16, 64, 32, 32), t(64)),
)

register(
    rrelu,
    samples=lambda t: [
        Call(t(5, 3), training=True),
        Call(t(5, 3), 0.2, 0.6, training=True),
    ],
    big=lambda t: Call(t(1024, 1024), training=True),
    random=True,
    lacks={
        "vmap": "torch draws for x ≤ 0 alone, so what one example is given depends on those before it, and not "
        'even `randomness="same"` gives what a loop does'
    },
)

register(
    glu,
    samples=lambda t: [Call(t(5, 4)), Call(t(2, 6, 3), 1), Call(t(4), dim=0)],
    big=lambda t: Call(t(1024, 1024)),
)
