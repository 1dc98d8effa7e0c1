"""Constructor arguments and example inputs for each module of torch.nn: `INPUTS`. Needs torch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manualgrad.registry import SampleInput, TensorFactory

ModuleFactory = Callable[[Any], torch.nn.Module]
"""Makes a module from a namespace, torch.nn or manualgrad.nn."""

INPUTS: dict[str, tuple[ModuleFactory, Callable[[TensorFactory], SampleInput]]] = {}


def _add(
    names: str, inputs: Callable[[TensorFactory], SampleInput] | list[tuple[int, ...]], **arguments: Any
) -> None:
    """Add modules with the same constructor arguments and the same inputs (or their shapes)."""
    sample_input = inputs if callable(inputs) else lambda t: SampleInput(*(t(*shape) for shape in inputs))
    for name in names.split():
        INPUTS[name] = (lambda nn, name=name: getattr(nn, name)(**arguments)), sample_input


def _signs(t: TensorFactory, *shape: int) -> Tensor:
    """Targets that are 1 or -1."""
    return t.no_grad(*shape).sign_()


_add(
    "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU ReLU ReLU6 "
    "SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink",
    [(33, 20)],
)
_add("Threshold", [(33, 20)], threshold=0.1, value=2.0)
_add("LogSoftmax Softmax Softmin", [(33, 20)], dim=1)
_add("Softmax2d", [(3, 8, 7, 5)])
_add("Dropout AlphaDropout FeatureAlphaDropout", [(33, 20, 3)], p=0.3)

for _n in (1, 2, 3):
    _shape = (4, 6, *(9, 8, 5)[:_n])
    _add(f"AdaptiveAvgPool{_n}d AdaptiveMaxPool{_n}d", [_shape], output_size=3)
    _add(f"AvgPool{_n}d", [_shape], kernel_size=3, stride=2, padding=1)
    _add(f"MaxPool{_n}d", [_shape], kernel_size=2)
    _add(f"LPPool{_n}d", [_shape], norm_type=2, kernel_size=2)
    _add(f"BatchNorm{_n}d", [_shape], num_features=6)
    _add(f"InstanceNorm{_n}d", [_shape], num_features=6, affine=True)
    _add(f"LazyBatchNorm{_n}d LazyInstanceNorm{_n}d", [_shape], affine=True)
    _add(f"Dropout{_n}d", [_shape], p=0.3)
    _add(f"CircularPad{_n}d ReflectionPad{_n}d ReplicationPad{_n}d ZeroPad{_n}d", [_shape], padding=2)
    _add(f"ConstantPad{_n}d", [_shape], padding=2, value=1.5)
    _add(f"Conv{_n}d ConvTranspose{_n}d", [_shape], in_channels=6, out_channels=8, kernel_size=3, padding=1)
    _add(f"LazyConv{_n}d LazyConvTranspose{_n}d", [_shape], out_channels=8, kernel_size=3, stride=2)
    _add(
        f"MaxUnpool{_n}d",
        lambda t, n=_n: SampleInput(
            t(1, 2, *(2,) * n), 2 * torch.arange(2**n).repeat(2).view(1, 2, *(2,) * n).to(t.device)
        ),
        kernel_size=2,
    )
for _n in (2, 3):
    _add(f"FractionalMaxPool{_n}d", [(2, 3, *(8,) * _n)], kernel_size=2, output_ratio=0.5)

_add("Linear", [(33, 20)], in_features=20, out_features=12)
_add("LazyLinear", [(33, 20)], out_features=12)
_add("Bilinear", [(9, 4), (9, 5)], in1_features=4, in2_features=5, out_features=3)
_add("LayerNorm RMSNorm", [(33, 20)], normalized_shape=20)
_add("GroupNorm", [(4, 6, 7, 5)], num_groups=3, num_channels=6)
_add("LocalResponseNorm CrossMapLRN2d", [(4, 6, 7, 5)], size=3)
_add("CosineSimilarity", [(9, 6, 4), (9, 6, 4)], dim=1)
_add("PairwiseDistance", [(9, 6), (9, 6)], p=3.0, keepdim=True)
_add("ChannelShuffle", [(3, 6, 5, 4)], groups=2)
_add("PixelShuffle", [(2, 8, 3, 2)], upscale_factor=2)
_add("PixelUnshuffle", [(2, 2, 4, 6)], downscale_factor=2)
_add("Upsample", [(2, 3, 7, 5)], scale_factor=1.5, mode="bilinear")
_add("UpsamplingBilinear2d", [(2, 3, 7, 5)], scale_factor=2)
_add("UpsamplingNearest2d", [(2, 3, 7, 5)], size=(9, 11))
_add("Fold", [(2, 12, 9)], output_size=(4, 5), kernel_size=(2, 3), padding=1, stride=2)
_add("Unfold", [(2, 3, 5, 6)], kernel_size=(2, 3), padding=1, dilation=2)
_add("Embedding", lambda t: SampleInput(t.index(11, 6, 5)), num_embeddings=11, embedding_dim=8, padding_idx=2)
_add("EmbeddingBag", lambda t: SampleInput(t.index(11, 6, 5)), num_embeddings=11, embedding_dim=8, mode="sum")

_add("RNN LSTM GRU", [(7, 3, 5)], input_size=5, hidden_size=6, num_layers=2, bidirectional=True)
_add("RNNCell GRUCell", [(3, 5), (3, 6)], input_size=5, hidden_size=6)
_add("LSTMCell", lambda t: SampleInput(t(3, 5)), input_size=5, hidden_size=6)
_add("MultiheadAttention", [(7, 3, 8), (6, 3, 8), (6, 3, 8)], embed_dim=8, num_heads=2)
_LAYER = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0}
_add("TransformerEncoderLayer", [(7, 3, 8)], **_LAYER)
_add("TransformerDecoderLayer", [(7, 3, 8), (5, 3, 8)], **_LAYER)
_add("Transformer", [(7, 3, 8), (5, 3, 8)], num_encoder_layers=1, num_decoder_layers=1, **_LAYER)
INPUTS["TransformerEncoder"] = (
    lambda nn: nn.TransformerEncoder(nn.TransformerEncoderLayer(**_LAYER), 2, enable_nested_tensor=False),
    lambda t: SampleInput(t(7, 3, 8)),
)
INPUTS["TransformerDecoder"] = (
    lambda nn: nn.TransformerDecoder(nn.TransformerDecoderLayer(**_LAYER), 2),
    lambda t: SampleInput(t(7, 3, 8), t(5, 3, 8)),
)

_add("L1Loss MSELoss SmoothL1Loss HuberLoss", [(33, 20), (33, 20)])
_add("BCELoss", lambda t: SampleInput(t(33, 20, low=0.1, high=0.9), t.no_grad(33, 20, low=0, high=1)))
_add(
    "BCEWithLogitsLoss MultiLabelSoftMarginLoss",
    lambda t: SampleInput(t(33, 20), t.no_grad(33, 20, low=0, high=1)),
)
_add("KLDivLoss", lambda t: SampleInput(t(33, 20), t.no_grad(33, 20, low=0.1, high=1)), reduction="batchmean")
_add("PoissonNLLLoss", lambda t: SampleInput(t(33, 20), t.no_grad(33, 20, low=0, high=4)))
_add("GaussianNLLLoss", lambda t: SampleInput(t(33, 20), t(33, 20), t(33, 20, low=0.5, high=2)))
_add("CrossEntropyLoss NLLLoss MultiMarginLoss", lambda t: SampleInput(t(33, 20), t.index(20, 33)))
_add("NLLLoss2d", lambda t: SampleInput(t(2, 5, 4, 3), t.index(5, 2, 4, 3)))
_add("MultiLabelMarginLoss", lambda t: SampleInput(t(9, 6), t.index(6, 9, 6).sub(1)))
_add("CosineEmbeddingLoss", lambda t: SampleInput(t(9, 6), t(9, 6), _signs(t, 9)))
_add("HingeEmbeddingLoss SoftMarginLoss", lambda t: SampleInput(t(33, 20), _signs(t, 33, 20)))
_add("MarginRankingLoss", lambda t: SampleInput(t(33), t(33), _signs(t, 33)))
_add("TripletMarginLoss TripletMarginWithDistanceLoss", [(9, 6), (9, 6), (9, 6)])
_add("CTCLoss", lambda t: SampleInput(t(12, 3, 5).log_softmax(2), 1 + t.index(4, 3, 4), (12, 11, 9), (4, 3, 2)))
_add(
    "AdaptiveLogSoftmaxWithLoss",
    lambda t: SampleInput(t(33, 20), t.index(12, 33)),
    in_features=20,
    n_classes=12,
    cutoffs=[3, 7],
)
_add("LinearCrossEntropyLoss", lambda t: SampleInput(t(33, 20), t.index(12, 33)), in_features=20, num_classes=12)

WITHOUT_INPUTS = {
    **dict.fromkeys(
        ("Module", "Identity", "Container", "RNNBase", "RNNCellBase", "Flatten", "Unflatten"),
        "no gradient",
    ),
    **dict.fromkeys(("Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"), "container"),
    **dict.fromkeys(("SyncBatchNorm", "DataParallel"), "needs several devices"),
}
"""Modules that are not tested, with the reason."""
