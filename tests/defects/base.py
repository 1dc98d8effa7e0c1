"""The table of planted defects, correct Functions to plant them in, and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Inputs = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Defect:
    """A mistake, and the law that must find it."""

    name: str
    law: str
    function: Callable[..., Any]
    inputs: Inputs
    require: tuple[str, ...] = ()
    """Laws to request, because they are not tested by default."""
    is_warning: bool = False
    """The law gives a warning, not a failure."""


DEFECTS: list[Defect] = []


def random_leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, shift: float = 0.0) -> Inputs:
    """Make a leaf tensor of each shape: always the same numbers, with absolute values from 0.5 to 1.5."""

    def make() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)

        def leaf(shape: tuple[int, ...]) -> Tensor:
            size = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
            sign = 2 * torch.randint(0, 2, shape, generator=generator) - 1
            return (sign * size + shift).to(dtype).requires_grad_()

        return tuple(leaf(shape) for shape in shapes)

    return make


MATRIX = random_leaves((3, 4))
PAIR = random_leaves((3, 4), (3, 4))


def channels_last() -> tuple[Tensor]:
    (x,) = random_leaves((2, 3, 2, 2))()
    return (x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(),)


# --- how defects are registered ---


def defect(
    name: str, law: str, inputs: Inputs = MATRIX, *, require: tuple[str, ...] = (), is_warning: bool = False
) -> Callable[[Any], Any]:
    """Register a Function or a function."""

    def register(function: Any) -> Any:
        apply = function.apply if isinstance(function, type) else function
        DEFECTS.append(Defect(name, law, apply, inputs, require, is_warning))
        return function

    return register


def _subclass(name: str, base: type[Function], **methods: Callable[..., Any]) -> type[Function]:
    title = "".join(word.capitalize() for word in name.split() if word.isidentifier())
    return type(title, (base,), {key: staticmethod(method) for key, method in methods.items()})


def with_forward(
    name: str, law: str, inputs: Inputs = MATRIX, base: type[Function] | None = None, **options: Any
) -> Callable[[Any], Any]:
    """Register a subclass of `base` (by default `Square`) with this forward."""
    return lambda method: defect(name, law, inputs, **options)(_subclass(name, base or Square, forward=method))


def with_backward(
    name: str, law: str, inputs: Inputs = MATRIX, base: type[Function] | None = None, **options: Any
) -> Callable[[Any], Any]:
    """Register a subclass of `base` (by default `Square`) with this backward."""
    return lambda method: defect(name, law, inputs, **options)(_subclass(name, base or Square, backward=method))


def with_jvp(name: str, law: str) -> Callable[[Any], Any]:
    """Register a `TransformableSquare` with this jvp."""
    return lambda method: defect(name, law)(_subclass(name, TransformableSquare, jvp=method))


def with_vmap(name: str, law: str) -> Callable[[Any], Any]:
    """Register a `TransformableProduct` with this vmap."""
    return lambda method: defect(name, law, PAIR)(_subclass(name, TransformableProduct, vmap=method))


def with_fixed_seed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same random numbers in every call, which finite differences need."""

    def call(*inputs: Tensor) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return function(*inputs)

    return call


# --- correct Functions and helpers ---


class Square(Function):
    """y = x²."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Product(Function):
    """y = x w. It saves and computes only what the needed gradients use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return None if w is None else grad * w, None if x is None else grad * x


class Cube(Function):
    """y = x³. Unlike that of `Square`, its gradient is not linear in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


class TransformableSquare(Function):
    """y = x² with `setup_context`, forward mode and vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * tangent


class TransformableProduct(Function):
    """y = x w with `setup_context`, forward mode and vmap."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Any:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        ctx.save_for_forward(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return None if w is None else grad * w, None if x is None else grad * x

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, w_tangent: Tensor | None) -> Any:
        x, w = ctx.saved_tensors
        terms = [w * x_tangent if x_tangent is not None else 0, x * w_tangent if w_tangent is not None else 0]
        return sum(terms)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor) -> Any:
        return TransformableProduct.apply(*batch_first(in_dims, x, w)), 0


def batch_first(in_dims: tuple[int | None, ...], *tensors: Tensor) -> Iterator[Tensor]:
    """Move the batch axes to the front, and align the other axes."""
    rank = max(x.dim() - (axis is not None) for x, axis in zip(tensors, in_dims, strict=True))
    for x, axis in zip(tensors, in_dims, strict=True):
        x = x.unsqueeze(0) if axis is None else x.movedim(axis, 0)
        yield x.reshape(x.shape[:1] + (1,) * (rank + 1 - x.dim()) + x.shape[1:])


class SquareAndTriple(Function):
    """Two outputs: x² and 3 x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x, 3 * x

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * first + 3 * second


class WastefulProduct(Product):
    """Saves both factors, whichever gradients are needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return x * w


class Identity(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


def ignore_strides(x: Tensor) -> Tensor:
    """What a kernel reads that uses the data pointer but not the strides."""
    return torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride())
