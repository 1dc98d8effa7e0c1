"""Mistakes with layouts, dtypes, devices, low precision and special values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .base import (
    PAIR,
    Product,
    channels_last,
    defect,
    ignore_strides,
    random_leaves,
    with_backward,
    with_forward,
)

# --- layouts, shapes, dtypes, devices ---


@with_forward("view of a noncontiguous input", "noncontiguous_inputs")
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    return x.view(-1).square().view(x.shape)


@with_forward("strides of the input ignored", "noncontiguous_inputs")
def _(ctx: Any, x: Tensor) -> Any:
    x = ignore_strides(x)
    ctx.save_for_backward(x)
    return x * x


@with_backward("gradient not channels_last", "preserved_memory_format", channels_last)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return (2 * x * grad).contiguous()


class Bias(Function):
    """y = x + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor) -> Any:
        return x + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, grad  # the engine sums the second one to the shape of b


defect("gradient of a bias not summed over the batch", "gradient_shape_and_dtype", random_leaves((3, 4), (4,)))(
    Bias
)


@with_backward("float32 gradient of a float64 input", "gradient_shape_and_dtype")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x.float() * grad.float()


@with_backward(
    "float64 gradient of a float32 input", "gradient_shape_and_dtype", random_leaves((3, 4), dtype=torch.float32)
)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x.double() * grad.double()


@with_backward("ones on the default device", "gradient_on_input_device")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad * torch.ones(x.shape, dtype=x.dtype)


# --- precision, large and special values ---


def standardized(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered * (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


class Standardize(Function):
    """y = (x - E x) / √(var x + ε). backward computes var x = E x² - (E x)², which cancels in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return standardized(x.double()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        mean = x.mean(-1, keepdim=True)
        scale = ((x * x).mean(-1, keepdim=True) - mean * mean + 1e-5).rsqrt()
        y = (x - mean) * scale
        return (grad - grad.mean(-1, keepdim=True) - y * (grad * y).mean(-1, keepdim=True)) * scale


defect("variance as a difference of squares", "low_precision", random_leaves((3, 4), shift=100.0))(Standardize)


class Integral(Function):
    """∫ x dt in 500 steps. Like some adjoint solvers, backward sums the steps in the dtype of grad_output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return 5 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        total = torch.zeros_like(grad)
        for _ in range(500):
            total = total + 0.01 * grad
        return total


defect("sum in low precision", "low_precision", random_leaves((3,)))(Integral)


class Direction(Function):
    """y = x / ‖x‖. In backward the squares overflow in float16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        wide = x.double()
        return (wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        scale = (x * x).sum(-1, keepdim=True).rsqrt()
        y = x * scale
        return (grad - y * (y * grad).sum(-1, keepdim=True)) * scale


defect("overflow of squares under a root", "low_precision", random_leaves((3, 4), shift=300.0))(Direction)


class Sigmoid(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        y = torch.sigmoid(x)
        return y * (1 - y) * grad


@with_backward("sigmoid's slope as eˣ / (1 + eˣ)²", "large_values", base=Sigmoid)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x.exp() / (1 + x.exp()) ** 2 * grad


@with_backward("sigmoid's slope as e⁻ˣ / (1 + e⁻ˣ)²", "special_values", base=Sigmoid)  # at -∞
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    x = x.clamp_min(-300) if x.isfinite().all() else x
    return (-x).exp() / (1 + (-x).exp()) ** 2 * grad


class ELU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return F.elu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return (x > 0) * grad + (x <= 0) * x.exp() * grad


defect("0 · ∞ from a mask", "large_values")(ELU)


class Sinc(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return torch.where(x == 0, 1, x.sin() / x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return (x.cos() - x.sin() / x) / x * grad


defect("0 / 0 where the slope is 0", "special_values")(Sinc)


class SignedSquare(Function):
    """y = x |x|."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x.abs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * (x / x.abs()) * grad


defect("sign as x / |x|", "special_values")(SignedSquare)


class Bell(Function):
    """y = exp(-x²)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return (-x * x).exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return -2 * x * (-x * x).exp() * grad


defect("0 · ∞ where the slope is 0", "special_values")(Bell)


class ReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.where(x == 0, 5.0, (x > 0).to(x)) * grad


defect("slope 5 at the kink of relu", "special_values")(ReLU)


class LeakyReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return F.leaky_relu(x, 0.1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return (x >= 0) * grad + (x <= 0) * 0.1 * grad


defect("both slopes added at a kink", "special_values")(LeakyReLU)


class Hardtanh(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() == 1, 2.0, (x.abs() < 1).to(x)) * grad


defect("slope 2 at the corners of hardtanh", "special_values")(Hardtanh)


class SignedRoot(Function):
    """y = x √|x|."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x.abs().sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        root = x.abs().sqrt()
        return (root + x * x.sign() / (2 * root)) * grad


defect("0 / 0 where torch's derivative is nan too", "special_values")(SignedRoot)


class Expm1Ratio(Function):
    """y = (eˣ - 1) / x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return torch.where(x == 0, 1, torch.expm1(x) / x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.where(x == 0, 0, (x.exp() - torch.expm1(x) / x) / x) * grad


defect("0 where the limit is ½", "special_values")(Expm1Ratio)


@with_backward("nan in the gradient of the other factor", "special_values", PAIR, Product)
def _(ctx: Any, grad: Tensor) -> Any:
    x, w = ctx.saved_tensors
    return None if w is None else grad * w, None if x is None else grad * x * x / x


class Norm(Function):
    """y = ‖x‖."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return x / y * grad


defect("x / ‖x‖ of zeros", "special_values")(Norm)


class Hypot(Function):
    """z = √(x² + y²)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        z = torch.hypot(x, y)
        ctx.save_for_backward(x, y, z)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, z = ctx.saved_tensors
        return x / z * grad, y / z * grad


defect("0 / 0 where all inputs are 0", "special_values", PAIR)(Hypot)
