"""Low precision, special values, large values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from manualgrad.verification.drawing import DrawnAlike
from manualgrad.verification.laws.compared import described, first_line, shown
from manualgrad.verification.laws.observed import observing
from manualgrad.verification.report import Fails, NotApplicable, law
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

_LOW = (torch.bfloat16, torch.float16, torch.float32)


@law("a formula that cancels, overflows or accumulates in the low precision where the plain one does not")
def low_precision(subject: Subject) -> None:
    """In bfloat16, float16 and float32 the gradient's error against float64 is what rounding must cost: at most
    eight times that of the plain formula, or of moving every input by a last place."""
    exact = subject.exact
    if exact.points[0].dtype.to_real() != torch.float64:
        raise NotApplicable("float64 is refused: nothing to compare with")
    told = False
    with DrawnAlike() if subject.random else nullcontext():
        for dtype in _LOW:
            if torch.finfo(dtype).eps > 100 * torch.finfo(exact.dtype).eps and subject.runs(dtype):
                told = True
                _low_precision(subject.cast(dtype), dtype)
    if not told:
        raise NotApplicable("no lower precision is accepted")


def _low_precision(low: Subject, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    exact = low.cast(torch.float64)
    tensors = low.tensors()
    try:
        outputs, upstreams = with_upstream(low(*tensors))
        if not outputs:
            return
        found = torch.autograd.grad(outputs, tensors, copies(upstreams), allow_unused=True)
        truth = gradients(exact, exact.tensors(), [_wide(u) for u in upstreams])
    except RuntimeError as error:
        if "not implemented for" in str(error):
            return
        raise Fails(f"in {name}: {first_line(error)}") from error
    eps = torch.finfo(dtype).eps
    allowed = _allowed(low, exact, upstreams, truth, eps)
    for k, (g, true) in enumerate(zip(found, truth, strict=True)):
        if g is None or true is None or not bool(true.isfinite().all()):
            continue
        error = (_wide(g) - true).norm().item()
        size = true.norm().item()
        if size > 0 and not error <= allowed[k] and size < 0.1 * torch.finfo(dtype).max:
            raise Fails(
                f"in {name} the gradient of {described(low, k)} is off by {error / size:.2g} of its size; "
                f"rounding alone explains {allowed[k] / size:.2g} (eps is {eps:.2g})"
            )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _allowed(
    low: Subject, exact: Subject, upstreams: Sequence[Tensor], truth: Sequence[Tensor | None], eps: float
) -> list[float]:
    """For each gradient the error that is nobody's fault."""
    moved = moved_by_rounding(exact, upstreams, truth, eps)
    allowed = [
        (8 * m + 8 * eps * (0 if true is None else true.norm().item()))
        for m, true in zip(moved, truth, strict=True)
    ]
    plain = low.plain
    if plain is not None:
        try:
            theirs = gradients(plain, plain.tensors(), copies(upstreams))
        except Exception:
            return allowed
        for k, (a, true) in enumerate(zip(theirs, truth, strict=True)):
            if a is not None and true is not None:
                error = (_wide(a) - true).norm().item()
                allowed[k] = max(allowed[k], 8 * error) if math.isfinite(error) else math.inf
    return allowed


def moved_by_rounding(
    exact: Subject, upstreams: Sequence[Tensor], truth: Sequence[Tensor | None], eps: float
) -> list[float]:
    """How far each gradient moves when the inputs move by a last place."""
    moved = [0.0] * len(truth)
    for seed in range(4):
        noisy = [x * (1 + eps * _noise(x, seed)) for x in exact.points]
        wide = [_wide(u) for u in upstreams]
        try:
            found = gradients(
                exact.at(noisy), exact.at(noisy).tensors(), [u * (1 + eps * _noise(u, seed)) for u in wide]
            )
        except Exception:
            continue
        for k, (a, b) in enumerate(zip(found, truth, strict=True)):
            if a is not None and b is not None:
                moved[k] = max(moved[k], (a - b).norm().nan_to_num(math.inf).item())
    return moved


def _noise(tensor: Tensor, seed: int) -> Tensor:
    """±1 for each element."""
    generator = torch.Generator().manual_seed(100 + seed)
    return (torch.randint(0, 2, tensor.shape, generator=generator) * 2.0 - 1).double().to(tensor.device)


_SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 3.0, -3.0, 6.0, 1e-20, -1e-20, 1e-200, -1e-200)


Trial = tuple[int, int, str, Subject]
"""The input and the number in it that are special, how that is told, and the function there."""


def _placed(subject: Subject, values: Sequence[float]) -> Iterator[Trial]:
    """Each value at one element of each input, the rest as it was."""
    for k, x in enumerate(subject.points):
        n = numbers(x).numel()
        for value in values:
            for index in ({0, n - 1} if value == 0 else {0}) if n else ():
                yield _placed_at(subject, k, index, value)


def _with_equal(subject: Subject) -> Iterator[Trial]:
    """One element of one tensor equal to that of another: where differences have their kink."""
    leaves = [x for x in subject.leaves if isinstance(x, Tensor)]
    for k, x in enumerate(subject.points):
        for other in leaves:
            if other is not x and other.shape == x.shape and other.dtype == x.dtype and x.numel():
                yield _placed_at(subject, k, 0, numbers(other)[0].item())
        if x.numel() > 1 and not x.is_complex():
            yield _placed_at(subject, k, 0, numbers(x)[1].item())


def _placed_at(subject: Subject, k: int, index: int, value: float) -> Trial:
    points = list(subject.points)
    points[k] = _with_number(points[k], index, value)
    return k, index, f"{subject.named(k)}{position(points[k], index)} = {value:g}", subject.at(points)


def _with_number(tensor: Tensor, index: int, value: float) -> Tensor:
    flat = numbers(tensor).clone()
    flat[index] = value
    return from_numbers(flat, tensor)


def _all_alike(subject: Subject) -> Iterator[Trial]:
    """All elements of one input 0 or equal, where norms and deviations have their kink, and 0 in every input."""
    for k, x in enumerate(subject.points):
        if x.numel() > 1:
            for value in (0.0, numbers(x)[0].item()):
                points = list(subject.points)
                points[k] = torch.full_like(x, value)
                yield k, 0, f"all of {subject.named(k)} = {value:g}", subject.at(points)
    if len(subject.points) > 1 and all(x.numel() for x in subject.points):
        points = [_with_number(x, 0, 0.0) for x in subject.points]
        for k in range(len(points)):
            yield k, 0, "the first number of every input = 0", subject.at(points)


@law("0/0, 0·inf or log 0 in the formula, or another choice at the kink than a slope between left and right")
def special_values(subject: Subject) -> None:
    """At ±0, ±1, equal elements and kinks the gradient of this element and of all others is what the values say:
    where their slopes from left and right are finite no nan, and a number between them (or, at a kink, torch's own
    choice). At ±inf a Function makes no nan where every output is finite."""
    subject = subject.exact
    if subject.dtype != torch.float64:
        raise NotApplicable("it does not compute in float64: finite differences are too coarse")
    for k, index, where, trial in [*_placed(subject, _SPECIAL), *_with_equal(subject), *_all_alike(subject)]:
        _between_the_slopes(trial, k, index, where)
    for k, _, where, trial in _placed(subject, (math.inf, -math.inf)):
        if _finite_outputs(trial) and (name := _makes_nan(trial, k)):
            raise Fails(f"at {where} every output is finite, but the gradient is nan{name}")


def _between_the_slopes(subject: Subject, k: int, index: int, where: str) -> None:
    """The gradient of one element, and along a line through all others, against the slopes of the values."""
    tensors = subject.tensors()
    try:
        outputs = subject(*tensors)
    except Exception:
        return  # refused
    subject.differentiable_places = [i for i, y in enumerate(outputs) if y.requires_grad]
    outputs, upstreams = with_upstream(outputs)
    if not outputs:
        return
    found = _gradient_or_fails(subject, outputs, tensors, upstreams)
    here = torch.cat([numbers(y.detach()).double() for y in outputs])
    u = torch.cat([numbers(g).double() for g in upstreams])
    one = torch.zeros_like(numbers(subject.points[k]))
    one[index] = 1
    tiny = 0 < abs(numbers(subject.points[k])[index].item()) < _NEARER[-1]
    others = {j: upstream(numbers(x), 51 + j) for j, x in enumerate(subject.points)}
    others[k] = others[k] * (1 - one)
    lines = [({k: one}, f"at {where} the gradient is")]
    if sum(x.numel() for x in others.values()) > 1:
        lines.append((others, f"at {where} the gradient along a line through all other elements is"))
    for directions, says in lines:
        sides = _slopes(subject, directions, here, u)
        if sides is None:
            continue
        result = _along(found, directions)
        between = f"the slopes from left and right are {shown(sides.left)} and {shown(sides.right)}"
        if math.isnan(result):
            raise Fails(f"{says} nan; {between}")
        allowed = 1e-3 * (1 + max(abs(sides.low), abs(sides.high)))
        if subject.surrogate or sides.low - allowed <= result <= sides.high + allowed:
            continue
        if tiny and math.isfinite(result) and (directions is others or abs(result) > 1e6 * allowed):
            continue  # a divisor so small that the steps jump over it, as in fmod(x, 1e-20)
        if sides.high - sides.low > allowed and subject.plain is not None:
            theirs = gradients(subject.plain, subject.plain.tensors(), copies(upstreams))
            if abs(_along(theirs, directions) - result) <= allowed:
                continue
        raise Fails(f"{says} {shown(result)}; {between}")


def _along(gradient: Sequence[Tensor | None], directions: dict[int, Tensor]) -> float:
    """⟨gradient, direction⟩, where 0 · nan is nan, but not for the elements that stand still."""
    return sum(
        (numbers(g).double() * v)[v != 0].sum().item()
        for k, v in directions.items()
        if (g := gradient[k]) is not None
    )


def _finite_outputs(subject: Subject) -> bool:
    try:
        with torch.no_grad():
            outputs = subject(*subject.tensors())
    except Exception:
        return False
    return all(bool(y.isfinite().all()) for y in outputs)


def _makes_nan(subject: Subject, k: int) -> str:
    """Which Function returns nan for the gradient of this input, given finite upstream gradients.

    Where torch's own operations do so, as in exp(-x²) at infinity, no rule of the function is wrong.
    """
    tensors = subject.tensors()
    outputs, _ = with_upstream(subject(*tensors))
    if not functions_of(outputs):
        return ""
    with observing(outputs) as seen:
        found = _gradient_there(subject, k)
    if found is None or not bool(found.isnan().any()):
        return ""
    for call in seen:
        given = all(bool(g.isfinite().all()) for g in call.upstreams if isinstance(g, Tensor))
        if given and any(isinstance(g, Tensor) and bool(g.isnan().any()) for g in call.results):
            return f" in {call.name}.backward"
    return ""


def _gradient_there(subject: Subject, k: int) -> Tensor | None:
    """The gradient of one input, unless the function refuses this value."""
    tensors = subject.tensors()
    try:
        outputs, upstreams = with_upstream(subject(*tensors))
    except Exception:
        return None
    return _gradient_or_fails(subject, outputs, tensors, upstreams)[k] if outputs else None


def _gradient_or_fails(
    subject: Subject, outputs: Sequence[Tensor], tensors: Sequence[Tensor], upstreams: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(outputs, tensors, copies(upstreams), allow_unused=True)
    except Exception as error:
        values = ", ".join(f"{subject.named(k)} = {x.tolist()}" for k, x in enumerate(subject.points))
        raise Fails(f"with {values}: {first_line(error)}") from error


class _Sides(NamedTuple):
    """The slopes of ⟨u, y⟩ from left and right, and the least and greatest that a choice for each output makes."""

    left: float
    right: float
    low: float
    high: float


_NEARER = (1e-4, 1e-6, 1e-8, 1e-10)


def _slopes(subject: Subject, directions: dict[int, Tensor], here: Tensor, u: Tensor) -> _Sides | None:
    """The slopes at a point where the outputs are `here`, or None where they do not settle or are infinite."""
    sides = []
    try:
        for side in (-1, 1):

            def quotient(h: float, side: int = side) -> Tensor:
                return (subject.values(subject.moved(directions, side * h)) - here) / (side * h)

            settled = _limit(quotient)
            if settled is None:
                return None
            sides.append(settled * u)
    except Exception:
        return None  # out of the function's domain
    left, right = sides
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    return _Sides(*(x.sum().item() for x in (left, right, low, high)))


def _limit(quotient: Callable[[float], Tensor]) -> Tensor | None:
    """What difference quotients tend to as the step becomes smaller, or None where nothing is sure.

    Two that agree are believed. Quotients that near their limit by the same factor in each step, as a power of the
    step does, are believed too, where two extrapolations agree.
    """
    found, near = [quotient(_NEARER[0])], torch.zeros(())
    for h in _NEARER[1:]:
        found.append(quotient(h))
        if not bool(found[-1].isfinite().all()):
            return None
        gaps = [(b - a).abs() for a, b in itertools.pairwise(found)]
        near = 1e-4 * (1 + found[-1].abs())
        if bool((gaps[-1] <= near).all()):
            nearing = all(bool(((b <= 0.9 * a) | (b <= near)).all()) for a, b in itertools.pairwise(gaps))
            return found[-1] if nearing else None
    guesses = []
    for a, b, c in zip(found, found[1:], found[2:], strict=False):
        first, second = b - a, c - b
        ratio = torch.where(first == 0, 0.0, second / first)
        if not bool(((ratio.abs() < 0.9) | (second.abs() <= near)).all()):
            return None
        guesses.append(c + torch.where(ratio.abs() < 0.9, second * ratio / (1 - ratio), 0.0))
    agree = (guesses[1] - guesses[0]).abs() <= 1e-4 * (1 + guesses[1].abs())
    return guesses[1] if bool(agree.all()) else None


_LARGE = (10.0, 30.0, 100.0, 1e3, 1e5, 1e8)


@law("exp of a large number in backward: the same quotient or product written another way stays finite")
def large_values(subject: Subject) -> None:
    """At ±10 to ±1e8, where the values have a finite slope, the gradient is finite too: in float64, float32 and,
    where the plain formula is, in float16."""
    subject = subject.exact
    if subject.dtype != torch.float64:
        raise NotApplicable("it does not compute in float64: finite differences are too coarse")
    for k, index, where, trial in _placed(subject, [sign * v for v in _LARGE for sign in (1, -1)]):
        found = _gradient_there(trial, k)
        if found is None or not _finite_outputs(trial):
            continue
        result = numbers(found)[index].item()
        expected = _slope(trial, k, index)
        if expected is not None:
            true, error = expected
            if not math.isfinite(result):
                raise Fails(
                    f"in float64 at {where} the gradient is {shown(result)}, finite difference {shown(true)}"
                )
            if not subject.surrogate and abs(result - true) > 1e-3 * (1 + abs(true)) + 10 * error:
                raise Fails(
                    f"in float64 at {where} the gradient is {shown(result)}, finite difference {shown(true)}"
                )
        for dtype in (torch.float32, torch.float16):
            _finite_in(trial, dtype, k, found, where)


def _slope(subject: Subject, k: int, index: int) -> tuple[float, float] | None:
    direction = torch.zeros_like(numbers(subject.points[k]))
    direction[index] = 1
    with torch.no_grad():
        outputs = subject(*subject.tensors())
    u = torch.cat([numbers(upstream(outputs[i], 3 + i)).double() for i in subject.differentiable_places])
    values, errors = subject.difference({k: direction})
    true, error = (values * u).sum().item(), (errors * u.abs()).sum().item()
    return (true, error) if error <= 1e-3 * (1 + abs(true)) else None


def _finite_in(subject: Subject, dtype: torch.dtype, k: int, exact: Tensor, where: str) -> None:
    low = subject.cast(dtype)
    if not bool(numbers(low.points[k]).isfinite().all()) or exact.abs().amax() > 1e-3 * torch.finfo(dtype).max:
        return
    if not bool(exact.isfinite().all()) or not subject.runs(dtype) or not _finite_outputs(low):
        return
    try:
        found = _gradient_there(low, k)
        if found is None or bool(found.isfinite().all()):
            return
        plain = low.plain
        theirs = _gradient_there(plain, k) if plain is not None else None
    except Fails as failure:
        if "not implemented for" in str(failure):
            return
        raise
    if theirs is None and dtype == torch.float16:
        return  # nothing to tell whether it can be done better
    if theirs is not None and not bool(theirs.isfinite().all()):
        return
    raise Fails(
        f"in {str(dtype).removeprefix('torch.')} at {where} the gradient is not finite; in float64 its largest "
        f"element is {shown(exact.abs().amax())}"
    )
