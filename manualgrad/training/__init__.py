"""Training: a loop that can be read, curves in TensorBoard, and checkpoints that resume exactly."""

from importlib.util import find_spec

# ruff: noqa: E402 (the check comes first, to speak before an import inside does)
missing = [name for name in ("numpy", "pydantic_settings", "tensorboard", "tqdm") if find_spec(name) is None]
if missing:
    raise ImportError(f"manualgrad.training needs {', '.join(missing)}: pip install 'manualgrad[examples]'")

from .checkpoint import CheckpointError
from .nonfinite import NonFiniteError
from .progress import FitResult
from .settings import CommandLine, TrainingSettings, fail, parse_settings
from .trainer import Trainer

__all__ = [
    "CheckpointError",
    "CommandLine",
    "FitResult",
    "NonFiniteError",
    "Trainer",
    "TrainingSettings",
    "fail",
    "parse_settings",
]
