"""The models that scripts/benchmark.py and scripts/check_gpu.py measure (`CASES`), in ordinary torch code.

A model's ``forward`` takes a batch and returns the loss. Some modules have an attribute that a benchmark variant
sets: ``Blocks.checkpointed`` (recompute each block in the backward), ``Head.implementation`` and
``Layer.implementation``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import manualgrad.nn

Batch = tuple[Tensor, ...]


class Blocks(nn.ModuleList):
    """Blocks in sequence."""

    checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)  # pyright: ignore
        return x


# Perceptrons


class MLP(nn.Module):
    """Linear layers with activations between them, and the cross entropy of ten classes."""

    def __init__(self, width: int, depth: int, make_activation: Callable[[int], list[nn.Module]]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), *make_activation(width)]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 10))
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.layers(x), target)


# Images


class VGG(nn.Module):
    """Stages of two convolutions with ReLU, each followed by max pooling."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for in_channels, width in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Linear(widths[-1] * 16, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 10)
        )

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(self.features(x)), target)


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != width:
            projection = nn.Conv2d(in_channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class LeNet(nn.Module):
    """Two convolutions with pooling, two linear layers (LeCun, Bottou, Bengio and Haffner, 1998)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 5), nn.Conv2d(8, 16, 5)
        self.linear, self.head = nn.Linear(256, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return F.cross_entropy(self.head(F.relu(self.linear(x.flatten(1)))), target)


class ResNet(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(nn.Conv2d(3, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU())
        self.blocks = Blocks(
            [BasicBlock(w, w, 1), BasicBlock(w, w, 1), BasicBlock(w, 2 * w, 2), BasicBlock(2 * w, 4 * w, 2)]
        )
        self.head = nn.Linear(4 * w, 10)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1)
        return F.cross_entropy(self.head(x), target)


# Transformers


class Attention(nn.Module):
    """Multi-head self-attention, optionally with grouped queries and rotary position embedding."""

    def __init__(
        self, d: int, heads: int, kv_heads: int, bias: bool, dropout: float, causal: bool, rotary: bool
    ) -> None:
        super().__init__()
        self.sizes = (d, kv_heads * d // heads, kv_heads * d // heads)
        self.head_dim, self.dropout, self.causal, self.enable_gqa = d // heads, dropout, causal, kv_heads < heads
        self.qkv = nn.Linear(d, sum(self.sizes), bias=bias)
        self.out = nn.Linear(d, d, bias=bias)
        self.rotary = RotaryEmbedding(self.head_dim) if rotary else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in self.qkv(x).split(self.sizes, -1))
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=self.causal, enable_gqa=self.enable_gqa
        )
        return self.out(y.transpose(1, 2).flatten(2))


class RotaryEmbedding(nn.Module):
    """Rotate pairs of features by an angle proportional to the position (Su et al., RoFormer, 2021)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, d: int, max_length: int = 1024) -> None:
        super().__init__()
        angles = torch.arange(max_length)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        n = x.shape[-2]
        return x * self.cos[:n] + torch.cat([-second, first], -1) * self.sin[:n]


class GatedMLP(nn.Module):
    """SwiGLU: (silu(x W) ⊙ x V) U (Shazeer, 2020)"""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PreNorm(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))"""

    def __init__(
        self, norm: Callable[[], nn.Module], attention: nn.Module, mlp: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.norm1, self.attention = norm(), attention
        self.norm2, self.mlp = norm(), mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


def gpt_block(d: int, heads: int, dropout: float, causal: bool = True) -> nn.Module:
    mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
    attention = Attention(d, heads, heads, bias=True, dropout=dropout, causal=causal, rotary=False)
    return PreNorm(lambda: nn.LayerNorm(d), attention, mlp, dropout)


def llama_block(d: int, heads: int) -> nn.Module:
    attention = Attention(d, heads, heads // 4, bias=False, dropout=0, causal=True, rotary=True)
    return PreNorm(lambda: nn.RMSNorm(d, eps=1e-6), attention, GatedMLP(d, 8 * d // 3), 0.0)


class Head(nn.Module):
    """A linear layer and the cross entropy of the next token."""

    implementation: Literal["logits", "fused", "chunked", "liger"] = "logits"
    """Two functions with all logits between them, or one function: manualgrad's (fused), torch's with chunks
    (chunked), or Liger-Kernel's (liger)."""

    def __init__(self, vocabulary: int, d: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, vocabulary, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        if self.implementation == "logits":
            return F.cross_entropy(self.linear(x), target)
        if self.implementation == "liger":
            return liger().liger_fused_linear_cross_entropy(x, self.linear.weight, target)
        if self.implementation == "fused":
            return manualgrad.nn.functional.linear_cross_entropy(x, self.linear.weight, target)
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, self.linear.weight, target, options=options)


class LanguageModel(nn.Module):
    """Predict the next token. Head and embedding share their weight."""

    def __init__(
        self, vocabulary: int, d: int, positions: int, dropout: float, norm: nn.Module, blocks: Blocks
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d)
        self.positions = nn.Embedding(positions, d) if positions else None
        self.dropout = nn.Dropout(dropout)
        self.blocks, self.norm, self.head = blocks, norm, Head(vocabulary, d)
        self.head.linear.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.norm(self.blocks(self.dropout(x)))
        return self.head(x.flatten(0, 1), target.flatten())


def gpt(vocabulary: int, d: int = 512, depth: int = 4, heads: int = 8, dropout: float = 0.1) -> nn.Module:
    blocks = Blocks([gpt_block(d, heads, dropout) for _ in range(depth)])
    return LanguageModel(vocabulary, d, 256, dropout, nn.LayerNorm(d), blocks)


def llama(vocabulary: int, d: int = 512, depth: int = 4, heads: int = 8) -> nn.Module:
    blocks = Blocks([llama_block(d, heads) for _ in range(depth)])
    return LanguageModel(vocabulary, d, 0, 0.0, nn.RMSNorm(d, eps=1e-6), blocks)


class BERT(nn.Module):
    """A post-norm encoder that classifies by the first token."""

    def __init__(self, vocabulary: int = 30522, d: int = 512, depth: int = 4, heads: int = 8) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(256, d)
        self.norm, self.dropout = nn.LayerNorm(d), nn.Dropout(0.1)
        self.blocks = Blocks(
            [nn.TransformerEncoderLayer(d, heads, 4 * d, 0.1, "gelu", batch_first=True) for _ in range(depth)]
        )
        self.head = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Dropout(0.1), nn.Linear(d, 2))

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.dropout(self.norm(self.tokens(tokens) + self.positions(positions))))
        return F.cross_entropy(self.head(x[:, 0]), target)


class ViT(nn.Module):
    """A transformer over the patches of an image that classifies by their mean."""

    def __init__(self, size: int = 128, patch: int = 8, d: int = 256, depth: int = 4, heads: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, d))
        self.blocks = Blocks([gpt_block(d, heads, 0.0, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return F.cross_entropy(self.head(self.norm(self.blocks(x)).mean(1)), target)


# Models of the transformers package, with random weights


class Transformers(nn.Module):
    """A model of the transformers package. Its forward returns the loss."""

    def __init__(self, model: str, config: str, **sizes: Any) -> None:
        super().__init__()
        package = importlib.import_module("transformers")
        self.model = getattr(package, model)(getattr(package, config)(**sizes))
        self.language = self.model.get_output_embeddings() is not None

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.model(x, labels=target).loss


def hf_gpt2() -> nn.Module:
    return Transformers("GPT2LMHeadModel", "GPT2Config", n_embd=512, n_layer=4, n_head=8, n_positions=256)


def hf_llama() -> nn.Module:
    sizes = {"hidden_size": 512, "intermediate_size": 1365, "num_hidden_layers": 4}
    return Transformers(
        "LlamaForCausalLM", "LlamaConfig", num_attention_heads=8, num_key_value_heads=2, use_cache=False, **sizes
    )


_ENCODER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}


def hf_bert() -> nn.Module:
    return Transformers("BertForSequenceClassification", "BertConfig", **_ENCODER)


def hf_vit() -> nn.Module:
    return Transformers("ViTForImageClassification", "ViTConfig", image_size=128, patch_size=8, **_ENCODER)


def hf_resnet() -> nn.Module:
    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256], "depths": [2, 1, 1]}
    return Transformers("ResNetForImageClassification", "ResNetConfig", layer_type="basic", **sizes)


# Single layers that Liger-Kernel also has


def liger() -> Any:
    """Return the module of Liger-Kernel's functions (Triton kernels for CUDA)."""
    return importlib.import_module("liger_kernel.transformers.functional")


class Layer(nn.Module):
    """A function of tensors that all require a gradient."""

    implementation: str = "torch"
    """Liger-Kernel's function for "liger", torch's for any other value."""

    def __init__(
        self,
        torch_function: Callable[..., Tensor],
        liger_function: Callable[..., Tensor],
        *shapes: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.torch_function, self.liger_function = torch_function, liger_function
        self.tensors = nn.ParameterList([torch.randn(shape) for shape in shapes])

    def forward(self, *targets: Tensor) -> Tensor:
        if self.implementation == "liger":
            return self.liger_function(*self.tensors, *targets)
        return self.torch_function(*self.tensors, *targets)


def rms_norm() -> nn.Module:
    return Layer(
        lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
        lambda x, weight: liger().liger_rms_norm(x, weight, 1e-6, in_place=False),  # else it overwrites g
        *((4096, 4096), (4096,)),
    )


def layer_norm() -> nn.Module:
    return Layer(
        lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-6),
        lambda x, weight, bias: liger().liger_layer_norm(x, weight, bias, 1e-6),
        *((4096, 4096), (4096,), (4096,)),
    )


def swiglu() -> nn.Module:
    return Layer(lambda a, b: F.silu(a) * b, lambda a, b: liger().liger_swiglu(a, b), *[(4096, 11008)] * 2)


def geglu() -> nn.Module:
    return Layer(
        lambda a, b: F.gelu(a, approximate="tanh") * b,
        lambda a, b: liger().liger_geglu(a, b),
        *[(4096, 11008)] * 2,
    )


def softmax() -> nn.Module:
    return Layer(lambda x: F.softmax(x, -1), lambda x: liger().liger_softmax(x), (4096, 4096))


def cross_entropy() -> nn.Module:
    return Layer(
        lambda x, target: F.cross_entropy(x, target),
        lambda x, target: liger().liger_cross_entropy(x, target),
        (4096, 32000),
    )


class HeadWithInput(nn.Module):
    """A head with an input that requires a gradient."""

    def __init__(self, vocabulary: int, d: int) -> None:
        super().__init__()
        self.x, self.head = nn.Parameter(torch.randn(4096, d)), Head(vocabulary, d)

    def forward(self, target: Tensor) -> Tensor:
        return self.head(self.x, target)


# The table


@dataclass(frozen=True)
class Case:
    """A model and its batch. Both are made from the global random state."""

    name: str
    title: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    variants: tuple[str, ...] = ("manualgrad", "program", "torch_compiled")
    """The variants to measure besides plain torch.nn. See `VARIANTS` in lib/steps.py."""
    functional: bool = True
    """Whether the model also calls functions of torch.nn.functional."""


_BLOCK_VARIANTS = ("manualgrad", "program", "torch_checkpointed", "manualgrad_checkpointed", "torch_compiled")
_HEAD_VARIANTS = (*_BLOCK_VARIANTS, "torch_chunked", "liger")
_LAYER_VARIANTS = ("manualgrad", "torch_compiled", "liger")


def classification_batch(batch: int, *shape: int) -> Callable[[], Batch]:
    """Random inputs and labels of ten classes."""
    return lambda: (torch.randn(batch, *shape), torch.randint(10, (batch,)))


def language_batch(vocabulary: int, batch: int = 4, length: int = 256) -> Callable[[], Batch]:
    """Random tokens, and for each the next one as its target."""

    def make() -> Batch:
        tokens = torch.randint(vocabulary, (batch, length + 1))
        return tokens[:, :-1], tokens[:, 1:]

    return make


def _gelu(width: int) -> list[nn.Module]:
    return [nn.GELU(), nn.Dropout(0.1)]


def _batch_norm(width: int) -> list[nn.Module]:
    return [nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1)]


def _relu(width: int) -> list[nn.Module]:
    return [nn.ReLU(), nn.Dropout(0.1)]


def label_batch(classes: int) -> Callable[[], Batch]:
    return lambda: (torch.randint(classes, (4096,)),)


_wide_batch = classification_batch(4096, 512)
CASES = [
    Case(
        "mlp_gelu",
        "MLP: GELU, dropout",
        lambda: MLP(512, 6, _gelu),
        _wide_batch,
        functional=False,
    ),
    Case(
        "mlp_batch_norm",
        "MLP: batch norm, ReLU, dropout",
        lambda: MLP(512, 6, _batch_norm),
        _wide_batch,
        functional=False,
    ),
    Case(
        "mlp_relu",
        "MLP: ReLU, dropout",
        lambda: MLP(512, 6, _relu),
        _wide_batch,
        functional=False,
    ),
    Case(
        "mlp_tiny",
        "MLP: ReLU, batch 64, width 64",
        lambda: MLP(64, 3, lambda _: [nn.ReLU()]),
        classification_batch(64, 64),
        functional=False,
    ),
    Case("vgg", "VGG-like, 32x32", VGG, classification_batch(32, 3, 32, 32)),
    Case("resnet", "ResNet-like, 32x32", ResNet, classification_batch(32, 3, 32, 32)),
    Case("vit", "ViT-like, 256 patches", ViT, classification_batch(8, 3, 128, 128)),
    Case("bert", "BERT-like, T=256", BERT, lambda: (torch.randint(30522, (4, 256)), torch.randint(2, (4,)))),
    Case("gpt", "GPT, V=256", lambda: gpt(256), language_batch(256), _BLOCK_VARIANTS),
    Case("gpt_50257", "GPT, V=50257", lambda: gpt(50257), language_batch(50257), _HEAD_VARIANTS),
    Case("llama", "Llama-like, V=32000", lambda: llama(32000), language_batch(32000), _HEAD_VARIANTS),
]
if importlib.util.find_spec("transformers"):

    def _labels(batch: int = 4) -> Tensor:
        return torch.randint(2, (batch,))

    def _tokens(vocabulary: int) -> Tensor:
        return torch.randint(vocabulary, (4, 256))

    CASES += [
        Case("hf_gpt2", "transformers' GPT-2, V=50257", hf_gpt2, lambda: (_tokens(50257),) * 2),
        Case("hf_llama", "transformers' Llama, V=32000", hf_llama, lambda: (_tokens(32000),) * 2),
        Case("hf_bert", "transformers' BERT, T=256", hf_bert, lambda: (_tokens(30522), _labels())),
        Case("hf_vit", "transformers' ViT, 256 patches", hf_vit, lambda: (torch.randn(4, 3, 128, 128), _labels())),
        Case(
            "hf_resnet",
            "transformers' ResNet, 64x64",
            hf_resnet,
            lambda: (torch.randn(32, 3, 64, 64), _labels(32)),
        ),
    ]
LAYERS = [
    Case("liger_rms_norm", "RMSNorm, 4096x4096", rms_norm, lambda: (), _LAYER_VARIANTS),
    Case("liger_layer_norm", "LayerNorm, 4096x4096", layer_norm, lambda: (), _LAYER_VARIANTS),
    Case("liger_swiglu", "SwiGLU, 4096x11008", swiglu, lambda: (), _LAYER_VARIANTS),
    Case("liger_geglu", "GeGLU, 4096x11008", geglu, lambda: (), _LAYER_VARIANTS),
    Case("liger_softmax", "softmax, 4096x4096", softmax, lambda: (), _LAYER_VARIANTS),
    Case("liger_cross_entropy", "cross entropy, 4096x32000", cross_entropy, label_batch(32000), _LAYER_VARIANTS),
    Case(
        *("liger_linear_cross_entropy", "linear cross entropy, 4096x4096, V=32000"),
        *(lambda: HeadWithInput(32000, 4096), label_batch(32000), (*_LAYER_VARIANTS, "torch_chunked")),
    ),
]
"""Measured on CUDA only, where Liger-Kernel runs."""

_SMALL_VARIANTS = ("manualgrad", "program")
SMALL = [
    Case(
        *("small_mlp", "MLP, width 64", lambda: MLP(64, 3, lambda _: [nn.ReLU()])),
        *(classification_batch(64, 64), _SMALL_VARIANTS),
    ),
    Case("small_lenet", "LeNet", LeNet, classification_batch(32, 1, 28, 28), _SMALL_VARIANTS),
    Case(
        "small_resnet", "ResNet, width 16", lambda: ResNet(16), classification_batch(8, 3, 32, 32), _SMALL_VARIANTS
    ),
    Case(
        *("small_bert", "BERT, width 32, 2 layers", lambda: BERT(100, 32, 2, 2)),
        *(lambda: (torch.randint(100, (4, 32)), torch.randint(2, (4,))), _SMALL_VARIANTS),
    ),
    Case(
        *("small_gpt", "GPT, width 32, 2 layers", lambda: gpt(100, 32, 2, 2)),
        *(language_batch(100, 4, 32), _SMALL_VARIANTS),
    ),
    Case(
        *("small_llama", "Llama, width 32, 2 layers", lambda: llama(100, 32, 2, 4)),
        *(language_batch(100, 4, 32), _SMALL_VARIANTS),
    ),
    Case(
        *("small_vit", "ViT, width 32, 2 layers", lambda: ViT(32, 8, 32, 2, 2)),
        *(classification_batch(4, 3, 32, 32), _SMALL_VARIANTS),
    ),
]
"""Models with steps of a few milliseconds. Most of this time is Python and the start of operations."""

CASES_BY_NAME = {case.name: case for case in CASES + LAYERS + SMALL}
