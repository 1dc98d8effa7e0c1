"""torch's own Python, calling ours.

A module of torch.nn is a state, its description, and a ``forward`` that calls a function; many a function of
torch.nn.functional is a few checks and a call of others. Nothing in them is to be derived, and a copy would grow
old. They are taken as they stand, and only what they *call* is looked up elsewhere: `bound` gives a function of
torch's the same code with other globals, and `derived` a class of torch's a subclass whose methods are bound so.

What is replaced: the functions that the table of operations names, the kernels that it has a rule for, the modules
that lead to them, and the namespaces through which torch calls them: ``F``, and ``torch``, ``torch._C._nn`` and
``_VF`` where they are asked for one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch._jit_internal import boolean_dispatched
from torch.overrides import handle_torch_function
from typing_extensions import deprecated

from manualgrad import registry
from manualgrad.fallback import fallback_reason, report_fallback
from manualgrad.torch_internals import INFER_SIZE_IS_NOT_TRACED, in_forward_mode_or_transform

_get_fastpath_enabled = torch.backends.mha.get_fastpath_enabled
_NAMESPACES = (
    *(torch, torch._C, torch._C._nn, torch._VF),  # pyright: ignore[reportAttributeAccessIssue]
    *(torch.backends, torch.backends.mha),
)


def _inference_alone() -> bool:
    """The transformers' path for inference is one operation of torch's, without a derivative in forward mode or
    under a transform; of these torch's own conditions do not ask."""
    return _get_fastpath_enabled() and not in_forward_mode_or_transform()


@functools.cache
def _ours() -> dict[Any, Any]:
    """Our function for each of torch's that has one."""
    written = {
        op.reference: op.implementation for op in registry.ops().values() if not isinstance(op.implementation, str)
    }
    found: dict[Any, Any] = {_get_fastpath_enabled: _inference_alone, **registry.kernel_replacements, **written}
    if INFER_SIZE_IS_NOT_TRACED:
        found[torch._C._infer_size] = torch.broadcast_shapes
    # a Function is called by its apply
    return {theirs: SimpleNamespace(apply=f) if isinstance(theirs, type) else f for theirs, f in found.items()}


class _Twin(ModuleType):
    """A namespace of torch's, with ours for those of its names that have one."""

    def __init__(self, original: ModuleType) -> None:
        super().__init__(original.__name__)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        found = replaced(getattr(self._original, name), _called())
        vars(self)[name] = found
        return found


_twin = functools.cache(_Twin)


def replaced(value: Any, names: frozenset[str] = frozenset()) -> Any:
    """What takes the place of a global of torch's code, which uses these names: the global itself, mostly."""
    if value is F:
        return importlib.import_module("manualgrad.nn.functional")
    if isinstance(value, ModuleType):
        return _twin(value) if value in _NAMESPACES and not names.isdisjoint(_called()) else value
    if not isinstance(value, type) and not callable(value):
        return value
    if value in _ours():
        return _ours()[value]
    if not getattr(value, "__module__", "").startswith("torch.nn."):
        return value
    if isinstance(value, FunctionType):
        return bound(value)
    return derived(value) if is_module(value) else value


def is_module(value: Any) -> TypeGuard[type[nn.Module]]:
    """A public module class of torch.nn."""
    return isinstance(value, type) and issubclass(value, nn.Module) and vars(nn).get(value.__name__) is value


@functools.cache
def _called() -> frozenset[str]:
    """Names by which a namespace of torch's other than ``F`` has what is ours."""
    named = ((getattr(value, "__name__", ""), value) for value in _ours())
    return frozenset(
        name for name, value in named if any(getattr(space, name, None) == value for space in _NAMESPACES)
    )


_bound: dict[Any, Any] = {}
"""What has been bound or derived, by what it was: that itself where nothing is ours. While it is looked at, a
function's copy stands here already: torch's functions name each other in circles."""
_unbound: dict[Any, Any] = {}
"""By a bound copy, the function of torch's."""


def _handle(function: Any, relevant_args: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's `handle_torch_function`, which our copy calls. A type with a ``__torch_function__`` of its own gets
    torch's function, which it knows; a mode, or Tensor's own handler, gets ours."""
    if reason := fallback_reason(relevant_args):
        report_fallback(function, reason)
        function = _unbound.get(function, function)
    return handle_torch_function(function, relevant_args, *args, **kwargs)


def bound(function: FunctionType) -> FunctionType:
    """A function of torch's with ours for what it calls; itself, if it calls none."""
    if function in _bound:
        return _bound[function]
    scope = dict(function.__globals__)
    del scope["__name__"]  # or Dynamo looks the names up in torch's module
    copy = _copied(function, scope)
    copy.__module__ = function.__module__.replace("torch.nn", "manualgrad.nn", 1)  # where pickle finds it
    names = frozenset(_names(copy.__code__))
    _bound[function] = copy
    changed = False
    _unbound[copy] = function
    for name in names & scope.keys():
        if scope[name] is handle_torch_function:
            scope[name] = _handle
            continue
        value, scope[name] = scope[name], replaced(scope[name], names)
        changed |= scope[name] is not value and value is not function
    if function.__defaults__:  # an activation, say
        copy.__defaults__ = tuple(map(replaced, function.__defaults__))
        changed |= copy.__defaults__ != function.__defaults__
    if not changed:
        _bound[function] = function
    return _bound[function]


def refuse_if_called(torchs: Any) -> None:
    """torch.nn's own code has been bound to the functions that ours had then. One that it calls comes too late.

    Raises:
        ValueError: torch.nn calls it.
    """
    name = getattr(torchs, "__name__", "")
    spaces = [vars(F), *map(vars, _NAMESPACES)]
    for function in [x for x in _bound if isinstance(x, FunctionType)]:
        if name in _names(function.__code__) and any(
            x.get(name) == torchs for x in [function.__globals__, *spaces]
        ):
            raise ValueError(
                f"{name} is called by {function.__module__}.{function.__qualname__}, which was bound to our "
                "functions when manualgrad was imported: register it in a file of manualgrad/ops"
            )


def _copied(function: FunctionType, scope: dict[str, Any]) -> FunctionType:
    """The same function, to look its globals up in a scope of its own."""
    parts: Any = boolean_dispatched.get(function)
    if parts is None:
        # Dynamo keeps what it compiled with the code object, and two functions may not share it
        code = function.__code__.replace()
        copy = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
        copy.__kwdefaults__ = function.__kwdefaults__
    else:  # one function or the other, by a flag: torch keeps them in a closure
        scope |= {"if_true": parts["if_true"], "if_false": parts["if_false"]}
        copy = _choosing(parts["arg_name"], parts["index"], parts["default"])
        copy = FunctionType(copy.__code__, scope, function.__name__, None, copy.__closure__)
    functools.update_wrapper(copy, function)
    del vars(copy)["__wrapped__"]
    return copy


def _choosing(name: str, index: int, default: bool) -> FunctionType:
    def choose(*args: Any, **kwargs: Any) -> Any:
        flag = kwargs[name] if name in kwargs else args[index] if index < len(args) else default
        return if_true(*args, **kwargs) if flag else if_false(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821

    return choose  # type: ignore[return-value]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class _Module(str):
    """The ``__module__`` of a class of ours. For an instance it is "torch.nn": torch.fx calls layers of that name
    as they are and does not trace them."""

    __slots__ = ()

    def __get__(self, instance: object, owner: type | None = None) -> str:
        return self if instance is None else "torch.nn"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


class _NoQuantization:
    """The attribute ``qconfig``, which torch.ao.quantization sets on each layer before it looks at the class."""

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        raise AttributeError("qconfig")

    def __set__(self, instance: object, value: object) -> None:
        raise _looks_at_classes("torch.ao.quantization", instance)


def _not_scriptable(self: nn.Module) -> Any:
    raise _looks_at_classes("torch.jit.script", self)


NOT_SCRIPTABLE = {"__prepare_scriptable__": _not_scriptable}  # torch.jit.script calls it first of all


def _looks_at_classes(what: str, module: object) -> RuntimeError:
    kind = type(module)
    return RuntimeError(
        f"{what} knows torch's own layers only, and this {kind.__name__} is manualgrad's: "
        "call manualgrad.revert(model) first"
    )


def _doc_of(original: type[nn.Module]) -> str:
    how = f"The gradient is derived by hand. To read it: python -m manualgrad show {original.__name__}"
    return f"{inspect.cleandoc(original.__doc__ or '')}\n\n{how}"


def derived(original: type[nn.Module]) -> type[nn.Module]:
    """A class of torch's as its own subclass, with ours for what its methods call; itself, if they call none."""
    if original in _bound:
        return _bound[original]
    _bound[original] = original
    changed: dict[str, Any] = {}
    for name, value in vars(original).items():
        if isinstance(value, FunctionType):
            found = bound(value)
        elif is_module(value):  # what a lazy module becomes
            found = derived(value)
        else:
            continue
        if found is not value:
            changed[name] = found
    parents = [base for base in original.__bases__ if issubclass(base, nn.Module) and base is not nn.Module]
    bases = [base for base in map(derived, parents) if base not in original.__mro__]
    if changed or bases:
        about = {"__module__": _Module("manualgrad.nn"), "__doc__": _doc_of(original)}
        about |= {"__qualname__": original.__qualname__, "qconfig": _NoQuantization(), **NOT_SCRIPTABLE}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a deprecated class warns who inherits from it
            found = types.new_class(
                original.__name__, (original, *bases), {}, lambda new: new.update(changed | about)
            )
        if told := vars(original).get("__deprecated__"):
            found = deprecated(told, category=FutureWarning)(found)
        _bound[original] = found
    return _bound[original]
