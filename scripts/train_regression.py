"""Predict a column of a table from the other columns, with hand-written gradients.

    python scripts/train_regression.py                                    the log price of diamonds
    python scripts/train_regression.py --data houses.csv --target price   any table
    python scripts/train_regression.py --model torch                      the same network in plain torch.nn

The curves, weight histograms and final figures go to a folder under runs/:  tensorboard --logdir runs
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

from manualgrad.training import (
    DataError,
    FitResult,
    TaskSettings,
    TensorBoardLogger,
    Trainer,
    parse_settings,
    run,
)

DIAMONDS = Path(__file__).parent / "data" / "diamonds.csv.bz2"
MIN_ROWS = 50
MAX_CATEGORIES = 200


class Settings(TaskSettings):
    """Predict a column of a table from the other columns. By default: the log price of 53,940 diamonds."""

    data: Path | None = None
    """A CSV file with a header, may be compressed; by default the included diamonds."""
    target: str = "price"
    """The column to predict. Required with --data."""
    log_target: bool | None = None
    """Predict the logarithm of the target; by default only for the price of the diamonds."""
    width: PositiveInt = 128
    """Units in each hidden layer."""
    depth: PositiveInt = 3
    """Number of hidden layers."""
    dtype: Literal["float32", "float64"] = "float32"
    """The dtype of weights and data."""
    max_epochs: PositiveInt = 40
    """How many times to go through the training data."""
    task: ClassVar[str] = "regression"

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.data is not None and "target" not in self.model_fields_set:
            raise ValueError("--data needs --target, the name of the column to predict")
        if self.dtype == "float64" and self.precision != "float32":
            raise ValueError(f"--precision {self.precision} needs --dtype float32")
        return self

    def resolved(self) -> Self:
        """Return these settings, with values for those that depend on others by default."""
        price = self.data is None and self.target == "price"
        log_target = price if self.log_target is None else self.log_target
        return super().resolved().model_copy(update={"log_target": log_target})


# The table


class Table(NamedTuple):
    """A table as tensors, standardized by its training rows."""

    inputs: Tensor
    """(rows, features)"""
    targets: Tensor
    """(rows, 1)"""
    splits: dict[str, Tensor]
    """The row indices of "train" (70 %), "validation" (10 %) and "test" (20 %)."""
    name: str
    """The name of the target, for example "log price"."""
    mean: float
    std: float
    """Standard deviation of the target in the training rows: target = mean + std · targets."""


def read_table(path: Path, target: str, logarithm: bool, dtype: torch.dtype) -> Table:
    """Read a CSV file to predict `target` from all other columns.

    Raises:
        DataError: if the file cannot be read or is not a table, or a value cannot be used.
    """
    table = _read_csv(path)
    if target not in table:
        raise DataError(f"{path} has no column {target!r}; it has {', '.join(map(repr, table.columns))}")
    if len(table) < MIN_ROWS:
        raise DataError(f"{path} has {len(table)} rows, at least {MIN_ROWS} are needed")

    # The split depends only on the number of rows, so that all seeds and models have the same test rows.
    rows = len(table)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    test, validation, training = order.split([rows // 5, rows // 10, rows - rows // 5 - rows // 10])
    train = training.numpy()

    values = _read_target(table.pop(target), logarithm)
    mean, std = values[train].mean(), values[train].std()
    if std == 0:
        raise DataError(f"the target {target!r} is the same in all training rows")
    features = [feature for _, column in table.items() for feature in _encode_column(column, train)]
    if not features:
        raise DataError(f"{path} has no column to predict {target!r} from")
    return Table(
        torch.tensor(np.column_stack(features), dtype=dtype),
        torch.tensor((values - mean) / std, dtype=dtype).unsqueeze(1),
        {"train": training, "validation": validation, "test": test},
        f"log {target}" if logarithm else target,
        float(mean),
        float(std),
    )


def _read_csv(path: Path) -> pd.DataFrame:
    """The cells of a CSV file as text. Empty cells and the usual marks, such as NA, are missing values."""
    try:
        table = pd.read_csv(path, dtype=str, skipinitialspace=True)
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    except pd.errors.ParserError as error:
        raise DataError(f"{path} is not a valid table: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas uses surplus cells as row names
        raise DataError(f"{path} has rows with more cells than the header")
    return table


def _to_numbers(column: pd.Series) -> np.ndarray | None:
    """A column as numbers, with NaN for missing values. None for a column of text.

    Raises:
        DataError: if most entries are numbers, but one is text or infinite.
    """
    numbers = np.asarray(pd.to_numeric(column, errors="coerce"), dtype=np.float64)
    present = np.asarray(column.notna())
    wrong = present & ~np.isfinite(numbers)
    if not wrong.any():
        return numbers
    if 2 * wrong.sum() >= present.sum():
        return None
    row = int(wrong.argmax())
    raise DataError(f"column {column.name!r} has numbers, but {column.iloc[row]!r} in row {row + 1}")


def _read_target(column: pd.Series, logarithm: bool) -> np.ndarray:
    """The target as numbers, or their logarithms."""
    numbers = _to_numbers(column)
    if numbers is None:
        raise DataError(f"the target {column.name!r} is text, such as {column.dropna().iloc[0]!r}")
    if np.isnan(numbers).any():
        raise DataError(f"the target {column.name!r} is missing in row {int(np.isnan(numbers).argmax()) + 1}")
    if not logarithm:
        return numbers
    if (numbers <= 0).any():
        row = int((numbers <= 0).argmax())
        raise DataError(f"the target {column.name!r} is {numbers[row]:g} in row {row + 1}, so it has no logarithm")
    return np.log(numbers)


def _encode_column(column: pd.Series, train: np.ndarray) -> list[np.ndarray]:
    """Encode a column as features, with statistics of the training rows.

    Numbers are standardized. A missing one becomes the mean, and a second feature marks it. Text is one-hot
    encoded; a value that is missing, or in no training row, is zero in all features.
    """
    numbers = _to_numbers(column)
    if numbers is None:
        values = sorted(column.iloc[train].dropna().unique())
        if len(values) > MAX_CATEGORIES:
            raise DataError(
                f"column {column.name!r} has {len(values)} different texts, at most {MAX_CATEGORIES} are possible"
            )
        return [(column == value).to_numpy(dtype=np.float64) for value in values]
    missing = np.isnan(numbers)
    known = numbers[train][~missing[train]]
    if known.size == 0:
        return []
    standardized = np.where(missing, 0.0, (numbers - known.mean()) / (known.std() or 1.0))
    return [standardized, missing.astype(np.float64)] if missing[train].any() else [standardized]


# The network and its training


def build_model(settings: Settings, features: int) -> torch.nn.Module:
    """Hidden layers of Linear, LayerNorm and GELU, and one output. The seed gives the initial weights."""
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


def make_loader(table: Table, split: str, batch_size: int, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
    """A loader of the rows of a split."""
    rows = TensorDataset(table.inputs[table.splits[split]], table.targets[table.splits[split]])
    order = RandomSampler(rows) if shuffle else SequentialSampler(rows)
    return DataLoader(rows, batch_size=None, sampler=BatchSampler(order, batch_size, drop_last=False))


@torch.no_grad()
def evaluate(model: torch.nn.Module, table: Table, logarithm: bool, device: torch.device) -> dict[str, float]:
    """MSE and R² of every split, of the logarithm if that is predicted, and the median error of the test rows.

    The median error is relative for a logarithm, otherwise in units of the target.
    """
    figures: dict[str, float] = {}
    for split, rows in table.splits.items():
        predictions = torch.cat([model(chunk.to(device)).cpu() for chunk in table.inputs[rows].split(4096)])
        predicted, actual = (table.mean + table.std * part.double() for part in (predictions, table.targets[rows]))
        mse = (predicted - actual).square().mean().item()
        figures |= {f"{split}_mse": mse, f"{split}_r2": 1 - mse / actual.var(correction=0).item()}
        if split == "test":
            errors = (predicted - actual).exp() - 1 if logarithm else predicted - actual
            figures["test_median_error"] = errors.abs().median().item()
    return figures


def train(settings: Settings) -> FitResult | None:
    """Read the data, train, and print the final figures."""
    logarithm = bool(settings.log_target)
    dtype = getattr(torch, settings.dtype)
    table = read_table(settings.data or DIAMONDS, settings.target, logarithm, dtype)
    model = build_model(settings, table.inputs.shape[1])
    train_loader = make_loader(table, "train", settings.batch_size, shuffle=True)
    optimizer, schedule = settings.one_cycle(model, len(train_loader))

    def finish(logger: TensorBoardLogger, step: int) -> dict[str, float]:
        logger.log_program(model, table.inputs[: settings.batch_size].to(trainer.device), step)
        return evaluate(model, table, logarithm, trainer.device)

    trainer = Trainer(
        model,
        settings.layers.MSELoss(),
        optimizer,
        train_loader,
        make_loader(table, "validation", 4096, shuffle=False),
        settings=settings,
        lr_scheduler=schedule,
        on_fit_end=finish,
    )
    result = trainer.fit()
    if not trainer.is_main_process:
        return None

    figures = result.summary
    for name, label, digits in (("mse", "MSE", ".4g"), ("r2", "R²", ".5f")):
        values = [f"{split} {figures[f'{split}_{name}']:{digits}}" for split in table.splits]
        print(f"{label} of the {table.name}: {', '.join(values)}")
    error = figures["test_median_error"]
    formatted = f"{error:.1%} of the {settings.target}" if logarithm else f"{error:.4g}"
    print(f"median error of the test rows: {formatted}")
    return result


if __name__ == "__main__":
    run(parse_settings(Settings).resolved(), train)
