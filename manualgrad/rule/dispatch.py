"""``Rule.apply``: chooses the Function, or the plain forward, for the current state of torch.

autocast is enabled           cast the inputs as `Rule.autocast` says, then call ``apply`` without autocast
torch.compile traces          a Function without ``jvp``, which Dynamo does not accept
a torch.func transform        `Rule.function`, with ``generate_vmap_rule``
grad mode or forward mode     the memory-saving Function (see recomputation.py)
torch.jit.trace records       the plain forward: the trace records torch's operations only
otherwise                     the plain forward
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from manualgrad import recomputation
from manualgrad.fallback import TRACING_REASON, get_tracing_state, report_fallback
from manualgrad.rule.function import Implementation, device_type, disable_autocast, make_function
from manualgrad.torch_internals import (
    can_write_inplace,
    in_forward_mode,
    in_functorch_transform,
    is_any_autocast_enabled,
)

recorder: Callable[..., Any] | None = None
"""Called with the rule and its arguments in place of the Function, while `manualgrad.program` captures a model."""


class OpaqueTuple(tuple[Any, ...]):
    """A tuple that torch.func does not flatten.

    In nested forward mode, torch.func miscounts the elements of a plain tuple among the arguments.
    """


def make_apply(implementation: Implementation) -> Callable[..., Any]:
    """Set ``Rule.function`` of a rule, and return its ``Rule.apply``."""
    rule = implementation.rule
    methods: dict[str, Any] = {
        "forward": implementation.forward_without_views,
        "backward": implementation.backward,
    }
    rule.function = make_function(
        rule,
        setup_context=implementation.setup_context,
        jvp=implementation.jvp,
        generate_vmap_rule=True,
        **methods,
    )
    transformed_apply = rule.function.apply
    memory_saving = make_function(
        rule, setup_context=implementation.setup_context_memory_saving, jvp=implementation.jvp, **methods
    )
    eager_apply = _apply_without_signature(memory_saving)
    forward = rule.forward
    has_statistics = implementation.has_statistics

    @cache
    def function_without_jvp() -> Any:
        return make_function(rule, setup_context=implementation.setup_context, **methods)

    def compiled_apply(*args: Any) -> Any:
        return function_without_jvp().apply(*args)

    def allow_in_graph() -> bool:
        torch.compiler.allow_in_graph(compiled_apply)
        return True

    # Dynamo runs a function with this attribute while it traces, and does not trace it. The decorator
    # `torch.compiler.assume_constant_result` sets the attribute, but imports all of Dynamo, which takes as long as
    # importing torch. So does `torch.compiler.allow_in_graph`, so it is called only when Dynamo traces.
    vars(allow_in_graph)["_dynamo_marked_constant"] = True

    def traced_apply(*args: Any) -> Any:
        report_fallback(rule, TRACING_REASON)
        return forward(*args)

    def apply(*args: Any, with_statistics: bool = False) -> Any:
        if recorder is not None:
            result = recorder(rule, args)
            return result[0] if has_statistics and not with_statistics else result
        if is_any_autocast_enabled():
            args = autocast_inputs(rule, args)
            with disable_autocast(args):
                return apply(*args, with_statistics=with_statistics)
        if torch.compiler.is_compiling():
            allow_in_graph()
            result = compiled_apply(*args)
        elif in_functorch_transform():
            result = transformed_apply(*[OpaqueTuple(x) if type(x) is tuple else x for x in args])
        elif torch.is_grad_enabled() or in_forward_mode():
            result = eager_apply(*args) if get_tracing_state() is None else traced_apply(*args)
        else:
            result = forward(*args)
        return result[0] if has_statistics and not with_statistics else result

    # Dynamo caches compiled code by code object, so the `apply` of every rule needs its own.
    apply.__code__ = apply.__code__.replace(co_name=f"{rule.__name__}.apply")
    return apply


def make_inplace_apply(implementation: Implementation) -> Callable[..., Tensor]:
    """``Rule.apply_`` of a rule: writes the output into the input.

    It saves no more than torch's in-place function. If the plan saves the input, the recipe of the input is saved,
    or, if there is none, a copy of the input, as torch does. A later rule that would save the output saves the
    arguments of that recipe, or that copy, instead.
    """
    rule = implementation.rule
    inplace_apply = _apply_without_signature(
        make_function(rule, forward=implementation.forward_inplace, backward=implementation.backward_inplace)
    )
    has_statistics = implementation.has_statistics
    first = implementation.spec.inputs[0]
    needed = (True, *[False] * (implementation.num_inputs - 1))  # only the first input has a gradient

    def apply_(input: Tensor, *settings: Any) -> Tensor:
        # autograd refuses a Function that has several outputs and overwrites a view
        if rule.autocast or not can_write_inplace(input, allow_view=not has_statistics):
            return input.copy_(rule.apply(input.clone(), *settings))
        if not (input.requires_grad and torch.is_grad_enabled()):
            result = rule.forward_(input, *settings)
        else:
            is_large = recomputation.is_large(input)
            plan = implementation.plan(needed, memory_saving=is_large)
            original: Any = recomputation.find_usable_recipe(input) if is_large else None
            if original is None and first in plan.names:
                original = (input.clone(),)
            result = inplace_apply(plan, original, input, *settings)
        return result[0] if has_statistics else result

    return apply_


def _apply_without_signature(function: type[Function]) -> Callable[..., Any]:
    """The ``apply`` of the base class of Function. It is written in C and handles no torch.func transforms.

    ``Function.apply`` calls `inspect.signature` each time, which takes 10 µs.
    """
    parent: Any = super(Function, function)
    return parent.apply


def autocast_inputs(rule: type[Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with floating tensors cast as `Rule.autocast` says. float64 is not cast."""
    device = device_type(args)
    policy = rule.autocast.get(device)
    if policy is None or not torch.is_autocast_enabled(device):
        return args
    if policy == "banned":
        raise RuntimeError(f"{rule.__name__} is unsafe to autocast on {device}")
    dtypes = [x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()]
    if policy == "float32" or (policy == "promote" and torch.float32 in dtypes):
        dtype = torch.float32
    else:
        dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in args
    )
