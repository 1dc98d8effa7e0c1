"""Normalization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn.modules import _functions

from manualgrad.ops.elementary import drop_in, plus, stands_for, times
from manualgrad.registry import Call, register
from manualgrad.rule import FLOAT32, Rule, cuda_autocasts, differentiated

Shape = tuple[int, int, int, int]
Average = Callable[[Tensor], Tensor]


class ScaledFunction(Rule):
    r"""y = z w,   z = x r,   r = (E x² + ε)^-½

    x is seen as (N, G, K, S): N examples, G groups of K channels, S places; E is the mean over some of these axes,
    and w is one number for each channel.

    dr    = -r³ E[x dx] = -r² E[z dx]
    dz    = r dx + x dr = r (dx - z E[z dx]),   and this map is symmetric, so
    ∂L/∂x = r (w g - z E[z w g])            ∂L/∂w = Σ g z

    As w does not change from place to place, t = Σ g z over the places serves both.
    (For complex numbers the map is symmetric, not Hermitian: its adjoint conjugates z, w and r.)
    """

    def count(shape: Shape, axes: tuple[int, ...]) -> int:
        return math.prod(shape[axis] for axis in axes)

    def average(count: int, axes: tuple[int, ...]) -> Average:
        return lambda tensor: tensor.sum(axes, keepdim=True) / count

    def seen(input: Tensor, shape: Shape) -> Tensor:
        return input.reshape(shape)

    def sent(grad: Tensor, shape: Shape) -> Tensor:
        return grad.reshape(shape)

    def gain(weight: Tensor | None, shape: Shape) -> Tensor | None:
        return None if weight is None else weight.conj().reshape(*shape[1:3], 1)

    def inside(gain: Tensor | None) -> Tensor | None:
        """w, unless it may pass E: it is `outside` then."""
        return gain

    def outside(rstd: Tensor) -> Tensor:
        return rstd.conj()

    def sums(sent: Tensor, normalized: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """Σ t over the examples, and Σ w t over the channels of a group."""
        product = sent * normalized.conj()
        t = product if product.shape[-1] == 1 else product.sum(-1, keepdim=True)
        by_channel = t.sum(0)
        return by_channel, (t if inside is None else times(t, inside)).sum(2, keepdim=True)

    def orthogonal(
        sent: Tensor, inside: Tensor | None, sums: tuple[Tensor, Tensor], normalized: Tensor, average: Average
    ) -> Tensor:
        """w g - z E[z w g], written over z: the gradient of w takes it by the sums, which have been made."""
        return plus(times(normalized.conj(), -average(sums[1])), sent, inside)

    def grad_input(grad: Tensor, orthogonal: Tensor, outside: Tensor) -> Tensor:
        return times(orthogonal, outside).reshape(grad.shape)

    def grad_weight(sums: tuple[Tensor, Tensor], channels: tuple[int, ...]) -> Tensor:
        return sums[0].reshape(channels)


class NormFunction(ScaledFunction):
    r"""y = z w + b,   z = (x - μ) r,   μ = E x,   r = (E (x-μ)² + ε)^-½

    `ScaledFunction` of C x + b, where d(C x) = dx - E dx = C dx.  C is symmetric and C z = z, so
    ∂L/∂x = r C (w g - z E[z w g])            ∂L/∂w = Σ g z            ∂L/∂b = Σ g

    μ and r move with x: a derivative of this gradient must differentiate them too. (torch 2.13 takes its kept r as
    a constant there, and gets it wrong.)
    """

    statistics = ("mean", "rstd")
    complex = False

    def mean(seen: Tensor, average: Average) -> Tensor:
        return average(seen)

    def rstd(seen: Tensor, mean: Tensor, average: Average, eps: float) -> Tensor:
        return (average((seen - mean).square()) + eps).rsqrt()

    def normalized(seen: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        return times(seen - mean, rstd)

    def level(orthogonal: Tensor, average: Average) -> Tensor:
        """E[w g], as E z = 0"""
        return average(orthogonal)

    def grad_input(grad: Tensor, orthogonal: Tensor, level: Tensor, outside: Tensor) -> Tensor:
        return times(plus(orthogonal, -level), outside).reshape(grad.shape)

    def grad_bias(sent: Tensor, channels: tuple[int, ...]) -> Tensor:
        return sent.sum((0, 3)).reshape(channels)


class Trailing(Rule):
    r"""E: over the last k axes, which are those of w and b: a group of channels of one place"""

    def independent(grad: Tensor, k: int) -> int:
        return grad.dim() - k

    def channels(grad: Tensor, k: int) -> tuple[int, ...]:
        return grad.shape[grad.dim() - k :]

    def shape(grad: Tensor, channels: tuple[int, ...]) -> Shape:
        return (math.prod(grad.shape[: grad.dim() - len(channels)]), 1, math.prod(channels), 1)

    def axes() -> tuple[int, ...]:
        return (2,)


class LayerNormFunction(Trailing, NormFunction):
    r"""Ba, Kiros and Hinton, "Layer Normalization", 2016."""

    autocast = {"cuda": "float32"}
    cheap = True

    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, rstd = torch.native_layer_norm(input, input.shape[input.dim() - k :], weight, bias, eps)
        return output, mean.reshape(-1, 1, 1, 1), rstd.reshape(-1, 1, 1, 1)


@drop_in
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / √(var + ε) · w + b over the trailing axes, as `torch.nn.functional.layer_norm`.

    Shapes: input (*, normalized_shape), weight and bias normalized_shape; the result as the input.
    """
    _check_shape(input, normalized_shape, "layer_norm")
    return LayerNormFunction.apply(input, weight, bias, len(normalized_shape), eps)


def _check_shape(input: Tensor, normalized_shape: Sequence[int], name: str) -> None:
    """The rule is told only how many axes there are, so their sizes are compared here."""
    k = len(normalized_shape)
    if k == 0 or tuple(input.shape[input.dim() - k :]) != tuple(normalized_shape) or input.dim() < k:
        raise RuntimeError(
            f"{name}: the input's trailing axes must be normalized_shape={list(normalized_shape)} (at least one "
            f"axis), but the input has shape {list(input.shape)}"
        )


register(
    layer_norm,
    samples=lambda t: [
        Call(t(5, 4), (4,), t(4), t(4)),
        Call(t(2, 3, 4), (3, 4), t(3, 4)),
        Call(t(5, 4), (4,), eps=0.1),
    ],
    big=lambda t: Call(t(2048, 512), (512,), t(512), t(512)),
)


class RMSNormFunction(Trailing, ScaledFunction):
    r"""Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019."""

    autocast = {"cuda": "float32"} if cuda_autocasts("rms_norm") else {}  # torch 2.11 leaves it alone
    cheap = True
    complex = True

    def forward(input: Tensor, weight: Tensor | None, k: int, eps: float | None) -> Tensor:
        return F.rms_norm(input, input.shape[input.dim() - k :], weight, eps)

    def rstd(seen: Tensor, average: Average, eps: float | None) -> Tensor:
        return (average(seen.square()) + (torch.finfo(seen.dtype).eps if eps is None else eps)).rsqrt()

    def normalized(seen: Tensor, rstd: Tensor) -> Tensor:
        return seen * rstd

    def grad_weight(sent: Tensor, seen: Tensor, rstd: Tensor, channels: tuple[int, ...]) -> Tensor:
        """By itself, as the sums take w, which torch does not keep for this gradient."""
        return (sent * (seen * rstd).conj()).sum(0).reshape(channels)


@drop_in
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """x / √(mean x² + ε) · w over the trailing axes, as `torch.nn.functional.rms_norm`.

    Shapes: input (*, normalized_shape), weight normalized_shape; the result as the input.
    """
    _check_shape(input, normalized_shape, "rms_norm")
    return RMSNormFunction.apply(input, weight, len(normalized_shape), eps)


register(
    rms_norm,
    samples=lambda t: [
        Call(t(5, 4), (4,), t(4)),
        Call(t(2, 3, 4), (3, 4), t(3, 4), eps=0.1),
        Call(t(5, 4), (4,)),
    ],
    big=lambda t: Call(t(2048, 512), (512,), t(512)),
)


class ChannelNormFunction(NormFunction):
    r"""x is (N, C, *), and its C = G K channels stand in G groups"""

    def channels(groups: int, grad: Tensor) -> tuple[int, ...]:
        return (grad.shape[1],)

    def shape(grad: Tensor, groups: int) -> Shape:
        return (grad.shape[0], groups, grad.shape[1] // groups, math.prod(grad.shape[2:]))


class GroupNormFunction(ChannelNormFunction):
    r"""E: over the channels and places of a group

    Wu and He, "Group Normalization", 2018.
    """

    autocast = {"cuda": "float32"}
    cheap = True

    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, channels = input.shape[:2]
        kept = suggest_memory_format(input) if input.is_cpu else torch.contiguous_format
        weight, bias = (x if x is None else x.contiguous() for x in (weight, bias))
        places = math.prod(input.shape[2:])
        output, mean, rstd = torch.native_group_norm(
            input.contiguous(memory_format=kept), weight, bias, n, channels, places, groups, eps
        )
        return output, mean.reshape(n, groups, 1, 1), rstd.reshape(n, groups, 1, 1)

    def axes() -> tuple[int, ...]:
        return (2, 3)


class BatchNormFunction(ChannelNormFunction):
    r"""E: over the examples and places of a channel (a group of its own)

    Ioffe and Szegedy, "Batch Normalization", ICML 2015.
    """

    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        groups: int,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, rstd = _batch_norm(input, weight, bias, running_mean, running_var, True, momentum, eps)
        return output, mean.reshape(1, groups, 1, 1), rstd.reshape(1, groups, 1, 1)

    def recompute(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        mean: Tensor,
        rstd: Tensor,
    ) -> Tensor:
        if differentiated():
            return BatchNormFunction.apply(input, weight, bias, None, None, groups, 0.0, eps)
        return _normalized(input, weight, bias, mean, rstd)

    def axes() -> tuple[int, ...]:
        return (0, 2, 3)

    def inside() -> None:
        return None

    def outside(rstd: Tensor, gain: Tensor | None) -> Tensor:
        return rstd if gain is None else rstd * gain

    def level(sent: Tensor, average: Average) -> Tensor:
        return average(sent)


class InstanceNormFunction(BatchNormFunction):
    r"""E: over the places of a channel of an example

    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016. Each example's channels are channels to the
    kernel of batch norm, with running statistics of their own, whose means are kept.
    """

    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        groups: int,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, *places = input.shape[0], *input.shape[2:]
        each = [None if x is None else x.repeat(n) for x in (weight, bias, running_mean, running_var)]
        output, mean, rstd = _batch_norm(input.reshape(1, n * groups, *places), *each, True, momentum, eps)
        for running, new in ((running_mean, each[2]), (running_var, each[3])):
            if running is not None and new is not None:
                running.copy_(new.reshape(n, groups).mean(0))
        output = torch.ops.aten._unsafe_view(output, input.shape)
        return output, mean.reshape(n, groups, 1, 1), rstd.reshape(n, groups, 1, 1)

    def recompute(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        mean: Tensor,
        rstd: Tensor,
    ) -> Tensor:
        if differentiated():
            return InstanceNormFunction.apply(input, weight, bias, None, None, groups, 0.0, eps)
        return _normalized(input, weight, bias, mean, rstd)

    def axes() -> tuple[int, ...]:
        return (3,)


class RunningNormFunction(BatchNormFunction):
    r"""The same after training: μ and r are constants, dz = r dx      ∂L/∂x = w r g"""

    statistics = ()
    cheap = True

    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        groups: int,
        eps: float,
    ) -> Tensor:
        return _batch_norm(input, weight, bias, running_mean, running_var, False, 0.0, eps)[0]

    def mean(running_mean: Tensor) -> Tensor:
        return running_mean.reshape(-1, 1, 1)

    def rstd(running_var: Tensor, eps: float) -> Tensor:
        return (running_var + eps).rsqrt().reshape(-1, 1, 1)

    def grad_input(grad: Tensor, sent: Tensor, outside: Tensor) -> Tensor:
        return (sent * outside).reshape(grad.shape)


def _normalized(input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """The output from its statistics: x (r w) + (b - μ r w), as the kernels have it (but for the order in which a
    last bit is rounded)."""
    places = [1] * (input.dim() - 2)
    mean, slope = (x.reshape(*x.shape[:2], *places) for x in (mean, rstd))
    slope = slope if weight is None else slope * weight.reshape(-1, *places)
    shift = -mean * slope if bias is None else bias.reshape(-1, *places) - mean * slope
    return torch.addcmul(shift, input, slope).to(input.dtype)


def _batch_norm(*args: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and 1/σ, by the kernel that torch takes."""
    return torch.ops.aten._batch_norm_impl_index(*args, torch.backends.cudnn.enabled)[:3]


@drop_in
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

    Shapes: input (N, C, *), all others (C). In training the running statistics are updated in place, and those of
    the batch are taken; else the running ones.

    Raises:
        ValueError: in training only one number for each channel, or ε not positive.
    """
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, but is {training!r}")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"batch_norm eps must be positive (after training: or 0), but got {eps}")
    if input.dim() == 1 and not input.numel():
        return input.clone()  # torch lets that pass
    tensors = (input, weight, bias, running_mean, running_var)
    if not training:
        return RunningNormFunction.apply(*tensors, input.shape[1], eps)
    getattr(F, "_verify_batch_size")(input.size())  # noqa: B009
    return BatchNormFunction.apply(*tensors, input.shape[1], momentum, eps)


@drop_in
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
    """Batch norm of each example by itself, as `torch.nn.functional.instance_norm`.

    Shapes: input (N, C, *), all others (C).

    Raises:
        ValueError: only one number for each channel of an example.
    """
    if not isinstance(use_input_stats, bool):
        raise TypeError(f"use_input_stats must be a bool, but is {use_input_stats!r}")
    if not len(input):  # raises what torch raises
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    tensors = (input, weight, bias, running_mean, running_var)
    if not use_input_stats:
        if any(x is not None and x.dim() != 1 for x in tensors[1:]):
            raise RuntimeError("instance_norm: weight, bias and running statistics must have one axis")
        kept = None if running_mean is None else running_mean.to(input.dtype)
        return RunningNormFunction.apply(input, weight, bias, kept, running_var, input.shape[1], eps)
    getattr(F, "_verify_spatial_size")(input.size())  # noqa: B009
    return InstanceNormFunction.apply(*tensors, input.shape[1], momentum, eps)


@drop_in
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / √(var + ε) · w + b, mean and var of a group of channels, as `torch.nn.functional.group_norm`.

    Shapes: input (N, C, *), weight and bias (C).

    Raises:
        ValueError: only one number in each group.
    """
    getattr(F, "_verify_batch_size")(  # noqa: B009
        [input.size(0) * input.size(1) // num_groups, num_groups, *input.shape[2:]]
    )
    return GroupNormFunction.apply(input, weight, bias, num_groups, eps)


register(
    batch_norm,
    samples=lambda t: [
        Call(t(5, 3), None, None, t(3), t(3), training=True),
        Call(t(2, 3, 2, 2), None, None, t(3), training=True, eps=0.1),
        Call(t(2, 3, 4), t.fixed(3), t.fixed(3, low=0.5, high=2), t(3), t(3)),
    ],
    big=lambda t: Call(t(16, 64, 32, 32), None, None, t(64), t(64), training=True),
)

register(
    instance_norm,
    samples=lambda t: [
        Call(t(2, 3, 4), weight=t(3), bias=t(3)),
        Call(t(2, 3, 2, 2), weight=t(3), eps=0.1),
        Call(t(2, 3, 4), t.fixed(3), t.fixed(3, low=0.5, high=2), t(3), t(3), use_input_stats=False),
    ],
    big=lambda t: Call(t(16, 64, 32, 32), weight=t(64), bias=t(64)),
)

register(
    group_norm,
    samples=lambda t: [
        Call(t(2, 4, 3), 2, t(4), t(4)),
        Call(t(2, 6, 2, 2), 3, t(6), eps=0.1),
        Call(t(3, 6), 2),
    ],
    big=lambda t: Call(t(16, 64, 32, 32), 8, t(64), t(64)),
)


class SyncBatchNormFunction(BatchNormFunction):
    r"""E: over the examples and places of a channel, of all processes of a group

    L is the sum of the losses of all, so each E in the gradient is the mean over all as well.
    """

    recompute = None  # would ask the other processes  # pyright: ignore[reportAssignmentType]

    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        groups: int,
        momentum: float,
        eps: float,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen = input.reshape(*input.shape[:2], math.prod(input.shape[2:])).to(
            torch.promote_types(input.dtype, torch.float32)
        )
        count = _over_processes(torch.tensor(float(seen.numel() // groups)), group).item()
        mean = _over_processes(seen.sum((0, 2)), group) / count
        centered = seen - mean.unsqueeze(1)
        var = _over_processes(centered.square().sum((0, 2)), group) / count
        rstd = (var + eps).rsqrt()
        for running, new in ((running_mean, mean), (running_var, var * count / (count - 1))):
            if running is not None:
                running.lerp_(new.to(running.dtype), momentum)
        output = centered * (rstd if weight is None else rstd * weight).unsqueeze(1)
        if bias is not None:
            output = output + bias.unsqueeze(1)
        shape = (1, groups, 1, 1)
        return output.reshape(input.shape).to(input.dtype), mean.reshape(shape), rstd.reshape(shape)

    def count(shape: Shape, axes: tuple[int, ...], group: dist.ProcessGroup) -> float:
        return _over_processes(torch.tensor(float(math.prod(shape[axis] for axis in axes))), group).item()

    def average(count: float, axes: tuple[int, ...], group: dist.ProcessGroup) -> Average:
        return lambda tensor: SumOverProcessesFunction.apply(tensor.sum(axes, keepdim=True), group) / count


class SumOverProcessesFunction(Rule):
    r"""y = Σ x over all processes of a group, on each of them

    L is the sum of the losses of all, so what x receives is the sum of what all send:      ∂L/∂x = Σ g
    """

    def forward(input: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _over_processes(input, group)

    def grad_input(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
        return SumOverProcessesFunction.apply(grad, group)


def _over_processes(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


@stands_for(_functions.SyncBatchNorm)
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
    """`batch_norm` in training, of the batches of all processes of a group as one.

    As torch.nn.SyncBatchNorm calls it, there on GPUs alone; here on the CPU as well. A process may have no
    examples.

    Raises:
        ValueError: only one number for each channel.
    """
    if world_size < 2:
        getattr(F, "_verify_batch_size")(input.size())  # noqa: B009
    tensors = (input, weight, bias, running_mean, running_var)
    return SyncBatchNormFunction.apply(*tensors, input.shape[1], momentum, eps, process_group)


class LocalResponseNormFunction(Rule):
    r"""y = x d^-β,   d = k + α W x²      W: (C, C), the mean over a window of channels (beside the last is zero)

    dd    = 2 α W (x dx)
    dy    = d^-β dx - β (y / d) dd,   so
    ∂L/∂x = d^-β g - 2 α β x Wᵀ(g y / d)

    Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012.
    """

    autocast = FLOAT32

    def forward(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        return F.local_response_norm(input, size, alpha, beta, k)

    def window(input: Tensor, size: int) -> Tensor:
        channel = torch.arange(input.shape[1], device=input.device)
        ahead = channel - channel.unsqueeze(1)
        return ((-(size // 2) <= ahead) & (ahead <= (size - 1) // 2)).to(input.dtype) / size

    def seen(input: Tensor) -> Tensor:
        return input.reshape(*input.shape[:2], math.prod(input.shape[2:]))

    def scale(seen: Tensor, window: Tensor, alpha: float, k: float) -> Tensor:
        return (window @ seen.square()) * alpha + k

    def grad_input(grad: Tensor, seen: Tensor, window: Tensor, scale: Tensor, alpha: float, beta: float) -> Tensor:
        direct = times(scale.pow(-beta), grad.reshape(seen.shape))
        along = window.mT @ (direct * seen / scale)
        found = plus(direct, times(along, seen) * (-2 * alpha * beta)).reshape(grad.shape)
        return found.contiguous(memory_format=suggest_memory_format(grad))


class SequenceResponseNormFunction(LocalResponseNormFunction):
    """The same of (N, C, L): the CPU's autocast treats the average over images alone."""

    autocast = {"cuda": "float32"}


@drop_in
def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """x / (k + α · mean of x² over `size` neighbouring channels)^β, as `torch.nn.functional.local_response_norm`.

    Shape: input (N, C, *), with at least one more axis.
    """
    if input.numel() == 0 and input.dim() > 2:
        return input
    rule = SequenceResponseNormFunction if input.dim() == 3 else LocalResponseNormFunction
    return rule.apply(input, size, alpha, beta, k)


register(
    local_response_norm,
    samples=lambda t: [
        Call(t(2, 4, 3), 3, alpha=0.5),
        Call(t(1, 3, 2, 2), 2, alpha=0.7, beta=1.5, k=2.0),
    ],
    big=lambda t: Call(t(8, 64, 32, 32), 5),
    special=False,  # an infinity reaches every channel of its place
)


class CrossMapLRNFunction(LocalResponseNormFunction):
    r"""The same by a running sum over the channels, which as torch's adds what enters the window and takes off
    what leaves it, but never the first channel.
    """

    autocast = {}

    def forward(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        squares, ahead = input.square(), (size + 1) // 2
        total = squares[:, :1] * 0
        for square in squares[:, :ahead].split(1, 1):
            total = total + square
        totals = [total]
        for c in range(1, input.shape[1]):
            if c + ahead <= input.shape[1]:
                total = total + squares[:, c + ahead - 1 : c + ahead]
            if c > ahead:
                total = total - squares[:, c - ahead : c - ahead + 1]
            totals.append(total)
        return (torch.cat(totals, 1) * (alpha / size) + k).pow(-beta) * input

    def window(input: Tensor, size: int) -> Tensor:
        channel = torch.arange(input.shape[1], device=input.device)
        ahead = channel - channel.unsqueeze(1)
        entered, left = ahead < (size + 1) // 2, (ahead <= -((size + 1) // 2)) & (channel > 0)
        return (entered & ~left).to(input.dtype) / size


@stands_for(_functions.CrossMapLRN2d)
def cross_map_lrn2d(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1) -> Tensor:
    """`local_response_norm` of images, (N, C, H, W), as torch.nn.CrossMapLRN2d computes it.

    Raises:
        ValueError: the input has not four axes.
        RuntimeError: the input is of integers.
        IndexError: the window's size is negative.
    """
    if size < 0:
        raise IndexError(f"CrossMapLRN2d: the window's size must not be negative, but is {size}")
    if input.dim() != 4:
        raise ValueError(f"CrossMapLRN2d: expected input to be 4D, got {input.dim()}D instead")
    if not (input.is_floating_point() or input.is_complex()):
        raise RuntimeError(f"CrossMapLRN2d: expected floating-point numbers, got {input.dtype}")
    return CrossMapLRNFunction.apply(input, size, alpha, beta, k)


register(
    cross_map_lrn2d,
    reference=_functions.CrossMapLRN2d.apply,
    samples=lambda t: [Call(t(2, 5, 2, 1), 3, 0.5), Call(t(1, 3, 2, 2), 2, 0.7, 1.5, 2.0)],
    big=lambda t: Call(t(8, 64, 32, 32), 5),
    special=False,  # as above
    lacks=dict.fromkeys(
        ("as_reference", "torchs_gradient_of_each_subset", "torchs_autocast", "complex"),
        "torch's gradient is wrong: its window is not that of the values",
    ),
)
