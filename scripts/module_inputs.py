"""What each module of torch.nn is made with, and what it is called with: `INPUTS`. It needs torch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manualgrad.registry import SampleInput, TensorFactory

Making = Callable[[Any], torch.nn.Module]
"""Makes the module from the namespace that has it: torch.nn or manualgrad.nn."""

INPUTS: dict[str, tuple[Making, Callable[[TensorFactory], SampleInput]]] = {}


def _enter(
    names: str, inputs: Callable[[TensorFactory], SampleInput] | list[tuple[int, ...]], **settings: Any
) -> None:
    """Enter modules that are made with the same settings and called with tensors of the same shapes."""
    call = inputs if callable(inputs) else lambda t: SampleInput(*(t(*shape) for shape in inputs))
    for name in names.split():
        INPUTS[name] = (lambda nn, name=name: getattr(nn, name)(**settings)), call


def _signs(t: TensorFactory, *shape: int) -> Tensor:
    """Targets of 1 and -1."""
    return t.no_grad(*shape).sign_()


_enter(
    "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU ReLU ReLU6 "
    "SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink",
    [(33, 20)],
)
_enter("Threshold", [(33, 20)], threshold=0.1, value=2.0)
_enter("LogSoftmax Softmax Softmin", [(33, 20)], dim=1)
_enter("Softmax2d", [(3, 8, 7, 5)])
_enter("Dropout AlphaDropout FeatureAlphaDropout", [(33, 20, 3)], p=0.3)

for _n in (1, 2, 3):
    _shape = (4, 6, *(9, 8, 5)[:_n])
    _enter(f"AdaptiveAvgPool{_n}d AdaptiveMaxPool{_n}d", [_shape], output_size=3)
    _enter(f"AvgPool{_n}d", [_shape], kernel_size=3, stride=2, padding=1)
    _enter(f"MaxPool{_n}d", [_shape], kernel_size=2)
    _enter(f"LPPool{_n}d", [_shape], norm_type=2, kernel_size=2)
    _enter(f"BatchNorm{_n}d", [_shape], num_features=6)
    _enter(f"InstanceNorm{_n}d", [_shape], num_features=6, affine=True)
    _enter(f"LazyBatchNorm{_n}d LazyInstanceNorm{_n}d", [_shape], affine=True)
    _enter(f"Dropout{_n}d", [_shape], p=0.3)
    _enter(f"CircularPad{_n}d ReflectionPad{_n}d ReplicationPad{_n}d ZeroPad{_n}d", [_shape], padding=2)
    _enter(f"ConstantPad{_n}d", [_shape], padding=2, value=1.5)
    _enter(f"Conv{_n}d ConvTranspose{_n}d", [_shape], in_channels=6, out_channels=8, kernel_size=3, padding=1)
    _enter(f"LazyConv{_n}d LazyConvTranspose{_n}d", [_shape], out_channels=8, kernel_size=3, stride=2)
    _enter(
        f"MaxUnpool{_n}d",
        lambda t, n=_n: SampleInput(
            t(1, 2, *(2,) * n), 2 * torch.arange(2**n).repeat(2).view(1, 2, *(2,) * n).to(t.device)
        ),
        kernel_size=2,
    )
for _n in (2, 3):
    _enter(f"FractionalMaxPool{_n}d", [(2, 3, *(8,) * _n)], kernel_size=2, output_ratio=0.5)

_enter("Linear", [(33, 20)], in_features=20, out_features=12)
_enter("LazyLinear", [(33, 20)], out_features=12)
_enter("Bilinear", [(9, 4), (9, 5)], in1_features=4, in2_features=5, out_features=3)
_enter("LayerNorm RMSNorm", [(33, 20)], normalized_shape=20)
_enter("GroupNorm", [(4, 6, 7, 5)], num_groups=3, num_channels=6)
_enter("LocalResponseNorm CrossMapLRN2d", [(4, 6, 7, 5)], size=3)
_enter("CosineSimilarity", [(9, 6, 4), (9, 6, 4)], dim=1)
_enter("PairwiseDistance", [(9, 6), (9, 6)], p=3.0, keepdim=True)
_enter("ChannelShuffle", [(3, 6, 5, 4)], groups=2)
_enter("PixelShuffle", [(2, 8, 3, 2)], upscale_factor=2)
_enter("PixelUnshuffle", [(2, 2, 4, 6)], downscale_factor=2)
_enter("Upsample", [(2, 3, 7, 5)], scale_factor=1.5, mode="bilinear")
_enter("UpsamplingBilinear2d", [(2, 3, 7, 5)], scale_factor=2)
_enter("UpsamplingNearest2d", [(2, 3, 7, 5)], size=(9, 11))
_enter("Fold", [(2, 12, 9)], output_size=(4, 5), kernel_size=(2, 3), padding=1, stride=2)
_enter("Unfold", [(2, 3, 5, 6)], kernel_size=(2, 3), padding=1, dilation=2)
_enter("Embedding", lambda t: SampleInput(t.index(11, 6, 5)), num_embeddings=11, embedding_dim=8, padding_idx=2)
_enter("EmbeddingBag", lambda t: SampleInput(t.index(11, 6, 5)), num_embeddings=11, embedding_dim=8, mode="sum")

_enter("RNN LSTM GRU", [(7, 3, 5)], input_size=5, hidden_size=6, num_layers=2, bidirectional=True)
_enter("RNNCell GRUCell", [(3, 5), (3, 6)], input_size=5, hidden_size=6)
_enter("LSTMCell", lambda t: SampleInput(t(3, 5)), input_size=5, hidden_size=6)
_enter("MultiheadAttention", [(7, 3, 8), (6, 3, 8), (6, 3, 8)], embed_dim=8, num_heads=2)
_LAYER = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0}
_enter("TransformerEncoderLayer", [(7, 3, 8)], **_LAYER)
_enter("TransformerDecoderLayer", [(7, 3, 8), (5, 3, 8)], **_LAYER)
_enter("Transformer", [(7, 3, 8), (5, 3, 8)], num_encoder_layers=1, num_decoder_layers=1, **_LAYER)
INPUTS["TransformerEncoder"] = (
    lambda nn: nn.TransformerEncoder(nn.TransformerEncoderLayer(**_LAYER), 2, enable_nested_tensor=False),
    lambda t: SampleInput(t(7, 3, 8)),
)
INPUTS["TransformerDecoder"] = (
    lambda nn: nn.TransformerDecoder(nn.TransformerDecoderLayer(**_LAYER), 2),
    lambda t: SampleInput(t(7, 3, 8), t(5, 3, 8)),
)

_enter("L1Loss MSELoss SmoothL1Loss HuberLoss", [(33, 20), (33, 20)])
_enter("BCELoss", lambda t: SampleInput(t(33, 20, low=0.1, high=0.9), t.no_grad(33, 20, low=0, high=1)))
_enter(
    "BCEWithLogitsLoss MultiLabelSoftMarginLoss",
    lambda t: SampleInput(t(33, 20), t.no_grad(33, 20, low=0, high=1)),
)
_enter("KLDivLoss", lambda t: SampleInput(t(33, 20), t.no_grad(33, 20, low=0.1, high=1)), reduction="batchmean")
_enter("PoissonNLLLoss", lambda t: SampleInput(t(33, 20), t.no_grad(33, 20, low=0, high=4)))
_enter("GaussianNLLLoss", lambda t: SampleInput(t(33, 20), t(33, 20), t(33, 20, low=0.5, high=2)))
_enter("CrossEntropyLoss NLLLoss MultiMarginLoss", lambda t: SampleInput(t(33, 20), t.index(20, 33)))
_enter("NLLLoss2d", lambda t: SampleInput(t(2, 5, 4, 3), t.index(5, 2, 4, 3)))
_enter("MultiLabelMarginLoss", lambda t: SampleInput(t(9, 6), t.index(6, 9, 6).sub(1)))
_enter("CosineEmbeddingLoss", lambda t: SampleInput(t(9, 6), t(9, 6), _signs(t, 9)))
_enter("HingeEmbeddingLoss SoftMarginLoss", lambda t: SampleInput(t(33, 20), _signs(t, 33, 20)))
_enter("MarginRankingLoss", lambda t: SampleInput(t(33), t(33), _signs(t, 33)))
_enter("TripletMarginLoss TripletMarginWithDistanceLoss", [(9, 6), (9, 6), (9, 6)])
_enter("CTCLoss", lambda t: SampleInput(t(12, 3, 5).log_softmax(2), 1 + t.index(4, 3, 4), (12, 11, 9), (4, 3, 2)))
_enter(
    "AdaptiveLogSoftmaxWithLoss",
    lambda t: SampleInput(t(33, 20), t.index(12, 33)),
    in_features=20,
    n_classes=12,
    cutoffs=[3, 7],
)
_enter("LinearCrossEntropyLoss", lambda t: SampleInput(t(33, 20), t.index(12, 33)), in_features=20, num_classes=12)

WITHOUT_INPUTS = {
    **dict.fromkeys(
        ("Module", "Identity", "Container", "RNNBase", "RNNCellBase", "Flatten", "Unflatten"), "a frame"
    ),
    **dict.fromkeys(("Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"), "a container"),
    **dict.fromkeys(("SyncBatchNorm", "DataParallel"), "for several devices"),
}
"""Modules that are not tried, each with the reason."""
