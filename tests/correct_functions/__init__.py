"""Correct Functions, for which `verify` must report no failure."""

from . import custom, torch_operators
from .base import CORRECT_FUNCTIONS, CorrectFunction

__all__ = ["CORRECT_FUNCTIONS", "CorrectFunction", "custom", "torch_operators"]
