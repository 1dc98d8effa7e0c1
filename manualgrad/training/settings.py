"""The settings of a training run, and how a script reads them from its command line."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, NoReturn, Self, TypeVar

import torch
from pydantic import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)


class CommandLine(BaseSettings):
    """Settings that a command line gives: `parse_settings` reads them. Immutable, and checked as a whole.

    Raises:
        pydantic.ValidationError: for a value out of range, of the wrong type, or an unknown name.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
    )

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: object
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only arguments count: a stray environment variable `SEED` or `DEVICE` must not change a run."""
        return (init_settings,)


class TrainingSettings(CommandLine):
    """How to train: checked before anything is allocated. A script adds its own fields in a subclass."""

    epochs: PositiveInt = 10
    """How many times to go through the training data."""
    seed: NonNegativeInt = 0
    """Decides, with the number of the epoch, the shuffling and every other random draw of training."""
    device: str = "auto"
    """Where to train: auto (CUDA where there is one), cpu, cuda or cuda:N."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision of autocast; float32 turns autocast off, float16 scales the loss as well."""
    accumulate: PositiveInt = 1
    """How many batches make one update: their gradient is that of one batch holding them all."""
    clip_norm: PositiveFloat | None = None
    """The norm to which larger gradients are scaled down; None leaves them as they are."""
    schedule_every: Literal["update", "epoch"] = "update"
    """When the learning-rate schedule advances."""
    patience: PositiveInt | None = None
    """Stop after this many epochs without a better validation loss; None trains for all epochs."""
    run_dir: Path | None = None
    """The folder for the curves and checkpoints of this run; None writes neither."""
    resume: bool = False
    """Continue the run in run_dir from its last checkpoint, exactly as if it had never stopped."""
    checkpoint_every: PositiveInt | None = None
    """Write a checkpoint every so many updates, besides the one after each epoch."""
    log_every: PositiveInt = 10
    """Add points to the training curves every so many updates."""
    histogram_every: PositiveInt | None = 5
    """Add histograms of weights and gradients every so many epochs; None adds none."""
    progress: bool = True
    """Show a progress bar when the output is a terminal."""

    bookkeeping: ClassVar[frozenset[str]] = frozenset(
        {
            "device",
            "run_dir",
            "resume",
            "checkpoint_every",
            "log_every",
            "histogram_every",
            "progress",
        }
    )
    """The settings that have no say in what is learned."""
    free_on_resume: ClassVar[frozenset[str]] = bookkeeping | {"epochs", "patience"}
    """The settings in which a resumed run may differ from the run it continues."""

    @field_validator("device")
    @classmethod
    def _device_is_there(cls, name: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
            raise ValueError("Input should be 'auto', 'cpu', 'cuda' or 'cuda:N'")
        here = torch.cuda.device_count()
        if name.startswith("cuda") and (torch.device(name).index or 0) >= here:
            raise ValueError(f"torch finds {here} CUDA devices here")
        return name

    @model_validator(mode="after")
    def _resume_from_somewhere(self) -> Self:
        if self.resume and self.run_dir is None:
            raise ValueError("resume needs run_dir, the folder of the run to continue")
        return self

    def torch_device(self) -> torch.device:
        """The device to train on."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(auto if self.device == "auto" else self.device)


Settings = TypeVar("Settings", bound=CommandLine)


def parse_settings(settings_class: type[Settings], arguments: Sequence[str] | None = None) -> Settings:
    """The settings that a command line gives.

    Args:
        settings_class: a subclass of CommandLine; each field becomes an option, `--clip-norm` for
            `clip_norm`, its attribute docstring the help text, the class docstring the description.
        arguments: the command line, by default that of this process.

    Raises:
        SystemExit: with status 2 after one line on stderr, for wrong arguments; with status 0 after
            `--help`.
    """
    try:
        return CliApp.run(settings_class, list(sys.argv[1:] if arguments is None else arguments))
    except ValidationError as error:
        fail("; ".join(_one_line(dict(item)) for item in error.errors()))
    except SettingsError as error:
        fail(str(error).removeprefix("error parsing CLI: "))


def fail(message: str) -> NoReturn:
    """End the program as for any wrong input: one line on stderr, exit status 2, no traceback."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def _one_line(error: dict[str, object]) -> str:
    """One entry of `ValidationError.errors()` as `--epochs: Input should be greater than 0 (got -3)`."""
    message = str(error["msg"]).removeprefix("Value error, ")
    location = error["loc"]
    if not isinstance(location, tuple) or not location:
        return message
    return f"--{str(location[0]).replace('_', '-')}: {message} (got {error['input']})"
