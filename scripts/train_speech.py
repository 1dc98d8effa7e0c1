"""Classify spoken words, or transcribe strings of them, with hand-written gradients.

    python scripts/train_speech.py                                  3,000 recordings of digits (included)
    python scripts/train_speech.py --ctc                            transcribe strings of digits with CTC
    python scripts/train_speech.py --data DIR                       your own recordings of any words
    python scripts/train_speech.py --data DIR --held-out-speaker NAME   test on a speaker not in the training data
    python scripts/train_speech.py --model torch                    the same network in plain torch.nn

The curves, spectrograms, sounds and final figures go to a folder under runs/:  tensorboard --logdir runs
"""

import math
import wave
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from manualgrad.meter import add_pil_image
from manualgrad.training import DataError, FitResult, TaskSettings, TensorBoardLogger, Trainer, parse_settings, run
from manualgrad.training.pictures import confusion_counts, confusion_matrix, grid

DIGITS = Path(__file__).parent / "data" / "spoken_digits.npz"
MEL_BANDS = 40
WINDOW_SECONDS, HOP_SECONDS = 0.032, 0.016
MAX_MASKED_BANDS, MAX_MASKED_TIME = 6, 0.25
"""The most bands, and the largest share of the frames, that augmentation masks."""
DYNAMIC_RANGE = 45
"""Decibels below the loudest point of a recording that are kept."""
MIN_SAMPLE_RATE = 4000
MIN_RECORDINGS = 10
"""Of each word."""
MAX_STRING_LENGTH = 6
PADDING_LABEL = -1


class Settings(TaskSettings):
    """Classify spoken words. By default: the digits in 3,000 recordings by six speakers."""

    data: Path | None = None
    """A folder of WAV files named WORD_SPEAKER_NUMBER.wav, or a folder for each word with SPEAKER_ANYTHING.wav; by
    default the included digits."""
    held_out_speaker: str | None = None
    """Test on this speaker and train on all others."""
    ctc: bool = False
    """Transcribe strings of randomly joined recordings with CTC, instead of classifying single ones."""
    width: PositiveInt = 96
    """Channels of each convolution."""
    depth: PositiveInt = 4
    """The number of convolutions over time."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """The dropout probability after each convolution."""
    batch_size: PositiveInt = 64
    """Recordings, or strings of them, per batch."""
    max_epochs: PositiveInt = 30
    """How many times to go through the training data."""
    task: ClassVar[str] = "speech"

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.held_out_speaker is not None and self.data is None:
            raise ValueError("--held-out-speaker needs --data: the included recordings do not name their speakers")
        return self


# The recordings


class Recordings(NamedTuple):
    """Spectrograms of spoken words."""

    frames: list[Tensor]
    """For each recording (frames, bands): decibels in each mel band, low frequencies first."""
    labels: Tensor
    """(recordings,), indices of words."""
    words: list[str]
    speakers: list[str]
    """Of each recording; empty if unknown."""
    paths: list[Path]
    """The WAV file of each recording; empty if there is none."""


def included_digits() -> Recordings:
    """The recordings in scripts/data."""
    with np.load(DIGITS) as data:
        bands = mfcc_to_mel(torch.from_numpy(data["mfcc"].astype(np.float32)))
        lengths, digits = data["frames"].tolist(), torch.from_numpy(data["digit"].astype(np.int64))
    return Recordings([clip_quiet(frames) for frames in bands.split(lengths)], digits, [*"0123456789"], [], [])


def mfcc_to_mel(coefficients: Tensor) -> Tensor:
    """The spectrogram, (frames, MEL_BANDS), of mel-frequency cepstral coefficients.

    They are the first coefficients of an orthonormal cosine transform of 128 bands, so the result is smooth.
    """
    orders, middles = torch.arange(coefficients.shape[1]), (torch.arange(MEL_BANDS) + 0.5) / MEL_BANDS
    cosines = torch.cos(math.pi * orders.unsqueeze(1) * middles) * math.sqrt(2 / 128)
    cosines[0] /= math.sqrt(2)
    return coefficients @ cosines


def clip_quiet(decibels: Tensor) -> Tensor:
    """Clip what is far below the loudest point. It depends on room and microphone, not on the word."""
    return decibels.clamp(min=decibels.max() - DYNAMIC_RANGE)


def read_folder(folder: Path) -> Recordings:
    """Read the recordings in a folder. Words and speakers are in the names.

    Raises:
        DataError: if there are no recordings or too few of a word, or a file cannot be used.
    """
    files = _named_files(folder)
    counts = Counter(word for word, _, _ in files)
    words = sorted(counts)
    if len(words) < 2:
        raise DataError(f"{folder} has recordings of a single word, {words[0]!r}")
    for word in words:
        if counts[word] < MIN_RECORDINGS:
            number = f"{counts[word]} recording{'s' * (counts[word] > 1)}"
            raise DataError(f"{folder} has {number} of {word!r}, at least {MIN_RECORDINGS} are needed")
    rates = [_check_wav(path) for _, _, path in files]
    max_frequency = min(rates) / 2  # all recordings have it
    frames = [
        clip_quiet(mel_spectrogram(*read_wav(path), max_frequency))
        for _, _, path in tqdm(files, "reading", disable=None)
    ]
    labels = torch.tensor([words.index(word) for word, _, _ in files])
    return Recordings(frames, labels, words, [speaker for _, speaker, _ in files], [path for *_, path in files])


def _named_files(folder: Path) -> list[tuple[str, str, Path]]:
    """Word, speaker and path of every recording."""
    try:
        # without folders such as _background_noise_
        entries = sorted(path for path in folder.iterdir() if path.name[0] not in "._")
        wav_files = {path: sorted(filter(_is_wav, path.iterdir())) for path in entries if path.is_dir()}
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from None
    named: list[tuple[str, str, Path]] = []
    for path in entries:
        if _is_wav(path):
            match path.stem.split("_"):
                case [word, speaker, _] if word and speaker:
                    named.append((word, speaker, path))
                case _:
                    raise DataError(
                        f"{path} is not named WORD_SPEAKER_NUMBER.wav, and not in a folder of its word"
                    )
    if named:
        return named
    for path, files in wav_files.items():
        if not files:
            raise DataError(f"{path} has no WAV files")
        named += [(path.name, file.stem.partition("_")[0], file) for file in files]
    if not named:
        raise DataError(f"{folder} has no WAV files, neither WORD_SPEAKER_NUMBER.wav nor in folders of words")
    return named


def _is_wav(path: Path) -> bool:
    return path.suffix.lower() == ".wav"


def _open_wav(path: Path) -> wave.Wave_read:
    try:
        return wave.open(str(path))
    except EOFError:
        raise DataError(f"{path} is empty or truncated") from None
    except wave.Error as error:
        raise DataError(f"{path} is not a WAV file of integers: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _check_wav(path: Path) -> int:
    """Check the header of a recording. Return its sample rate."""
    with _open_wav(path) as file:
        rate, samples = file.getframerate(), file.getnframes()
        width = file.getsampwidth()
    if width > 4:
        raise DataError(f"{path} has samples of {8 * width} bits, only 8, 16, 24 and 32 are supported")
    if rate < MIN_SAMPLE_RATE:
        raise DataError(f"{path} has a sample rate of {rate}, at least {MIN_SAMPLE_RATE} is needed")
    needed = round(WINDOW_SECONDS * rate) + round(
        HOP_SECONDS * rate
    )  # two frames: CTC needs as many for a repeated word
    if samples < needed:
        raise DataError(f"{path} has {samples} samples, at least {needed} are needed")
    return rate


def read_wav(path: Path) -> tuple[Tensor, int]:
    """The samples of a WAV file, from -1 to 1 (the mean of several channels), and the sample rate.

    Raises:
        DataError: if the file cannot be read, is truncated, or is not a WAV file of integers.
    """
    with _open_wav(path) as file:
        channels, width, rate, samples, *_ = file.getparams()
        content = bytearray(file.readframes(samples))
    if not content or len(content) < samples * channels * width:
        raise DataError(f"{path} is truncated: it has fewer than the {samples:,} samples of its header")
    numbers = torch.frombuffer(content, dtype=torch.uint8).view(-1, width)
    if width == 1:
        numbers = numbers ^ 128  # 8-bit samples are unsigned
    numbers = pad(numbers, (4 - width, 0)).view(torch.int32)  # little-endian
    return (numbers.view(-1, channels).double() / 2**31).mean(1).float(), rate


def mel_spectrogram(samples: Tensor, rate: int, max_frequency: float) -> Tensor:
    """The log mel spectrogram of a sound in decibels, (frames, MEL_BANDS).

    Frames and bands are defined in seconds and hertz, so recordings of different sample rates need no resampling.

    Args:
        samples: (samples,), at least one frame.
        rate: the sample rate.
        max_frequency: the end of the highest band in hertz, at most half the sample rate.
    """
    size, hop = round(WINDOW_SECONDS * rate), round(HOP_SECONDS * rate)
    frames = samples.unfold(0, size, hop) * torch.hann_window(size)
    power = torch.fft.rfft(frames, 2 * size).abs().square() / size**2
    return 10 * (power @ mel_bands(rate, 2 * size, max_frequency)).clamp(min=1e-10).log10()


def mel_bands(rate: int, size: int, max_frequency: float) -> Tensor:
    """The mel filter bank for a Fourier transform of `size` samples: (size // 2 + 1, MEL_BANDS).

    Each band is a triangle from the center of the band below to that of the band above. Centers are equidistant in
    mel.
    """
    mels = torch.linspace(0, 2595 * math.log10(1 + max_frequency / 700), MEL_BANDS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    frequencies = (torch.arange(size // 2 + 1) * rate / size).unsqueeze(1)
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def split(recordings: Recordings, held_out: str | None) -> dict[str, Tensor]:
    """The indices of the recordings in "train", "validation" and "test": 70, 10 and 20 % of each word.

    With a held-out speaker, all recordings by this speaker are in "test", and 90 and 10 % of the others in "train"
    and "validation".

    Raises:
        DataError: if there is no such speaker, or the others have too few recordings of a word.
    """
    numbers = torch.arange(len(recordings.labels))
    test = torch.zeros(len(numbers), dtype=torch.bool)
    if held_out is not None:
        test = torch.tensor([speaker == held_out for speaker in recordings.speakers])
        if not test.any():
            names = sorted(set(recordings.speakers))
            shown = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            raise DataError(f"no recording is by {held_out!r}: choose --held-out-speaker from {shown}")
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": [numbers[test]]}
    # The split depends only on the recordings, so that all seeds and models have the same test recordings.
    generator = torch.Generator().manual_seed(0)
    for label, word in enumerate(recordings.words):
        rows = numbers[(recordings.labels == label) & ~test]
        if len(rows) < MIN_RECORDINGS:
            raise DataError(
                f"without {held_out!r} there are {len(rows)} recordings of {word!r}, "
                f"at least {MIN_RECORDINGS} are needed"
            )
        rows = rows[torch.randperm(len(rows), generator=generator)]
        tested = 0 if held_out else len(rows) // 5
        parts["test"].append(rows[:tested])
        parts["validation"].append(rows[tested : tested + len(rows) // 10])
        parts["train"].append(rows[tested + len(rows) // 10 :])
    return {name: torch.cat(rows).sort().values for name, rows in parts.items()}


class Utterances(Dataset[tuple[Tensor, Tensor]]):
    """Recordings, or strings of them. A string begins with a recording and continues with random ones.

    An utterance is (frames, MEL_BANDS + 1) and its labels. The last column is 1. Padding has 0 there.

    Args:
        recordings: all recordings.
        rows: the indices of those to use.
        strings: whether to join them, up to MAX_STRING_LENGTH.
        augmented: whether to augment recordings and to draw other strings each time, for training.
    """

    def __init__(self, recordings: Recordings, rows: Tensor, strings: bool, augmented: bool = False) -> None:
        self.recordings, self.rows, self.strings, self.augmented = recordings, rows.tolist(), strings, augmented

    def __len__(self) -> int:
        return len(self.rows)

    def recording_indices(self, index: int) -> list[int]:
        """The indices of the recordings of an utterance."""
        if not self.strings:
            return [self.rows[index]]
        generator = None if self.augmented else torch.Generator().manual_seed(index)
        others = int(torch.randint(MAX_STRING_LENGTH, (), generator=generator))
        drawn = torch.randint(len(self), (others,), generator=generator).tolist()
        return [self.rows[i] for i in (index, *drawn)]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        indices = self.recording_indices(index)
        frames = [self._frames(i) for i in indices]
        return torch.cat(frames), self.recordings.labels[indices]

    def _frames(self, index: int) -> Tensor:
        frames = self.recordings.frames[index]
        frames = (frames - frames.mean(0)) / 10  # without the mean spectrum of microphone and voice
        return pad(augment(frames) if self.augmented else frames, (0, 1), value=1.0)


def augment(frames: Tensor) -> Tensor:
    """Stretch time and frequency at random, and mask a range of each (SpecAugment: Park et al., 2019)."""
    time_stretch, frequency_stretch = torch.rand(2).mul(2).sub(1).tolist()
    length = max(2, round(len(frames) * math.exp(0.35 * time_stretch)))
    scale = math.exp(0.2 * frequency_stretch)
    positions = affine_grid(torch.tensor([[[scale, 0, scale - 1], [0, 1, 0]]]), [1, 1, length, MEL_BANDS], False)
    frames = grid_sample(frames[None, None], positions, padding_mode="border", align_corners=False)[0, 0]
    for axis, max_width in enumerate((int(MAX_MASKED_TIME * length), MAX_MASKED_BANDS)):
        width = int(torch.randint(max_width + 1, ()))
        start = int(torch.randint(frames.shape[axis] - width + 1, ()))
        frames.narrow(axis, start, width).zero_()  # 0 is the mean of the recording
    return frames


def collate(utterances: Sequence[tuple[Tensor, Tensor]], strings: bool) -> tuple[Tensor, Tensor]:
    """A padded batch: (utterances, frames, MEL_BANDS + 1), and labels (utterances,) or (strings, labels)."""
    frames, labels = zip(*utterances, strict=True)
    targets = pad_sequence(list(labels), batch_first=True, padding_value=PADDING_LABEL)
    return pad_sequence(list(frames), batch_first=True), targets if strings else targets.squeeze(1)


# The network and its losses


class ConvBlock(torch.nn.Module):
    """Conv1d over time, LayerNorm, GELU and Dropout, with a residual connection if the width is the same."""

    def __init__(self, layers: Any, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.conv = layers.Conv1d(inputs, outputs, kernel_size=5, padding=2)
        self.norm = layers.LayerNorm(outputs)
        self.gelu = layers.GELU()
        self.dropout = layers.Dropout(dropout)
        self.residual = inputs == outputs

    def forward(self, input: Tensor, mask: Tensor) -> Tensor:
        """input: (utterances, frames, channels), mask: (utterances, frames, 1), 0 in the padding.

        The padding stays zero, so that the output does not depend on the length of other utterances.
        """
        output = self.dropout(self.gelu(self.norm(self.conv(input.mT).mT))) * mask
        return input + output if self.residual else output


class Network(torch.nn.Module):
    """Convolutions over time. Returns logits of the words, from the mean over frames.

    With ``settings.ctc``, returns log-probabilities of the words and the blank (last) for each frame.
    """

    padding_output: Tensor

    def __init__(self, settings: Settings, words: int) -> None:
        super().__init__()
        layers, widths = settings.layers, [MEL_BANDS + 1] + [settings.width] * settings.depth
        self.convolutions = torch.nn.ModuleList(
            ConvBlock(layers, inputs, settings.width, settings.dropout) for inputs in widths[:-1]
        )
        self.ctc = settings.ctc
        self.output = layers.Linear(settings.width, words + self.ctc)
        if self.ctc:
            self.log_softmax = layers.LogSoftmax(-1)
            # The padding is certainly blank, so that it does not change the loss.
            self.register_buffer("padding_output", torch.tensor([-1e4] * words + [0.0]), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        mask, hidden = input[..., -1:], input
        for convolution in self.convolutions:
            hidden = convolution(hidden, mask)
        if not self.ctc:
            return self.output(hidden.sum(1) / mask.sum(1))
        return self.log_softmax(self.output(hidden) * mask + self.padding_output * (1 - mask))


class CTCLoss(torch.nn.Module):
    """The CTC loss."""

    def __init__(self, layers: Any, words: int) -> None:
        super().__init__()
        self.ctc = layers.CTCLoss(blank=words)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """prediction: (strings, frames, words + 1), target: (strings, labels)."""
        frames = torch.full((len(prediction),), prediction.shape[1])
        labels = (target != PADDING_LABEL).sum(1)
        return self.ctc(prediction.transpose(0, 1), target.clamp(min=0), frames, labels)


def build_model(settings: Settings, words: int) -> Network:
    """Build the network. The seed determines the initial weights."""
    torch.manual_seed(settings.seed)
    return Network(settings, words)


# Transcripts


def decode(prediction: Tensor) -> list[list[tuple[int, int]]]:
    """The most likely labels of each utterance, with the frame in which each begins.

    Args:
        prediction: (utterances, words), or with CTC (utterances, frames, words + 1). There, equal labels without a
            blank between them are one word.
    """
    if prediction.dim() == 2:
        return [[(label, 0)] for label in prediction.argmax(-1).tolist()]
    blank = prediction.shape[-1] - 1
    best = prediction.argmax(-1)
    begins = (best != pad(best, (1, 0), value=blank)[:, :-1]) & (best != blank)
    return [
        [(label, frame) for frame, (label, begun) in enumerate(zip(*pair, strict=True)) if begun]
        for pair in zip(best.tolist(), begins.tolist(), strict=True)
    ]


def edit_distance(reference: Sequence[int], hypothesis: Sequence[int]) -> int:
    """The fewest insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(hypothesis, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


class Transcript(NamedTuple):
    """The labels of an utterance and their prediction."""

    index: int
    reference: list[int]
    hypothesis: list[tuple[int, int]]
    """Predicted labels, and the frames in which they begin."""

    @property
    def predicted(self) -> list[int]:
        return [label for label, _ in self.hypothesis]

    @property
    def errors(self) -> int:
        return edit_distance(self.reference, self.predicted)


def make_transcripts(prediction: Tensor, target: Tensor) -> list[Transcript]:
    """The transcripts of a batch."""
    references = [[x for x in row if x != PADDING_LABEL] for row in target.view(len(target), -1).tolist()]
    return [Transcript(i, *pair) for i, pair in enumerate(zip(references, decode(prediction), strict=True))]


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """The share of correct predictions."""
    return (prediction.argmax(1) == target).float().mean()


def error_rate(prediction: Tensor, target: Tensor) -> Tensor:
    """Errors per word, the mean over strings."""
    transcripts = make_transcripts(prediction, target)
    return torch.tensor([x.errors / len(x.reference) for x in transcripts]).mean()


@torch.no_grad
def transcribe(model: torch.nn.Module, loader: DataLoader[Any], device: torch.device) -> list[Transcript]:
    """The transcripts of all utterances of a loader, in order."""
    transcripts: list[Transcript] = []
    for input, target in loader:
        transcripts += make_transcripts(model(input.to(device)).cpu(), target)
    return [x._replace(index=index) for index, x in enumerate(transcripts)]


def evaluate(transcripts: Sequence[Transcript], strings: bool) -> dict[str, float]:
    """The final test figures."""
    correct = sum(x.errors == 0 for x in transcripts) / len(transcripts)
    if not strings:
        return {"test_accuracy": correct}
    errors, words = sum(x.errors for x in transcripts), sum(len(x.reference) for x in transcripts)
    return {"test_error_rate": errors / words, "test_string_accuracy": correct}


# TensorBoard


def draw_spectrogram(frames: Tensor, words: Sequence[tuple[int, str]] = ()) -> Image.Image:
    """A spectrogram: loud is dark, low frequencies are at the bottom. `words` are drawn at their frames."""
    quiet = (frames.max() - frames) / (frames.max() - frames.min()).clamp(min=1e-6)
    pixels = (quiet * 255).to(torch.uint8).T.flip(0).repeat_interleave(4, 0).repeat_interleave(4, 1)
    image = Image.new("L", (pixels.shape[1], pixels.shape[0] + 34 * bool(words)), "white")
    image.paste(Image.fromarray(pixels.numpy()), (0, 0))
    draw, font, end = ImageDraw.Draw(image), ImageFont.load_default(26), 0.0
    for frame, word in words:
        start = max(4 * frame, end)  # words must not overlap
        draw.text((start, image.height - 4), word, "black", font, "ls")
        end = start + font.getlength(word) + 4
    return image


def image_grid(images: Sequence[Image.Image], captions: Sequence[str], width: int = 0) -> Image.Image:
    """A grid of images of different sizes, each padded to the largest, or to `width` if that is larger."""
    width, height = max(width, *(x.width for x in images)), max(x.height for x in images)
    canvas = torch.full((len(images), height, width), 255, dtype=torch.uint8)
    for cell, image in zip(canvas, images, strict=True):
        cell[: image.height, : image.width] = torch.from_numpy(np.array(image))
    return grid(canvas, captions)


class TranscriptLogger:
    """Logs spectrograms, sounds and transcripts of recordings."""

    def __init__(self, recordings: Recordings, strings: bool) -> None:
        self.recordings, self.strings = recordings, strings

    def log_words(self, log: TensorBoardLogger, step: int, utterances: Utterances) -> None:
        """Log a recording of each word."""
        labels = self.recordings.labels[utterances.rows]
        rows = [utterances.rows[int((labels == label).int().argmax())] for label in labels.unique()]
        names = [self._to_text([int(self.recordings.labels[row])]) for row in rows]
        images = image_grid([draw_spectrogram(self.recordings.frames[row]) for row in rows], names)
        log.add(step, lambda writer: add_pil_image(writer, "words", images, step))
        for row, name in zip(rows, names, strict=True):
            self._log_sound(log, step, f"words/{name}", [row])

    def log_transcripts(
        self,
        log: TensorBoardLogger,
        step: int,
        name: str,
        utterances: Utterances,
        transcripts: Sequence[Transcript],
        sounds: bool = False,
    ) -> None:
        """Log all transcripts or their confusion matrix, and the worst ones, optionally with sounds."""
        wrong = [x for x in transcripts if x.errors] or transcripts
        worst = sorted(wrong, key=lambda x: -x.errors)[: 4 if self.strings else 16]
        captions = ["true {}\npredicted {}".format(*self._texts(x)) for x in worst]
        images = [self._draw(utterances, x) for x in worst]
        size = 1 if self.strings else len(worst)  # a string is as wide as a page
        widest = max(x.width for x in images)  # TensorBoard scales each image to the same width
        for start in range(0, len(worst), size):
            page = image_grid(images[start : start + size], captions[start : start + size], widest)
            tag = f"worst_transcripts/{name}" + f"_{start + 1}" * self.strings
            log.add(step, partial(add_pil_image, tag=tag, image=page, step=step))
        if self.strings:
            rows = [f"| {' | '.join(self._texts(x))} | {x.errors or ''} |" for x in transcripts[:40]]
            table = "\n".join(["| true | predicted | errors |", "|---|---|---:|", *rows])
            log.add(step, lambda writer: writer.add_text(f"transcripts/{name}", table, step))
        else:
            matrix = confusion_matrix(count_confusions(transcripts, self.recordings.words), self.recordings.words)
            log.add(step, lambda writer: add_pil_image(writer, f"confusion_matrix/{name}", matrix, step))
        for number, x in enumerate(worst[:8] if sounds else [], start=1):
            tag = "worst_transcripts_{}/{} true {}, predicted {}".format(name, number, *self._texts(x))
            self._log_sound(log, step, tag, utterances.recording_indices(x.index))

    def _to_text(self, labels: Sequence[int]) -> str:
        return " ".join(self.recordings.words[label] for label in labels) or "nothing"

    def _texts(self, transcript: Transcript) -> tuple[str, str]:
        return self._to_text(transcript.reference), self._to_text(transcript.predicted)

    def _draw(self, utterances: Utterances, transcript: Transcript) -> Image.Image:
        indices = utterances.recording_indices(transcript.index)
        frames = torch.cat([self.recordings.frames[i] for i in indices])
        words = [(frame, self.recordings.words[label]) for label, frame in transcript.hypothesis]
        return draw_spectrogram(frames, words if self.strings else [])

    def _log_sound(self, log: TensorBoardLogger, step: int, tag: str, indices: Sequence[int]) -> None:
        if not self.recordings.paths:
            return
        sounds = [read_wav(self.recordings.paths[i]) for i in indices]
        rate = sounds[0][1]
        sizes = [round(len(samples) * rate / own_rate) for samples, own_rate in sounds]
        resampled = [
            interpolate(samples[None, None], size, mode="linear")[0, 0]
            for (samples, _), size in zip(sounds, sizes, strict=True)
        ]
        sound = torch.cat(resampled).unsqueeze(0)
        log.add(step, lambda writer: writer.add_audio(tag, sound, step, sample_rate=rate))


def count_confusions(transcripts: Sequence[Transcript], words: Sequence[str]) -> Tensor:
    """How often each word (row) is predicted as each word (column)."""
    labels, predicted = torch.tensor([(x.reference[0], x.predicted[0]) for x in transcripts]).T
    return confusion_counts(labels, predicted, len(words))


def train(settings: Settings) -> FitResult | None:
    """Read the recordings, train, and print the final figures."""
    recordings = included_digits() if settings.data is None else read_folder(settings.data)
    strings, words = settings.ctc, recordings.words
    utterances = {
        name: Utterances(recordings, rows, strings, augmented=name == "train")
        for name, rows in split(recordings, settings.held_out_speaker).items()
    }
    loaders = {
        name: DataLoader(x, settings.batch_size, x.augmented, collate_fn=partial(collate, strings=strings))
        for name, x in utterances.items()
    }
    model = build_model(settings, len(words))
    loss = CTCLoss(settings.layers, len(words)) if strings else settings.layers.CrossEntropyLoss()
    optimizer, schedule = settings.one_cycle(model, len(loaders["train"]))
    logger = TranscriptLogger(recordings, strings)

    def on_epoch_end(log: TensorBoardLogger, step: int) -> None:
        if trainer.state.epoch == 1:
            logger.log_words(log, step, utterances["train"])
        transcripts = transcribe(model, loaders["validation"], trainer.device)
        logger.log_transcripts(log, step, "validation", utterances["validation"], transcripts)

    test: list[Transcript] = []

    def on_fit_end(log: TensorBoardLogger, step: int) -> dict[str, float]:
        test[:] = transcribe(model, loaders["test"], trainer.device)
        logger.log_transcripts(log, step, "test", utterances["test"], test, sounds=True)
        return evaluate(test, strings)

    trainer = Trainer(
        model,
        loss,
        optimizer,
        loaders["train"],
        loaders["validation"],
        settings=settings,
        lr_scheduler=schedule,
        metrics={"error_rate": error_rate} if strings else {"accuracy": accuracy},
        on_fit_end=on_fit_end,
        on_epoch_end=on_epoch_end,
    )
    result = trainer.fit()
    if trainer.is_main_process:
        print_figures(settings, words, test, result.summary)
        return result
    return None


def print_figures(
    settings: Settings, words: Sequence[str], test: Sequence[Transcript], summary: Mapping[str, float]
) -> None:
    speaker = settings.held_out_speaker
    by = "" if speaker is None else f" by {speaker}, who is not in the training data"
    if settings.ctc:
        unit = "character" if max(map(len, words)) == 1 else "word"
        count = sum(len(x.reference) for x in test)
        print(f"{unit} error rate: test {summary['test_error_rate']:.2%} of {count:,} {unit}s{by}")
        print(f"strings without an error: {summary['test_string_accuracy']:.1%} of {len(test):,}")
        return
    print(f"accuracy: test {summary['test_accuracy']:.2%} of {len(test):,} recordings{by}")
    wrong = Counter((x.reference[0], x.predicted[0]) for x in test if x.errors)
    for (true, predicted), count in wrong.most_common(1):
        print(f"most common mistake: {words[true]!r} predicted as {words[predicted]!r}, {count} times")


if __name__ == "__main__":
    run(parse_settings(Settings).resolved(), train)
