"""Functions around operators of torch, with torch's own backward or a formula."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from defects.base import random_leaves
from torch import Tensor

from .base import IMAGE, MATRIX, make_function, with_constants

aten: Any = torch.ops.aten


# --- elementwise ---

make_function(
    "relu",
    MATRIX,
    lambda x: x.relu(),
    setup_context=True,
    x=lambda grad, output: aten.threshold_backward(grad, output, 0),
    jvp=lambda tangent, output: tangent * (output > 0),
)
make_function(
    "leaky relu", MATRIX, lambda x: F.leaky_relu(x, 0.1), x=lambda g, x: aten.leaky_relu_backward(g, x, 0.1, False)
)
make_function(
    "sigmoid",
    MATRIX,
    lambda x: x.sigmoid(),
    setup_context=True,
    x=lambda g, output: aten.sigmoid_backward(g, output),
)
make_function(
    "tanh",
    MATRIX,
    lambda x: x.tanh(),
    setup_context=True,
    x=lambda g, output: aten.tanh_backward(g, output),
    jvp=lambda tangent, output: tangent * (1 - output * output),
)
make_function("gelu", MATRIX, lambda x: F.gelu(x), setup_context=True, x=lambda g, x: aten.gelu_backward(g, x))
make_function(
    "silu", MATRIX, lambda x: F.silu(x), once_differentiable=True, x=lambda g, x: aten.silu_backward(g, x)
)
make_function("softplus", MATRIX, lambda x: F.softplus(x), x=lambda g, x: aten.softplus_backward(g, x, 1, 20))
make_function("elu", MATRIX, lambda x: F.elu(x), x=lambda g, x: aten.elu_backward(g, 1, 1, 1, False, x))
make_function(
    "hardswish",
    MATRIX,
    lambda x: F.hardswish(x),
    once_differentiable=True,
    x=lambda g, x: aten.hardswish_backward(g, x),
)
make_function(
    "sqrt",
    lambda: (MATRIX()[0].detach().abs().requires_grad_(),),
    lambda x: x.sqrt(),
    x=lambda g, output: g / (2 * output),
)
make_function(
    "prelu",
    random_leaves((3, 4), (4,)),
    lambda x, weight: F.prelu(x, weight),
    once_differentiable=True,
    custom_fwd=True,
    x=lambda g, x, weight: aten._prelu_kernel_backward(g, x, weight.expand_as(x))[0],
    weight=lambda g, x: aten._prelu_kernel_backward(g, x, torch.zeros_like(x))[1].sum(0),
)
make_function(
    "where",
    with_constants(random_leaves((3, 4), (3, 4)), torch.arange(12).reshape(3, 4) % 3 == 0),
    lambda x, y, condition: torch.where(condition, x, y),
    setup_context=True,
    x=lambda g, condition: torch.where(condition, g, 0),
    y=lambda g, condition: torch.where(condition, 0, g),
)


# --- along an axis ---

make_function(
    "softmax",
    MATRIX,
    lambda x: x.softmax(-1),
    setup_context=True,
    x=lambda g, output: aten._softmax_backward_data(g, output, -1, output.dtype),
)
make_function(
    "log softmax",
    MATRIX,
    lambda x: x.log_softmax(-1),
    x=lambda g, output: aten._log_softmax_backward_data(g, output, -1, output.dtype),
)
make_function("sum", MATRIX, lambda x: x.sum(-1, keepdim=True), setup_context=True, x=lambda g, x: g.expand_as(x))
make_function("mean", MATRIX, lambda x: x.mean(-1, keepdim=True), x=lambda g, x: (g / x.shape[-1]).expand_as(x))
make_function(
    "cumsum", MATRIX, lambda x: x.cumsum(-1), setup_context=True, x=lambda g: g.flip(-1).cumsum(-1).flip(-1)
)
make_function("logsumexp", MATRIX, lambda x: x.logsumexp(-1, keepdim=True), x=lambda g, x: g * x.softmax(-1))
make_function(
    "var",
    MATRIX,
    lambda x: x.var(-1, keepdim=True, correction=0),
    x=lambda g, x: 2 * g * (x - x.mean(-1, keepdim=True)) / x.shape[-1],
)
make_function(
    "amax",
    MATRIX,
    lambda x: x.amax(-1, keepdim=True),
    x=lambda g, x, output: g * (x == output) / (x == output).sum(-1, keepdim=True),
)
make_function(
    "sort with indices",
    MATRIX,
    lambda x: tuple(x.sort(-1)),
    x=lambda g, output1: torch.zeros_like(g).scatter(-1, output1, g),
)
make_function("pad", MATRIX, lambda x: F.pad(x, (1, 2)), setup_context=True, x=lambda g: g[..., 1:-2])
make_function(
    "cat",
    random_leaves((3, 4), (3, 2)),
    lambda x, y: torch.cat([x, y], -1),
    setup_context=True,
    x=lambda g, x: g[..., : x.shape[-1]],
    y=lambda g, y: g[..., g.shape[-1] - y.shape[-1] :],
)
make_function(
    "index select",
    with_constants(MATRIX, torch.tensor([2, 0, 2])),
    lambda x, index: x.index_select(0, index),
    x=lambda g, x, index: torch.zeros_like(x).index_add(0, index, g),
)
make_function(
    "gather",
    with_constants(MATRIX, torch.tensor([[0, 0, 3], [1, 2, 1], [3, 3, 3]])),
    lambda x, index: x.gather(1, index),
    x=lambda g, x, index: torch.zeros_like(x).scatter_add(1, index, g),
)
make_function(
    "embedding",
    with_constants(MATRIX, torch.tensor([2, 0, 1, 2])),
    lambda weight, index: F.embedding(index, weight),
    weight=lambda g, weight, index: aten.embedding_dense_backward(g, index, weight.shape[0], -1, False),
)


# --- products ---

make_function(
    "linear",
    random_leaves((3, 4), (2, 4), (2,)),
    lambda x, weight, bias: F.linear(x, weight, bias),
    custom_fwd=True,
    x=lambda g, weight: g @ weight,
    weight=lambda g, x: g.mT @ x,
    bias=lambda g: g.sum(0),
)
make_function(
    "bmm",
    random_leaves((2, 2, 3), (2, 3, 2)),
    lambda x, y: torch.bmm(x, y),
    custom_fwd=True,
    x=lambda g, y: torch.bmm(g, y.mT),
    y=lambda g, x: torch.bmm(x.mT, g),
)


def convolution(rank: int, *shapes: tuple[int, ...]) -> None:
    def gradient(which: int, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        mask = [which == k for k in range(3)]
        one, zero = [1] * rank, [0] * rank
        return aten.convolution_backward(g, x, weight, None, one, zero, one, False, zero, 1, mask)[which]

    make_function(
        f"conv{rank}d",
        random_leaves(*shapes),
        lambda x, weight, bias: (F.conv1d, F.conv2d)[rank - 1](x, weight, bias),
        custom_fwd=True,
        x=lambda g, x, weight: gradient(0, g, x, weight),
        weight=lambda g, x, weight: gradient(1, g, x, weight),
        bias=lambda g: g.sum([0, *range(2, g.dim())]),
    )


convolution(1, (2, 2, 5), (3, 2, 3), (3,))
convolution(2, (1, 2, 3, 4), (2, 2, 2, 2), (2,))


# --- images ---

make_function(
    "max pool",
    IMAGE,
    lambda x: F.max_pool2d(x, 2, 1, return_indices=True),
    x=lambda g, x, output1: aten.max_pool2d_with_indices_backward(
        g, x, [2, 2], [1, 1], [0, 0], [1, 1], False, output1
    ),
)
make_function(
    "average pool",
    IMAGE,
    lambda x: F.avg_pool2d(x, 2, 1),
    x=lambda g, x: aten.avg_pool2d_backward(g, x, [2, 2], [1, 1], [0, 0], False, True, None),
)
make_function(
    "adaptive average pool",
    IMAGE,
    lambda x: F.adaptive_avg_pool2d(x, 2),
    x=lambda g, x: aten._adaptive_avg_pool2d_backward(g, x),
)
make_function(
    "bilinear upsampling",
    random_leaves((1, 2, 2, 3)),
    lambda x: F.interpolate(x, size=(4, 5), mode="bilinear"),
    x=lambda g, x: aten.upsample_bilinear2d_backward(g, [4, 5], x.shape, False, None, None),
)


# --- normalizations: torch's backward treats the saved statistics as constants, so there is no second order ---


def _layer_norm_gradient(
    which: int, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> Tensor:
    mask = [which == k for k in range(3)]
    return aten.native_layer_norm_backward(g, x, x.shape[-1:], mean, rstd, weight, None, mask)[which]


make_function(
    "layer norm",
    random_leaves((3, 4), (4,), (4,)),
    lambda x, weight, bias: torch.native_layer_norm(x, x.shape[-1:], weight, bias, 1e-5),
    once_differentiable=True,
    x=lambda g, x, output1, output2, weight: _layer_norm_gradient(0, g, x, output1, output2, weight),
    weight=lambda g, x, output1, output2, weight: _layer_norm_gradient(1, g, x, output1, output2, weight),
    bias=lambda g: g.sum(0),
)


def _group_norm_gradient(which: int, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    n, c, *rest = x.shape
    mask = [which == k for k in range(3)]
    g, x = g.contiguous(), x.contiguous()
    size = torch.Size(rest).numel()
    return aten.native_group_norm_backward(g, x, mean, rstd, weight.contiguous(), n, c, size, 2, mask)[which]


make_function(
    "group norm",
    random_leaves((1, 4, 3), (4,), (4,)),
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
    once_differentiable=True,
    x=lambda g, x, output1, output2, weight: _group_norm_gradient(0, g, x, output1, output2, weight),
    weight=lambda g, x, output1, output2, weight: _group_norm_gradient(1, g, x, output1, output2, weight),
    bias=lambda g: g.sum([0, 2]),
)


def _batch_norm_gradient(which: int, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    mask = [which == k for k in range(3)]
    return aten.native_batch_norm_backward(g, x, weight.contiguous(), None, None, mean, rstd, True, 1e-5, mask)[
        which
    ]


make_function(
    "batch norm",
    random_leaves((5, 4), (4,), (4,)),
    lambda x, weight, bias: torch.native_batch_norm(x, weight.contiguous(), bias, None, None, True, 0.1, 1e-5),
    once_differentiable=True,
    x=lambda g, x, output1, output2, weight: _batch_norm_gradient(0, g, x, output1, output2, weight),
    weight=lambda g, x, output1, output2, weight: _batch_norm_gradient(1, g, x, output1, output2, weight),
    bias=lambda g: g.sum(0),
)


# --- losses ---

make_function(
    "mse loss",
    random_leaves((3, 4), (3, 4)),
    lambda x, target: F.mse_loss(x, target),
    x=lambda g, x, target: aten.mse_loss_backward(g, x, target, 1),
    target=lambda g, x, target: -aten.mse_loss_backward(g, x, target, 1),
)
make_function(
    "smooth l1 loss",
    random_leaves((3, 4), (3, 4)),
    lambda x, target: F.smooth_l1_loss(x, target),
    x=lambda g, x, target: aten.smooth_l1_loss_backward(g, x, target, 1, 1.0),
    target=lambda g, x, target: -aten.smooth_l1_loss_backward(g, x, target, 1, 1.0),
)
make_function(
    "cross entropy",
    with_constants(MATRIX, torch.tensor([3, 0, 1])),
    lambda x, target: F.cross_entropy(x, target, reduction="sum"),
    x=lambda g, x, target: g * (x.softmax(-1) - F.one_hot(target, x.shape[-1]).to(x)),
)
