"""Normalization of layers, groups and batches, and local response normalization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn.modules import _functions

from manualgrad.ops.registration import implements, with_torch_errors
from manualgrad.ops.shapes import flatten, rows, unflatten
from manualgrad.registry import SampleInput, register
from manualgrad.rule import FLOAT32, Rule
from manualgrad.torch_internals import is_autocast_on_cuda

Axes = tuple[int, ...]
Mean = Callable[[Tensor], Tensor]

_functional: Any = F  # for its private functions


class Normalization(Rule):
    r"""y = x̂ w + b,   x̂ = (x - μ) r,   μ = E x,   r = (E (x-μ)² + ε)^-½      E: the mean over some axes

    dμ    = E dx
    dr    = -r³ E[(x-μ) (dx - dμ)] = -r² E[x̂ dx]                            (as E x̂ = 0)
    dx̂    = r (dx - dμ) + (x-μ) dr = r (dx - E dx - x̂ E[x̂ dx])              (this map is symmetric)
    ∂L/∂x = r (h - E h - x̂ E[x̂ h]),   h = ∂L/∂x̂ = g w            ∂L/∂w = Σ g x̂            ∂L/∂b = Σ g

    A subclass defines x, g and w in shapes that broadcast, the axes ``mean_axes`` of E, and the axes ``sum_axes``
    of Σ: all axes that w does not have.

    A backward that is differentiated also differentiates μ and r, which depend on x. (torch 2.13 treats the saved
    r as a constant there, so its third derivatives are wrong.)
    """

    statistics = ("mean", "rstd")

    def x(input: Tensor) -> Tensor:
        return input

    def g(grad: Tensor) -> Tensor:
        return grad

    def E(mean_axes: Axes) -> Mean:
        return lambda tensor: tensor.mean(mean_axes, keepdim=True)

    def mean(x: Tensor, E: Mean) -> Tensor:
        return E(x)

    def rstd(x: Tensor, mean: Tensor, E: Mean, eps: float) -> Tensor:
        return (E((x - mean).square()) + eps).rsqrt()

    def xhat(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        return (x - mean) * rstd

    def h(g: Tensor, w: Tensor | None) -> Tensor:
        return g if w is None else g * w

    def grad_input(grad: Tensor, h: Tensor, xhat: Tensor, rstd: Tensor, E: Mean) -> Tensor:
        return (rstd * (h - E(h) - xhat * E(xhat * h))).reshape(grad.shape)

    def grad_weight(g: Tensor, xhat: Tensor, sum_axes: Axes) -> Tensor:
        return (g * xhat).sum(sum_axes)

    def grad_bias(g: Tensor, sum_axes: Axes) -> Tensor:
        return g.sum(sum_axes)


class LayerNormFunction(Normalization):
    r"""E: over the last k axes, which are the axes of w and b      Σ: over all other axes, flattened to one

    Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """

    autocast = {"cuda": "float32"}
    recomputable = True

    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, rstd = torch.native_layer_norm(input, input.shape[input.dim() - k :], weight, bias, eps)
        return output, mean.reshape(-1, *[1] * k), rstd.reshape(-1, *[1] * k)

    def batch_dims(grad: Tensor, k: int) -> int:
        return grad.dim() - k

    def mean_axes(k: int) -> Axes:
        return tuple(range(1, k + 1))

    def sum_axes() -> Axes:
        return (0,)

    def x(input: Tensor, k: int) -> Tensor:
        return rows(input, k)

    def g(grad: Tensor, k: int) -> Tensor:
        return rows(grad, k)

    def w(weight: Tensor | None) -> Tensor | None:
        return weight


@with_torch_errors
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / √(var + ε) · w + b over the last axes, as `torch.nn.functional.layer_norm`.

    Shapes: input (*, normalized_shape), weight and bias normalized_shape; the result as the input.
    """
    _check_shape(input, normalized_shape, "layer_norm")
    return LayerNormFunction.apply(input, weight, bias, len(normalized_shape), eps)


def _check_shape(input: Tensor, normalized_shape: Sequence[int], name: str) -> None:
    """Check the sizes of the normalized axes. The rule receives only their number."""
    k = len(normalized_shape)
    if k == 0 or tuple(input.shape[input.dim() - k :]) != tuple(normalized_shape) or input.dim() < k:
        raise RuntimeError(
            f"{name}: the last axes of the input must have the sizes normalized_shape={list(normalized_shape)}, "
            f"at least one, but the input has the shape {list(input.shape)}"
        )


register(
    layer_norm,
    sample_inputs=lambda t: [
        SampleInput(t(5, 4), (4,), t(4), t(4)),
        SampleInput(t(2, 3, 4), (3, 4), t(3, 4)),
        SampleInput(t(5, 4), (4,), eps=0.1),
    ],
    benchmark_input=lambda t: SampleInput(t(2048, 512), (512,), t(512), t(512)),
)


class RMSNormFunction(Rule):
    r"""y = x̂ w,   x̂ = x r,   r = (E x² + ε)^-½      E: the mean over the last k axes, which are the axes of w

    dr    = -r³ E[x dx] = -r² E[x̂ dx]
    dx̂    = r dx + x dr = r (dx - x̂ E[x̂ dx])              (this map is symmetric)
    ∂L/∂x = r (h - x̂ E[x̂ h]),   h = ∂L/∂x̂ = g w            ∂L/∂w = Σ g x̂      (Σ: over all other axes)

    For complex numbers the adjoint of a symmetric map is its conjugate, so r, x̂ and w are conjugated.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    autocast = {"cuda": "float32"} if is_autocast_on_cuda("rms_norm") else {}  # not in torch 2.11
    recomputable = True
    supports_complex = True

    def forward(input: Tensor, weight: Tensor | None, k: int, eps: float | None) -> Tensor:
        return F.rms_norm(input, input.shape[input.dim() - k :], weight, eps)

    def batch_dims(grad: Tensor, k: int) -> int:
        return grad.dim() - k

    def axes(k: int) -> Axes:
        return tuple(range(-k, 0))

    def rstd(input: Tensor, axes: Axes, eps: float | None) -> Tensor:
        return (input.square().mean(axes, True) + (torch.finfo(input.dtype).eps if eps is None else eps)).rsqrt()

    def xhat(input: Tensor, rstd: Tensor) -> Tensor:
        return input * rstd

    def h(grad: Tensor, weight: Tensor | None) -> Tensor:
        return grad if weight is None else grad * weight.conj()

    def grad_input(h: Tensor, xhat: Tensor, rstd: Tensor, axes: Axes) -> Tensor:
        return rstd.conj() * (h - xhat.conj() * (xhat.conj() * h).mean(axes, True))

    def grad_weight(grad: Tensor, xhat: Tensor, k: int) -> Tensor:
        return rows(grad * xhat.conj(), k).sum(0)


@with_torch_errors
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """x / √(mean x² + ε) · w over the last axes, as `torch.nn.functional.rms_norm`.

    Shapes: input (*, normalized_shape), weight normalized_shape; the result as the input.
    """
    _check_shape(input, normalized_shape, "rms_norm")
    return RMSNormFunction.apply(input, weight, len(normalized_shape), eps)


register(
    rms_norm,
    sample_inputs=lambda t: [
        SampleInput(t(5, 4), (4,), t(4)),
        SampleInput(t(2, 3, 4), (3, 4), t(3, 4), eps=0.1),
        SampleInput(t(5, 4), (4,)),
    ],
    benchmark_input=lambda t: SampleInput(t(2048, 512), (512,), t(512)),
)


class GroupNormFunction(Normalization):
    r"""E: over the n elements of a group of channels      x: (N, groups, channels per group, *)

    w has one element for each channel, so E follows from the sums over the positions * of a channel, s = Σ g and
    t = Σ g x̂. With Σ_c over the channels of a group and Σ_N over the examples:

    ∂L/∂x = r (h - E h - x̂ E[x̂ h]),   E h = Σ_c s w / n,   E[x̂ h] = Σ_c t w / n
    ∂L/∂w = Σ_N t        ∂L/∂b = Σ_N s

    Wu and He, "Group Normalization", 2018.
    """

    autocast = {"cuda": "float32"}
    recomputable = True

    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, channels = input.shape[:2]
        # the kernels need contiguous tensors, and only those of the CPU support channels_last
        memory_format = suggest_memory_format(input) if input.is_cpu else torch.contiguous_format
        input = input.contiguous(memory_format=memory_format)
        weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
        positions = math.prod(input.shape[2:])
        output, mean, rstd = torch.native_group_norm(input, weight, bias, n, channels, positions, groups, eps)
        shape = (n, groups, *[1] * (input.dim() - 1))
        return output, mean.reshape(shape), rstd.reshape(shape)

    def mean_axes(input: Tensor) -> Axes:
        return tuple(range(2, input.dim() + 1))

    def n(g: Tensor) -> int:
        return math.prod(g.shape[2:])

    def x(input: Tensor, groups: int) -> Tensor:
        return unflatten(input, 1, (groups, input.shape[1] // groups))

    def g(grad: Tensor, groups: int) -> Tensor:
        return unflatten(grad, 1, (groups, grad.shape[1] // groups))

    def w(weight: Tensor | None, g: Tensor) -> Tensor | None:
        return None if weight is None else weight.reshape(*g.shape[1:3], *[1] * (g.dim() - 3))

    def s(g: Tensor) -> Tensor:
        return _sum_over_positions(g)

    def t(g: Tensor, xhat: Tensor) -> Tensor:
        return _sum_over_positions(g * xhat)

    def E_h(s: Tensor, w: Tensor | None, n: int) -> Tensor:
        return (s if w is None else s * w).sum(2, keepdim=True) / n

    def E_xhat_h(t: Tensor, w: Tensor | None, n: int) -> Tensor:
        return (t if w is None else t * w).sum(2, keepdim=True) / n

    def grad_input(grad: Tensor, h: Tensor, E_h: Tensor, xhat: Tensor, E_xhat_h: Tensor, rstd: Tensor) -> Tensor:
        return (rstd * (h - E_h - xhat * E_xhat_h)).reshape(grad.shape)

    def grad_weight(t: Tensor) -> Tensor:
        return flatten(t.sum(0))

    def grad_bias(s: Tensor) -> Tensor:
        return flatten(s.sum(0))


def _sum_over_positions(x: Tensor) -> Tensor:
    """(N, groups, channels per group, *) to the same with every * of size 1."""
    return x.sum(tuple(range(3, x.dim())), keepdim=True) if x.dim() > 3 else x


@with_torch_errors
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / √(var + ε) · w + b for each group of channels, as `torch.nn.functional.group_norm`.

    Shapes: input (N, C, *), weight and bias (C).

    Raises:
        ValueError: a group has only one element.
    """
    _functional._verify_batch_size([len(input) * input.shape[1] // num_groups, num_groups, *input.shape[2:]])
    return GroupNormFunction.apply(input, weight, bias, num_groups, eps)


register(
    group_norm,
    sample_inputs=lambda t: [
        SampleInput(t(2, 4, 3), 2, t(4), t(4)),
        SampleInput(t(2, 6, 2, 2), 3, t(6), eps=0.1),
        SampleInput(t(3, 6), 2),
    ],
    benchmark_input=lambda t: SampleInput(t(16, 64, 32, 32), 8, t(64), t(64)),
)


class BatchNormFunction(Normalization):
    r"""E: over the n elements of a channel, N and *      x: (N, C, *)

    w is the same number for all of them, so E h = w E g. With s = Σ g and t = Σ g x̂ over the same elements:
    ∂L/∂x = r w (g - (E g + x̂ E[x̂ g])),   E g = s / n,   E[x̂ g] = t / n      ∂L/∂w = Σ_N t      ∂L/∂b = Σ_N s
    (s and t have the shape (1, C, *1). Σ_N is a sum for `InstanceNormFunction`, where N is not 1.)

    Ioffe and Szegedy, "Batch Normalization", ICML 2015.
    """

    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, rstd = _normalize(input, weight, bias, running_mean, running_var, True, momentum, eps)
        return output, _per_channel(mean, input).unsqueeze(0), _per_channel(rstd, input).unsqueeze(0)

    def recompute(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
    ) -> Tensor:
        """y = shift + x scale,   scale = r w,   shift = b - μ scale"""
        # eps is a parameter because a backward that is differentiated computes rstd again
        scale = rstd if weight is None else rstd * _per_channel(weight, input)
        shift = -mean * scale if bias is None else _per_channel(bias, input) - mean * scale
        return torch.addcmul(shift, input, scale).to(input.dtype)

    def mean_axes(input: Tensor) -> Axes:
        return _all_axes_except_channels(input)

    def w(weight: Tensor | None, grad: Tensor) -> Tensor | None:
        return None if weight is None else _per_channel(weight, grad)

    def sum_axes(grad: Tensor) -> Axes:
        return _all_axes_except_channels(grad)

    def n(grad: Tensor, sum_axes: Axes) -> int:
        return math.prod(grad.shape[axis] for axis in sum_axes)

    def s(g: Tensor, sum_axes: Axes) -> Tensor:
        return g.sum(sum_axes, keepdim=True)

    def t(g: Tensor, xhat: Tensor, sum_axes: Axes) -> Tensor:
        return (g * xhat).sum(sum_axes, keepdim=True)

    def E_g(s: Tensor, n: int) -> Tensor:
        return s / n

    def E_xhat_g(t: Tensor, n: int) -> Tensor:
        return t / n

    def grad_input(
        g: Tensor, E_g: Tensor, E_xhat_g: Tensor, xhat: Tensor, rstd: Tensor, w: Tensor | None
    ) -> Tensor:
        return (rstd if w is None else rstd * w) * (g - (E_g + xhat * E_xhat_g))

    def grad_weight(t: Tensor) -> Tensor:
        return flatten(t.sum(0))

    def grad_bias(s: Tensor) -> Tensor:
        return flatten(s.sum(0))


def _all_axes_except_channels(tensor: Tensor) -> Axes:
    return (0, *range(2, tensor.dim()))


def _per_channel(tensor: Tensor, like: Tensor) -> Tensor:
    """(C), in a shape that broadcasts with (N, C, *)."""
    return tensor.reshape(-1, *[1] * (like.dim() - 2))


def _normalize(*args: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The output, μ and r, by the kernel that torch calls."""
    return torch.ops.aten._batch_norm_impl_index(*args, torch.backends.cudnn.enabled)[:3]


class RunningNormFunction(Rule):
    r"""y = x̂ w + b,   x̂ = (x - μ) r,   r = (σ² + ε)^-½      μ, σ²: the running statistics, which are constants

    dx̂ = r dx:      ∂L/∂x = g r w            ∂L/∂w = Σ g x̂            ∂L/∂b = Σ g      (Σ: over N and *)
    """

    recomputable = True

    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
    ) -> Tensor:
        return _normalize(input, weight, bias, running_mean, running_var, False, 0.0, eps)[0]

    def rstd(running_var: Tensor, grad: Tensor, eps: float) -> Tensor:
        return _per_channel((running_var + eps).rsqrt(), grad)

    def xhat(input: Tensor, running_mean: Tensor, rstd: Tensor) -> Tensor:
        return (input - _per_channel(running_mean, input)) * rstd

    def sum_axes(grad: Tensor) -> Axes:
        return _all_axes_except_channels(grad)

    def grad_input(grad: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
        return grad * (rstd if weight is None else rstd * _per_channel(weight, grad))

    def grad_weight(grad: Tensor, xhat: Tensor, sum_axes: Axes) -> Tensor:
        return (grad * xhat).sum(sum_axes)

    def grad_bias(grad: Tensor, sum_axes: Axes) -> Tensor:
        return grad.sum(sum_axes)


@with_torch_errors
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / √(var + ε) · w + b for each channel, as `torch.nn.functional.batch_norm`.

    Shapes: input (N, C, *), all others (C). Training uses the statistics of the batch, and updates the running
    statistics in place. Otherwise the running statistics are used.

    Raises:
        ValueError: training with only one element for each channel, or ε is not positive.
    """
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, got {training!r}")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"batch_norm: eps must be positive (with training=False, at least 0), got {eps}")
    if input.dim() == 1 and not input.numel():
        return input.clone()  # torch accepts an empty vector
    tensors = (input, weight, bias, running_mean, running_var)
    if not training:
        return RunningNormFunction.apply(*tensors, eps)
    _functional._verify_batch_size(input.shape)
    return BatchNormFunction.apply(*tensors, momentum, eps)


register(
    batch_norm,
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), None, None, t(3), t(3), training=True),
        SampleInput(t(2, 3, 2, 2), None, None, t(3), training=True, eps=0.1),
        SampleInput(t(2, 3, 4), t.no_grad(3), t.no_grad(3, low=0.5, high=2), t(3), t(3)),
    ],
    benchmark_input=lambda t: SampleInput(t(16, 64, 32, 32), None, None, t(64), t(64), training=True),
)


class InstanceNormFunction(BatchNormFunction):
    r"""E: over the n elements of a channel of one example, which are the axes *      x: (N, C, *)

    The gradients are those of `BatchNormFunction`. But s = Σ g and t = Σ g x̂ sum over * only, and have the shape
    (N, C, *1). The output is the batch norm of one example with N·C channels. It updates running statistics for
    each example, and their means over the examples are stored.

    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016.
    """

    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, channels, *sizes = input.shape
        repeated = [None if x is None else x.repeat(n) for x in (weight, bias, running_mean, running_var)]
        x = input.reshape(1, n * channels, *sizes)
        output, mean, rstd = _normalize(x, *repeated, True, momentum, eps)
        for running, new in ((running_mean, repeated[2]), (running_var, repeated[3])):
            if running is not None and new is not None:
                running.copy_(new.reshape(n, channels).mean(0))
        output = torch.ops.aten._unsafe_view(output, input.shape)  # no view: may be modified in place
        shape = (n, channels, *[1] * len(sizes))
        return output, mean.reshape(shape), rstd.reshape(shape)

    def mean_axes(input: Tensor) -> Axes:
        return tuple(range(2, input.dim()))

    def sum_axes(grad: Tensor) -> Axes:
        return tuple(range(2, grad.dim()))


@with_torch_errors
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm of each example separately, as `torch.nn.functional.instance_norm`.

    Shapes: input (N, C, *), all others (C).

    Raises:
        ValueError: a channel of an example has only one element.
    """
    if not isinstance(use_input_stats, bool):
        raise TypeError(f"use_input_stats must be a bool, got {use_input_stats!r}")
    if not len(input):  # raises what torch raises
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    tensors = (input, weight, bias, running_mean, running_var)
    if not use_input_stats:
        if any(x is not None and x.dim() != 1 for x in tensors[1:]):
            raise RuntimeError("instance_norm: weight, bias and running statistics must have one axis")
        mean = None if running_mean is None else running_mean.to(input.dtype)
        return RunningNormFunction.apply(input, weight, bias, mean, running_var, eps)
    _functional._verify_spatial_size(input.shape)
    return InstanceNormFunction.apply(*tensors, momentum, eps)


register(
    instance_norm,
    sample_inputs=lambda t: [
        SampleInput(t(2, 3, 4), weight=t(3), bias=t(3)),
        SampleInput(t(2, 3, 2, 2), weight=t(3), eps=0.1),
        SampleInput(t(2, 3, 4), t.no_grad(3), t.no_grad(3, low=0.5, high=2), t(3), t(3), use_input_stats=False),
    ],
    benchmark_input=lambda t: SampleInput(t(16, 64, 32, 32), weight=t(64), bias=t(64)),
)


class SyncBatchNormFunction(BatchNormFunction):
    r"""E: over the elements of a channel in all processes of a group      n: their number

    L is the sum of the losses of all processes, so each E in the gradient is a mean over all processes too.
    """

    recompute = None  # recomputing would communicate with the other processes  # pyright: ignore[reportAssignmentType]

    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        axes = _all_axes_except_channels(input)
        n = _elements_per_channel(input, group)
        mean = _sum_over_processes(x.sum(axes, True), group) / n
        centered = x - mean
        var = _sum_over_processes(centered.square().sum(axes, True), group) / n
        rstd = (var + eps).rsqrt()
        for running, new in ((running_mean, mean), (running_var, var * n / (n - 1))):
            if running is not None:
                running.lerp_(new.flatten().to(running.dtype), momentum)
        output = centered * (rstd if weight is None else rstd * _per_channel(weight, input))
        if bias is not None:
            output = output + _per_channel(bias, input)
        return output.to(input.dtype), mean, rstd

    def n(input: Tensor, group: dist.ProcessGroup) -> float:
        return _elements_per_channel(input, group)

    def E(n: float, mean_axes: Axes, group: dist.ProcessGroup) -> Mean:
        return lambda tensor: SumOverProcessesFunction.apply(tensor.sum(mean_axes, keepdim=True), group) / n

    def E_g(s: Tensor, n: float, group: dist.ProcessGroup) -> Tensor:
        return SumOverProcessesFunction.apply(s, group) / n

    def E_xhat_g(t: Tensor, n: float, group: dist.ProcessGroup) -> Tensor:
        return SumOverProcessesFunction.apply(t, group) / n


def _elements_per_channel(input: Tensor, group: dist.ProcessGroup) -> float:
    """The number of elements of a channel in all processes of the group."""
    return _sum_over_processes(torch.tensor(float(len(input) * math.prod(input.shape[2:]))), group).item()


class SumOverProcessesFunction(Rule):
    r"""y = Σ x, over all processes of a group. Each process receives y.

    L is the sum of the losses of all processes:      ∂L/∂x = Σ g, over all processes
    """

    def forward(input: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum_over_processes(input, group)

    def grad_input(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
        return SumOverProcessesFunction.apply(grad, group)


def _sum_over_processes(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


@implements(_functions.SyncBatchNorm)
def sync_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    momentum: float,
    process_group: dist.ProcessGroup,
    world_size: int,
) -> Tensor:
    """`batch_norm` in training, for the batches of all processes of a group together.

    torch.nn.SyncBatchNorm calls it. Unlike torch's, it also runs on the CPU. A process may have no examples.

    Raises:
        ValueError: a channel has only one element.
    """
    if world_size < 2:
        _functional._verify_batch_size(input.shape)
    tensors = (input, weight, bias, running_mean, running_var)
    return SyncBatchNormFunction.apply(*tensors, momentum, eps, process_group)


class LocalResponseNormFunction(Rule):
    r"""y = x d^-β,   d = k + α W x²      W_cj = 1/size for j in the window around c, else 0

    dd    = 2 α W (x dx)
    dy    = d^-β dx - β x d^(-β-1) dd,   so with u = d^-β g
    ∂L/∂x = u - 2 α β x Wᵀ(u x / d)

    Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012.
    """

    autocast = FLOAT32
    preserve_memory_format = ("grad_input",)

    def forward(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        return F.local_response_norm(input, size, alpha, beta, k)

    def W(input: Tensor, size: int) -> Tensor:
        channel = torch.arange(input.shape[1], device=input.device)
        offset = channel - channel.unsqueeze(1)
        return ((-(size // 2) <= offset) & (offset <= (size - 1) // 2)).to(input.dtype) / size

    def x(input: Tensor) -> Tensor:
        return flatten(input, 2)

    def d(x: Tensor, W: Tensor, alpha: float, k: float) -> Tensor:
        return (W @ x.square()) * alpha + k

    def u(grad: Tensor, d: Tensor, beta: float) -> Tensor:
        return d.pow(-beta) * flatten(grad, 2)

    def grad_input(grad: Tensor, u: Tensor, x: Tensor, W: Tensor, d: Tensor, alpha: float, beta: float) -> Tensor:
        return (u - (2 * alpha * beta) * x * (W.mT @ (u * x / d))).reshape(grad.shape)


class LocalResponseNorm1dFunction(LocalResponseNormFunction):
    """For inputs (N, C, L): torch uses an average pooling for them that autocast on the CPU does not cast."""

    autocast = {"cuda": "float32"}


@with_torch_errors
def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """x / (k + α · mean of x² over `size` neighbouring channels)^β, as `torch.nn.functional.local_response_norm`.

    Shape: input (N, C, *), with at least one more axis.
    """
    if input.numel() == 0 and input.dim() > 2:
        return input
    rule = LocalResponseNorm1dFunction if input.dim() == 3 else LocalResponseNormFunction
    return rule.apply(input, size, alpha, beta, k)


register(
    local_response_norm,
    sample_inputs=lambda t: [
        SampleInput(t(2, 4, 3), 3, alpha=0.5),
        SampleInput(t(1, 3, 2, 2), 2, alpha=0.7, beta=1.5, k=2.0),
    ],
    benchmark_input=lambda t: SampleInput(t(8, 64, 32, 32), 5),
    supports_special_values=False,  # an infinity spreads to every channel at its position
)


class CrossMapLRNFunction(LocalResponseNormFunction):
    r"""W x² is a running sum: at each channel, torch adds x² of the channel that enters the window, and subtracts
    x² of the channel that leaves it. But torch never subtracts channel 0, so W_c0 is never 0.
    """

    autocast = {}

    def forward(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        squares, half = input.square(), (size + 1) // 2
        total = squares[:, :1] * 0
        for square in squares[:, :half].split(1, 1):
            total = total + square
        totals = [total]
        for c in range(1, input.shape[1]):
            if c + half <= input.shape[1]:
                total = total + squares[:, c + half - 1 : c + half]
            if c > half:
                total = total - squares[:, c - half : c - half + 1]
            totals.append(total)
        return (torch.cat(totals, 1) * (alpha / size) + k).pow(-beta) * input

    def W(input: Tensor, size: int) -> Tensor:
        channel, half = torch.arange(input.shape[1], device=input.device), (size + 1) // 2
        offset = channel - channel.unsqueeze(1)
        entered, left = offset < half, (offset <= -half) & (channel > 0)
        return (entered & ~left).to(input.dtype) / size


@implements(_functions.CrossMapLRN2d)
def cross_map_lrn2d(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1) -> Tensor:
    """`local_response_norm` of images, (N, C, H, W), as torch.nn.CrossMapLRN2d computes it.

    Raises:
        ValueError: the input does not have four axes.
        RuntimeError: the input holds integers.
        IndexError: the size is negative.
    """
    if size < 0:
        raise IndexError(f"CrossMapLRN2d: size must not be negative, got {size}")
    if input.dim() != 4:
        raise ValueError(f"CrossMapLRN2d: expected a 4D input, got {input.dim()}D")
    if not (input.is_floating_point() or input.is_complex()):
        raise RuntimeError(f"CrossMapLRN2d: expected floating-point numbers, got {input.dtype}")
    return CrossMapLRNFunction.apply(input, size, alpha, beta, k)


register(
    cross_map_lrn2d,
    reference=_functions.CrossMapLRN2d.apply,
    sample_inputs=lambda t: [SampleInput(t(2, 5, 2, 1), 3, 0.5), SampleInput(t(1, 3, 2, 2), 2, 0.7, 1.5, 2.0)],
    benchmark_input=lambda t: SampleInput(t(8, 64, 32, 32), 5),
    supports_special_values=False,  # an infinity spreads to every channel at its position
    expected_failures=dict.fromkeys(
        ("matches_reference", "gradients_match_torch", "autocast_matches_torch", "complex"),
        "torch's gradient is wrong: it uses another window than the values",
    ),
)
