"""What the scripts share: settings from the command line, and how a program ends."""

import json
import os
import shlex
import sys
import time
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from .checkpoint import CheckpointError
from .interruption import Interrupted
from .nonfinite import NonFiniteError
from .progress import FitResult


class DataError(ValueError):
    """Data that cannot be learned from, said in one line."""


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

    settings: Path | None = None
    """A file of settings, JSON or TOML, as a run's settings.json; what the command line says goes before."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: object
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only arguments count: a stray environment variable `SEED` or `DEVICE` must not change a run."""
        return (init_settings,)


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
    given = list(sys.argv[1:] if arguments is None else arguments)
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--settings")
    try:
        file = finder.parse_known_args(given)[0].settings
        return CliApp.run(settings_class, given, **_read(Path(file)) if file else {})
    except ValidationError as error:
        fail("; ".join(_one_line(dict(item)) for item in error.errors()))
    except SettingsError as error:
        fail(str(error).removeprefix("error parsing CLI: "))


def _read(path: Path) -> dict[str, Any]:
    """The settings in a file, but for those of one run alone."""
    try:
        found = (tomllib if path.suffix == ".toml" else json).loads(path.read_text("utf-8"))
    except OSError as error:
        fail(f"--settings: {path} cannot be read: {error.strerror or error}")
    except ValueError as error:
        fail(f"--settings: {path} is neither JSON nor TOML: {error}")
    found = found.get("settings", found) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        fail(f"--settings: {path} holds no settings by name")
    return {name: value for name, value in found.items() if name not in ("settings", "run_dir", "resume")}


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


def run(settings: Settings, train: Callable[[Settings], FitResult | None]) -> None:
    """Train, and end the program as its user and a scheduler expect: with what `train` came to, if it says so.

    Wrong data or a wrong checkpoint ends it with one line and status 2, bad numbers with one line and status 1,
    Ctrl-C and SIGTERM with the command that goes on, and status 130 and 143. A second Ctrl-C: 130, at once.
    """
    start, folder = time.perf_counter(), getattr(settings, "run_dir", None)
    try:
        result = train(settings)
    except (DataError, CheckpointError) as error:
        fail(str(error))
    except NonFiniteError as error:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        sys.exit(f"error: {error}; a lower --learning-rate may help{notes}")
    except KeyboardInterrupt as stop:
        resume = [] if getattr(settings, "resume", True) else ["--resume"]
        if not any(argument.startswith("--run-dir") for argument in sys.argv):
            resume += ["--run-dir", str(folder)]
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; to go on:", shlex.join(["python", *sys.argv, *resume]), file=sys.stderr)
        sys.exit(stop.status if isinstance(stop, Interrupted) else 130)
    if result is not None:
        seconds = time.perf_counter() - start
        print(f"best epoch {result.best_epoch} of {result.epochs}, {seconds:.0f} s in all")
        print(f"curves: tensorboard --logdir {folder.parent if folder else 'runs'}")
