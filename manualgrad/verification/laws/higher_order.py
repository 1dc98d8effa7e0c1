"""Laws of second and higher derivatives, in forward and reverse mode.

Each derivative is compared with the finite difference of the derivative one order lower: second derivatives with
differences of gradients, which the law `gradient` compares with the values. A derivative that raises an error is
unsupported. A wrong one fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.func import jvp

from manualgrad.verification.derivatives import along_line, derivative, difference_quotient
from manualgrad.verification.finite_differences import finite_difference
from manualgrad.verification.function_under_test import FunctionUnderTest
from manualgrad.verification.gradients import random_grad_output, zeros_for_none
from manualgrad.verification.graph import function_class, function_nodes
from manualgrad.verification.laws.comparison import compare, format_error, format_number
from manualgrad.verification.laws.first_order import NO_OUTPUT, SURROGATE
from manualgrad.verification.report import LawFailure, NotApplicable, Unsupported, law
from manualgrad.verification.tensors import from_real_vector, real_vector

_USED_AS_CONSTANT = (
    "backward uses a value that depends on the input as a constant: a saved intermediate, .detach(), .item() or "
    "torch.no_grad()"
)
_USED_AS_CONSTANT_IN_JVP = "jvp uses a value that depends on the input as a constant"


@law(_USED_AS_CONSTANT)
def double_backward(fn: FunctionUnderTest) -> None:
    """Reverse over reverse: the backward of the backward equals finite differences of the gradient.

    Gradient penalties and meta-learning differentiate the gradient.
    """

    def hvp(fn: FunctionUnderTest) -> list[Tensor | None]:
        inputs = fn.make_inputs()
        grads = torch.autograd.grad(fn.scalar_loss(*inputs), inputs, create_graph=True, allow_unused=True)
        pairs = [(g, v) for g, v in zip(grads, _directions(fn), strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        # torch.autograd.grad would skip the node by which once_differentiable raises its error
        torch.autograd.backward([g for g, _ in pairs], [v for _, v in pairs])
        return [x.grad for x in inputs]

    _check_hvp(fn, hvp)


@law("backward calls an operation with a wrong jvp, or jvp and backward disagree")
def forward_over_reverse(fn: FunctionUnderTest) -> None:
    """The tangent of the gradient equals finite differences of the gradient, with and without create_graph.

    It is the cheapest Hessian-vector product, and the one that torch.func.hessian uses.
    """

    def make_hvp(create_graph: bool) -> Callable[[FunctionUnderTest], list[Tensor | None]]:
        def hvp(fn: FunctionUnderTest) -> list[Tensor | None]:
            inputs = fn.make_inputs()
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(x, v) for x, v in zip(inputs, _directions(fn), strict=True)]
                grads = torch.autograd.grad(
                    fn.scalar_loss(*duals), inputs, create_graph=create_graph, allow_unused=True
                )
                return [None if g is None else forward_ad.unpack_dual(g).tangent for g in grads]

        return hvp

    _check_hvp(fn, make_hvp(create_graph=True))
    _check_hvp(fn, make_hvp(create_graph=False))


@law(_USED_AS_CONSTANT_IN_JVP)
def reverse_over_forward(fn: FunctionUnderTest) -> None:
    """The gradient of the tangent equals finite differences of the gradient.

    Losses with directional derivatives, as in physics-informed networks, are trained this way.
    """

    def hvp(fn: FunctionUnderTest) -> list[Tensor | None]:
        inputs = fn.make_inputs()
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, v) for x, v in zip(inputs, _directions(fn), strict=True)]
            tangent = forward_ad.unpack_dual(fn.scalar_loss(*duals)).tangent
            if tangent is None or not tangent.requires_grad:
                return [None] * len(inputs)
            torch.autograd.backward(tangent)
            return [x.grad for x in inputs]

    _check_hvp(fn, hvp)


@law(f"{_USED_AS_CONSTANT_IN_JVP}, or drops the tangents of an outer level")
def forward_over_forward(fn: FunctionUnderTest) -> None:
    """The tangent of the tangent, by nested torch.func.jvp, equals the second difference of the values.

    Laplacians and Taylor expansions nest forward mode.
    """
    fn = _prepare(fn)
    primals, directions = tuple(fn.primals), tuple(_directions(fn))

    def tangent(*inputs: Tensor) -> Tensor:
        return jvp(fn.scalar_loss, inputs, directions)[1]

    try:
        result = jvp(tangent, primals, directions)[1].item()
    except Exception as error:
        raise Unsupported(format_error(error)) from error
    expected, error = _second_difference(fn)
    if abs(result - expected) <= 1e-4 * max(1, abs(expected)) + 10 * error:
        return
    if any(function_class(node).jvp is not Function.jvp for node in function_nodes(fn(*fn.make_inputs()))):
        reverse_over_forward(fn)  # raises if the jvp itself is wrong
        raise Unsupported(
            "torch drops the outer tangents when it calls a jvp (pytorch#197867): got "
            f"{format_number(result)} instead of {format_number(expected)}"
        )
    raise LawFailure(
        f"second derivative along a random line: got {format_number(result)}, "
        f"finite difference {format_number(expected)}"
    )


def _second_difference(fn: FunctionUnderTest) -> tuple[float, float]:
    """The second derivative of the scalar loss along the directions by differences of values, and its error."""
    directions = {k: real_vector(v) for k, v in enumerate(_directions(fn))}
    estimates: list[float] = []
    for h in (1e-2, 3e-3, 1e-3, 3e-4):
        try:
            with torch.no_grad():
                y = [fn.scalar_loss(*fn.perturbed(directions, n * h)).double().item() for n in (-2, -1, 0, 1, 2)]
        except Exception:  # outside of the function's domain: try a smaller step
            continue
        estimates.append((-y[0] + 16 * y[1] - 30 * y[2] + 16 * y[3] - y[4]) / (12 * h * h))
    pairs = list(itertools.pairwise(estimates))
    if not pairs:
        raise NotApplicable("finite differences do not converge for these inputs")
    best = min(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    return best[1], abs(best[0] - best[1])


def _prepare(fn: FunctionUnderTest, any_dtype: bool = False) -> FunctionUnderTest:
    fn = fn.highest_precision
    if fn.surrogate:
        raise NotApplicable(SURROGATE)
    if not fn.output_indices:
        raise NotApplicable(NO_OUTPUT)
    if fn.dtype != torch.float64 and not any_dtype:
        raise NotApplicable("the function does not accept float64, and finite differences need it")
    return fn


def _directions(fn: FunctionUnderTest) -> list[Tensor]:
    return [random_grad_output(x, 41 + k) for k, x in enumerate(fn.primals)]


def _check_hvp(fn: FunctionUnderTest, hvp: Callable[[FunctionUnderTest], list[Tensor | None]]) -> None:
    """Compare a Hessian-vector product of the scalar loss with the finite difference of its gradients."""
    fn = _prepare(fn, any_dtype=True)
    try:
        result = hvp(fn)
    except Exception as error:
        raise Unsupported(format_error(error)) from error

    def gradient_vector(primals: Sequence[Tensor]) -> Tensor:
        inputs = [x.detach().clone().requires_grad_() for x in primals]
        with torch.enable_grad():
            grads = torch.autograd.grad(fn.scalar_loss(*inputs), inputs, allow_unused=True)
        return torch.cat([real_vector(g).double() for g in zeros_for_none(grads, inputs)])

    directions = {k: real_vector(v) for k, v in enumerate(_directions(fn))}
    expected, error = finite_difference(fn, directions, of=gradient_vector)
    scale = expected.abs().nan_to_num(0).amax().item() if expected.numel() else 0.0
    sizes = [real_vector(x).numel() for x in fn.primals]
    compared = [
        _compare_hvp(fn, k, result[k], *parts, scale)
        for k, parts in enumerate(zip(expected.split(sizes), error.split(sizes), strict=True))
    ]
    if not any(compared) and expected.numel():
        raise NotApplicable("finite differences of the gradient do not converge for these inputs")


def _compare_hvp(
    fn: FunctionUnderTest, k: int, result: Tensor | None, expected: Tensor, error: Tensor, scale: float
) -> bool:
    """Compare one input's part. Returns whether a finite difference converged."""
    converged = error <= max(1e-3, fn.finite_difference_tolerance) * (scale + 1e-3)
    values = torch.zeros_like(fn.primals[k]) if result is None else result
    # elements with a finite difference that did not converge are equal by construction
    expected = torch.where(converged, expected, real_vector(values).double())
    allowed = 0.0
    if converged.any():
        allowed = fn.finite_difference_tolerance * max(scale, 1e-3) + 10 * error[converged].amax().item()
    size = expected.abs().nan_to_num(0).amax().item() if expected.numel() else 0.0
    try:
        compare(
            f"second derivative for {fn.input_name(k)}",
            values,
            from_real_vector(expected, values),
            allowed / max(size, 1e-300),
            ("got", "finite difference"),
        )
    except LawFailure as failure:
        if result is None:
            raise LawFailure(f"{failure}; autograd returns no second derivative and no error") from None
        raise
    return bool(converged.any())


def _check_order(fn: FunctionUnderTest, mixtures: Sequence[str]) -> None:
    """Compare derivatives along a random line by torch.func with the difference quotient one order lower."""
    fn = _prepare(fn)
    loss = along_line(fn.scalar_loss, fn.primals, _directions(fn), lambda y: y)
    try:
        expected, scale = difference_quotient(loss, "r" * (len(mixtures[0]) - 1))
        results = {modes: derivative(loss, modes) for modes in mixtures}
    except Exception as error:
        raise Unsupported(format_error(error)) from error
    for modes, result in results.items():
        if not abs(result - expected) <= 1e-8 * scale:
            mixture = " over ".join({"r": "reverse", "f": "forward"}[mode] for mode in reversed(modes))
            raise LawFailure(
                f"derivative along a random line, {mixture}: got {result:.9g}, finite difference of the next "
                f"lower order {expected:.9g}"
            )


@law(_USED_AS_CONSTANT, on_request=True)
def second_order(fn: FunctionUnderTest) -> None:
    """First and second derivatives by torch.func are right to eight digits in all mixtures of modes.

    It is more precise than the laws of the single mixtures.
    """
    _check_order(fn, ["r", "f"])
    _check_order(fn, ["rr", "rf", "fr", "ff"])


@law(_USED_AS_CONSTANT, on_request=True)
def third_order(fn: FunctionUnderTest) -> None:
    """Third derivatives by torch.func are right to eight digits in all eight mixtures of modes.

    A gradient penalty on a network that contains derivatives needs them.
    """
    _check_order(fn, ["".join(modes) for modes in itertools.product("rf", repeat=3)])


@law(_USED_AS_CONSTANT, on_request=True)
def fourth_order(fn: FunctionUnderTest) -> None:
    """Fourth derivatives by torch.func are right to eight digits in four mixtures of modes.

    Networks that solve differential equations of fourth order need them.
    """
    _check_order(fn, ["rrrr", "ffff", "rfrf", "frfr"])


@law(_USED_AS_CONSTANT, on_request=True)
def nested_backward(fn: FunctionUnderTest) -> None:
    """Up to order 3, nested torch.autograd.grad with create_graph=True gives the derivatives of torch.func.

    A Function may take another path under torch.func, so both ways are tested.
    """
    fn = _prepare(fn)
    loss = along_line(fn.scalar_loss, fn.primals, _directions(fn), lambda y: y)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = loss(t)
    for order in range(1, 4):
        if value.requires_grad:
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        expected = derivative(loss, "r" * order)
        if not abs(value.item() - expected) <= 1e-10 + 1e-8 * abs(expected):
            raise LawFailure(
                f"derivative of order {order}: torch.autograd.grad gives {value.item():.9g}, "
                f"torch.func {expected:.9g}"
            )
