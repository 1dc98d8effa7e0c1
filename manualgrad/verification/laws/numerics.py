"""Low precision, special values, large values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from manualgrad.verification.laws.compared import described, first_line, shown
from manualgrad.verification.report import Fails, NotApplicable, law
from manualgrad.verification.subject import (
    Subject,
    copies,
    from_numbers,
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
    if subject.exact.dtype != torch.float64:
        raise NotApplicable("float64 is refused: nothing to compare with")
    told = False
    for dtype in _LOW:
        if subject.runs(dtype):
            told = True
            _low_precision(subject.cast(dtype), dtype)
    if not told:
        raise NotApplicable("no lower precision is accepted")


def _low_precision(low: Subject, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    exact = low.cast(torch.float64)
    tensors = low.tensors()
    try:
        outputs, upstreams = with_upstream(low.differentiable(low(*tensors)))
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
    moved = [0.0] * len(truth)
    for seed in range(4):  # what the gradient moves when the inputs move by a last place
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


def _noise(tensor: Tensor, seed: int) -> Tensor:
    """±1 for each element."""
    generator = torch.Generator().manual_seed(100 + seed)
    return (torch.randint(0, 2, tensor.shape, generator=generator) * 2.0 - 1).double().to(tensor.device)


_SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 3.0, -3.0, 6.0, 1e-20, -1e-20, 1e-200, -1e-200)


def _placed(subject: Subject, values: Sequence[float]) -> Iterator[tuple[int, int, float, Subject]]:
    """Each value at one element of each input, the rest as it was."""
    for k, x in enumerate(subject.points):
        n = numbers(x).numel()
        for value in values:
            for index in ({0, n - 1} if value == 0 else {0}) if n else ():
                flat = numbers(x).clone()
                flat[index] = value
                points = list(subject.points)
                points[k] = from_numbers(flat, x)
                yield k, index, value, subject.at(points)


def _with_equal(subject: Subject) -> Iterator[tuple[int, int, float, Subject]]:
    """One element of one tensor equal to that of another: where differences have their kink."""
    leaves = [x for x in subject.leaves if isinstance(x, Tensor)]
    for k, x in enumerate(subject.points):
        for other in leaves:
            if other is not x and other.shape == x.shape and other.dtype == x.dtype and x.numel():
                yield from _placed_at(subject, k, 0, numbers(other)[0].item())
        if x.numel() > 1 and not x.is_complex():
            yield from _placed_at(subject, k, 0, numbers(x)[1].item())


def _placed_at(subject: Subject, k: int, index: int, value: float) -> Iterator[tuple[int, int, float, Subject]]:
    flat = numbers(subject.points[k]).clone()
    flat[index] = value
    points = list(subject.points)
    points[k] = from_numbers(flat, subject.points[k])
    yield k, index, value, subject.at(points)


@law("0/0, 0·inf or log 0 in the formula, or another choice at the kink than a slope between left and right")
def special_values(subject: Subject) -> None:
    """At ±0, ±1, equal elements, kinks and ±inf: no nan where the slopes from left and right are finite or every
    output is, and a value between those slopes."""
    subject = subject.exact
    if subject.dtype != torch.float64:
        raise NotApplicable("float64 is refused: finite differences are too coarse")
    for k, index, value, trial in [*_placed(subject, _SPECIAL), *_with_equal(subject)]:
        found = _gradient_there(trial, k)
        if found is None:
            continue
        result = numbers(found)[index].item()
        slopes = _one_sided(trial, k, index)
        if slopes is None:
            continue
        low, high = min(slopes), max(slopes)
        where = f"{subject.named(k)}{position(subject.points[k], index)} = {value:g}"
        between = f"the slopes from left and right are {shown(slopes[0])} and {shown(slopes[1])}"
        if math.isnan(result):
            raise Fails(f"at {where} the gradient is nan; {between}")
        allowed = 1e-3 * (1 + max(abs(low), abs(high)))
        if not subject.surrogate and not low - allowed <= result <= high + allowed:
            raise Fails(f"at {where} the gradient is {shown(result)}; {between}")
    for k, index, value, trial in _placed(subject, (math.inf, -math.inf)):
        if not _finite_outputs(trial):
            continue
        found = _gradient_there(trial, k)
        if found is not None and bool(found.isnan().any()):
            where = f"{subject.named(k)}{position(subject.points[k], index)} = {value:g}"
            raise Fails(f"at {where} every output is finite, but the gradient is nan")


def _finite_outputs(subject: Subject) -> bool:
    try:
        with torch.no_grad():
            outputs = subject(*subject.tensors())
    except Exception:
        return False
    return all(bool(y.isfinite().all()) for y in outputs)


def _gradient_there(subject: Subject, k: int) -> Tensor | None:
    """The gradient of one input, unless the function refuses this value."""
    tensors = subject.tensors()
    try:
        outputs, upstreams = with_upstream(subject.differentiable(subject(*tensors)))
    except Exception:
        return None
    if not outputs:
        return None
    try:
        return torch.autograd.grad(outputs, tensors, upstreams, allow_unused=True)[k]
    except Exception as error:
        raise Fails(f"with {subject.points[k].tolist()} for {subject.named(k)}: {first_line(error)}") from error


def _one_sided(subject: Subject, k: int, index: int) -> tuple[float, float] | None:
    """The slopes from left and right of ⟨u, y⟩, or None where they do not settle."""
    direction = torch.zeros_like(numbers(subject.points[k]))
    direction[index] = 1
    try:
        with torch.no_grad():
            outputs = subject(*subject.tensors())
        chosen = [outputs[i] for i in subject.differentiable_places]
        u = torch.cat([numbers(upstream(y, 3 + i)).double() for i, y in enumerate(chosen)])

        def value(step: float) -> float:
            return (subject.values(subject.moved({k: direction}, step)) * u).sum().item()

        here = value(0.0)

        def slope(h: float) -> float:
            return (-3 * here + 4 * value(h) - value(2 * h)) / (2 * h)

        found: list[float] = []
        for side in (-1, 1):
            slopes = [slope(side * h) for h in (1e-4, 1e-6)]
            if not max(abs(a - slopes[-1]) for a in slopes) <= 1e-3 * (1 + abs(slopes[-1])):
                return None  # not settled, or not finite
            found.append(slopes[0])
    except Exception:
        return None
    return found[0], found[1]


_LARGE = (10.0, 30.0, 100.0, 1e3, 1e5, 1e8)


@law("exp of a large number in backward: the same quotient or product written another way stays finite")
def large_values(subject: Subject) -> None:
    """At ±10 to ±1e8, where the values have a finite slope, the gradient is finite too: in float64, float32 and,
    where the plain formula is, in float16."""
    subject = subject.exact
    if subject.dtype != torch.float64:
        raise NotApplicable("float64 is refused: finite differences are too coarse")
    for k, index, value, trial in _placed(subject, [sign * v for v in _LARGE for sign in (1, -1)]):
        found = _gradient_there(trial, k)
        if found is None or not _finite_outputs(trial):
            continue
        where = f"{subject.named(k)}{position(subject.points[k], index)} = {value:g}"
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
    u = torch.cat(
        [numbers(upstream(outputs[i], 3 + n)).double() for n, i in enumerate(subject.differentiable_places)]
    )
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
