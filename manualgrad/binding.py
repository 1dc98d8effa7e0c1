"""torch's own Python, calling ours.

A module of torch.nn is a state, its description, and a ``forward`` that calls a function; many a function of
torch.nn.functional is a few checks and a call of others. Nothing in them is to be derived, and a copy would grow
old. They are taken as they stand, and only what they *call* is looked up elsewhere: `bound` gives a function of
torch's the same code with other globals, and `derived` a class of torch's a subclass whose methods are bound so.

What is replaced: the functions that the table of operations names, the modules that lead to them, and the
namespaces through which torch calls them: ``F``, and ``torch`` and ``_VF`` where they are asked for one.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import deprecated

from manualgrad import registry
from manualgrad.rule import differentiated

_get_fastpath_enabled = torch.backends.mha.get_fastpath_enabled
_NAMESPACES = (torch, torch._VF, torch.backends, torch.backends.mha)  # pyright: ignore[reportAttributeAccessIssue]


def _inference_only() -> bool:
    """The transformers' path for inference, one operation of torch's, has no derivative in forward mode, and
    whether one is asked for torch's own conditions do not see."""
    with torch.no_grad():  # reverse mode they do see
        return _get_fastpath_enabled() and not differentiated()


@functools.cache
def _ours() -> dict[Any, Any]:
    """Our function for each of torch's that the table names."""
    found: dict[Any, Any] = {_get_fastpath_enabled: _inference_only}
    for op in registry.ops().values():
        if not isinstance(op.written, str):
            found |= dict.fromkeys((op.reference, *op.stands_for), op.written)
    found |= registry.stand_ins
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


def is_module(value: Any) -> bool:
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
"""What has been bound or derived, by what it was; that itself where nothing is ours, or while it is looked at."""


def bound(function: FunctionType) -> FunctionType:
    """A function of torch's with ours for what it calls; itself, if it calls none."""
    if function in _bound:
        return _bound[function]
    _bound[function] = function
    names = frozenset(_names(function.__code__))
    scope = {}
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if (found := replaced(value, names)) is not value:
            scope[name] = found
    if scope:
        scope = {**function.__globals__, **scope}
        del scope["__name__"]  # or Dynamo looks the names up in torch's module
        # Dynamo keeps what it compiled with the code object, and two functions may not share it
        code = function.__code__.replace(co_name=f"{function.__name__}")
        defaults = function.__defaults__ and tuple(map(replaced, function.__defaults__))  # a default activation
        copy = FunctionType(code, scope, function.__name__, defaults, function.__closure__)
        copy.__kwdefaults__ = function.__kwdefaults__
        _bound[function] = functools.update_wrapper(copy, function)
        del copy.__wrapped__
        copy.__module__ = function.__module__.replace("torch.nn", "manualgrad.nn", 1)  # where pickle finds it
    return _bound[function]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


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
        about = {"__module__": "manualgrad.nn", "__doc__": original.__doc__, "__qualname__": original.__qualname__}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a deprecated class warns who inherits from it
            found = type(original)(original.__name__, (original, *bases), changed | about)
        if told := vars(original).get("__deprecated__"):
            found = deprecated(told, category=FutureWarning)(found)
        _bound[original] = found
    return _bound[original]
