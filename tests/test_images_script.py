"""scripts/train_images.py: its data, output, files and error messages."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_images
from graph import torch_derivatives
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manualgrad.training.checkpoint import list_checkpoints, load

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "train_images.py"
# More threads do not help with images this small, and they slow down other tests.
WARNINGS = f"error,{os.environ['PYTHONWARNINGS']}"  # for an untested torch: see conftest
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": WARNINGS}
torch.set_num_threads(1)
SMALL = ["--width", "4", "--batch-size", "32", "--log-every-n-steps", "5", "--learning-rate", "0.02"]

ScriptCall = Callable[..., tuple[int, str, str]]
NAMES = {
    (split, what): f"{split}-{what}-idx{axes}-ubyte"
    for split in ("train", "t10k")
    for what, axes in (("images", 3), ("labels", 1))
}


@pytest.fixture
def call(call_script: Callable[..., tuple[int, str, str]]) -> ScriptCall:
    return partial(call_script, SCRIPT)


def idx(array: np.ndarray) -> bytes:
    """An idx file: magic number, sizes, bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


def bars(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images of 9 x 12 pixels with a horizontal bar (0), a vertical bar (1), or none (2)."""
    generator = np.random.default_rng(seed)
    images, labels = generator.integers(0, 100, (count, 9, 12)), np.arange(count) % 3
    for image, label in zip(images, labels, strict=True):
        position = generator.integers(2, 7)
        if label == 0:
            image[position] = 250
        elif label == 1:
            image[:, position] = 250
    return images, labels


def write(folder: Path, changed: Mapping[str, bytes | None] | None = None) -> Path:
    """Write a dataset of 300 and 60 images. `changed` replaces the content of files, or removes them."""
    folder.mkdir()
    contents: dict[str, bytes | None] = {}
    for seed, (split, count) in enumerate({"train": 300, "t10k": 60}.items()):
        for what, array in zip(("images", "labels"), bars(count, seed), strict=True):
            contents[NAMES[split, what]] = idx(array)
    for name, content in {**contents, **(changed or {})}.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def figures(output: str) -> dict[str, list[float]]:
    """The train, validation and test values."""
    lines = re.findall(
        r"^(accuracy|loss): train (\S+?)%?, validation (\S+?)%?, test (\S+?)%?$", output, re.MULTILINE
    )
    return {name: [float(value) for value in values] for name, *values in lines}


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a run folder, except for speeds."""
    found = events(folder)
    tags = [tag for tag in found.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("model", ["manualgrad", "torch"])
def test_training_on_a_dataset(model: str, call: ScriptCall, tmp_path: Path) -> None:
    """The network learns, and the printed figures agree with the curves."""
    write(tmp_path / "bars")
    status, output, error = call("--data", "bars", *SMALL, "--max-epochs", 5, "--model", model)
    assert (status, error) == (0, "")
    shown = figures(output)
    assert min(shown["accuracy"]) > 90
    assert "curves: tensorboard --logdir runs\n" in output

    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"images-{model}-seed0-\d{{8}}-\d{{6}}", folder.name)
    curves = scalars(folder)
    # 270 images for training make 9 batches.
    assert [step for step, _ in curves["loss/validation_epoch"]] == [9, 18, 27, 36, 45]
    assert curves["summary/test_accuracy"] == [(46, pytest.approx(shown["accuracy"][2] / 100, abs=1e-4))]
    assert curves["summary/test_loss"] == [(46, pytest.approx(shown["loss"][2], abs=1e-4))]
    assert shown["loss"][1] == pytest.approx(min(value for _, value in curves["loss/validation_epoch"]), abs=1e-4)
    best = load(folder / "best.pt")["trainer_state"]["best_epoch"] - 1
    assert shown["accuracy"][1] == pytest.approx(100 * curves["accuracy/validation_epoch"][best][1], abs=1e-2)


def test_tensorboard_content(call: ScriptCall, tmp_path: Path) -> None:
    """Of the validation images after each epoch, of the test images at the end."""
    write(tmp_path / "bars")
    assert (
        call("--data", "bars", *SMALL, "--max-epochs", 2, "--histograms-every-n-epochs", 1, "--run-dir", "run")[0]
        == 0
    )
    found = events(tmp_path / "run")
    steps = {tag: [image.step for image in found.Images(tag)] for tag in found.Tags()["images"]}
    validation = {
        "confusion_matrix/validation",
        "worst_mistakes/validation",
        "first_layer_filters",
        "gradient_flow",
    }
    assert steps == {tag: [9, 18] for tag in validation} | {
        "confusion_matrix/test": [19],
        "worst_mistakes/test": [19],
        "saved_bytes": [0],
    }
    curves = {
        tag: [point.step for point in found.Tensors(tag)] for tag in found.Tags()["tensors"] if "recall" in tag
    }
    assert curves == {f"precision_recall_validation/{name}": [9, 18] for name in "012"} | {
        f"precision_recall_test/{name}": [19] for name in "012"
    }
    texts = {"settings/text_summary", "summary/text_summary", "saved_bytes/text_summary"}
    assert texts <= set(found.Tags()["tensors"])


def test_worst_mistakes_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the probability of the true class. The confusion matrix counts all."""
    seen: list[Any] = []
    monkeypatch.setattr(train_images, "grid", lambda images, captions: seen.append((images, captions)))
    monkeypatch.setattr(train_images, "confusion_matrix", lambda counts, names: seen.append((counts, names)))
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1).expand(4, 2, 2)
    labels = torch.tensor([0, 1, 1, 0])
    logits = torch.tensor([[5.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.5]])
    dataset = train_images.ImageDataset({"test": train_images.Split(images, labels)}, ["cat", "dog"], 0.0, 1.0)
    with train_images.TensorBoardLogger(None, 1) as log:
        train_images.log_mistakes(log, 1, logits, dataset, "test")
    (counts, names), (worst, captions) = seen
    assert counts.tolist() == [[1, 1], [2, 0]]
    assert names == ["cat", "dog"]
    assert worst[:, 0, 0].tolist() == [2, 3, 1]
    assert captions == [
        "true: dog\npredicted: cat\nat 88.1%",
        "true: cat\npredicted: dog\nat 81.8%",
        "true: dog\npredicted: cat\nat 73.1%",
    ]


def test_manualgrad_and_torch_have_the_same_curves(call: ScriptCall, tmp_path: Path) -> None:
    write(tmp_path / "bars")
    for model in ("manualgrad", "torch"):
        arguments = [
            *SMALL,
            "--max-epochs",
            2,
            "--log-every-n-steps",
            1,
            "--learning-rate",
            1e-3,
            "--model",
            model,
        ]
        assert call("--data", "bars", *arguments, "--run-dir", model)[0] == 0
    manual_curves, torch_curves = scalars(tmp_path / "manualgrad"), scalars(tmp_path / "torch")
    assert manual_curves.keys() == torch_curves.keys()
    assert (
        manual_curves["loss/train"][0] == torch_curves["loss/train"][0]
    )  # from the same weights, on the same images
    for tag in ("loss/train", "optimizer/gradient_norm", "loss/validation_epoch"):
        steps, values = zip(*manual_curves[tag], strict=True)
        assert steps == tuple(step for step, _ in torch_curves[tag])
        assert values == pytest.approx([value for _, value in torch_curves[tag]], rel=1e-3)


def test_every_gradient_is_manual(tmp_path: Path) -> None:
    dataset = train_images.read_dataset(write(tmp_path / "bars"))
    images, labels = next(
        iter(train_images.make_loader(dataset, "train", 8, augmentation=train_images.Settings()))
    )
    assert images.shape == (8, 1, 9, 12)
    hidden = train_images.build_model(train_images.Settings(), dataset).get_submodule("conv1")(images)
    assert hidden.is_contiguous(memory_format=torch.channels_last)
    for settings in (train_images.Settings(width=4), train_images.Settings(width=4, model="torch")):
        loss = settings.layers.CrossEntropyLoss()(train_images.build_model(settings, dataset)(images), labels)
        assert bool(torch_derivatives(loss)) == (settings.model == "torch")


def test_included_fashion_mnist(call: ScriptCall) -> None:
    """One epoch of a narrow network learns something."""
    status, output, error = call("--max-epochs", 1, "--width", 8, "--batch-size", 64, "--learning-rate", 0.01)
    assert (status, error) == (0, "")
    assert figures(output)["accuracy"][2] > 60
    assert re.search(r"most common mistake on the test images: [A-Z].* predicted as [A-Z].*, \d+ of \d+\n", output)
    dataset = train_images.read_dataset(train_images.FASHION_MNIST)
    assert dataset.class_names[0] == "T-shirt/top"
    assert dataset.class_names[9] == "Ankle boot"
    whole = torch.cat([dataset.splits[split].labels for split in ("train", "validation")])
    assert whole.bincount().tolist() == [600] * 10
    assert dataset.splits["test"].labels.bincount().tolist() == [100] * 10
    inputs = dataset.normalize(dataset.splits["train"].images)
    assert inputs.mean().item() == pytest.approx(0, abs=1e-3)
    assert inputs.std().item() == pytest.approx(1, abs=1e-3)


def test_flip_by_default(tmp_path: Path) -> None:
    """Only Fashion-MNIST is flipped."""
    assert train_images.Settings().resolved().flip is True
    assert train_images.Settings(data=tmp_path / "Fashion-MNIST" / "raw").resolved().flip is True
    assert train_images.Settings(data=tmp_path / "mnist").resolved().flip is False
    assert train_images.Settings(data=tmp_path / "fashion" / "data" / "mnist").resolved().flip is False
    assert train_images.Settings(data=tmp_path / "mnist", flip=True).resolved().flip is True
    assert train_images.Settings(flip=False).resolved().flip is False


def test_augment() -> None:
    """Images are shifted by up to two pixels, filled with zeros, and flipped or not. All 50 cases occur."""
    torch.manual_seed(0)
    images = torch.randint(1, 256, (500, 5, 6), dtype=torch.uint8)
    seen = set()
    for image, augmented in zip(images, train_images.augment(images, 2, True), strict=True):
        padded = torch.nn.functional.pad(image, [2] * 4)
        candidates = {
            (down, across, flipped): part.flip(1) if flipped else part
            for down in range(5)
            for across in range(5)
            for part in [padded[down : down + 5, across : across + 6]]
            for flipped in (False, True)
        }
        (case,) = [case for case, part in candidates.items() if torch.equal(part, augmented)]
        seen.add(case)
    assert len(seen) == 50
    assert torch.equal(train_images.augment(images, 0, False), images)


def test_only_training_images_are_augmented(tmp_path: Path) -> None:
    dataset = train_images.read_dataset(write(tmp_path / "bars"))
    settings = train_images.Settings()
    training = train_images.make_loader(dataset, "train", 270, augmentation=settings)
    (first,), (second,) = list(training), list(training)
    assert (
        sorted(first[1].tolist()) == sorted(second[1].tolist()) == sorted(dataset.splits["train"].labels.tolist())
    )
    assert first[0].sum() != second[0].sum()
    ((images, labels),) = train_images.make_loader(dataset, "validation", 1000)
    assert torch.equal(images, dataset.normalize(dataset.splits["validation"].images))
    assert torch.equal(labels, dataset.splits["validation"].labels)


def test_last_batch_of_one_image_is_dropped(call: ScriptCall, tmp_path: Path) -> None:
    """Batch norm needs two values per channel in training; 8 x 8 pixels become 1 x 1."""
    images, labels = bars(300, 0)
    images = images[:, :8, :8]
    files = {"train": (images, labels), "t10k": (images[:61], labels[:61])}
    contents = {
        NAMES[split, what]: idx(array)
        for split, arrays in files.items()
        for what, array in zip(("images", "labels"), arrays, strict=True)
    }
    write(tmp_path / "small", contents)
    status, output, error = call("--data", "small", "--width", 4, "--batch-size", 269, "--max-epochs", 1)
    assert (status, error) == (0, "")
    assert list(figures(output)) == ["accuracy", "loss"]


def test_training_and_validation_are_disjoint(tmp_path: Path) -> None:
    """Each image keeps its label."""
    images, labels = np.zeros((250, 8, 8)) + np.arange(250)[:, None, None], np.arange(250) % 7
    folder = write(
        tmp_path / "numbers",
        {
            NAMES["train", "images"]: idx(images),
            NAMES["train", "labels"]: idx(labels),
            NAMES["t10k", "images"]: idx(images[:9]),
            NAMES["t10k", "labels"]: idx(labels[:9]),
        },
    )
    splits = train_images.read_dataset(folder).splits
    found = {name: split.images[:, 0, 0].tolist() for name, split in splits.items()}
    assert len(found["validation"]) == 25
    assert sorted(found["train"] + found["validation"]) == list(range(250))
    assert found["test"] == list(range(9))
    for name, split in splits.items():
        assert split.labels.tolist() == [image % 7 for image in found[name]]


def test_emnist(call: ScriptCall, tmp_path: Path) -> None:
    """Several datasets in a folder, images stored by columns, labels from 1, compressed files."""
    for name in ("letters", "digits"):
        for split, seed in (("train", 0), ("test", 1)):
            images, labels = bars(60, seed)
            files = {"images-idx3": images.transpose(0, 2, 1), "labels-idx1": labels + (name == "letters")}
            for what, array in files.items():
                (tmp_path / f"emnist-{name}-{split}-{what}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    dataset = train_images.read_dataset(tmp_path / "emnist-letters")
    assert dataset.class_names == ["1", "2", "3"]
    images, labels = bars(60, 1)
    assert torch.equal(dataset.splits["test"].images, torch.tensor(images, dtype=torch.uint8))
    assert dataset.splits["test"].labels.tolist() == labels.tolist()
    assert train_images.read_dataset(tmp_path / "emnist-digits").class_names == ["0", "1", "2"]
    line = "error: . has several datasets: choose one of emnist-digits, emnist-letters\n"
    assert call("--data", ".") == (2, "", line)


def test_names_with_a_dot_and_compressed_files_without_suffix(tmp_path: Path) -> None:
    folder = write(tmp_path / "bars")
    expected = train_images.read_dataset(folder)
    for path in list(folder.iterdir()):
        path.with_name(path.name.replace("-idx", ".idx")).write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    found = train_images.read_dataset(folder)
    for split in ("train", "validation", "test"):
        assert torch.equal(found.splits[split].images, expected.splits[split].images)


IMAGES, LABELS = NAMES["train", "images"], NAMES["train", "labels"]
TEST_IMAGES, TEST_LABELS = NAMES["t10k", "images"], NAMES["t10k", "labels"]
WHOLE = idx(bars(300, 0)[0])


@pytest.mark.parametrize(
    ("line", "changed", "arguments"),
    [
        ("nowhere cannot be read: No such file or directory", {}, ["--data", "nowhere/bars"]),
        ("bars/mnist has no idx files such as train-images-idx3-ubyte.gz", {}, ["--data", "bars/mnist"]),
        ("bars has no idx files", dict.fromkeys(NAMES.values()), []),
        ("bars has no file of train labels", {LABELS: None}, []),
        ("bars has no file of test images", {TEST_IMAGES: None}, []),
        (f"bars/{IMAGES} is not an idx file of bytes with 3 axes: first bytes missing", {IMAGES: b""}, []),
        (
            f"bars/{IMAGES} is not an idx file of bytes with 3 axes: first bytes 89 50 4e 47",
            {IMAGES: b"\x89PNG"},
            [],
        ),
        (
            f"bars/{IMAGES} is not an idx file of bytes with 3 axes: first bytes 00 00 08 01",
            {IMAGES: idx(np.ones(300))},
            [],
        ),
        (f"bars/{IMAGES} is not an idx file of bytes with 3 axes", {IMAGES: WHOLE[:10]}, []),
        (
            f"bars/{IMAGES} has 984 bytes after the header, not 300 x 9 x 12",
            {IMAGES: WHOLE[:1000]},
            [],
        ),
        (
            f"bars/{IMAGES} has 32401 bytes after the header, not 300 x 9 x 12",
            {IMAGES: WHOLE + b"x"},
            [],
        ),
        (f"bars/{IMAGES} is a broken gzip file: Compressed file ended", {IMAGES: gzip.compress(WHOLE)[:-100]}, []),
        (
            f"bars/{IMAGES} is a broken gzip file: CRC",
            {IMAGES: gzip.compress(WHOLE, mtime=0)[:-8] + b"12345678"},
            [],
        ),
        (f"bars/{IMAGES} is a broken gzip file: Error -3", {IMAGES: gzip.compress(b"")[:10] + b"\xff" * 50}, []),
        (f"bars/{IMAGES} is a broken gzip file", {IMAGES: b"\x1f\x8b"}, []),
        (f"bars/{IMAGES} has 300 images and bars/{LABELS} 299 labels", {LABELS: idx(np.arange(299) % 3)}, []),
        (
            f"bars/{TEST_IMAGES} has no images",
            {TEST_IMAGES: idx(np.ones((0, 9, 12))), TEST_LABELS: idx(np.ones(0))},
            [],
        ),
        (
            "bars has 19 training images, at least 20 are needed",
            {IMAGES: idx(bars(19, 0)[0]), LABELS: idx(bars(19, 0)[1])},
            [],
        ),
        ("bars has images of 9x7 pixels, at least 8x8 are needed", {IMAGES: idx(np.ones((300, 9, 7)))}, []),
        (
            "bars has training images of 9x12 pixels, but test images of 8x12",
            {TEST_IMAGES: idx(np.ones((60, 8, 12)))},
            [],
        ),
        (
            "bars has the label 1 on all training images",
            {LABELS: idx(np.ones(300))},
            [],
        ),
        ("bars has the label 7 on a test image, but on no training image", {TEST_LABELS: idx(np.full(60, 7))}, []),
        ("bars has training images with the same value in all pixels", {IMAGES: idx(np.ones((300, 9, 12)))}, []),
        ("--shift: Input should be greater than or equal to 0 (got -1)", {}, ["--shift", "-1"]),
        ("--width: Input should be greater than 0 (got 0)", {}, ["--width", "0"]),
        ("--batch-size: Input should be greater than or equal to 2 (got 1)", {}, ["--batch-size", "1"]),
        ("--model: Input should be 'manualgrad' or 'torch' (got other)", {}, ["--model", "other"]),
        ("--settings: mine.json cannot be read: No such file or directory", {}, ["--settings", "mine.json"]),
        ("unrecognized arguments: --mirror", {}, ["--mirror"]),
    ],
)
def test_wrong_input_gives_one_error_line(
    line: str, changed: dict[str, bytes | None], arguments: list[str], call: ScriptCall, tmp_path: Path
) -> None:
    """Exit status 2, and no file is written."""
    write(tmp_path / "bars", changed)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    status, output, error = call("--data", "bars", *arguments)
    assert (status, output) == (2, "")
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_unreadable_file(call: ScriptCall, tmp_path: Path) -> None:
    folder = write(tmp_path / "bars", {IMAGES: None})
    (folder / IMAGES).mkdir()
    assert call("--data", "bars") == (2, "", f"error: bars/{IMAGES} cannot be read: Is a directory\n")


def test_run_resumes_in_the_middle_of_an_epoch(call: ScriptCall, tmp_path: Path) -> None:
    """It equals an uninterrupted run. It is not overwritten, and not resumed with other hyperparameters."""
    write(tmp_path / "bars")
    arguments = [
        "--data",
        "bars",
        *SMALL,
        "--max-epochs",
        3,
        "--log-every-n-steps",
        1,
        "--checkpoint-every-n-steps",
        4,
    ]
    status, uninterrupted, _ = call(*arguments, "--keep-last", 99, "--run-dir", "whole")
    assert status == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for path in list_checkpoints(tmp_path / "stopped"):
        if int(path.stem.removeprefix("step-")) > 12:  # 9 updates make an epoch
            path.unlink()
    message = "error: stopped holds a run already: resume it or take another folder\n"
    assert call(*arguments, "--run-dir", "stopped") == (2, "", message)
    status, _, error = call(*arguments, "--run-dir", "stopped", "--resume-from-checkpoint", "--shift", 1)
    assert (status, error.count("is of a different run: shift is 2 in the checkpoint and 1 here\n")) == (2, 1)

    status, resumed, error = call(*arguments, "--run-dir", "stopped", "--resume-from-checkpoint")
    assert (status, error) == (0, "")
    assert figures(resumed) == figures(uninterrupted)
    assert scalars(tmp_path / "stopped") == scalars(tmp_path / "whole")
    resumed_events, whole_events = events(tmp_path / "stopped"), events(tmp_path / "whole")
    for tag in ("confusion_matrix/validation", "worst_mistakes/validation", "first_layer_filters"):
        once, again = (
            {image.step: image.encoded_image_string for image in log.Images(tag)}
            for log in (resumed_events, whole_events)
        )
        assert once == again


def test_run_is_repeated_from_its_settings(call: ScriptCall, tmp_path: Path) -> None:
    write(tmp_path / "bars")
    assert call("--data", "bars", *SMALL, "--max-epochs", 1, "--seed", 3, "--flip", "--run-dir", "first")[0] == 0
    assert call("--settings", "first/settings.json", "--run-dir", "second")[0] == 0
    first, second = (
        json.loads((tmp_path / name / "settings.json").read_text())["settings"] for name in ("first", "second")
    )
    differing = {name for name in first if first[name] != second[name]}
    assert differing == {"run_dir", "settings"}
    assert (second["flip"], second["width"]) == (True, 4)
    assert scalars(tmp_path / "first") == scalars(tmp_path / "second")


def process(folder: Path, *arguments: object, **environment: str) -> str:
    """Run python in its own process in `folder`. It must succeed. Return its output."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_several_processes(tmp_path: Path) -> None:
    """Under torchrun with FSDP, only the main process prints and logs."""
    write(tmp_path / "bars")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, SCRIPT]
    arguments = ["--data", "bars", *SMALL, "--max-epochs", 2, "--strategy", "fsdp", "--run-dir", "run"]
    output = process(tmp_path, *torchrun, *arguments, PYTHONWARNINGS=os.environ["PYTHONWARNINGS"])
    assert list(figures(output)) == ["accuracy", "loss"]
    assert output.count("accuracy:") == 1
    assert {"confusion_matrix/test", "first_layer_filters"} <= set(events(tmp_path / "run").Tags()["images"])


def test_help_explains_every_option(tmp_path: Path) -> None:
    output = process(tmp_path, SCRIPT, "--help")
    assert output.startswith("usage: train_images.py")
    assert "Classify images" in output
    options, defaults = output.count("\n  --"), output.count("(default:")
    assert options == defaults > 20  # every option has an explanation, which ends with the default
