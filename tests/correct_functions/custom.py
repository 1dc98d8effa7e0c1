"""Functions and modules written by hand: features, outputs, random numbers, state, kinks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from defects.base import batch_first, random_leaves
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .base import COMPLEX_PAIR, MATRIX, correct_function

# --- features of a Function ---


@correct_function("dropout that saves its mask", MATRIX)
class Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y, mask = torch.native_dropout(x, 0.5, True)
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return grad * mask * 2


class DoubleInPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * grad


@correct_function("in place, with mark_dirty", MATRIX)
def double(x: Tensor) -> Any:
    return DoubleInPlace.apply(x.clone())


@correct_function("two outputs", MATRIX)
class SquareAndTriple(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x, 3 * x

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * first + 3 * second


@correct_function("two outputs, without materialized gradients", MATRIX)
class UnmaterializedSquareAndTriple(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x * x, 3 * x

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Any:
        (x,) = ctx.saved_tensors
        grad = None if first is None else 2 * x * first
        if second is not None:
            grad = 3 * second if grad is None else grad + 3 * second
        return grad


@correct_function("a view of its input", MATRIX)
class Transpose(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.mT


@correct_function("identity", MATRIX)
class Identity(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


@correct_function("product with jvp and vmap", random_leaves((3, 4), (3, 4)))
class Product(Function):
    """y = x w, with jvp and vmap."""

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
        if x_tangent is None:
            return x * w_tangent
        return w * x_tangent if w_tangent is None else w * x_tangent + x * w_tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor) -> Any:
        return Product.apply(*batch_first(in_dims, x, w)), 0


@correct_function(
    "complex product", lambda: tuple(torch.view_as_complex(x.detach()).requires_grad_() for x in COMPLEX_PAIR())
)
class ComplexProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return None if w is None else grad * w.conj(), None if x is None else grad * x.conj()


@correct_function("non-tensor arguments", lambda: (*MATRIX(), 3, "scaled", None))
class Power(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: int, label: str, unused: None) -> Any:
        ctx.exponent = exponent
        ctx.save_for_backward(x)
        return x**exponent

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * ctx.exponent * x ** (ctx.exponent - 1), None, None, None


@correct_function("computes in at least float32", MATRIX)
class WideSigmoid(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.to(torch.promote_types(x.dtype, torch.float32)).sigmoid().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        y = x.to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
        return (y * (1 - y) * grad).to(x.dtype)


@correct_function("numpy", MATRIX)
class NumpyExp(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = torch.from_numpy(np.exp(x.detach().numpy()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return torch.from_numpy(grad.numpy() * y.numpy())


@correct_function("only float32", random_leaves((3, 4), dtype=torch.float32))
class SingleSquare(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        assert x.dtype == torch.float32, "only float32 is accepted"
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


# --- outputs ---


@correct_function("a non-differentiable output first", MATRIX)
class SinWithStatistic(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        statistic = torch.zeros_like(x)
        ctx.mark_non_differentiable(statistic)
        ctx.save_for_backward(x)
        return statistic, x.sin()

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * x.cos()


@correct_function("nested outputs of different inputs, some without a gradient", random_leaves((3, 4), (2,)))
def nested(x: Tensor, w: Tensor) -> Any:
    return {"detached": (x.detach(), None), "x": [x, x.argmax(), x.sin()], "w": (w.detach(), w.cos())}


# --- random numbers ---


@correct_function("a mask in the dtype of the input", MATRIX)
class RandLike(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        mask = (torch.rand_like(x) > 0.5).to(x.dtype) * 2
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return grad * mask


@correct_function("a mask drawn again from a saved random state", MATRIX)
class Replayed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.state = torch.get_rng_state().tolist()
        return x * (torch.rand(x.shape, dtype=x.dtype) > 0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.tensor(ctx.state, dtype=torch.uint8))
            return grad * (torch.rand(grad.shape, dtype=grad.dtype) > 0.5)


GENERATOR = torch.Generator().manual_seed(3)


@correct_function("six kinds of random numbers", MATRIX)
def noisy(x: Tensor) -> Any:
    noise = torch.rand(x.shape, generator=GENERATOR, dtype=x.dtype)
    mask = torch.bernoulli(torch.full_like(x, 0.7)) * torch.as_tensor(np.random.rand(*x.shape)).to(x)  # noqa: NPY002
    return (
        F.dropout(x * mask + random.random() * noise, 0.3),
        x * torch.empty_like(x).normal_(),
        x + torch.randn_like(x),
    )


@correct_function("a mask in the dtype of autocast", random_leaves((3, 4), (4, 5)))
def masked_product(x: Tensor, w: Tensor) -> Any:
    y = x @ w
    return (y * (torch.rand_like(y) < 0.7)).sin()


# --- modules that reach their parameters in several ways ---

correct_function("a recurrent module", random_leaves((2, 1, 2)))(nn.GRU(2, 2).double())
correct_function("spectral norm", random_leaves((2, 3)))(
    nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).double().eval()
)
correct_function("spectral norm by a hook", random_leaves((2, 3)))(
    nn.utils.spectral_norm(nn.Linear(3, 2)).double().eval()
)


class StatefulModule(nn.Module):
    """A weight in a list, a cached transpose, tied weights, a checkpoint and a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        self.tied = nn.Linear(3, 3, dtype=torch.float64)
        self.tied.weight = self.layer.weight
        self.weights = {"of the layer": [self.layer.weight]}
        self.transposed: Tensor | None = None
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        if self.transposed is None:
            self.transposed = self.weights["of the layer"][0].T
        h = (x - self.mean) @ self.transposed
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return checkpoint(lambda h: self.tied(h).tanh(), h, use_reentrant=False)


correct_function("a module with cached and tied weights", random_leaves((2, 3)))(StatefulModule())


# --- kinks, infinity, precision ---


@correct_function("signed square root", MATRIX)
class SignedRoot(Function):
    """y = x √|x|. Its slope approaches 0 as slowly as √|x|."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x.abs().sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 1.5 * x.abs().sqrt() * grad


@correct_function("torch operators with kinks and infinite values", random_leaves((3, 4), (3, 4)))
def kinks(x: Tensor, y: Tensor) -> Any:
    return x.relu() - 0.25 * (-x).relu(), torch.maximum(x, y), torch.exp(-x * x), torch.fmod(x, y), x.norm(dim=1)


@correct_function("computes in float32 for every dtype", random_leaves((3, 4), (4,)))
def rms_norm_in_float32(x: Tensor, weight: Tensor) -> Any:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
