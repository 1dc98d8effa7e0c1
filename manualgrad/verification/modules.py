"""A module as a function of its parameters and buffers too."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def as_function(module: nn.Module) -> tuple[Callable[..., Any], State]:
    """The function, and the tensors to call it with: ``function(*args, state=state, **kwargs)``."""
    state: State = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def run(*args: Any, state: State, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # Dynamo knows functional_call
            return torch.func.functional_call(module, state, args, kwargs)
        return with_state(module, state)(*args, **kwargs)

    return run, state


def as_function_that_swaps(module: nn.Module) -> Callable[..., Any]:
    """The same by torch.func.functional_call, for a module that reaches its parameters through a closure."""
    return lambda *args, state, **kwargs: torch.func.functional_call(module, state, args, kwargs)


def ignoring_state(reference: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(reference, nn.Module):
        return as_function(reference)[0]
    return lambda *args, state, **kwargs: reference(*args, **kwargs)


def with_state(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module with these tensors for its parameters and buffers, wherever it keeps them: in lists and
    dicts too, and for a backward that comes back to the module. What it caches, it caches in the copy."""
    registered = dict(module.named_parameters(remove_duplicate=False))
    registered |= dict(module.named_buffers(remove_duplicate=False))
    return _copied(module, {id(registered[name]): tensor for name, tensor in state.items()})


def _copied(value: Any, known: dict[int, Any]) -> Any:
    """`value` with modules and containers copied, and what is known replaced."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, nn.Module):
        new: Any = object.__new__(type(value))
        known[id(value)] = new
        vars(new).update({name: _copied(item, known) for name, item in vars(value).items()})
        return new
    if isinstance(value, (dict, list, set)):
        new = known[id(value)] = value.copy() if type(value) in (dict, list) else copy.copy(value)
        if isinstance(value, dict):
            for key, item in value.items():
                new[key] = _copied(item, known)
        elif isinstance(value, list):
            new[:] = [_copied(item, known) for item in value]
        else:
            new.clear()
            new.update(_copied(item, known) for item in value)
        return new
    if isinstance(value, tuple):
        items = [_copied(item, known) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _copied(value.__self__, known))
    if type(value) is functools.partial:
        return functools.partial(
            _copied(value.func, known), *_copied(value.args, known), **_copied(value.keywords, known)
        )
    return value
