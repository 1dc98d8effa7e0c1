"""Laws of torch.func: vjp, vmap, Jacobians."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, vjp, vmap

from manualgrad.verification.function_under_test import FunctionUnderTest
from manualgrad.verification.gradients import gradients, random_grad_output, with_grad_outputs, zeros_for_none
from manualgrad.verification.laws.comparison import compare, compare_gradients, format_error
from manualgrad.verification.laws.first_order import NO_OUTPUT
from manualgrad.verification.report import NotApplicable, Unsupported, law


def _differentiable_outputs(fn: FunctionUnderTest) -> Callable[..., tuple[Tensor, ...]]:
    """The function without the outputs that require no gradient."""
    if not fn.output_indices:
        raise NotApplicable(NO_OUTPUT)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = fn(*inputs)
        return tuple(outputs[i] for i in fn.output_indices)

    return run


@law("setup_context or backward behaves differently for the wrapped tensors of torch.func")
def torch_func_vjp(fn: FunctionUnderTest) -> None:
    """torch.func.vjp returns the gradient that torch.autograd.grad returns.

    Functional training loops and per-sample gradients use torch.func.
    """
    fn = fn.highest_precision
    expected = gradients(fn, fn.make_inputs())
    function = _differentiable_outputs(fn)
    try:
        outputs, pullback, *_ = vjp(function, *[x.clone() for x in fn.primals])
        indexed = zip(outputs, fn.output_indices, strict=True)
        grads = list(pullback(tuple(random_grad_output(y, 3 + i) for y, i in indexed)))
    except Exception as error:
        raise Unsupported(format_error(error)) from error
    compare_gradients(fn, grads, expected, fn.rounding_tolerance, ("torch.func.vjp", "torch.autograd.grad"))


@law("the vmap rule confuses axes, or treats an input without a batch axis as batched")
def vmap_(fn: FunctionUnderTest) -> None:
    """torch.func.vmap over the first or last axis of each subset of the inputs equals a loop.

    Ensembles and per-sample gradients are computed with vmap.
    """
    fn = fn.highest_precision
    n = len(fn.input_indices)
    if n <= 3:
        all_in_dims = list(itertools.product((None, 0, -1), repeat=n))
    else:
        all_in_dims = [tuple(0 if i == k else None for i in range(n)) for k in range(n)]
        all_in_dims += [(0,) * n, (-1,) * n]
    for in_dims in all_in_dims:
        if any(dim is not None for dim in in_dims):
            _check_vmap(fn, in_dims)


def _check_vmap(fn: FunctionUnderTest, in_dims: tuple[int | None, ...]) -> None:
    samples = [[x, *_nearby_values(x)] for x in fn.primals]
    batched = [
        x if dim is None else torch.stack(row, dim)
        for x, row, dim in zip(fn.primals, samples, in_dims, strict=True)
    ]
    rows = [
        [x if dim is None else row[i] for x, row, dim in zip(fn.primals, samples, in_dims, strict=True)]
        for i in range(3)
    ]
    condition = "with in_dims " + ", ".join(
        f"{fn.input_name(k)}: {dim}" for k, dim in enumerate(in_dims) if dim is not None
    )
    try:
        expected_outputs = [fn(*row) for row in rows]
        expected_grads = [_gradients_of_loss(fn, row) for row in rows]
    except Exception:
        return  # the function refuses these values also without vmap
    try:
        outputs = vmap(fn, in_dims=in_dims, randomness="same")(*batched)
    except Exception as error:
        raise Unsupported(f"{condition}: {format_error(error)}") from error
    for i, y in enumerate(outputs):
        expected = torch.stack([outputs[i] for outputs in expected_outputs])
        compare(f"{condition}, output {i}", y, expected, fn.rounding_tolerance, ("vmap", "loop"))

    def summed_loss(*inputs: Tensor) -> Tensor:
        return vmap(fn.scalar_loss, in_dims=in_dims, randomness="same")(*inputs).sum()

    inputs = [x.detach().clone().requires_grad_() for x in batched]
    try:
        grad_of_vmap = torch.autograd.grad(summed_loss(*inputs), inputs, allow_unused=True)
        grad = torch.func.grad(fn.scalar_loss, tuple(range(len(inputs))))  # type: ignore[arg-type]
        vmap_of_grad = vmap(grad, in_dims=in_dims, randomness="same")(*[x.detach() for x in batched])
    except Exception as error:
        raise Unsupported(f"{condition}, gradient: {format_error(error)}") from error
    for k, dim in enumerate(in_dims):
        per_row = torch.stack([grads[k] for grads in expected_grads])
        name = f"{condition}, gradient of {fn.input_name(k)}"
        compare(name, vmap_of_grad[k], per_row, fn.rounding_tolerance, ("vmap of grad", "loop"))
        total = per_row.sum(0) if dim is None else per_row.movedim(0, dim)
        compare(name, grad_of_vmap[k], total, fn.rounding_tolerance, ("grad of vmap", "loop"))


def _nearby_values(x: Tensor) -> list[Tensor]:
    """Two more values of similar size and equal sign, in case x is a probability or a scale."""
    return [x * 0.9 + 0.05 * x.abs(), x * 0.6]


def _gradients_of_loss(fn: FunctionUnderTest, values: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in values]
    return zeros_for_none(torch.autograd.grad(fn.scalar_loss(*inputs), inputs, allow_unused=True), inputs)


@law("backward reads shapes or values of grad_output, which has another batch axis here")
def batched_gradients(fn: FunctionUnderTest) -> None:
    """torch.func.vmap of torch.autograd.grad over several grad_outputs equals a loop.

    torch.autograd.functional.jacobian(vectorize=True) computes Jacobians this way.
    """
    # not is_grads_batched=True: it uses an older vmap, in which `.data` crashes the process
    fn = fn.highest_precision
    inputs = fn.make_inputs()
    outputs = [y for y in fn(*inputs) if y.requires_grad]
    if not outputs:
        raise NotApplicable(NO_OUTPUT)
    separate = [with_grad_outputs(outputs, seed)[1] for seed in (3, 13, 23)]
    stacked = [torch.stack(parts) for parts in zip(*separate, strict=True)]
    options: dict[str, Any] = {"allow_unused": True, "retain_graph": True}
    loop = [torch.autograd.grad(outputs, inputs, grad_outputs, **options) for grad_outputs in separate]

    def pullback(*grad_outputs: Tensor) -> list[Tensor]:
        return zeros_for_none(torch.autograd.grad(outputs, inputs, grad_outputs, **options), inputs)

    try:
        batched = vmap(pullback)(*stacked)
    except Exception as error:
        raise Unsupported(format_error(error)) from error
    expected = [
        None if parts[0] is None else torch.stack([g for g in parts if g is not None])
        for parts in zip(*loop, strict=True)
    ]
    compare_gradients(fn, batched, expected, fn.rounding_tolerance, ("batched", "loop"))


@law("a formula for one mode that disagrees with another mode", on_request=True)
def jacobians_and_hessians(fn: FunctionUnderTest) -> None:
    """torch.func.jacrev and jacfwd give the same Jacobian, and their four combinations the same Hessian.

    Second-order optimizers and uncertainty estimates choose the cheaper mode.
    """
    fn = fn.highest_precision
    function = _differentiable_outputs(fn)
    argnums = tuple(range(len(fn.input_indices)))
    primals = [x.detach() for x in fn.primals]

    def jacfwd_with_same_random_numbers(function: Callable[..., Any], argnums: Any) -> Callable[..., Any]:
        return jacfwd(function, argnums, randomness="same")

    modes = {"jacrev": jacrev, "jacfwd": jacfwd_with_same_random_numbers}
    try:
        jacobians = {name: mode(function, argnums)(*primals) for name, mode in modes.items()}
        hessians = {
            f"{outer} of {inner}": modes[outer](modes[inner](fn.scalar_loss, argnums), argnums)(*primals)
            for outer, inner in itertools.product(modes, repeat=2)
        }
    except Exception as error:
        raise Unsupported(format_error(error)) from error
    for kind, results in (("Jacobian", jacobians), ("Hessian", hessians)):
        (first_name, first), *others = results.items()
        for name, other in others:
            for a, b in zip(_flatten(other), _flatten(first), strict=True):
                compare(f"a block of the {kind}", a, b, 1e-7, (name, first_name))


def _flatten(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [x for part in value for x in _flatten(part)]
