"""Command lines of scripts: settings from the arguments, one-line errors, exit statuses."""

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

from .nonfinite import NonFiniteError
from .serialization import CheckpointError
from .signals import Interrupted
from .state import FitResult


class DataError(ValueError):
    """The data cannot be used for training. The message is one line."""


class CliSettings(BaseSettings):
    """Settings that `parse_settings` reads from a command line. Immutable.

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
    """A JSON or TOML file of settings, such as a run's settings.json. Arguments override it."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: object
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read no environment variables: a stray `SEED` or `DEVICE` must not change a run."""
        return (init_settings,)


Settings = TypeVar("Settings", bound=CliSettings)


def parse_settings(settings_class: type[Settings], arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of a command line.

    Args:
        settings_class: a subclass of CliSettings. Each field becomes an option, `--max-epochs` for `max_epochs`.
            Its attribute docstring becomes the help text, the class docstring the description.
        arguments: the command line, by default that of this process.

    Raises:
        SystemExit: with status 2 and one line on stderr for wrong arguments; with status 0 after `--help`.
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
    """Return the settings in a file, without those of a single run."""
    try:
        found = (tomllib if path.suffix == ".toml" else json).loads(path.read_text("utf-8"))
    except OSError as error:
        fail(f"--settings: {path} cannot be read: {error.strerror or error}")
    except ValueError as error:
        fail(f"--settings: {path} is not valid JSON or TOML: {error}")
    found = found.get("settings", found) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        fail(f"--settings: {path} does not map names to settings")
    single_run = ("settings", "run_dir", "resume_from_checkpoint")
    return {name: value for name, value in found.items() if name not in single_run}


def fail(message: str) -> NoReturn:
    """Exit with one line on stderr and status 2, without a traceback."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def _one_line(error: dict[str, object]) -> str:
    """Format an entry of `ValidationError.errors()` as `--seed: Input should be greater than 0 (got -3)`."""
    message = str(error["msg"]).removeprefix("Value error, ")
    location = error["loc"]
    if not isinstance(location, tuple) or not location:
        return message
    return f"--{str(location[0]).replace('_', '-')}: {message} (got {error['input']})"


def run(settings: Settings, train: Callable[[Settings], FitResult | None]) -> None:
    """Call `train`, print its result if it is not None, and exit with the status that users and schedulers expect.

    A DataError or CheckpointError gives one line and status 2, a NonFiniteError one line and status 1. Ctrl-C
    gives the command that continues the run and status 130, SIGTERM the same with status 143. A second Ctrl-C
    exits immediately with status 130.
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
        resume = [] if getattr(settings, "resume_from_checkpoint", True) else ["--resume-from-checkpoint"]
        if not any(argument.startswith("--run-dir") for argument in sys.argv):
            resume += ["--run-dir", str(folder)]
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; to continue:", shlex.join(["python", *sys.argv, *resume]), file=sys.stderr)
        sys.exit(stop.status if isinstance(stop, Interrupted) else 130)
    if result is not None:
        seconds = time.perf_counter() - start
        print(f"best epoch {result.best_epoch} of {result.epochs}, {seconds:.0f} s in all")
        print(f"curves: tensorboard --logdir {folder.parent if folder else 'runs'}")
