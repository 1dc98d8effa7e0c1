"""Tensors that are overwritten, aliased or never freed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .base import MATRIX, Identity, Square, defect, with_backward, with_forward

# --- mutation and aliasing ---


class Softmax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = torch.softmax(x, -1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return y * (grad - (grad * y).sum(-1, keepdim=True))


@with_forward("softmax shifts its input in place", "no_input_mutation", base=Softmax)
def _(ctx: Any, x: Tensor) -> Any:
    x -= x.sum(-1, keepdim=True)
    y = torch.softmax(x, -1)
    ctx.save_for_backward(y)
    return y


@with_forward("shifts its input and shifts it back", "no_input_mutation", base=Softmax)  # rounding errors remain
def _(ctx: Any, x: Tensor) -> Any:
    shifted = x.detach().sub_(3.3)
    y = torch.softmax(shifted, -1)
    shifted.add_(3.3)
    ctx.save_for_backward(y)
    return y


@with_forward("masks attention scores in place", "no_input_mutation", base=Softmax)
def _(ctx: Any, x: Tensor) -> Any:
    x.view(x.shape)[..., :1] = -1e4
    y = torch.softmax(x, -1)
    ctx.save_for_backward(y)
    return y


class Embedding(Function):
    """Rows of a table. Row 0 is for padding and counts as 0."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor) -> Any:
        weight.data[:1] = 0
        ctx.save_for_backward(index)
        ctx.rows = len(weight)
        return weight[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        grad = grad * (index != 0).unsqueeze(-1)
        return grad.new_zeros(ctx.rows, grad.shape[-1]).index_add(0, index, grad), None


def table() -> tuple[Tensor, ...]:
    return *MATRIX(), torch.tensor([2, 0, 1, 2])


defect("zeroes the padding row through .data", "no_input_mutation", table)(Embedding)


class Absolute(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return x.sign() * grad


@with_backward("writes into a saved input in backward", "no_input_mutation", base=Absolute)
@once_differentiable
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x.data.sign_() * grad


@with_backward("uses a saved input as scratch in backward", "no_input_mutation")
@once_differentiable
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x.mul_(2).mul(grad)


class Double(Function):
    """y = 2 x in place, without mark_dirty."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * grad


defect("mark_dirty missing", "no_input_mutation")(Double)


@with_forward("returns input.data", "no_hidden_aliasing", base=Identity)
def _(ctx: Any, x: Tensor) -> Any:
    return x.data


@with_forward("returns the input's memory through numpy", "no_hidden_aliasing", base=Identity)
def _(ctx: Any, x: Tensor) -> Any:
    return torch.from_numpy(x.detach().numpy())


@with_forward("returns a tensor set to the input's storage", "no_hidden_aliasing", base=Identity)
def _(ctx: Any, x: Tensor) -> Any:
    return x.new_empty(0).set_(x.detach())  # type: ignore[arg-type]


class Energy(Function):
    """y = Σx² / 2. If grad_output is 1, backward returns x itself to save a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return (x * x).sum() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return x.view_as(x) if grad == 1 else x * grad


defect("returns the saved input as gradient", "no_hidden_aliasing")(Energy)


# --- leaks ---


class Exp(Function):
    """y = eˣ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return y * grad


@defect("output stored on ctx", "no_tensors_on_ctx")
class OutputOnContext(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.y = x.exp()
        return ctx.y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.y * grad


@defect("intermediate stored on ctx", "no_tensors_on_ctx")
class IntermediateOnContext(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.slope = 2 * x
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.slope * grad


@defect("intermediates in a list on ctx", "no_tensors_on_ctx")
class ListOnContext(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.cache = [2 * x]
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.cache[0] * grad


@defect("intermediates in a dict on ctx", "no_tensors_on_ctx")
class DictOnContext(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.cache = {"slope": 2 * x}
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.cache["slope"] * grad


@with_backward("gradient cached on ctx", "no_tensors_on_ctx")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    ctx.gradient = 2 * x * grad
    return ctx.gradient.clone()


OUTPUTS: list[Tensor] = []
LATEST: dict[str, Tensor] = {}


@with_forward("outputs appended to a global list", "no_memory_leaks")
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    OUTPUTS.append(x * x)
    return OUTPUTS[-1]


@with_backward("last gradient stored in a global", "no_memory_leaks")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    LATEST["gradient"] = 2 * x * grad
    return LATEST["gradient"].clone()


@defect("last input stored on the class", "no_memory_leaks")
class LastInput(Square):
    latest: Tensor | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        LastInput.latest = 1 * x
        ctx.save_for_backward(x)
        return x * x


class OutputList(torch.nn.Module):
    """x². A list holds every output."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        self.outputs.append(x * x)
        return self.outputs[-1]


defect("outputs appended to a list of a module", "no_memory_leaks")(OutputList())


# --- a second backward ---


@with_backward("backward depends on a counter on ctx", "repeatable_backward")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    ctx.calls = getattr(ctx, "calls", 0) + 1
    return 2 * x * grad / ctx.calls


class SavedGradient(Function):
    """y = x². As in fused losses, forward computes the gradient, and backward scales it in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(2 * x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return slope.data.mul_(grad)


defect("scales a saved gradient in place", "repeatable_backward")(SavedGradient)


@defect("deletes an attribute of ctx", "repeatable_backward")
class DeleteAttribute(Square):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        ctx.factor = 2
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        result = ctx.factor * x * grad
        del ctx.factor
        return result
