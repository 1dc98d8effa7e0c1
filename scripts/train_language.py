"""Learn to write English, a GPT whose every gradient is written by hand, and say how well in bits per byte.

    python scripts/train_language.py                       the documentation that every Python carries
    python scripts/train_language.py --data book.txt       any text, or a folder of texts
    python scripts/train_language.py --model torch         the same network in plain torch.nn
    python scripts/train_language.py --run-dir runs/language-... --generate "Return the"

The curves, samples of its writing, the weights and the final figures go to a folder under runs/:
tensorboard --logdir runs
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

NO_TEXT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "site-packages", "dist-packages"}
"""Folders beside the standard library's modules, or in it, whose docstrings are not for its users."""
FEWEST_BYTES = 2000
NEWLINE = ord("\n")
"""The token that stands before a text."""


class Settings(TaskSettings):
    """Learn to write like a text: by default, 2 MB of documentation that every Python carries."""

    data: Path | None = None
    """A text file, or a folder of them; by default the docstrings of Python's library and the topics of help()."""
    vocabulary: PositiveInt = 2048
    """Tokens: the 256 bytes, and joined pairs of tokens that are often side by side; 256 for bytes alone."""
    context: PositiveInt = 256
    """How many tokens the network looks back."""
    width: PositiveInt = 128
    """The size of a token's vector."""
    depth: PositiveInt = 3
    """Blocks of attention and a hidden layer."""
    heads: PositiveInt = 4
    """Heads of each attention; they share the width."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """How much of each branch is left out at random."""
    max_epochs: PositiveInt = 10
    """How many times to go through the training text."""
    batch_size: PositiveInt = 8
    """Windows of the context's length per batch."""
    learning_rate: PositiveFloat = 4e-3
    """The highest rate of the one-cycle schedule."""
    weight_decay: NonNegativeFloat = 0.1
    """The weight decay of AdamW."""
    generate: str | None = None
    """Train nothing: write on from these words, with the best weights of the run in --run-dir."""
    temperature: PositiveFloat = 0.8
    """How freely it writes: towards 0, always the likeliest token."""
    length: PositiveInt = 150
    """How many tokens it writes."""
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
    def _fit_together(self) -> Self:
        if self.vocabulary < 256:
            raise ValueError(f"--vocabulary {self.vocabulary}: the bytes alone are 256")
        if self.width % (2 * self.heads):
            raise ValueError(f"--width {self.width} cannot be shared in pairs among --heads {self.heads}")
        if self.generate is not None and self.run_dir is None:
            raise ValueError("--generate needs --run-dir, the folder of the run that has learned to write")
        return self


# The text


class Text(NamedTuple):
    """A text in three parts, none of whose documents is in two of them."""

    train: bytes
    validation: bytes
    test: bytes
    """Held out: about 85 %, 5 % and 10 %."""


def read_text(path: Path | None) -> Text:
    """Read a text and split it: a folder by its files, a single file by place.

    Raises:
        DataError: for what is missing, no text, or too short.
    """
    if path is None:
        text = split(documentation())
    elif path.is_dir():
        names = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        text = split({name.as_posix(): _read(path / name) for name in shown})
    else:
        whole = _read(path)
        train, test = len(whole) * 85 // 100, len(whole) * 9 // 10
        text = Text(whole[:train], whole[train:test], whole[test:])
    size = sum(map(len, text))
    if size < FEWEST_BYTES or not all(text):
        place = path or sysconfig.get_path("stdlib")
        raise DataError(f"{place} has too little text, or in too few files: {size} bytes, {FEWEST_BYTES} needed")
    return text


def _read(path: Path) -> bytes:
    try:
        text = path.read_bytes()
        text.decode()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from None
    return text


def documentation() -> dict[str, bytes]:
    """The docstrings of each module of Python's library, and the topics of help(), by name.

    A paragraph that several have is in the first of them alone, so that none held out was seen in another.

    Raises:
        DataError: where this Python was stripped of them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python comes without its documentation: name a text with --data") from None
    library = Path(sysconfig.get_path("stdlib"))
    modules = {path.relative_to(library): path for path in sorted(library.rglob("*.py"))}
    documents = {
        name.as_posix(): "\n\n".join(_docstrings(path))
        for name, path in modules.items()
        if NO_TEXT.isdisjoint(name.parts)
    }
    documents |= {f"help({name!r})": topic.strip() for name, topic in topics.items()}
    seen: set[str] = set()
    for name, document in documents.items():
        kept = [paragraph for paragraph in document.split("\n\n") if paragraph not in seen]
        seen.update(kept)
        documents[name] = "\n\n".join(kept)
    return {name: document.encode() for name, document in documents.items() if document}


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's escapes
        tree = ast.parse(path.read_bytes())
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if docstring := ast.get_docstring(node):
            yield docstring


def split(documents: dict[str, bytes]) -> Text:
    """Share documents out in an order that the hashes of their names decide."""
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    size, gone = sum(map(len, documents.values())), 0
    parts: list[list[str]] = [[], [], []]
    for name in order:
        parts[2 if gone < 0.1 * size else 1 if gone < 0.15 * size else 0].append(name)
        gone += len(documents[name])
    return Text(*(b"".join(documents[name] + b"\n\n" for name in sorted(part)) for part in parts))


def compressors(text: Text) -> dict[str, float]:
    """Bits per byte of the held-out part for xz and bzip2: what they add when it follows the training part."""
    ways = {"xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), "bzip2": bz2.compress}
    sizes = {name: len(way(text.train + text.test)) - len(way(text.train)) for name, way in ways.items()}
    return {name: 8 * size / len(text.test) for name, size in sizes.items()}


# The vocabulary


WORDS = re.compile(rb" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?= )|\s+")
"""What a text is cut into before its bytes are joined to tokens; no token crosses a border. A space goes with the
word that follows it."""


class Vocabulary:
    """Byte-pair encoding: tokens 0 to 255 are the bytes, each one after is two earlier ones joined.

    Args:
        merges: (n, 2), int64: what token 256 + i is made of.
    """

    def __init__(self, merges: Tensor) -> None:
        self.merges = merges
        self.rank = {(a, b): 256 + i for i, (a, b) in enumerate(merges.tolist())}
        self.bytes = [bytes([i]) for i in range(256)]
        for a, b in self.rank:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.known: dict[bytes, list[int]] = {}

    @classmethod
    def learn(cls, text: bytes, size: int) -> "Vocabulary":
        """Join the pair of tokens that is most often side by side in the text, until there are `size` tokens.

        There may be fewer, where no pair is left that occurs twice.
        """
        counts = Counter(WORDS.findall(text))
        words = [list(word) for word in counts]
        times = list(counts.values())
        pairs: Counter[tuple[int, int]] = Counter()
        places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # words that have the pair or had it
        for i, word in enumerate(words):
            for pair in pairwise(word):
                pairs[pair] += times[i]
                places[pair].add(i)
        queue = [(-count, pair) for pair, count in pairs.items()]  # counts that have changed since are passed over
        heapq.heapify(queue)
        merges: list[tuple[int, int]] = []
        while queue and 256 + len(merges) < size:
            count, best = heapq.heappop(queue)
            if -count != pairs[best]:
                continue
            if -count < 2:
                break
            changed: set[tuple[int, int]] = set()
            for i in places.pop(best):
                for pair in pairwise(words[i]):
                    pairs[pair] -= times[i]
                    changed.add(pair)
                words[i] = _joined(words[i], best, 256 + len(merges))
                for pair in pairwise(words[i]):
                    pairs[pair] += times[i]
                    places[pair].add(i)
                    changed.add(pair)
            merges.append(best)
            for pair in changed:
                heapq.heappush(queue, (-pairs[pair], pair))
        return cls(torch.tensor(merges, dtype=torch.int64).view(-1, 2))

    def encode(self, text: bytes) -> list[int]:
        """The tokens of a text."""
        return [token for word in WORDS.findall(text) for token in self._encode_word(word)]

    def _encode_word(self, word: bytes) -> list[int]:
        if word not in self.known:
            tokens = list(word)
            while len(tokens) > 1:
                best = min(pairwise(tokens), key=lambda pair: self.rank.get(pair, math.inf))
                if best not in self.rank:
                    break
                tokens = _joined(tokens, best, self.rank[best])
            self.known[word] = tokens
        return self.known[word]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return b"".join(self.bytes[token] for token in tokens).decode(errors="replace")


def _joined(tokens: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """The tokens with `token` wherever the pair was."""
    found: list[int] = []
    i = 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            found.append(token)
            i += 2
        else:
            found.append(tokens[i])
            i += 1
    return found


# The network and its training


class Block(nn.Module):
    """x + attention(norm(x)), and to that its hidden layer: (batch, length, width) to the same."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        layers, width = settings.layers, settings.width
        self.attention, self.heads = layers.functional.scaled_dot_product_attention, settings.heads
        self.norm1 = layers.LayerNorm(width)
        self.query_key_value = layers.Linear(width, 3 * width)
        self.mixed = layers.Linear(width, width)
        self.norm2 = layers.LayerNorm(width)
        self.hidden = layers.Linear(width, 4 * width)
        self.gelu = layers.GELU()
        self.output = layers.Linear(4 * width, width)
        self.dropout = layers.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width / heads)
        seen = self.attention(turned(query), turned(key), value, is_causal=True)
        x = x + self.dropout(self.mixed(seen.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.output(self.gelu(self.hidden(self.norm2(x)))))


def turned(x: Tensor) -> Tensor:
    """Rotary positions: pairs of features turned by angles that grow with the place.

    A product of two vectors so turned knows how far apart they stand, and not where. The shape is (..., length, an
    even number).
    """
    length, half = x.shape[-2], x.shape[-1] // 2
    speeds = 10000 ** -(torch.arange(half, device=x.device) / half)
    angles = torch.arange(length, device=x.device).outer(speeds)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class GPT(nn.Module):
    """Reads tokens, and at each of them has a say on the next one.

    Args:
        settings: of the shape, and whose layers to take.
        merges: those of the vocabulary, which a checkpoint so holds as well.
    """

    merges: Tensor

    def __init__(self, settings: Settings, merges: Tensor) -> None:
        super().__init__()
        layers = settings.layers
        self.functional = layers.functional
        self.register_buffer("merges", merges)
        self.token = layers.Embedding(256 + len(merges), settings.width)
        self.dropout = layers.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.depth))
        self.norm = layers.LayerNorm(settings.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # small, and smaller where the blocks add up
                ends = name.endswith(("mixed.weight", "output.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * settings.depth) if ends else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, scores: bool = False) -> Tensor:
        """What each token costs, seen from those before it, in nats: (batch, 1 + length) to (batch · length).

        With `scores`, those of every token to be the next: (batch, length) to (batch, vocabulary). They are
        products with the vectors that the tokens have on the way in.
        """
        seen = tokens if scores else tokens[:, :-1]
        x = self.dropout(self.token(seen))
        for block in self.blocks:
            x = block(x)
        x, weight = self.norm(x), self.token.weight
        if scores:
            return self.functional.linear(x[:, -1], weight)
        return _cross_entropy(self.functional, x.flatten(0, 1), weight, tokens[:, 1:].flatten())


def _cross_entropy(functional: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Of x Wᵀ, for each row."""
    if hasattr(functional, "linear_cross_entropy"):  # ours, or torch's since 2.13
        return functional.linear_cross_entropy(x, weight, target, reduction="none")
    return functional.cross_entropy(functional.linear(x, weight), target, reduction="none")


def build(settings: Settings, merges: Tensor) -> GPT:
    """The network; the seed decides the initial weights."""
    torch.manual_seed(settings.seed)
    return GPT(settings, merges)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """By its start, each stretch of a text: `context` tokens with the one before, and their lengths in bytes.

    Args:
        text: before its first token stands the end of a line, so that this one is learned too.
    """

    def __init__(self, text: bytes, vocabulary: Vocabulary, context: int) -> None:
        self.tokens = torch.tensor([NEWLINE, *vocabulary.encode(text)])
        self.lengths = torch.tensor([len(token) for token in vocabulary.bytes])[self.tokens]
        self.context = context

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        stop = start + self.context + 1
        return self.tokens[start:stop], self.lengths[start + 1 : stop]

    def starts(self, first: int = 0) -> range:
        """Those of the whole windows that follow one upon the other from the first."""
        return range(first, len(self.tokens) - self.context, self.context)


class Shuffled(Sampler[int]):
    """The windows of a text in random order, cut elsewhere in each epoch."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return max(len(self.windows.starts()) - 1, 1)

    def __iter__(self) -> Iterator[int]:
        spare = len(self.windows.tokens) - self.windows.context * len(self)
        starts = self.windows.starts(int(torch.randint(min(spare, self.windows.context), ())))
        return (starts[i] for i in torch.randperm(len(self)).tolist())


def mean_nats(nats: Tensor, _: Tensor) -> Tensor:
    """The loss: of each token that comes, what it costs."""
    return nats.mean()


def bits_per_byte(nats: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The same on a scale that all vocabularies share, and other compressors; with the number of bytes."""
    count = lengths.sum()
    return nats.sum() / count / math.log(2), count


@torch.no_grad()
def score(model: nn.Module, windows: Windows, device: torch.device) -> float:
    """Bits per byte of a whole text: every token once, and after the first ones each seen from at least three
    quarters of the context."""
    model.eval()
    tokens, context = windows.tokens, windows.context
    last = max(len(tokens) - 1 - context, 0)
    nats, done = 0.0, 0
    for batch in torch.tensor([*range(0, last, max(context // 4, 1)), last]).split(16):
        found = model(torch.stack([tokens[start : start + context + 1] for start in batch]).to(device))
        for start, costs in zip(batch.tolist(), found.double().cpu().view(len(batch), -1), strict=True):
            nats += costs[done - start :].sum().item()
            done = start + len(costs)
    return nats / math.log(2) / windows.lengths[1:].sum().item()


@torch.no_grad()
def write(model: nn.Module, vocabulary: Vocabulary, words: str, settings: Settings, device: torch.device) -> str:
    """Write on from some words, one token at a time, by chance as the network has it."""
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = [NEWLINE, *vocabulary.encode(words.encode())]
    for _ in range(settings.length):
        scores = model(torch.tensor([tokens[-settings.context :]], device=device), scores=True)[0]
        chances = (scores.float().cpu() / settings.temperature).softmax(0)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    return vocabulary.decode(tokens[1:])


def train(settings: Settings) -> FitResult | None:
    """Read, train, and print the final figures."""
    text = read_text(settings.data)
    vocabulary = Vocabulary.learn(text.train, settings.vocabulary)
    parts = {name: Windows(part, vocabulary, settings.context) for name, part in text._asdict().items()}
    for name in ("train", "validation"):
        if not parts[name].starts():
            raise DataError(
                f"the {name} part has {len(parts[name].tokens) - 1} tokens, less than the --context of "
                f"{settings.context}"
            )
    model = build(settings, vocabulary.merges)
    train_loader, validation_loader = (
        DataLoader(parts[name], settings.batch_size, sampler=order)
        for name, order in (("train", Shuffled(parts["train"])), ("validation", parts["validation"].starts()))
    )
    optimizer, schedule = settings.one_cycle(model, len(train_loader))

    def sample(log: TensorBoardLogger, step: int) -> None:
        written = write(model, vocabulary, "", settings, trainer.device)
        card = "".join(f"    {line}\n" for line in written.split("\n"))  # as it stands, in Markdown
        log.add(step, lambda writer: writer.add_text("samples", card, step))

    def summary(*_: object) -> dict[str, float]:
        figures = {"test": score(model, parts["test"], trainer.device), **compressors(text)}
        return {f"{name}_bits_per_byte": figure for name, figure in figures.items()}

    trainer = Trainer(
        model,
        mean_nats,
        optimizer,
        train_loader,
        validation_loader,
        settings=settings,
        lr_scheduler=schedule,
        metrics={"bits_per_byte": bits_per_byte},
        on_fit_end=summary,
        on_epoch_end=sample,
    )
    result = trainer.fit()
    if not trainer.is_main_process:
        return None

    ours, *others = result.summary.items()
    beside = ", ".join(f"{name.partition('_')[0]} {figure:.4f}" for name, figure in others)
    print(f"bits per byte of the {len(text.test):,} bytes held out: {ours[1]:.4f}; {beside}")
    return result


def write_on(settings: Settings) -> None:
    """Print what the network of a run makes of the words given.

    Raises:
        CheckpointError: where there is no such run, or its best weights are not whole.
        DataError: where it has learned something else.
    """
    words = settings.generate
    assert words is not None
    assert settings.run_dir is not None
    path = settings.run_dir / BEST_CHECKPOINT
    saved = load(path)
    if "merges" not in saved["model"]:
        raise DataError(f"{path} is of a network that does not write")
    shape = {name: saved["run"][name] for name in ("context", "width", "depth", "heads")}
    settings = settings.model_copy(update=shape)
    merges = saved["model"]["merges"]
    model = GPT(settings, merges)
    model.load_state_dict(saved["model"])
    device = settings.torch_device()
    print(write(model.eval().to(device), Vocabulary(merges), words, settings, device))


if __name__ == "__main__":
    settings = parse_settings(Settings).resolved()
    run(settings, train if settings.generate is None else write_on)
