"""Operators of whole-model programs on each element: sums, products, powers, functions of one number.

Tensors broadcast. The gradient of a tensor that was repeated is the sum over its repetitions (`sum_to_shape`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manualgrad.ops.arithmetic import Pointwise, PowerFunction
from manualgrad.ops.shapes import Shape, shape_of, sum_to_shape
from manualgrad.ops.views import to_dtype
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule

Number = int | float | complex


class AddFunction(Rule):
    r"""y = a + b      ∂L/∂a = g      ∂L/∂b = g"""

    supports_complex = True

    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor:
        return a + b

    def grad_a(grad: Tensor, a_shape: Shape) -> Tensor:
        return sum_to_shape(grad, a_shape)

    def grad_b(grad: Tensor, b_shape: Shape) -> Tensor:
        return sum_to_shape(grad, b_shape)


class SubtractFunction(AddFunction):
    r"""y = a - b      ∂L/∂a = g      ∂L/∂b = -g"""

    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor:
        return a - b

    def grad_b(grad: Tensor, b_shape: Shape) -> Tensor:
        return sum_to_shape(-grad, b_shape)


class AddNumberFunction(Rule):
    r"""y = x + c      ∂L/∂x = g      c: a number"""

    supports_complex = True

    def forward(input: Tensor, c: Number) -> Tensor:
        return input + c

    def grad_input(grad: Tensor) -> Tensor:
        return grad


class SubtractNumberFunction(AddNumberFunction):
    r"""y = x - c      ∂L/∂x = g"""

    def forward(input: Tensor, c: Number) -> Tensor:
        return input - c


class SubtractFromNumberFunction(AddNumberFunction):
    r"""y = c - x      ∂L/∂x = -g"""

    def forward(input: Tensor, c: Number) -> Tensor:
        return c - input

    def grad_input(grad: Tensor) -> Tensor:
        return -grad


class ProductFunction(Rule):
    r"""y = a b      ∂L/∂a = g b      ∂L/∂b = g a"""

    supports_complex = True

    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor:
        return a * b

    def grad_a(grad: Tensor, b: Tensor, a_shape: Shape) -> Tensor:
        return sum_to_shape(grad * b.conj(), a_shape)

    def grad_b(grad: Tensor, a: Tensor, b_shape: Shape) -> Tensor:
        return sum_to_shape(grad * a.conj(), b_shape)


class ScaleFunction(Rule):
    r"""y = c x      ∂L/∂x = c g      c: a number"""

    def forward(input: Tensor, c: float) -> Tensor:
        return input * c

    def grad_input(grad: Tensor, c: float) -> Tensor:
        return grad * c


class QuotientFunction(Rule):
    r"""y = a / b      dy = da / b - a db / b²      ∂L/∂a = g / b      ∂L/∂b = -g a / b²"""

    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor:
        return a / b

    def grad_a(grad: Tensor, b: Tensor, a_shape: Shape) -> Tensor:
        return sum_to_shape(grad / b, a_shape)

    def grad_b(grad: Tensor, a: Tensor, b: Tensor, b_shape: Shape) -> Tensor:
        return sum_to_shape(-grad * a / (b * b), b_shape)


class DivideByNumberFunction(Rule):
    r"""y = x / c      ∂L/∂x = g / c      c: a number"""

    def forward(input: Tensor, c: float) -> Tensor:
        return input / c

    def grad_input(grad: Tensor, c: float) -> Tensor:
        return grad / c


class NegativeFunction(Rule):
    r"""y = -x      ∂L/∂x = -g"""

    supports_complex = True

    def forward(input: Tensor) -> Tensor:
        return -input

    def grad_input(grad: Tensor) -> Tensor:
        return -grad


def add(input: Tensor | Number, other: Tensor | Number, *, alpha: Number = 1) -> Tensor:
    """`torch.add`: input + alpha other."""
    if alpha != 1:
        other = mul(other, alpha) if isinstance(other, Tensor) else other * alpha
    if not isinstance(input, Tensor):
        input, other = other, input
    assert isinstance(input, Tensor)
    if not isinstance(other, Tensor):
        return AddNumberFunction.apply(input, other)
    return AddFunction.apply(*_same_dtype(input, other), tuple(input.shape), tuple(other.shape))


def sub(input: Tensor | Number, other: Tensor | Number, *, alpha: Number = 1) -> Tensor:
    """`torch.sub`: input - alpha other."""
    if alpha != 1:
        other = mul(other, alpha) if isinstance(other, Tensor) else other * alpha
    if not isinstance(input, Tensor):
        return SubtractFromNumberFunction.apply(other, input)
    if not isinstance(other, Tensor):
        return SubtractNumberFunction.apply(input, other)
    return SubtractFunction.apply(*_same_dtype(input, other), tuple(input.shape), tuple(other.shape))


def rsub(input: Tensor, other: Tensor | Number, *, alpha: Number = 1) -> Tensor:
    """`torch.rsub`: other - alpha input."""
    return sub(other, input, alpha=alpha)


def mul(input: Tensor | Number, other: Tensor | Number) -> Tensor:
    """`torch.mul`."""
    if not isinstance(input, Tensor):
        input, other = other, input
    assert isinstance(input, Tensor)
    if not isinstance(other, Tensor):
        return ScaleFunction.apply(input, other)
    return ProductFunction.apply(*_same_dtype(input, other), tuple(input.shape), tuple(other.shape))


def div(input: Tensor | Number, other: Tensor | Number, *, rounding_mode: str | None = None) -> Tensor:
    """`torch.div`. With a rounding mode the gradient is 0, and torch's own function is called."""
    if rounding_mode is not None:
        return torch.div(input, other, rounding_mode=rounding_mode)  # type: ignore[call-overload]
    if not isinstance(other, Tensor):
        return DivideByNumberFunction.apply(input, other)
    if not isinstance(input, Tensor):
        return mul(ReciprocalFunction.apply(other), input)
    return QuotientFunction.apply(*_same_dtype(input, other), tuple(input.shape), tuple(other.shape))


def rdiv(input: Tensor, other: Number) -> Tensor:
    """``other / input``."""
    return mul(ReciprocalFunction.apply(input), other)


def neg(input: Tensor) -> Tensor:
    """`torch.neg`."""
    return NegativeFunction.apply(input)


def _same_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the result, so that their gradients are cast back to their own."""
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.result_type(a, b)
    return (a if a.dtype == dtype else to_dtype(a, dtype)), (b if b.dtype == dtype else to_dtype(b, dtype))


def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """`torch.addcmul`: input + value tensor1 tensor2."""
    return add(input, mul(tensor1, tensor2), alpha=value)


def addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """`torch.addcdiv`: input + value tensor1 / tensor2."""
    return add(input, div(tensor1, tensor2), alpha=value)


def lerp(input: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    """`torch.lerp`: input + weight (end - input)."""
    return add(input, mul(sub(end, input), weight))


# --- powers ---


class PowerOfTensorsFunction(Rule):
    r"""y = aᵇ = e^(b ln a)      ∂L/∂a = g b aᵇ⁻¹      ∂L/∂b = g y ln a      (0 where y = 0)"""

    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor:
        return a**b

    def grad_a(grad: Tensor, a: Tensor, b: Tensor, a_shape: Shape) -> Tensor:
        return sum_to_shape(grad * torch.where(b == 0, 0, b * a ** (b - 1)), a_shape)

    def grad_b(grad: Tensor, a: Tensor, b: Tensor, b_shape: Shape) -> Tensor:
        power = a**b
        return sum_to_shape(grad * torch.where(power == 0, 0, power * torch.log(a)), b_shape)


def pow(input: Tensor | Number, exponent: Tensor | Number) -> Tensor:
    """`torch.pow`."""
    if isinstance(input, Tensor) and not isinstance(exponent, Tensor):
        if exponent == 2:
            return SquareFunction.apply(input)
        return PowerFunction.apply(input, exponent)
    a, b = (x if isinstance(x, Tensor) else torch.tensor(x) for x in (input, exponent))
    return PowerOfTensorsFunction.apply(*_same_dtype(a, b), tuple(a.shape), tuple(b.shape))


# --- functions of one number ---


class ReciprocalFunction(Pointwise):
    r"""y = 1 / x      y′ = -y²"""

    def forward(input: Tensor) -> Tensor:
        return torch.reciprocal(input)

    def derivative(output: Tensor) -> Tensor:
        return -output * output


class ExpFunction(Pointwise):
    r"""y = eˣ      y′ = y"""

    def forward(input: Tensor) -> Tensor:
        return torch.exp(input)

    def derivative(output: Tensor) -> Tensor:
        return output


class Expm1Function(Pointwise):
    r"""y = eˣ - 1      y′ = y + 1"""

    def forward(input: Tensor) -> Tensor:
        return torch.expm1(input)

    def derivative(output: Tensor) -> Tensor:
        return output + 1


class LogFunction(Pointwise):
    r"""y = ln x      y′ = 1 / x"""

    def forward(input: Tensor) -> Tensor:
        return torch.log(input)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        return grad / input


class Log1pFunction(Pointwise):
    r"""y = ln (1 + x)      y′ = 1 / (1 + x)"""

    def forward(input: Tensor) -> Tensor:
        return torch.log1p(input)

    def grad_input(grad: Tensor, input: Tensor) -> Tensor:
        return grad / (input + 1)


class SqrtFunction(Pointwise):
    r"""y = √x      y′ = 1 / (2 y)"""

    def forward(input: Tensor) -> Tensor:
        return torch.sqrt(input)

    def grad_input(grad: Tensor, output: Tensor) -> Tensor:
        return grad / (2 * output)


class RsqrtFunction(Pointwise):
    r"""y = x^-½      y′ = -½ x^-3/2 = -½ y³"""

    def forward(input: Tensor) -> Tensor:
        return torch.rsqrt(input)

    def derivative(output: Tensor) -> Tensor:
        return -0.5 * output**3


class SquareFunction(Pointwise):
    r"""y = x²      y′ = 2 x"""

    def forward(input: Tensor) -> Tensor:
        return torch.square(input)

    def derivative(input: Tensor) -> Tensor:
        return 2 * input


class SinFunction(Pointwise):
    r"""y = sin x      y′ = cos x"""

    def forward(input: Tensor) -> Tensor:
        return torch.sin(input)

    def derivative(input: Tensor) -> Tensor:
        return torch.cos(input)


class CosFunction(Pointwise):
    r"""y = cos x      y′ = -sin x"""

    def forward(input: Tensor) -> Tensor:
        return torch.cos(input)

    def derivative(input: Tensor) -> Tensor:
        return -torch.sin(input)


class ErfFunction(Pointwise):
    r"""y = 2/√π ∫₀ˣ e^(-u²) du      y′ = 2/√π e^(-x²)"""

    def forward(input: Tensor) -> Tensor:
        return torch.erf(input)

    def derivative(input: Tensor) -> Tensor:
        return 2 / math.sqrt(math.pi) * torch.exp(-input * input)


def _function(name: str, rule: type[Rule]) -> Callable[[Tensor], Tensor]:
    def function(input: Tensor) -> Tensor:
        return rule.apply(input)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"`torch.{name}`."
    return function


# --- choices ---


class SelectWhereFunction(Rule):
    r"""y = a where m, else b      ∂L/∂a = g where m, else 0      ∂L/∂b = 0 where m, else g"""

    supports_complex = True

    def forward(mask: Tensor, a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor:
        return torch.where(mask, a, b)

    def grad_a(grad: Tensor, mask: Tensor, a_shape: Shape) -> Tensor:
        return sum_to_shape(torch.where(mask, grad, 0), a_shape)

    def grad_b(grad: Tensor, mask: Tensor, b_shape: Shape) -> Tensor:
        return sum_to_shape(torch.where(mask, 0, grad), b_shape)


class MaskedFillFunction(Rule):
    r"""y = c where m, else x      ∂L/∂x = 0 where m, else g      c: a number"""

    supports_complex = True

    def forward(input: Tensor, mask: Tensor, value: Number, input_shape: Shape) -> Tensor:
        return input.masked_fill(mask, value)

    def grad_input(grad: Tensor, mask: Tensor, input_shape: Shape) -> Tensor:
        return sum_to_shape(torch.where(mask, 0, grad), input_shape)


class MaximumFunction(Rule):
    r"""y = max(a, b)      ∂L/∂a = g where a > b,  g/2 where a = b,  else 0      ∂L/∂b likewise"""

    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor:
        return torch.maximum(a, b)

    def share(a: Tensor, b: Tensor) -> Tensor:
        """The part of g that a receives: 1, ½ or 0"""
        return ((a > b).to(a.dtype) + (a >= b).to(a.dtype)) / 2

    def grad_a(grad: Tensor, share: Tensor, a_shape: Shape) -> Tensor:
        return sum_to_shape(grad * share, a_shape)

    def grad_b(grad: Tensor, share: Tensor, b_shape: Shape) -> Tensor:
        return sum_to_shape(grad * (1 - share), b_shape)


class MinimumOfTensorsFunction(MaximumFunction):
    r"""y = min(a, b)      ∂L/∂a = g where a < b,  g/2 where a = b,  else 0      ∂L/∂b likewise"""

    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor:
        return torch.minimum(a, b)

    def share(a: Tensor, b: Tensor) -> Tensor:
        """The part of g that a receives: 1, ½ or 0"""
        return ((a < b).to(a.dtype) + (a <= b).to(a.dtype)) / 2


class ClampFunction(Pointwise):
    r"""y = x, limited to [l, u]      y′ = 1 where l ≤ x ≤ u, else 0      (None: no limit)"""

    def forward(input: Tensor, lower: float | None, upper: float | None) -> Tensor:
        return torch.clamp(input, lower, upper)

    def derivative(input: Tensor, lower: float | None, upper: float | None) -> Tensor:
        inside = torch.ones_like(input) if lower is None else (input >= lower).to(input.dtype)
        return inside if upper is None else inside * (input <= upper).to(input.dtype)


def where(condition: Tensor, input: Tensor | Number, other: Tensor | Number) -> Tensor:
    """`torch.where`."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return SelectWhereFunction.apply(condition, input, other, shape_of(input), shape_of(other))
    return SelectWhereFunction.apply(condition, *_same_dtype(input, other), tuple(input.shape), tuple(other.shape))


def masked_fill(input: Tensor, mask: Tensor, value: Tensor | Number) -> Tensor:
    """`torch.masked_fill`."""
    if isinstance(value, Tensor):
        return where(mask, value, input)
    return MaskedFillFunction.apply(input, mask, value, tuple(input.shape))


def maximum(input: Tensor, other: Tensor) -> Tensor:
    """`torch.maximum`."""
    return MaximumFunction.apply(*_same_dtype(input, other), tuple(input.shape), tuple(other.shape))


def minimum(input: Tensor, other: Tensor) -> Tensor:
    """`torch.minimum`."""
    return MinimumOfTensorsFunction.apply(*_same_dtype(input, other), tuple(input.shape), tuple(other.shape))


def clamp(input: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """`torch.clamp`, with numbers."""
    return ClampFunction.apply(input, min, max)


def clamp_min(input: Tensor, min: float) -> Tensor:
    """`torch.clamp_min`, with a number."""
    return ClampFunction.apply(input, min, None)


def _register(
    function: Callable[..., Tensor], samples: Callable[[Any], list[SampleInput]], **options: Any
) -> None:
    register(
        function,
        sample_inputs=samples,
        benchmark_input=lambda t: samples(t)[0],
        in_graphs_only=True,
        **options,
    )


def _mask() -> Tensor:
    return torch.tensor([[True, False, True], [False, False, True]])


_register(
    add, lambda t: [SampleInput(t(2, 3), t(3)), SampleInput(t(2, 1), t(2, 3), alpha=2), SampleInput(t(3), 2.5)]
)
_register(
    sub, lambda t: [SampleInput(t(2, 3), t(3)), SampleInput(t(2, 1), t(2, 3), alpha=2), SampleInput(t(3), 2.5)]
)
_register(rsub, lambda t: [SampleInput(t(2, 3), t(3)), SampleInput(t(3), 2.5)])
_register(mul, lambda t: [SampleInput(t(2, 3), t(3)), SampleInput(t(2, 1), t(2, 3)), SampleInput(t(3), 2.5)])
_register(
    div,
    lambda t: [SampleInput(t(2, 3), t(3, low=0.5, high=2)), SampleInput(t(3), 2.5)],
    supports_special_values=False,  # a quotient of infinities or zeros is nan, and so is its derivative
)
_register(addcmul, lambda t: [SampleInput(t(2, 3), t(3), t(2, 1), value=0.5)])
_register(
    addcdiv,
    lambda t: [SampleInput(t(2, 3), t(3), t(2, 1, low=0.5, high=2), value=0.5)],
    supports_special_values=False,
)
_register(
    lerp,
    lambda t: [SampleInput(t(2, 3), t(3), 0.3), SampleInput(t(2, 3), t(2, 3), t(3))],
    supports_special_values=False,  # a difference of infinities is nan
)
_register(neg, lambda t: [SampleInput(t(2, 3))])
_register(
    pow,
    lambda t: [
        SampleInput(t(2, 3, low=0.5, high=2), 3.0),
        SampleInput(t(2, 3, low=0.5, high=2), t(3)),
        SampleInput(t(3), 2),
    ],
    supports_special_values=False,  # the derivative at 0 and infinity depends on the exponent
)
for _name, _rule in {
    "reciprocal": ReciprocalFunction,
    "exp": ExpFunction,
    "expm1": Expm1Function,
    "log": LogFunction,
    "log1p": Log1pFunction,
    "sqrt": SqrtFunction,
    "rsqrt": RsqrtFunction,
    "square": SquareFunction,
    "sin": SinFunction,
    "cos": CosFunction,
    "erf": ErfFunction,
}.items():
    globals()[_name] = _function(_name, _rule)
    _register(
        globals()[_name],
        lambda t: [SampleInput(t(2, 3, low=0.5, high=2))],
        supports_special_values=False,  # several are infinite or not defined at 0 or below
    )
_register(
    where,
    lambda t: [
        SampleInput(_mask(), t(2, 3), t(3)),
        SampleInput(_mask(), t(2, 1), t(2, 3)),
        SampleInput(_mask(), t(2, 3), 0.0),
    ],
)
_register(masked_fill, lambda t: [SampleInput(t(2, 3), _mask(), 0.5)])
_register(maximum, lambda t: [SampleInput(t(2, 3), t(3))], supports_special_values=False)
_register(minimum, lambda t: [SampleInput(t(2, 3), t(3))], supports_special_values=False)
_register(
    clamp,
    lambda t: [SampleInput(t(2, 3), -0.5, 0.6), SampleInput(t(2, 3), max=0.3)],
    supports_special_values=False,
)
_register(clamp_min, lambda t: [SampleInput(t(2, 3), -0.5)], supports_special_values=False)
