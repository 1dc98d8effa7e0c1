"""Mistakes in forward mode, vmap and higher derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch import eager_transforms
from torch.autograd import Function

from .base import (
    Cube,
    TransformableProduct,
    TransformableSquare,
    batch_first,
    defect,
    with_backward,
    with_jvp,
    with_vmap,
)

# --- forward mode, vmap, torch.func ---


@with_jvp("wrong factor in the tangent", "forward_mode")
def _(ctx: Any, tangent: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x * tangent


@defect("vmap ignores in_dims", "vmap")
class FirstAxisSquare(TransformableSquare):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor) -> Any:
        return FirstAxisSquare.apply(x), 0


@with_vmap("vmap uses only the first input's axis", "vmap")
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor) -> Any:
    return TransformableProduct.apply(*batch_first(in_dims, x, w)), None if in_dims[0] is None else 0


@defect("saves zeros under a transform", "torch_func_vjp")
class ZeroUnderTransforms(TransformableSquare):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (x,) = inputs
        ctx.save_for_backward(torch.zeros_like(x) if is_functorch_wrapped_tensor(x) else x)
        ctx.save_for_forward(x)


class FirstSampleProduct(TransformableProduct):
    """Its vmap uses the first sample of the batch for all."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor) -> Any:
        x, w = (next(batch_first((axis,), t))[0] for t, axis in zip((x, w), in_dims, strict=True))
        return TransformableProduct.apply(x, w), None


@with_backward("backward calls a Function with a wrong vmap", "batched_gradients", base=TransformableSquare)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return FirstSampleProduct.apply(2 * x, grad)


# --- higher derivatives ---


class SavedSlope(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(3 * x * x)  # a constant for the second derivative
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return slope * grad


defect("slope computed and saved in forward", "double_backward")(SavedSlope)


@with_backward("detach in backward", "double_backward", base=Cube)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 3 * x.detach() * x * grad


@with_backward("backward recomputes under no_grad", "double_backward", base=Cube)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    with torch.no_grad():
        square = x * x
    return 3 * square * grad


class Total(Function):
    """y = x Σx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * x.sum() + (grad * x).sum()


@with_backward("a saved value becomes a Python number", "double_backward", base=Total)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return grad * x.sum().item() + (grad * x).sum()


class PartialTangentProduct(TransformableProduct):
    """Its jvp ignores the tangent of the first factor."""

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, w_tangent: Tensor | None) -> Any:
        x, w = ctx.saved_tensors
        return x * w_tangent if w_tangent is not None else torch.zeros_like(x * w)


@with_backward("backward calls a Function with a wrong jvp", "forward_over_reverse", base=TransformableSquare)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return PartialTangentProduct.apply(2 * x, grad)


@with_jvp("detach in jvp", "reverse_over_forward")
def _(ctx: Any, tangent: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x.detach() * tangent


@defect("wrong curvature under an outer forward mode", "forward_over_forward")
def wrong_if_nested(x: Tensor) -> Tensor:
    if eager_transforms.JVP_NESTING > 1:
        return x * x * 1.5 - 0.5 * (x.detach() * (2 * x - x.detach()))
    return x * x
