"""scripts/train_speech.py: recordings, network, transcripts, output and files."""

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
ScriptCall = Callable[..., tuple[int, str, str]]
torch.set_num_threads(1)


@pytest.fixture
def call(call_script: Callable[..., tuple[int, str, str]]) -> ScriptCall:
    return partial(call_script, SCRIPT)


def write(path: Path, samples: Tensor, rate: int = 8000, width: int = 2, channels: int = 1) -> None:
    """Write a WAV file of samples from -1 to 1, with interleaved channels."""
    numbers = (samples.double() * (2**31 - 1)).round().to(torch.int32)
    content = numbers.view(torch.uint8).view(-1, 4)[:, 4 - width :]
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes((content ^ 128 if width == 1 else content).contiguous().numpy().tobytes())


def tone(begin: float, end: float, rate: int = 8000, seconds: float = 0.2) -> Tensor:
    """A sweep from one frequency to another."""
    times = torch.arange(round(seconds * rate)) / rate
    return 0.5 * torch.sin(2 * math.pi * (begin * times + (end - begin) * times.square() / (2 * seconds)))


WORDS = {"down": (2000.0, 400.0), "high": (2500.0, 2500.0), "up": (400.0, 2000.0)}


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Three words by three speakers of different pitch and speed."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    torch.manual_seed(0)
    for word, (begin, end) in WORDS.items():
        for speaker, pitch in (("ann", 1.1), ("bob", 0.9), ("cat", 1.0)):
            for number in range(8):
                sound = tone(begin * pitch, end * pitch, seconds=0.15 + 0.01 * number)
                write(folder / f"{word}_{speaker}_{number}.wav", sound + 0.01 * torch.randn(len(sound)))
    return folder


def tags(folder: Path, kind: str) -> set[str]:
    return set(EventAccumulator(str(folder)).Reload().Tags()[kind])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a run folder, except for speeds."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in names}


# A run


@pytest.mark.parametrize("model", ["manualgrad", "torch"])
def test_classifying_words(model: str, recordings: Path, call: ScriptCall, tmp_path: Path) -> None:
    """The network learns, the printed figures agree with the curves, and images and sounds are logged."""
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
    pages = {
        f"{page}/{part}" for page in ("confusion_matrix", "worst_transcripts") for part in ("validation", "test")
    }
    assert tags(folder, "images") == pages | {"words", "saved_bytes", "gradient_flow"}
    sounds = tags(folder, "audio")
    assert {f"words/{word}" for word in WORDS} <= sounds
    wrong = round(12 * (1 - float(found[1]) / 100))
    assert sum(tag.startswith("worst_transcripts_test/") for tag in sounds) == (
        wrong or 8
    )  # without an error, any


def test_transcribing_strings(recordings: Path, call: ScriptCall, tmp_path: Path) -> None:
    settings = [*SMALL, "--max-epochs", 20]
    status, output, error = call("--data", recordings, "--ctc", *settings, "--run-dir", "mine")
    assert (status, error) == (0, "")
    pattern = r"word error rate: test (\S+)% of \d+ words\nstrings without an error: (\S+)% of 12\n"
    found = re.match(pattern, output)
    assert found is not None
    assert float(found[1]) < 20
    curves = scalars(tmp_path / "mine")
    assert curves["summary/test_error_rate"][0][1] == pytest.approx(float(found[1]) / 100, abs=1e-4)
    assert curves["summary/test_string_accuracy"][0][1] == pytest.approx(float(found[2]) / 100, abs=1e-3)
    pages = {f"worst_transcripts/{part}_1" for part in ("validation", "test")}
    assert pages <= tags(tmp_path / "mine", "images")
    texts = {f"transcripts/{part}/text_summary" for part in ("validation", "test")}
    assert texts <= tags(tmp_path / "mine", "tensors")
    assert any(tag.startswith("worst_transcripts_test/1 true") for tag in tags(tmp_path / "mine", "audio"))


def test_included_digits(call: ScriptCall, tmp_path: Path) -> None:
    """One epoch learns something."""
    status, output, error = call("--max-epochs", 1, "--width", 32, "--depth", 2, "--run-dir", "mine")
    assert (status, error) == (0, "")
    found = re.match(r"accuracy: test (\S+)% of 600 recordings\n", output)
    assert found is not None
    assert float(found[1]) > 30  # guessing: 10
    assert tags(tmp_path / "mine", "audio") == set()  # the included data has no sounds


def test_held_out_speaker(recordings: Path, call: ScriptCall) -> None:
    """All recordings by the speaker are in the test split, and no others."""
    arguments = ["--data", recordings, *SMALL, "--max-epochs", 1, "--held-out-speaker", "bob"]
    status, output, error = call(*arguments)
    assert (status, error) == (0, "")
    assert "of 24 recordings by bob, who is not in the training data\n" in output

    every = speech.read_folder(recordings)
    parts = speech.split(every, "bob")
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 45, "validation": 3, "test": 24}
    assert {every.speakers[row] for row in parts["test"]} == {"bob"}
    assert {every.speakers[row] for name in ("train", "validation") for row in parts[name]} == {"ann", "cat"}


def test_every_recording_is_in_one_split(recordings: Path) -> None:
    every = speech.read_folder(recordings)
    parts = speech.split(every, None)
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(72))
    for name, size in (("train", 18), ("validation", 2), ("test", 4)):
        assert every.labels[parts[name]].bincount().tolist() == [size] * 3


def test_run_resumes(recordings: Path, call: ScriptCall, tmp_path: Path) -> None:
    """The curves are those of an uninterrupted run, and each image is logged once."""
    arguments = ["--data", recordings, "--ctc", *SMALL, "--max-epochs", 4, "--keep-last", 10]
    _, uninterrupted, _ = call(*arguments, "--run-dir", "whole")
    call(*arguments, "--run-dir", "mine")
    checkpoints = list_checkpoints(tmp_path / "mine")
    assert len(checkpoints) == 5  # before the first epoch, and after each
    for path in checkpoints:
        if load(path)["trainer_state"]["epoch"] > 2:
            path.unlink()
    status, output, error = call(*arguments, "--run-dir", "mine", "--resume-from-checkpoint")
    assert (status, error) == (0, "")
    assert output.splitlines()[:2] == uninterrupted.splitlines()[:2]
    assert scalars(tmp_path / "mine") == scalars(tmp_path / "whole")
    events = EventAccumulator(str(tmp_path / "mine")).Reload()
    for tag, times in (("words", 1), ("worst_transcripts/validation_1", 4), ("worst_transcripts/test_1", 1)):
        assert len(events.Images(tag)) == times


def test_settings_from_a_file(recordings: Path, call: ScriptCall, tmp_path: Path) -> None:
    arguments = ["--data", recordings, "--held-out-speaker", "cat", *SMALL, "--max-epochs", 1, "--run-dir", "one"]
    _, one, _ = call(*arguments)
    status, other, error = call("--settings", "one/settings.json", "--run-dir", "other")
    assert (status, error) == (0, "")
    assert other.splitlines()[0] == one.splitlines()[0]
    assert scalars(tmp_path / "other") == scalars(tmp_path / "one")


# Recordings


def test_sample_widths_and_channels(tmp_path: Path) -> None:
    sound = tone(300, 700)
    for width, error in ((1, 2**-7), (2, 2**-15), (3, 2**-23), (4, 2**-23)):
        write(tmp_path / "mono.wav", sound, width=width)
        samples, rate = speech.read_wav(tmp_path / "mono.wav")
        assert rate == 8000
        torch.testing.assert_close(samples, sound, rtol=0, atol=error)
    sides = torch.stack([sound + 0.3, sound - 0.3], 1).reshape(-1)
    write(tmp_path / "stereo.wav", sides, width=3, channels=2)
    torch.testing.assert_close(speech.read_wav(tmp_path / "stereo.wav")[0], sound, rtol=0, atol=2**-22)


@pytest.mark.parametrize("rate", [11025, 16000, 44100, 48000])
def test_spectrogram_does_not_depend_on_the_sample_rate(rate: int) -> None:
    """Up to the common frequencies. Higher ones cause no aliasing."""
    expected = speech.mel_spectrogram(tone(300, 3000, 8000), 8000, 4000)
    sound = tone(300, 3000, rate)
    found = speech.mel_spectrogram(sound, rate, 4000)
    loud = expected > expected.max() - 40
    assert found.shape == expected.shape
    assert (found - expected)[loud].abs().max() < 1.5
    with_more = speech.mel_spectrogram(sound + tone(5000, 5000, rate), rate, 4000)
    assert (with_more - found)[loud].abs().max() < 1.5


def test_tone_is_in_its_band() -> None:
    """The center of band b is (b + 1) / 41 of the highest frequency, in mel."""
    for band in (5, 20, 39):
        mel = 2595 * math.log10(1 + 4000 / 700) * (band + 1) / (speech.MEL_BANDS + 1)
        frequency = 700 * (10 ** (mel / 2595) - 1)
        assert speech.mel_spectrogram(tone(frequency, frequency), 8000, 4000).argmax(1).unique().tolist() == [band]


def test_folder_for_each_word(recordings: Path, tmp_path: Path) -> None:
    """The speaker comes first in the file name. Folders that begin with "_" are ignored."""
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


def test_mfcc_to_mel_is_inverted_by_the_cosine_transform() -> None:
    """The orthonormal one of 128 bands."""
    with np.load(speech.DIGITS) as data:
        coefficients = torch.from_numpy(data["mfcc"][:1000].astype(np.float64))
    orders = torch.arange(13)
    middles = (torch.arange(speech.MEL_BANDS) + 0.5) / speech.MEL_BANDS
    cosines = torch.cos(math.pi * orders.unsqueeze(1) * middles).double()
    bands = speech.mfcc_to_mel(coefficients.float()).double()
    scale = torch.tensor([math.sqrt(1 / 128)] + [math.sqrt(2 / 128)] * 12, dtype=torch.float64)
    found = bands @ cosines.T * scale * 128 / speech.MEL_BANDS
    torch.testing.assert_close(found, coefficients, rtol=1e-4, atol=1e-2)


BREAK = {
    "is empty or truncated": lambda content: b"",
    "is not a WAV file of integers": lambda content: b"not sound" * 20,
    "is truncated: it has fewer than the 1,200 samples of its header": lambda content: content[:-100],
    "has 383 samples, at least 384 are needed": None,
    "has a sample rate of 3000, at least 4000 is needed": None,
}


@pytest.mark.parametrize("line", BREAK)
def test_broken_recording_is_named(line: str, recordings: Path, call: ScriptCall, tmp_path: Path) -> None:
    """Exit status 2, and no file is written."""
    path = recordings / "up_bob_0.wav"
    if (break_content := BREAK[line]) is not None:
        path.write_bytes(break_content(path.read_bytes()))
    elif "383" in line:
        write(path, tone(300, 300)[:383])
    else:
        write(path, tone(300, 300), rate=3000)
    assert_fails(call, tmp_path, f"recordings/up_bob_0.wav {line}", "--data", "recordings")


def remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


@pytest.mark.parametrize(
    ("line", "change", "arguments"),
    [
        ("nowhere cannot be read: No such file or directory", None, ["--data", "nowhere"]),
        ("recordings has no WAV files, neither WORD_SPEAKER", partial(remove, pattern="*"), []),
        (
            "recordings has recordings of a single word, 'up'",
            partial(remove, pattern="[dh]*"),
            [],
        ),
        (
            "recordings has 9 recordings of 'up', at least 10 are needed",
            lambda folder: [remove(folder, f"up_{name}_[3-7].wav") for name in ("ann", "bob", "cat")],
            [],
        ),
        (
            "recordings/up.wav is not named WORD_SPEAKER_NUMBER.wav, and not in a folder of its word",
            lambda folder: (folder / "up_ann_0.wav").rename(folder / "up.wav"),
            [],
        ),
        (
            "recordings/left has no WAV files",
            lambda folder: [remove(folder, "*"), (folder / "left").mkdir()],
            [],
        ),
        ("no recording is by 'dan': choose --held-out-speaker from ann", None, ["--held-out-speaker", "dan"]),
        (
            "without 'bob' there are 8 recordings of 'up', at least 10 are needed",
            partial(remove, pattern="up_ann_*"),
            ["--held-out-speaker", "bob"],
        ),
        ("--dropout: Input should be less than 1 (got 1.5)", None, ["--dropout", "1.5"]),
    ],
)
def test_wrong_input_gives_one_error_line(
    line: str,
    change: Callable[[Path], object] | None,
    arguments: list[str],
    recordings: Path,
    call: ScriptCall,
    tmp_path: Path,
) -> None:
    """Exit status 2, and no file is written."""
    if change is not None:
        change(recordings)
    assert_fails(call, tmp_path, line, "--data", "recordings", *arguments)


def test_included_digits_have_no_speakers(call: ScriptCall, tmp_path: Path) -> None:
    assert_fails(call, tmp_path, "--held-out-speaker needs --data", "--held-out-speaker", "ann")


def assert_fails(call: ScriptCall, folder: Path, line: str, *arguments: object) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, output, error = call(*arguments)
    assert (status, output) == (2, "")
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# The network


def settings(**changes: Any) -> speech.Settings:
    return speech.Settings(**{"width": 8, "depth": 2, "dropout": 0.0, **changes})


def batch(strings: bool, lengths: tuple[int, ...] = (40, 25, 31)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    utterances = [
        (
            torch.cat([torch.randn(length, speech.MEL_BANDS), torch.ones(length, 1)], 1),
            torch.arange(number + 1 if strings else 1),
        )
        for number, length in enumerate(lengths)
    ]
    return speech.collate(utterances, strings)


def make_loss(chosen: speech.Settings, words: int) -> torch.nn.Module:
    return speech.CTCLoss(chosen.layers, words) if chosen.ctc else chosen.layers.CrossEntropyLoss()


@pytest.mark.parametrize("strings", [False, True])
def test_every_gradient_is_manual(strings: bool) -> None:
    """And equals torch's."""
    input, target = batch(strings)
    results: dict[str, list[Tensor | None]] = {}
    for model in ("manualgrad", "torch"):
        chosen = settings(model=model, ctc=strings)
        network = speech.build_model(chosen, 5).double()
        loss = make_loss(chosen, 5)(network(input.double()), target)
        assert bool(graph.torch_derivatives(loss)) == (model == "torch")
        loss.backward()
        weights = [weight.detach() for weight in network.parameters()]
        results[model] = [loss, *weights, *(weight.grad for weight in network.parameters())]
    for manual, reference in zip(*results.values(), strict=True):
        torch.testing.assert_close(manual, reference, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("strings", [False, True])
def test_padding_has_no_effect(strings: bool) -> None:
    """On the prediction of an utterance, and on the CTC loss of a string."""
    input, target = batch(strings)
    network = speech.build_model(settings(ctc=strings), 5).eval()
    batched = network(input)
    for number, length in enumerate((40, 25, 31)):
        single = network(input[number : number + 1, :length])[0]
        torch.testing.assert_close(batched[number, :length] if strings else batched[number], single)
    if strings:
        found = speech.CTCLoss(settings().layers, 5)(batched, target)
        lengths = torch.tensor([40, 25, 31]), torch.tensor([1, 2, 3])
        expected = ctc_loss(batched.transpose(0, 1), target.clamp(min=0), *lengths, blank=5)
        torch.testing.assert_close(found, expected)


def test_decode_ctc() -> None:
    """Equal labels are one word unless a blank, here 2, is between them."""
    best = torch.tensor([[2, 0, 0, 2, 0, 1, 1], [2, 2, 2, 2, 2, 2, 2], [1, 0, 1, 1, 2, 2, 1]])
    prediction = torch.nn.functional.one_hot(best, 3).float().log()
    assert speech.decode(prediction) == [[(0, 1), (0, 4), (1, 5)], [], [(1, 0), (0, 1), (1, 2), (1, 6)]]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "count"),
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
def test_edit_distance(reference: list[int], hypothesis: list[int], count: int) -> None:
    assert speech.edit_distance(reference, hypothesis) == count


def test_augment_masks_time_and_frequency() -> None:
    torch.manual_seed(0)
    largest = [0, 0]
    for _ in range(100):
        visible = speech.augment(torch.ones(40, speech.MEL_BANDS)) != 0
        times, bands = visible.any(1), visible.any(0)
        assert torch.equal(visible, times.unsqueeze(1) & bands)
        for axis, kept in enumerate((times, bands)):
            masked = (~kept).nonzero().squeeze(1)
            assert len(masked) == 0 or masked[-1] - masked[0] == len(masked) - 1
            largest[axis] = max(largest[axis], round(100 * len(masked) / len(kept)))
    assert 20 < largest[0] <= 25
    assert largest[1] == 15


def test_only_training_strings_are_drawn_again() -> None:
    digits = speech.included_digits()
    rows = torch.arange(100, 140)
    fixed = speech.Utterances(digits, rows, strings=True)
    random = speech.Utterances(digits, rows, strings=True, augmented=True)
    torch.manual_seed(0)
    fixed_indices = [fixed.recording_indices(index) for index in range(40)]
    assert fixed_indices == [fixed.recording_indices(index) for index in range(40)]
    assert {len(string) for string in fixed_indices} == set(range(1, speech.MAX_STRING_LENGTH + 1))
    random_indices = [random.recording_indices(index) for index in range(40)]
    assert random_indices != [random.recording_indices(index) for index in range(40)]
    for indices in (fixed_indices, random_indices):
        assert [first for first, *_ in indices] == rows.tolist()
        assert {number for string in indices for number in string} <= set(rows.tolist())
    frames, labels = fixed[7]
    assert torch.equal(labels, digits.labels[fixed_indices[7]])
    assert len(frames) == sum(len(digits.frames[number]) for number in fixed_indices[7])
