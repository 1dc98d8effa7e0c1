"""Laws of side effects: on inputs, grad_outputs, outputs and random states."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from manualgrad.verification.function_under_test import FunctionUnderTest
from manualgrad.verification.gradients import clones, with_grad_outputs
from manualgrad.verification.laws.comparison import (
    compare,
    compare_gradients,
    format_error,
    format_input,
    format_number,
)
from manualgrad.verification.laws.first_order import NO_OUTPUT
from manualgrad.verification.randomness import random_states
from manualgrad.verification.report import LawFailure, NotApplicable, law
from manualgrad.verification.tensors import dtype_and_shape, element_position, real_vector


@law("an in-place operation on the input, on input.detach(), on input.data or on a view of it")
def no_input_mutation(fn: FunctionUnderTest) -> None:
    """Neither forward nor backward writes into an input, except into one that is marked dirty and returned.

    The caller may still use the tensor, and other layers may have saved it for backward.
    """
    arguments = fn.leaves[: fn.num_argument_leaves]  # a module may write into its buffers
    others = {i: x.clone() for i, x in enumerate(arguments) if isinstance(x, Tensor) and i not in fn.input_indices}
    fn = fn.with_leaves(others)
    inputs = fn.make_inputs()
    tensors = [*inputs, *others.values()]
    names = [*map(fn.input_name, range(len(inputs))), *(repr(fn.names[i]) for i in others)]
    before = [x.detach().clone() for x in tensors]
    all_outputs = fn.call(fn.function, inputs, clone_others=False)
    if not fn.writes_in_place:
        _check_unchanged("forward writes into", names, tensors, before)
    outputs, grad_outputs = with_grad_outputs(all_outputs)
    if not outputs:
        return
    output_values = [y.detach().clone() for y in outputs]
    before = [x.detach().clone() for x in tensors]
    torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)
    _check_unchanged("backward writes into", names, tensors, before)
    _check_unchanged("backward writes into", [f"output {i}" for i in range(len(outputs))], outputs, output_values)


def _check_unchanged(
    message: str, names: Sequence[str], tensors: Sequence[Tensor], before: Sequence[Tensor]
) -> None:
    for name, x, value in zip(names, tensors, before, strict=True):
        if not bitwise_equal(x, value):
            raise LawFailure(f"{message} {name} ({dtype_and_shape(x)}): {_first_change(x, value)}")


def _first_change(now: Tensor, before: Tensor) -> str:
    a, b = real_vector(now.detach()), real_vector(before)
    index = int(((a != b) & ~(a.isnan() & b.isnan())).nonzero()[0])
    return f"at {element_position(now, index)} {format_number(b[index])} became {format_number(a[index])}"


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """nan equals nan."""
    a, b = a.detach(), b.detach()
    return bool(((a == b) | ((a != a) & (b != b))).all())


@law("grad_output.mul_(...) or another in-place operation, also through .data")
def no_grad_output_mutation(fn: FunctionUnderTest) -> None:
    """backward does not write into grad_output.

    Autograd passes the same tensor to every operation that used the output, and hooks may hold it.
    """
    inputs = fn.make_inputs()
    outputs, grad_outputs = with_grad_outputs(fn(*inputs))
    if not outputs:
        raise NotApplicable(NO_OUTPUT)
    before = [u.clone() for u in grad_outputs]
    versions = [u._version for u in grad_outputs]
    torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)
    _check_unchanged("backward writes into", ["grad_output"] * len(before), grad_outputs, before)
    for u, version in zip(grad_outputs, versions, strict=True):
        if u._version != version:
            raise LawFailure(
                f"backward writes into grad_output ({dtype_and_shape(u)}): its version counter changes from "
                f"{version} to {u._version}"
            )


@law("forward returns input.data or a tensor on the input's storage, or backward returns a saved tensor")
def no_hidden_aliasing(fn: FunctionUnderTest) -> None:
    """An output shares memory with an input only as a view that autograd tracks; a gradient never shares memory.

    Otherwise an in-place operation on one tensor silently changes another.
    """
    clones_of_inputs = [x.clone() for x in fn.make_inputs()]  # not leaves, so in-place operations are allowed
    outputs = fn.call(fn.function, clones_of_inputs) if not fn.writes_in_place else ()
    for i, y in enumerate(outputs):
        for k, x in enumerate(clones_of_inputs):
            if y is x or not _share_memory(x, y):
                continue
            version = y._version
            with torch.no_grad():
                x.add_(0)
            # x.detach() is not a view but shares the version counter of x, which suffices without a gradient
            if y._version == version or (y.requires_grad and not y._is_view()):
                raise LawFailure(
                    f"output {i} shares memory with {format_input(fn, k)}, and autograd does not track it: an "
                    "in-place operation on one changes the other"
                )
    for ones in (False, True):  # a backward may skip the product with a grad_output of ones
        _check_gradients_own_memory(fn, ones)


def _check_gradients_own_memory(fn: FunctionUnderTest, ones: bool) -> None:
    inputs = fn.make_inputs()
    outputs, grad_outputs = with_grad_outputs(fn(*inputs))
    if not outputs:
        return
    torch.autograd.backward(outputs, [torch.ones_like(u) for u in grad_outputs] if ones else grad_outputs)
    for k, x in enumerate(inputs):
        if x.grad is None:
            continue
        for j, other in enumerate(inputs):
            if _share_memory(x.grad, other):
                raise LawFailure(
                    f".grad of {format_input(fn, k)} shares memory with the input {fn.input_name(j)}: "
                    "accumulating gradients or zero_grad(set_to_none=False) overwrites the input",
                    "backward returns a saved tensor",
                )
            if other.grad is not None and j != k and _share_memory(x.grad, other.grad):
                raise LawFailure(
                    f".grad of {format_input(fn, k)} shares memory with .grad of {fn.input_name(j)}: accumulating "
                    "into one changes the other",
                    "backward returns views of one tensor for two inputs",
                )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether writing into one changes the other. Two halves of one storage do not share memory."""
    if not a.numel() or not b.numel() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    with torch.no_grad():
        a_before, b_before = a.detach().clone(), b.detach().clone()
        try:
            a.data.fill_(0.7182818)
        except RuntimeError:  # an expanded tensor cannot be written into
            return True
        shared = not bitwise_equal(b, b_before)
        a.data.copy_(a_before)
        return shared


@law("backward modifies ctx or a saved tensor")
def repeatable_backward(fn: FunctionUnderTest) -> None:
    """With retain_graph=True a second and a third backward return bitwise the same gradients.

    Several losses on one graph, and Jacobians row by row, call backward repeatedly.
    """
    inputs = fn.make_inputs()
    outputs, grad_outputs = with_grad_outputs(fn(*inputs))
    if not outputs:
        raise NotApplicable(NO_OUTPUT)
    state = torch.get_rng_state()
    first = torch.autograd.grad(outputs, inputs, clones(grad_outputs), allow_unused=True, retain_graph=True)
    first = [None if g is None else g.clone() for g in first]
    for ordinal in ("second", "third"):
        torch.set_rng_state(state)
        try:
            again = torch.autograd.grad(
                outputs, inputs, clones(grad_outputs), allow_unused=True, retain_graph=True
            )
        except Exception as error:
            raise LawFailure(f"the {ordinal} backward raises {format_error(error)}") from error
        compare_gradients(fn, again, first, 0.0, (f"{ordinal} backward", "first backward"))


@law("an uninitialized buffer, atomic operations, or random numbers from a private generator")
def determinism(fn: FunctionUnderTest) -> None:
    """The same call with the same seed returns bitwise the same outputs and gradients.

    Runs can be reproduced only then.
    """

    def run() -> tuple[list[Tensor], list[Tensor | None]]:
        freed = [torch.full_like(x, float("nan")) for x in fn.primals]
        del freed  # torch.empty may return this memory: an uninitialized buffer then contains nan
        inputs = fn.make_inputs()
        outputs, grad_outputs = with_grad_outputs(fn(*inputs))
        state = torch.get_rng_state()
        grads = torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True) if outputs else []
        torch.set_rng_state(state)
        return [y.detach() for y in outputs], list(grads)

    outputs, grads = run()
    labels = ("repeated call", "first call")
    for _ in range(3):
        outputs_again, grads_again = run()
        for i, (a, b) in enumerate(zip(outputs_again, outputs, strict=True)):
            compare(f"output {i}", a, b, 0.0, labels)
        if grads:
            compare_gradients(fn, grads_again, grads, 0.0, labels)


@law("torch.rand or torch.manual_seed in backward: use torch.random.fork_rng, or save what forward has drawn")
def no_random_state_changes(fn: FunctionUnderTest) -> None:
    """backward leaves all random states unchanged, and forward does not set a seed.

    Otherwise the layer changes the dropout masks and the data order of the rest of the program.
    """
    inputs = fn.make_inputs()
    outputs, grad_outputs = with_grad_outputs(fn(*inputs))
    if not outputs:
        raise NotApplicable(NO_OUTPUT)
    before = random_states()
    torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)
    for name, state in random_states().items():
        if state != before[name]:
            raise LawFailure(f"backward changes the random state of {name}")
    after = []
    for seed in (1, 2):
        other = fn.with_primals(fn.primals)
        other.seed = seed
        random.seed(seed)
        other(*other.make_inputs())
        after.append(random_states())
    for name in ("torch", "python"):
        if after[0][name] == after[1][name]:
            raise LawFailure(f"forward sets the seed of {name}: the state after it is always the same")
