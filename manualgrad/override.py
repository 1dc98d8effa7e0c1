"""torch's functions, called by their own names, led to ours while a context is open.

A model that calls ``torch.nn.functional`` itself, or ``x.softmax(-1)``, is not changed by other modules. Inside
`override_torch_functions` a `torch.overrides.TorchFunctionMode` receives such a call and passes it to ours.
The table of operations has that function already. This module looks it up under every name that torch has for it:
``F.relu``, ``torch.relu``, ``Tensor.relu``, ``Tensor.relu_``. Where the signatures differ, torch's schema decides.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from manualgrad import registry
from manualgrad.fallback import (
    PLAIN_TYPES,
    TRACING_REASON,
    get_tracing_state,
    has_default_torch_function,
    report_fallback,
    unsupported_tensor_kind,
)
from manualgrad.nn import functional
from manualgrad.ops.elementary import product, spares
from manualgrad.rebinding import refuse_if_called
from manualgrad.rule import every_rule
from manualgrad.torch_internals import in_forward_mode_or_transform

_PRODUCTS = frozenset((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__))


@contextmanager
def override_torch_functions() -> Iterator[None]:
    """While it is open, in this thread, torch's functions and methods are ours wherever ours has an equal.

        with manualgrad.override_torch_functions():
            loss = F.cross_entropy(torch.relu(x @ w).softmax(-1), target)

    Values, errors and the random stream stay torch's. Only what may have a gradient is led to ours: calls in which
    a tensor requires one, forward mode, and the transforms of `torch.func`. Subclasses of Tensor with a
    ``__torch_function__`` of their own, sparse, nested, quantized and meta tensors are torch's business as before,
    and so are overloads that ours does not have: `record_fallbacks` counts them. An error is raised as it is. It
    can be nested, and used as a decorator.

    A function given to `torch.utils.checkpoint.checkpoint` runs again after the context has been left: pass
    ``context_fn=lambda: (override_torch_functions(), override_torch_functions())`` to it. (Modules converted with
    ``functional=True`` do so themselves.)
    """
    if any(type(mode) is _OverrideMode for mode in _get_current_function_mode_stack()):
        yield
        return
    with _OverrideMode():
        yield


class _OverrideMode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ours = replacement(func, types, args, kwargs)
        if ours is not None:
            result = ours(*args, **kwargs)  # the mode is off in here
            if result is not NotImplemented:
                return result
            report_fallback(func, "ours has no overload with these arguments")
        return func(*args, **kwargs)


def replacement(
    func: Any, types: Iterable[type], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any] | None:
    """What is called in place of torch's `func` with these arguments; None: nothing is. It may return
    NotImplemented, and has done nothing then."""
    ours = product if func in _PRODUCTS and not kwargs and spares(*args) else _TABLE.get(func)
    if ours is None or not _differentiable([*args, *kwargs.values()]):
        return None
    reason = _reason_for_torch(types, [*args, *kwargs.values()], ours is product)
    if reason:
        report_fallback(func, reason)
        return None
    return ours


def _each(values: Iterable[Any]) -> list[Tensor]:
    return [
        x
        for value in values
        for x in (value if isinstance(value, (list, tuple)) else (value,))
        if isinstance(x, Tensor)
    ]


def _differentiable(values: Iterable[Any]) -> bool:
    """A gradient may be asked for."""
    if in_forward_mode_or_transform():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in _each(values))


def _reason_for_torch(types: Iterable[type], values: Iterable[Any], plain_only: bool) -> str:
    """Why the call is torch's, if it is."""
    for kind in types:
        if kind not in PLAIN_TYPES and (plain_only or not has_default_torch_function(kind)):
            return f"a {kind.__module__}.{kind.__qualname__}"
    if get_tracing_state() is not None:
        return TRACING_REASON
    if in_forward_mode_or_transform():
        return ""
    for x in _each(values):  # not next() of a generator: Dynamo of torch 2.11 does not trace that
        if reason := "a meta tensor" if x.is_meta else unsupported_tensor_kind(x):
            return reason
    return ""


# --- every name of torch's for what is ours ---

_SPACES = (torch, torch.special, torch._C._nn, Tensor)  # pyright: ignore[reportAttributeAccessIssue]


def _table() -> dict[Any, Callable[..., Any]]:
    """By torch's function or method, ours, to be called with the same arguments."""
    found: dict[Any, Callable[..., Any]] = {
        theirs: vars(functional)[name]
        for name, theirs in vars(F).items()
        if not name.startswith("_") and callable(theirs) and vars(functional)[name] is not theirs
    }
    found |= {
        op.reference: op.function
        for op in registry.ops().values()
        if not isinstance(op.reference, MethodType)  # a Function's apply: no mode sees it
    }

    def enter(name: str, ours: Callable[..., Any], in_order: bool = False) -> None:
        for space in _SPACES:
            theirs = getattr(space, name, None)
            if theirs is None or theirs in found:
                continue
            if route := _by_schema(name, ours, in_order):
                found[theirs] = route
            elif space is not Tensor:  # a method that stands in no namespace is another operation (unfold)
                found[theirs] = _not_taken

    for kernel, ours in registry.kernel_replacements.items():  # written with the kernel's own order of arguments
        enter(getattr(kernel, "__name__", ""), ours, in_order=True)
    for op in registry.ops().values():
        enter(op.name, op.function)
        enter(f"{op.name}_", _over(op.function))
    return found


def _not_taken(*args: Any, **kwargs: Any) -> Any:
    """torch's function has ours of the same name, but takes other arguments: the call is torch's, and counted."""
    return NotImplemented


def _over(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, written over its input."""
    if "inplace" in inspect.signature(function).parameters:
        return functools.partial(function, inplace=True)

    @functools.wraps(function)
    def write(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(function(input.clone(), *args, **kwargs))

    return write


class _Argument(NamedTuple):
    """An argument of an operation of torch's."""

    name: str
    ours: str | None
    """By which name ours takes it; "": in its place; None: it does not (it says how to compute, not what)."""
    keyword: bool
    is_tensor: bool
    default: Any


_REQUIRED = object()


def _by_schema(name: str, ours: Callable[..., Any], in_order: bool) -> Callable[..., Any] | None:
    """A function that takes the arguments of torch's operation and calls ours, with our names for them or, if they
    stand in the same order, in that order. None: there is no operation of this name and our meaning."""
    operation = getattr(torch.ops.aten, name, None)
    if operation is None:
        return None
    signature = _signature(ours)
    if "None" in str(
        signature.return_annotation
    ):  # less than torch's operation returns: for torch's functions alone
        return None
    parameters = list(signature.parameters.values())
    schemas = [getattr(operation, overload)._schema for overload in operation.overloads()]
    overloads = [found for schema in schemas if (found := _matched(schema, parameters, in_order))]
    if not overloads:
        return None

    def call(*args: Any, **kwargs: Any) -> Any:
        for overload in overloads:
            values = _given(overload, args, kwargs)
            if values is not None:
                placed = [values[x.name] for x in overload if x.ours == ""]
                return ours(*placed, **{x.ours: values[x.name] for x in overload if x.ours})
        return NotImplemented

    return call


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """That of `forward`, if it is a rule's entry."""
    forwards = {
        entry: rule.forward
        for rule in every_rule()
        for entry in (getattr(rule, "apply", None), getattr(rule, "apply_", None))
        if entry is not None
    }
    return inspect.signature(forwards.get(inspect.unwrap(function), function))


def _matched(schema: Any, parameters: list[inspect.Parameter], in_order: bool) -> tuple[_Argument, ...]:
    """The operation's arguments, each with its place among our parameters; none, if they mean something else."""
    named = {parameter.name: parameter for parameter in parameters}
    found: list[_Argument] = []
    for place, x in enumerate(schema.arguments):
        placed = place == 0 or (in_order and not x.kwarg_only)
        ours = parameters[min(place, len(parameters) - 1)] if placed else named.get(x.name)
        if ours is None:
            if not x.name.startswith("cudnn"):
                return ()
        elif ours.kind is not inspect.Parameter.VAR_POSITIONAL and not _of_one_kind(ours.annotation, x.type):
            return ()
        found.append(
            _Argument(
                x.name,
                "" if placed else x.name if ours else None,
                x.kwarg_only,
                str(x.type) in ("Tensor", "Optional[Tensor]"),
                x.default_value if x.has_default_value() else _REQUIRED,
            )
        )
    return tuple(found)


def _of_one_kind(annotation: object, kind: object) -> bool:
    """Both are tensors, or both are settings."""
    return annotation == "Any" or ("Tensor" in str(annotation)) == ("Tensor" in str(kind))


def _given(
    overload: tuple[_Argument, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Every argument's value; None: it is another overload that is called."""
    places = [x.name for x in overload if not x.keyword]
    if len(args) > len(places):
        return None
    named = {places[0] if name == "input" else name: value for name, value in kwargs.items()}
    values = {x.name: x.default for x in overload} | dict(zip(places, args, strict=False)) | named
    fit = len(values) == len(overload) and all(_fits(x, values[x.name]) for x in overload)
    return values if fit else None


def _fits(argument: _Argument, value: Any) -> bool:
    return value is None or (value is not _REQUIRED and isinstance(value, Tensor) == argument.is_tensor)


_TABLE = _table()


@registry.observers.append
def _update(torchs: Any) -> None:
    """An operation has been registered late."""
    refuse_if_called(torchs)
    _TABLE.update(_table())
