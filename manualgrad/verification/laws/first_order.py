"""The gradient itself, held against the function's own values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.utils._pytree import tree_leaves

from manualgrad.verification.laws.compared import compare, compare_all, first_line, shown, told
from manualgrad.verification.laws.observed import observing
from manualgrad.verification.report import Fails, NotApplicable, NotOffered, law
from manualgrad.verification.subject import (
    Subject,
    copies,
    from_numbers,
    functions_of,
    gradients,
    numbers,
    position,
    upstream,
    with_upstream,
)

_AGAINST = ("backward gives", "finite difference")


@law("a formula that is not the derivative of this forward, or a gradient returned in another input's place")
def gradient(subject: Subject) -> None:
    """For a random upstream gradient, each element's gradient is the finite difference of the outputs."""
    true_gradient(subject.exact)


def true_gradient(subject: Subject) -> None:
    """The backward against finite differences, element by element, and of a large tensor along a line."""
    if subject.surrogate:
        raise NotApplicable("the gradient is by definition not the derivative")
    tensors = subject.tensors()
    outputs = subject(*tensors)
    torch.rand(3)  # what comes between forward and backward in a program draws random numbers too
    chosen, upstreams = with_upstream(outputs)
    if not chosen:
        return  # which `declarations` reports
    found = list(torch.autograd.grad(chosen, tensors, copies(upstreams), allow_unused=True))
    told_anything = False
    for k, result in enumerate(found):
        told_anything |= _compare_columns(subject, k, result, upstreams)
    if any(len(columns.chosen) < numbers(x).numel() for columns, x in zip(subject.jacobian, tensors, strict=True)):
        _compare_along_a_line(subject, found, upstreams)
    elif not told_anything and any(x.numel() for x in tensors):
        raise NotApplicable("finite differences do not settle anywhere: values jump, or are too coarse")


def _compare_columns(subject: Subject, k: int, found: Tensor | None, upstreams: Sequence[Tensor]) -> bool:
    """Of one input; whether anything could be told."""
    columns = subject.jacobian[k]
    if not columns.chosen or not columns.values.numel():
        return False
    u = torch.cat([numbers(g).double() for g in upstreams]).cpu()
    expected, error, settled = _against(columns.values.cpu(), columns.errors.cpu(), u)
    full = torch.zeros_like(numbers(subject.points[k])) if found is None else numbers(found)
    result = full[columns.chosen].double().cpu()
    scale = expected[settled].abs().amax().item() if settled.any() else 0.0
    different = settled & ~((result - expected).abs() <= subject.tolerance * max(scale, 1e-3) + 10 * error)
    if not different.any():
        return bool(settled.any())
    cause = "" if found is not None else "backward returns None for an input on which the output depends"
    at = torch.where(different, (result - expected).abs().nan_to_num(torch.inf), -1.0).argmax()
    where = position(subject.points[k], columns.chosen[int(at)])
    several = f" ({int(different.sum())} of {len(different)} elements differ)" if len(different) > 1 else ""
    returned = "None" if found is None else shown(result[at])
    raise Fails(
        f"gradient of {subject.named(k)} at {where}: {_AGAINST[0]} {returned}, {_AGAINST[1]} "
        f"{shown(expected[at])}{several}",
        cause or _why(subject, k, columns.values),
    )


def _against(values: Tensor, errors: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the upstream gradient makes of the rows, how far off that may be, and where it is to be believed."""
    used = u != 0
    expected, error = values[:, used] @ u[used], errors[:, used] @ u[used].abs()
    return expected, error, error <= 1e-3 * (expected.abs().amax() + 1e-3)


def _why(subject: Subject, k: int, values: Tensor) -> str:
    """Right for an upstream gradient of ones?"""
    tensors = subject.tensors()
    chosen = subject.differentiable(subject(*tensors))
    found = torch.autograd.grad(chosen, tensors, [torch.ones_like(y) for y in chosen], allow_unused=True)[k]
    ones = torch.cat([numbers(torch.ones_like(y)) for y in chosen]).double().cpu()
    expected = values.cpu() @ ones
    if found is not None and torch.allclose(
        numbers(found)[subject.jacobian[k].chosen].double().cpu(), expected, rtol=1e-4, atol=1e-6
    ):
        return (
            "right for an upstream gradient of all ones only: the upstream gradient is not used element by element"
        )
    return ""


def _compare_along_a_line(subject: Subject, found: Sequence[Tensor | None], upstreams: Sequence[Tensor]) -> None:
    directions = {k: upstream(numbers(x), 11 + k) for k, x in enumerate(subject.points)}
    u = torch.cat([numbers(g).double() for g in upstreams])

    def value(points: Sequence[Tensor]) -> Tensor:
        return (subject.values(points) * u).sum()

    expected, error = subject.difference(directions, of=value)
    pulled = sum(
        (numbers(g).double() * directions[k].double()).sum() for k, g in enumerate(found) if g is not None
    )
    if error <= 1e-3 * (1 + expected.abs()) and not abs(pulled - expected) <= (
        subject.tolerance * (1 + expected.abs()) + 10 * error
    ):
        raise Fails(
            f"along a line through all inputs: {_AGAINST[0]} {shown(pulled)}, {_AGAINST[1]} {shown(expected)}"
        )


@law("backward relies on all inputs needing a gradient: it unpacks or returns by position among the needed")
def gradient_of_each_subset(subject: Subject) -> None:
    """Whichever inputs require a gradient, each gets the same."""
    subject = subject.exact
    n = len(subject.places)
    if n == 1:
        raise NotApplicable("one differentiable input")
    expected = gradients(subject, subject.tensors())
    subsets = (
        list(itertools.product((False, True), repeat=n))
        if n <= 4
        else [tuple(i == k for i in range(n)) for k in range(n)]
    )
    for needed in subsets:
        if not any(needed):
            subject(*subject.tensors(needed))
            continue
        which = [k for k in range(n) if needed[k]]
        only = f"when only {', '.join(subject.named(k) for k in which)} requires one, gradient of"
        found = _or_fails(subject, lambda needed=needed: gradients(subject, subject.tensors(needed)), only)
        compare_all(
            subject, found, [expected[k] for k in which], subject.tolerance, ("found", "with all"), which, only
        )


def _or_fails(subject: Subject, run: object, when: str) -> list[Tensor | None]:
    try:
        return run()  # type: ignore[operator]
    except Exception as error:
        raise Fails(f"{when} it: {first_line(error)}") from error


@law("clipping, normalizing or a cached value inside backward: a backward is linear in its upstream gradient")
def upstream_(subject: Subject) -> None:
    """The backward is linear in the upstream gradient, huge, tiny or zero, and lets nan through."""
    subject = subject.exact
    tensors = subject.tensors()
    outputs, first = with_upstream(subject(*tensors), seed=3)
    if not outputs:
        raise NotApplicable("no output requires a gradient")
    second = with_upstream(outputs, seed=31)[1]

    def pulled(upstreams: Sequence[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(outputs, tensors, copies(upstreams), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, tensors, strict=True)]

    a, b = pulled(first), pulled(second)
    tolerance = subject.rounding
    for alpha, beta in ((1.0, 1.0), (1e4, 0.0), (1e-4, 0.0), (-1.0, 0.0), (0.0, 0.0)):
        mixed = pulled([alpha * g + beta * h for g, h in zip(first, second, strict=True)])
        says = f"{alpha:g} times the upstream gradient" if not beta else "the sum of two upstream gradients"
        for k, (m, x, y) in enumerate(zip(mixed, a, b, strict=True)):
            compare(
                f"for {says}, gradient of {subject.named(k)}",
                m,
                alpha * x + beta * y,
                tolerance,
                ("found", "by linearity"),
            )
    spoiled = pulled([torch.full_like(g, torch.nan) for g in first])
    for k, (x, y) in enumerate(zip(spoiled, a, strict=True)):
        if bool((y != 0).any()) and bool(x.isfinite().all()):
            raise Fails(
                f"an upstream gradient of nan leaves a finite gradient of {subject.named(k)}: overflow goes unseen"
            )


class _NothingBack(Function):
    """Passes a value on and sends no gradient back."""

    @staticmethod
    def forward(ctx: object, input: Tensor) -> Tensor:
        return input.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> None:
        return None


def _without_gradient(result: object) -> list[Tensor]:
    return [_NothingBack.apply(y) for y in tree_leaves(result) if isinstance(y, Tensor) and y.requires_grad]


@law("with set_materialize_grads(False) an unused output's gradient arrives as None, which means zero")
def unused_outputs(subject: Subject) -> None:
    """An output that is not used adds nothing, whether its gradient arrives as zeros or not at all."""
    subject = subject.exact
    n = len(subject.differentiable_places)
    tensors = subject.tensors()
    if not n:
        raise NotApplicable("no output requires a gradient")
    passing = subject.of(lambda *args, **kwargs: _without_gradient(subject.function(*args, **kwargs)))
    try:
        nothing = gradients(passing, tensors)
    except Exception as error:
        raise Fails(f"when no output's gradient is defined, backward stops with {first_line(error)}") from error
    compare_all(
        subject, nothing, [None] * len(tensors), 0.0, ("found", "expected"), what="with no upstream gradient,"
    )
    if n == 1:
        return
    parts: list[list[Tensor]] = []
    for i in range(n):
        outputs, upstreams = with_upstream(subject(*tensors))
        try:
            found = torch.autograd.grad(outputs[i], tensors, upstreams[i], allow_unused=True)
        except Exception as error:
            raise Fails(f"when only output {i} is used, backward stops with {first_line(error)}") from error
        parts.append([torch.zeros_like(x) if g is None else g for g, x in zip(found, tensors, strict=True)])
    together = gradients(subject, tensors)
    for k in range(len(tensors)):
        compare(
            f"gradient of {subject.named(k)}, each output used alone and added,",
            torch.stack([part[k] for part in parts]).sum(0),
            together[k],
            subject.rounding,
            ("found", "all used"),
        )


@law("a jvp that is not the derivative of this forward, or tangents taken in another order than the inputs")
def forward_mode(subject: Subject) -> None:
    """The pushforward along a random direction is the finite difference of each output."""
    subject = subject.exact
    if subject.surrogate:
        raise NotApplicable("the gradient is by definition not the derivative")
    n = len(subject.places)
    for moving in [{k} for k in range(n)] + ([set(range(n))] if n > 1 else []):
        directions = {k: upstream(numbers(subject.points[k]), 21 + k) for k in moving}
        try:
            found = pushed_forward(subject, directions)
        except Exception as error:
            raise NotOffered(first_line(error)) from error
        expected, error = subject.difference(directions)
        scale = expected.abs().nan_to_num(0).amax().item() if expected.numel() else 0.0
        settled = error <= 1e-3 * (scale + 1e-3)
        allowed = subject.tolerance * max(scale, 1e-3) + 10 * error
        different = settled & ~((found - expected).abs() <= allowed)
        if different.any():
            names = ", ".join(subject.named(k) for k in sorted(moving))
            raise Fails(
                f"tangent of the output along {names} at number "
                + told(found, found, expected, different, ("jvp gives", "finite difference"))
            )


def pushed_forward(subject: Subject, directions: dict[int, Tensor]) -> Tensor:
    """The tangents of the differentiable outputs, as one vector."""
    with forward_ad.dual_level():
        points = [x.detach().clone() for x in subject.points]
        for k, v in directions.items():
            points[k] = forward_ad.make_dual(points[k], from_numbers(v.to(points[k].real.dtype), points[k]))
        outputs = subject(*points)
        pairs = [forward_ad.unpack_dual(outputs[i]) for i in subject.differentiable_places]
        return torch.cat([numbers(torch.zeros_like(y) if v is None else v).double().detach() for y, v in pairs])


@law("jvp and backward written from two different formulas")
def adjoint(subject: Subject) -> None:
    """⟨g, J v⟩ = ⟨Jᵀ g, v⟩, to rounding: forward and reverse mode are each other's transpose."""
    subject = subject.exact
    if subject.surrogate:
        raise NotApplicable("the gradient is by definition not the derivative")
    directions = {k: upstream(numbers(x), 11 + k) for k, x in enumerate(subject.points)}
    try:
        tangent = pushed_forward(subject, directions)
    except Exception as error:
        raise NotOffered(first_line(error)) from error
    tensors = subject.tensors()
    outputs, upstreams = with_upstream(subject(*tensors))
    if not outputs:
        raise NotApplicable("no output requires a gradient")
    found = torch.autograd.grad(outputs, tensors, copies(upstreams), allow_unused=True)
    g = torch.cat([numbers(u).double() for u in upstreams])
    pushed = (g * tangent).sum().item()
    pulled = sum(
        (numbers(x).double() * directions[k].double()).sum().item() for k, x in enumerate(found) if x is not None
    )
    size = (g.norm() * tangent.norm()).item() + 1e-300
    if not abs(pushed - pulled) <= (1e-13 if subject.dtype == torch.float64 else subject.rounding / 10) * size:
        raise Fails(f"⟨g, J v⟩ = {shown(pushed)} by forward mode, ⟨Jᵀ g, v⟩ = {shown(pulled)} by reverse mode")


@law("gradients summed, cast or moved by the engine instead of the backward: slow, and wrong where it cannot")
def gradient_metadata(subject: Subject) -> None:
    """backward itself returns each gradient in its input's shape and dtype; the engine silently sums and casts."""
    any_function = False
    for dtype in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        any_function |= _check_metadata(subject if dtype is None else subject.cast(dtype))
    if not any_function:
        raise NotApplicable("no Python Function in the graph")


def _check_metadata(subject: Subject) -> bool:
    try:
        outputs = subject.differentiable(subject(*subject.tensors()))
    except Exception:
        return False  # not accepted
    if not functions_of(outputs):
        return False
    with observing(outputs) as seen:
        tensors = subject.tensors()
        outputs, upstreams = with_upstream(subject(*tensors))
        try:
            torch.autograd.grad(outputs, tensors, upstreams, allow_unused=True)
        except Exception as error:
            if "not implemented for" in str(error):
                return False
            inputs = ", ".join(str(x.dtype).removeprefix("torch.") for x in subject.points)
            shapes = ", ".join(str(list(x.shape)) for x in subject.points)
            raise Fails(f"for inputs of dtype {inputs} and shape {shapes}: {first_line(error)}") from error
    for call in seen:
        for i, (result, edge) in enumerate(zip(call.results, call.edges, strict=False)):
            if result is None or edge is None or edge[0] is None:
                continue
            wanted = edge[0]._input_metadata[edge[1]]
            for what, a, b in (
                ("shape", list(result.shape), list(wanted.shape)),
                ("dtype", result.dtype, wanted.dtype),
                ("device", result.device, wanted.device),
            ):
                if a != b:
                    inputs = ", ".join(
                        f"{subject.named(k)} {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
                        for k, x in enumerate(subject.points)
                    )
                    raise Fails(
                        f"{call.name}.backward returns gradient {i} in {what} {a} for an input of {what} {b} "
                        f"(inputs: {inputs})"
                    )
    return True


@law("a reference for another function, or a forward and backward that are wrong together")
def matches_reference(subject: Subject) -> None:
    """Values and gradients are the reference's."""
    subject = subject.exact
    if subject.reference is None:
        raise NotApplicable("no reference is given")
    plain = subject.of(subject.reference)
    tolerance = 1e-7 if subject.dtype == torch.float64 else 1e-3
    for i, (y, expected) in enumerate(zip(subject(*subject.tensors()), plain(*plain.tensors()), strict=True)):
        compare(f"output {i}", y, expected, tolerance, ("found", "reference"))
    if not subject.differentiable_places:
        return
    found, expected = (gradients(each, each.tensors()) for each in (subject, plain))
    compare_all(subject, found, expected, tolerance, ("found", "reference"))
