"""Stages 1 and 2 of scripts/check_gpu.py: values and gradients of operations and modules. Needs torch only."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import manualgrad
from manualgrad import registry, verify
from manualgrad.registry import Op, SampleInput, TensorFactory
from manualgrad.verification.gradients import random_grad_output

from .gpu_results import FAILED, PASSED, SKIPPED, Row
from .module_inputs import INPUTS, WITHOUT_INPUTS

Item = Callable[[], Iterable[Row]]
Items = dict[str, Item]
"""The items of a stage. A name is that of an operation, module or model, optionally with ", " and a kind."""

ERROR_FACTOR, ULPS, ULPS_TO_TORCH = 2, 4, 16
"""The allowed error: `ERROR_FACTOR` times torch's plus `ULPS` units in the last place; `ULPS_TO_TORCH` units if
torch's result is itself the reference."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAWS = ("double_backward", "forward_mode", "autocast", "vmap")
COMMON_OPERATIONS = (
    *("linear", "layer_norm", "gelu", "scaled_dot_product_attention", "cross_entropy", "softmax", "conv2d"),
    *("batch_norm", "relu", "rms_norm", "silu", "embedding", "dropout", "linear_cross_entropy", "group_norm"),
    *("sigmoid", "tanh", "mse_loss", "log_softmax", "max_pool2d", "binary_cross_entropy_with_logits"),
)
"""The operations that most models call. They come first."""


class DeviceLost(Exception):
    """A kernel has failed in a way after which the process cannot use the device any more."""


def check_device(device: str) -> None:
    """Raise DeviceLost if an earlier kernel has failed."""
    try:
        if device != "cpu":
            torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLost(one_line(error)) from error


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(": ")


# Comparison


class Results(NamedTuple):
    """Outputs and gradients of a function."""

    tensors: list[tuple[str, Tensor]]
    """Names and tensors, on the CPU."""
    random: bool
    """Whether the function drew random numbers."""


FunctionCall = tuple[Callable[..., Any], Sequence[Any], dict[str, Any], Sequence[Tensor]]
"""A function, its positional and keyword arguments, and its parameters."""
MakeCall = Callable[[bool, str, torch.dtype], FunctionCall]
"""Makes the call of manualgrad (True) or torch (False) on a device and in a dtype."""


def run_call(call: FunctionCall, dtype: torch.dtype) -> Results:
    """Return outputs and gradients for a fixed random state and fixed output gradients, rounded to `dtype`."""
    function, args, kwargs, parameters = call
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    leaves += parameters
    torch.manual_seed(7)
    states = random_states()
    outputs = [y for y in tree_leaves(function(*args, **kwargs)) if isinstance(y, Tensor)]
    random = not all(map(torch.equal, states, random_states()))
    results = [(f"output {i}", y) for i, y in enumerate(outputs)]
    differentiable = [y for y in outputs if y.requires_grad]
    if differentiable and leaves:
        grad_outputs = [
            random_grad_output(y.detach().to(dtype), 3 + i).to(y) for i, y in enumerate(differentiable)
        ]
        grads = torch.autograd.grad(differentiable, leaves, grad_outputs, allow_unused=True)
        for i, (x, g) in enumerate(zip(leaves, grads, strict=True)):
            results.append((f"gradient {i} {list(x.shape)}", torch.zeros_like(x) if g is None else g.to_dense()))
    return Results([(name, x.detach().cpu()) for name, x in results], random)


def random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def compare_results(manual: Results, reference: Results, exact: Results, dtype: torch.dtype) -> Row:
    """Compare the errors of manualgrad's and torch's results relative to `exact`. The row shows the worst one."""
    factor, ulps = (0, ULPS_TO_TORCH) if exact is reference else (ERROR_FACTOR, ULPS)
    eps, largest = torch.finfo(dtype).eps, 0.1 * torch.finfo(dtype).max
    if len(manual.tensors) != len(reference.tensors):
        return {"status": FAILED, "detail": f"{len(manual.tensors)} results, torch's {len(reference.tensors)}"}
    worst, row = 0.0, {"status": PASSED, "manual_error": 0.0, "torch_error": 0.0}
    for (name, a), (_, b), (_, truth) in zip(manual.tensors, reference.tensors, exact.tensors, strict=True):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            shapes = f"{name} is {a.dtype} {list(a.shape)}, torch's {b.dtype} {list(b.shape)}"
            return {"status": FAILED, "detail": shapes}
        floating = a.is_floating_point()
        truth = truth.double() if floating else b.double()  # indices are compared with torch's
        manual_error, torch_error = ((x.double() - truth).norm().item() for x in (a, b))
        size = truth.norm().item()
        if not size < largest or not math.isfinite(torch_error):  # outside the range of the dtype
            continue
        allowed = factor * torch_error + ulps * eps * size * floating
        excess = manual_error / allowed if allowed else math.inf if manual_error else 0.0
        excess = math.inf if math.isnan(excess) else excess
        if excess >= worst:
            worst, errors = excess, [f"{x / (size or 1):.2g}" for x in (manual_error, torch_error)]
            row = {"status": PASSED, "manual_error": errors[0], "torch_error": errors[1], "result": name}
    if worst > 1:
        row["status"] = FAILED
        row["detail"] = (
            f"{row['result']}: relative error {row['manual_error']}, torch's {row['torch_error']}"
            f"{' (random numbers: compared with torch)' if reference.random else ''}"
        )
    return row


def compare_calls(
    make: MakeCall, device: str, dtype: torch.dtype, torch_is_wrong: bool = False, exact_device: str = "cpu"
) -> Row:
    """Compare manualgrad and torch on a device, relative to float64 on `exact_device`.

    float64 is torch's, or manualgrad's if torch's gradient is wrong.
    """
    try:
        reference = run_call(make(False, device, dtype), dtype)
    except (RuntimeError, ValueError) as error:
        check_device(device)
        return {"status": SKIPPED, "detail": f"torch raises {one_line(error)}"}
    try:
        manual = run_call(make(True, device, dtype), dtype)
    except Exception as error:
        check_device(device)
        return {"status": FAILED, "detail": f"it raises {one_line(error)}"}
    exact = run_call(make(torch_is_wrong, exact_device, torch.float64), dtype)
    if torch_is_wrong:
        reference = Results([(name, x.to(dtype)) for name, x in exact.tensors], False)
    random = exact.random or reference.random
    reference = reference._replace(random=random)
    return compare_results(manual, reference, reference if random or torch_is_wrong else exact, dtype)


def arguments_on(call: SampleInput, device: str, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a sample on a device and in a dtype. Differentiable tensors require a gradient."""
    places = call.tensor_paths()
    tensors = [x.to(device, dtype if x.is_floating_point() else x.dtype) for x in (call[at] for at in places)]
    return call.replace(places, tensors).with_requires_grad()


def operation_call(op: Op, call: SampleInput, function: Callable[..., Any] | None = None) -> MakeCall:
    """A call of an operation, or of `function` in its place."""
    manual_function = function or op.function

    def make(manual: bool, device: str, dtype: torch.dtype) -> FunctionCall:
        return manual_function if manual else op.reference, *arguments_on(call, device, dtype), ()

    return make


def has_wrong_torch_gradient(op: Op) -> bool:
    return "gradients_match_torch" in op.expected_failures


# Stage 1: operations


def ordered_operations() -> dict[str, Op]:
    """All operations, the common ones first."""
    ops = registry.ops()
    return {name: ops[name] for name in dict.fromkeys((*COMMON_OPERATIONS, *ops)) if name in ops}


def operation_items(options: argparse.Namespace) -> Items:
    ops = ordered_operations()
    items: Items = {name: partial(sample_rows, op, options.device) for name, op in ops.items()}
    return items | {f"{name}, laws": partial(law_rows, op, options.device) for name, op in ops.items()}


def sample_rows(op: Op, device: str) -> Iterator[Row]:
    """Value and gradients of each sample in each dtype."""
    samples = {dtype: list(op.sample_inputs(TensorFactory(dtype))) for dtype in DTYPES.values()}
    for number in range(len(samples[torch.float32])):
        for dtype, calls in samples.items():
            row = compare_calls(operation_call(op, calls[number]), device, dtype, has_wrong_torch_gradient(op))
            yield {"case": f"sample {number} ({calls[number]})", **row}


def law_rows(op: Op, device: str) -> Iterator[Row]:
    """The laws of the first sample."""
    call = next(iter(op.sample_inputs(TensorFactory())))
    for law in (*LAWS, *(["gradient"] if op.random else [])):
        if reason := op.expected_failures.get(law, op.expected_failures.get(f"{law}-0")):
            yield {"status": SKIPPED, "case": law, "detail": f"{law} is declared as unsupported: {reason}"}
            continue
        args, kwargs = arguments_on(call, device, torch.float64)
        report = verify(
            op.function,
            *args,
            kwargs=kwargs,
            reference=op.reference,
            laws=[law],
            require=[law],
            surrogate=not call.gradient_is_derivative,
        )
        detail = "; ".join(row.evidence for row in report.rows if row.law in report.failures)
        yield {"status": PASSED if report.ok else FAILED, "case": law, "detail": detail}


# Stage 2: modules


def module_items(options: argparse.Namespace) -> Items:
    classes = {x: kind for x, kind in vars(torch.nn).items() if inspect.isclass(kind)}
    names = [x for x, kind in classes.items() if issubclass(kind, torch.nn.Module) and x not in WITHOUT_INPUTS]
    return {name: partial(module_rows, name, options.device) for name in names}


def module_rows(name: str, device: str) -> Iterator[Row]:
    """Outputs and gradients of a module in training and evaluation mode."""
    if name not in INPUTS:
        yield {"status": SKIPPED, "case": "", "detail": "scripts/lib/module_inputs.py has no inputs for it"}
        return
    for training in (True, False):
        for dtype_name in ("float32", "bfloat16"):
            dtype = DTYPES[dtype_name]
            make = partial(module_call, name, training, dtype)
            row = compare_calls(make, device, dtype, torch_is_wrong=name == "CrossMapLRN2d")
            yield {"case": f"{'training' if training else 'evaluation'}, {dtype_name}", **row}


def module_call(
    name: str, training: bool, rounding: torch.dtype, manual: bool, device: str, dtype: torch.dtype
) -> FunctionCall:
    """A call of a module with parameters and inputs that are rounded to `rounding`."""
    make_module, make_inputs = INPUTS[name]
    torch.manual_seed(0)
    module = make_module(manualgrad.nn if manual else torch.nn).train(training)
    if name.startswith("Lazy"):
        module(*make_inputs(TensorFactory(torch.float32)).args)
    module.to(rounding).to(device, dtype)
    inputs = arguments_on(make_inputs(TensorFactory(rounding)), device, dtype)
    return module, *inputs, list(module.parameters())
