"""Calls that ours does not take, and who answers them.

A function of ours gives some calls to torch's function of the same name: those with a tensor-like (a type with a
``__torch_function__`` of its own, as `torch.fx.Proxy` or a jagged nested tensor), with a sparse, nested, mkldnn or
quantized tensor, and those that `torch.jit.trace` records. Torch's derivative is used then. No other call is given
to torch: an error is raised as it is. `record_fallbacks` counts these calls.
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

PLAIN = (Tensor, Parameter)
tracing_state: Callable[[], Any] = torch._C._get_tracing_state  # None, unless torch.jit.trace runs
_default_handler: Any = Tensor.__torch_function__
_strided = torch.strided


TRACED = "torch.jit.trace records torch's functions only"
"""The reason for the calls that it records."""


class FallbackError(RuntimeError):
    """A call was given to torch's function where `record_fallbacks` was told to raise an error."""


class Fallback(NamedTuple):
    """One kind of call that torch's function has answered."""

    function: str
    reason: str


class Fallbacks(Counter[Fallback]):
    """How often torch's function, and so torch's derivative, was used in place of ours. As a string: a table."""

    def __str__(self) -> str:
        if not self:
            return "no call was given to torch's functions"
        width = max(len(fallback.function) for fallback in self)
        return "\n".join(f"{n:5} {function:{width}}  {reason}" for (function, reason), n in self.most_common())


_recorders: list[tuple[Fallbacks, bool]] = []


@contextmanager
def record_fallbacks(*, error: bool = False) -> Iterator[Fallbacks]:
    """Count the calls that ours gives to torch's functions while the context is open, in all threads.

        with manualgrad.record_fallbacks() as fallbacks:
            loss(model(x), y).backward()
        print(fallbacks)  # how often, which function, why

    Args:
        error: raise a `FallbackError` at the first one.
    """
    recorder = Fallbacks(), error
    _recorders.append(recorder)
    try:
        yield recorder[0]
    finally:
        _recorders[:] = [x for x in _recorders if x is not recorder]


def fallback(function: Callable[..., Any], reason: str) -> None:
    """Tell all recorders that torch's `function` is called in place of ours, and why."""
    for found, error in _recorders:
        name = getattr(function, "__name__", str(function))
        found[Fallback(name, reason)] += 1
        if error:
            raise FallbackError(f"{name}: {reason}, so torch's derivative would be used")


# --- which calls are given to torch ---


@functools.cache
def has_default_handler(kind: type) -> bool:
    """The type is a subclass of Tensor that takes what torch's functions do as it is. Ours may do it as well."""
    return getattr(kind.__torch_function__, "__func__", None) is _default_handler.__func__


def tensor_likes(values: Iterable[Any]) -> list[Any]:
    """Those of the values, also in lists, whose type has a ``__torch_function__``, be it Tensor's."""
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, (list, tuple)) else (value,)
    # One at a time: with several the answer is yes as well where a mode is active
    return [x for x in flat if type(x) not in PLAIN and _handles(type(x))]


@functools.cache
def _handles(kind: type) -> bool:
    handler = getattr(kind, "__torch_function__", None)
    return handler is not None and handler is not torch._C._disabled_torch_function_impl


def unusual(tensor: Tensor) -> str:
    """In which way a tensor is none whose memory our formulas can read; empty if it is an ordinary one."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not _strided:
        return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}"
    return "a quantized tensor" if tensor.is_quantized else ""


def reason_for_torch(values: Iterable[Any]) -> str:
    """Why a call with these arguments is torch's; empty if it is ours."""
    values = [*values]
    if tracing_state() is not None:
        return TRACED
    for x in tensor_likes(values):
        if not has_default_handler(type(x)):
            return f"a {type(x).__module__}.{type(x).__qualname__}"
    tensors = [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]
    return next((reason for x in tensors if (reason := unusual(x))), "")


# --- errors ---


class ShapeMismatchError(Exception):
    """Shapes past whose end torch's own function would read: a RuntimeError without asking it."""


UNRELATED_ERRORS = (
    *(FallbackError, Warning, MemoryError, torch.OutOfMemoryError),
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)
"""Errors that say nothing of the arguments."""


def raise_torchs_error(reference: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Raise the error that torch's function has for these arguments, if it refuses them.

    It is asked twice. On the device "meta", where a tensor has a shape and a dtype but no numbers, nothing is
    computed, drawn or written. Only if it refuses there is it called with copies, for the error that it has here.
    What depends on numbers (an index out of range) is found by the kernels that our forwards call: this error is
    torch's already.
    """
    leaves, form = pytree.tree_flatten((args, kwargs))
    if any(callable(x) or isinstance(x, torch.Generator) for x in leaves):
        return  # a user's function is not called twice

    def ask(change: Callable[[Tensor], Tensor]) -> None:
        changed = [change(x.detach()) if isinstance(x, Tensor) else x for x in leaves]
        new_args, new_kwargs = pytree.tree_unflatten(changed, form)
        reference(*new_args, **new_kwargs)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            ask(lambda x: x.to("meta"))
        except Exception as refusal:
            if isinstance(refusal, NotImplementedError) or "meta tensor" in str(refusal):
                return  # without numbers it cannot tell
        else:
            return
        devices = {x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda}
        with torch.random.fork_rng(devices):
            ask(Tensor.clone)


def with_torchs_say(reference: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, ours, where it takes the call; else torch's `reference`. Its errors are torch's."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values()) if kwargs else args
        if has_torch_function_variadic(*values) or tracing_state() is not None:
            if reason := reason_for_torch(values):
                fallback(function, reason)
                return reference(*args, **kwargs)
            if likes := tensor_likes(values):
                return handle_torch_function(run, likes, *args, **kwargs)  # Tensor's own handler
        for x in values[:2]:  # the input, and a weight or target
            kind = type(x)
            if (kind is Tensor or kind is Parameter) and (x.layout is not _strided or x.is_nested):
                fallback(function, unusual(x))
                return reference(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except ShapeMismatchError as misfit:
            raise RuntimeError(str(misfit)) from None
        except Exception as error:
            if isinstance(error, UNRELATED_ERRORS) or torch.compiler.is_compiling():
                raise
            if reason := reason_for_torch(values):
                fallback(function, reason)
                return reference(*args, **kwargs)
            raise_torchs_error(reference, args, kwargs)
            raise

    return run
