"""Laws of strides, sizes and devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manualgrad.verification.function_under_test import FunctionUnderTest
from manualgrad.verification.gradients import gradients, random_grad_output, with_grad_outputs
from manualgrad.verification.laws.comparison import compare, compare_gradients, format_error, format_input
from manualgrad.verification.laws.first_order import NO_OUTPUT, check_gradient
from manualgrad.verification.report import LawFailure, NotApplicable, law
from manualgrad.verification.tensors import real_vector

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_LABELS = ("got", "for a contiguous tensor")


def _noncontiguous(tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Tensors with the same values and other strides."""
    variants = [("strided", tensor.repeat_interleave(2, -1)[..., ::2])] if tensor.dim() else []
    if tensor.dim() > 1:
        variants.append(("transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)))
    if tensor.dim() in _CHANNELS_LAST:
        variants.append(("channels_last", tensor.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])))
    return variants


def _expanded(tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Tensors of the same shape with stride 0 along some axes."""
    variants = []
    if tensor.is_floating_point() and tensor.numel():
        variants.append(("expanded", real_vector(tensor)[:1].view(()).expand(tensor.shape)))
    return variants + [
        (f"expanded along axis {axis}", tensor.narrow(axis, 0, 1).expand(tensor.shape))
        for axis in range(tensor.dim())
        if tensor.shape[axis] > 1
    ]


@law(".view() of a tensor that is not contiguous, or memory that is read without its strides")
def noncontiguous_inputs(fn: FunctionUnderTest) -> None:
    """Strided, transposed, channels_last and expanded inputs give the same results as contiguous ones.

    Slices, transposes and expands are common in models, and tests often use only contiguous tensors.
    """
    fn = fn.highest_precision
    if fn.draws_random_numbers:
        raise NotApplicable("the function draws random numbers, and their order depends on the memory layout")
    for k, x in enumerate(fn.primals):
        for layout, variant in [*_noncontiguous(x), *_expanded(x)]:
            primals = list(fn.primals)
            primals[k] = variant.contiguous()
            expected = _outputs_and_gradients(fn.with_primals(primals))
            primals[k] = variant
            condition = f"for {layout} {fn.input_name(k)} (strides {list(variant.stride())})"
            if isinstance(expected, Exception):
                continue  # the function refuses these values in every layout
            result = _outputs_and_gradients(fn.with_primals(primals))
            if isinstance(result, Exception):
                raise LawFailure(f"{condition}, the function raises {format_error(result)}") from result
            for i, (a, b) in enumerate(zip(result[0], expected[0], strict=True)):
                compare(f"{condition}, output {i}", a, b, fn.rounding_tolerance, _LABELS)
            compare_gradients(fn, result[1], expected[1], fn.rounding_tolerance, _LABELS, prefix=f"{condition}, ")


def _outputs_and_gradients(fn: FunctionUnderTest) -> tuple[tuple[Tensor, ...], list[Tensor | None]] | Exception:
    try:
        inputs = fn.make_inputs()
        all_outputs = fn(*inputs)
        outputs, grad_outputs = with_grad_outputs(all_outputs)
        if not outputs:
            return all_outputs, [None] * len(inputs)
        return all_outputs, list(torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True))
    except Exception as error:
        return error


@law(".view() of a grad_output that is not contiguous, or memory that is read or written without its strides")
def noncontiguous_grad_outputs(fn: FunctionUnderTest) -> None:
    """Strided, transposed, channels_last and expanded grad_outputs give the same gradients as contiguous ones.

    The gradient of .sum() is an expanded tensor with stride 0.
    """
    fn = fn.highest_precision
    inputs = fn.make_inputs()
    outputs, defaults = with_grad_outputs(fn(*inputs))
    for i in range(len(outputs)):
        for layout, variant in [*_noncontiguous(defaults[i]), *_expanded(defaults[i])]:
            grad_outputs = list(defaults)
            grad_outputs[i] = variant.contiguous()
            expected = gradients(fn, inputs, grad_outputs)
            grad_outputs[i] = variant
            condition = f"for {layout} grad_output (strides {list(variant.stride())})"
            try:
                grads = gradients(fn, inputs, grad_outputs)
            except Exception as error:
                raise LawFailure(f"{condition}, backward raises {format_error(error)}") from error
            compare_gradients(fn, grads, expected, fn.rounding_tolerance, _LABELS, prefix=f"{condition}, ")


@law(".contiguous() or torch.zeros(shape) in backward")
def preserved_memory_format(fn: FunctionUnderTest) -> None:
    """If input and output are channels_last, the gradient is channels_last too.

    Otherwise every earlier layer of the network converts its gradient, in each step.
    """
    fn = fn.highest_precision
    applicable = False
    for k, x in enumerate(fn.primals):
        if x.dim() not in _CHANNELS_LAST or x.shape[1] == 1 or x.shape[2:].numel() == 1:
            continue
        memory_format = _CHANNELS_LAST[x.dim()]
        primals = list(fn.primals)
        primals[k] = x.contiguous(memory_format=memory_format)
        strides = _strides_if_lost(fn.with_primals(primals), k, memory_format)
        if strides is None:
            continue
        applicable = True
        reference = fn.autograd_reference
        if strides and not (
            reference is not None
            and reference is not fn
            and _strides_if_lost(reference.with_primals(primals), k, memory_format)
        ):
            raise LawFailure(
                f"{format_input(fn, k)} and the output are channels_last, but the gradient has strides {strides} "
                f"instead of {list(primals[k].stride())}"
            )
    if not applicable:
        raise NotApplicable("no input is an image, or the output is not channels_last for a channels_last input")


def _strides_if_lost(fn: FunctionUnderTest, k: int, memory_format: torch.memory_format) -> list[int] | None:
    """The gradient's strides if it has another format, [] if it has this one, None if the output has another."""
    try:
        inputs = fn.make_inputs()
        outputs = [
            y
            for y in fn(*inputs)
            if y.requires_grad and y.dim() in _CHANNELS_LAST and y.is_contiguous(memory_format=memory_format)
        ]
        if not outputs or any(y.is_contiguous() for y in outputs):
            return None
        grad_outputs = [
            random_grad_output(y, 3 + i).contiguous(memory_format=memory_format) for i, y in enumerate(outputs)
        ]
        grad = torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)[k]
    except Exception:
        return None
    if grad is None or grad.is_contiguous(memory_format=memory_format):
        return []
    return list(grad.stride())


@law("a reduction, division or view that is undefined for zero elements")
def empty_inputs(fn: FunctionUnderTest) -> None:
    """If forward accepts an empty batch, backward does too, and the other gradients are finite.

    The last batch of a filtered or sharded data set may be empty.
    """
    fn = fn.highest_precision
    _check_variants(_empty_batches(fn), _check_finite, "the function does not accept an empty batch")


def _empty_batches(fn: FunctionUnderTest) -> list[tuple[str, FunctionUnderTest]]:
    """The first input without elements, or, if the function refuses that, all inputs with the same length."""
    first, *_ = fn.primals
    if not first.dim():
        return []
    same_length = {
        i: x[:0]
        for i, x in enumerate(fn.leaves)
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == first.shape[0]
    }
    variants = [fn.with_leaves({fn.input_indices[0]: first[:0]}), fn.with_leaves(same_length)]
    return [("if the first axis is empty", next((f for f in variants if _forward_runs(f)), variants[-1]))]


def _forward_runs(fn: FunctionUnderTest) -> bool:
    try:
        fn(*fn.make_inputs())
    except Exception:
        return False
    return True


@law("squeeze() without dim, or a broadcasting rule that treats size 1 differently")
def singleton_dimensions(fn: FunctionUnderTest) -> None:
    """With axes of size 1 the gradient still equals finite differences.

    Batches of one sample, images of one channel and sequences of one token occur in practice.
    """
    fn = fn.highest_precision
    variants = [
        (f"if axes of size {length} are reduced to 1", fn.with_axes_reduced(length, 1))
        for length in fn.reducible_lengths(1)
    ]
    check = _check_finite if fn.surrogate else check_gradient
    _check_variants(variants, check, "no axis can be reduced to size 1")


def _check_variants(
    variants: Sequence[tuple[str, FunctionUnderTest]],
    check: Callable[[FunctionUnderTest], None],
    reason_if_refused: str,
) -> None:
    """Check the variants that the function accepts."""
    accepted = False
    refusal = ""
    for condition, variant in variants:
        try:
            outputs = variant(*variant.make_inputs())
            if not any(y.requires_grad for y in outputs):
                continue
        except Exception as error:
            refusal = f": {format_error(error)}"
            continue
        accepted = True
        try:
            check(variant)
        except NotApplicable:
            continue
        except LawFailure as failure:
            raise LawFailure(f"{condition}, {failure}", failure.likely_cause) from None
        except Exception as error:
            raise LawFailure(f"{condition}, backward raises {format_error(error)}") from error
    if not accepted:
        raise NotApplicable(reason_if_refused + refusal)


def _check_finite(fn: FunctionUnderTest) -> None:
    inputs = fn.make_inputs()
    outputs, grad_outputs = with_grad_outputs(fn(*inputs))
    finite = all(bool(y.isfinite().all()) for y in outputs)
    for k, grad in enumerate(torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)):
        if grad is not None and finite and not bool(grad.isfinite().all()):
            raise LawFailure(f"every output is finite, but the gradient of {format_input(fn, k)} is not")


@law("torch.zeros(...) or torch.arange(...) without device=")
def gradient_on_input_device(fn: FunctionUnderTest) -> None:
    """backward creates its tensors on the device of its inputs.

    A Function that is developed on the CPU otherwise fails on the GPU. The law uses the "meta" device.
    """
    meta = fn.to_device("meta")
    try:
        outputs, grad_outputs = with_grad_outputs(meta(*meta.make_inputs()))
    except Exception as error:
        raise NotApplicable(f"forward reads values, which meta tensors lack: {format_error(error)}") from error
    if not outputs:
        raise NotApplicable(NO_OUTPUT)
    inputs = meta.make_inputs()
    outputs, grad_outputs = with_grad_outputs(meta(*inputs))
    try:
        torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)
    except Exception as error:
        message = str(error)
        if "device" not in message or "meta" not in message or "Tensor.item()" in message:
            raise NotApplicable(
                f"backward reads values, which meta tensors lack: {format_error(error)}"
            ) from error
        raise LawFailure(f"for inputs on the device 'meta', backward raises {format_error(error)}") from error
