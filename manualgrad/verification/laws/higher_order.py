"""Derivatives of the gradient, in every mixture of forward and reverse mode.

The oracle is one order lower: the second derivative along v is the finite difference along v of the gradient,
which `gradient` has held against the values themselves. A derivative that raises is not offered; one that is
silently wrong fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.func import jvp

from manualgrad.verification.derivatives import derivative, line, quotient
from manualgrad.verification.laws.compared import compare, first_line, shown
from manualgrad.verification.report import Fails, NotApplicable, NotOffered, law
from manualgrad.verification.subject import Subject, class_of, from_numbers, functions_of, numbers, upstream

_CONSTANT = (
    "something that moves with the input is used as a constant: a saved intermediate, a .detach(), an .item(), "
    "an inner no_grad"
)


@law(_CONSTANT)
def double_backward(subject: Subject) -> None:
    """Reverse over reverse: the backward's own backward."""

    def product(subject: Subject) -> list[Tensor | None]:
        tensors = subject.tensors()
        first = torch.autograd.grad(subject.scalar(*tensors), tensors, create_graph=True, allow_unused=True)
        moving = [
            (g, v) for g, v in zip(first, _directions(subject), strict=True) if g is not None and g.requires_grad
        ]
        if not moving:
            return [None] * len(tensors)
        # backward, not grad: it visits the whole graph, and so the node with which once_differentiable objects
        torch.autograd.backward([g for g, _ in moving], [v for _, v in moving])
        return [x.grad for x in tensors]

    _second(subject, product)


@law("an operation in backward whose forward mode is wrong, or a jvp that disagrees with the backward")
def forward_over_reverse(subject: Subject) -> None:
    """The tangent of the gradient, with and without create_graph."""

    def product(create_graph: bool) -> Callable[[Subject], list[Tensor | None]]:
        def run(subject: Subject) -> list[Tensor | None]:
            tensors = subject.tensors()
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(x, v) for x, v in zip(tensors, _directions(subject), strict=True)]
                found = torch.autograd.grad(
                    subject.scalar(*duals), tensors, create_graph=create_graph, allow_unused=True
                )
                return [None if g is None else forward_ad.unpack_dual(g).tangent for g in found]

        return run

    _second(subject, product(True))
    _second(subject, product(False))


@law("jvp uses something that moves with the input as a constant")
def reverse_over_forward(subject: Subject) -> None:
    """The gradient of the tangent."""

    def product(subject: Subject) -> list[Tensor | None]:
        tensors = subject.tensors()
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, v) for x, v in zip(tensors, _directions(subject), strict=True)]
            tangent = forward_ad.unpack_dual(subject.scalar(*duals)).tangent
            if tangent is None or not tangent.requires_grad:
                return [None] * len(tensors)
            torch.autograd.backward(tangent)
            return [x.grad for x in tensors]

    _second(subject, product)


@law("jvp uses something that moves with the input as a constant, or drops the tangents of an outer level")
def forward_over_forward(subject: Subject) -> None:
    """The tangent of the tangent (torch.func.jvp of torch.func.jvp)."""
    subject = _ready(subject)
    points, directions = subject.points, _directions(subject)

    def along(*xs: Tensor) -> Tensor:
        return jvp(subject.scalar, xs, tuple(directions))[1]

    try:
        found = jvp(along, tuple(points), tuple(directions))[1].item()
    except Exception as error:
        raise NotOffered(first_line(error)) from error
    expected, error = _directional_second(subject, lambda point: subject.scalar(*point))
    if abs(found - expected) <= 1e-4 * max(1, abs(expected)) + 10 * error:
        return
    if any(class_of(node).jvp is not Function.jvp for node in functions_of(subject(*subject.tensors()))):
        reverse_over_forward(subject)  # the jvp itself is right, or this says what is wrong with it
        raise NotOffered(
            f"torch drops the outer tangents while it calls a jvp (pytorch#197867): {shown(found)} where "
            f"{shown(expected)} is right"
        )
    raise Fails(f"second derivative along a line: found {shown(found)}, finite difference {shown(expected)}")


def _directional_second(subject: Subject, value: Callable[[Sequence[Tensor]], Tensor]) -> tuple[float, float]:
    """The second derivative along the directions by finite differences of values, and its error."""
    moving = {k: numbers(v) for k, v in enumerate(_directions(subject))}
    found: list[float] = []
    for h in (1e-2, 3e-3, 1e-3, 3e-4):
        try:
            with torch.no_grad():
                at = [value(subject.moved(moving, n * h)).double().item() for n in (-2, -1, 0, 1, 2)]
        except Exception:  # out of the function's domain: nearer
            continue
        found.append((-at[0] + 16 * at[1] - 30 * at[2] + 16 * at[3] - at[4]) / (12 * h * h))
    pairs = list(itertools.pairwise(found))
    if not pairs:
        raise NotApplicable("finite differences do not settle here")
    best = min(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    return best[1], abs(best[0] - best[1])


def _ready(subject: Subject, coarse: bool = False) -> Subject:
    subject = subject.exact
    if subject.surrogate:
        raise NotApplicable("the gradient is by definition not the derivative")
    if not subject.differentiable_places:
        raise NotApplicable("no output requires a gradient")
    if subject.dtype != torch.float64 and not coarse:
        raise NotApplicable("float64 is refused: finite differences are too coarse")
    return subject


def _directions(subject: Subject) -> list[Tensor]:
    return [upstream(x, 41 + k) for k, x in enumerate(subject.points)]


def _second(subject: Subject, product: Callable[[Subject], list[Tensor | None]]) -> None:
    """Hold a Hessian-vector product against the finite difference of gradients."""
    subject = _ready(subject, coarse=True)
    try:
        found = product(subject)
    except Exception as error:
        raise NotOffered(first_line(error)) from error

    def slope(points: Sequence[Tensor]) -> Tensor:
        tensors = [x.detach().clone().requires_grad_() for x in points]
        with torch.enable_grad():
            parts = torch.autograd.grad(subject.scalar(*tensors), tensors, allow_unused=True)
        return torch.cat(
            [
                numbers(torch.zeros_like(x) if g is None else g).double()
                for g, x in zip(parts, tensors, strict=True)
            ]
        )

    moving = {k: numbers(v) for k, v in enumerate(_directions(subject))}
    expected, error = subject.difference(moving, of=slope)
    scale = expected.abs().nan_to_num(0).amax().item() if expected.numel() else 0.0
    start, told = 0, False
    for k, x in enumerate(subject.points):
        n = numbers(x).numel()
        part, off = expected[start : start + n], error[start : start + n]
        start += n
        settled = off <= max(1e-3, subject.tolerance) * (scale + 1e-3)
        told |= bool(settled.any())
        result = torch.zeros_like(x) if found[k] is None else found[k]
        assert result is not None
        shaped = from_numbers(torch.where(settled, part, numbers(result).double()), x)
        nothing = "" if found[k] is not None else "; the derivative is silently missing"
        tolerance = (
            subject.tolerance * max(scale, 1e-3) + 10 * off[settled].amax().item() if settled.any() else 0.0
        ) / max(numbers(shaped).abs().nan_to_num(0).amax().item() if n else 0.0, 1e-300)
        try:
            compare(
                f"second derivative for {subject.named(k)}",
                result,
                shaped,
                tolerance,
                ("found", "finite difference"),
            )
        except Fails as failure:
            raise Fails(f"{failure}{nothing}", failure.cause) from None
    if not told and expected.numel():
        raise NotApplicable("finite differences of the gradient do not settle here")


def _order(subject: Subject, mixtures: Sequence[str]) -> None:
    """Along a line a derivative of any order is one number: by torch.func, against the order below."""
    subject = _ready(subject)
    along = line(subject.scalar, subject.points, _directions(subject), lambda y: y)
    below = "r" * (len(mixtures[0]) - 1)
    try:
        expected, scale = quotient(along, below)
        found = {modes: derivative(along, modes) for modes in mixtures}
    except Exception as error:
        raise NotOffered(first_line(error)) from error
    for modes, result in found.items():
        if not abs(result - expected) <= 1e-8 * scale:
            words = " over ".join({"r": "reverse", "f": "forward"}[mode] for mode in reversed(modes))
            raise Fails(f"{words}: {result:.9g}, finite difference of the order below {expected:.9g}")


@law(_CONSTANT, on_request=True)
def mixtures_of_torch_func(subject: Subject) -> None:
    """First and second order by torch.func, in all mixtures, to eight digits."""
    _order(subject, ["r", "f"])
    _order(subject, ["rr", "rf", "fr", "ff"])


@law(_CONSTANT, on_request=True)
def third_order(subject: Subject) -> None:
    """Third derivatives by torch.func, in all eight mixtures."""
    _order(subject, ["".join(modes) for modes in itertools.product("rf", repeat=3)])


@law(_CONSTANT, on_request=True)
def fourth_order(subject: Subject) -> None:
    """Fourth derivatives by torch.func."""
    _order(subject, ["rrrr", "ffff", "rfrf", "frfr"])


@law(_CONSTANT, on_request=True)
def backward_of_backward(subject: Subject) -> None:
    """create_graph three times over gives what torch.func gives."""
    subject = _ready(subject)
    along = line(subject.scalar, subject.points, _directions(subject), lambda y: y)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = along(t)
    for order in range(1, 4):
        if value.requires_grad:
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        expected = derivative(along, "r" * order)
        if not abs(value.item() - expected) <= 1e-10 + 1e-8 * abs(expected):
            raise Fails(f"order {order}: autograd {value.item():.9g}, torch.func {expected:.9g}")
