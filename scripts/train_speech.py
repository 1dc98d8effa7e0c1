"""Tell spoken words apart, or transcribe strings of them, with a network whose every gradient is written by hand.

    python scripts/train_speech.py                                  the digits in 3,000 recordings
    python scripts/train_speech.py --ctc                            strings of digits, transcribed by CTC
    python scripts/train_speech.py --data DIR                       recordings of your own, any words
    python scripts/train_speech.py --data DIR --held-out-speaker NAME   tested on a voice never heard before
    python scripts/train_speech.py --model torch                    the same network in plain torch.nn

The curves, spectrograms, sounds and final figures go to a folder under runs/:  tensorboard --logdir runs
"""

import math
import wave
from collections import Counter
from collections.abc import Sequence
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
from manualgrad.training.pictures import confusion_matrix, grid

DIGITS = Path(__file__).parent / "data" / "spoken_digits.npz"
BANDS = 40
"""Of frequency, in which a spectrum is seen."""
WINDOW, HOP = 0.032, 0.016
"""Seconds: how much of a sound makes a frame, and from one frame to the next."""
HIDDEN_BANDS, HIDDEN_TIME = 6, 0.25
"""In training at most so many bands of a recording, and so much of its time, are hidden."""
RANGE = 45
"""Decibels from the loudest in a recording to what counts as silence."""
LOWEST_RATE = 4000
FEWEST_RECORDINGS = 10
LONGEST_STRING = 6
NOTHING = -1
"""In a target, behind the last label."""


class Settings(TaskSettings):
    """Tell spoken words apart: by default, the digits in 3,000 recordings by six speakers."""

    data: Path | None = None
    """A folder of WAV files, named WORD_SPEAKER_NUMBER.wav or in one folder for each word, SPEAKER_ANYTHING.wav;
    by default the spoken digits that come with this script."""
    held_out_speaker: str | None = None
    """Learn from all the others, and test on this speaker."""
    ctc: bool = False
    """Transcribe strings of words, recordings joined at random, rather than tell single ones apart."""
    width: PositiveInt = 96
    """Channels of each convolution."""
    depth: PositiveInt = 4
    """Convolutions over time."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """The share of outputs that each convolution leaves out in training."""
    batch_size: PositiveInt = 64
    """Recordings, or strings of them, per batch."""
    max_epochs: PositiveInt = 30
    """How many times to go through the training data."""
    task: ClassVar[str] = "speech"

    @model_validator(mode="after")
    def _speakers_are_known(self) -> Self:
        if self.held_out_speaker is not None and self.data is None:
            raise ValueError("--held-out-speaker needs --data: of the recordings here nobody knows who speaks")
        return self


# The recordings


class Recordings(NamedTuple):
    """Spoken words as spectrograms."""

    frames: list[Tensor]
    """Of each recording (frames, BANDS): decibels in each band of frequency, the low ones first."""
    labels: Tensor
    """(recordings,) numbers of words."""
    words: list[str]
    speakers: list[str]
    """Of each recording; empty where they are not known."""
    paths: list[Path]
    """The sound of each recording; empty where there is none."""


def spoken_digits() -> Recordings:
    """The recordings that come along."""
    with np.load(DIGITS) as data:
        bands = from_cepstrum(torch.from_numpy(data["mfcc"].astype(np.float32)))
        lengths, digits = data["frames"].tolist(), torch.from_numpy(data["digit"].astype(np.int64))
    return Recordings([audible(frames) for frames in bands.split(lengths)], digits, [*"0123456789"], [], [])


def from_cepstrum(coefficients: Tensor) -> Tensor:
    """The bands, (frames, BANDS), that mel-frequency cepstral coefficients tell of: the first coefficients of an
    orthogonal cosine transform over 128 bands. They come out smooth, as the others are missing."""
    orders, middles = torch.arange(coefficients.shape[1]), (torch.arange(BANDS) + 0.5) / BANDS
    cosines = torch.cos(math.pi * orders.unsqueeze(1) * middles) * math.sqrt(2 / 128)
    cosines[0] /= math.sqrt(2)
    return coefficients @ cosines


def audible(decibels: Tensor) -> Tensor:
    """Without what is far below the loudest: it tells the room and the microphone, not the word."""
    return decibels.clamp(min=decibels.max() - RANGE)


def read_folder(folder: Path) -> Recordings:
    """The recordings in a folder, and what their names say of them.

    Raises:
        DataError: for a folder without recordings or with too few of a word, and for files that cannot be used.
    """
    found = _named_files(folder)
    counts = Counter(word for word, _, _ in found)
    words = sorted(counts)
    if len(words) < 2:
        raise DataError(f"{folder} has recordings of one word alone, {words[0]!r}: there is nothing to tell apart")
    for word in words:
        if counts[word] < FEWEST_RECORDINGS:
            few = f"{counts[word]} recording{'s' * (counts[word] > 1)}"
            raise DataError(f"{folder} has {few} of {word!r}, where {FEWEST_RECORDINGS} are needed")
    rates = [_checked(path) for _, _, path in found]
    highest = min(rates) / 2  # the frequency that they all have
    frames = [audible(spectrum(*read_sound(path), highest)) for _, _, path in tqdm(found, "reading", disable=None)]
    labels = torch.tensor([words.index(word) for word, _, _ in found])
    return Recordings(frames, labels, words, [speaker for _, speaker, _ in found], [path for *_, path in found])


def _named_files(folder: Path) -> list[tuple[str, str, Path]]:
    """Word, speaker and path of every recording."""
    try:
        # but for what is set apart, such as _background_noise_
        entries = sorted(path for path in folder.iterdir() if path.name[0] not in "._")
        inside = {path: sorted(filter(_is_sound, path.iterdir())) for path in entries if path.is_dir()}
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from None
    found: list[tuple[str, str, Path]] = []
    for path in entries:
        if _is_sound(path):
            match path.stem.split("_"):
                case [word, speaker, _] if word and speaker:
                    found.append((word, speaker, path))
                case _:
                    raise DataError(f"{path} is not named WORD_SPEAKER_NUMBER.wav, nor in a folder for its word")
    if found:
        return found
    for path, files in inside.items():
        if not files:
            raise DataError(f"{path} holds no WAV files: there is nothing to learn {path.name!r} from")
        found += [(path.name, file.stem.partition("_")[0], file) for file in files]
    if not found:
        raise DataError(f"{folder} holds no WAV files, neither WORD_SPEAKER_NUMBER.wav nor in a folder for a word")
    return found


def _is_sound(path: Path) -> bool:
    return path.suffix.lower() == ".wav"


def _opened(path: Path) -> wave.Wave_read:
    try:
        return wave.open(str(path))
    except EOFError:
        raise DataError(f"{path} is empty or cut short") from None
    except wave.Error as error:
        raise DataError(f"{path} is no WAV file of whole numbers: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _checked(path: Path) -> int:
    """The rate of a recording that can be used."""
    with _opened(path) as file:
        rate, samples = file.getframerate(), file.getnframes()
        width = file.getsampwidth()
    if width > 4:
        raise DataError(f"{path} has samples of {8 * width} bits: 8, 16, 24 and 32 can be read")
    if rate < LOWEST_RATE:
        raise DataError(f"{path} has {rate} samples a second, where {LOWEST_RATE} are needed")
    needed = round(WINDOW * rate) + round(HOP * rate)  # two frames: by CTC, a word that is repeated needs as many
    if samples < needed:
        raise DataError(f"{path} is too short: {samples} samples, where {needed} are needed")
    return rate


def read_sound(path: Path) -> tuple[Tensor, int]:
    """The samples of a WAV file, from -1 to 1, and how many make a second; of several channels the mean.

    Raises:
        DataError: for a file that is missing, cut short, or no WAV file of whole numbers.
    """
    with _opened(path) as file:
        channels, width, rate, samples, *_ = file.getparams()
        content = bytearray(file.readframes(samples))
    if not content or len(content) < samples * channels * width:
        raise DataError(f"{path} is cut short: {samples:,} samples by its header, fewer in the file")
    numbers = torch.frombuffer(content, dtype=torch.uint8).view(-1, width)
    if width == 1:
        numbers = numbers ^ 128  # alone these are stored without a sign
    numbers = pad(numbers, (4 - width, 0)).view(torch.int32)  # the first byte is the lowest
    return (numbers.view(-1, channels).double() / 2**31).mean(1).float(), rate


def spectrum(samples: Tensor, rate: int, highest: float) -> Tensor:
    """The loudness of a sound in each frame and band, in decibels.

    Frames and bands are of so many seconds and hertz at whatever rate the sound was recorded: sounds of different
    rates need no resampling, as long as `highest` is a frequency that they all have.

    Args:
        samples: (samples,) at least a frame of them.
        rate: samples in a second.
        highest: where the bands end, in hertz; at most half the rate.

    Returns:
        (frames, BANDS)
    """
    size, hop = round(WINDOW * rate), round(HOP * rate)
    frames = samples.unfold(0, size, hop) * torch.hann_window(size)
    power = torch.fft.rfft(frames, 2 * size).abs().square() / size**2
    return 10 * (power @ mel_bands(rate, 2 * size, highest)).clamp(min=1e-10).log10()


def mel_bands(rate: int, size: int, highest: float) -> Tensor:
    """How much of each frequency of a transform of `size` samples each band takes: (size // 2 + 1, BANDS).

    The bands are triangles, each from the middle of the one below to that of the one above, and equally far apart
    in mel, which is how far apart tones sound.
    """
    mels = torch.linspace(0, 2595 * math.log10(1 + highest / 700), BANDS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    frequencies = (torch.arange(size // 2 + 1) * rate / size).unsqueeze(1)
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def split(recordings: Recordings, held_out: str | None) -> dict[str, Tensor]:
    """The numbers of the recordings to train on, to validate with and to test on: 70, 10 and 20 % of each word.

    With a speaker held out: nine tenths and one of each word by the others, and all by that speaker.

    Raises:
        DataError: where there is no such speaker, or the others do not say every word often enough.
    """
    numbers = torch.arange(len(recordings.labels))
    test = torch.zeros(len(numbers), dtype=torch.bool)
    if held_out is not None:
        test = torch.tensor([speaker == held_out for speaker in recordings.speakers])
        if not test.any():
            names = sorted(set(recordings.speakers))
            shown = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            raise DataError(f"no recording is by {held_out!r}: --held-out-speaker is one of {shown}")
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": [numbers[test]]}
    # The split depends on the recordings alone: every seed and every model is tested on the same ones.
    generator = torch.Generator().manual_seed(0)
    for label, word in enumerate(recordings.words):
        rows = numbers[(recordings.labels == label) & ~test]
        if len(rows) < FEWEST_RECORDINGS:
            raise DataError(f"without {held_out!r} there are {len(rows)} recordings of {word!r}: too few")
        rows = rows[torch.randperm(len(rows), generator=generator)]
        tested = 0 if held_out else len(rows) // 5
        parts["test"].append(rows[:tested])
        parts["validation"].append(rows[tested : tested + len(rows) // 10])
        parts["train"].append(rows[tested + len(rows) // 10 :])
    return {name: torch.cat(rows).sort().values for name, rows in parts.items()}


class Utterances(Dataset[tuple[Tensor, Tensor]]):
    """What is said: recordings, or strings of them that each begin with one of them and go on at random.

    An utterance is (frames, BANDS + 1) and its labels. The last column, of ones, is the mark of a frame: where
    batches are padded with zeros it is zero.

    Args:
        recordings: all of them.
        rows: which to take.
        strings: whether to join them, up to LONGEST_STRING.
        varied: whether each is said differently every time, and the strings are others: for training.
    """

    def __init__(self, recordings: Recordings, rows: Tensor, strings: bool, varied: bool = False) -> None:
        self.recordings, self.rows, self.strings, self.varied = recordings, rows.tolist(), strings, varied

    def __len__(self) -> int:
        return len(self.rows)

    def numbers(self, index: int) -> list[int]:
        """The recordings that make up an utterance."""
        if not self.strings:
            return [self.rows[index]]
        generator = None if self.varied else torch.Generator().manual_seed(index)
        others = int(torch.randint(LONGEST_STRING, (), generator=generator))
        drawn = torch.randint(len(self), (others,), generator=generator).tolist()
        return [self.rows[i] for i in (index, *drawn)]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        numbers = self.numbers(index)
        frames = [self._frames(number) for number in numbers]
        return torch.cat(frames), self.recordings.labels[numbers]

    def _frames(self, number: int) -> Tensor:
        frames = self.recordings.frames[number]
        frames = (frames - frames.mean(0)) / 10  # without what the microphone and the voice have in common
        return pad(varied(frames) if self.varied else frames, (0, 1), value=1.0)


def varied(frames: Tensor) -> Tensor:
    """Spoken at another speed, by a mouth of another size: time and frequency stretched at random.

    A stretch of each is hidden, so that no part of a word is relied upon alone (SpecAugment: Park et al., 2019).
    """
    slower, lower = torch.rand(2).mul(2).sub(1).tolist()
    length = max(2, round(len(frames) * math.exp(0.35 * slower)))
    scale = math.exp(0.2 * lower)
    places = affine_grid(torch.tensor([[[scale, 0, scale - 1], [0, 1, 0]]]), [1, 1, length, BANDS], False)
    frames = grid_sample(frames[None, None], places, padding_mode="border", align_corners=False)[0, 0]
    for axis, most in enumerate((int(HIDDEN_TIME * length), HIDDEN_BANDS)):
        width = int(torch.randint(most + 1, ()))
        start = int(torch.randint(frames.shape[axis] - width + 1, ()))
        frames.narrow(axis, start, width).zero_()  # the mean of the recording
    return frames


def together(utterances: Sequence[tuple[Tensor, Tensor]], strings: bool) -> tuple[Tensor, Tensor]:
    """A batch, padded: (utterances, frames, BANDS + 1), and the labels, (utterances,) or (utterances, labels)."""
    frames, labels = zip(*utterances, strict=True)
    targets = pad_sequence(list(labels), batch_first=True, padding_value=NOTHING)
    return pad_sequence(list(frames), batch_first=True), targets if strings else targets.squeeze(1)


# The network and its losses


class Convolution(torch.nn.Module):
    """Conv1d over time, LayerNorm, GELU and Dropout; added to its input, where that is of the same width."""

    def __init__(self, layers: Any, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.conv = layers.Conv1d(inputs, outputs, kernel_size=5, padding=2)
        self.norm = layers.LayerNorm(outputs)
        self.gelu = layers.GELU()
        self.dropout = layers.Dropout(dropout)
        self.adds = inputs == outputs

    def forward(self, input: Tensor, inside: Tensor) -> Tensor:
        """Of (utterances, frames, channels) and (utterances, frames, 1): 1 in a frame, 0 in the padding, which
        stays zero, so that no utterance knows how long the others are."""
        output = self.dropout(self.gelu(self.norm(self.conv(input.mT).mT))) * inside
        return input + output if self.adds else output


class Network(torch.nn.Module):
    """Convolutions over time, and a score for each word, from their mean over the frames.

    With ``settings.ctc``: log-probabilities for each frame, of the words and last of the blank.
    """

    silence: Tensor

    def __init__(self, settings: Settings, words: int) -> None:
        super().__init__()
        layers, widths = settings.layers, [BANDS + 1] + [settings.width] * settings.depth
        self.convolutions = torch.nn.ModuleList(
            Convolution(layers, inputs, settings.width, settings.dropout) for inputs in widths[:-1]
        )
        self.ctc = settings.ctc
        self.output = layers.Linear(settings.width, words + self.ctc)
        if self.ctc:
            self.log_softmax = layers.LogSoftmax(-1)
            # Behind its end an utterance is blank for certain: its loss is the one that it has alone.
            self.register_buffer("silence", torch.tensor([-1e4] * words + [0.0]), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        inside, output = input[..., -1:], input
        for convolution in self.convolutions:
            output = convolution(output, inside)
        if not self.ctc:
            return self.output(output.sum(1) / inside.sum(1))
        return self.log_softmax(self.output(output) * inside + self.silence * (1 - inside))


class TranscriptLoss(torch.nn.Module):
    """CTC: minus the log-probability of a transcript, whichever way it is aligned with the frames."""

    def __init__(self, layers: Any, words: int) -> None:
        super().__init__()
        self.ctc = layers.CTCLoss(blank=words)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Of (strings, frames, words + 1) and (strings, labels)."""
        frames = torch.full((len(prediction),), prediction.shape[1])
        labels = (target != NOTHING).sum(1)
        return self.ctc(prediction.transpose(0, 1), target.clamp(min=0), frames, labels)


def build(settings: Settings, words: int) -> Network:
    """The network; the seed decides its initial weights."""
    torch.manual_seed(settings.seed)
    return Network(settings, words)


# What was heard


def heard(prediction: Tensor) -> list[list[tuple[int, int]]]:
    """The labels of the likeliest words, each with the frame where it begins to be heard.

    Args:
        prediction: (utterances, words), or of a CTC network (utterances, frames, words + 1): repetitions without a
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


def mistakes(said: Sequence[int], heard: Sequence[int]) -> int:
    """The fewest words to put in, leave out or exchange in what was said that make it what was heard."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


class Transcript(NamedTuple):
    """An utterance, and what the network made of it."""

    index: int
    said: list[int]
    heard: list[tuple[int, int]]
    """Labels, and the frames where they begin."""

    @property
    def mistakes(self) -> int:
        return mistakes(self.said, [label for label, _ in self.heard])


def transcripts(prediction: Tensor, target: Tensor) -> list[Transcript]:
    """Of a batch."""
    labels = [[label for label in row if label != NOTHING] for row in target.view(len(target), -1).tolist()]
    return [Transcript(i, *pair) for i, pair in enumerate(zip(labels, heard(prediction), strict=True))]


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """The share of words that were heard as what they are."""
    return (prediction.argmax(1) == target).float().mean()


def error_rate(prediction: Tensor, target: Tensor) -> Tensor:
    """Mistakes for each word that was said, the mean over strings."""
    every = transcripts(prediction, target)
    return torch.tensor([each.mistakes / len(each.said) for each in every]).mean()


@torch.no_grad
def listen(model: torch.nn.Module, loader: DataLoader[Any], device: torch.device) -> list[Transcript]:
    """What the model makes of all the utterances of a loader, in their order."""
    every: list[Transcript] = []
    for input, target in loader:
        every += transcripts(model(input.to(device)).cpu(), target)
    return [each._replace(index=index) for index, each in enumerate(every)]


def score(every: Sequence[Transcript], strings: bool) -> dict[str, float]:
    """The final figures of a test."""
    right = sum(each.mistakes == 0 for each in every) / len(every)
    if not strings:
        return {"test_accuracy": right}
    wrong, words = sum(each.mistakes for each in every), sum(len(each.said) for each in every)
    return {"test_error_rate": wrong / words, "test_whole_strings": right}


# The pages for TensorBoard


def picture(frames: Tensor, below: Sequence[tuple[int, str]] = ()) -> Image.Image:
    """A spectrogram, dark where it is loud, low tones at the bottom; words below it, each at its frame."""
    quiet = (frames.max() - frames) / (frames.max() - frames.min()).clamp(min=1e-6)
    pixels = (quiet * 255).to(torch.uint8).T.flip(0).repeat_interleave(4, 0).repeat_interleave(4, 1)
    strip = Image.new("L", (pixels.shape[1], pixels.shape[0] + 34 * bool(below)), "white")
    strip.paste(Image.fromarray(pixels.numpy()), (0, 0))
    draw, font, end = ImageDraw.Draw(strip), ImageFont.load_default(26), 0.0
    for frame, word in below:
        start = max(4 * frame, end)  # not upon the one before
        draw.text((start, strip.height - 4), word, "black", font, "ls")
        end = start + font.getlength(word) + 4
    return strip


def side_by_side(pictures: Sequence[Image.Image], captions: Sequence[str], width: int = 0) -> Image.Image:
    """Pictures of different sizes in one, each given so much width or that of the widest."""
    width, height = max(width, *(each.width for each in pictures)), max(each.height for each in pictures)
    canvas = torch.full((len(pictures), height, width), 255, dtype=torch.uint8)
    for place, each in zip(canvas, pictures, strict=True):
        place[: each.height, : each.width] = torch.from_numpy(np.array(each))
    return grid(canvas, captions)


class Pages:
    """What is to be seen and heard of recordings: gives it to a log."""

    def __init__(self, recordings: Recordings, strings: bool) -> None:
        self.recordings, self.strings = recordings, strings

    def words(self, log: TensorBoardLogger, step: int, utterances: Utterances) -> None:
        """A recording of each word."""
        labels = self.recordings.labels[utterances.rows]
        rows = [utterances.rows[int((labels == label).int().argmax())] for label in labels.unique()]
        names = [self._spelled([int(self.recordings.labels[row])]) for row in rows]
        page = side_by_side([picture(self.recordings.frames[row]) for row in rows], names)
        log.add(step, lambda writer: add_pil_image(writer, "words", page, step))
        for row, name in zip(rows, names, strict=True):
            self._sound(log, step, f"words/{name}", [row])

    def heard(
        self,
        log: TensorBoardLogger,
        step: int,
        name: str,
        utterances: Utterances,
        every: Sequence[Transcript],
        sounds: bool = False,
    ) -> None:
        """What was made of utterances: all in all, and the worst of it, with its sounds if so asked."""
        wrong = [each for each in every if each.mistakes] or every
        worst = sorted(wrong, key=lambda each: -each.mistakes)[: 4 if self.strings else 16]
        captions = ["said {}\nheard {}".format(*self._told(each)) for each in worst]
        pictures = [self._picture(utterances, each) for each in worst]
        size = 1 if self.strings else len(worst)  # a string is as wide as a page
        widest = max(each.width for each in pictures)  # one scale for all pages: TensorBoard stretches each
        for start in range(0, len(worst), size):
            page = side_by_side(pictures[start : start + size], captions[start : start + size], widest)
            tag = f"worst_heard/{name}" + f"_{start + 1}" * self.strings
            log.add(step, partial(add_pil_image, tag=tag, image=page, step=step))
        if self.strings:
            rows = [f"| {' | '.join(self._told(each))} | {each.mistakes or ''} |" for each in every[:40]]
            card = "\n".join(["| said | heard | mistakes |", "|---|---|---:|", *rows])
            log.add(step, lambda writer: writer.add_text(f"transcripts/{name}", card, step))
        else:
            matrix = confusion_matrix(confusions(every, len(self.recordings.words)), self.recordings.words)
            log.add(step, lambda writer: add_pil_image(writer, f"confusion_matrix/{name}", matrix, step))
        for number, each in enumerate(worst[:8] if sounds else [], start=1):
            tag = "worst_heard_{}/{} said {}, heard {}".format(name, number, *self._told(each))
            self._sound(log, step, tag, utterances.numbers(each.index))

    def _spelled(self, labels: Sequence[int]) -> str:
        return " ".join(self.recordings.words[label] for label in labels) or "nothing"

    def _told(self, transcript: Transcript) -> tuple[str, str]:
        return self._spelled(transcript.said), self._spelled([label for label, _ in transcript.heard])

    def _picture(self, utterances: Utterances, transcript: Transcript) -> Image.Image:
        frames = torch.cat([self.recordings.frames[number] for number in utterances.numbers(transcript.index)])
        words = [(frame, self.recordings.words[label]) for label, frame in transcript.heard]
        return picture(frames, words if self.strings else [])

    def _sound(self, log: TensorBoardLogger, step: int, tag: str, numbers: Sequence[int]) -> None:
        if not self.recordings.paths:
            return
        parts = [read_sound(self.recordings.paths[number]) for number in numbers]
        rate = parts[0][1]
        sizes = [round(len(samples) * rate / own) for samples, own in parts]
        joined = [
            interpolate(samples[None, None], size, mode="linear")[0, 0]
            for (samples, _), size in zip(parts, sizes, strict=True)
        ]
        sound = torch.cat(joined).unsqueeze(0)
        log.add(step, lambda writer: writer.add_audio(tag, sound, step, sample_rate=rate))


def confusions(every: Sequence[Transcript], words: int) -> Tensor:
    """(words, words): how often each word was taken for each."""
    counts = torch.zeros(words, words, dtype=torch.int64)
    for each in every:
        counts[each.said[0], each.heard[0][0]] += 1
    return counts


def train(settings: Settings) -> FitResult | None:
    """Read, train, and print the final figures."""
    recordings = spoken_digits() if settings.data is None else read_folder(settings.data)
    strings, words = settings.ctc, recordings.words
    said = {
        name: Utterances(recordings, rows, strings, varied=name == "train")
        for name, rows in split(recordings, settings.held_out_speaker).items()
    }
    loaders = {
        name: DataLoader(
            utterances, settings.batch_size, utterances.varied, collate_fn=partial(together, strings=strings)
        )
        for name, utterances in said.items()
    }
    model = build(settings, len(words))
    loss = TranscriptLoss(settings.layers, len(words)) if strings else settings.layers.CrossEntropyLoss()
    optimizer, schedule = settings.one_cycle(model, len(loaders["train"]))
    pages = Pages(recordings, strings)

    def on_epoch(log: TensorBoardLogger, step: int) -> None:
        if trainer.state.epoch == 1:
            pages.words(log, step, said["train"])
        every = listen(model, loaders["validation"], trainer.device)
        pages.heard(log, step, "validation", said["validation"], every)

    in_test: list[Transcript] = []

    def summary(log: TensorBoardLogger, step: int) -> dict[str, float]:
        in_test[:] = listen(model, loaders["test"], trainer.device)
        pages.heard(log, step, "test", said["test"], in_test, sounds=True)
        return score(in_test, strings)

    trainer = Trainer(
        model,
        loss,
        optimizer,
        loaders["train"],
        loaders["validation"],
        settings=settings,
        lr_scheduler=schedule,
        metrics={"error_rate": error_rate} if strings else {"accuracy": accuracy},
        on_fit_end=summary,
        on_epoch_end=on_epoch,
    )
    result = trainer.fit()
    if not trainer.is_main_process:
        return None
    held_out = settings.held_out_speaker
    by = "" if held_out is None else f" by {held_out}, who was never heard before"
    if strings:
        unit = "character" if max(map(len, words)) == 1 else "word"
        count = sum(len(each.said) for each in in_test)
        print(f"{unit} error rate: test {result.summary['test_error_rate']:.2%} of {count:,} {unit}s{by}")
        print(f"without a mistake: {result.summary['test_whole_strings']:.1%} of {len(in_test):,} strings")
    else:
        print(f"accuracy: test {result.summary['test_accuracy']:.2%} of {len(in_test):,} recordings{by}")
        wrong = Counter((each.said[0], each.heard[0][0]) for each in in_test if each.mistakes)
        for (true, taken), count in wrong.most_common(1):
            print(f"the most frequent mistake: {words[true]!r} taken for {words[taken]!r}, {count} of them")
    return result


if __name__ == "__main__":
    run(parse_settings(Settings).resolved(), train)
