"""Wrong gradients, and gradients that are right only for some grad_outputs, outputs or inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .base import (
    PAIR,
    Product,
    SquareAndTriple,
    WastefulProduct,
    defect,
    ignore_strides,
    with_backward,
    with_fixed_seed,
)

# --- wrong gradients ---


@with_backward("wrong factor in the gradient", "gradient")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x * grad


@with_backward("wrong gradient at one element", "gradient")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    result = 2 * x * grad
    return torch.cat([result.flatten()[:-1], 1.01 * result.flatten()[-1:]]).reshape(x.shape)


@with_backward("None for an input that affects the output", "gradient", PAIR, Product)
def _(ctx: Any, grad: Tensor) -> Any:
    _, w = ctx.saved_tensors
    return None if w is None else grad * w, None


@with_backward("grad_output ignored", "gradient")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x


@with_backward("right only for a grad_output of ones", "gradient")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.mean()


@with_backward("sum of grad_output", "gradient")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.sum()


@with_backward("first element of grad_output used for all", "gradient")  # as in losses for reduction="mean"
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.flatten()[0] if grad.numel() else 2 * x * grad


@with_backward("grad_outputs of two outputs swapped", "gradient", base=SquareAndTriple)
def _(ctx: Any, second: Tensor, first: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * first + 3 * second


@with_backward("grad_output of the second output ignored", "gradient", base=SquareAndTriple)
def _(ctx: Any, first: Tensor, second: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * first


class Dropout(Function):
    """The backward draws a new mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x * (torch.rand(x.shape) > 0.5).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * (torch.rand(grad.shape) > 0.5).to(grad)


defect("dropout draws another mask in backward", "gradient")(with_fixed_seed(Dropout.apply))


class ReplayedDropout(Function):
    """The backward restores the state of the generator, but forward saved it after drawing the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        mask = torch.rand(x.shape) > 0.5
        ctx.state = torch.get_rng_state().tolist()
        return x * mask.to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.tensor(ctx.state, dtype=torch.uint8))
            return grad * (torch.rand(grad.shape) > 0.5).to(grad)


defect("dropout restores the generator state from after its mask", "gradient")(
    with_fixed_seed(ReplayedDropout.apply)
)


# --- right only for some grad_outputs ---


@with_backward("gradient clipped to [-1, 1]", "linear_in_grad_output")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.clamp(-1, 1)


@with_backward("nan in grad_output becomes 0", "linear_in_grad_output")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.nan_to_num()


@with_backward("grad_output normalized to length 1", "linear_in_grad_output")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad / torch.linalg.vector_norm(grad).clamp_min(1e-30)


@with_backward("writes into grad_output", "no_grad_output_mutation")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return grad.mul_(2 * x)


@with_backward("writes into grad_output under once_differentiable", "no_grad_output_mutation")
@once_differentiable
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return grad.mul_(2 * x)


@with_backward("writes into grad_output.data", "no_grad_output_mutation")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    grad.data.mul_(2)
    return x * grad


@with_backward("view of a noncontiguous grad_output", "noncontiguous_grad_outputs")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.view(-1).view(x.shape)


@with_backward("strides of grad_output ignored", "noncontiguous_grad_outputs")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * ignore_strides(grad.clone() if 0 in grad.stride() else grad)


@with_backward("expanded grad_output used as a scalar", "noncontiguous_grad_outputs")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * (grad.flatten()[0] if 0 in grad.stride() and grad.numel() else grad)


@with_backward("division by the number of elements", "empty_inputs")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x * grad * x.numel() * (2 / x.numel())


@with_backward("reshape(rows, -1) of an empty grad_output", "empty_inputs")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return (2 * x * grad).reshape(len(x), -1).reshape(x.shape) if x.dim() else 2 * x * grad


@with_backward("squeeze without dim", "singleton_dimensions")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.squeeze()


# --- some outputs, some inputs ---


class UndefinedGradients(SquareAndTriple):
    """backward gets None instead of zeros for an unused output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x * x, 3 * x


@with_backward("raises for an unused output", "no_gradient_from_unused_outputs", base=UndefinedGradients)
def _(ctx: Any, first: Tensor | None, second: Tensor | None) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * first + 3 * second  # type: ignore[operator]


@with_backward(
    "uses ones for an undefined grad_output", "no_gradient_from_unused_outputs", base=UndefinedGradients
)
def _(ctx: Any, first: Tensor | None, second: Tensor | None) -> Any:
    (x,) = ctx.saved_tensors
    first, second = (torch.ones_like(x) if grad is None else grad for grad in (first, second))
    return 2 * x * first + 3 * second


@with_backward("raises if one input requires no gradient", "gradient_of_input_subsets", PAIR, WastefulProduct)
def _(ctx: Any, grad: Tensor) -> Any:
    x, w = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        grad_x = grad * w
    if ctx.needs_input_grad[1]:
        grad_w = grad * x
    return grad_x, grad_w  # type: ignore[possibly-unbound]


@with_backward("returns only the needed gradients", "gradient_of_input_subsets", PAIR, Product)
def _(ctx: Any, grad: Tensor) -> Any:
    x, w = ctx.saved_tensors
    needed = [grad * factor for factor in (w, x) if factor is not None]
    return *needed, *[None] * (2 - len(needed))


@with_backward("computes unneeded gradients", "no_unneeded_gradients", PAIR, WastefulProduct, is_warning=True)
def _(ctx: Any, grad: Tensor) -> Any:
    x, w = ctx.saved_tensors
    return grad * w, grad * x


@with_backward(
    "saves both factors for one gradient",
    "no_unused_saved_tensors",
    PAIR,
    WastefulProduct,
    is_warning=True,
)
def _(ctx: Any, grad: Tensor) -> Any:
    x, w = ctx.saved_tensors
    return grad * w if ctx.needs_input_grad[0] else None, grad * x if ctx.needs_input_grad[1] else None


@defect("saves an unused output", "no_unused_saved_tensors", is_warning=True)
class SaveUnusedOutput(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = x * x
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, _ = ctx.saved_tensors
        return 2 * x * grad
