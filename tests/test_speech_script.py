"""scripts/train_speech.py: what it reads, what it hears, and the run that it leaves."""

import math
import re
import wave
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import graph
import numpy as np
import pytest
import torch
import train_speech as speech
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn.functional import ctc_loss

from manualgrad.training.checkpoint import list_checkpoints, load

SCRIPT = Path(speech.__file__)
SMALL = ["--width", 16, "--depth", 2, "--batch-size", 16, "--dropout", 0, "--learning-rate", 0.01]
SampleInput = Callable[..., tuple[int, str, str]]
torch.set_num_threads(1)


@pytest.fixture
def call(call_script: Callable[..., tuple[int, str, str]]) -> SampleInput:
    return partial(call_script, SCRIPT)


def write(path: Path, samples: Tensor, rate: int = 8000, width: int = 2, channels: int = 1) -> None:
    """A WAV file of samples from -1 to 1, which lie channel beside channel."""
    numbers = (samples.double() * (2**31 - 1)).round().to(torch.int32)
    content = numbers.view(torch.uint8).view(-1, 4)[:, 4 - width :]
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes((content ^ 128 if width == 1 else content).contiguous().numpy().tobytes())


def tone(begin: float, end: float, rate: int = 8000, seconds: float = 0.2) -> Tensor:
    """A sound that glides from one frequency to another."""
    times = torch.arange(round(seconds * rate)) / rate
    return 0.5 * torch.sin(2 * math.pi * (begin * times + (end - begin) * times.square() / (2 * seconds)))


WORDS = {"down": (2000.0, 400.0), "high": (2500.0, 2500.0), "up": (400.0, 2000.0)}


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Three words by three speakers, whose voices are of different heights and speeds."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    torch.manual_seed(0)
    for word, (begin, end) in WORDS.items():
        for speaker, height in (("ann", 1.1), ("bob", 0.9), ("cat", 1.0)):
            for number in range(8):
                sound = tone(begin * height, end * height, seconds=0.15 + 0.01 * number)
                write(folder / f"{word}_{speaker}_{number}.wav", sound + 0.01 * torch.randn(len(sound)))
    return folder


def tags(folder: Path, kind: str) -> set[str]:
    return set(EventAccumulator(str(folder)).Reload().Tags()[kind])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a run folder, but for the times."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in names}


# A run


@pytest.mark.parametrize("model", ["manualgrad", "torch"])
def test_words_are_told_apart(model: str, recordings: Path, call: SampleInput, tmp_path: Path) -> None:
    """It learns, says how well in figures that its curves confirm, and leaves pages to see and to hear."""
    arguments = ["--data", recordings, *SMALL, "--max-epochs", 8, "--model", model]
    status, output, error = call(*arguments)
    assert (status, error) == (0, "")
    found = re.match(r"accuracy: test (\S+)% of 12 recordings\n", output)
    assert found is not None
    assert float(found[1]) > 90

    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"speech-{model}-seed0-")
    curves = scalars(folder)
    steps = 8 * math.ceil(54 / 16)
    assert curves["summary/test_accuracy"] == [(steps + 1, pytest.approx(float(found[1]) / 100, abs=1e-4))]
    assert curves["accuracy/validation_epoch"][-1][1] > 0.9
    pages = {f"{page}/{part}" for page in ("confusion_matrix", "worst_heard") for part in ("validation", "test")}
    assert tags(folder, "images") == pages | {"words", "saved_bytes", "gradient_flow"}
    sounds = tags(folder, "audio")
    assert {f"words/{word}" for word in WORDS} <= sounds
    wrong = round(12 * (1 - float(found[1]) / 100))
    assert sum(tag.startswith("worst_heard_test/") for tag in sounds) == (wrong or 8)  # if none is wrong, any


def test_strings_are_transcribed(recordings: Path, call: SampleInput, tmp_path: Path) -> None:
    settings = [*SMALL, "--max-epochs", 20]
    status, output, error = call("--data", recordings, "--ctc", *settings, "--run-dir", "mine")
    assert (status, error) == (0, "")
    pattern = r"word error rate: test (\S+)% of \d+ words\nwithout a mistake: (\S+)% of 12 strings\n"
    found = re.match(pattern, output)
    assert found is not None
    assert float(found[1]) < 20
    curves = scalars(tmp_path / "mine")
    assert curves["summary/test_error_rate"][0][1] == pytest.approx(float(found[1]) / 100, abs=1e-4)
    assert curves["summary/test_whole_strings"][0][1] == pytest.approx(float(found[2]) / 100, abs=1e-3)
    pages = {f"worst_heard/{part}_1" for part in ("validation", "test")}
    assert pages <= tags(tmp_path / "mine", "images")
    texts = {f"transcripts/{part}/text_summary" for part in ("validation", "test")}
    assert texts <= tags(tmp_path / "mine", "tensors")
    assert any(tag.startswith("worst_heard_test/1 said") for tag in tags(tmp_path / "mine", "audio"))


def test_the_digits_come_along(call: SampleInput, tmp_path: Path) -> None:
    """One epoch is enough to see that they can be told apart."""
    status, output, error = call("--max-epochs", 1, "--width", 32, "--depth", 2, "--run-dir", "mine")
    assert (status, error) == (0, "")
    found = re.match(r"accuracy: test (\S+)% of 600 recordings\n", output)
    assert found is not None
    assert float(found[1]) > 30  # by chance, 10
    assert tags(tmp_path / "mine", "audio") == set()  # of these there are spectra alone


def test_a_speaker_held_out(recordings: Path, call: SampleInput) -> None:
    """That speaker is tested, and no other; nobody learns from that one."""
    arguments = ["--data", recordings, *SMALL, "--max-epochs", 1, "--held-out-speaker", "bob"]
    status, output, error = call(*arguments)
    assert (status, error) == (0, "")
    assert "of 24 recordings by bob, who was never heard before\n" in output

    every = speech.read_folder(recordings)
    parts = speech.split(every, "bob")
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 45, "validation": 3, "test": 24}
    assert {every.speakers[row] for row in parts["test"]} == {"bob"}
    assert {every.speakers[row] for name in ("train", "validation") for row in parts[name]} == {"ann", "cat"}


def test_every_recording_is_in_one_part_of_the_split(recordings: Path) -> None:
    every = speech.read_folder(recordings)
    parts = speech.split(every, None)
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(72))
    for name, size in (("train", 18), ("validation", 2), ("test", 4)):
        assert every.labels[parts[name]].bincount().tolist() == [size] * 3


def test_an_unfinished_run_goes_on(recordings: Path, call: SampleInput, tmp_path: Path) -> None:
    """With the curves of one that never stopped; and each page is there once."""
    arguments = ["--data", recordings, "--ctc", *SMALL, "--max-epochs", 4, "--keep-last", 10]
    _, whole, _ = call(*arguments, "--run-dir", "whole")
    call(*arguments, "--run-dir", "mine")
    newest = list_checkpoints(tmp_path / "mine")
    assert len(newest) == 5  # before the first epoch, and after each
    for path in newest:
        if load(path)["trainer_state"]["epoch"] > 2:
            path.unlink()
    status, output, error = call(*arguments, "--run-dir", "mine", "--resume-from-checkpoint")
    assert (status, error) == (0, "")
    assert output.splitlines()[:2] == whole.splitlines()[:2]
    assert scalars(tmp_path / "mine") == scalars(tmp_path / "whole")
    events = EventAccumulator(str(tmp_path / "mine")).Reload()
    for tag, times in (("words", 1), ("worst_heard/validation_1", 4), ("worst_heard/test_1", 1)):
        assert len(events.Images(tag)) == times


def test_settings_from_a_file(recordings: Path, call: SampleInput, tmp_path: Path) -> None:
    """As those of another run."""
    arguments = ["--data", recordings, "--held-out-speaker", "cat", *SMALL, "--max-epochs", 1, "--run-dir", "one"]
    _, one, _ = call(*arguments)
    status, other, error = call("--settings", "one/settings.json", "--run-dir", "other")
    assert (status, error) == (0, "")
    assert other.splitlines()[0] == one.splitlines()[0]
    assert scalars(tmp_path / "other") == scalars(tmp_path / "one")


# Recordings


def test_any_width_and_any_number_of_channels(tmp_path: Path) -> None:
    sound = tone(300, 700)
    for width, error in ((1, 2**-7), (2, 2**-15), (3, 2**-23), (4, 2**-23)):
        write(tmp_path / "mono.wav", sound, width=width)
        samples, rate = speech.read_sound(tmp_path / "mono.wav")
        assert rate == 8000
        torch.testing.assert_close(samples, sound, rtol=0, atol=error)
    sides = torch.stack([sound + 0.3, sound - 0.3], 1).reshape(-1)
    write(tmp_path / "stereo.wav", sides, width=3, channels=2)
    torch.testing.assert_close(speech.read_sound(tmp_path / "stereo.wav")[0], sound, rtol=0, atol=2**-22)


@pytest.mark.parametrize("rate", [11025, 16000, 44100, 48000])
def test_a_sound_has_the_same_spectrum_at_any_rate(rate: int) -> None:
    """Of the frequencies that both rates have; those above do not come down as others."""
    expected = speech.spectrum(tone(300, 3000, 8000), 8000, 4000)
    sound = tone(300, 3000, rate)
    found = speech.spectrum(sound, rate, 4000)
    loud = expected > expected.max() - 40
    assert found.shape == expected.shape
    assert (found - expected)[loud].abs().max() < 1.5
    with_more = speech.spectrum(sound + tone(5000, 5000, rate), rate, 4000)
    assert (with_more - found)[loud].abs().max() < 1.5


def test_a_tone_is_in_its_band() -> None:
    """The middle of band b is (b + 1) / 41 of the way to the highest frequency, in mel."""
    for band in (5, 20, 39):
        mel = 2595 * math.log10(1 + 4000 / 700) * (band + 1) / (speech.BANDS + 1)
        frequency = 700 * (10 ** (mel / 2595) - 1)
        assert speech.spectrum(tone(frequency, frequency), 8000, 4000).argmax(1).unique().tolist() == [band]


def test_words_by_folder(recordings: Path, tmp_path: Path) -> None:
    """The layout of larger sets: a folder for each word, the speaker first in a file's name, and noise apart."""
    expected = speech.read_folder(recordings)
    root = tmp_path / "by word"
    for path in sorted(recordings.iterdir()):
        word, speaker, number = path.stem.split("_")
        (root / word).mkdir(parents=True, exist_ok=True)
        path.rename(root / word / f"{speaker}_nohash_{number}.WAV")
    (root / "_background_noise_").mkdir()
    (root / "_background_noise_" / "rain.wav").write_bytes(b"")
    (root / "LICENSE").write_text("free")
    found = speech.read_folder(root)
    assert (found.words, found.speakers) == (expected.words, expected.speakers)
    assert torch.equal(found.labels, expected.labels)
    assert all(map(torch.equal, found.frames, expected.frames))


def test_the_bands_of_the_digits_have_their_coefficients() -> None:
    """Their cosine transform, the orthogonal one of 128 bands, gives them back."""
    with np.load(speech.DIGITS) as data:
        coefficients = torch.from_numpy(data["mfcc"][:1000].astype(np.float64))
    orders = torch.arange(13)
    middles = (torch.arange(speech.BANDS) + 0.5) / speech.BANDS
    cosines = torch.cos(math.pi * orders.unsqueeze(1) * middles).double()
    bands = speech.from_cepstrum(coefficients.float()).double()
    scale = torch.tensor([math.sqrt(1 / 128)] + [math.sqrt(2 / 128)] * 12, dtype=torch.float64)
    found = bands @ cosines.T * scale * 128 / speech.BANDS
    torch.testing.assert_close(found, coefficients, rtol=1e-4, atol=1e-2)


SPOIL = {
    "is empty or cut short": lambda content: b"",
    "is no WAV file of whole numbers": lambda content: b"not sound" * 20,
    "is cut short: 1,200 samples by its header, fewer in the file": lambda content: content[:-100],
    "is too short: 383 samples, where 384 are needed": None,
    "has 3000 samples a second, where 4000 are needed": None,
}


@pytest.mark.parametrize("line", SPOIL)
def test_a_spoilt_recording_is_named(line: str, recordings: Path, call: SampleInput, tmp_path: Path) -> None:
    """In one line, with status 2; and nothing is written."""
    path = recordings / "up_bob_0.wav"
    if (spoil := SPOIL[line]) is not None:
        path.write_bytes(spoil(path.read_bytes()))
    elif "short" in line:
        write(path, tone(300, 300)[:383])
    else:
        write(path, tone(300, 300), rate=3000)
    refused(call, tmp_path, f"recordings/up_bob_0.wav {line}", "--data", "recordings")


def remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


@pytest.mark.parametrize(
    ("line", "change", "arguments"),
    [
        ("nowhere cannot be read: No such file or directory", None, ["--data", "nowhere"]),
        ("recordings holds no WAV files, neither WORD_SPEAKER", partial(remove, pattern="*"), []),
        (
            "recordings has recordings of one word alone, 'up': there is nothing to tell apart",
            partial(remove, pattern="[dh]*"),
            [],
        ),
        (
            "recordings has 9 recordings of 'up', where 10 are needed",
            lambda folder: [remove(folder, f"up_{name}_[3-7].wav") for name in ("ann", "bob", "cat")],
            [],
        ),
        (
            "recordings/up.wav is not named WORD_SPEAKER_NUMBER.wav, nor in a folder for its word",
            lambda folder: (folder / "up_ann_0.wav").rename(folder / "up.wav"),
            [],
        ),
        (
            "recordings/left holds no WAV files: there is nothing to learn 'left' from",
            lambda folder: [remove(folder, "*"), (folder / "left").mkdir()],
            [],
        ),
        ("no recording is by 'dan': --held-out-speaker is one of ann", None, ["--held-out-speaker", "dan"]),
        (
            "without 'bob' there are 8 recordings of 'up': too few",
            partial(remove, pattern="up_ann_*"),
            ["--held-out-speaker", "bob"],
        ),
        ("--dropout: Input should be less than 1 (got 1.5)", None, ["--dropout", "1.5"]),
    ],
)
def test_wrong_input_gives_one_line(
    line: str,
    change: Callable[[Path], object] | None,
    arguments: list[str],
    recordings: Path,
    call: SampleInput,
    tmp_path: Path,
) -> None:
    """And status 2, and no file."""
    if change is not None:
        change(recordings)
    refused(call, tmp_path, line, "--data", "recordings", *arguments)


def test_a_speaker_of_the_digits_cannot_be_held_out(call: SampleInput, tmp_path: Path) -> None:
    refused(call, tmp_path, "--held-out-speaker needs --data", "--held-out-speaker", "ann")


def refused(call: SampleInput, folder: Path, line: str, *arguments: object) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, output, error = call(*arguments)
    assert (status, output) == (2, "")
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# The network


def settings(**given: Any) -> speech.Settings:
    return speech.Settings(**{"width": 8, "depth": 2, "dropout": 0.0, **given})


def batch(strings: bool, lengths: tuple[int, ...] = (40, 25, 31)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    utterances = [
        (
            torch.cat([torch.randn(length, speech.BANDS), torch.ones(length, 1)], 1),
            torch.arange(number + 1 if strings else 1),
        )
        for number, length in enumerate(lengths)
    ]
    return speech.together(utterances, strings)


def loss_of(chosen: speech.Settings, words: int) -> torch.nn.Module:
    return speech.TranscriptLoss(chosen.layers, words) if chosen.ctc else chosen.layers.CrossEntropyLoss()


@pytest.mark.parametrize("strings", [False, True])
def test_every_gradient_is_ours(strings: bool) -> None:
    """And the numbers are torch's."""
    input, target = batch(strings)
    found: dict[str, list[Tensor | None]] = {}
    for model in ("manualgrad", "torch"):
        chosen = settings(model=model, ctc=strings)
        network = speech.build(chosen, 5).double()
        loss = loss_of(chosen, 5)(network(input.double()), target)
        assert bool(graph.torch_derivatives(loss)) == (model == "torch")
        loss.backward()
        weights = [weight.detach() for weight in network.parameters()]
        found[model] = [loss, *weights, *(weight.grad for weight in network.parameters())]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("strings", [False, True])
def test_the_padding_of_a_batch_changes_nothing(strings: bool) -> None:
    """An utterance is heard as it is alone; and the loss of a string is that of its own frames."""
    input, target = batch(strings)
    network = speech.build(settings(ctc=strings), 5).eval()
    together = network(input)
    for number, length in enumerate((40, 25, 31)):
        alone = network(input[number : number + 1, :length])[0]
        torch.testing.assert_close(together[number, :length] if strings else together[number], alone)
    if strings:
        found = speech.TranscriptLoss(settings().layers, 5)(together, target)
        lengths = torch.tensor([40, 25, 31]), torch.tensor([1, 2, 3])
        expected = ctc_loss(together.transpose(0, 1), target.clamp(min=0), *lengths, blank=5)
        torch.testing.assert_close(found, expected)


def test_what_a_ctc_network_has_heard() -> None:
    """Frames that repeat are one word, unless a blank, here 2, stands between them."""
    best = torch.tensor([[2, 0, 0, 2, 0, 1, 1], [2, 2, 2, 2, 2, 2, 2], [1, 0, 1, 1, 2, 2, 1]])
    prediction = torch.nn.functional.one_hot(best, 3).float().log()
    assert speech.heard(prediction) == [[(0, 1), (0, 4), (1, 5)], [], [(1, 0), (0, 1), (1, 2), (1, 6)]]


@pytest.mark.parametrize(
    ("said", "heard", "count"),
    [
        ([], [], 0),
        ([1, 2, 3], [1, 2, 3], 0),
        ([1, 2, 3], [], 3),
        ([1, 2, 3], [2, 3], 1),
        ([1, 2, 3], [1, 4, 3], 1),
        ([1, 2, 3], [3, 1, 2], 2),
        ([1, 2], [5, 1, 6, 2, 7], 3),
    ],
)
def test_mistakes_are_counted(said: list[int], heard: list[int], count: int) -> None:
    assert speech.mistakes(said, heard) == count


def test_a_stretch_of_time_and_one_of_frequency_are_hidden() -> None:
    torch.manual_seed(0)
    most = [0, 0]
    for _ in range(100):
        heard = speech.varied(torch.ones(40, speech.BANDS)) != 0
        times, bands = heard.any(1), heard.any(0)
        assert torch.equal(heard, times.unsqueeze(1) & bands)
        for axis, kept in enumerate((times, bands)):
            hidden = (~kept).nonzero().squeeze(1)
            assert len(hidden) == 0 or hidden[-1] - hidden[0] == len(hidden) - 1
            most[axis] = max(most[axis], round(100 * len(hidden) / len(kept)))
    assert 20 < most[0] <= 25
    assert most[1] == 15


def test_strings_are_drawn_anew_for_training_alone() -> None:
    digits = speech.spoken_digits()
    rows = torch.arange(100, 140)
    fixed = speech.Utterances(digits, rows, strings=True)
    fresh = speech.Utterances(digits, rows, strings=True, varied=True)
    torch.manual_seed(0)
    numbers = [fixed.numbers(index) for index in range(40)]
    assert numbers == [fixed.numbers(index) for index in range(40)]
    assert {len(each) for each in numbers} == set(range(1, speech.LONGEST_STRING + 1))
    drawn = [fresh.numbers(index) for index in range(40)]
    assert drawn != [fresh.numbers(index) for index in range(40)]
    for each in (numbers, drawn):
        assert [first for first, *_ in each] == rows.tolist()
        assert {number for string in each for number in string} <= set(rows.tolist())
    frames, labels = fixed[7]
    assert torch.equal(labels, digits.labels[numbers[7]])
    assert len(frames) == sum(len(digits.frames[number]) for number in numbers[7])
