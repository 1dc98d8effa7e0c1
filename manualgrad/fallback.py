"""Fallbacks to torch's functions, and torch's errors.

A function of manualgrad calls torch's function of the same name, and so uses torch's derivative, for

    tensor-likes       types with their own ``__torch_function__``, for example `torch.fx.Proxy` or jagged nested
                       tensors
    other layouts      sparse, nested, mkldnn and quantized tensors
    torch.jit.trace    calls that it records

`record_fallbacks` counts these calls. All other calls run on manualgrad, and their errors are not caught.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils import _pytree as pytree

PLAIN_TYPES = (Tensor, Parameter)
get_tracing_state: Callable[[], Any] = torch._C._get_tracing_state  # None, unless torch.jit.trace runs
_default_handler: Any = Tensor.__torch_function__
_strided = torch.strided


TRACING_REASON = "torch.jit.trace records torch's functions only"


class FallbackError(RuntimeError):
    """A call would fall back to torch's function inside `record_fallbacks(error=True)`."""


class Fallback(NamedTuple):
    """A function and the reason why torch's function ran instead of it."""

    function: str
    reason: str


class Fallbacks(Counter[Fallback]):
    """Counts of fallbacks to torch's functions. `str` gives a table."""

    def __str__(self) -> str:
        if not self:
            return "no fallbacks to torch's functions"
        width = max(len(fallback.function) for fallback in self)
        return "\n".join(f"{n:5} {function:{width}}  {reason}" for (function, reason), n in self.most_common())


_recorders: list[tuple[Fallbacks, bool]] = []


@contextmanager
def record_fallbacks(*, error: bool = False) -> Iterator[Fallbacks]:
    """Count the calls that fall back to torch's functions while the context is open, in all threads.

        with manualgrad.record_fallbacks() as fallbacks:
            loss(model(x), y).backward()
        print(fallbacks)  # count, function, reason

    Args:
        error: raise a `FallbackError` at the first fallback.
    """
    recorder = Fallbacks(), error
    _recorders.append(recorder)
    try:
        yield recorder[0]
    finally:
        _recorders[:] = [x for x in _recorders if x is not recorder]


def report_fallback(function: Callable[..., Any], reason: str) -> None:
    """Report to all recorders that torch's function runs instead of manualgrad's."""
    for fallbacks, error in _recorders:
        name = getattr(function, "__name__", str(function))
        fallbacks[Fallback(name, reason)] += 1
        if error:
            raise FallbackError(f"{name}: {reason}. torch's derivative would be used")


# --- which calls fall back ---


@functools.cache
def has_default_torch_function(kind: type) -> bool:
    """A subclass of Tensor with Tensor's own ``__torch_function__``. manualgrad supports it."""
    return getattr(kind.__torch_function__, "__func__", None) is _default_handler.__func__


def tensor_likes(values: Iterable[Any]) -> list[Any]:
    """The values of a type with a ``__torch_function__``, also inside lists. Plain tensors are excluded."""
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, (list, tuple)) else (value,)
    # Not `has_torch_function_variadic`: it is also true while a mode is active.
    return [x for x in flat if type(x) not in PLAIN_TYPES and _has_torch_function(type(x))]


@functools.cache
def _has_torch_function(kind: type) -> bool:
    handler = getattr(kind, "__torch_function__", None)
    return handler is not None and handler is not torch._C._disabled_torch_function_impl


def unsupported_tensor_kind(tensor: Tensor) -> str:
    """Describes a tensor that is not dense in memory, for example "a nested tensor". Empty for a dense one."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not _strided:
        return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}"
    return "a quantized tensor" if tensor.is_quantized else ""


def fallback_reason(values: Iterable[Any]) -> str:
    """Why a call with these arguments falls back to torch. Empty if it does not."""
    values = [*values]
    if get_tracing_state() is not None:
        return TRACING_REASON
    for x in tensor_likes(values):
        if not has_default_torch_function(type(x)):
            return f"a {type(x).__module__}.{type(x).__qualname__}"
    tensors = [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]
    return next((reason for x in tensors if (reason := unsupported_tensor_kind(x))), "")


# --- errors ---


class ShapeMismatchError(Exception):
    """Shapes for which torch's own function would read out of bounds. It becomes a RuntimeError without calling
    torch."""


UNRELATED_ERRORS = (
    *(FallbackError, Warning, MemoryError, torch.OutOfMemoryError),
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)
"""Errors that bad arguments do not cause."""


def raise_torch_error(reference: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Raise the error that torch's function raises for these arguments, if any.

    First call it on the device "meta", where tensors have no values, so nothing is computed, drawn or written.
    Only if that fails, call it with copies on the real device, for the real message. An error that depends on
    values (an index out of range) comes from the kernel that a forward of manualgrad calls, so it is torch's error
    already.
    """
    leaves, form = pytree.tree_flatten((args, kwargs))
    if any(callable(x) or isinstance(x, torch.Generator) for x in leaves):
        return  # do not call a user's function twice

    def call_reference(convert: Callable[[Tensor], Tensor]) -> None:
        converted = [convert(x.detach()) if isinstance(x, Tensor) else x for x in leaves]
        new_args, new_kwargs = pytree.tree_unflatten(converted, form)
        reference(*new_args, **new_kwargs)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            call_reference(lambda x: x.to("meta"))
        except Exception as error:
            if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
                return  # the check needs values
        else:
            return
        devices = {x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda}
        with torch.random.fork_rng(devices):
            call_reference(Tensor.clone)


def with_torch_fallback(reference: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with fallback to torch's `reference`, and with torch's errors."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values()) if kwargs else args
        if has_torch_function_variadic(*values) or get_tracing_state() is not None:
            if reason := fallback_reason(values):
                report_fallback(function, reason)
                return reference(*args, **kwargs)
            if likes := tensor_likes(values):
                return handle_torch_function(run, likes, *args, **kwargs)  # Tensor.__torch_function__
        for x in values[:2]:  # input and weight, or input and target
            kind = type(x)
            if (kind is Tensor or kind is Parameter) and (x.layout is not _strided or x.is_nested):
                report_fallback(function, unsupported_tensor_kind(x))
                return reference(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except ShapeMismatchError as error:
            raise RuntimeError(str(error)) from None
        except Exception as error:
            if isinstance(error, UNRELATED_ERRORS) or torch.compiler.is_compiling():
                raise
            if reason := fallback_reason(values):
                report_fallback(function, reason)
                return reference(*args, **kwargs)
            raise_torch_error(reference, args, kwargs)
            raise

    return run
