"""Planted defects: small Functions, each with one mistake that real projects make, otherwise right.

Most are y = x² (`Square`) with one method replaced, so that the mistake is all there is to read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch import eager_transforms
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Inputs = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Defect:
    """A mistake, and the law that must find it."""

    name: str
    law: str
    function: Callable[..., Any]
    inputs: Inputs
    require: tuple[str, ...] = ()  # laws that run only on request
    warns: bool = False  # waste: reported, but no failure


DEFECTS: list[Defect] = []


# What gradcheck makes of them.


def gradcheck_catches(defect: Defect) -> bool:
    """Whether gradcheck as it comes objects, in float64 and on the same inputs."""
    return _objects(torch.autograd.gradcheck, defect)


def gradcheck_with_everything_catches(defect: Defect) -> bool:
    """Whether gradcheck or gradgradcheck objects, with every option on for which the Functions claim support."""
    if _objects(torch.autograd.gradcheck, defect, check_undefined_grad=True, check_grad_dtypes=True):
        return True
    functions = _functions(defect)
    forward = all(function.jvp is not Function.jvp for function in functions)
    batched = all(function.generate_vmap_rule or function.vmap is not Function.vmap for function in functions)
    first = {"check_forward_ad": forward, "check_batched_grad": batched}
    if _objects(torch.autograd.gradcheck, defect, **first, check_batched_forward_grad=forward and batched):
        return True
    if any(hasattr(function.backward, "__wrapped__") for function in functions):
        return False  # once_differentiable: it claims no second order
    second = {"check_fwd_over_rev": forward, "check_batched_grad": batched, "gen_non_contig_grad_outputs": True}
    return _objects(torch.autograd.gradgradcheck, defect, **second)


def _objects(check: Callable[..., bool], defect: Defect, **options: bool) -> bool:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            return not check(defect.function, _doubles(defect), **options)
        except Exception:
            return True


def _doubles(defect: Defect) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().requires_grad_() if x.is_floating_point() else x for x in defect.inputs())


def _functions(defect: Defect) -> set[Any]:
    """The Functions behind the outputs, as far as the graph shows them."""
    outputs = defect.function(*_doubles(defect))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    nodes: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    found, seen = set(), set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            found |= {node._forward_cls} if hasattr(node, "_forward_cls") else set()
            nodes += [following for following, _ in node.next_functions if following is not None]
    return found


# How they are planted.


def numbers(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, shift: float = 0.0) -> Inputs:
    """Makes a leaf of each shape: the same numbers every time, 0.5 to 1.5 in size, of either sign."""

    def make() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)

        def leaf(shape: tuple[int, ...]) -> Tensor:
            size = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
            sign = 2 * torch.randint(0, 2, shape, generator=generator) - 1
            return (sign * size + shift).to(dtype).requires_grad_()

        return tuple(leaf(shape) for shape in shapes)

    return make


MATRIX = numbers((3, 4))
TWO = numbers((3, 4), (3, 4))


def channels_last() -> tuple[Tensor]:
    (x,) = numbers((2, 3, 2, 2))()
    return (x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(),)


def planted(
    name: str, law: str, inputs: Inputs = MATRIX, *, require: tuple[str, ...] = (), warns: bool = False
) -> Callable[[Any], Any]:
    """Enters a Function, or a function, into the table."""

    def enter(made: Any) -> Any:
        function = made.apply if isinstance(made, type) else made
        DEFECTS.append(Defect(name, law, function, inputs, require, warns))
        return made

    return enter


class Square(Function):
    """y = x², right at every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Product(Function):
    """y = x w, right at every order, keeping and computing what is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return None if w is None else grad * w, None if x is None else grad * x


class Cube(Function):
    """y = x³: unlike a square's, its gradient is not linear in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


class TransformedSquare(Function):
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


class TransformedProduct(Function):
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
        return TransformedProduct.apply(*batch_first(in_dims, x, w)), 0


def batch_first(in_dims: tuple[int | None, ...], *tensors: Tensor) -> Iterator[Tensor]:
    """The batch axis in front, and the others aligned behind it."""
    rank = max(x.dim() - (axis is not None) for x, axis in zip(tensors, in_dims, strict=True))
    for x, axis in zip(tensors, in_dims, strict=True):
        x = x.unsqueeze(0) if axis is None else x.movedim(axis, 0)
        yield x.reshape(x.shape[:1] + (1,) * (rank + 1 - x.dim()) + x.shape[1:])


def _derived(name: str, base: type[Function], **methods: Callable[..., Any]) -> type[Function]:
    title = "".join(word.capitalize() for word in name.split() if word.isidentifier())
    return type(title, (base,), {key: staticmethod(method) for key, method in methods.items()})


def forward(
    name: str, law: str, inputs: Inputs = MATRIX, base: type[Function] = Square, **options: Any
) -> Callable[[Any], Any]:
    """Enters `base` with this forward."""
    return lambda method: planted(name, law, inputs, **options)(_derived(name, base, forward=method))


def backward(
    name: str, law: str, inputs: Inputs = MATRIX, base: type[Function] = Square, **options: Any
) -> Callable[[Any], Any]:
    """Enters `base` with this backward."""
    return lambda method: planted(name, law, inputs, **options)(_derived(name, base, backward=method))


def jvp(
    name: str, law: str, inputs: Inputs = MATRIX, base: type[Function] = TransformedSquare
) -> Callable[[Any], Any]:
    """Enters `base` with this jvp."""
    return lambda method: planted(name, law, inputs)(_derived(name, base, jvp=method))


def vmap(
    name: str, law: str, inputs: Inputs = TWO, base: type[Function] = TransformedProduct
) -> Callable[[Any], Any]:
    """Enters `base` with this vmap."""
    return lambda method: planted(name, law, inputs)(_derived(name, base, vmap=method))


# The gradient is wrong.


@backward("wrong factor in the gradient", "gradient")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x * grad


@backward("wrong gradient at one element", "gradient")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    result = 2 * x * grad
    return torch.cat([result.flatten()[:-1], 1.01 * result.flatten()[-1:]]).reshape(x.shape)


@backward("None for an input that matters", "gradient", TWO, Product)
def _(ctx: Any, grad: Tensor) -> Any:
    _, w = ctx.saved_tensors
    return None if w is None else grad * w, None


@backward("upstream ignored", "gradient")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x


@backward("right for an upstream of ones only", "gradient")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.mean()


@backward("sum of the upstream", "gradient")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.sum()


@backward("first element of the upstream for all", "gradient")  # a fused loss that was written for a mean
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.flatten()[0] if grad.numel() else 2 * x * grad


class Both(Function):
    """x², 3 x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x, 3 * x

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * first + 3 * second


@backward("upstreams of two outputs swapped", "gradient", base=Both)
def _(ctx: Any, second: Tensor, first: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * first + 3 * second


@backward("upstream of the second output ignored", "gradient", base=Both)
def _(ctx: Any, first: Tensor, second: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * first


def seeded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same random numbers in every call: without it no check by differences could pass."""

    def call(*inputs: Tensor) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return function(*inputs)

    return call


class Dropout(Function):
    """The backward draws its mask anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x * (torch.rand(x.shape) > 0.5).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * (torch.rand(grad.shape) > 0.5).to(grad)


planted("dropout draws another mask in backward", "gradient")(seeded(Dropout.apply))


class ReplayedDropout(Function):
    """The backward draws its mask from the state of the generator, which was taken too late."""

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


planted("dropout replays the generator from after its mask", "gradient")(seeded(ReplayedDropout.apply))


# The gradient is right for some upstreams.


@backward("gradient clipped to [-1, 1]", "upstream")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.clamp(-1, 1)


@backward("nan in the upstream becomes 0", "upstream")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.nan_to_num()


@backward("upstream normalized to length 1", "upstream")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad / torch.linalg.vector_norm(grad).clamp_min(1e-30)


@backward("writes into grad_output", "upstream_unchanged")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return grad.mul_(2 * x)


@backward("writes into grad_output, differentiable once", "upstream_unchanged")
@once_differentiable
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return grad.mul_(2 * x)


@backward("writes into grad_output.data", "upstream_unchanged")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    grad.data.mul_(2)
    return x * grad


@backward("view of a strided upstream", "strided_upstream")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.view(-1).view(x.shape)


def as_if_contiguous(x: Tensor) -> Tensor:
    """What a kernel sees that takes the pointer and forgets the strides."""
    return torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride())


@backward("upstream read as if contiguous", "strided_upstream")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * as_if_contiguous(grad.clone() if 0 in grad.stride() else grad)


@backward("expanded upstream taken for a scalar", "strided_upstream")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * (grad.flatten()[0] if 0 in grad.stride() and grad.numel() else grad)


@backward("number of elements as a divisor", "zero_size")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x * grad * x.numel() * (2 / x.numel())


@backward("reshape(rows, -1) of an empty upstream", "zero_size")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return (2 * x * grad).reshape(len(x), -1).reshape(x.shape) if x.dim() else 2 * x * grad


@backward("squeeze without an axis", "size_one")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad.squeeze()


# Forward mode, vmap, torch.func.


@jvp("wrong factor in the tangent", "forward_mode")
def _(ctx: Any, tangent: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x * tangent


@planted("vmap that takes every batch axis for the first", "vmap")
class FirstAxisSquare(TransformedSquare):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor) -> Any:
        return FirstAxisSquare.apply(x), 0


@vmap("vmap that goes by the first input's axis", "vmap")
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor) -> Any:
    return TransformedProduct.apply(*batch_first(in_dims, x, w)), None if in_dims[0] is None else 0


@planted("keeps nothing when transformed", "torch_func")
class UntransformedSquare(TransformedSquare):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (x,) = inputs
        ctx.save_for_backward(torch.zeros_like(x) if is_functorch_wrapped_tensor(x) else x)
        ctx.save_for_forward(x)


class BatchBlindProduct(TransformedProduct):
    """What a backward calls: right but for vmap, which takes the first of the batch for all."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor) -> Any:
        x, w = (next(batch_first((axis,), t))[0] for t, axis in zip((x, w), in_dims, strict=True))
        return TransformedProduct.apply(x, w), None


@backward("backward calls a Function with a wrong vmap", "batched_gradients", base=TransformedSquare)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return BatchBlindProduct.apply(2 * x, grad)


# The derivative of the derivative.


class KeptSlope(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(3 * x * x)  # a constant to the second derivative
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return slope * grad


planted("slope computed in forward and kept", "double_backward")(KeptSlope)


@backward("detach in backward", "double_backward", base=Cube)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 3 * x.detach() * x * grad


@backward("backward recomputes without grad", "double_backward", base=Cube)
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


@backward("a saved value becomes a Python number", "double_backward", base=Total)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return grad * x.sum().item() + (grad * x).sum()


class TangentBlindProduct(TransformedProduct):
    """What a backward calls: right but for the tangent of its first factor."""

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, w_tangent: Tensor | None) -> Any:
        x, w = ctx.saved_tensors
        return x * w_tangent if w_tangent is not None else torch.zeros_like(x * w)


@backward("backward calls a Function with a wrong jvp", "forward_over_reverse", base=TransformedSquare)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return TangentBlindProduct.apply(2 * x, grad)


@jvp("detach in jvp", "reverse_over_forward")
def _(ctx: Any, tangent: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x.detach() * tangent


@planted("another curvature under an outer forward mode", "forward_over_forward")
def bent_when_nested(x: Tensor) -> Tensor:
    if eager_transforms.JVP_NESTING > 1:
        return x * x * 1.5 - 0.5 * (x.detach() * (2 * x - x.detach()))
    return x * x


# Tensors that are not theirs to write into, or to hand out.


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


@forward("softmax shifts its input in place", "inputs_unchanged", base=Softmax)
def _(ctx: Any, x: Tensor) -> Any:
    x -= x.sum(-1, keepdim=True)
    y = torch.softmax(x, -1)
    ctx.save_for_backward(y)
    return y


@forward("shifts its input and shifts it back", "inputs_unchanged", base=Softmax)  # but for the rounding
def _(ctx: Any, x: Tensor) -> Any:
    shifted = x.detach().sub_(3.3)
    y = torch.softmax(shifted, -1)
    shifted.add_(3.3)
    ctx.save_for_backward(y)
    return y


@forward("masks the scores of attention in place", "inputs_unchanged", base=Softmax)
def _(ctx: Any, x: Tensor) -> Any:
    x.view(x.shape)[..., :1] = -1e4
    y = torch.softmax(x, -1)
    ctx.save_for_backward(y)
    return y


class Embedding(Function):
    """Rows of a table, of which row 0 is for padding and counts as 0."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor) -> Any:
        weight.data[:1] = 0  # kept 0, so its owner does not see it until he puts something there
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


planted("zeroes the padding row through .data", "inputs_unchanged", table)(Embedding)


class Absolute(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return x.sign() * grad


@backward("writes into a saved input in backward", "inputs_unchanged", base=Absolute)
@once_differentiable
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x.data.sign_() * grad


@backward("uses a saved input as scratch in backward", "inputs_unchanged")
@once_differentiable
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x.mul_(2).mul(grad)


class Double(Function):
    """y = 2 x, in place: written, returned, but not declared dirty."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * grad


planted("mark_dirty missing", "inputs_unchanged")(Double)


class Identity(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


@forward("returns input.data", "aliasing", base=Identity)
def _(ctx: Any, x: Tensor) -> Any:
    return x.data


@forward("returns the input's memory by way of numpy", "aliasing", base=Identity)
def _(ctx: Any, x: Tensor) -> Any:
    return torch.from_numpy(x.detach().numpy())


@forward("returns a tensor set to the input's storage", "aliasing", base=Identity)
def _(ctx: Any, x: Tensor) -> Any:
    return x.new_empty(0).set_(x.detach())  # type: ignore[arg-type]


class Energy(Function):
    """y = Σx² / 2, of which the gradient is x: with an upstream of 1 it hands out x itself, to save a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return (x * x).sum() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return x.view_as(x) if grad == 1 else x * grad


planted("the input itself is the gradient", "aliasing")(Energy)


# Tensors that nobody frees.


class Exp(Function):
    """y = eˣ, right at every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return y * grad


@planted("output hung on ctx", "no_tensors_on_ctx")
class OutputOnContext(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.y = x.exp()
        return ctx.y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.y * grad


@planted("intermediate hung on ctx", "no_tensors_on_ctx")
class IntermediateOnContext(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.slope = 2 * x
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.slope * grad


@planted("intermediates in a list on ctx", "no_tensors_on_ctx")
class ListOnContext(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.cache = [2 * x]
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.cache[0] * grad


@planted("intermediates in a dict on ctx", "no_tensors_on_ctx")
class DictOnContext(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.cache = {"slope": 2 * x}
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.cache["slope"] * grad


@backward("gradient cached on ctx", "no_tensors_on_ctx")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    ctx.gradient = 2 * x * grad
    return ctx.gradient.clone()


OUTPUTS: list[Tensor] = []
LATEST: dict[str, Tensor] = {}


@forward("outputs gathered in a global list", "no_memory_leaks")
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    OUTPUTS.append(x * x)
    return OUTPUTS[-1]


@backward("latest gradient kept in a global", "no_memory_leaks")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    LATEST["gradient"] = 2 * x * grad
    return LATEST["gradient"].clone()


@planted("latest input kept by the class", "no_memory_leaks")
class Remembering(Square):
    latest: Tensor | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        Remembering.latest = 1 * x
        ctx.save_for_backward(x)
        return x * x


class Gathering(torch.nn.Module):
    """x², and every output is kept in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        self.outputs.append(x * x)
        return self.outputs[-1]


planted("outputs gathered by a module", "no_memory_leaks")(Gathering())


# The second backward of one graph.


@backward("counts its backwards", "backward_twice")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    ctx.calls = getattr(ctx, "calls", 0) + 1
    return 2 * x * grad / ctx.calls


class KeptGradient(Function):
    """y = x² with its slope computed in forward, as fused losses do; the backward scales it in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(2 * x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return slope.data.mul_(grad)


planted("scales the kept gradient in place", "backward_twice")(KeptGradient)


@planted("frees what it kept", "backward_twice")
class Freeing(Square):
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


# Layouts, shapes, types, devices.


@forward("view of a strided input", "strided_inputs")
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    return x.view(-1).square().view(x.shape)


@forward("input read as if contiguous", "strided_inputs")
def _(ctx: Any, x: Tensor) -> Any:
    x = as_if_contiguous(x)
    ctx.save_for_backward(x)
    return x * x


@backward("channels_last lost", "memory_format", channels_last)
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
        return grad, grad  # of the shape of y: the engine sums it


planted("gradient of a bias not summed over the batch", "gradient_metadata", numbers((3, 4), (4,)))(Bias)


@backward("float32 gradient of a float64 input", "gradient_metadata")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x.float() * grad.float()


@backward("float64 gradient of a float32 input", "gradient_metadata", numbers((3, 4), dtype=torch.float32))
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x.double() * grad.double()


@backward("ones on the default device", "other_device")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad * torch.ones(x.shape, dtype=x.dtype)


# Numbers that are hard.


def standardized(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered * (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


class Standardize(Function):
    """y = (x - E x) / √(var x + ε), with var x = E x² - (E x)² in backward: in bfloat16 little is left of it."""

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


planted("variance as a difference of squares", "low_precision", numbers((3, 4), shift=100.0))(Standardize)


class Integral(Function):
    """x dt over 500 steps; the backward adds them in the type that they come in, as an adjoint solver may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return 5 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        total = torch.zeros_like(grad)
        for _ in range(500):
            total = total + 0.01 * grad
        return total


planted("sum kept in low precision", "low_precision", numbers((3,)))(Integral)


class Direction(Function):
    """y = x / |x|; in backward the squares leave float16's range."""

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


planted("squares before it takes the root", "low_precision", numbers((3, 4), shift=300.0))(Direction)


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


@backward("sigmoid's slope by eˣ / (1 + eˣ)²", "large_values", base=Sigmoid)
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x.exp() / (1 + x.exp()) ** 2 * grad


@backward("sigmoid's slope by e⁻ˣ / (1 + e⁻ˣ)²", "special_values", base=Sigmoid)  # at -∞
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


planted("mask times infinity", "large_values")(ELU)


class Sinc(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return torch.where(x == 0, 1, x.sin() / x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return (x.cos() - x.sin() / x) / x * grad


planted("0 / 0 where the slope is 0", "special_values")(Sinc)


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


planted("sign by x / |x|", "special_values")(SignedSquare)


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


planted("0 · ∞ where the slope is 0", "special_values")(Bell)


class ReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.where(x == 0, 5.0, (x > 0).to(x)) * grad


planted("slope 5 at the kink of relu", "special_values")(ReLU)


class LeakyReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return F.leaky_relu(x, 0.1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return (x >= 0) * grad + (x <= 0) * 0.1 * grad


planted("both sides of the kink counted at 0", "special_values")(LeakyReLU)


class Hardtanh(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() == 1, 2.0, (x.abs() < 1).to(x)) * grad


planted("slope 2 at the corners of hardtanh", "special_values")(Hardtanh)


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


planted("0 / 0 where torch's derivative is nan too", "special_values")(SignedRoot)


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


planted("0 where 0 / 0 is ½", "special_values")(Expm1Ratio)


@backward("nan for the other factor", "special_values", TWO, Product)
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


planted("x / ‖x‖ of nothing but zeros", "special_values")(Norm)


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


planted("0 / 0 where all inputs are 0", "special_values", TWO)(Hypot)


# Random numbers.


NOISE = torch.Generator().manual_seed(0)


@backward("noise in the gradient", "deterministic")  # as stochastic rounding adds it
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    noise = torch.rand(x.shape, generator=NOISE).to(x)
    return 2 * x * grad * (1 + 1e-7 * noise)


@backward("random numbers drawn for nothing", "random_state")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    torch.rand(x.shape)
    return 2 * x * grad


@backward("generator seeded in backward", "random_state")
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    torch.manual_seed(0)
    return 2 * x * grad


@forward("generator seeded in forward", "random_state")
def _(ctx: Any, x: Tensor) -> Any:
    torch.manual_seed(0)
    ctx.save_for_backward(x)
    return x * x


# What ctx is told.


@forward("mark_dirty on a fresh output", "declarations")
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


@planted("mark_dirty on a tensor that is not written", "declarations")
def dirty_identity(x: Tensor) -> Any:
    return DirtyIdentity.apply(1 * x)


@forward("mark_non_differentiable on the only output", "declarations")
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    y = x * x
    ctx.mark_non_differentiable(y)
    return y


class Statistics(Function):
    """x², and two statistics that nobody differentiates."""

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


@forward("mark_non_differentiable twice", "declarations", base=Statistics)  # the second call undoes the first
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    y, mean, norm = x * x, x.mean(), (x * x).sum()
    ctx.mark_non_differentiable(mean)
    ctx.mark_non_differentiable(norm)
    return y, mean, norm


@forward("save_for_backward twice", "declarations", TWO, Product)  # the second call undoes the first
def _(ctx: Any, x: Tensor, w: Tensor) -> Any:
    ctx.save_for_backward(x, None)
    ctx.save_for_backward(None, w)
    return x * w


class Signed(Square):
    """x², and the signs of x."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@forward("mark_non_differentiable on an input", "declarations", base=Signed)
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(x)
    return x * x, x.sign().long()


# Some outputs, some inputs.


class Lazy(Both):
    """x², 3 x, without zeros for what is not used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x * x, 3 * x


@backward("fails on an unused output", "unused_outputs", base=Lazy)
def _(ctx: Any, first: Tensor | None, second: Tensor | None) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * first + 3 * second  # type: ignore[operator]


@backward("takes the upstream of an unused output for 1", "unused_outputs", base=Lazy)
def _(ctx: Any, first: Tensor | None, second: Tensor | None) -> Any:
    (x,) = ctx.saved_tensors
    first, second = (torch.ones_like(x) if grad is None else grad for grad in (first, second))
    return 2 * x * first + 3 * second


class KeepAll(Product):
    """Keeps both factors, whichever is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return x * w


@backward("fails where one input needs no gradient", "gradient_of_each_subset", TWO, KeepAll)
def _(ctx: Any, grad: Tensor) -> Any:
    x, w = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        grad_x = grad * w
    if ctx.needs_input_grad[1]:
        grad_w = grad * x
    return grad_x, grad_w  # type: ignore[possibly-unbound]


@backward("gradients packed to the left", "gradient_of_each_subset", TWO, Product)
def _(ctx: Any, grad: Tensor) -> Any:
    x, w = ctx.saved_tensors
    needed = [grad * factor for factor in (w, x) if factor is not None]
    return *needed, *[None] * (2 - len(needed))


@backward("computes gradients that nobody needs", "no_unneeded_gradients", TWO, KeepAll, warns=True)
def _(ctx: Any, grad: Tensor) -> Any:
    x, w = ctx.saved_tensors
    return grad * w, grad * x


@backward("keeps both factors for one gradient", "no_unused_saved_tensors", TWO, KeepAll, warns=True)
def _(ctx: Any, grad: Tensor) -> Any:
    x, w = ctx.saved_tensors
    return grad * w if ctx.needs_input_grad[0] else None, grad * x if ctx.needs_input_grad[1] else None


@planted("keeps an output that it does not use", "no_unused_saved_tensors", warns=True)
class Hoarding(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = x * x
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, _ = ctx.saved_tensors
        return 2 * x * grad


# The machinery around: autocast, compile, hooks, checkpoints, ranks.


class Matmul(Function):
    """y = x w. Under autocast y is bfloat16, and so is its upstream."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return None if w is None else grad @ w.mT, None if x is None else x.mT @ grad


FACTORS = numbers((3, 4), (4, 2))
planted("upstream of another type than what was kept", "autocast", FACTORS)(Matmul)


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


planted("mask forgotten in low precision", "autocast")(seeded(RandomMask.apply))


@forward("print in forward", "compile", require=("compile",))
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    print(end="")
    return x * x


@forward("branch on a value in forward", "compile", require=("compile",))
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    return x * x if x.sum().item() > 0 else x.square()


@backward("another gradient when compiled", "compile", require=("compile",))
def _(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return x * grad if torch.compiler.is_compiling() else 2 * x * grad


@forward("divmod of a size", "compile_dynamic", require=("compile_dynamic",))
def _(ctx: Any, x: Tensor) -> Any:
    ctx.save_for_backward(x)
    halves, _ = divmod(x.shape[0], 2)
    return torch.cat([x[:halves], x[halves:]]).square()


@backward("reads saved_tensors twice", "checkpoint", TWO, KeepAll)
def _(ctx: Any, grad: Tensor) -> Any:
    grad_x = grad * ctx.saved_tensors[1] if ctx.needs_input_grad[0] else None
    grad_w = grad * ctx.saved_tensors[0] if ctx.needs_input_grad[1] else None
    return grad_x, grad_w


@planted("knows the saved tensor by its address", "saved_tensor_hooks")
class Addressed(Square):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.address = x.data_ptr()
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if x.data_ptr() != ctx.address:
            raise RuntimeError("the input has moved")
        return 2 * x * grad


@planted("knows the saved tensor by its id", "saved_tensor_hooks")
class Identified(Square):
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


@planted("gradient that depends on the rank", "distributed", require=("distributed",))
def scaled_by_rank(x: Tensor) -> Any:
    return ScaledByRank.apply(x)


@planted("no gradient on rank 1", "distributed", require=("distributed",))
def none_on_other_ranks(x: Tensor) -> Any:
    return NoneOnOtherRanks.apply(x)


# Tensors that come in by the back door.


WEIGHT = torch.linspace(1, 2, 4, dtype=torch.float64, requires_grad=True)


class Layer:
    def __init__(self) -> None:
        self.weight = WEIGHT

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x)


@planted("a global weight", "captured_tensors")
class GlobalWeight(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x * WEIGHT.to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * WEIGHT.to(grad)


def closed_over(weight: Tensor) -> type[Function]:
    class ClosedOver(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            return x * weight.to(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad * weight.to(grad)

    return ClosedOver


planted("a weight in a closure", "captured_tensors")(closed_over(WEIGHT))


class CalledLayer(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Any:
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.layer(grad), None


LAYER = Layer()


@planted("a layer as an argument", "captured_tensors")
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


@planted("weights in a list", "captured_tensors")
def list_of_weights(x: Tensor) -> Any:
    return ListOfWeights.apply(x, [WEIGHT])


@planted("an input handed on in a list", "captured_tensors", numbers((3, 4), (4,)))
def input_in_a_list(x: Tensor, weight: Tensor) -> Any:
    return ListOfWeights.apply(x, [weight])


# The table in the README.


def by_law() -> str:
    """By law: how many defects are planted, and how many each checker finds.

    That verify finds every one is what tests/test_verification.py asserts, one by one.
    """
    rows = ["| what is wrong | planted | gradcheck | gradcheck, every option | verify |", "|---|---|---|---|---|"]
    total = [0, 0, 0]
    for law in dict.fromkeys(defect.law for defect in DEFECTS):
        defects = [defect for defect in DEFECTS if defect.law == law]
        counts = [len(defects), sum(map(gradcheck_catches, defects)), sum(map(either_catches, defects))]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        examples = defects[0].name + (f", {defects[1].name}" if len(defects) > 1 else "")
        rows.append(f"| `{law}`: {examples} | {' | '.join(map(str, counts))} | {counts[0]} |")
    rows.append(f"| **all** | {' | '.join(map(str, total))} | {total[0]} |")
    return "\n".join(rows)


def either_catches(defect: Defect) -> bool:
    return gradcheck_catches(defect) or gradcheck_with_everything_catches(defect)


if __name__ == "__main__":
    print(by_law())
