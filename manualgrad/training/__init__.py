"""Training: a loop that can be read, curves in TensorBoard, and checkpoints that resume exactly."""

from importlib.util import find_spec

# ruff: noqa: E402 (the check comes first, to speak before an import inside does)
missing = [
    name for name in ("PIL", "numpy", "pydantic_settings", "tensorboard", "tqdm") if find_spec(name) is None
]
if missing:
    raise ImportError(f"manualgrad.training needs {', '.join(missing)}: pip install 'manualgrad[examples]'")

from .checkpoint import CheckpointError
from .interruption import Interrupted
from .logging import TrainingLog
from .nonfinite import NonFiniteError
from .progress import FitResult
from .script import CommandLine, DataError, fail, parse_settings, run
from .settings import TaskSettings, TrainingSettings
from .trainer import Trainer

__all__ = [
    "CheckpointError",
    "CommandLine",
    "DataError",
    "FitResult",
    "Interrupted",
    "NonFiniteError",
    "TaskSettings",
    "Trainer",
    "TrainingLog",
    "TrainingSettings",
    "fail",
    "parse_settings",
    "run",
]
