"""Sound Functions, in which a checker must find nothing.

Most are thin: forward is torch's operation, backward is torch's too, or the formula by hand. `thin` makes them.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from defects import batch_first, numbers
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Sound:
    name: str
    function: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]


SOUND: list[Sound] = []


def sound(name: str, inputs: Callable[[], tuple[Any, ...]]) -> Callable[[Any], Any]:
    """Enters a Function, or a function, into the table."""

    def enter(made: Any) -> Any:
        SOUND.append(Sound(name, made.apply if isinstance(made, type) else made, inputs))
        return made

    return enter


def thin(
    name: str,
    inputs: Callable[[], tuple[Any, ...]],
    forward: Callable[..., Any],
    *,
    once: bool = False,
    lower: bool = False,
    modern: bool = False,
    jvp: Callable[..., Any] | None = None,
    **gradients: Callable[..., Tensor],
) -> None:
    """Enters a Function made of its forward and, by the name of the input, its gradients.

    A gradient asks by name for what it uses: inputs, `output`, or, of several outputs, `output1`, ... What the
    needed gradients name is kept. Outputs behind the first are marked as not differentiable. With `once` it claims
    no second order. With `lower` autocast would run it in a lower precision, so it says in which it runs.
    With `modern` it has `setup_context` and asks torch for its vmap. `jvp` is a function of the
    tangent of its one input and of what it uses, by name.
    """
    names = list(inspect.signature(forward).parameters)

    def uses(function: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(function).parameters)[1:]

    def keep(ctx: Any, values: tuple[Any, ...], result: Any) -> None:
        outputs = result if isinstance(result, tuple) else (result,)
        known = dict(zip(names, values, strict=True)) | {"output": result}
        known |= {f"output{k}": output for k, output in enumerate(outputs)}
        if outputs[1:]:
            ctx.mark_non_differentiable(*outputs[1:])
        needed = [
            name for key, g in gradients.items() if ctx.needs_input_grad[names.index(key)] for name in uses(g)
        ]
        ctx.names = list(dict.fromkeys(needed))
        ctx.save_for_backward(*(known[name] for name in ctx.names))
        if jvp is not None:
            ctx.save_for_forward(*(known[name] for name in uses(jvp)))

    def old_forward(ctx: Any, *values: Any) -> Any:
        result = forward(*values)
        keep(ctx, values, result)
        return result

    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        kept = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        return tuple(
            gradients[key](grad, *(kept[name] for name in uses(gradients[key])))
            if key in gradients and ctx.needs_input_grad[k]
            else None
            for k, key in enumerate(names)
        )

    started: Any = old_forward
    finished: Any = once_differentiable(backward) if once else backward
    if lower:
        started = torch.amp.custom_fwd(started, device_type="cpu", cast_inputs=torch.float32)
        finished = torch.amp.custom_bwd(finished, device_type="cpu")
    methods: dict[str, Any] = {"backward": staticmethod(finished)}
    if modern:
        methods |= {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(keep),
            "generate_vmap_rule": True,
        }
    else:
        methods |= {"forward": staticmethod(started)}
    if jvp is not None:
        methods["jvp"] = staticmethod(lambda ctx, tangent: jvp(tangent, *ctx.saved_tensors))
    sound(name, inputs)(type("".join(part.capitalize() for part in name.split()), (Function,), methods))


def also(inputs: Callable[[], tuple[Tensor, ...]], *others: Tensor) -> Callable[[], tuple[Any, ...]]:
    """The inputs, and tensors that have no gradient."""
    return lambda: (*inputs(), *(other.clone() for other in others))


MATRIX = numbers((3, 4))
IMAGE = numbers((1, 2, 3, 4))
PAIRS = numbers((3, 2, 2), (3, 2, 2))


# Element by element.

thin(
    "relu",
    MATRIX,
    lambda x: x.relu(),
    modern=True,
    x=lambda grad, output: aten.threshold_backward(grad, output, 0),
    jvp=lambda tangent, output: tangent * (output > 0),
)
thin(
    "leaky relu", MATRIX, lambda x: F.leaky_relu(x, 0.1), x=lambda g, x: aten.leaky_relu_backward(g, x, 0.1, False)
)
thin("sigmoid", MATRIX, lambda x: x.sigmoid(), modern=True, x=lambda g, output: aten.sigmoid_backward(g, output))
thin(
    "tanh",
    MATRIX,
    lambda x: x.tanh(),
    modern=True,
    x=lambda g, output: aten.tanh_backward(g, output),
    jvp=lambda tangent, output: tangent * (1 - output * output),
)
thin("gelu", MATRIX, lambda x: F.gelu(x), modern=True, x=lambda g, x: aten.gelu_backward(g, x))
thin("silu", MATRIX, lambda x: F.silu(x), once=True, x=lambda g, x: aten.silu_backward(g, x))
thin("softplus", MATRIX, lambda x: F.softplus(x), x=lambda g, x: aten.softplus_backward(g, x, 1, 20))
thin("elu", MATRIX, lambda x: F.elu(x), x=lambda g, x: aten.elu_backward(g, 1, 1, 1, False, x))
thin("hardswish", MATRIX, lambda x: F.hardswish(x), once=True, x=lambda g, x: aten.hardswish_backward(g, x))
thin(
    "sqrt",
    lambda: (MATRIX()[0].detach().abs().requires_grad_(),),
    lambda x: x.sqrt(),
    x=lambda g, output: g / (2 * output),
)
thin(
    "prelu",
    numbers((3, 4), (4,)),
    lambda x, weight: F.prelu(x, weight),
    once=True,
    lower=True,
    x=lambda g, x, weight: aten._prelu_kernel_backward(g, x, weight.expand_as(x))[0],
    weight=lambda g, x: aten._prelu_kernel_backward(g, x, torch.zeros_like(x))[1].sum(0),
)
thin(
    "where",
    also(numbers((3, 4), (3, 4)), torch.arange(12).reshape(3, 4) % 3 == 0),
    lambda x, y, condition: torch.where(condition, x, y),
    modern=True,
    x=lambda g, condition: torch.where(condition, g, 0),
    y=lambda g, condition: torch.where(condition, 0, g),
)


# Along an axis.

thin(
    "softmax",
    MATRIX,
    lambda x: x.softmax(-1),
    modern=True,
    x=lambda g, output: aten._softmax_backward_data(g, output, -1, output.dtype),
)
thin(
    "log softmax",
    MATRIX,
    lambda x: x.log_softmax(-1),
    x=lambda g, output: aten._log_softmax_backward_data(g, output, -1, output.dtype),
)
thin("sum", MATRIX, lambda x: x.sum(-1, keepdim=True), modern=True, x=lambda g, x: g.expand_as(x))
thin("mean", MATRIX, lambda x: x.mean(-1, keepdim=True), x=lambda g, x: (g / x.shape[-1]).expand_as(x))
thin("cumsum", MATRIX, lambda x: x.cumsum(-1), modern=True, x=lambda g: g.flip(-1).cumsum(-1).flip(-1))
thin("logsumexp", MATRIX, lambda x: x.logsumexp(-1, keepdim=True), x=lambda g, x: g * x.softmax(-1))
thin(
    "var",
    MATRIX,
    lambda x: x.var(-1, keepdim=True, correction=0),
    x=lambda g, x: 2 * g * (x - x.mean(-1, keepdim=True)) / x.shape[-1],
)
thin(
    "amax",
    MATRIX,
    lambda x: x.amax(-1, keepdim=True),
    x=lambda g, x, output: g * (x == output) / (x == output).sum(-1, keepdim=True),
)
thin(
    "sort with indices",
    MATRIX,
    lambda x: tuple(x.sort(-1)),
    x=lambda g, output1: torch.zeros_like(g).scatter(-1, output1, g),
)
thin("pad", MATRIX, lambda x: F.pad(x, (1, 2)), modern=True, x=lambda g: g[..., 1:-2])
thin(
    "cat",
    numbers((3, 4), (3, 2)),
    lambda x, y: torch.cat([x, y], -1),
    modern=True,
    x=lambda g, x: g[..., : x.shape[-1]],
    y=lambda g, y: g[..., g.shape[-1] - y.shape[-1] :],
)
thin(
    "index select",
    also(MATRIX, torch.tensor([2, 0, 2])),
    lambda x, index: x.index_select(0, index),
    x=lambda g, x, index: torch.zeros_like(x).index_add(0, index, g),
)
thin(
    "gather",
    also(MATRIX, torch.tensor([[0, 0, 3], [1, 2, 1], [3, 3, 3]])),
    lambda x, index: x.gather(1, index),
    x=lambda g, x, index: torch.zeros_like(x).scatter_add(1, index, g),
)
thin(
    "embedding",
    also(MATRIX, torch.tensor([2, 0, 1, 2])),
    lambda weight, index: F.embedding(index, weight),
    weight=lambda g, weight, index: aten.embedding_dense_backward(g, index, weight.shape[0], -1, False),
)


# Products.

thin(
    "linear",
    numbers((3, 4), (2, 4), (2,)),
    lambda x, weight, bias: F.linear(x, weight, bias),
    lower=True,
    x=lambda g, weight: g @ weight,
    weight=lambda g, x: g.mT @ x,
    bias=lambda g: g.sum(0),
)
thin(
    "bmm",
    numbers((2, 2, 3), (2, 3, 2)),
    lambda x, y: torch.bmm(x, y),
    lower=True,
    x=lambda g, y: torch.bmm(g, y.mT),
    y=lambda g, x: torch.bmm(x.mT, g),
)


def convolution(rank: int, *shapes: tuple[int, ...]) -> None:
    def gradient(which: int, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        mask = [which == k for k in range(3)]
        one, zero = [1] * rank, [0] * rank
        return aten.convolution_backward(g, x, weight, None, one, zero, one, False, zero, 1, mask)[which]

    thin(
        f"conv{rank}d",
        numbers(*shapes),
        lambda x, weight, bias: (F.conv1d, F.conv2d)[rank - 1](x, weight, bias),
        lower=True,
        x=lambda g, x, weight: gradient(0, g, x, weight),
        weight=lambda g, x, weight: gradient(1, g, x, weight),
        bias=lambda g: g.sum([0, *range(2, g.dim())]),
    )


convolution(1, (2, 2, 5), (3, 2, 3), (3,))
convolution(2, (1, 2, 3, 4), (2, 2, 2, 2), (2,))


# Images.

thin(
    "max pool",
    IMAGE,
    lambda x: F.max_pool2d(x, 2, 1, return_indices=True),
    x=lambda g, x, output1: aten.max_pool2d_with_indices_backward(
        g, x, [2, 2], [1, 1], [0, 0], [1, 1], False, output1
    ),
)
thin(
    "average pool",
    IMAGE,
    lambda x: F.avg_pool2d(x, 2, 1),
    x=lambda g, x: aten.avg_pool2d_backward(g, x, [2, 2], [1, 1], [0, 0], False, True, None),
)
thin(
    "adaptive average pool",
    IMAGE,
    lambda x: F.adaptive_avg_pool2d(x, 2),
    x=lambda g, x: aten._adaptive_avg_pool2d_backward(g, x),
)
thin(
    "bilinear upsampling",
    numbers((1, 2, 2, 3)),
    lambda x: F.interpolate(x, size=(4, 5), mode="bilinear"),
    x=lambda g, x: aten.upsample_bilinear2d_backward(g, [4, 5], x.shape, False, None, None),
)


# Normalizations: torch's backward takes the statistics that it kept for constants, so they claim no second order.


def _layer(which: int, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    mask = [which == k for k in range(3)]
    return aten.native_layer_norm_backward(g, x, x.shape[-1:], mean, rstd, weight, None, mask)[which]


thin(
    "layer norm",
    numbers((3, 4), (4,), (4,)),
    lambda x, weight, bias: torch.native_layer_norm(x, x.shape[-1:], weight, bias, 1e-5),
    once=True,
    x=lambda g, x, output1, output2, weight: _layer(0, g, x, output1, output2, weight),
    weight=lambda g, x, output1, output2, weight: _layer(1, g, x, output1, output2, weight),
    bias=lambda g: g.sum(0),
)


def _group(which: int, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    n, c, *rest = x.shape
    mask = [which == k for k in range(3)]
    g, x = g.contiguous(), x.contiguous()
    size = torch.Size(rest).numel()
    return aten.native_group_norm_backward(g, x, mean, rstd, weight.contiguous(), n, c, size, 2, mask)[which]


thin(
    "group norm",
    numbers((1, 4, 3), (4,), (4,)),
    lambda x, weight, bias: torch.native_group_norm(
        x.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        x.shape[0],
        x.shape[1],
        x.shape[2:].numel(),
        2,
        1e-5,
    ),
    once=True,
    x=lambda g, x, output1, output2, weight: _group(0, g, x, output1, output2, weight),
    weight=lambda g, x, output1, output2, weight: _group(1, g, x, output1, output2, weight),
    bias=lambda g: g.sum([0, 2]),
)


def _batch(which: int, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    mask = [which == k for k in range(3)]
    return aten.native_batch_norm_backward(g, x, weight.contiguous(), None, None, mean, rstd, True, 1e-5, mask)[
        which
    ]


thin(
    "batch norm",
    numbers((5, 4), (4,), (4,)),
    lambda x, weight, bias: torch.native_batch_norm(x, weight.contiguous(), bias, None, None, True, 0.1, 1e-5),
    once=True,
    x=lambda g, x, output1, output2, weight: _batch(0, g, x, output1, output2, weight),
    weight=lambda g, x, output1, output2, weight: _batch(1, g, x, output1, output2, weight),
    bias=lambda g: g.sum(0),
)


# Losses.

thin(
    "mse loss",
    numbers((3, 4), (3, 4)),
    lambda x, target: F.mse_loss(x, target),
    x=lambda g, x, target: aten.mse_loss_backward(g, x, target, 1),
    target=lambda g, x, target: -aten.mse_loss_backward(g, x, target, 1),
)
thin(
    "smooth l1 loss",
    numbers((3, 4), (3, 4)),
    lambda x, target: F.smooth_l1_loss(x, target),
    x=lambda g, x, target: aten.smooth_l1_loss_backward(g, x, target, 1, 1.0),
    target=lambda g, x, target: -aten.smooth_l1_loss_backward(g, x, target, 1, 1.0),
)
thin(
    "cross entropy",
    also(MATRIX, torch.tensor([3, 0, 1])),
    lambda x, target: F.cross_entropy(x, target, reduction="sum"),
    x=lambda g, x, target: g * (x.softmax(-1) - F.one_hot(target, x.shape[-1]).to(x)),
)


# By hand: the manners that a Function may have.


@sound("dropout that keeps its mask", MATRIX)
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


@sound("in place, declared dirty", MATRIX)
def double(x: Tensor) -> Any:
    return DoubleInPlace.apply(x.clone())


@sound("two outputs", MATRIX)
class SquareAndTriple(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x, 3 * x

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * first + 3 * second


@sound("two outputs, of which one may be unused", MATRIX)
class LazySquareAndTriple(Function):
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


@sound("a view of its input", MATRIX)
class Transpose(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.mT


@sound("identity", MATRIX)
class Identity(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


@sound("product with every mode by hand", numbers((3, 4), (3, 4)))
class Product(Function):
    """Right at every order, and so is its forward mode; its vmap is its own."""

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


@sound("complex product", lambda: tuple(torch.view_as_complex(x.detach()).requires_grad_() for x in PAIRS()))
class ComplexProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return None if w is None else grad * w.conj(), None if x is None else grad * x.conj()


@sound("arguments that are no tensors", lambda: (*MATRIX(), 3, "scaled", None))
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


@sound("computes in float32 or more", MATRIX)
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


@sound("numpy", MATRIX)
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


@sound("float32 alone", numbers((3, 4), dtype=torch.float32))
class SingleSquare(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        assert x.dtype == torch.float32, "float32 alone"
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


# Outputs of every kind.


@sound("a statistic before the output", MATRIX)
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


@sound("nested outputs, some without a gradient, each of another input", numbers((3, 4), (2,)))
def nested(x: Tensor, w: Tensor) -> Any:
    return {"detached": (x.detach(), None), "x": [x, x.argmax(), x.sin()], "w": (w.detach(), w.cos())}


# Random numbers, whatever they are drawn with.


@sound("a mask of the dtype of its input", MATRIX)
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


@sound("a mask drawn again from the state that was kept", MATRIX)
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


OWN = torch.Generator().manual_seed(3)


@sound("random numbers of six kinds", MATRIX)
def noisy(x: Tensor) -> Any:
    own = torch.rand(x.shape, generator=OWN, dtype=x.dtype)
    mask = torch.bernoulli(torch.full_like(x, 0.7)) * torch.as_tensor(np.random.rand(*x.shape)).to(x)  # noqa: NPY002
    return (
        F.dropout(x * mask + random.random() * own, 0.3),
        x * torch.empty_like(x).normal_(),
        x + torch.randn_like(x),
    )


@sound("a mask of the dtype that autocast chooses", numbers((3, 4), (4, 5)))
def masked_product(x: Tensor, w: Tensor) -> Any:
    y = x @ w
    return (y * (torch.rand_like(y) < 0.7)).sin()


# Modules that keep their parameters in more than one place.

sound("a recurrent module", numbers((2, 1, 2)))(nn.GRU(2, 2).double())
sound("spectral norm", numbers((2, 3)))(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).double().eval())
sound("spectral norm by a hook", numbers((2, 3)))(nn.utils.spectral_norm(nn.Linear(3, 2)).double().eval())


class Keeping(nn.Module):
    """A weight in a list, its transpose in a cache, the same layer twice, recomputation and a running mean."""

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


sound("a module that keeps and caches", numbers((2, 3)))(Keeping())


# Kinks, infinity, precision.


@sound("root of either sign", MATRIX)
class SignedRoot(Function):
    """y = x √|x|, whose slope nears 0 as slowly as √|x|."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x.abs().sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 1.5 * x.abs().sqrt() * grad


@sound("torch's choices at kinks and at infinity", numbers((3, 4), (3, 4)))
def kinks(x: Tensor, y: Tensor) -> Any:
    return x.relu() - 0.25 * (-x).relu(), torch.maximum(x, y), torch.exp(-x * x), torch.fmod(x, y), x.norm(dim=1)


@sound("computes in float32 whatever is given", numbers((3, 4), (4,)))
def rms_norm_in_float32(x: Tensor, weight: Tensor) -> Any:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
