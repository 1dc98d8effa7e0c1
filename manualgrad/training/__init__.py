"""Training: a readable loop, curves in TensorBoard, and checkpoints that resume exactly. See README.md here."""

from importlib.util import find_spec

# ruff: noqa: E402 (the check comes before the imports that would fail)
missing = [
    name for name in ("PIL", "numpy", "pydantic_settings", "tensorboard", "tqdm") if find_spec(name) is None
]
if missing:
    raise ImportError(f"manualgrad.training needs {', '.join(missing)}: pip install 'manualgrad[training]'")

from .cli import CliSettings, DataError, fail, parse_settings, run
from .nonfinite import NonFiniteError
from .serialization import CheckpointError
from .settings import TaskSettings, TrainingSettings
from .signals import Interrupted
from .state import FitResult
from .tensorboard_logger import TensorBoardLogger
from .trainer import Trainer

__all__ = [
    "CheckpointError",
    "CliSettings",
    "DataError",
    "FitResult",
    "Interrupted",
    "NonFiniteError",
    "TaskSettings",
    "TensorBoardLogger",
    "Trainer",
    "TrainingSettings",
    "fail",
    "parse_settings",
    "run",
]
