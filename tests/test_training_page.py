"""manualgrad/training/README.md shows what the code does."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from manualgrad.training import Trainer, TrainingSettings
from manualgrad.training import tensorboard_logger as logger

FOLDER = Path(inspect.getfile(Trainer)).parent
PAGE = (FOLDER / "README.md").read_text()

torch.set_num_threads(1)


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes the files of the table, and begins and resumes with the same code."""
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(from .*?)```", PAGE, re.S)
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        exec(example, {"__name__": "example"})
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert re.fullmatch(r"validation loss 0\.\d{3} after epoch \d\n", outputs[0])
    table = PAGE[PAGE.index("A run directory has") : PAGE.index("A checkpoint holds")]
    patterns = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    files = list((tmp_path / "runs/example").iterdir())
    assert {"best.pt", "settings.json", "step-0000000090.pt"} < {file.name for file in files}
    assert all(any(file.match(pattern) for pattern in patterns) for file in files), files


def test_the_loop_shown_is_the_loop() -> None:
    assert inspect.getsource(Trainer._train_epoch) in PAGE


def test_names_exist() -> None:
    """Settings, arguments, options, links and scripts."""
    options = {f"--{name.replace('_', '-')}" for name in TrainingSettings.model_fields} | {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", PAGE)) <= options | {"--logdir", "--nproc-per-node"}
    for name in re.findall(r"`(\w+)=", PAGE):
        assert (
            name in TrainingSettings.model_fields
            or name in inspect.signature(Trainer).parameters
            or name
            in (
                "reduction",
                "in_order",
                "weights_only",
            )
        )
    for callback in re.findall(r"`(on_\w+)\(logger, step\)`", PAGE):
        assert callback in inspect.signature(Trainer).parameters
    assert "def add(" in inspect.getsource(logger.TensorBoardLogger)
    for target in re.findall(r"\]\(([^)h][^)]*)\)", PAGE):
        assert (FOLDER / target).exists(), target
    for script in re.findall(r"scripts/\w+\.py", PAGE):
        assert (FOLDER.parents[1] / script).exists(), script


def test_every_setting_with_a_value_shown_accepts_it() -> None:
    for name, value in re.findall(r"`(on_\w+)=\"(\w+)\"`", PAGE):
        TrainingSettings(**{name: value})
