"""Importing these modules registers the laws."""

from manualgrad.verification.laws import (
    ctx_and_memory,
    first_order,
    higher_order,
    integrations,
    layouts,
    numerics,
    side_effects,
    transforms,
)

__all__ = [
    "ctx_and_memory",
    "first_order",
    "higher_order",
    "integrations",
    "layouts",
    "numerics",
    "side_effects",
    "transforms",
]
