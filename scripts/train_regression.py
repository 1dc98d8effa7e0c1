"""Learn one column of a table from the others, with a network whose every gradient is written by hand.

    python scripts/train_regression.py                                    log price of the diamonds
    python scripts/train_regression.py --data houses.csv --target price   any table
    python scripts/train_regression.py --model torch                      the same network in plain torch.nn

The curves, the weights and the final figures go to a folder under runs/:  tensorboard --logdir runs
"""

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from manualgrad.training import DataError, FitResult, TaskSettings, Trainer, parse_settings, run

DIAMONDS = Path(__file__).parent / "data" / "diamonds.csv.bz2"
FEWEST_ROWS = 50
MOST_CATEGORIES = 200


class Settings(TaskSettings):
    """Learn one column of a table from the others: by default, the log price of 53,940 diamonds."""

    data: Path | None = None
    """A CSV file with a header, compressed or not; by default the diamonds that come with this script."""
    target: str = "price"
    """The column to learn; to be named where --data is."""
    log_target: bool | None = None
    """Learn the logarithm of the target; by default only for the price of the diamonds."""
    width: PositiveInt = 128
    """Units in each hidden layer."""
    depth: PositiveInt = 3
    """Hidden layers."""
    dtype: Literal["float32", "float64"] = "float32"
    """The type of weights and data."""
    max_epochs: PositiveInt = 40
    """How many times to go through the training data."""
    task: ClassVar[str] = "regression"

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.data is not None and "target" not in self.model_fields_set:
            raise ValueError("--data needs --target, the name of the column to learn")
        if self.dtype == "float64" and self.precision != "float32":
            raise ValueError(f"--precision {self.precision} is for --dtype float32")
        return self

    def resolved(self) -> Self:
        """These settings with values for those whose default depends on the others."""
        price = self.data is None and self.target == "price"
        log_target = price if self.log_target is None else self.log_target
        return super().resolved().model_copy(update={"log_target": log_target})


# The table


class Table(NamedTuple):
    """A table as tensors, standardised by its training rows, and the rows of each split."""

    inputs: Tensor
    """(rows, features)"""
    targets: Tensor
    """(rows, 1)"""
    splits: dict[str, Tensor]
    """The row numbers of "train" (70 %), "validation" (10 %) and "test" (20 %)."""
    name: str
    """What the target is called, "log price" for a logarithm."""
    mean: float
    std: float
    """Of the target in the training rows: target = mean + std · targets."""


def read_table(path: Path, target: str, logarithm: bool, dtype: torch.dtype) -> Table:
    """Read a CSV file and prepare it for learning `target` from all the other columns.

    Raises:
        DataError: for a file that is missing or no table, and for values that cannot be used.
    """
    table = _read_csv(path)
    if target not in table:
        raise DataError(f"{path} has no column {target!r}; it has {', '.join(map(repr, table.columns))}")
    if len(table) < FEWEST_ROWS:
        raise DataError(f"{path} has too few rows: {len(table)}, where {FEWEST_ROWS} are needed")

    # The split depends on the number of rows alone: every seed and every model is tested on the same ones.
    rows = len(table)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    test, validation, training = order.split([rows // 5, rows // 10, rows - rows // 5 - rows // 10])
    train = training.numpy()

    values = _target(table.pop(target), logarithm)
    mean, std = values[train].mean(), values[train].std()
    if std == 0:
        raise DataError(f"the target {target!r} is the same in all training rows: there is nothing to learn")
    features = [feature for _, column in table.items() for feature in _features(column, train)]
    if not features:
        raise DataError(f"{path} has no column to learn {target!r} from")
    return Table(
        torch.tensor(np.column_stack(features), dtype=dtype),
        torch.tensor((values - mean) / std, dtype=dtype).unsqueeze(1),
        {"train": training, "validation": validation, "test": test},
        f"log {target}" if logarithm else target,
        float(mean),
        float(std),
    )


def _read_csv(path: Path) -> pd.DataFrame:
    """The cells of a CSV file as text; missing are the empty ones and the usual signs, such as NA."""
    try:
        table = pd.read_csv(path, dtype=str, skipinitialspace=True)
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from None
    except pd.errors.ParserError as error:
        raise DataError(f"{path} is not a table: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas took the cells without a name as names of the rows
        raise DataError(f"{path} has rows with more cells than the header")
    return table


def _numbers(column: pd.Series) -> np.ndarray | None:
    """A column as numbers, NaN where it is missing; None for a column of text.

    Raises:
        DataError: for a column mostly of numbers, at an entry that is not a finite one.
    """
    numbers = np.asarray(pd.to_numeric(column, errors="coerce"), dtype=np.float64)
    present = np.asarray(column.notna())
    wrong = present & ~np.isfinite(numbers)
    if not wrong.any():
        return numbers
    if 2 * wrong.sum() >= present.sum():
        return None
    row = int(wrong.argmax())
    raise DataError(f"column {column.name!r} holds numbers, but {column.iloc[row]!r} in row {row + 1}")


def _target(column: pd.Series, logarithm: bool) -> np.ndarray:
    """The target as numbers, or as their logarithms."""
    numbers = _numbers(column)
    if numbers is None:
        raise DataError(f"the target {column.name!r} holds text, such as {column.dropna().iloc[0]!r}")
    if np.isnan(numbers).any():
        raise DataError(f"the target {column.name!r} is missing in row {int(np.isnan(numbers).argmax()) + 1}")
    if not logarithm:
        return numbers
    if (numbers <= 0).any():
        row = int((numbers <= 0).argmax())
        raise DataError(f"the target {column.name!r} is {numbers[row]:g} in row {row + 1}: it has no logarithm")
    return np.log(numbers)


def _features(column: pd.Series, train: np.ndarray) -> list[np.ndarray]:
    """What the network sees of a column, prepared by what the training rows hold.

    Numbers are standardised; a missing one is replaced by the mean, and flagged in a feature of its own.
    Text becomes one feature for each value; a value that no training row has, or none, is zero in all.
    """
    numbers = _numbers(column)
    if numbers is None:
        values = sorted(column.iloc[train].dropna().unique())
        if len(values) > MOST_CATEGORIES:
            raise DataError(
                f"column {column.name!r} holds {len(values)} different texts, more than {MOST_CATEGORIES}"
            )
        return [(column == value).to_numpy(dtype=np.float64) for value in values]
    missing = np.isnan(numbers)
    known = numbers[train][~missing[train]]
    if known.size == 0:
        return []
    standardised = np.where(missing, 0.0, (numbers - known.mean()) / (known.std() or 1.0))
    return [standardised, missing.astype(np.float64)] if missing[train].any() else [standardised]


# The network and its training


def build(settings: Settings, features: int) -> torch.nn.Module:
    """Hidden layers of Linear, LayerNorm and GELU, and one output; the seed decides the initial weights."""
    layers = settings.layers
    torch.manual_seed(settings.seed)
    modules: dict[str, torch.nn.Module] = {}
    widths = [features] + [settings.width] * settings.depth
    for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        modules[f"linear{number}"] = layers.Linear(inputs, outputs)
        modules[f"norm{number}"] = layers.LayerNorm(outputs)
        modules[f"gelu{number}"] = layers.GELU()
    modules["output"] = layers.Linear(settings.width, 1)
    return torch.nn.Sequential(OrderedDict(modules)).to(getattr(torch, settings.dtype))


def loader(table: Table, split: str, batch_size: int, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
    """The rows of a split, taken from the table a batch at a time."""
    rows = TensorDataset(table.inputs[table.splits[split]], table.targets[table.splits[split]])
    order = RandomSampler(rows) if shuffle else SequentialSampler(rows)
    return DataLoader(rows, batch_size=None, sampler=BatchSampler(order, batch_size, drop_last=False))


@torch.no_grad()
def score(model: torch.nn.Module, table: Table, logarithm: bool, device: torch.device) -> dict[str, float]:
    """MSE and R² of every split on the scale that is learned, and the error of half the test predictions.

    That error is relative where the logarithm is learned, and otherwise in the units of the target.
    """
    figures: dict[str, float] = {}
    for split, rows in table.splits.items():
        predictions = torch.cat([model(chunk.to(device)).cpu() for chunk in table.inputs[rows].split(4096)])
        predicted, actual = (table.mean + table.std * part.double() for part in (predictions, table.targets[rows]))
        mse = (predicted - actual).square().mean().item()
        figures |= {f"{split}_mse": mse, f"{split}_r2": 1 - mse / actual.var(correction=0).item()}
        if split == "test":
            off = (predicted - actual).exp() - 1 if logarithm else predicted - actual
            figures["test_median_error"] = off.abs().median().item()
    return figures


def train(settings: Settings) -> FitResult | None:
    """Read, train, and print the final figures."""
    logarithm = bool(settings.log_target)
    dtype = getattr(torch, settings.dtype)
    table = read_table(settings.data or DIAMONDS, settings.target, logarithm, dtype)
    model = build(settings, table.inputs.shape[1])
    train_loader = loader(table, "train", settings.batch_size, shuffle=True)
    optimizer, schedule = settings.one_cycle(model, len(train_loader))
    trainer = Trainer(
        model,
        settings.layers.MSELoss(),
        optimizer,
        train_loader,
        loader(table, "validation", 4096, shuffle=False),
        settings=settings,
        lr_scheduler=schedule,
        on_fit_end=lambda *_: score(model, table, logarithm, trainer.device),
    )
    result = trainer.fit()
    if not trainer.is_main_process:
        return None

    figures = result.summary
    for name, label, digits in (("mse", "MSE", ".4g"), ("r2", "R²", ".5f")):
        parts = [f"{split} {figures[f'{split}_{name}']:{digits}}" for split in table.splits]
        print(f"{label} of the {table.name}: {', '.join(parts)}")
    error = figures["test_median_error"]
    within = f"{error:.1%}" if logarithm else f"{error:.4g}"
    print(f"half of the test rows are predicted within {within} of their {table.name.removeprefix('log ')}")
    return result


if __name__ == "__main__":
    run(parse_settings(Settings).resolved(), train)
