"""Train a GPT with hand-written gradients on text, and measure it in bits per byte.

    python scripts/train_language.py                       the documentation included in Python
    python scripts/train_language.py --data book.txt       any text file, or a folder of them
    python scripts/train_language.py --model torch         the same network in plain torch.nn
    python scripts/train_language.py --run-dir runs/language-... --generate "Return the"

The curves, generated samples, weights and final figures go to a folder under runs/:  tensorboard --logdir runs
"""

import ast
import bz2
import hashlib
import heapq
import lzma
import math
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from manualgrad.training import DataError, FitResult, TaskSettings, TensorBoardLogger, Trainer, parse_settings, run
from manualgrad.training.checkpoint import BEST_CHECKPOINT, load

EXCLUDED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "site-packages",
    "dist-packages",
}
"""Folders of the standard library without documentation for users."""
MIN_BYTES = 2000
NEWLINE = ord("\n")
"""The token before the start of a text."""


class Settings(TaskSettings):
    """Train a GPT on text. By default: the 2 MB of documentation included in Python."""

    data: Path | None = None
    """A text file or a folder of them; by default the docstrings of Python's library and the topics of help()."""
    vocabulary: PositiveInt = 2048
    """The number of tokens: 256 bytes and the most frequent pairs of tokens (byte-pair encoding)."""
    context: PositiveInt = 256
    """The context length in tokens."""
    width: PositiveInt = 128
    """The size of embeddings and hidden layers."""
    depth: PositiveInt = 3
    """The number of transformer blocks."""
    heads: PositiveInt = 4
    """The number of attention heads."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The dropout probability."""
    max_epochs: PositiveInt = 10
    """How many frequencies to go through the training text."""
    batch_size: PositiveInt = 8
    """Sequences per batch, each of the context length."""
    learning_rate: PositiveFloat = 4e-3
    """The highest learning rate of the one-cycle schedule."""
    weight_decay: NonNegativeFloat = 0.1
    """The weight decay of AdamW."""
    generate: str | None = None
    """Do not train. Continue this text with the best weights of the run in --run-dir."""
    temperature: PositiveFloat = 0.8
    """The sampling temperature. Near 0, the most likely token is always chosen."""
    length: PositiveInt = 150
    """How many tokens to generate."""
    task: ClassVar[str] = "language"
    not_hyperparameters: ClassVar[frozenset[str]] = TaskSettings.not_hyperparameters | {
        "generate",
        "temperature",
        "length",
    }
    changeable_on_resume: ClassVar[frozenset[str]] = TaskSettings.changeable_on_resume | {
        "generate",
        "temperature",
        "length",
    }

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.vocabulary < 256:
            raise ValueError(f"--vocabulary {self.vocabulary}: at least 256, the number of bytes, is needed")
        if self.width % (2 * self.heads):
            raise ValueError(f"--width {self.width} is not a multiple of 2 times --heads {self.heads}")
        if self.generate is not None and self.run_dir is None:
            raise ValueError("--generate needs --run-dir, the folder of a trained run")
        return self


# The text


class Text(NamedTuple):
    """A text in three splits. No document is in two of them."""

    train: bytes
    validation: bytes
    test: bytes
    """About 85 %, 5 % and 10 %."""


def read_text(path: Path | None) -> Text:
    """Read a text and split it: a folder by files, a single file by position.

    Raises:
        DataError: if it cannot be read, is not text, or is too short.
    """
    if path is None:
        text = split(python_documentation())
    elif path.is_dir():
        names = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        text = split({name.as_posix(): _read(path / name) for name in visible})
    else:
        content = _read(path)
        train_end, validation_end = len(content) * 85 // 100, len(content) * 9 // 10
        text = Text(content[:train_end], content[train_end:validation_end], content[validation_end:])
    size = sum(map(len, text))
    if size < MIN_BYTES or not all(text):
        source = path or sysconfig.get_path("stdlib")
        raise DataError(f"{source} has too little text or too few files: {size} bytes, {MIN_BYTES} are needed")
    return text


def _read(path: Path) -> bytes:
    try:
        text = path.read_bytes()
        text.decode()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    return text


def python_documentation() -> dict[str, bytes]:
    """The docstrings of each module of Python's library and the topics of help(), by name.

    A paragraph that occurs in several documents is only in the first of them, so that no test paragraph is in the
    training split.

    Raises:
        DataError: if this Python has no documentation.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python does not include its documentation: choose a text with --data") from None
    library = Path(sysconfig.get_path("stdlib"))
    modules = {path.relative_to(library): path for path in sorted(library.rglob("*.py"))}
    documents = {
        name.as_posix(): "\n\n".join(_docstrings(path))
        for name, path in modules.items()
        if EXCLUDED_FOLDERS.isdisjoint(name.parts)
    }
    documents |= {f"help({name!r})": topic.strip() for name, topic in topics.items()}
    seen: set[str] = set()
    for name, document in documents.items():
        new = [paragraph for paragraph in document.split("\n\n") if paragraph not in seen]
        seen.update(new)
        documents[name] = "\n\n".join(new)
    return {name: document.encode() for name, document in documents.items() if document}


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in docstrings
        tree = ast.parse(path.read_bytes())
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if docstring := ast.get_docstring(node):
            yield docstring


def split(documents: dict[str, bytes]) -> Text:
    """Split documents in the order of the hashes of their names."""
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    total, assigned = sum(map(len, documents.values())), 0
    names: list[list[str]] = [[], [], []]
    for name in order:
        names[2 if assigned < 0.1 * total else 1 if assigned < 0.15 * total else 0].append(name)
        assigned += len(documents[name])
    return Text(*(b"".join(documents[name] + b"\n\n" for name in sorted(part)) for part in names))


def compression_baselines(text: Text) -> dict[str, float]:
    """Bits per byte of the test split for xz and bzip2, when they compress it after the training split."""
    compressors = {"xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), "bzip2": bz2.compress}
    sizes = {
        name: len(compress(text.train + text.test)) - len(compress(text.train))
        for name, compress in compressors.items()
    }
    return {name: 8 * size / len(text.test) for name, size in sizes.items()}


# The vocabulary


WORD_PATTERN = re.compile(rb" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?= )|\s+")
"""The words of a text. A token is always within one. A space belongs to the word after it."""


class Vocabulary:
    """Byte-pair encoding. Tokens 0 to 255 are the bytes; each later one joins two earlier ones.

    Args:
        merges: (n, 2), int64: the two tokens that token 256 + i joins.
    """

    def __init__(self, merges: Tensor) -> None:
        self.merges = merges
        self.rank = {(a, b): 256 + i for i, (a, b) in enumerate(merges.tolist())}
        self.bytes = [bytes([i]) for i in range(256)]
        for a, b in self.rank:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.cache: dict[bytes, list[int]] = {}

    @classmethod
    def learn(cls, text: bytes, size: int) -> "Vocabulary":
        """Join the most frequent pair of adjacent tokens until there are `size` tokens or no pair is frequent."""
        counts = Counter(WORD_PATTERN.findall(text))
        words = [list(word) for word in counts]
        frequencies = list(counts.values())
        pair_counts: Counter[tuple[int, int]] = Counter()
        words_with: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # includes words that had the pair
        for i, word in enumerate(words):
            for pair in pairwise(word):
                pair_counts[pair] += frequencies[i]
                words_with[pair].add(i)
        queue = [(-count, pair) for pair, count in pair_counts.items()]  # may include outdated counts
        heapq.heapify(queue)
        merges: list[tuple[int, int]] = []
        while queue and 256 + len(merges) < size:
            count, best = heapq.heappop(queue)
            if -count != pair_counts[best]:
                continue
            if -count < 2:
                break
            changed: set[tuple[int, int]] = set()
            for i in words_with.pop(best):
                for pair in pairwise(words[i]):
                    pair_counts[pair] -= frequencies[i]
                    changed.add(pair)
                words[i] = _merge_pair(words[i], best, 256 + len(merges))
                for pair in pairwise(words[i]):
                    pair_counts[pair] += frequencies[i]
                    words_with[pair].add(i)
                    changed.add(pair)
            merges.append(best)
            for pair in changed:
                heapq.heappush(queue, (-pair_counts[pair], pair))
        return cls(torch.tensor(merges, dtype=torch.int64).view(-1, 2))

    def encode(self, text: bytes) -> list[int]:
        """The tokens of a text."""
        return [token for word in WORD_PATTERN.findall(text) for token in self._encode_word(word)]

    def _encode_word(self, word: bytes) -> list[int]:
        if word not in self.cache:
            tokens = list(word)
            while len(tokens) > 1:
                best = min(pairwise(tokens), key=lambda pair: self.rank.get(pair, math.inf))
                if best not in self.rank:
                    break
                tokens = _merge_pair(tokens, best, self.rank[best])
            self.cache[word] = tokens
        return self.cache[word]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return b"".join(self.bytes[token] for token in tokens).decode(errors="replace")


def _merge_pair(tokens: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """Replace each occurrence of the pair by `token`."""
    merged: list[int] = []
    i = 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            merged.append(token)
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


# The network and its training


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        layers, width = settings.layers, settings.width
        self.attention, self.heads = layers.functional.scaled_dot_product_attention, settings.heads
        self.norm1 = layers.LayerNorm(width)
        self.query_key_value = layers.Linear(width, 3 * width)
        self.projection = layers.Linear(width, width)
        self.norm2 = layers.LayerNorm(width)
        self.hidden = layers.Linear(width, 4 * width)
        self.gelu = layers.GELU()
        self.output = layers.Linear(4 * width, width)
        self.dropout = layers.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width / heads)
        attended = self.attention(apply_rotary(query), apply_rotary(key), value, is_causal=True)
        x = x + self.dropout(self.projection(attended.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.output(self.gelu(self.hidden(self.norm2(x)))))


def apply_rotary(x: Tensor) -> Tensor:
    """Rotary position embedding: rotate pairs of features by angles proportional to the position.

    The product of two rotated vectors depends only on the distance of their positions.

    Args:
        x: (..., length, features), with an even number of features.
    """
    length, half = x.shape[-2], x.shape[-1] // 2
    frequencies = 10000 ** -(torch.arange(half, device=x.device) / half)
    angles = torch.arange(length, device=x.device).outer(frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class GPT(nn.Module):
    """A decoder-only transformer. The output layer shares the weight of the embedding.

    Args:
        settings: the sizes and the layers (manualgrad.nn or torch.nn).
        merges: of the vocabulary, so that checkpoints include it.
    """

    merges: Tensor

    def __init__(self, settings: Settings, merges: Tensor) -> None:
        super().__init__()
        layers = settings.layers
        self.functional = layers.functional
        self.register_buffer("merges", merges)
        self.embedding = layers.Embedding(256 + len(merges), settings.width)
        self.dropout = layers.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.depth))
        self.norm = layers.LayerNorm(settings.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # as in GPT-2: smaller for layers that add to the residual stream
                residual = name.endswith(("projection.weight", "output.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * settings.depth) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, return_logits: bool = False) -> Tensor:
        """The cross entropy of each token given those before it, in nats: (batch, 1 + length) to (batch · length).

        With `return_logits`, the logits of the next token: (batch, length) to (batch, vocabulary).
        """
        inputs = tokens if return_logits else tokens[:, :-1]
        x = self.dropout(self.embedding(inputs))
        for block in self.blocks:
            x = block(x)
        x, weight = self.norm(x), self.embedding.weight
        if return_logits:
            return self.functional.linear(x[:, -1], weight)
        return _cross_entropy(self.functional, x.flatten(0, 1), weight, tokens[:, 1:].flatten())


def _cross_entropy(functional: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The cross entropy of each row of the logits x Wᵀ."""
    if hasattr(functional, "linear_cross_entropy"):  # manualgrad's, or torch's since 2.13
        return functional.linear_cross_entropy(x, weight, target, reduction="none")
    return functional.cross_entropy(functional.linear(x, weight), target, reduction="none")


def build_model(settings: Settings, merges: Tensor) -> GPT:
    """Build the network. The seed determines the initial weights."""
    torch.manual_seed(settings.seed)
    return GPT(settings, merges)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Sequences of a text, indexed by their start: 1 + `context` tokens, and the bytes of the last `context`.

    A newline precedes the text, so that its first token is also predicted.
    """

    def __init__(self, text: bytes, vocabulary: Vocabulary, context: int) -> None:
        self.tokens = torch.tensor([NEWLINE, *vocabulary.encode(text)])
        self.lengths = torch.tensor([len(token) for token in vocabulary.bytes])[self.tokens]
        self.context = context

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        stop = start + self.context + 1
        return self.tokens[start:stop], self.lengths[start + 1 : stop]

    def starts(self, first: int = 0) -> range:
        """The starts of adjacent complete windows, from `first` on."""
        return range(first, len(self.tokens) - self.context, self.context)


class ShuffledWindows(Sampler[int]):
    """The windows of a text in random order. Each epoch begins at another offset."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return max(len(self.windows.starts()) - 1, 1)

    def __iter__(self) -> Iterator[int]:
        spare = len(self.windows.tokens) - self.windows.context * len(self)
        starts = self.windows.starts(int(torch.randint(min(spare, self.windows.context), ())))
        return (starts[i] for i in torch.randperm(len(self)).tolist())


def mean_loss(nats: Tensor, _: Tensor) -> Tensor:
    """The loss."""
    return nats.mean()


def bits_per_byte(nats: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The loss in bits per byte, comparable between vocabularies, and the number of bytes as its weight."""
    count = lengths.sum()
    return nats.sum() / count / math.log(2), count


@torch.no_grad()
def evaluate(model: nn.Module, windows: Windows, device: torch.device) -> float:
    """Bits per byte of a text. Each token is predicted once, from at least three quarters of the context if there
    are that many before it."""
    model.eval()
    tokens, context = windows.tokens, windows.context
    last = max(len(tokens) - 1 - context, 0)
    nats, done = 0.0, 0
    for batch in torch.tensor([*range(0, last, max(context // 4, 1)), last]).split(16):
        losses = model(torch.stack([tokens[start : start + context + 1] for start in batch]).to(device))
        for start, window_losses in zip(batch.tolist(), losses.double().cpu().view(len(batch), -1), strict=True):
            nats += window_losses[done - start :].sum().item()
            done = start + len(window_losses)
    return nats / math.log(2) / windows.lengths[1:].sum().item()


@torch.no_grad()
def generate_text(
    model: nn.Module, vocabulary: Vocabulary, prompt: str, settings: Settings, device: torch.device
) -> str:
    """Continue a prompt by sampling one token after another."""
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = [NEWLINE, *vocabulary.encode(prompt.encode())]
    for _ in range(settings.length):
        logits = model(torch.tensor([tokens[-settings.context :]], device=device), return_logits=True)[0]
        probabilities = (logits.float().cpu() / settings.temperature).softmax(0)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return vocabulary.decode(tokens[1:])


def train(settings: Settings) -> FitResult | None:
    """Read the text, train, and print the final figures."""
    text = read_text(settings.data)
    vocabulary = Vocabulary.learn(text.train, settings.vocabulary)
    splits = {name: Windows(part, vocabulary, settings.context) for name, part in text._asdict().items()}
    for name in ("train", "validation"):
        if not splits[name].starts():
            raise DataError(
                f"the {name} split has {len(splits[name].tokens) - 1} tokens, fewer than "
                f"--context {settings.context}"
            )
    model = build_model(settings, vocabulary.merges)
    train_loader, validation_loader = (
        DataLoader(splits[name], settings.batch_size, sampler=order)
        for name, order in (
            ("train", ShuffledWindows(splits["train"])),
            ("validation", splits["validation"].starts()),
        )
    )
    optimizer, schedule = settings.one_cycle(model, len(train_loader))

    def log_sample(log: TensorBoardLogger, step: int) -> None:
        sample = generate_text(model, vocabulary, "", settings, trainer.device)
        card = "".join(f"    {line}\n" for line in sample.split("\n"))  # a code block in Markdown
        log.add(step, lambda writer: writer.add_text("samples", card, step))

    def evaluate_test(*_: object) -> dict[str, float]:
        figures = {"test": evaluate(model, splits["test"], trainer.device), **compression_baselines(text)}
        return {f"{name}_bits_per_byte": figure for name, figure in figures.items()}

    trainer = Trainer(
        model,
        mean_loss,
        optimizer,
        train_loader,
        validation_loader,
        settings=settings,
        lr_scheduler=schedule,
        metrics={"bits_per_byte": bits_per_byte},
        on_fit_end=evaluate_test,
        on_epoch_end=log_sample,
    )
    result = trainer.fit()
    if not trainer.is_main_process:
        return None

    network, xz, bzip2 = result.summary.values()
    print(f"bits per byte of the {len(text.test):,} test bytes: {network:.4f} (xz {xz:.4f}, bzip2 {bzip2:.4f})")
    return result


def generate_from_checkpoint(settings: Settings) -> None:
    """Print a continuation of the prompt.

    Raises:
        CheckpointError: if the run has no intact checkpoint of its best weights.
        DataError: if it is not a run of this script.
    """
    prompt = settings.generate
    assert prompt is not None
    assert settings.run_dir is not None
    path = settings.run_dir / BEST_CHECKPOINT
    saved = load(path)
    if "merges" not in saved["model"]:
        raise DataError(f"{path} is not a checkpoint of train_language.py")
    sizes = {name: saved["run"][name] for name in ("context", "width", "depth", "heads")}
    settings = settings.model_copy(update=sizes)
    merges = saved["model"]["merges"]
    model = GPT(settings, merges)
    model.load_state_dict(saved["model"])
    device = settings.torch_device()
    print(generate_text(model.eval().to(device), Vocabulary(merges), prompt, settings, device))


if __name__ == "__main__":
    settings = parse_settings(Settings).resolved()
    run(settings, train if settings.generate is None else generate_from_checkpoint)
