"""Strides, sizes and devices other than those of the textbook."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manualgrad.verification.laws.compared import compare, compare_all, described, first_line
from manualgrad.verification.laws.first_order import true_gradient
from manualgrad.verification.report import Fails, NotApplicable, law
from manualgrad.verification.subject import Subject, gradients, numbers, upstream, with_upstream

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def layouts(tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The same values with other strides."""
    found = [("every second element of", tensor.repeat_interleave(2, -1)[..., ::2])] if tensor.dim() else []
    if tensor.dim() > 1:
        found.append(("transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)))
    if tensor.dim() in _FORMATS:
        found.append(("channels_last", tensor.contiguous(memory_format=_FORMATS[tensor.dim()])))
    return found


def _expanded(tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Values that repeat, with stride 0."""
    found = (
        [("one number expanded", numbers(tensor)[:1].view(()).expand(tensor.shape))]
        if tensor.is_floating_point() and tensor.numel()
        else []
    )
    return found + [
        (f"expanded along axis {axis}", tensor.narrow(axis, 0, 1).expand(tensor.shape))
        for axis in range(tensor.dim())
        if tensor.shape[axis] > 1
    ]


@law(".view of a tensor that is not contiguous, or memory read as if it were")
def strided_inputs(subject: Subject) -> None:
    """Non-contiguous, transposed, channels_last and expanded inputs give what contiguous ones give."""
    subject = subject.exact
    if subject.random:
        raise NotApplicable("random numbers are drawn, and that goes by the order of memory")
    for k, x in enumerate(subject.points):
        for name, changed in [*layouts(x), *_expanded(x)]:
            points = list(subject.points)
            points[k] = changed.contiguous()
            expected = _outcome(subject.at(points))
            points[k] = changed
            what = f"{name} {subject.named(k)} (strides {list(changed.stride())})"
            if isinstance(expected, Exception):
                continue  # values that the function refuses however they lie
            found = _outcome(subject.at(points))
            if isinstance(found, Exception):
                raise Fails(f"for {what}: {first_line(found)}") from found
            for i, (a, b) in enumerate(zip(found[0], expected[0], strict=True)):
                compare(f"for {what}, output {i}", a, b, subject.rounding, ("found", "contiguous"))
            compare_all(
                subject,
                found[1],
                expected[1],
                subject.rounding,
                ("found", "contiguous"),
                what=f"for {what}, gradient of",
            )


def _outcome(subject: Subject) -> tuple[tuple[Tensor, ...], list[Tensor | None]] | Exception:
    try:
        tensors = subject.tensors()
        outputs, upstreams = with_upstream(all_outputs := subject(*tensors))
        if not outputs:
            return all_outputs, [None] * len(tensors)
        return all_outputs, list(torch.autograd.grad(outputs, tensors, upstreams, allow_unused=True))
    except Exception as error:
        return error


@law(".view of a gradient that is not contiguous, or memory read, or written, as if it were")
def strided_upstream(subject: Subject) -> None:
    """Non-contiguous, transposed, channels_last and expanded (stride 0, as from .sum()) upstream gradients."""
    subject = subject.exact
    tensors = subject.tensors()
    shapes, defaults = with_upstream(subject(*tensors))
    for i in range(len(shapes)):
        for name, changed in [*layouts(defaults[i]), *_expanded(defaults[i])]:
            upstreams = list(defaults)
            upstreams[i] = changed.contiguous()
            expected = gradients(subject, tensors, upstreams)
            upstreams[i] = changed
            what = f"{name} upstream gradient (strides {list(changed.stride())})"
            try:
                found = gradients(subject, tensors, upstreams)
            except Exception as error:
                raise Fails(f"for {what}: {first_line(error)}") from error
            compare_all(
                subject,
                found,
                expected,
                subject.rounding,
                ("found", "contiguous"),
                what=f"for {what}, gradient of",
            )


@law(".contiguous() or a fresh torch.zeros(shape) in backward: every later layer then converts, each time")
def memory_format(subject: Subject) -> None:
    """Where the output keeps the input's channels_last, the gradient keeps it too."""
    subject = subject.exact
    told = False
    for k, x in enumerate(subject.points):
        if x.dim() not in _FORMATS or x.shape[1] == 1 or x.shape[2:].numel() == 1:
            continue
        form = _FORMATS[x.dim()]
        points = list(subject.points)
        points[k] = x.contiguous(memory_format=form)
        lost = _lost(subject.at(points), k, form)
        if lost is None:
            continue
        told = True
        plain = subject.plain
        if lost and not (plain is not None and plain is not subject and _lost(plain.at(points), k, form)):
            raise Fails(
                f"{described(subject, k)} and output are channels_last, the gradient has strides {lost} "
                f"instead of {list(points[k].stride())}"
            )
    if not told:
        raise NotApplicable("no image-shaped input whose channels_last the output keeps")


def _lost(subject: Subject, k: int, form: torch.memory_format) -> list[int] | None:
    """The strides of a gradient that lost the format ([]: it did not; None: already the output did)."""
    try:
        tensors = subject.tensors()
        outputs = subject.differentiable(subject(*tensors))
        kept = [y for y in outputs if y.dim() in _FORMATS and y.is_contiguous(memory_format=form)]
        if not kept or any(y.is_contiguous() for y in kept):
            return None
        upstreams = [upstream(y, 3 + i).contiguous(memory_format=form) for i, y in enumerate(kept)]
        found = torch.autograd.grad(kept, tensors, upstreams, allow_unused=True)[k]
    except Exception:
        return None
    if found is None or found.is_contiguous(memory_format=form):
        return []
    return list(found.stride())


def _thinned(subject: Subject) -> list[tuple[str, Subject]]:
    return [(f"axes of {length} cut to 1", subject.cut(length, 1)) for length in subject.lengths(1)]


@law("a reduction, division or view that has no meaning for no elements")
def zero_size(subject: Subject) -> None:
    """Where the function takes empty tensors, so does its backward, and what does not depend on them is zero."""
    _on_accepted(_empty(subject.exact), _no_crash, "refuses an empty batch")


def _empty(subject: Subject) -> list[tuple[str, Subject]]:
    """Nothing along the first axis: of the first input alone, or of all that share its length."""
    first, *_ = subject.points
    if not first.dim():
        return []
    sharing = {
        i: x[:0]
        for i, x in enumerate(subject.leaves)
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == first.shape[0]
    }
    trials = [subject.replaced({subject.places[0]: first[:0]}), subject.replaced(sharing)]
    return [("nothing along the first axis", next((t for t in trials if _runs(t)), trials[-1]))]


def _runs(subject: Subject) -> bool:
    try:
        subject(*subject.tensors())
    except Exception:
        return False
    return True


@law("squeeze() or a broadcast rule that treats an axis of size 1 as something else")
def size_one(subject: Subject) -> None:
    """With axes of size 1, alone and together, the gradient is still the derivative."""
    subject = subject.exact
    if subject.surrogate:
        _on_accepted(_thinned(subject), _no_crash, "no axis can be cut to size 1")
    else:
        _on_accepted(_thinned(subject), true_gradient, "no axis can be cut to size 1")


def _on_accepted(trials: Sequence[tuple[str, Subject]], check: Callable[[Subject], None], refuses: str) -> None:
    told = False
    reason = ""
    for name, trial in trials:
        try:
            outputs = trial(*trial.tensors())
            if not any(y.requires_grad for y in outputs):
                continue
        except Exception as error:
            reason = f": {first_line(error)}"
            continue
        told = True
        try:
            check(trial)
        except NotApplicable:
            continue
        except Fails as failure:
            raise Fails(f"{name}: {failure}", failure.cause) from None
        except Exception as error:
            raise Fails(f"{name}: {first_line(error)}") from error
    if not told:
        raise NotApplicable(refuses + reason)


def _no_crash(subject: Subject) -> None:
    tensors = subject.tensors()
    outputs, upstreams = with_upstream(subject(*tensors))
    finite = all(bool(y.isfinite().all()) for y in outputs)
    found = torch.autograd.grad(outputs, tensors, upstreams, allow_unused=True)
    for k, g in enumerate(found):
        if g is not None and finite and not bool(g.isfinite().all()):
            raise Fails(f"gradient of {described(subject, k)} is not finite, though every output is")


@law("torch.zeros(...) or torch.arange(...) without device=: right on the CPU alone")
def other_device(subject: Subject) -> None:
    """What backward makes is on its input's device (tried on the "meta" device, which holds no data)."""
    other = subject.to("meta")
    try:
        outputs, upstreams = with_upstream(other(*other.tensors()))
        if not outputs:
            raise NotApplicable("no output requires a gradient")
    except Exception as error:
        raise NotApplicable(f"the forward looks at values: {first_line(error)}") from error
    del outputs, upstreams
    tensors = other.tensors()
    outputs, upstreams = with_upstream(other(*tensors))
    try:
        torch.autograd.grad(outputs, tensors, upstreams, allow_unused=True)
    except Exception as error:
        text = str(error)
        if "device" not in text or "meta" not in text or "Tensor.item()" in text:
            raise NotApplicable(f"the backward looks at values: {first_line(error)}") from error
        raise Fails(f"on another device than the CPU ('meta'): {first_line(error)}") from error
