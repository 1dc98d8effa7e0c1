"""torch.nn's own Python code, run with manualgrad's functions in its globals.

A module of torch.nn is a state and a ``forward`` that calls a function. Many functions of torch.nn.functional
check their arguments and call others. Such code needs no rule, and a copy of its text would go out of date. So
manualgrad runs torch's own code objects with other globals.

Each module of torch that is shadowed has one namespace:

    torch.nn.functional        `manualgrad.nn.functional`
    torch.nn.modules.linear    ``manualgrad.nn.modules.linear``, made here; likewise the others
    torch, torch._C._nn, ...   a `_KernelNamespace`, seen by rebound code only

In a namespace a name has manualgrad's function where the table of operations has one, the rebound copy of a
function or class that calls one, and torch's own value otherwise. `rebound_names` lists the functions that are
rebound, and `check` compares them with the list that is checked in.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch._jit_internal import boolean_dispatched
from torch.overrides import handle_torch_function
from torch.torch_version import TorchVersion
from typing_extensions import deprecated

from manualgrad import registry
from manualgrad.fallback import fallback_reason, report_fallback
from manualgrad.rebound_names import REBOUND_NAMES, SINCE
from manualgrad.torch_internals import INFER_SIZE_IS_NOT_TRACED, TESTED_VERSIONS, in_forward_mode_or_transform

_get_fastpath_enabled = torch.backends.mha.get_fastpath_enabled


def _fastpath_enabled() -> bool:
    """The inference path of the transformer layers is one operation without a derivative in forward mode or under
    a transform. torch's own conditions do not test for these."""
    return _get_fastpath_enabled() and not in_forward_mode_or_transform()


@functools.cache
def _replacements() -> dict[Any, Any]:
    """By a function or kernel of torch, manualgrad's."""
    implementations = {
        op.reference: op.implementation for op in registry.ops().values() if not isinstance(op.implementation, str)
    }
    found: dict[Any, Any] = {_get_fastpath_enabled: _fastpath_enabled, **registry.kernel_replacements}
    found |= implementations
    if INFER_SIZE_IS_NOT_TRACED:
        found[torch._C._infer_size] = torch.broadcast_shapes
    # torch calls the `apply` of an autograd.Function
    return {
        original: SimpleNamespace(apply=manual) if isinstance(original, type) else manual
        for original, manual in found.items()
    }


def _is_replaced(value: Any) -> bool:
    return value is F or (callable(value) and value in _replacements())


# --- namespaces ---


class _KernelNamespace(ModuleType):
    """A module of torch outside of torch.nn, with manualgrad's functions for those of its names that have one."""

    def __init__(self, original: ModuleType) -> None:
        super().__init__(original.__name__)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        value = rebind(getattr(self._original, name))
        vars(self)[name] = value
        return value


_KERNEL_MODULES: tuple[ModuleType, ...] = (
    *(torch, torch._C, torch._C._nn, torch._VF),  # pyright: ignore[reportAttributeAccessIssue]
    *(torch.backends, torch.backends.mha),
)
_shadows: dict[ModuleType, ModuleType] = {module: _KernelNamespace(module) for module in _KERNEL_MODULES}
"""By a module of torch, what takes its place in rebound code."""
_namespaces: dict[int, dict[str, Any]] = {}
"""By the id of a function's globals, the globals of its rebound copy."""
_unfilled: list[tuple[dict[str, Any], dict[str, Any]]] = []
"""Globals and their new namespaces, which still hold torch's values."""


def shadow_module(original: ModuleType, shadow: ModuleType) -> None:
    """Make a module the namespace of a module of torch.nn, with all of its names."""
    _register(original, shadow)
    _fill_namespaces()


def _register(original: ModuleType, shadow: ModuleType) -> None:
    _shadows[original] = shadow
    _namespaces[id(vars(original))] = vars(shadow)
    vars(shadow).update({name: value for name, value in vars(original).items() if not _is_dunder(name)})
    _unfilled.append((vars(original), vars(shadow)))


def _namespace_of(scope: dict[str, Any]) -> dict[str, Any]:
    if id(scope) not in _namespaces:
        module = sys.modules.get(scope["__name__"])
        if module is not None and vars(module) is scope and module.__name__.startswith("torch.nn."):
            _make_shadow(module)
        else:
            namespace = dict(scope)
            del namespace["__name__"]  # torch.compile would look the names up in the module of this name
            _namespaces[id(scope)] = namespace
            _unfilled.append((scope, namespace))
    return _namespaces[id(scope)]


def _make_shadow(original: ModuleType) -> ModuleType:
    """``manualgrad.nn.modules.linear`` for torch.nn.modules.linear. Its ``__file__`` is torch's, where `inspect`
    finds the source of its functions and classes."""
    name = _manual_name(original.__name__)
    shadow = ModuleType(name, original.__doc__)
    shadow.__file__ = original.__file__
    shadow.__spec__ = ModuleSpec(name, None, origin=original.__file__, is_package=hasattr(original, "__path__"))
    shadow.__package__ = shadow.__spec__.parent
    vars(shadow)["__builtins__"] = vars(original)["__builtins__"]
    if hasattr(original, "__path__"):
        shadow.__path__ = []
    _register(original, shadow)
    sys.modules[name] = shadow
    parent_name, _, leaf = original.__name__.rpartition(".")
    if parent_name != "torch.nn":
        parent = sys.modules[parent_name]
        setattr(_shadows.get(parent) or _make_shadow(parent), leaf, shadow)
    return shadow


def _fill_namespaces() -> None:
    while _unfilled:
        scope, namespace = _unfilled.pop()
        for name, value in scope.items():
            if not _is_dunder(name):
                namespace[name] = _rebind(value)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _manual_name(name: str) -> str:
    return name.replace("torch.nn", "manualgrad.nn", 1)


# --- values ---


def rebind(value: Any) -> Any:
    """What takes the place of a value in rebound code; the value itself if nothing in it is replaced."""
    found = _rebind(value)
    _fill_namespaces()
    return found


def rebind_function(function: FunctionType) -> FunctionType:
    """The function with manualgrad's functions in its globals; itself if it calls none of them."""
    found = _rebind_function(function)
    _fill_namespaces()
    return found


def is_module_class(value: Any) -> TypeGuard[type[nn.Module]]:
    """The value is a public module class of torch.nn."""
    return isinstance(value, type) and issubclass(value, nn.Module) and vars(nn).get(value.__name__) is value


_rebound: dict[Any, Any] = {}
"""By a function or class of torch, its rebound copy; itself if it calls nothing that is replaced."""
_original: dict[Any, Any] = {}
"""By a rebound function, torch's."""


def _rebind(value: Any) -> Any:
    if isinstance(value, ModuleType):
        return _shadows.get(value, value)
    if value is handle_torch_function:
        return _handle_torch_function
    if _is_replaced(value):
        return _replacements()[value]
    if _is_nn_function(value):
        return _rebind_function(value)
    return _rebind_class(value) if is_module_class(value) else value


def _is_nn_function(value: Any) -> TypeGuard[FunctionType]:
    return isinstance(value, FunctionType) and (value.__module__ or "").startswith("torch.nn.")


def _handle_torch_function(function: Any, relevant_args: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's `handle_torch_function` for rebound code. A type with a ``__torch_function__`` gets torch's
    function, which it knows. A mode, and Tensor's default handler, get manualgrad's."""
    if reason := fallback_reason(relevant_args):
        report_fallback(function, reason)
        function = _original.get(function, function)
    return handle_torch_function(function, relevant_args, *args, **kwargs)


# --- what is rebound ---


@functools.cache
def _kernel_names() -> frozenset[str]:
    """The names under which the modules of `_KERNEL_MODULES` have functions that are replaced."""
    named = ((getattr(value, "__name__", ""), value) for value in _replacements())
    return frozenset(
        name for name, value in named if any(getattr(module, name, None) == value for module in _KERNEL_MODULES)
    )


@functools.cache
def _calls_replaced(start: Any) -> bool:
    """A function or class of torch names something that is replaced, or something else that does."""
    seen, pending = {start}, [start]
    while pending:
        for value in _references(pending.pop()):
            if _is_replaced(value):
                return True
            if (_is_nn_function(value) or is_module_class(value)) and value not in seen:
                seen.add(value)
                pending.append(value)
    return False


def _references(value: Any) -> Iterator[Any]:
    """What the code of a function or of a class and its bases refers to."""
    if isinstance(value, type):
        for base in value.__mro__:
            if issubclass(base, nn.Module) and base is not nn.Module:
                yield from vars(base).values()
    elif parts := boolean_dispatched.get(value):
        yield from (parts["if_true"], parts["if_false"])
    else:
        yield from value.__defaults__ or ()  # an activation, for example
        names = frozenset(_names_in(value.__code__))
        _examined[value] = names
        found = [value.__globals__[name] for name in names & value.__globals__.keys()]
        yield from found
        if any(isinstance(x, ModuleType) and x in _KERNEL_MODULES for x in found):
            yield from (
                getattr(module, name, None) for module in _KERNEL_MODULES for name in names & _kernel_names()
            )


_examined: dict[FunctionType, frozenset[str]] = {}
"""The names in the code of each function of torch that has been searched for replaced names."""


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def refuse_late_registration(original: Any) -> None:
    """Refuse an operation for a function that torch.nn's code calls, since this code has been rebound.

    Raises:
        ValueError: torch.nn calls the function.
    """
    name = getattr(original, "__name__", "")
    scopes = [vars(F), *map(vars, _KERNEL_MODULES)]
    for function, names in _examined.items():
        if name in names and any(scope.get(name) == original for scope in [function.__globals__, *scopes]):
            raise ValueError(
                f"{name} is called by {function.__module__}.{function.__qualname__}, which was rebound when "
                "manualgrad was imported: register it in a file of manualgrad/ops"
            )


def rebound_names() -> dict[str, set[str]]:
    """By module of torch, the names that manualgrad replaces or rebinds."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for function, copy in _rebound.items():
        if copy is not function and _is_nn_function(function):
            local = "<locals>" in function.__qualname__  # of `boolean_dispatch`
            found[function.__module__].add(function.__name__ if local else function.__qualname__)
    for original, replacement in _replacements().items():
        name = getattr(original, "__name__", "")
        if replacement is torch.broadcast_shapes:  # for some versions of torch only
            continue
        for module in (F, *_KERNEL_MODULES):
            if getattr(module, name, None) == original:
                found[module.__name__].add(name)
                break
    return dict(found)


def expected_names() -> dict[str, set[str]]:
    """`REBOUND_NAMES` without what the installed torch does not have yet."""
    return {
        module: {
            name for name in names.split() if torch.__version__ >= TorchVersion(SINCE.get(f"{module}.{name}", "0"))
        }
        for module, names in REBOUND_NAMES.items()
    }


def check(expected: dict[str, set[str]] | None = None) -> None:
    """Check that torch still has all names that manualgrad replaces or rebinds.

    Without this check a function that torch has changed would use torch's derivative silently.

    Raises:
        ImportError: a name is missing, or its code calls nothing any more that manualgrad replaces.
    """
    found = rebound_names()
    missing = [
        f"{module}.{name}"
        for module, names in (expected_names() if expected is None else expected).items()
        for name in sorted(names - found.get(module, set()))
    ]
    if missing:
        raise ImportError(
            f"torch {torch.__version__} does not have {', '.join(missing)}, or their code calls nothing that "
            f"manualgrad replaces. Install a tested version of torch ({', '.join(TESTED_VERSIONS)}), or a "
            "newer manualgrad."
        )


# --- functions ---


def _rebind_function(function: FunctionType) -> FunctionType:
    if function not in _rebound:
        _rebound[function] = _copy_function(function) if _calls_replaced(function) else function
    return _rebound[function]


def _copy_function(function: FunctionType) -> FunctionType:
    parts: Any = boolean_dispatched.get(function)
    if parts is None:
        code, scope = function.__code__, _namespace_of(function.__globals__)
        closure, defaults = function.__closure__, function.__defaults__
    else:
        chosen = _dispatch(
            *(parts["arg_name"], parts["index"], parts["default"]),
            *(_rebind(parts["if_true"]), _rebind(parts["if_false"])),
        )
        code, scope, closure, defaults = chosen.__code__, chosen.__globals__, chosen.__closure__, None
    defaults = defaults and tuple(map(_rebind, defaults))
    # torch.compile stores what it compiled with the code object, so two functions cannot share one
    copy = FunctionType(code.replace(), scope, function.__name__, defaults, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    del vars(copy)["__wrapped__"]
    copy.__module__ = _manual_name(function.__module__)
    _original[copy] = function
    return copy


def _dispatch(
    name: str, index: int, default: bool, if_true: Callable[..., Any], if_false: Callable[..., Any]
) -> FunctionType:
    """One function or the other, by the argument of this name and index."""

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        flag = kwargs[name] if name in kwargs else args[index] if index < len(args) else default
        return if_true(*args, **kwargs) if flag else if_false(*args, **kwargs)

    return dispatch  # type: ignore[return-value]


# --- classes ---


class _ModuleName(str):
    """The ``__module__`` of a rebound class. On an instance it reads "torch.nn": torch.fx calls the layers of this
    module and does not trace into them."""

    __slots__ = ()

    def __get__(self, instance: object, owner: type | None = None) -> str:
        return self if instance is None else "torch.nn"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


class _RefusesQConfig:
    """The attribute ``qconfig``, which torch.ao.quantization sets on each layer before it replaces it."""

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        raise AttributeError("qconfig")

    def __set__(self, instance: object, value: object) -> None:
        raise _unsupported("torch.ao.quantization", instance)


def _prepare_scriptable(self: nn.Module) -> Any:
    raise _unsupported("torch.jit.script", self)


REFUSES_SCRIPTING = {"__prepare_scriptable__": _prepare_scriptable}
"""The method that torch.jit.script calls first."""


def _unsupported(tool: str, module: object) -> RuntimeError:
    return RuntimeError(
        f"{tool} supports torch's own layers only, and this {type(module).__name__} is manualgrad's: "
        "call manualgrad.revert(model) first"
    )


def _rebind_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a class of torch.nn with rebound methods; the class itself if it calls nothing replaced."""
    if original not in _rebound:
        _rebound[original] = _make_class(original) if _calls_replaced(original) else original
    return _rebound[original]


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    contents: dict[str, Any] = {}
    for name, value in vars(original).items():
        if isinstance(value, FunctionType):
            found = _rebind_function(value)
        else:
            found = _rebind_class(value) if is_module_class(value) else value  # what a lazy module becomes
        if found is not value:
            contents[name] = found
    parents = [base for base in original.__bases__ if issubclass(base, nn.Module) and base is not nn.Module]
    bases = [base for base in map(_rebind_class, parents) if base not in original.__mro__]
    how = f"The gradient is derived by hand. To read it: python -m manualgrad show {original.__name__}"
    contents |= {
        "__module__": _ModuleName(_manual_name(original.__module__)),
        "__qualname__": original.__qualname__,
        "__doc__": f"{inspect.cleandoc(original.__doc__ or '')}\n\n{how}",
        "qconfig": _RefusesQConfig(),
        **REFUSES_SCRIPTING,
    }
    if "__firstlineno__" in vars(original):  # since Python 3.13: where `inspect` finds the source
        contents["__firstlineno__"] = vars(original)["__firstlineno__"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a deprecated class warns when a subclass is made
        found = types.new_class(original.__name__, (original, *bases), {}, lambda new: new.update(contents))
    if message := vars(original).get("__deprecated__"):
        found = deprecated(message, category=FutureWarning)(found)
    return found
