"""Normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from manualgrad.ops.elementary import drop_in, last, rows, times
from manualgrad.registry import Call, register
from manualgrad.rule import Rule, cuda_autocasts


class NormFunction(Rule):
    r"""y = z w + b,   z = (x - μ) r,   μ = E x,   r = (E (x-μ)² + ε)^-½

    The rule gives x as it is to be ``seen``, and the ``axes`` of that over which E is the mean.

    d(x - μ) = dx - E dx
    dr       = -r³ E[(x-μ) dx] = -r² E[z dx]
    dz       = r (dx - E dx) + (x-μ) dr = r (dx - E dx - z E[z dx]) =: P dx,   and P is symmetric, so
    ∂L/∂x    = P (w g)            ∂L/∂w = Σ g z            ∂L/∂b = Σ g

    μ and r move with x: a derivative of this gradient must differentiate them too. (torch 2.13 takes its kept r as
    a constant there, and gets it wrong.)
    """

    statistics = ("mean", "rstd")

    def mean(seen: Tensor, axes: tuple[int, ...]) -> Tensor:
        return seen.mean(axes, keepdim=True)

    def rstd(seen: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
        return (seen.var(axes, correction=0, keepdim=True) + eps).rsqrt()

    def normalized(seen: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        return times(seen - mean, rstd)


class LayerNormFunction(NormFunction):
    r"""`NormFunction` over the last k axes, which are those of w and b

    Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """

    autocast = {"cuda": "float32"}

    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(input, input.shape[input.dim() - k :], weight, bias, eps)

    def seen(input: Tensor) -> Tensor:
        return input

    def axes(k: int) -> tuple[int, ...]:
        return last(k)

    def grad_input(
        grad: Tensor, weight: Tensor | None, normalized: Tensor, rstd: Tensor, axes: tuple[int, ...]
    ) -> Tensor:
        g = grad if weight is None else grad * weight
        along = (g * normalized).mean(axes, keepdim=True)
        centered = g - g.mean(axes, keepdim=True)
        return times(centered.addcmul(normalized, along, value=-1), rstd)

    def grad_weight(grad: Tensor, normalized: Tensor, k: int) -> Tensor:
        return rows(grad * normalized, k).sum(0)

    def grad_bias(grad: Tensor, k: int) -> Tensor:
        return rows(grad, k).sum(0)


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
        Call(t(4), (4,), t(4), t(4)),
    ],
    big=lambda t: Call(t(2048, 512), (512,), t(512), t(512)),
)


class RMSNormFunction(Rule):
    r"""y = z w,   z = x r,   r = (E x² + ε)^-½      (E: mean over the last k axes)

    dr    = -r³ E[x dx] = -r² E[z dx]
    dz    = r dx + x dr = r (dx - z E[z dx]) =: P dx,   and P is symmetric, so
    ∂L/∂x = P (w g)            ∂L/∂w = Σ g z

    (For complex numbers P is symmetric, not Hermitian, so its adjoint conjugates z and r.)
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    autocast = {"cuda": "float32"} if cuda_autocasts("rms_norm") else {}  # torch 2.11 leaves it alone
    complex = True

    def forward(input: Tensor, weight: Tensor | None, k: int, eps: float | None) -> Tensor:
        return F.rms_norm(input, input.shape[input.dim() - k :], weight, eps)

    def rstd(input: Tensor, k: int, eps: float | None) -> Tensor:
        if eps is None:
            eps = torch.finfo(input.dtype).eps
        return (input.square().mean(last(k), keepdim=True) + eps).rsqrt()

    def normalized(input: Tensor, rstd: Tensor) -> Tensor:
        return input * rstd

    def grad_input(grad: Tensor, weight: Tensor | None, normalized: Tensor, rstd: Tensor, k: int) -> Tensor:
        g = grad if weight is None else grad * weight.conj()
        z = normalized.conj()
        return rstd.conj() * (g - z * (g * z).mean(last(k), keepdim=True))

    def grad_weight(grad: Tensor, normalized: Tensor, k: int) -> Tensor:
        return rows(grad * normalized.conj(), k).sum(0)


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
        Call(t(4), (4,), t(4)),
    ],
    big=lambda t: Call(t(2048, 512), (512,), t(512)),
)


class ChannelNormFunction(NormFunction):
    r"""`NormFunction` with w and b of one number for each channel

    x is seen as (N, G, K, S): N examples, G groups of K channels, S places. w does not change along S, so every
    sum over S is one of these two (E of a sum: by the number of places summed):

    s = Σ_S g            ∂L/∂b = Σ_N s
    t = Σ_S g z          ∂L/∂w = Σ_N t            ∂L/∂x = v (u g - E[u s] - z E[u t])

    with u = w and v = r; or u = 1 and v = w r, where a group is one channel and E may pass w.
    """

    def seen(input: Tensor, groups: int) -> Tensor:
        return input.reshape(_by_group(input, groups))

    def sent(grad: Tensor, groups: int) -> Tensor:
        return grad.reshape(_by_group(grad, groups))

    def gain(weight: Tensor | None, groups: int) -> Tensor | float:
        return 1.0 if weight is None else weight.reshape(groups, -1, 1)

    def along_one(sent: Tensor) -> Tensor:
        return sent.sum(-1, keepdim=True)

    def along_normalized(sent: Tensor, normalized: Tensor) -> Tensor:
        return (sent * normalized).sum(-1, keepdim=True)

    def grad_input(
        grad: Tensor,
        sent: Tensor,
        along_one: Tensor,
        along_normalized: Tensor,
        normalized: Tensor,
        u: Tensor | float,
        v: Tensor,
        axes: tuple[int, ...],
    ) -> Tensor:
        count = math.prod(sent.shape[axis] for axis in axes)
        one, z = ((sums * u).sum(axes, keepdim=True) / -count for sums in (along_one, along_normalized))
        # `normalized` may be written over: the other gradients take it by its sums, which have been made
        along = times(normalized, z)
        centered = (along.addcmul(sent, u) if isinstance(u, Tensor) else along + sent) + one
        return times(centered, v).reshape(grad.shape)

    def grad_weight(along_normalized: Tensor) -> Tensor:
        return along_normalized.sum(0).reshape(-1)

    def grad_bias(along_one: Tensor) -> Tensor:
        return along_one.sum(0).reshape(-1)


def _by_group(tensor: Tensor, groups: int) -> tuple[int, ...]:
    """The shape (N, G, K, S) of a tensor (N, C, *)."""
    return (tensor.shape[0], groups, tensor.shape[1] // groups, math.prod(tensor.shape[2:]))


class GroupNormFunction(ChannelNormFunction):
    r"""E: over the channels and places of a group

    Wu and He, "Group Normalization", 2018.
    """

    autocast = {"cuda": "float32"}

    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, channels = input.shape[:2]
        kept = suggest_memory_format(input) if input.is_cpu else torch.contiguous_format
        weight, bias = (x if x is None else x.contiguous() for x in (weight, bias))
        output, mean, rstd = torch.native_group_norm(
            input.contiguous(memory_format=kept),
            weight,
            bias,
            n,
            channels,
            math.prod(input.shape[2:]),
            groups,
            eps,
        )
        return output, mean.reshape(n, groups, 1, 1), rstd.reshape(n, groups, 1, 1)

    def axes() -> tuple[int, ...]:
        return (2, 3)

    def u(gain: Tensor | float) -> Tensor | float:
        return gain

    def v(rstd: Tensor) -> Tensor:
        return rstd


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

    def axes() -> tuple[int, ...]:
        return (0, 2, 3)

    def u() -> float:
        return 1.0

    def v(gain: Tensor | float, rstd: Tensor) -> Tensor:
        return rstd * gain


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

    def axes() -> tuple[int, ...]:
        return (3,)


class RunningNormFunction(ChannelNormFunction):
    r"""The same after training: μ and r are constants, dz = r dx      ∂L/∂x = w r g"""

    statistics = ()

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

    def grad_input(grad: Tensor, sent: Tensor, gain: Tensor | float, rstd: Tensor) -> Tensor:
        return (sent * (rstd * gain)).reshape(grad.shape)


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
        Call(t(2, 3, 4), None, None, bias=t(3), training=True),
        Call(t(2, 3, 4), t.fixed(3), t.fixed(3, low=0.5, high=2), t(3), t(3)),
        Call(t(5, 3), t.fixed(3), t.fixed(3, low=0.5, high=2), eps=0.1),
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
    lacks={"zero_size": "an empty batch is refused, as by torch"},
)

register(
    group_norm,
    samples=lambda t: [
        Call(t(2, 4, 3), 2, t(4), t(4)),
        Call(t(2, 6, 2, 2), 3, t(6), eps=0.1),
        Call(t(3, 6), 2, t(6), t(6)),
        Call(t(2, 4, 3), 4),
    ],
    big=lambda t: Call(t(16, 64, 32, 32), 8, t(64), t(64)),
)
