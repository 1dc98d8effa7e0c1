"""Laws of `ctx` and memory: what a Function declares, saves, and keeps alive."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manualgrad.verification.finite_differences import finite_difference
from manualgrad.verification.function_under_test import FunctionUnderTest
from manualgrad.verification.gradients import gradients, random_grad_output, with_grad_outputs
from manualgrad.verification.graph import function_class, function_nodes, patch_attribute
from manualgrad.verification.laws.comparison import format_number
from manualgrad.verification.laws.first_order import NO_FUNCTION, ONE_INPUT
from manualgrad.verification.laws.recording import record_backward_calls
from manualgrad.verification.laws.side_effects import bitwise_equal
from manualgrad.verification.report import LawFailure, LawWarning, NotApplicable, law
from manualgrad.verification.tensors import dtype_and_shape, is_differentiable, num_bytes, real_vector


@law("ctx.x = tensor, instead of ctx.save_for_backward(tensor)")
def no_tensors_on_ctx(fn: FunctionUnderTest) -> None:
    """After forward and after backward, ctx holds no tensors except those of save_for_backward.

    Tensors on ctx skip saved-tensor hooks and version checks, and may stay alive until garbage collection.
    """
    inputs = fn.make_inputs()
    outputs, grad_outputs = with_grad_outputs(fn(*inputs))
    nodes = function_nodes(outputs)
    if not nodes:
        raise NotApplicable(NO_FUNCTION)
    known = [(f"input {fn.input_name(k)}", x) for k, x in enumerate(inputs)]
    known += [(f"output {i}", y) for i, y in enumerate(outputs)]
    for phase in ("forward", "backward"):
        for node in nodes:
            if function_class(node).__module__.startswith("torch."):
                continue  # torch's checkpoint keeps a random state on ctx
            for path, tensor in _tensors_in(vars(node), "ctx", set()):
                role = next((name for name, x in known if tensor is x), "an intermediate tensor")
                raise LawFailure(
                    f"after {phase}, {path} of {function_class(node).__name__} holds {role}, "
                    f"{dtype_and_shape(tensor)} ({num_bytes(tensor)} bytes)"
                )
        if phase == "forward":
            torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True, retain_graph=True)


def _tensors_in(value: Any, path: str, visited: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in containers and plain objects, but not in modules, functions and classes, with their paths."""
    if id(value) in visited or len(visited) > 1000:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_in(item, f"{path}.{key}" if path == "ctx" else f"{path}[{key!r}]", visited)
    elif isinstance(value, (list, tuple, set)):
        for i, item in enumerate(value):
            yield from _tensors_in(item, f"{path}[{i}]", visited)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)) and not callable(value):
        yield from _tensors_in(vars(value), path, visited)


@law("a reference cycle through ctx, or a cache that outlives the graph")
def no_memory_leaks(fn: FunctionUnderTest) -> None:
    """When the outputs are deleted, every tensor of the call is freed without garbage collection.

    Leaked activations exhaust the GPU within some steps. A module may keep tensors that its next call replaces.
    """
    fn = fn.with_persistent_state()
    for _ in range(2):  # constants that are cached once are no leak
        _run_and_release(fn)
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()  # hides all existing objects from gc.get_objects
    try:
        runs = [_run_and_release(fn) for _ in range(3)]
        refs = [ref for run in (runs if fn.module is None else runs[:-1]) for ref in run]
        alive = [name for name, ref in refs if ref() is not None]
        if alive:
            raise LawFailure(
                f"{alive[0]} is still alive after the outputs were deleted ({len(alive)} of {len(refs)} tensors)"
            )
        leaked = _tracked_tensors()
        if leaked and fn.module is not None:
            num_before = len(leaked)
            leaked = []
            for _ in range(3):
                _run_and_release(fn)
            leaked = _tracked_tensors()[num_before:]
        if leaked:
            raise LawFailure(
                f"a tensor that the function created, {dtype_and_shape(leaked[0])}, is still alive after the "
                "outputs were deleted"
            )
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def _tracked_tensors() -> list[Tensor]:
    return [x for x in gc.get_objects() if issubclass(type(x), Tensor)]


def _run_and_release(fn: FunctionUnderTest) -> list[tuple[str, weakref.ref[Tensor]]]:
    """Run forward and backward. Returns weak references to all tensors involved."""
    inputs = fn.make_inputs()
    outputs, grad_outputs = with_grad_outputs(fn(*inputs))
    wanted = [*inputs, *fn.parameters]
    grads = torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True) if outputs else ()
    named = [(f"input {fn.input_name(k)}", x) for k, x in enumerate(inputs)]
    named += [(f"output {i}", y) for i, y in enumerate(outputs)]
    named += [(f"the grad_output of output {i}", u) for i, u in enumerate(grad_outputs)]
    named += [
        (f"the gradient of {fn.input_name(k)}", g)
        for k, g in zip(range(len(inputs)), grads, strict=False)
        if g is not None
    ]
    return [(name, weakref.ref(x)) for name, x in named]


@law("two calls of one ctx method (the last call replaces the others), or calls with tensors that do not qualify")
def correct_ctx_calls(fn: FunctionUnderTest) -> None:
    """mark_dirty, mark_non_differentiable and save_for_backward are called once, with tensors that qualify.

    torch does not check all of it, and a wrong call loses gradients. Dirty tensors are inputs that forward
    writes into and returns. Non-differentiable tensors are outputs, but not all outputs that depend on the inputs.
    """
    inputs = fn.make_inputs()
    nodes = function_nodes(fn(*inputs))
    _check_outputs_require_grad(fn)
    if not nodes:
        raise NotApplicable(NO_FUNCTION)
    for cls in {function_class(node) for node in nodes}:
        calls: dict[str, list[tuple[Any, ...]]] = {
            "mark_dirty": [],
            "mark_non_differentiable": [],
            "save_for_backward": [],
        }
        forwards: list[_Forward] = []
        with ExitStack() as stack:
            for method in calls:
                stack.enter_context(
                    patch_attribute(FunctionCtx, method, _recording_method(method, calls[method], cls))
                )
            recording = staticmethod(_recording_forward(cls.forward, forwards))
            stack.enter_context(patch_attribute(cls, "forward", recording))
            fn(*inputs)
        if forwards:  # none if the function defines a new class in every call
            _check_ctx_calls(cls.__name__, calls, forwards)


class _Forward(NamedTuple):
    args: tuple[Any, ...]
    written: list[Tensor]
    """The arguments that forward has written into."""
    result: Any


def _check_ctx_calls(name: str, calls: dict[str, list[tuple[Any, ...]]], forwards: list[_Forward]) -> None:
    for method, recorded in calls.items():
        if len(recorded) > len(forwards):
            raise LawFailure(
                f"{name} calls ctx.{method} {len(recorded)} times in {len(forwards)} forwards: each call replaces "
                "the one before"
            )
    args, written, result = forwards[0]
    outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    for x in (x for call in calls["mark_dirty"] for x in call):
        if not any(x is a for a in args):
            raise LawFailure(f"{name} marks {dtype_and_shape(x)} as dirty, but it is not an input")
        if not any(x is y for y in outputs):
            raise LawFailure(f"{name} marks the input {dtype_and_shape(x)} as dirty, but does not return it")
        if not any(x is y for y in written):
            raise LawFailure(f"{name} marks the input {dtype_and_shape(x)} as dirty, but does not write into it")
    for y in (y for call in calls["mark_non_differentiable"] for y in call):
        if isinstance(y, Tensor) and not any(y is z for z in outputs):
            role = "the input" if any(y is a for a in args) else "the tensor"
            raise LawFailure(
                f"{name} marks {role} {dtype_and_shape(y)} as non-differentiable, but it is not an output"
            )


def _recording_method(method: str, calls: list[tuple[Any, ...]], cls: type[Function]) -> Any:
    """A method of ctx that records its calls by `cls`, but not those by other Functions of the graph."""
    original = getattr(FunctionCtx, method)

    def run(ctx: Any, *tensors: Any) -> None:
        if getattr(ctx, "_forward_cls", cls) is cls:
            calls.append(tensors)
        original(ctx, *tensors)

    return run


def _recording_forward(forward: Any, forwards: list[_Forward]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        versions = [(x._version, x) for x in args if isinstance(x, Tensor)]
        result = forward(*args, **kwargs)
        written = [x for version, x in versions if x._version > version]
        forwards.append(_Forward(args, written, result))
        return result

    return run


def _check_outputs_require_grad(fn: FunctionUnderTest) -> None:
    """If no output requires a gradient, no output may depend on the inputs."""
    fn = fn.highest_precision
    if fn.output_indices:
        return
    outputs = fn(*fn.make_inputs())
    other = fn.with_primals(fn.primals)
    other.output_indices = [i for i, y in enumerate(outputs) if is_differentiable(y)]
    for k, x in enumerate(fn.primals):
        slope, error = finite_difference(other, {k: random_grad_output(real_vector(x), 5)})
        nonzero = (error <= 1e-3 * (1 + slope.abs())) & (slope.abs() > 1e-3)
        if nonzero.any():
            raise LawFailure(
                f"no output requires a gradient, but an output depends on {fn.input_name(k)}: its finite "
                f"difference along a random line is {format_number(slope[nonzero][0])}",
                "mark_non_differentiable on the output, or a forward that detaches it",
            )


class _CapturedTensorDetector(TorchDispatchMode):
    """Collects tensors that require a gradient and are neither arguments nor created within the context."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.known_storages = {x.untyped_storage()._cdata for x in arguments}
        self.keep_alive: list[Any] = list(arguments)  # a freed storage's address may be reused
        self.captured: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.requires_grad and x.untyped_storage()._cdata not in self.known_storages:
                self.captured.append(x)
        result = func(*args, **(kwargs or {}))
        for y in tree_leaves(result):
            if isinstance(y, Tensor):
                self.keep_alive.append(y)
                self.known_storages.add(y.untyped_storage()._cdata)
        return result


@law("forward reads a weight from a closure, an attribute, a global or a list: pass it as an argument")
def no_captured_tensors(fn: FunctionUnderTest) -> None:
    """Every tensor that requires a gradient and is used by forward is an argument of the Function.

    The gradient of any other tensor is silently lost.
    """
    inputs = fn.make_inputs()
    nodes = function_nodes(fn(*inputs))
    if not nodes:
        raise NotApplicable(NO_FUNCTION)

    def detecting_forward(cls: type[Function], forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _CapturedTensorDetector([x for x in args if isinstance(x, Tensor)]) as detector:
                result = forward(*args, **kwargs)
            for x in detector.captured:
                nested = any(x is y for argument in args for y in tree_leaves(argument))
                role = "inside a container, where autograd does not find it" if nested else "not an argument"
                raise LawFailure(
                    f"{cls.__name__}.forward uses {dtype_and_shape(x)}, which requires a gradient and is {role}"
                )
            return result

        return run

    with ExitStack() as stack:
        for cls in {function_class(node) for node in nodes}:
            stack.enter_context(patch_attribute(cls, "forward", staticmethod(detecting_forward(cls, cls.forward))))
        fn(*inputs)


@law("backward does not check ctx.needs_input_grad")
def no_unneeded_gradients(fn: FunctionUnderTest) -> None:
    """backward computes no gradient of an input that does not require one.

    Frozen layers otherwise cost as much time as trained ones.
    """
    n = len(fn.input_indices)
    if n == 1:
        raise NotApplicable(ONE_INPUT)
    seconds_for_all = _backward_seconds(fn, [True] * n)
    for k in range(n):
        requires_grad = [i == k for i in range(n)]
        inputs = fn.make_inputs(requires_grad)
        outputs = [y for y in fn(*inputs) if y.requires_grad]
        if not function_nodes(outputs):
            continue
        with record_backward_calls(outputs) as calls:
            gradients(fn, inputs)
        for call in calls:
            for i, (grad, edge) in enumerate(zip(call.grad_inputs, call.edges, strict=False)):
                if grad is not None and edge is not None and edge[0] is None:
                    ratio = _backward_seconds(fn, requires_grad) / seconds_for_all
                    raise LawWarning(
                        f"if only {fn.input_name(k)} requires a gradient, {call.name}.backward also computes "
                        f"gradient {i}, {dtype_and_shape(grad)} ({num_bytes(grad)} bytes); this backward takes "
                        f"{ratio:.2f} of the time for all gradients"
                    )


def _backward_seconds(fn: FunctionUnderTest, requires_grad: Sequence[bool]) -> float:
    """The minimum of five runs."""
    best = 1e9
    inputs = fn.make_inputs(requires_grad)
    wanted = [x for x in inputs if x.requires_grad]
    for _ in range(5):
        outputs, grad_outputs = with_grad_outputs(fn(*inputs))
        begin = time.perf_counter()
        torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True)
        best = min(best, time.perf_counter() - begin)
    return best


@law("forward saves tensors without checking ctx.needs_input_grad")
def no_unused_saved_tensors(fn: FunctionUnderTest) -> None:
    """Every saved tensor affects a gradient that is needed.

    Saved tensors are most of a training run's memory. The law changes each one and compares the gradients.
    """
    n = len(fn.input_indices)
    for requires_grad in [[True] * n] + ([[i == k for i in range(n)] for k in range(n)] if n > 1 else []):
        saved = _saved_tensors(fn, requires_grad)
        unused = [tensor for tensor in saved if not tensor.affects_gradients]
        if unused and len(unused) < len(saved):
            names = ", ".join(fn.input_name(k) for k in range(n) if requires_grad[k])
            descriptions = ", ".join(x.description for x in unused)
            raise LawWarning(
                f"for the gradient of {names}, forward saves {sum(x.num_bytes for x in saved)} bytes; backward "
                f"does not use {sum(x.num_bytes for x in unused)} of them: {descriptions}"
            )


class _SavedTensor(NamedTuple):
    description: str
    num_bytes: int
    affects_gradients: bool


def _saved_tensors(fn: FunctionUnderTest, requires_grad: Sequence[bool]) -> list[_SavedTensor]:
    """The tensors that the function saves for these gradients."""
    inputs = fn.make_inputs(requires_grad)
    wanted = [x for x in inputs if x.requires_grad]
    sizes: list[tuple[str, int]] = []

    def run(replaced: int | None) -> list[Tensor | None] | None:
        """The gradients, if this saved tensor is replaced. None if backward raises an error."""
        count = -1

        def pack(x: Tensor) -> tuple[int, Tensor]:
            nonlocal count
            count += 1
            if replaced is None:
                sizes.append((dtype_and_shape(x), num_bytes(x)))
            return count, x

        def unpack(packed: tuple[int, Tensor]) -> Tensor:
            i, x = packed
            return _with_other_values(x) if i == replaced else x

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            outputs, grad_outputs = with_grad_outputs(fn(*inputs))
        try:
            return list(torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True)) if outputs else []
        except Exception:
            return None

    expected = run(None)

    def affects_gradients(i: int) -> bool:
        result = run(i)
        return (
            result is None
            or expected is None
            or any(
                (a is None) != (b is None) or (a is not None and b is not None and not bitwise_equal(a, b))
                for a, b in zip(result, expected, strict=True)
            )
        )

    return [_SavedTensor(*size, affects_gradients(i)) for i, size in enumerate(sizes)]


def _with_other_values(tensor: Tensor) -> Tensor:
    if is_differentiable(tensor):
        return torch.full_like(tensor, float("nan"))
    return tensor.logical_not() if tensor.dtype == torch.bool else torch.zeros_like(tensor) + (tensor == 0)
