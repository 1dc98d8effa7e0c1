"""scripts/train_regression.py: its output, its files and its error messages."""

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manualgrad.training.checkpoint import list_checkpoints, load

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "train_regression.py"
# More threads do not help with matrices this small, and they slow down other tests.
WARNINGS = f"error,{os.environ['PYTHONWARNINGS']}"  # for an untested torch: see conftest
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": WARNINGS}
torch.set_num_threads(1)
SMALL = [
    "--width",
    "16",
    "--depth",
    "1",
    "--batch-size",
    "32",
    "--log-every-n-steps",
    "5",
    "--learning-rate",
    "0.01",
]


def run(folder: Path, *arguments: object) -> str:
    """Run the script in its own process in `folder`. It must succeed without a warning."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def call(call_script: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    return partial(call_script, SCRIPT)


ScriptCall = Callable[..., tuple[int, str, str]]


def table(rows: int = 300) -> pd.DataFrame:
    """Houses with a price that depends on area, age and quarter."""
    generator = np.random.default_rng(0)
    area, age = generator.uniform(30, 200, rows), generator.integers(0, 100, rows)
    quarter = generator.choice(["old town", "harbour", "hills"], rows)
    price = area * 40 * np.where(quarter == "hills", 1.5, 1.0) * np.exp(-age / 200)
    return pd.DataFrame({"area": area, "age": age, "quarter": quarter, "garden": area > 150, "price": price})


def write(folder: Path, table: pd.DataFrame) -> Path:
    path = folder / "houses.csv"
    table.to_csv(path, index=False)
    return path


def figures(output: str) -> dict[str, list[float]]:
    """The train, validation and test values of the MSE and R² lines."""
    lines = re.findall(r"^(MSE|R²) of .*: train (\S+), validation (\S+), test (\S+)$", output, re.MULTILINE)
    return {name: [float(value) for value in values] for name, *values in lines}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a run folder, except for speeds."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("model", ["manualgrad", "torch"])
def test_training_on_a_table(model: str, tmp_path: Path) -> None:
    """The network learns, and the printed figures agree with the curves."""
    data = write(tmp_path, table())
    settings = [*SMALL, "--max-epochs", "60", "--model", model, "--log-target"]
    output = run(tmp_path, "--data", data, "--target", "price", *settings)
    shown = figures(output)
    assert "MSE of the log price" in output
    assert min(shown["R²"]) > 0.9
    assert re.search(r"median error of the test rows: \d+\.\d% of the price\n", output)
    assert "curves: tensorboard --logdir runs\n" in output

    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"regression-{model}-seed0-\d{{8}}-\d{{6}}", folder.name)
    curves = scalars(folder)
    # 210 rows for training make 7 batches.
    assert [step for step, _ in curves["loss/validation_epoch"]] == list(range(7, 421, 7))
    assert [step for step, _ in curves["loss/train"]] == list(range(5, 421, 5))
    assert curves["summary/test_mse"] == [(421, pytest.approx(shown["MSE"][2], rel=1e-3))]
    assert curves["summary/test_r2"] == [(421, pytest.approx(shown["R²"][2], rel=1e-3))]
    validation = [value for _, value in curves["loss/validation_epoch"]]  # of the target, nearly standardized
    variance = np.log(table()["price"]).var()
    assert shown["MSE"][1] == pytest.approx(min(validation) * variance, rel=0.1)
    assert load(folder / "best.pt")["trainer_state"]["best_epoch"] == 1 + validation.index(min(validation))
    histograms = EventAccumulator(str(folder)).Reload().Tags()["histograms"]
    layers, parts = ("linear1", "norm1", "output"), ("weight", "bias")
    assert {tag.split("/")[1] for tag in histograms} == {f"{name}.{part}" for name in layers for part in parts}


def test_manualgrad_and_torch_have_the_same_curves(call: ScriptCall, tmp_path: Path) -> None:
    write(tmp_path, table())
    for model in ("manualgrad", "torch"):
        arguments = ["--max-epochs", 5, "--dtype", "float64", "--model", model, "--run-dir", model]
        status, _, _ = call("--data", "houses.csv", "--target", "price", *SMALL, *arguments)
        assert status == 0
    manual_curves, torch_curves = scalars(tmp_path / "manualgrad"), scalars(tmp_path / "torch")
    assert manual_curves.keys() == torch_curves.keys()
    for tag, points in manual_curves.items():
        steps, values = zip(*points, strict=True)
        assert steps == tuple(step for step, _ in torch_curves[tag])
        assert values == pytest.approx([value for _, value in torch_curves[tag]], rel=1e-6)
    assert load(list_checkpoints(tmp_path / "manualgrad")[0])["model"]["linear1.weight"].dtype == torch.float64


def test_included_diamonds(tmp_path: Path) -> None:
    """Two epochs of large batches are enough to predict the price."""
    output = run(tmp_path, "--max-epochs", 2, "--batch-size", 512, "--width", 64, "--depth", 2)
    assert "MSE of the log price" in output
    assert figures(output)["R²"][2] > 0.95


def test_missing_and_unseen_values(call: ScriptCall, tmp_path: Path) -> None:
    """Missing numbers and texts, an empty column, a constant column, and texts of a single row."""
    gaps = table()
    gaps.loc[::7, "area"] = np.nan
    gaps.loc[3::11, "quarter"] = np.nan
    gaps["empty"] = np.nan
    gaps["constant"] = 5
    gaps["rare"] = [f"kind {row}" if row % 10 == 0 else "common" for row in range(len(gaps))]
    write(tmp_path, gaps)
    status, output, error = call("--data", "houses.csv", "--target", "price", *SMALL, "--max-epochs", 30)
    assert (status, error) == (0, "")
    assert figures(output)["R²"][0] > 0.5
    assert re.search(r"median error of the test rows: \d+(\.\d+)?\n", output)  # in its units


def with_cell(column: str, row: int, value: object) -> pd.DataFrame:
    """The houses with one changed cell. Rows are counted from 1."""
    changed = table().astype(object)
    changed.loc[row - 1, column] = value
    return changed


AREA = "area,price\n"


@pytest.mark.parametrize(
    ("line", "content", "arguments"),
    [
        ("houses.csv cannot be read: No such file or directory", None, []),
        ("houses.csv is empty", "", []),
        ("houses.csv has no column 'price'; it has 'a', 'b'", "a,b\n1,2\n", []),
        ("houses.csv has 1 rows, at least 50 are needed", AREA + "1,2\n", []),
        ("houses.csv has no column to predict 'price' from", table()[["price"]], []),
        ("houses.csv is not a valid table: Error tokenizing data", AREA + "1,2\n1,2,3\n", []),
        ("houses.csv has rows with more cells than the header", AREA + "1,2,3\n" * 60, []),
        ("houses.csv is not UTF-8 text", b"area,price\n\xff\xfe,2\n", []),
        ("column 'age' has numbers, but 'unknown' in row 17", with_cell("age", 17, "unknown"), []),
        ("column 'age' has numbers, but 'inf' in row 3", with_cell("age", 3, np.inf), []),
        (
            "column 'name' has 210 different texts, at most 200 are possible",
            table().assign(name=[f"house {row}" for row in range(300)]),
            [],
        ),
        ("the target 'quarter' is text, such as", table(), ["--target", "quarter"]),
        ("column 'price' has numbers, but 'on request' in row 5", with_cell("price", 5, "on request"), []),
        ("the target 'price' is missing in row 9", with_cell("price", 9, None), []),
        ("the target 'price' is -3 in row 9, so it has no log", with_cell("price", 9, -3), ["--log-target"]),
        ("the target 'price' is the same in all training rows", table().assign(price=1), []),
        ("--max-epochs: Input should be greater than 0 (got -3)", table(), ["--max-epochs", "-3"]),
        ("--precision bfloat16 needs --dtype float32", table(), ["--dtype", "float64", "--precision", "bfloat16"]),
        ("--device: torch finds", table(), ["--device", "cuda:99"]),
        ("unrecognized arguments: --epoch", table(), ["--epoch", "3"]),
    ],
)
def test_wrong_input_gives_one_error_line(
    line: str, content: pd.DataFrame | str | bytes | None, arguments: list[str], call: ScriptCall, tmp_path: Path
) -> None:
    """Exit status 2, and no file is written."""
    match content:
        case pd.DataFrame():
            write(tmp_path, content)
        case str():
            (tmp_path / "houses.csv").write_text(content)
        case bytes():
            (tmp_path / "houses.csv").write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    status, output, error = call("--data", "houses.csv", "--target", "price", *arguments)
    assert (status, output) == (2, "")
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_wrong_input_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--data", "houses.csv"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    line = "error: --data needs --target, the name of the column to predict\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_help_explains_every_option(tmp_path: Path) -> None:
    output = run(tmp_path, "--help")
    assert output.startswith("usage: train_regression.py")
    assert "Predict a column of a table" in output
    options, defaults = output.count("\n  --"), output.count("(default:")
    assert options == defaults > 20  # every option has an explanation, which ends with the default


def test_interrupted_run_prints_how_to_continue(tmp_path: Path) -> None:
    """After Ctrl-C, the printed command completes the run. Its curves are those of an uninterrupted run."""
    data = write(tmp_path, table(2000))
    arguments = [*map(str, ["--data", data, "--target", "price"]), *SMALL, "--max-epochs", "20"]
    run(tmp_path, *arguments, "--run-dir", "whole")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process inherits ignored signals
    try:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *arguments],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    while steps_done(tmp_path) == 0:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate()
    assert (process.returncode, output) == (130, "")
    assert re.fullmatch(r"interrupted; to continue: python .*\n", error)

    assert 0 < steps_done(tmp_path) < 20 * math.ceil(1400 / 32)
    command = shlex.split(error.partition("continue: ")[2])
    assert command[:2] == ["python", str(SCRIPT)]
    assert len(figures(run(tmp_path, *command[2:]))["MSE"]) == 3
    (folder,) = (tmp_path / "runs").iterdir()
    assert scalars(folder) == scalars(tmp_path / "whole")


def steps_done(folder: Path) -> int:
    """The step of the newest checkpoint of the only run under runs/, or 0."""
    return max((int(path.stem.removeprefix("step-")) for path in folder.glob("runs/*/step-*.pt")), default=0)


def test_run_is_not_overwritten(call: ScriptCall, tmp_path: Path) -> None:
    """And not resumed with other hyperparameters."""
    write(tmp_path, table())
    arguments = ["--data", "houses.csv", "--target", "price", *SMALL, "--max-epochs", 1, "--run-dir", "mine"]
    assert call(*arguments)[0] == 0
    message = "error: mine holds a run already: resume it or take another folder\n"
    assert call(*arguments) == (2, "", message)
    message = "error: mine/step-0000000007.pt is of a different run: width is 16 in the checkpoint and 32 here\n"
    assert call(*arguments, "--width", 32, "--resume-from-checkpoint") == (2, "", message)


def test_divergence_ends_with_one_error_line(call: ScriptCall, tmp_path: Path) -> None:
    """Exit status 1, and the line contains the layer."""
    write(tmp_path, table())
    arguments = ["--target", "price", *SMALL, "--learning-rate", 1e30, "--weight-decay", 0]
    status, output, error = call("--data", "houses.csv", *arguments)
    assert (status, output) == (1, "")
    named = r"step \d+ \(epoch 1, update \d+\): the \w+( of '\w+')? is NaN or infinite; a lower --learning-rate"
    saved = r"the batches, the weights before the update and the random states are in runs/.*/nonfinite-step-2.pt"
    pattern = rf"error: {named} may help; {saved}\n"
    assert re.fullmatch(pattern, error)
