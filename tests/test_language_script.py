"""scripts/train_language.py: its output, and its functions compared with simple implementations."""

import json
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import train_language as script
from graph import torch_derivatives
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from train_language import GPT, WORD_PATTERN, Settings, Text, Vocabulary, Windows

from manualgrad.training import DataError
from manualgrad.training.checkpoint import list_checkpoints, load, save

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "train_language.py"
torch.set_num_threads(1)
SHAPE = {"vocabulary": 300, "context": 16, "width": 32, "depth": 2, "heads": 2}
SMALL = [word for name, value in SHAPE.items() for word in (f"--{name}", value)] + ["--learning-rate", 0.01]
VOCABULARY_WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
VOCABULARY_WORDS += ["iota", "kappa", "lambda", "mu", "nu", "xi", "omicron", "pi"]

ScriptCall = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(call_script: ScriptCall) -> ScriptCall:
    return partial(call_script, SCRIPT)


def random_words(words: int, seed: int = 0) -> str:
    """Words drawn uniformly from 16. Their entropy is 4 bits per word."""
    return "".join(f"{word} " for word in random.Random(seed).choices(VOCABULARY_WORDS, k=words))


@pytest.fixture(scope="module")
def documents() -> dict[str, bytes]:
    return script.python_documentation()


@pytest.fixture(scope="module")
def text(documents: dict[str, bytes]) -> Text:
    return script.split(documents)


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a run folder, except for speeds."""
    found = events(folder)
    tags = [tag for tag in found.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in tags}


def samples(folder: Path) -> dict[int, str]:
    """The generated samples of a run, by step."""
    found = events(folder).Tensors("samples/text_summary")
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found}


@pytest.mark.parametrize("model", ["manualgrad", "torch"])
def test_learning_random_words(model: str, call: ScriptCall, tmp_path: Path) -> None:
    """The result is between the entropy and 1.1 times it, and better than both compressors."""
    (tmp_path / "words.txt").write_text(random_words(6000))
    arguments = ["--data", "words.txt", *SMALL, "--max-epochs", 3, "--length", 20, "--model", model]
    status, output, error = call(*arguments, "--histograms-every-n-epochs", 1)
    assert (status, error) == (0, "")
    test_text = random_words(6000)[-len(random_words(6000)) // 10 :]
    entropy = 4 * test_text.count(" ") / len(test_text)
    pattern = r"bits per byte of the ([\d,]+) test bytes: ([\d.]+) \(xz ([\d.]+), bzip2 ([\d.]+)\)"
    found = re.search(pattern, output)
    assert found is not None
    size, network, *compressors = (float(figure.replace(",", "")) for figure in found.groups())
    assert size == pytest.approx(len(test_text), abs=1)
    assert 0.98 * entropy < network < 1.1 * entropy
    assert min(compressors) > 1.1 * network

    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"language-{model}-seed0-")
    curves = scalars(folder)
    assert {"loss/train", "bits_per_byte/train_epoch", "bits_per_byte/validation_epoch"} <= curves.keys()
    assert [value for _, value in curves["summary/test_bits_per_byte"]] == [pytest.approx(network, abs=1e-4)]
    assert [value for _, value in curves["summary/xz_bits_per_byte"]] == [pytest.approx(compressors[0], abs=1e-4)]
    # Validation windows begin without context, which costs a little.
    assert curves["bits_per_byte/validation_epoch"][-1][1] == pytest.approx(network, rel=0.1)
    assert {"gradient_flow", "saved_bytes"} <= set(events(folder).Tags()["images"])
    cards = samples(folder)
    assert list(cards) == [step for step, _ in curves["loss/validation_epoch"]]
    generated = cards[max(cards)].split()[:-1]  # the last word may be incomplete
    assert sum(word in VOCABULARY_WORDS for word in generated) > 0.8 * len(generated)


def test_generating_from_a_checkpoint(call: ScriptCall, tmp_path: Path) -> None:
    """It equals the sample of the run, and depends on prompt, temperature and length."""
    (tmp_path / "words.txt").write_text(random_words(2000))
    arguments = ["--data", "words.txt", *SMALL, "--max-epochs", 2, "--length", 12, "--run-dir", "mine"]
    assert call(*arguments)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert load(tmp_path / "mine" / "best.pt")["trainer_state"]["best_epoch"] == 2
    generate = ["--run-dir", "mine", "--generate"]
    cards = samples(tmp_path / "mine")
    shown = "".join(line.removeprefix("    ") + "\n" for line in cards[max(cards)].splitlines())
    assert call(*generate, "", "--length", 12) == (0, shown, "")
    _, output, _ = call(*generate, "alpha", "--length", 40)
    assert output.startswith("alpha")
    assert len(output) > len(shown)
    cold = {call(*generate, "alpha", "--temperature", 1e-6, "--seed", seed)[1] for seed in (1, 2)}
    warm = {call(*generate, "alpha", "--temperature", 5, "--seed", seed)[1] for seed in (1, 2)}
    assert (len(cold), len(warm)) == (1, 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_run_resumes_in_the_middle_of_an_epoch(call: ScriptCall, tmp_path: Path) -> None:
    """Curves, samples and weights are those of an uninterrupted run."""
    (tmp_path / "words.txt").write_text(random_words(1000))
    arguments = ["--data", "words.txt", *SMALL, "--max-epochs", 2, "--dropout", 0.1, "--length", 5]
    arguments += ["--checkpoint-every-n-steps", 7, "--keep-last", 99]
    assert call(*arguments, "--run-dir", "whole")[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in [*list_checkpoints(tmp_path / "cut"), tmp_path / "cut" / "best.pt"]:
        if path.name == "best.pt" or path.name > "step-0000000007.pt":
            path.unlink()
    assert call(*arguments, "--run-dir", "cut", "--resume-from-checkpoint")[0] == 0
    assert scalars(tmp_path / "cut") == scalars(tmp_path / "whole")
    assert samples(tmp_path / "cut") == samples(tmp_path / "whole")
    resumed, whole = (load(list_checkpoints(tmp_path / name)[0])["model"] for name in ("cut", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_manualgrad_and_torch_have_the_same_losses(call: ScriptCall, tmp_path: Path) -> None:
    """The same seed gives the same weights, losses and gradients. All gradients of manualgrad are manual."""
    merges = Vocabulary.learn(random_words(500).encode(), 300).merges
    tokens = torch.randint(len(merges) + 256, (3, 17), generator=torch.Generator().manual_seed(0))
    manual_model, torch_model = (
        script.build_model(Settings.model_validate({**SHAPE, "model": model, "dropout": 0.1}), merges)
        for model in ("manualgrad", "torch")
    )
    for manual, reference in zip(manual_model.parameters(), torch_model.parameters(), strict=True):
        assert torch.equal(manual, reference)
    losses = []
    for model in (manual_model, torch_model):
        torch.manual_seed(1)
        losses.append(script.mean_loss(model(tokens), tokens))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for manual, reference in zip(manual_model.parameters(), torch_model.parameters(), strict=True):
        torch.testing.assert_close(manual.grad, reference.grad)
    assert torch_derivatives(losses[0]) == set()
    assert torch_derivatives(losses[1]) != set()

    # The same in the script.
    (tmp_path / "words.txt").write_text(random_words(600))
    arguments = ["--data", "words.txt", *SMALL, "--max-epochs", 1, "--length", 5, "--log-every-n-steps", 1]
    for model in ("manualgrad", "torch"):
        assert call(*arguments, "--model", model, "--run-dir", model)[0] == 0
    curves = [scalars(tmp_path / model)["loss/train"] for model in ("manualgrad", "torch")]
    assert len(curves[0]) > 5
    for one, other in zip(*curves, strict=True):
        assert one == (other[0], pytest.approx(other[1], rel=1e-3))


def test_torch_without_linear_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.13: two functions give the same loss."""
    settings = Settings.model_validate({**SHAPE, "model": "torch", "dropout": 0})
    model = script.build_model(settings, torch.zeros(0, 2, dtype=torch.int64))
    tokens = torch.randint(256, (2, 17))
    expected = model(tokens)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    torch.testing.assert_close(model(tokens), expected)


def test_settings_from_a_file(call: ScriptCall, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(random_words(600))
    arguments = ["--data", "words.txt", *SMALL, "--max-epochs", 1, "--length", 5, "--seed", 3]
    assert call(*arguments, "--run-dir", "one")[0] == 0
    assert call("--settings", "one/settings.json", "--run-dir", "two")[0] == 0
    assert scalars(tmp_path / "one") == scalars(tmp_path / "two")
    found = json.loads((tmp_path / "two" / "settings.json").read_text())["settings"]
    assert {name: found[name] for name in SHAPE} == SHAPE


def test_help_explains_every_option(call: ScriptCall) -> None:
    status, output, _ = call("--help")
    assert status == 0
    assert "Train a GPT on text" in output
    options, defaults = output.count("\n  --"), output.count("(default:")
    assert options == defaults > 20


@pytest.mark.parametrize(
    ("line", "content", "arguments"),
    [
        ("book cannot be read: No such file or directory", None, []),
        ("book has too little text or too few files: 0 bytes, 2000 are needed", b"", []),
        ("book has too little text or too few files: 1999 bytes, 2000 are needed", b"a" * 1999, []),
        ("book is not UTF-8 text: 'utf-8' codec can't decode byte 0xff", b"a" * 3000 + b"\xff", []),
        ("book has too little text or too few files: 0 bytes, 2000 are needed", {}, []),
        ("book has too little text or too few files: 5002 bytes", {"one": b"a" * 5000}, []),
        ("book/two is not UTF-8 text", {"one": b"a" * 5000, "two": b"\xfe"}, []),
        (r"the validation split has \d+ tokens, fewer than --context 256", random_words(1000).encode(), []),
        ("--vocabulary 255: at least 256", None, ["--vocabulary", 255]),
        ("--width 128 is not a multiple of 2 times --heads 3", None, ["--heads", 3]),
        ("--dropout: Input should be less than 1", None, ["--dropout", 1]),
        ("--temperature: Input should be greater than 0", None, ["--temperature", 0]),
        ("--generate needs --run-dir", None, ["--generate", "The"]),
        ("none/best.pt: there is no checkpoint", None, ["--generate", "The", "--run-dir", "none"]),
        ("unrecognized arguments: --widht", None, ["--widht", 3]),
    ],
)
def test_wrong_input_gives_one_error_line(
    line: str, content: bytes | dict[str, bytes] | None, arguments: list[object], call: ScriptCall, tmp_path: Path
) -> None:
    """Exit status 2, and no file is written."""
    if isinstance(content, bytes):
        (tmp_path / "book").write_bytes(content)
    elif content is not None:
        (tmp_path / "book").mkdir()
        for name, part in content.items():
            (tmp_path / "book" / name).write_bytes(part)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    status, output, error = call("--data", "book", *arguments)
    assert (status, output) == (2, "")
    assert re.match(f"error: {line}", error)
    assert error.count("\n") == 1
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_generating_from_unusable_checkpoints(call: ScriptCall, tmp_path: Path) -> None:
    """A damaged checkpoint, and one of another script."""
    (tmp_path / "words.txt").write_text(random_words(600))
    assert call("--data", "words.txt", *SMALL, "--max-epochs", 1, "--length", 5, "--run-dir", "mine")[0] == 0
    path = tmp_path / "mine" / "best.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    status, output, error = call("--generate", "mu", "--run-dir", "mine")
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: mine/best.pt is not an intact checkpoint")

    path.write_bytes(whole)
    saved = load(path)
    del saved["model"]["merges"]
    save(path, saved)
    status, output, error = call("--generate", "mu", "--run-dir", "mine")
    assert (status, output, error) == (2, "", "error: mine/best.pt is not a checkpoint of train_language.py\n")


# The text


def test_python_documentation(text: Text, documents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has over 1.5 million bytes of English. No document is in two splits."""
    monkeypatch.setattr(script, "python_documentation", lambda: documents)
    assert script.read_text(None) == text
    size = sum(map(len, text))
    assert size > 1_500_000
    assert [round(len(part) / size, 2) for part in text] == [
        pytest.approx(0.85, abs=0.03),
        pytest.approx(0.05, abs=0.03),
        pytest.approx(0.1, abs=0.03),
    ]
    the = len(re.findall(rb"\bthe\b", text.train)) / len(text.train.split())
    assert 0.02 < the < 0.1
    assert "json/__init__.py" in documents
    assert b"JSON" in documents["json/__init__.py"]
    assert "help('yield')" in documents
    seen: set[bytes] = set()
    for name, document in documents.items():
        assert sum(document + b"\n\n" in part for part in text) == 1, name
        paragraphs = set(document.split(b"\n\n"))
        assert seen.isdisjoint(paragraphs), name
        seen |= paragraphs
    for module in (json, random):
        assert module.__file__
        docstrings = list(script._docstrings(Path(module.__file__)))
        assert (module.__doc__ or "").split("\n")[0] in docstrings[0]
        for docstring in docstrings:
            assert seen.issuperset(docstring.encode().split(b"\n\n"))


def test_documents_are_split_by_name() -> None:
    """Each is whole in one split, whatever the order."""
    documents = {f"name {i}": f"<{i}>".encode() * 20 for i in range(200)}
    parts = script.split(documents)
    places = {name: [document in part for part in parts] for name, document in documents.items()}
    assert all(sum(found) == 1 for found in places.values())
    assert parts == script.split(dict(reversed(documents.items())))
    counts = [sum(found[i] for found in places.values()) for i in range(3)]
    assert counts == [pytest.approx(170, abs=3), pytest.approx(10, abs=3), pytest.approx(20, abs=3)]


def test_read_folder_and_file(tmp_path: Path) -> None:
    """Hidden files are ignored. A single file is split by position, and nothing is lost."""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"\xff")
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"{i}: {random_words(40, i)}")
    found = script.read_text(tmp_path)
    assert b"".join(found).count(b": ") == 30
    (tmp_path / "one").write_text(random_words(1000) + "äöü")
    assert b"".join(script.read_text(tmp_path / "one")).decode() == random_words(1000) + "äöü"


def test_compression_baselines() -> None:
    """Repeated text needs hardly any bits, noise 8 bits per byte."""
    noise = random.Random(0).randbytes(30_000)
    seen = script.compression_baselines(Text(noise, b"", noise[:10_000]))
    unseen = script.compression_baselines(Text(noise[:20_000], b"", noise[20_000:]))
    assert seen["xz"] < 0.5
    assert unseen["xz"] == pytest.approx(8, abs=0.1)
    assert unseen["bzip2"] == pytest.approx(8, abs=0.2)


# The vocabulary


def simple_bpe(text: bytes, size: int) -> list[tuple[int, int]]:
    """Simple byte-pair encoding: count all pairs, join the most frequent one, repeat."""
    words = [list(word) for word in WORD_PATTERN.findall(text)]
    merges: list[tuple[int, int]] = []
    while 256 + len(merges) < size:
        counts = Counter(pair for word in words for pair in pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=(0, 0))
        if counts[best] < 2:
            break
        words = [script._merge_pair(word, best, 256 + len(merges)) for word in words]
        merges.append(best)
    return merges


@pytest.mark.parametrize("source", ["random words", "python_documentation"])
def test_vocabulary_is_that_of_simple_bpe(source: str, text: Text) -> None:
    sample = random_words(300).encode() if source == "random words" else text.train[:6000]
    vocabulary = Vocabulary.learn(sample, 320)
    assert [tuple(pair) for pair in vocabulary.merges.tolist()] == simple_bpe(sample, 320)
    # Encoding applies the merges in their order.
    words = [list(word) for word in WORD_PATTERN.findall(sample)]
    for i, pair in enumerate(simple_bpe(sample, 320)):
        words = [script._merge_pair(word, pair, 256 + i) for word in words]
    assert vocabulary.encode(sample) == [token for word in words for token in word]


def test_decode_inverts_encode(text: Text) -> None:
    """Also for unseen text in any alphabet, and bytes that are not text."""
    vocabulary = Vocabulary.learn(text.train[:50_000], 600)
    assert len(vocabulary.bytes) == 600
    odd = "naïve — 日本語 🙂\r\n\t  x\n\n  y_z 12 \x00"
    assert vocabulary.decode(vocabulary.encode(odd.encode())) == odd
    noise = random.Random(0).randbytes(5000)
    assert b"".join(vocabulary.bytes[token] for token in vocabulary.encode(noise)) == noise
    assert len(vocabulary.encode(text.test)) < 0.55 * len(text.test)
    assert vocabulary.decode(vocabulary.encode(text.test)).encode() == text.test
    bare = Vocabulary.learn(text.train[:1000], 256)
    assert bare.encode(b"the") == list(b"the")
    assert len(Vocabulary.learn(b"ab", 300).merges) == 0  # no pair occurs twice


# The network and its figures


def test_attention_is_causal() -> None:
    """A loss depends only on its token and those before it. It is the cross entropy of the returned logits."""
    merges = torch.zeros(0, 2, dtype=torch.int64)
    model = script.build_model(Settings.model_validate({**SHAPE, "dropout": 0}), merges).double()
    with torch.no_grad():
        for parameter in model.parameters():  # larger, so that every token has an effect
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    tokens = torch.randint(256, (2, 17))
    losses = model(tokens).view(2, 16)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    changed_losses = model(changed).view(2, 16)
    torch.testing.assert_close(losses[:, :8], changed_losses[:, :8], rtol=0, atol=1e-12)
    assert (losses[:, 8:] != changed_losses[:, 8:]).all()
    logits = model(tokens[:, :-1], return_logits=True)
    expected = F.cross_entropy(logits, tokens[:, -1], reduction="none")
    torch.testing.assert_close(losses[:, -1], expected)


def test_rotary_embedding_depends_on_distance() -> None:
    """Products of rotated vectors depend on the distance only. Norms do not change."""
    query, key = torch.randn(2, 8, dtype=torch.float64)
    rotated = [script.apply_rotary(x.expand(20, 8)) for x in (query, key)]
    products = rotated[0] @ rotated[1].T
    for distance in range(1, 19):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert products[:, 0].unique().numel() == 20
    torch.testing.assert_close(rotated[0].norm(dim=-1), query.norm().expand(20))


class Counting(nn.Module):
    """A network that returns the number of each token as its loss, and records the input lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens.shape[1] - 1)
        return tokens[:, 1:].flatten().float()


@pytest.mark.parametrize("length", [3, 8, 9, 16, 17, 50, 401])
def test_evaluate_predicts_every_token_once(length: int) -> None:
    """The result is in bits per byte, not per token."""
    text = bytes(random.Random(0).choices(b"abc", k=length))
    vocabulary = Vocabulary(torch.tensor([[97, 98], [99, 99]]))
    tokens = vocabulary.encode(text)
    model = Counting()
    found = script.evaluate(model, Windows(text, vocabulary, 8), torch.device("cpu"))
    assert found == pytest.approx(sum(tokens) / math.log(2) / length)
    assert max(model.seen) <= 8
    shown, count = script.bits_per_byte(torch.tensor([1.0, 2.0]), torch.tensor([4, 2]))
    assert (shown.item(), count.item()) == (pytest.approx(3 / math.log(2) / 6), 6)


def test_epoch_covers_nearly_all_of_the_text_once() -> None:
    """Windows do not overlap. Each epoch has another offset."""
    windows = Windows(bytes(range(32, 127)) * 4, Vocabulary(torch.zeros(0, 2, dtype=torch.int64)), 16)
    order = script.ShuffledWindows(windows)
    epochs = []
    for seed in range(5):
        torch.manual_seed(seed)
        starts = list(order)
        assert len(starts) == len(order) == len(windows.starts()) - 1
        assert [b - a for a, b in pairwise(sorted(starts))] == [16] * (len(starts) - 1)
        assert starts != sorted(starts)
        assert 0 <= min(starts) < 16
        for start in starts:
            tokens, lengths = windows[start]
            assert (len(tokens), len(lengths)) == (17, 16)
        epochs.append(min(starts))
    assert len(set(epochs)) > 1
    whole = [windows[start][0][1:] for start in windows.starts()]
    assert torch.cat(whole).tolist() == windows.tokens[1 : 1 + 16 * len(whole)].tolist()


def test_text_of_one_window() -> None:
    windows = Windows(b"a" * 16, Vocabulary(torch.zeros(0, 2, dtype=torch.int64)), 16)
    assert list(script.ShuffledWindows(windows)) == list(windows.starts()) == [0]
    with pytest.raises(DataError):
        script.read_text(Path("nowhere"))
    assert isinstance(
        script.build_model(Settings.model_validate(SHAPE), torch.zeros(0, 2, dtype=torch.int64)), GPT
    )
