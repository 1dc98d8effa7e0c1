"""Planted defects: small Functions, each with one mistake that occurs in real projects.

Most are y = x² (`Square`) with one method replaced. `python -m defects`, in the folder tests, prints the table of
those that gradcheck and `verify` find.
"""

from . import derivatives, gradients, integrations, memory, numerics
from .base import DEFECTS, Defect

__all__ = ["DEFECTS", "Defect", "derivatives", "gradients", "integrations", "memory", "numerics"]
