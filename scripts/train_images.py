"""Learn to tell pictures apart, with a convolutional network whose every gradient is written by hand.

    python scripts/train_images.py                                7,000 pictures of clothes, which come along
    python scripts/train_images.py --data fashion-mnist           a folder of idx files: all 70,000 of them
    python scripts/train_images.py --data gzip/emnist-letters     one of several sets in a folder
    python scripts/train_images.py --model torch                  the same network in plain torch.nn

The curves, the mistakes as pictures and the final figures go to a folder under runs/:  tensorboard --logdir runs
"""

import gzip
import math
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from manualgrad.meter import add_pil_image
from manualgrad.training import DataError, FitResult, TaskSettings, TensorBoardLogger, Trainer, parse_settings, run
from manualgrad.training.distributed import full_tensor
from manualgrad.training.pictures import confusion_matrix, grid

CLOTHES = Path(__file__).parent / "data" / "fashion-mnist"
CLOTHES_NAMES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
FEWEST_IMAGES = 20
SMALLEST_SIDE = 8  # which halved three times is 1
MISTAKES_SHOWN = 9


class Settings(TaskSettings):
    """Learn to tell pictures apart: by default, ten kinds of clothes, of 6,000 and 1,000 pictures."""

    data: Path | None = None
    """A folder of idx files as of MNIST, .gz or not; where it holds several sets, FOLDER/START-OF-THEIR-NAMES."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Pictures per batch; batch norm needs two."""
    width: PositiveInt = 32
    """Channels of the first convolution; each of the two others doubles them."""
    shift: NonNegativeInt = 2
    """Move each training picture at random by up to so many pixels."""
    flip: bool | None = None
    """Mirror half of the training pictures; by default only clothes (in a folder whose name says fashion)."""
    max_epochs: PositiveInt = 15
    """How many times to go through the training data."""
    task: ClassVar[str] = "images"

    def resolved(self) -> Self:
        """These settings with values for those whose default depends on the others."""
        flip = _of_clothes(self.data or CLOTHES) if self.flip is None else self.flip
        return super().resolved().model_copy(update={"flip": flip})


# The pictures


class Split(NamedTuple):
    """Pictures and what is on each."""

    images: Tensor
    """(n, height, width), uint8"""
    labels: Tensor
    """(n,), the numbers of the classes"""


class Pictures(NamedTuple):
    """A set of pictures in three parts."""

    splits: dict[str, Split]
    """By name: "train", "validation" (a tenth of the training files) and "test"."""
    names: list[str]
    """Of the classes."""
    mean: float
    std: float
    """Of the pixels in the training part."""

    def inputs(self, images: Tensor) -> Tensor:
        """What the network sees of pictures: one channel, standardised; (n, 1, height, width).

        In memory the channel is last: so are then those of the hidden layers, where convolutions are faster.
        """
        return ((images.float() - self.mean) / self.std).unsqueeze(3).movedim(3, 1)


def read_pictures(data: Path) -> Pictures:
    """Read a set of idx files: training and test, images and labels.

    Raises:
        DataError: for files that are missing, broken or do not fit together.
    """
    files = _find(data)
    train, test = (_read_split(files[split, "images"], files[split, "labels"]) for split in ("train", "test"))
    rows, (height, width) = len(train.labels), train.images.shape[1:]
    if rows < FEWEST_IMAGES:
        raise DataError(f"{data} has too few images to train on: {rows}, where {FEWEST_IMAGES} are needed")
    if min(height, width) < SMALLEST_SIDE:
        raise DataError(
            f"{data} has images of {height}x{width} pixels, where {SMALLEST_SIDE}x{SMALLEST_SIDE} are needed"
        )
    if test.images.shape[1:] != (height, width):
        sizes = "{}x{} and the test images of {}x{}".format(height, width, *test.images.shape[1:])
        raise DataError(f"{data} has training images of {sizes} pixels")

    found = train.labels.unique()  # sorted; those of EMNIST's letters begin with 1
    if len(found) < 2:
        raise DataError(f"{data} has the label {int(found[0])} on all training images: there is nothing to learn")
    unknown = test.labels[~torch.isin(test.labels, found)]
    if len(unknown):
        raise DataError(f"{data} has the label {int(unknown[0])} on a test image, and on no training image")
    names = [str(label) for label in found.tolist()]
    if names == [str(number) for number in range(len(CLOTHES_NAMES))] and _of_clothes(data):
        names = CLOTHES_NAMES

    # The split depends on the number of images alone: every seed and every model is validated on the same ones.
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("validation", "train"), order.split([rows // 10, rows - rows // 10]), strict=True))
    splits = {
        split: Split(train.images[parts[split]], train.labels[parts[split]]) for split in ("train", "validation")
    }
    splits["test"] = test
    splits = {
        split: Split(images, torch.searchsorted(found, labels)) for split, (images, labels) in splits.items()
    }
    pixels = splits["train"].images.double()
    if pixels.std() == 0:
        raise DataError(f"{data} has the same value in all pixels of the training images")
    return Pictures(splits, names, pixels.mean().item(), pixels.std().item())


def _of_clothes(data: Path) -> bool:
    """Whether the folder, or the one above it, is of Fashion-MNIST, whose files are named as those of MNIST."""
    return any("fashion" in part.lower() for part in data.resolve().parts[-2:])


_FILE = re.compile(r"(.*?)(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")


def _find(data: Path) -> dict[tuple[str, str], Path]:
    """The files of a set, by ("train" or "test", "images" or "labels")."""
    folder, start = (data, "") if data.is_dir() else (data.parent, data.name)
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from None
    sets: dict[str, dict[tuple[str, str], Path]] = {}
    for path in paths:
        match = _FILE.fullmatch(path.name)
        if match and match[1].startswith(start):
            split = "train" if match[2] == "train" else "test"
            sets.setdefault(match[1], {}).setdefault((split, match[3]), path)
    if not sets:
        raise DataError(f"{data} has no idx files, such as train-images-idx3-ubyte.gz")
    if len(sets) > 1:
        which = ", ".join(str(folder / name.rstrip("-")) for name in sets)
        raise DataError(f"{data} has several sets of idx files: choose one of {which}")
    (files,) = sets.values()
    for split, what in product(("train", "test"), ("images", "labels")):
        if (split, what) not in files:
            raise DataError(f"{data} has no file of {split} {what}")
    return files


def _read_split(images_path: Path, labels_path: Path) -> Split:
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} has {len(images)} images and {labels_path} {len(labels)} labels")
    if not len(images):
        raise DataError(f"{images_path} has no images")
    if images_path.name.startswith("emnist"):
        images = images.mT.contiguous()  # they are stored by columns
    return Split(images, labels.long())


def _read_idx(path: Path, axes: int) -> Tensor:
    """An array of bytes: 0, 0, the type 8, the number of axes, the length of each in four bytes; the items."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a broken gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    start = 4 + 4 * axes
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) < start:
        raise DataError(
            f"{path} is no idx file of bytes along {axes} axes: it begins with {content[:4].hex(' ') or 'nothing'}"
        )
    shape = [int.from_bytes(content[4 * axis : 4 * axis + 4]) for axis in range(1, axes + 1)]
    if len(content) != start + math.prod(shape):
        size = " x ".join(map(str, shape))
        raise DataError(f"{path} should have {size} bytes after the header, but has {len(content) - start}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(shape)


# The network and its training


def build(settings: Settings, pictures: Pictures) -> torch.nn.Module:
    """Three convolutions, each with max pooling, batch norm and ReLU, and a linear layer that tells the classes.

    The seed decides the initial weights.
    """
    layers = settings.layers
    torch.manual_seed(settings.seed)
    modules: dict[str, torch.nn.Module] = {}
    channels = [1, settings.width, 2 * settings.width, 4 * settings.width]
    for number, (inputs, outputs) in enumerate(pairwise(channels), start=1):
        size = 5 if number == 1 else 3
        modules[f"conv{number}"] = layers.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        modules[f"pool{number}"] = layers.MaxPool2d(2)  # first, as that leaves a quarter to the other two
        modules[f"norm{number}"] = layers.BatchNorm2d(outputs)
        modules[f"relu{number}"] = layers.ReLU()
    height, width = pictures.splits["train"].images.shape[1:]
    modules["flatten"] = layers.Flatten()
    modules["output"] = layers.Linear(channels[-1] * (height // 8) * (width // 8), len(pictures.names))
    return torch.nn.Sequential(OrderedDict(modules))


def moved(images: Tensor, shift: int, flip: bool) -> Tensor:
    """Each image moved by up to `shift` pixels along both axes, at random, and with `flip` every second mirrored.

    Args:
        images: (n, height, width)
    """
    count, height, width = images.shape
    across, down = torch.randint(2 * shift + 1, (2, count, 1))
    rows, columns = down + torch.arange(height), across + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, [shift] * 4)
    return padded[torch.arange(count).view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]


def loader(
    pictures: Pictures, split: str, batch_size: int, augmented: Settings | None = None
) -> DataLoader[tuple[Tensor, ...]]:
    """The pictures of a part, a batch at a time: as they are, or shuffled and moved as settings say."""

    def prepared(batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if augmented is not None:
            images = moved(images, augmented.shift, bool(augmented.flip))
        return pictures.inputs(images), labels

    rows = TensorDataset(*pictures.splits[split])
    order = SequentialSampler(rows) if augmented is None else RandomSampler(rows)
    alone = augmented is not None and len(rows) % batch_size == 1  # one picture, which batch norm cannot take
    batches = BatchSampler(order, batch_size, drop_last=alone)
    return DataLoader(rows, batch_size=None, sampler=batches, collate_fn=prepared)


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """The share of the examples whose highest score is that of their class."""
    return (scores.argmax(1) == labels).float().mean()


@torch.no_grad()
def predict(model: torch.nn.Module, pictures: Pictures, split: str, device: torch.device) -> Tensor:
    """The scores of the classes for each picture of a part: (n, classes), on the CPU."""
    images = pictures.splits[split].images
    return torch.cat([model(pictures.inputs(chunk).to(device)).cpu() for chunk in images.split(1000)])


def confusions(scores: Tensor, labels: Tensor) -> Tensor:
    """How many examples of each class (the row) were taken for each (the column)."""
    classes = scores.shape[1]
    return (labels * classes + scores.argmax(1)).bincount(minlength=classes**2).view(classes, classes)


# The pages for TensorBoard


def show_filters(log: TensorBoardLogger, step: int, weight: Tensor) -> None:
    """The filters of the first layer: white adds, black takes away, grey is 0."""
    filters = weight.detach().cpu()[:, 0]
    shades = 127.5 + 127.5 * filters / filters.abs().amax((1, 2), keepdim=True)
    picture = grid(shades.byte(), [str(number) for number in range(1, len(filters) + 1)])
    log.add(step, lambda writer: add_pil_image(writer, "first_layer_filters", picture, step))


def show_mistakes(log: TensorBoardLogger, step: int, scores: Tensor, pictures: Pictures, split: str) -> None:
    """Which class is taken for which, the worst mistakes, and the precision over the recall of each class."""
    (images, labels), names = pictures.splits[split], pictures.names
    matrix = confusion_matrix(confusions(scores, labels), names)
    log.add(step, lambda writer: add_pil_image(writer, f"confusion_matrix/{split}", matrix, step))

    logs = scores.log_softmax(1)
    chances = logs.exp()
    best, taken = chances.max(1)
    truth = logs.gather(1, labels.unsqueeze(1)).squeeze(1)  # the worst mistake is where it is trusted least
    wrong = (taken != labels).nonzero().squeeze(1)
    worst = wrong[truth[wrong].argsort()[:MISTAKES_SHOWN]]
    captions = [
        f"true: {names[label]}\npredicted: {names[other]}\nat {chance:.1%}"
        for label, other, chance in zip(*(x[worst].tolist() for x in (labels, taken, best)), strict=True)
    ]
    mistakes = grid(images[worst], captions)
    log.add(step, lambda writer: add_pil_image(writer, f"worst_mistakes/{split}", mistakes, step))

    for number, name in enumerate(names):
        curve = (f"precision_recall_{split}/{name}", labels == number, chances[:, number], step)
        log.add(step, lambda writer, curve=curve: writer.add_pr_curve(*curve))


def train(settings: Settings) -> FitResult | None:
    """Read, train, and print the final figures."""
    pictures = read_pictures(settings.data or CLOTHES)
    model = build(settings, pictures)
    train_loader = loader(pictures, "train", settings.batch_size, augmented=settings)
    optimizer, schedule = settings.one_cycle(model, len(train_loader))
    loss = settings.layers.CrossEntropyLoss()
    scores: dict[str, Tensor] = {}

    def show(log: TensorBoardLogger, step: int) -> None:
        show_filters(log, step, full_tensor(model.get_parameter("conv1.weight")))
        show_mistakes(log, step, predict(model, pictures, "validation", trainer.device), pictures, "validation")

    def figures(log: TensorBoardLogger, step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for split, (_, labels) in pictures.splits.items():
            scores[split] = predict(model, pictures, split, trainer.device)
            found[f"{split}_loss"] = loss(scores[split], labels).item()
            found[f"{split}_accuracy"] = accuracy(scores[split], labels).item()
        show_mistakes(log, step, scores["test"], pictures, "test")
        return found

    trainer = Trainer(
        model,
        loss,
        optimizer,
        train_loader,
        loader(pictures, "validation", 1000),
        settings=settings,
        lr_scheduler=schedule,
        metrics={"accuracy": accuracy},
        on_fit_end=figures,
        on_epoch_end=show,
    )
    result = trainer.fit()
    if not trainer.is_main_process:
        return None

    for name, style in (("accuracy", ".2%"), ("loss", ".4f")):
        parts = [f"{split} {result.summary[f'{split}_{name}']:{style}}" for split in pictures.splits]
        print(f"{name}: {', '.join(parts)}")
    wrong = confusions(scores["test"], pictures.splits["test"].labels).fill_diagonal_(0)
    true, predicted = divmod(int(wrong.argmax()), len(pictures.names))
    if wrong.any():
        names = f"{pictures.names[true]} taken for {pictures.names[predicted]}"
        print(f"most common mistake on the test images: {names}, {int(wrong.max())} of {int(wrong.sum())}")
    return result


if __name__ == "__main__":
    run(parse_settings(Settings).resolved(), train)
