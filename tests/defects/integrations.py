"""Mistakes with random numbers, ctx, captured tensors, autocast, compile, hooks and ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .base import (
    PAIR,
    Identity,
    Product,
    Square,
    WastefulProduct,
    defect,
    random_leaves,
    with_backward,
    with_fixed_seed,
    with_forward,
)

# --- random numbers ---


NOISE = torch.Generator().manual_seed(0)


@with_backward("noise in the gradient", "determinism")  # as in stochastic rounding
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    noise = torch.rand(x.shape, generator=NOISE).to(x)
    return 2 * x * grad * (1 + 1e-7 * noise)


@with_backward("random numbers drawn in backward and ignored", "no_random_state_changes")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    torch.rand(x.shape)
    return 2 * x * grad


@with_backward("seed set in backward", "no_random_state_changes")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    torch.manual_seed(0)
    return 2 * x * grad


@with_forward("seed set in forward", "no_random_state_changes")
def _(ctx: Any, x: Tensor) -> Any:
    torch.manual_seed(0)
    ctx.save_for_backward(x)
    return x * x


# --- calls of ctx methods ---


@with_forward("mark_dirty on a fresh output", "correct_ctx_calls")
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    y = x * x
    ctx.mark_dirty(y)
    return y


class DirtyIdentity(Identity):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.mark_dirty(x)
        return x


@defect("mark_dirty on an unmodified input", "correct_ctx_calls")
def dirty_identity(x: Tensor) -> Any:
    return DirtyIdentity.apply(1 * x)


@with_forward("mark_non_differentiable on the only output", "correct_ctx_calls")
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    y = x * x
    ctx.mark_non_differentiable(y)
    return y


class Statistics(Function):
    """x² and two non-differentiable statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        y, mean, norm = x * x, x.mean(), (x * x).sum()
        ctx.mark_non_differentiable(mean, norm)
        return y, mean, norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@with_forward(
    "mark_non_differentiable twice", "correct_ctx_calls", base=Statistics
)  # the second call replaces the first
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    y, mean, norm = x * x, x.mean(), (x * x).sum()
    ctx.mark_non_differentiable(mean)
    ctx.mark_non_differentiable(norm)
    return y, mean, norm


@with_forward("save_for_backward twice", "correct_ctx_calls", PAIR, Product)  # the second call replaces the first
def _(ctx: Any, x: Tensor, w: Tensor) -> Any:
    ctx.save_for_backward(x, None)
    ctx.save_for_backward(None, w)
    return x * w


class Signed(Square):
    """x² and the signs of x."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@with_forward("mark_non_differentiable on an input", "correct_ctx_calls", base=Signed)
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(x)
    return x * x, x.sign().long()


# --- captured tensors ---


WEIGHT = torch.linspace(1, 2, 4, dtype=torch.float64, requires_grad=True)


class Layer:
    def __init__(self) -> None:
        self.weight = WEIGHT

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x)


@defect("a global weight", "no_captured_tensors")
class GlobalWeight(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x * WEIGHT.to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * WEIGHT.to(grad)


def with_closure(weight: Tensor) -> type[Function]:
    class Closure(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            return x * weight.to(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad * weight.to(grad)

    return Closure


defect("a weight in a closure", "no_captured_tensors")(with_closure(WEIGHT))


class CalledLayer(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Any:
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.layer(grad), None


LAYER = Layer()


@defect("a layer as an argument", "no_captured_tensors")
def called_layer(x: Tensor) -> Any:
    return CalledLayer.apply(x, LAYER)


class ListOfWeights(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: list[Tensor]) -> Any:
        ctx.save_for_backward(*weights)
        return x * weights[0].to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return grad * weight.to(grad), None


@defect("weights in a list", "no_captured_tensors")
def list_of_weights(x: Tensor) -> Any:
    return ListOfWeights.apply(x, [WEIGHT])


@defect("an input passed in a list", "no_captured_tensors", random_leaves((3, 4), (4,)))
def input_in_a_list(x: Tensor, weight: Tensor) -> Any:
    return ListOfWeights.apply(x, [weight])


# --- autocast, compile, hooks, checkpoints, ranks ---


class Matmul(Function):
    """y = x w. Under autocast y and its gradient are bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return None if w is None else grad @ w.mT, None if x is None else x.mT @ grad


FACTORS = random_leaves((3, 4), (4, 2))
defect("grad_output of another dtype than the saved tensors", "autocast", FACTORS)(Matmul)


class RandomMask(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        mask = (torch.rand_like(x) > 0.5).to(x)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return grad * mask if grad.dtype == torch.float64 else grad


defect("mask ignored in low precision", "autocast")(with_fixed_seed(RandomMask.apply))


@with_forward("print in forward", "compile", require=("compile",))
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    print(end="")
    return x * x


@with_forward("branch on a value in forward", "compile", require=("compile",))
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    return x * x if x.sum().item() > 0 else x.square()


@with_backward("wrong gradient if compiled", "compile", require=("compile",))
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x * grad if torch.compiler.is_compiling() else 2 * x * grad


@with_forward("divmod of a size", "compile_dynamic", require=("compile_dynamic",))
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    halves, _ = divmod(x.shape[0], 2)
    return torch.cat([x[:halves], x[halves:]]).square()


@with_backward("reads saved_tensors twice", "checkpoint", PAIR, WastefulProduct)
def _(ctx: Any, grad: Tensor) -> Any:
    grad_x = grad * ctx.saved_tensors[1] if ctx.needs_input_grad[0] else None
    grad_w = grad * ctx.saved_tensors[0] if ctx.needs_input_grad[1] else None
    return grad_x, grad_w


@defect("compares the address of a saved tensor", "saved_tensors_hooks")
class ComparesAddress(Square):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.address = x.data_ptr()
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if x.data_ptr() != ctx.address:
            raise RuntimeError("the saved tensor has another address")
        return 2 * x * grad


@defect("looks up a saved tensor by its id", "saved_tensors_hooks")
class LooksUpId(Square):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.factors = {id(x): 2}
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.factors.get(id(x), 1) * x * grad


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class ScaledByRank(Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad * (1 + rank())


class NoneOnOtherRanks(Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad if rank() == 0 else None


@defect("gradient that depends on the rank", "distributed", require=("distributed",))
def scaled_by_rank(x: Tensor) -> Any:
    return ScaledByRank.apply(x)


@defect("None on rank 1", "distributed", require=("distributed",))
def none_on_other_ranks(x: Tensor) -> Any:
    return NoneOnOtherRanks.apply(x)
