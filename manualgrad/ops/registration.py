"""Decorators that make a function a drop-in replacement of torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F

from manualgrad.fallback import with_torch_fallback
from manualgrad.registry import register_kernel_replacement

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])


def with_torch_errors(function: FunctionT) -> FunctionT:
    """Add the errors and the fallbacks of torch's function of the same name (see `manualgrad.fallback`)."""
    return with_errors_of(getattr(F, function.__name__, None) or getattr(torch, function.__name__), function)


def with_errors_of(reference: Callable[..., object], function: FunctionT) -> FunctionT:
    """Add the errors and the fallbacks of ``reference``, a function of torch."""
    return with_torch_fallback(reference, function)  # type: ignore[return-value]


def implements(kernel: Callable[..., object]) -> Callable[[FunctionT], FunctionT]:
    """Register a rule or a function as the replacement of a kernel that torch's functions call."""

    def decorate(implementation: FunctionT) -> FunctionT:
        # a rule, and a Function of torch, is called by its `apply`
        reference, replacement = (getattr(x, "apply", x) for x in (kernel, implementation))
        register_kernel_replacement(kernel, with_errors_of(reference, replacement))
        return implementation

    return decorate


def for_1d_2d_3d(make: Callable[[int], FunctionT], dimensions: Iterable[int] = (1, 2, 3)) -> list[FunctionT]:
    """The functions f1d, f2d and f3d, made by ``make(n)``. In the docstring, ``{n}`` becomes the number."""
    functions = []
    for n in dimensions:
        function = make(n)
        function.__name__ = function.__qualname__ = f"{function.__name__}{n}d"
        function.__doc__ = (function.__doc__ or "").replace("{n}", str(n))
        functions.append(with_torch_errors(function))
    return functions
