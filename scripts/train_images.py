"""Classify images with a convolutional network and hand-written gradients.

    python scripts/train_images.py                                7,000 images of Fashion-MNIST (included)
    python scripts/train_images.py --data fashion-mnist           any folder of idx files
    python scripts/train_images.py --data gzip/emnist-letters     one of several datasets in a folder
    python scripts/train_images.py --model torch                  the same network in plain torch.nn

The curves, wrong predictions and final figures go to a folder under runs/:  tensorboard --logdir runs
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
from manualgrad.training.pictures import confusion_counts, confusion_matrix, grid

FASHION_MNIST = Path(__file__).parent / "data" / "fashion-mnist"
FASHION_MNIST_CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
MIN_IMAGES = 20
MIN_SIDE = 8  # three poolings halve it to 1
MISTAKES_SHOWN = 9


class Settings(TaskSettings):
    """Classify images. By default: 6,000 training and 1,000 test images of Fashion-MNIST."""

    data: Path | None = None
    """A folder of idx files (the format of MNIST); they may be compressed. FOLDER/PREFIX chooses a dataset."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per batch. Batch norm needs two."""
    width: PositiveInt = 32
    """Channels of the first convolution. Each of the two others doubles them."""
    shift: NonNegativeInt = 2
    """Shift each training image at random by up to so many pixels."""
    flip: bool | None = None
    """Flip half of the training images; by default only if the folder name contains "fashion"."""
    max_epochs: PositiveInt = 15
    """How many times to go through the training data."""
    task: ClassVar[str] = "images"

    def resolved(self) -> Self:
        """Return these settings, with values for those that depend on others by default."""
        flip = _is_fashion_mnist(self.data or FASHION_MNIST) if self.flip is None else self.flip
        return super().resolved().model_copy(update={"flip": flip})


# The images


class Split(NamedTuple):
    """Images and their labels."""

    images: Tensor
    """(n, height, width), uint8"""
    labels: Tensor
    """(n,), class indices"""


class ImageDataset(NamedTuple):
    """A dataset in three splits."""

    splits: dict[str, Split]
    """By name: "train", "validation" (a tenth of the training files) and "test"."""
    class_names: list[str]
    mean: float
    std: float
    """Standard deviation of the training pixels."""

    def normalize(self, images: Tensor) -> Tensor:
        """The inputs of the network, (n, 1, height, width), in channels_last format, which is faster."""
        return ((images.float() - self.mean) / self.std).unsqueeze(3).movedim(3, 1)


def read_dataset(data: Path) -> ImageDataset:
    """Read the idx files of a dataset: training and test, images and labels.

    Raises:
        DataError: if files are missing, broken or inconsistent.
    """
    files = _find_files(data)
    train, test = (_read_split(files[split, "images"], files[split, "labels"]) for split in ("train", "test"))
    rows, (height, width) = len(train.labels), train.images.shape[1:]
    if rows < MIN_IMAGES:
        raise DataError(f"{data} has {rows} training images, at least {MIN_IMAGES} are needed")
    if min(height, width) < MIN_SIDE:
        raise DataError(f"{data} has images of {height}x{width} pixels, at least {MIN_SIDE}x{MIN_SIDE} are needed")
    if test.images.shape[1:] != (height, width):
        sizes = "{}x{} pixels, but test images of {}x{}".format(height, width, *test.images.shape[1:])
        raise DataError(f"{data} has training images of {sizes}")

    labels = train.labels.unique()  # sorted; the labels of EMNIST letters begin with 1
    if len(labels) < 2:
        raise DataError(f"{data} has the label {int(labels[0])} on all training images")
    unknown = test.labels[~torch.isin(test.labels, labels)]
    if len(unknown):
        raise DataError(f"{data} has the label {int(unknown[0])} on a test image, but on no training image")
    class_names = [str(label) for label in labels.tolist()]
    if _is_fashion_mnist(data) and labels.tolist() == list(range(len(FASHION_MNIST_CLASSES))):
        class_names = FASHION_MNIST_CLASSES

    # The split depends only on the number of images, so that all seeds and models have the same one.
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    validation_rows, train_rows = order.split([rows // 10, rows - rows // 10])
    splits = {
        "train": Split(train.images[train_rows], train.labels[train_rows]),
        "validation": Split(train.images[validation_rows], train.labels[validation_rows]),
        "test": test,
    }
    splits = {
        name: Split(split.images, torch.searchsorted(labels, split.labels)) for name, split in splits.items()
    }
    pixels = splits["train"].images.double()
    if pixels.std() == 0:
        raise DataError(f"{data} has training images with the same value in all pixels")
    return ImageDataset(splits, class_names, pixels.mean().item(), pixels.std().item())


def _is_fashion_mnist(data: Path) -> bool:
    """Whether the name of the folder, or of its parent, contains "fashion". The file names are those of MNIST."""
    return any("fashion" in part.lower() for part in data.resolve().parts[-2:])


_FILE = re.compile(r"(.*?)(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")


def _find_files(data: Path) -> dict[tuple[str, str], Path]:
    """The files of a dataset, by ("train" or "test", "images" or "labels")."""
    folder, prefix = (data, "") if data.is_dir() else (data.parent, data.name)
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from None
    datasets: dict[str, dict[tuple[str, str], Path]] = {}
    for path in paths:
        match = _FILE.fullmatch(path.name)
        if match and match[1].startswith(prefix):
            split = "train" if match[2] == "train" else "test"
            datasets.setdefault(match[1], {}).setdefault((split, match[3]), path)
    if not datasets:
        raise DataError(f"{data} has no idx files such as train-images-idx3-ubyte.gz")
    if len(datasets) > 1:
        which = ", ".join(str(folder / name.rstrip("-")) for name in datasets)
        raise DataError(f"{data} has several datasets: choose one of {which}")
    (files,) = datasets.values()
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
        images = images.mT.contiguous()  # stored by columns
    return Split(images, labels.long())


def _read_idx(path: Path, axes: int) -> Tensor:
    """Read an array of bytes. The header is 0, 0, the type 8, the number of axes, and each length in 4 bytes."""
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
            f"{path} is not an idx file of bytes with {axes} axes: first bytes {content[:4].hex(' ') or 'missing'}"
        )
    shape = [int.from_bytes(content[4 * axis : 4 * axis + 4]) for axis in range(1, axes + 1)]
    if len(content) != start + math.prod(shape):
        size = " x ".join(map(str, shape))
        raise DataError(f"{path} has {len(content) - start} bytes after the header, not {size}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(shape)


# The network and its training


def build_model(settings: Settings, dataset: ImageDataset) -> torch.nn.Module:
    """Three convolutions, each with max pooling, batch norm and ReLU, and a linear classifier.

    The seed gives the initial weights.
    """
    layers = settings.layers
    torch.manual_seed(settings.seed)
    modules: dict[str, torch.nn.Module] = {}
    channels = [1, settings.width, 2 * settings.width, 4 * settings.width]
    for number, (inputs, outputs) in enumerate(pairwise(channels), start=1):
        size = 5 if number == 1 else 3
        modules[f"conv{number}"] = layers.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        modules[f"pool{number}"] = layers.MaxPool2d(2)  # first, so that norm and ReLU have a quarter of the work
        modules[f"norm{number}"] = layers.BatchNorm2d(outputs)
        modules[f"relu{number}"] = layers.ReLU()
    height, width = dataset.splits["train"].images.shape[1:]
    modules["flatten"] = layers.Flatten()
    modules["output"] = layers.Linear(channels[-1] * (height // 8) * (width // 8), len(dataset.class_names))
    return torch.nn.Sequential(OrderedDict(modules))


def augment(images: Tensor, shift: int, flip: bool) -> Tensor:
    """Shift each image at random by up to `shift` pixels along both axes. With `flip`, flip half of them.

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


def make_loader(
    dataset: ImageDataset, split: str, batch_size: int, augmentation: Settings | None = None
) -> DataLoader[tuple[Tensor, ...]]:
    """A loader of the images of a split. With `augmentation`, they are shuffled and augmented."""

    def collate(batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if augmentation is not None:
            images = augment(images, augmentation.shift, bool(augmentation.flip))
        return dataset.normalize(images), labels

    rows = TensorDataset(*dataset.splits[split])
    order = SequentialSampler(rows) if augmentation is None else RandomSampler(rows)
    drop_last = augmentation is not None and len(rows) % batch_size == 1  # batch norm needs two images
    batches = BatchSampler(order, batch_size, drop_last=drop_last)
    return DataLoader(rows, batch_size=None, sampler=batches, collate_fn=collate)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of correct predictions."""
    return (logits.argmax(1) == labels).float().mean()


@torch.no_grad()
def predict(model: torch.nn.Module, dataset: ImageDataset, split: str, device: torch.device) -> Tensor:
    """The logits of each image of a split: (n, classes), on the CPU."""
    images = dataset.splits[split].images
    return torch.cat([model(dataset.normalize(chunk).to(device)).cpu() for chunk in images.split(1000)])


# TensorBoard


def log_filters(log: TensorBoardLogger, step: int, weight: Tensor) -> None:
    """Log the filters of the first layer. White is positive, black negative, grey 0."""
    filters = weight.detach().cpu()[:, 0]
    shades = 127.5 + 127.5 * filters / filters.abs().amax((1, 2), keepdim=True)
    picture = grid(shades.byte(), [str(number) for number in range(1, len(filters) + 1)])
    log.add(step, lambda writer: add_pil_image(writer, "first_layer_filters", picture, step))


def log_mistakes(log: TensorBoardLogger, step: int, logits: Tensor, dataset: ImageDataset, split: str) -> None:
    """Log the confusion matrix, the worst mistakes, and the precision-recall curve of each class."""
    (images, labels), names = dataset.splits[split], dataset.class_names
    matrix = confusion_matrix(confusion_counts(labels, logits.argmax(1), len(names)), names)
    log.add(step, lambda writer: add_pil_image(writer, f"confusion_matrix/{split}", matrix, step))

    log_probabilities = logits.log_softmax(1)
    probabilities = log_probabilities.exp()
    highest, predicted = probabilities.max(1)
    of_label = log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    worst = wrong[of_label[wrong].argsort()[:MISTAKES_SHOWN]]
    captions = [
        f"true: {names[label]}\npredicted: {names[other]}\nat {probability:.1%}"
        for label, other, probability in zip(
            *(x[worst].tolist() for x in (labels, predicted, highest)), strict=True
        )
    ]
    mistakes = grid(images[worst], captions)
    log.add(step, lambda writer: add_pil_image(writer, f"worst_mistakes/{split}", mistakes, step))

    for number, name in enumerate(names):
        curve = (f"precision_recall_{split}/{name}", labels == number, probabilities[:, number], step)
        log.add(step, lambda writer, curve=curve: writer.add_pr_curve(*curve))


def train(settings: Settings) -> FitResult | None:
    """Read the data, train, and print the final figures."""
    dataset = read_dataset(settings.data or FASHION_MNIST)
    model = build_model(settings, dataset)
    train_loader = make_loader(dataset, "train", settings.batch_size, augmentation=settings)
    optimizer, schedule = settings.one_cycle(model, len(train_loader))
    loss = settings.layers.CrossEntropyLoss()
    logits: dict[str, Tensor] = {}

    def on_epoch_end(log: TensorBoardLogger, step: int) -> None:
        log_filters(log, step, full_tensor(model.get_parameter("conv1.weight")))
        log_mistakes(log, step, predict(model, dataset, "validation", trainer.device), dataset, "validation")

    def evaluate(log: TensorBoardLogger, step: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        for split, (_, labels) in dataset.splits.items():
            logits[split] = predict(model, dataset, split, trainer.device)
            figures[f"{split}_loss"] = loss(logits[split], labels).item()
            figures[f"{split}_accuracy"] = accuracy(logits[split], labels).item()
        log_mistakes(log, step, logits["test"], dataset, "test")
        return figures

    trainer = Trainer(
        model,
        loss,
        optimizer,
        train_loader,
        make_loader(dataset, "validation", 1000),
        settings=settings,
        lr_scheduler=schedule,
        metrics={"accuracy": accuracy},
        on_fit_end=evaluate,
        on_epoch_end=on_epoch_end,
    )
    result = trainer.fit()
    if not trainer.is_main_process:
        return None

    for name, style in (("accuracy", ".2%"), ("loss", ".4f")):
        values = [f"{split} {result.summary[f'{split}_{name}']:{style}}" for split in dataset.splits]
        print(f"{name}: {', '.join(values)}")
    names, labels = dataset.class_names, dataset.splits["test"].labels
    wrong = confusion_counts(labels, logits["test"].argmax(1), len(names)).fill_diagonal_(0)
    if wrong.any():
        true, predicted = divmod(int(wrong.argmax()), len(names))
        times = f"{int(wrong.max())} of {int(wrong.sum())}"
        print(f"most common mistake on the test images: {names[true]} predicted as {names[predicted]}, {times}")
    return result


if __name__ == "__main__":
    run(parse_settings(Settings).resolved(), train)
