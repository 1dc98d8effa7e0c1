"""The laws, in the order in which they are tried."""

from manualgrad.verification.laws import first_order, higher_order, layout, numerics, side_effects, transforms

__all__ = ["first_order", "higher_order", "layout", "numerics", "side_effects", "transforms"]
