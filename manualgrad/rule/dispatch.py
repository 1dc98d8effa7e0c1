"""How a rule is called: ``apply``, with what autocast, torch.compile, torch.func and no_grad ask for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from manualgrad import recomputation
from manualgrad.fallback import TRACED, fallback, tracing_state
from manualgrad.rule.function import Implementation, device_type, function, without_autocast
from manualgrad.rule.torch_internals import (
    in_forward_mode,
    is_any_autocast_enabled,
    is_transformed,
    may_be_overwritten,
)


class Whole(tuple[Any, ...]):
    """A tuple that torch.func takes for one setting.

    A plain tuple it spreads out, and then it miscounts the parts if forward modes are nested.
    """


def make_apply(implementation: Implementation) -> Callable[..., Any]:
    """The entry of a rule, for each state of torch the fastest that gives the right result."""
    rule = implementation.rule
    parts: dict[str, Any] = {"forward": implementation.writable_forward, "backward": implementation.backward}
    rule.function = function(
        rule,
        setup_context=implementation.setup_context,
        jvp=implementation.jvp,
        generate_vmap_rule=True,
        **parts,
    )
    general = rule.function.apply
    memory_saving = function(
        rule, setup_context=implementation.setup_memory_saving, jvp=implementation.jvp, **parts
    )
    parent: Any = super(Function, memory_saving)
    direct = parent.apply  # Function.apply without the 10 µs in which it reads the signature
    forward = rule.forward
    has_statistics = implementation.has_statistics

    @cache
    def without_jvp() -> Any:
        return function(rule, setup_context=implementation.setup_context, **parts)

    def compiled(*args: Any) -> Any:
        """In a graph of torch.compile: Dynamo refuses a Function with jvp."""
        return without_jvp().apply(*args)

    def allow() -> bool:
        torch.compiler.allow_in_graph(compiled)
        return True

    # What `torch.compiler.assume_constant_result` sets: Dynamo calls the function while it traces. To call that or
    # allow_in_graph here would import all of Dynamo, which takes as long as to import torch.
    vars(allow)["_dynamo_marked_constant"] = True

    def traced(*args: Any) -> Any:
        fallback(rule, TRACED)
        return forward(*args)

    def apply(*args: Any, with_statistics: bool = False) -> Any:
        if is_any_autocast_enabled():
            args = cast(rule, args)
            with without_autocast(args):
                return apply(*args, with_statistics=with_statistics)
        if torch.compiler.is_compiling():
            allow()
            result = compiled(*args)
        elif is_transformed():
            result = general(*[Whole(x) if type(x) is tuple else x for x in args])
        elif torch.is_grad_enabled() or in_forward_mode():
            # torch.jit.trace records no Function, but torch's functions
            result = direct(*args) if tracing_state() is None else traced(*args)
        else:
            result = forward(*args)
        return result[0] if has_statistics and not with_statistics else result

    # Dynamo caches what it compiled by the code object, so two rules need two.
    apply.__code__ = apply.__code__.replace(co_name=f"{rule.__name__}.apply")
    return apply


def make_apply_(implementation: Implementation) -> Callable[..., Tensor]:
    """``apply`` that writes over the input, and saves no more than torch does when it writes there.

    If a saved quantity needs the input, and that has no recipe, a copy is saved, as torch saves one. A later rule
    that would save the output saves the copy instead.
    """
    rule = implementation.rule
    in_place = function(rule, forward=implementation.forward_in_place, backward=implementation.backward_in_place)
    parent: Any = super(Function, in_place)
    direct = parent.apply
    has_statistics = implementation.has_statistics
    first = implementation.spec.inputs[0]
    needed = (True, *[False] * (implementation.n - 1))

    def apply_(input: Tensor, *settings: Any) -> Tensor:
        if rule.autocast or not may_be_overwritten(input, as_view=not has_statistics):
            return input.copy_(rule.apply(input.clone(), *settings))
        if not (input.requires_grad and torch.is_grad_enabled()):
            result = rule.forward_(input, *settings)
        else:
            large = recomputation.large(input)
            plan = implementation.plan(needed, False, large)
            before: Any = recomputation.usable_recipe_of(input) if large else None
            if before is None and first in plan.names:
                before = (input.clone(),)
            result = direct(plan, before, input, *settings)
        return result[0] if has_statistics else result

    return apply_


def cast(rule: type[Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating tensors as autocast passes them to the rule (float64 stays)."""
    device = device_type(args)
    policy = rule.autocast.get(device)
    if policy is None or not torch.is_autocast_enabled(device):
        return args
    if policy == "refuse":
        raise RuntimeError(f"{rule.__name__} is unsafe to autocast on {device}")
    floats = [x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()]
    if policy == "float32" or (policy == "promote" and torch.float32 in floats):
        to = torch.float32
    else:
        to = torch.get_autocast_dtype(device)
    return tuple(
        x.to(to) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in args
    )
