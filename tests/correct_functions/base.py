"""The table of correct Functions, and how to define one by its forward and gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from defects.base import random_leaves
from torch import Tensor
from torch.autograd import Function

Inputs = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class CorrectFunction:
    name: str
    function: Callable[..., Any]
    inputs: Inputs


CORRECT_FUNCTIONS: list[CorrectFunction] = []

MATRIX = random_leaves((3, 4))
IMAGE = random_leaves((1, 2, 3, 4))
COMPLEX_PAIR = random_leaves((3, 2, 2), (3, 2, 2))


def with_constants(inputs: Inputs, *constants: Tensor) -> Inputs:
    """The inputs, followed by tensors without a gradient."""
    return lambda: (*inputs(), *(constant.clone() for constant in constants))


def correct_function(name: str, inputs: Inputs) -> Callable[[Any], Any]:
    """Register a Function or a function."""

    def register(function: Any) -> Any:
        apply = function.apply if isinstance(function, type) else function
        CORRECT_FUNCTIONS.append(CorrectFunction(name, apply, inputs))
        return function

    return register


def make_function(
    name: str,
    inputs: Inputs,
    forward: Callable[..., Any],
    *,
    once_differentiable: bool = False,
    custom_fwd: bool = False,
    setup_context: bool = False,
    jvp: Callable[..., Any] | None = None,
    **gradients: Callable[..., Tensor],
) -> None:
    """Register a Function, given its forward and its gradients.

    Args:
        name: what the table calls it.
        inputs: makes the inputs.
        forward: from the inputs to the output, or to several outputs, of which only the first is differentiable.
        once_differentiable: decorate backward with `once_differentiable`.
        custom_fwd: run in float32 under autocast.
        setup_context: define `setup_context` and `generate_vmap_rule`, instead of a forward with ctx.
        jvp: from the tangent of the only input to that of the output.
        gradients: for each differentiable input a function of grad_output. Like `jvp`, it names what it uses as
            further parameters: inputs, `output`, or `output0`, `output1`, ... Only these are saved.
    """
    input_names = list(inspect.signature(forward).parameters)

    def parameters(function: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(function).parameters)[1:]

    def save(ctx: Any, values: tuple[Any, ...], result: Any) -> None:
        outputs = result if isinstance(result, tuple) else (result,)
        available = dict(zip(input_names, values, strict=True)) | {"output": result}
        available |= {f"output{k}": output for k, output in enumerate(outputs)}
        if outputs[1:]:
            ctx.mark_non_differentiable(*outputs[1:])
        used = [
            name
            for input_name, gradient in gradients.items()
            if ctx.needs_input_grad[input_names.index(input_name)]
            for name in parameters(gradient)
        ]
        ctx.saved_names = list(dict.fromkeys(used))
        ctx.save_for_backward(*(available[name] for name in ctx.saved_names))
        if jvp is not None:
            ctx.save_for_forward(*(available[name] for name in parameters(jvp)))

    def forward_with_ctx(ctx: Any, *values: Any) -> Any:
        result = forward(*values)
        save(ctx, values, result)
        return result

    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        saved = dict(zip(ctx.saved_names, ctx.saved_tensors, strict=True))
        return tuple(
            gradients[name](grad, *(saved[used] for used in parameters(gradients[name])))
            if name in gradients and ctx.needs_input_grad[k]
            else None
            for k, name in enumerate(input_names)
        )

    methods: dict[str, Any] = {"forward": forward_with_ctx, "backward": backward}
    if once_differentiable:
        methods["backward"] = torch.autograd.function.once_differentiable(backward)
    if custom_fwd:
        methods["forward"] = torch.amp.custom_fwd(forward_with_ctx, device_type="cpu", cast_inputs=torch.float32)
        methods["backward"] = torch.amp.custom_bwd(methods["backward"], device_type="cpu")
    if setup_context:
        methods |= {"forward": forward, "setup_context": save}
    if jvp is not None:
        methods["jvp"] = lambda ctx, tangent: jvp(tangent, *ctx.saved_tensors)
    attributes: dict[str, Any] = {key: staticmethod(method) for key, method in methods.items()}
    class_name = "".join(part.capitalize() for part in name.split())
    function = type(class_name, (Function,), attributes | {"generate_vmap_rule": setup_context})
    correct_function(name, inputs)(function)
