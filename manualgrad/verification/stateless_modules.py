"""Modules as functions of their parameters and buffers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def functionalize(module: nn.Module) -> tuple[Callable[..., Any], State]:
    """A function to call as ``function(*args, state=state, **kwargs)``, and the module's state."""
    state: State = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def run(*args: Any, state: State, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # Dynamo supports functional_call
            return torch.func.functional_call(module, state, args, kwargs)
        return with_state(module, state)(*args, **kwargs)

    return run, state


def functionalize_by_swapping(module: nn.Module) -> Callable[..., Any]:
    """The same by torch.func.functional_call, for modules that reach their parameters through a closure."""
    return lambda *args, state, **kwargs: torch.func.functional_call(module, state, args, kwargs)


def accepting_state(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference with an argument `state`: a module uses it, a function ignores it."""
    if isinstance(reference, nn.Module):
        return functionalize(reference)[0]
    return lambda *args, state, **kwargs: reference(*args, **kwargs)


def with_state(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module with other parameters and buffers.

    They are replaced in its lists, dicts and bound methods too. What a call caches stays in the copy.
    """
    registered = dict(module.named_parameters(remove_duplicate=False))
    registered |= dict(module.named_buffers(remove_duplicate=False))
    return _copy_with(module, {id(registered[name]): tensor for name, tensor in state.items()})


def _copy_with(value: Any, replacements: dict[int, Any]) -> Any:
    """Copy modules and containers; replace objects by their id. Copies are added to the replacements."""
    if id(value) in replacements:
        return replacements[id(value)]
    if isinstance(value, nn.Module):
        new: Any = object.__new__(type(value))
        replacements[id(value)] = new
        vars(new).update({name: _copy_with(item, replacements) for name, item in vars(value).items()})
        return new
    if isinstance(value, (dict, list, set)):
        new = replacements[id(value)] = value.copy() if type(value) in (dict, list) else copy.copy(value)
        if isinstance(value, dict):
            for key, item in value.items():
                new[key] = _copy_with(item, replacements)
        elif isinstance(value, list):
            new[:] = [_copy_with(item, replacements) for item in value]
        else:
            new.clear()
            new.update(_copy_with(item, replacements) for item in value)
        return new
    if isinstance(value, tuple):
        items = [_copy_with(item, replacements) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _copy_with(value.__self__, replacements))
    if type(value) is functools.partial:
        return functools.partial(
            _copy_with(value.func, replacements),
            *_copy_with(value.args, replacements),
            **_copy_with(value.keywords, replacements),
        )
    return value
