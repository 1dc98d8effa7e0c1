"""torch's functions, called by their own names, computed by manualgrad's while a context is open.

Conversion of modules does not reach the calls of ``torch.nn.functional`` or ``x.softmax(-1)`` in a model's own
code. Inside `override_torch_functions` a `torch.overrides.TorchFunctionMode` receives such a call and passes it on
to manualgrad's function. The table of operations has this function. The overrides below have it under every name
that torch has for the operation: ``F.relu``, ``torch.relu``, ``Tensor.relu``, ``Tensor.relu_``. Where the
signatures differ, torch's schema decides.
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
from manualgrad.ops.arithmetic import has_recomputable_factor, multiply
from manualgrad.rebinding import refuse_late_registration
from manualgrad.rule import every_rule
from manualgrad.torch_internals import in_forward_mode_or_transform

_PRODUCTS = frozenset((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__))


@contextmanager
def override_torch_functions() -> Iterator[None]:
    """Inside this context, in this thread, torch's functions and methods are manualgrad's where it has them.

        with manualgrad.override_torch_functions():
            loss = F.cross_entropy(torch.relu(x @ w).softmax(-1), target)

    Values, errors and the random stream stay torch's. Only calls that may be differentiated are overridden: calls
    in which a tensor requires a gradient, forward mode, and the transforms of `torch.func`. Torch still computes
    calls with subclasses of Tensor that define ``__torch_function__``, with sparse, nested, quantized and meta
    tensors, and of overloads that manualgrad does not have: `record_fallbacks` counts them. Errors are raised and
    never lead to a fallback. The context can be nested and used as a decorator.

    A function given to `torch.utils.checkpoint.checkpoint` runs again after the context is closed. Pass
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
        override = find_override(func, types, args, kwargs)
        if override is not None:
            result = override(*args, **kwargs)  # torch disables the mode during this call
            if result is not NotImplemented:
                return result
            report_fallback(func, "manualgrad has no overload with these arguments")
        return func(*args, **kwargs)


def find_override(
    func: Any, types: Iterable[type], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any] | None:
    """manualgrad's function for this call of torch's `func`; None if torch computes it. The function may return
    NotImplemented, without a side effect."""
    override = (
        multiply if func in _PRODUCTS and not kwargs and has_recomputable_factor(*args) else _overrides.get(func)
    )
    if override is None or not _may_need_gradient([*args, *kwargs.values()]):
        return None
    reason = _reason_for_torch(types, [*args, *kwargs.values()], override is multiply)
    if reason:
        report_fallback(func, reason)
        return None
    return override


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [
        x
        for value in values
        for x in (value if isinstance(value, (list, tuple)) else (value,))
        if isinstance(x, Tensor)
    ]


def _may_need_gradient(values: Iterable[Any]) -> bool:
    if in_forward_mode_or_transform():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(values))


def _reason_for_torch(types: Iterable[type], values: Iterable[Any], plain_only: bool) -> str:
    """Why torch computes the call; empty if manualgrad does."""
    for cls in types:
        if cls not in PLAIN_TYPES and (plain_only or not has_default_torch_function(cls)):
            return f"a {cls.__module__}.{cls.__qualname__}"
    if get_tracing_state() is not None:
        return TRACING_REASON
    if in_forward_mode_or_transform():
        return ""
    for x in _tensors(values):  # Dynamo of torch 2.11 does not trace next() of a generator
        if reason := "a meta tensor" if x.is_meta else unsupported_tensor_kind(x):
            return reason
    return ""


# --- the overrides, by every name that torch has for an operation ---

_NAMESPACES = (torch, torch.special, torch._C._nn, Tensor)  # pyright: ignore[reportAttributeAccessIssue]


def _make_overrides() -> dict[Any, Callable[..., Any]]:
    """By a function or method of torch, manualgrad's with the same signature."""
    found: dict[Any, Callable[..., Any]] = {
        original: vars(functional)[name]
        for name, original in vars(F).items()
        if not name.startswith("_") and callable(original) and vars(functional)[name] is not original
    }
    found |= {
        op.reference: op.function
        for op in registry.ops().values()
        if not isinstance(op.reference, MethodType)  # no mode receives the apply of a Function
    }

    def add(name: str, manual: Callable[..., Any], by_position: bool = False) -> None:
        for namespace in _NAMESPACES:
            original = getattr(namespace, name, None)
            if original is None or original in found:
                continue
            if override := override_by_schema(name, manual, by_position):
                found[original] = override
            elif namespace is not Tensor:  # Tensor has methods of this name that are other operations (unfold)
                found[original] = _unsupported_overload

    for kernel, manual in registry.kernel_replacements.items():  # its arguments have the kernel's order
        add(getattr(kernel, "__name__", ""), manual, by_position=True)
    for op in registry.ops().values():
        add(op.name, op.function)
        add(f"{op.name}_", _inplace(op.function))
    return found


def _unsupported_overload(*args: Any, **kwargs: Any) -> Any:
    """For a torch function with the name but not the arguments of manualgrad's: torch computes it."""
    return NotImplemented


def _inplace(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, writing its output into its input."""
    if "inplace" in inspect.signature(function).parameters:
        return functools.partial(function, inplace=True)

    @functools.wraps(function)
    def write(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(function(input.clone(), *args, **kwargs))

    return write


class _Argument(NamedTuple):
    """An argument of an overload of a torch operation."""

    name: str
    passed: str | None
    """How manualgrad's function takes it: by this name; "": by position; None: not (it chooses an algorithm)."""
    keyword_only: bool
    is_tensor: bool
    default: Any


_REQUIRED = object()


def override_by_schema(name: str, manual: Callable[..., Any], by_position: bool) -> Callable[..., Any] | None:
    """A function with the arguments of the torch operation of this name, which calls manualgrad's; None if the two
    mean different things. Arguments are matched by name, or by position."""
    operation = getattr(torch.ops.aten, name, None)
    if operation is None:
        return None
    signature = _signature(manual)
    if "None" in str(signature.return_annotation):  # it returns less than the operation does
        return None
    parameters = list(signature.parameters.values())
    schemas = [getattr(operation, overload)._schema for overload in operation.overloads()]
    overloads = [found for schema in schemas if (found := _match_arguments(schema, parameters, by_position))]
    if not overloads:
        return None

    def call(*args: Any, **kwargs: Any) -> Any:
        for overload in overloads:
            values = _bind_arguments(overload, args, kwargs)
            if values is not None:
                positional = [values[x.name] for x in overload if x.passed == ""]
                return manual(*positional, **{x.passed: values[x.name] for x in overload if x.passed})
        return NotImplemented

    return call


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function; of a rule's ``apply``, that of its ``forward``."""
    forwards = {
        apply: rule.forward
        for rule in every_rule()
        for apply in (getattr(rule, "apply", None), getattr(rule, "apply_", None))
        if apply is not None
    }
    return inspect.signature(forwards.get(inspect.unwrap(function), function))


def _match_arguments(schema: Any, parameters: list[inspect.Parameter], by_position: bool) -> tuple[_Argument, ...]:
    """The arguments of an overload, matched with manualgrad's parameters; empty if one has no match."""
    by_name = {parameter.name: parameter for parameter in parameters}
    found: list[_Argument] = []
    for index, x in enumerate(schema.arguments):
        positional = index == 0 or (by_position and not x.kwarg_only)
        parameter = parameters[min(index, len(parameters) - 1)] if positional else by_name.get(x.name)
        if parameter is None:
            if not x.name.startswith("cudnn"):
                return ()
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL and not _types_match(
            parameter.annotation, x.type
        ):
            return ()
        found.append(
            _Argument(
                x.name,
                "" if positional else x.name if parameter else None,
                x.kwarg_only,
                str(x.type) in ("Tensor", "Optional[Tensor]"),
                x.default_value if x.has_default_value() else _REQUIRED,
            )
        )
    return tuple(found)


def _types_match(annotation: object, schema_type: object) -> bool:
    """Both are tensors, or neither is."""
    return annotation == "Any" or ("Tensor" in str(annotation)) == ("Tensor" in str(schema_type))


def _bind_arguments(
    overload: tuple[_Argument, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The value of each argument; None if the call is of another overload."""
    positional = [x.name for x in overload if not x.keyword_only]
    if len(args) > len(positional):
        return None
    by_name = {positional[0] if name == "input" else name: value for name, value in kwargs.items()}
    values = {x.name: x.default for x in overload} | dict(zip(positional, args, strict=False)) | by_name
    matches = len(values) == len(overload) and all(_accepts(x, values[x.name]) for x in overload)
    return values if matches else None


def _accepts(argument: _Argument, value: Any) -> bool:
    return value is None or (value is not _REQUIRED and isinstance(value, Tensor) == argument.is_tensor)


_overrides = _make_overrides()


@registry.registration_hooks.append
def _update_overrides(original: Any) -> None:
    """Called when an operation is registered after the import."""
    refuse_late_registration(original)
    _overrides.update(_make_overrides())
