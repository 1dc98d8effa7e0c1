"""Laws of the gradient and of the Jacobian-vector product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.utils._pytree import tree_leaves

from manualgrad.verification.finite_differences import finite_difference
from manualgrad.verification.function_under_test import FunctionUnderTest
from manualgrad.verification.gradients import (
    clones,
    gradients,
    random_grad_output,
    with_grad_outputs,
    zeros_for_none,
)
from manualgrad.verification.graph import function_nodes
from manualgrad.verification.laws.comparison import (
    compare,
    compare_gradients,
    count_of_differences,
    format_error,
    format_number,
    largest_difference,
)
from manualgrad.verification.laws.recording import BackwardCall, record_backward_calls
from manualgrad.verification.report import LawFailure, NotApplicable, Unsupported, law
from manualgrad.verification.tensors import dtype_and_shape, element_position, from_real_vector, real_vector

NO_OUTPUT = "no output requires a gradient"
NO_FUNCTION = "the graph contains no autograd.Function"
SURROGATE = "surrogate=True: the gradient is not the derivative by definition"
ONE_INPUT = "only one input is differentiable"


@law("the formula is not the derivative of this forward, or two gradients are returned in each other's place")
def gradient(fn: FunctionUnderTest) -> None:
    """For a random grad_output, the gradient equals finite differences of the outputs.

    A wrong gradient rarely stops a training run: the model only learns less.
    """
    check_gradient(fn.highest_precision)


def check_gradient(fn: FunctionUnderTest) -> None:
    """Compare the gradient of each element; for large inputs, that of some elements and along a random line."""
    if fn.surrogate:
        raise NotApplicable(SURROGATE)
    inputs = fn.make_inputs()
    all_outputs = fn(*inputs)
    torch.rand(3)  # other layers draw random numbers between forward and backward too
    outputs, grad_outputs = with_grad_outputs(all_outputs)
    if not outputs:
        return  # `correct_ctx_calls` reports it
    grads = list(torch.autograd.grad(outputs, inputs, clones(grad_outputs), allow_unused=True))
    compared = [_compare_rows(fn, k, grad, grad_outputs) for k, grad in enumerate(grads)]
    if any(len(rows.indices) < real_vector(x).numel() for rows, x in zip(fn.jacobian, inputs, strict=True)):
        _compare_along_line(fn, grads, grad_outputs)
    elif not any(compared) and any(x.numel() for x in inputs):
        raise NotApplicable(
            "finite differences do not converge anywhere: the outputs are discontinuous or rounded"
        )


def _compare_rows(fn: FunctionUnderTest, k: int, grad: Tensor | None, grad_outputs: Sequence[Tensor]) -> bool:
    """Compare one input's gradient. Returns whether a finite difference converged."""
    rows = fn.jacobian[k]
    if not rows.indices or not rows.values.numel():
        return False
    u = torch.cat([real_vector(g).double() for g in grad_outputs]).cpu()
    used = u != 0
    expected, error = rows.values.cpu()[:, used] @ u[used], rows.errors.cpu()[:, used] @ u[used].abs()
    converged = error <= 1e-3 * (expected.abs().amax() + 1e-3)
    full = torch.zeros_like(real_vector(fn.primals[k])) if grad is None else real_vector(grad)
    result = full[rows.indices].double().cpu()
    scale = expected[converged].abs().amax().item() if converged.any() else 0.0
    allowed = fn.finite_difference_tolerance * max(scale, 1e-3) + 10 * error
    different = converged & ~((result - expected).abs() <= allowed)
    if not different.any():
        return bool(converged.any())
    worst = int(torch.where(different, (result - expected).abs().nan_to_num(torch.inf), -1.0).argmax())
    where = element_position(fn.primals[k], rows.indices[worst])
    returned = "None" if grad is None else format_number(result[worst])
    raise LawFailure(
        f"gradient of {fn.input_name(k)} at {where}: backward gives {returned}, "
        f"finite difference {format_number(expected[worst])}{count_of_differences(different)}",
        "backward returns None for an input that affects the output"
        if grad is None
        else _cause_if_right_for_ones(fn, k, rows.values),
    )


def _cause_if_right_for_ones(fn: FunctionUnderTest, k: int, jacobian_values: Tensor) -> str:
    inputs = fn.make_inputs()
    outputs = [y for y in fn(*inputs) if y.requires_grad]
    ones = [torch.ones_like(y) for y in outputs]
    grad = torch.autograd.grad(outputs, inputs, ones, allow_unused=True)[k]
    expected = jacobian_values.cpu() @ torch.cat([real_vector(one) for one in ones]).double().cpu()
    if grad is None:
        return ""
    result = real_vector(grad)[fn.jacobian[k].indices].double().cpu()
    if torch.allclose(result, expected, rtol=1e-4, atol=1e-6):
        return "backward is right only if grad_output is all ones: it does not use grad_output element by element"
    return ""


def _compare_along_line(
    fn: FunctionUnderTest, grads: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]
) -> None:
    directions = {k: random_grad_output(real_vector(x), 11 + k) for k, x in enumerate(fn.primals)}
    u = torch.cat([real_vector(g).double() for g in grad_outputs])

    def loss(primals: Sequence[Tensor]) -> Tensor:
        return (fn.output_vector(primals) * u).sum()

    expected, error = finite_difference(fn, directions, of=loss)
    result = sum(
        (real_vector(g).double() * directions[k].double()).sum() for k, g in enumerate(grads) if g is not None
    )
    converged = error <= 1e-3 * (1 + expected.abs())
    allowed = fn.finite_difference_tolerance * (1 + expected.abs()) + 10 * error
    if converged and not abs(result - expected) <= allowed:
        raise LawFailure(
            f"along a random line through all inputs: backward gives {format_number(result)}, "
            f"finite difference {format_number(expected)}"
        )


@law("backward assumes that all inputs require a gradient: it unpacks or returns by position among those that do")
def gradient_of_input_subsets(fn: FunctionUnderTest) -> None:
    """Each input gets the same gradient, whichever other inputs require one.

    Frozen layers and fine-tuning request only some of the gradients.
    """
    fn = fn.highest_precision
    n = len(fn.input_indices)
    if n == 1:
        raise NotApplicable(ONE_INPUT)
    expected = gradients(fn, fn.make_inputs())
    subsets = (
        list(itertools.product((False, True), repeat=n))
        if n <= 4
        else [tuple(i == k for i in range(n)) for k in range(n)]
    )
    for requires_grad in subsets:
        if not any(requires_grad):
            fn(*fn.make_inputs(requires_grad))
            continue
        subset = [k for k in range(n) if requires_grad[k]]
        condition = f"if only {', '.join(fn.input_name(k) for k in subset)} requires a gradient"
        try:
            grads = gradients(fn, fn.make_inputs(requires_grad))
        except Exception as error:
            raise LawFailure(f"{condition}, backward raises {format_error(error)}") from error
        compare_gradients(
            fn,
            grads,
            [expected[k] for k in subset],
            fn.finite_difference_tolerance,
            ("got", "if all require one"),
            subset,
            f"{condition}, ",
        )


@law("clipping, normalization or a cached value in backward")
def linear_in_grad_output(fn: FunctionUnderTest) -> None:
    """The gradient is linear in grad_output for large, small and zero values, and nan stays nan.

    Gradient accumulation, loss scaling and the detection of overflow rely on it.
    """
    fn = fn.highest_precision
    inputs = fn.make_inputs()
    outputs, first = with_grad_outputs(fn(*inputs), seed=3)
    if not outputs:
        raise NotApplicable(NO_OUTPUT)
    second = with_grad_outputs(outputs, seed=31)[1]

    def pullback(grad_outputs: Sequence[Tensor]) -> list[Tensor]:
        grads = torch.autograd.grad(outputs, inputs, clones(grad_outputs), retain_graph=True, allow_unused=True)
        return zeros_for_none(grads, inputs)

    a, b = pullback(first), pullback(second)
    for alpha, beta in ((1.0, 1.0), (1e4, 0.0), (1e-4, 0.0), (-1.0, 0.0), (0.0, 0.0)):
        combined = pullback([alpha * g + beta * h for g, h in zip(first, second, strict=True)])
        condition = f"for {alpha:g} times grad_output, " if not beta else "for the sum of two grad_outputs, "
        expected = [alpha * x + beta * y for x, y in zip(a, b, strict=True)]
        compare_gradients(fn, combined, expected, fn.rounding_tolerance, ("got", "by linearity"), prefix=condition)
    nan = pullback([torch.full_like(g, torch.nan) for g in first])
    for k, (x, y) in enumerate(zip(nan, a, strict=True)):
        if bool((y != 0).any()) and bool(x.isfinite().all()):
            raise LawFailure(
                f"if grad_output is nan, the gradient of {fn.input_name(k)} is finite: an overflow goes unnoticed"
            )


class _UndefinedGradient(Function):
    """The identity; its backward returns None."""

    @staticmethod
    def forward(ctx: object, input: Tensor) -> Tensor:
        return input.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> None:
        return None


def _with_undefined_gradients(result: object) -> list[Tensor]:
    return [_UndefinedGradient.apply(y) for y in tree_leaves(result) if isinstance(y, Tensor) and y.requires_grad]


@law("with set_materialize_grads(False) the gradient of an unused output arrives as None, which means zero")
def no_gradient_from_unused_outputs(fn: FunctionUnderTest) -> None:
    """An unused output adds nothing to the gradient, whether its grad_output is zero or None.

    A model may use one of several outputs, for example the values of a pooling but not its indices.
    """
    fn = fn.highest_precision
    n = len(fn.output_indices)
    inputs = fn.make_inputs()
    if not n:
        raise NotApplicable(NO_OUTPUT)
    undefined = fn.with_function(lambda *args, **kwargs: _with_undefined_gradients(fn.function(*args, **kwargs)))
    try:
        grads = gradients(undefined, inputs)
    except Exception as error:
        raise LawFailure(f"if every grad_output is undefined, backward raises {format_error(error)}") from error
    compare_gradients(fn, grads, [None] * len(inputs), 0.0, prefix="if every grad_output is undefined, ")
    if n == 1:
        return
    separate: list[list[Tensor]] = []
    for i in range(n):
        outputs, grad_outputs = with_grad_outputs(fn(*inputs))
        try:
            grads = torch.autograd.grad(outputs[i], inputs, grad_outputs[i], allow_unused=True)
        except Exception as error:
            raise LawFailure(f"if only output {i} is used, backward raises {format_error(error)}") from error
        separate.append(zeros_for_none(grads, inputs))
    compare_gradients(
        fn,
        [torch.stack(parts).sum(0) for parts in zip(*separate, strict=True)],
        gradients(fn, inputs),
        fn.rounding_tolerance,
        ("sum over outputs", "all outputs used"),
        prefix="summed over separate backwards for each output, ",
    )


@law("jvp is not the derivative of this forward, or takes the tangents in another order than the inputs")
def forward_mode(fn: FunctionUnderTest) -> None:
    """The Jacobian-vector product along a random direction equals the finite difference of the outputs.

    Hessian-vector products and torch.func.jacfwd use forward mode.
    """
    fn = fn.highest_precision
    if fn.surrogate:
        raise NotApplicable(SURROGATE)
    n = len(fn.input_indices)
    for moving in [{k} for k in range(n)] + ([set(range(n))] if n > 1 else []):
        directions = {k: random_grad_output(real_vector(fn.primals[k]), 21 + k) for k in moving}
        try:
            tangent = pushforward(fn, directions)
        except Exception as error:
            raise Unsupported(format_error(error)) from error
        expected, error = finite_difference(fn, directions)
        scale = expected.abs().nan_to_num(0).amax().item() if expected.numel() else 0.0
        converged = error <= 1e-3 * (scale + 1e-3)
        allowed = fn.finite_difference_tolerance * max(scale, 1e-3) + 10 * error
        different = converged & ~((tangent - expected).abs() <= allowed)
        if different.any():
            names = ", ".join(fn.input_name(k) for k in sorted(moving))
            labels = ("jvp gives", "finite difference")
            raise LawFailure(
                f"tangent of the flattened outputs along {names} at "
                f"{largest_difference(tangent, tangent, expected, different, labels)}"
            )


def pushforward(fn: FunctionUnderTest, directions: dict[int, Tensor]) -> Tensor:
    """The tangents of the outputs, as one vector."""
    with forward_ad.dual_level():
        primals = [x.detach().clone() for x in fn.primals]
        for k, v in directions.items():
            tangent = from_real_vector(v.to(primals[k].real.dtype), primals[k])
            primals[k] = forward_ad.make_dual(primals[k], tangent)
        outputs = fn(*primals)
        pairs = [forward_ad.unpack_dual(outputs[i]) for i in fn.output_indices]
        return torch.cat(
            [real_vector(torch.zeros_like(y) if v is None else v).double().detach() for y, v in pairs]
        )


@law("jvp and backward use two different formulas")
def jvp_matches_backward(fn: FunctionUnderTest) -> None:
    """Forward and reverse mode are transposes of each other, ⟨g, J v⟩ = ⟨Jᵀ g, v⟩, up to rounding.

    It compares them to 13 digits on tensors of any size, which finite differences cannot do.
    """
    fn = fn.highest_precision
    if fn.surrogate:
        raise NotApplicable(SURROGATE)
    directions = {k: random_grad_output(real_vector(x), 11 + k) for k, x in enumerate(fn.primals)}
    try:
        tangent = pushforward(fn, directions)
    except Exception as error:
        raise Unsupported(format_error(error)) from error
    inputs = fn.make_inputs()
    outputs, grad_outputs = with_grad_outputs(fn(*inputs))
    if not outputs:
        raise NotApplicable(NO_OUTPUT)
    grads = torch.autograd.grad(outputs, inputs, clones(grad_outputs), allow_unused=True)
    g = torch.cat([real_vector(u).double() for u in grad_outputs])
    forward = (g * tangent).sum().item()
    reverse = sum(
        (real_vector(x).double() * directions[k].double()).sum().item()
        for k, x in enumerate(grads)
        if x is not None
    )
    size = (g.norm() * tangent.norm()).item() + 1e-300
    tolerance = 1e-13 if fn.dtype == torch.float64 else fn.rounding_tolerance / 10
    if not abs(forward - reverse) <= tolerance * size:
        raise LawFailure(
            f"jvp gives ⟨g, J v⟩ = {format_number(forward)}, backward gives ⟨Jᵀ g, v⟩ = {format_number(reverse)}"
        )


@law("backward leaves it to the engine to sum, cast or move the gradient: slow, and not always possible")
def gradient_shape_and_dtype(fn: FunctionUnderTest) -> None:
    """backward itself returns each gradient in the shape, dtype and device of its input.

    The engine silently sums and casts a gradient that does not fit, which hides mistakes and costs memory.
    """
    any_function = False
    for dtype in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        any_function |= _check_metadata(fn if dtype is None else fn.to_dtype(dtype))
    if not any_function:
        raise NotApplicable(NO_FUNCTION)


def _check_metadata(fn: FunctionUnderTest) -> bool:
    """Returns whether the function accepts the inputs and its graph contains a Function."""
    try:
        outputs = [y for y in fn(*fn.make_inputs()) if y.requires_grad]
    except Exception:
        return False
    if not function_nodes(outputs):
        return False
    arguments = ", ".join(f"{fn.input_name(k)} {dtype_and_shape(x)}" for k, x in enumerate(fn.primals))
    with record_backward_calls(outputs) as calls:
        inputs = fn.make_inputs()
        outputs, grad_outputs = with_grad_outputs(fn(*inputs))
        try:
            torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)
        except Exception as error:
            if "not implemented for" in str(error):
                return False
            raise LawFailure(f"for the inputs {arguments}, backward raises {format_error(error)}") from error
    for call in calls:
        _compare_metadata(call, arguments)
    return True


def _compare_metadata(call: BackwardCall, arguments: str) -> None:
    for i, (grad, edge) in enumerate(zip(call.grad_inputs, call.edges, strict=False)):
        if grad is None or edge is None or edge[0] is None:
            continue
        expected = edge[0]._input_metadata[edge[1]]
        for attribute, a, b in (
            ("shape", list(grad.shape), list(expected.shape)),
            ("dtype", grad.dtype, expected.dtype),
            ("device", grad.device, expected.device),
        ):
            if a != b:
                raise LawFailure(
                    f"for the inputs {arguments}, {call.name}.backward returns gradient {i} with {attribute} {a}; "
                    f"the input has {attribute} {b}"
                )


@law("the reference implements another function, or forward and backward have the same mistake")
def matches_reference(fn: FunctionUnderTest) -> None:
    """Values and gradients equal those of `reference`.

    Finite differences cannot find a wrong forward if the backward is consistent with it.
    """
    fn = fn.highest_precision
    if fn.reference is None:
        raise NotApplicable("verify was called without reference=")
    reference = fn.with_function(fn.reference)
    tolerance = 1e-7 if fn.dtype == torch.float64 else 1e-3
    labels = ("got", "reference")
    for i, (y, expected) in enumerate(
        zip(fn(*fn.make_inputs()), reference(*reference.make_inputs()), strict=True)
    ):
        compare(f"output {i}", y, expected, tolerance, labels)
    if fn.output_indices:
        grads, expected = (gradients(each, each.make_inputs()) for each in (fn, reference))
        compare_gradients(fn, grads, expected, tolerance, labels)
