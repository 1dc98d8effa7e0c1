"""Laws of low precision, special values and large values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from manualgrad.verification.finite_differences import finite_difference
from manualgrad.verification.function_under_test import FunctionUnderTest
from manualgrad.verification.gradients import clones, gradients, random_grad_output, with_grad_outputs
from manualgrad.verification.graph import function_nodes
from manualgrad.verification.laws.comparison import format_error, format_input, format_number
from manualgrad.verification.laws.recording import record_backward_calls
from manualgrad.verification.randomness import SameRandomNumbersInAllDtypes
from manualgrad.verification.report import LawFailure, NotApplicable, law
from manualgrad.verification.tensors import dtype_name, element_position, from_real_vector, real_vector

_LOW_PRECISION = (torch.bfloat16, torch.float16, torch.float32)
_NO_FLOAT64 = "the function does not compute in float64, and finite differences need it"


@law("a formula that cancels, overflows or sums in low precision where the plain formula does not")
def low_precision(fn: FunctionUnderTest) -> None:
    """In bfloat16, float16 and float32 the gradient's error is at most eight times the unavoidable rounding error.

    The unavoidable error is that of the forward differentiated by torch, or that of rounding the inputs. Larger
    errors add up in mixed precision training.
    """
    exact = fn.highest_precision
    if exact.primals[0].dtype.to_real() != torch.float64:
        raise NotApplicable("the function does not accept float64, so there is nothing to compare with")
    tested = False
    with SameRandomNumbersInAllDtypes() if fn.draws_random_numbers else nullcontext():
        for dtype in _LOW_PRECISION:
            lower = torch.finfo(dtype).eps > 100 * torch.finfo(exact.dtype).eps
            if lower and fn.supports_dtype(dtype):
                tested = True
                _check_low_precision(fn.to_dtype(dtype), dtype)
    if not tested:
        raise NotApplicable("the function accepts no lower precision")


def _check_low_precision(fn: FunctionUnderTest, dtype: torch.dtype) -> None:
    name = dtype_name(dtype)
    exact = fn.to_dtype(torch.float64)
    inputs = fn.make_inputs()
    try:
        outputs, grad_outputs = with_grad_outputs(fn(*inputs))
        if not outputs:
            return
        grads = torch.autograd.grad(outputs, inputs, clones(grad_outputs), allow_unused=True)
        exact_grads = gradients(exact, exact.make_inputs(), [_to_float64(u) for u in grad_outputs])
    except RuntimeError as error:
        if "not implemented for" in str(error):
            return
        raise LawFailure(f"in {name}, the function raises {format_error(error)}") from error
    eps = torch.finfo(dtype).eps
    allowed = _allowed_errors(fn, exact, grad_outputs, exact_grads, eps)
    for k, (grad, truth) in enumerate(zip(grads, exact_grads, strict=True)):
        if grad is None or truth is None or not bool(truth.isfinite().all()):
            continue
        error = (_to_float64(grad) - truth).norm().item()
        size = truth.norm().item()
        if size > 0 and not error <= allowed[k] and size < 0.1 * torch.finfo(dtype).max:
            raise LawFailure(
                f"in {name}, the relative error of the gradient of {format_input(fn, k)} is {error / size:.2g}; "
                f"rounding explains at most {allowed[k] / size:.2g} (eps of {name}: {eps:.2g})"
            )


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _allowed_errors(
    fn: FunctionUnderTest,
    exact: FunctionUnderTest,
    grad_outputs: Sequence[Tensor],
    exact_grads: Sequence[Tensor | None],
    eps: float,
) -> list[float]:
    """For each gradient the error that rounding explains, times eight."""
    errors = input_rounding_errors(exact, grad_outputs, exact_grads, eps)
    allowed = [
        8 * error + 8 * eps * (0 if truth is None else truth.norm().item())
        for error, truth in zip(errors, exact_grads, strict=True)
    ]
    reference = fn.autograd_reference
    if reference is None:
        return allowed
    try:
        reference_grads = gradients(reference, reference.make_inputs(), clones(grad_outputs))
    except Exception:
        return allowed
    for k, (grad, truth) in enumerate(zip(reference_grads, exact_grads, strict=True)):
        if grad is not None and truth is not None:
            error = (_to_float64(grad) - truth).norm().item()
            allowed[k] = max(allowed[k], 8 * error) if math.isfinite(error) else math.inf
    return allowed


def input_rounding_errors(
    exact: FunctionUnderTest, grad_outputs: Sequence[Tensor], exact_grads: Sequence[Tensor | None], eps: float
) -> list[float]:
    """How much each gradient changes if inputs and grad_outputs change by ±eps, relatively."""
    errors = [0.0] * len(exact_grads)
    for seed in range(4):
        rounded = exact.with_primals([x * (1 + eps * _random_signs(x, seed)) for x in exact.primals])
        grads64 = [_to_float64(u) for u in grad_outputs]
        try:
            grads = gradients(
                rounded, rounded.make_inputs(), [u * (1 + eps * _random_signs(u, seed)) for u in grads64]
            )
        except Exception:
            continue
        for k, (a, b) in enumerate(zip(grads, exact_grads, strict=True)):
            if a is not None and b is not None:
                errors[k] = max(errors[k], (a - b).norm().nan_to_num(math.inf).item())
    return errors


def _random_signs(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return (torch.randint(0, 2, tensor.shape, generator=generator) * 2.0 - 1).double().to(tensor.device)


_SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 3.0, -3.0, 6.0, 1e-20, -1e-20, 1e-200, -1e-200)
_LARGE = (10.0, 30.0, 100.0, 1e3, 1e5, 1e8)


class _Trial(NamedTuple):
    """A special value in one input."""

    k: int
    """The input."""
    index: int
    """The element."""
    description: str
    fn: FunctionUnderTest
    """The function, with this value."""


def _trials_with_values(fn: FunctionUnderTest, values: Sequence[float]) -> Iterator[_Trial]:
    """One element of one input has the value. ±0 is placed at the first and the last element."""
    for k, x in enumerate(fn.primals):
        n = real_vector(x).numel()
        for value in values:
            for index in ({0, n - 1} if value == 0 else {0}) if n else ():
                yield _trial(fn, k, index, value)


def _trials_with_ties(fn: FunctionUnderTest) -> Iterator[_Trial]:
    """One element equals that of another input, or the next one: differences and maxima have kinks there."""
    tensors = [x for x in fn.leaves if isinstance(x, Tensor)]
    for k, x in enumerate(fn.primals):
        for other in tensors:
            if other is not x and other.shape == x.shape and other.dtype == x.dtype and x.numel():
                yield _trial(fn, k, 0, real_vector(other)[0].item())
        if x.numel() > 1 and not x.is_complex():
            yield _trial(fn, k, 0, real_vector(x)[1].item())


def _trials_with_constant_inputs(fn: FunctionUnderTest) -> Iterator[_Trial]:
    """All elements of an input are 0 or equal: norms and deviations have kinks there. Then 0 in every input."""
    for k, x in enumerate(fn.primals):
        if x.numel() > 1:
            for value in (0.0, real_vector(x)[0].item()):
                primals = list(fn.primals)
                primals[k] = torch.full_like(x, value)
                yield _Trial(k, 0, f"all of {fn.input_name(k)} = {value:g}", fn.with_primals(primals))
    if len(fn.primals) > 1 and all(x.numel() for x in fn.primals):
        primals = [_with_number(x, 0, 0.0) for x in fn.primals]
        for k in range(len(primals)):
            yield _Trial(k, 0, "the first number of every input = 0", fn.with_primals(primals))


def _trial(fn: FunctionUnderTest, k: int, index: int, value: float) -> _Trial:
    primals = list(fn.primals)
    primals[k] = _with_number(primals[k], index, value)
    description = f"{fn.input_name(k)}{element_position(primals[k], index)} = {value:g}"
    return _Trial(k, index, description, fn.with_primals(primals))


def _with_number(tensor: Tensor, index: int, value: float) -> Tensor:
    vector = real_vector(tensor).clone()
    vector[index] = value
    return from_real_vector(vector, tensor)


@law("0/0, 0·inf or log 0 in the formula, or a value at a kink that is not between the left and right slopes")
def special_values(fn: FunctionUnderTest) -> None:
    """At ±0, ±1, ties and kinks the gradient lies between the finite left and right slopes; at ±inf it is not nan.

    At a kink the gradient that torch gives is accepted too. One nan in a batch destroys all weights.
    """
    fn = fn.highest_precision
    if fn.dtype != torch.float64:
        raise NotApplicable(_NO_FLOAT64)
    for trial in [
        *_trials_with_values(fn, _SPECIAL),
        *_trials_with_ties(fn),
        *_trials_with_constant_inputs(fn),
    ]:
        _check_between_slopes(trial)
    for trial in _trials_with_values(fn, (math.inf, -math.inf)):
        if _outputs_are_finite(trial.fn) and (name := _function_that_makes_nan(trial)):
            raise LawFailure(
                f"at {trial.description} every output is finite, but {name}.backward returns nan for finite "
                "grad_outputs"
            )


def _check_between_slopes(trial: _Trial) -> None:
    """Compare the gradient of the element, and along a line through all others, with one-sided slopes."""
    fn = trial.fn
    inputs = fn.make_inputs()
    try:
        outputs = fn(*inputs)
    except Exception:
        return  # the function refuses this value
    fn.output_indices = [i for i, y in enumerate(outputs) if y.requires_grad]
    outputs, grad_outputs = with_grad_outputs(outputs)
    if not outputs:
        return
    grads = _gradients_or_failure(fn, outputs, inputs, grad_outputs)
    here = torch.cat([real_vector(y.detach()).double() for y in outputs])
    u = torch.cat([real_vector(g).double() for g in grad_outputs])
    element = torch.zeros_like(real_vector(fn.primals[trial.k]))
    element[trial.index] = 1
    value = abs(real_vector(fn.primals[trial.k])[trial.index].item())
    tiny = 0 < value < _SHRINKING_STEPS[-1]
    others = {j: random_grad_output(real_vector(x), 51 + j) for j, x in enumerate(fn.primals)}
    others[trial.k] = others[trial.k] * (1 - element)
    lines = [({trial.k: element}, f"at {trial.description} the gradient")]
    if sum(x.numel() for x in others.values()) > 1:
        lines.append((others, f"at {trial.description} the gradient along a line through all other elements"))
    for directions, subject in lines:
        slopes = _one_sided_slopes(fn, directions, here, u)
        if slopes is None:
            continue
        result = _dot(grads, directions)
        message = (
            f"{subject} is {format_number(result)}; the left and right slopes are "
            f"{format_number(slopes.left)} and {format_number(slopes.right)}"
        )
        if math.isnan(result):
            raise LawFailure(message)
        allowed = 1e-3 * (1 + max(abs(slopes.lowest), abs(slopes.highest)))
        if fn.surrogate or slopes.lowest - allowed <= result <= slopes.highest + allowed:
            continue
        if tiny and math.isfinite(result) and (directions is others or abs(result) > 1e6 * allowed):
            continue  # the steps are larger than a divisor, as in fmod(x, 1e-20)
        reference = fn.autograd_reference if slopes.highest - slopes.lowest > allowed else None
        if reference is not None:
            torch_grads = gradients(reference, reference.make_inputs(), clones(grad_outputs))
            if abs(_dot(torch_grads, directions) - result) <= allowed:
                continue
        raise LawFailure(message)


def _dot(grads: Sequence[Tensor | None], directions: dict[int, Tensor]) -> float:
    """⟨gradient, direction⟩ over the elements that move."""
    return sum(
        (real_vector(g).double() * v)[v != 0].sum().item()
        for k, v in directions.items()
        if (g := grads[k]) is not None
    )


def _outputs_are_finite(fn: FunctionUnderTest) -> bool:
    try:
        with torch.no_grad():
            outputs = fn(*fn.make_inputs())
    except Exception:
        return False
    return all(bool(y.isfinite().all()) for y in outputs)


def _function_that_makes_nan(trial: _Trial) -> str:
    """The name of the Function that returns nan for finite grad_outputs, if the gradient of this input is nan.

    Operators of torch do that too, for example exp(-x²) at infinity: those are not reported.
    """
    outputs, _ = with_grad_outputs(trial.fn(*trial.fn.make_inputs()))
    if not function_nodes(outputs):
        return ""
    with record_backward_calls(outputs) as calls:
        grad = _gradient_of_input(trial.fn, trial.k)
    if grad is None or not bool(grad.isnan().any()):
        return ""
    for call in calls:
        finite = all(bool(g.isfinite().all()) for g in call.grad_outputs if isinstance(g, Tensor))
        if finite and any(isinstance(g, Tensor) and bool(g.isnan().any()) for g in call.grad_inputs):
            return call.name
    return ""


def _gradient_of_input(fn: FunctionUnderTest, k: int) -> Tensor | None:
    """None if the function refuses these values."""
    inputs = fn.make_inputs()
    try:
        outputs, grad_outputs = with_grad_outputs(fn(*inputs))
    except Exception:
        return None
    return _gradients_or_failure(fn, outputs, inputs, grad_outputs)[k] if outputs else None


def _gradients_or_failure(
    fn: FunctionUnderTest, outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(outputs, inputs, clones(grad_outputs), allow_unused=True)
    except Exception as error:
        values = ", ".join(f"{fn.input_name(k)} = {x.tolist()}" for k, x in enumerate(fn.primals))
        raise LawFailure(f"for {values}, backward raises {format_error(error)}") from error


class _Slopes(NamedTuple):
    """One-sided slopes of ⟨u, y⟩, and the bounds if each output chooses its side independently."""

    left: float
    right: float
    lowest: float
    highest: float


_SHRINKING_STEPS = (1e-4, 1e-6, 1e-8, 1e-10)


def _one_sided_slopes(
    fn: FunctionUnderTest, directions: dict[int, Tensor], here: Tensor, u: Tensor
) -> _Slopes | None:
    """The slopes where the outputs are `here`. None if they do not converge or are infinite."""
    slopes = []
    try:
        for side in (-1, 1):

            def quotient(h: float, side: int = side) -> Tensor:
                return (fn.output_vector(fn.perturbed(directions, side * h)) - here) / (side * h)

            limit = _limit(quotient)
            if limit is None:
                return None
            slopes.append(limit * u)
    except Exception:
        return None  # outside of the function's domain
    left, right = slopes
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    return _Slopes(*(x.sum().item() for x in (left, right, low, high)))


def _limit(quotient: Callable[[float], Tensor]) -> Tensor | None:
    """The limit of difference quotients for shrinking steps. None if it is uncertain.

    It is accepted if the last two quotients agree. If the differences between quotients shrink by a constant
    factor, as a power of the step does, it is accepted if two extrapolations agree.
    """
    quotients, close = [quotient(_SHRINKING_STEPS[0])], torch.zeros(())
    for h in _SHRINKING_STEPS[1:]:
        quotients.append(quotient(h))
        if not bool(quotients[-1].isfinite().all()):
            return None
        gaps = [(b - a).abs() for a, b in itertools.pairwise(quotients)]
        close = 1e-4 * (1 + quotients[-1].abs())
        if bool((gaps[-1] <= close).all()):
            shrinking = all(bool(((b <= 0.9 * a) | (b <= close)).all()) for a, b in itertools.pairwise(gaps))
            return quotients[-1] if shrinking else None
    extrapolations = []
    for a, b, c in zip(quotients, quotients[1:], quotients[2:], strict=False):
        first, second = b - a, c - b
        ratio = torch.where(first == 0, 0.0, second / first)
        if not bool(((ratio.abs() < 0.9) | (second.abs() <= close)).all()):
            return None
        extrapolations.append(c + torch.where(ratio.abs() < 0.9, second * ratio / (1 - ratio), 0.0))
    agree = (extrapolations[1] - extrapolations[0]).abs() <= 1e-4 * (1 + extrapolations[1].abs())
    return extrapolations[1] if bool(agree.all()) else None


@law("exp of a large number in backward, where an equivalent formula stays finite")
def large_values(fn: FunctionUnderTest) -> None:
    """For inputs from ±10 to ±1e8 the gradient is right in float64 and finite in float32 and float16.

    Activations of that size occur early in training. In float16 the plain formula must be finite too.
    """
    fn = fn.highest_precision
    if fn.dtype != torch.float64:
        raise NotApplicable(_NO_FLOAT64)
    for trial in _trials_with_values(fn, [sign * value for value in _LARGE for sign in (1, -1)]):
        grad = _gradient_of_input(trial.fn, trial.k)
        if grad is None or not _outputs_are_finite(trial.fn):
            continue
        result = real_vector(grad)[trial.index].item()
        slope = _slope(trial)
        if slope is not None:
            expected, error = slope
            wrong = abs(result - expected) > 1e-3 * (1 + abs(expected)) + 10 * error
            if not math.isfinite(result) or (wrong and not fn.surrogate):
                raise LawFailure(
                    f"in float64 at {trial.description} the gradient is {format_number(result)}, "
                    f"finite difference {format_number(expected)}"
                )
        for dtype in (torch.float32, torch.float16):
            _check_finite_in(dtype, trial, grad)


def _slope(trial: _Trial) -> tuple[float, float] | None:
    """The finite difference for the element and its error. None if it does not converge."""
    fn = trial.fn
    direction = torch.zeros_like(real_vector(fn.primals[trial.k]))
    direction[trial.index] = 1
    with torch.no_grad():
        outputs = fn(*fn.make_inputs())
    u = torch.cat([real_vector(random_grad_output(outputs[i], 3 + i)).double() for i in fn.output_indices])
    values, errors = finite_difference(fn, {trial.k: direction})
    slope, error = (values * u).sum().item(), (errors * u.abs()).sum().item()
    return (slope, error) if error <= 1e-3 * (1 + abs(slope)) else None


def _check_finite_in(dtype: torch.dtype, trial: _Trial, exact_grad: Tensor) -> None:
    fn = trial.fn.to_dtype(dtype)
    representable = exact_grad.abs().amax() <= 1e-3 * torch.finfo(dtype).max
    if not bool(real_vector(fn.primals[trial.k]).isfinite().all()) or not representable:
        return
    if not bool(exact_grad.isfinite().all()) or not trial.fn.supports_dtype(dtype) or not _outputs_are_finite(fn):
        return
    try:
        grad = _gradient_of_input(fn, trial.k)
        if grad is None or bool(grad.isfinite().all()):
            return
        reference = fn.autograd_reference
        reference_grad = _gradient_of_input(reference, trial.k) if reference is not None else None
    except LawFailure as failure:
        if "not implemented for" in str(failure):
            return
        raise
    if reference_grad is None and dtype == torch.float16:
        return  # no evidence that a better formula exists
    if reference_grad is not None and not bool(reference_grad.isfinite().all()):
        return
    raise LawFailure(
        f"in {dtype_name(dtype)} at {trial.description} the gradient is not finite; in float64 its largest "
        f"element is {format_number(exact_grad.abs().amax())}"
    )
