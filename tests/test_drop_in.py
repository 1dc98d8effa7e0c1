"""Every operation is a drop-in replacement of torch's, on every sample input.

Values, first derivatives, dtypes, special values and errors are compared with torch's function. Higher derivatives
are compared with finite differences, because torch's are wrong for some operations.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graph import nodes, torch_derivatives
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from manualgrad.meter import saved_bytes
from manualgrad.registry import Op, SampleInput, TensorFactory
from manualgrad.verification.randomness import set_seed

SEED = 7
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def make_sample(op: Op, number: int, device: str, dtype: torch.dtype = torch.float64) -> SampleInput:
    return list(op.sample_inputs(TensorFactory(dtype, device)))[number]


@pytest.fixture
def sample(op: Op, number: int, device: str) -> SampleInput:
    return make_sample(op, number, device)


def seeded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which gets the same random numbers in every sample."""

    def run(*args: Any, **kwargs: Any) -> Any:
        set_seed(SEED)
        return function(*args, **kwargs)

    return run


def of_tensors(
    op: Op, sample: SampleInput, function: Callable[..., Tensor] | None = None
) -> Callable[..., Tensor]:
    """The operation as a function of its differentiable tensors, with one output."""
    paths, seeded_function = sample.differentiable_paths(), seeded(function or op.function)

    def run(*tensors: Tensor) -> Tensor:
        full = sample.replace(paths, tensors)
        return concatenated(seeded_function(*full.args, **full.kwargs))

    return run


def tensors_in(result: Any) -> list[Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def concatenated(result: Any) -> Tensor:
    """The result as one tensor."""
    if isinstance(result, Tensor):
        return result
    parts = [part.flatten() for part in tensors_in(result)]
    with torch.autocast(parts[0].device.type, enabled=False):
        return torch.cat(parts)


def tensors_of(sample: SampleInput, needed: Sequence[bool] | None = None) -> list[Tensor]:
    found = [sample[path].detach().clone() for path in sample.differentiable_paths()]
    return [x.requires_grad_(needed is None or needed[i]) for i, x in enumerate(found)]


def random_like(output: Tensor, seed: int = 3) -> Tensor:
    """Different for each element, as a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output)


def gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], grad_output: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    output = function(*tensors)
    needed = [x for x in tensors if x.requires_grad]
    if not output.requires_grad:
        return output.detach(), []
    grad_output = random_like(output) if grad_output is None else grad_output
    return output.detach(), list(torch.autograd.grad(output, needed, grad_output))


# --- values and first derivatives ---


def test_value_matches_torch(op: Op, number: int, device: str) -> None:
    for dtype in (torch.float64, torch.float32):
        sample = make_sample(op, number, device, dtype)
        result = seeded(op.function)(*sample.args, **sample.kwargs)
        state = torch.get_rng_state()
        torch_result = seeded(op.reference)(*sample.args, **sample.kwargs)
        for x, y in zip(tensors_in(result), tensors_in(torch_result), strict=True):
            assert torch.equal(x, y), "value"
            assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())
        assert torch.equal(state, torch.get_rng_state()), "random state"


def test_gradients_match_torch(op: Op, sample: SampleInput) -> None:
    for needed in itertools.product((False, True), repeat=len(sample.differentiable_paths())):
        output, grads = gradients(of_tensors(op, sample), tensors_of(sample, needed))
        torch_output, torch_grads = gradients(of_tensors(op, sample, op.reference), tensors_of(sample, needed))
        assert_close(output, torch_output, rtol=0, atol=0)
        assert_close(grads, torch_grads)


def test_gradcheck(op: Op, sample: SampleInput) -> None:
    if not sample.gradient_is_derivative:
        return
    torch.autograd.gradcheck(
        of_tensors(op, sample),
        tensors_of(sample),
        check_forward_ad=True,
        check_batched_grad=not op.random,  # legacy vmap does not support random numbers
        check_batched_forward_grad=not op.random,
    )


def test_gradgradcheck(op: Op, sample: SampleInput) -> None:
    torch.autograd.gradgradcheck(
        of_tensors(op, sample), tensors_of(sample), check_fwd_over_rev=True, check_batched_grad=not op.random
    )


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_complex(op: Op, sample: SampleInput) -> None:
    """Complex inputs have torch's gradients, or both functions raise an error."""
    paths = sample.differentiable_paths()
    changed = sample.replace(paths, [torch.complex(sample[path], random_like(sample[path])) for path in paths])

    def outcome(function: Callable[..., Tensor]) -> Any:
        try:
            return gradients(of_tensors(op, changed, function), tensors_of(changed))
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            return type(error)

    result, torch_result = outcome(op.function), outcome(op.reference)
    if isinstance(result, type):
        assert isinstance(torch_result, type), "torch supports it"
    else:
        torch.autograd.gradcheck(of_tensors(op, changed), tensors_of(changed), check_forward_ad=True)
        if not isinstance(torch_result, type):
            assert_close(result, torch_result)


# --- autocast and low precision ---


def test_autocast_matches_torch(op: Op, number: int, device: str) -> None:
    for dtype, lower in itertools.product((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        sample = make_sample(op, number, device, dtype)
        with torch.autocast(device, lower):
            try:
                expected = gradients(of_tensors(op, sample, op.reference), tensors_of(sample))
            except RuntimeError:  # torch has no kernel for this dtype
                continue
            found = gradients(of_tensors(op, sample), tensors_of(sample))
        rounding = 16 * torch.finfo(lower).eps
        assert_close(found, expected, rtol=rounding, atol=rounding)  # dtypes too


def low_precision_errors(op: Op, sample: SampleInput, dtype: torch.dtype) -> list[tuple[float, float, float]]:
    """Per gradient: manualgrad's and torch's error compared with float64, and one unit in the last place."""
    paths = [*sample.differentiable_paths(), *sample.no_grad_paths()]
    exact = sample.replace(paths, [sample[path].double() for path in paths])
    output = of_tensors(op, exact)(*tensors_of(exact, [False] * len(exact.differentiable_paths())))
    grad_output = random_like(output).to(dtype)
    truth = gradients(of_tensors(op, exact), tensors_of(exact), grad_output.double().to(output.dtype))[1]
    try:
        torch_grads = gradients(of_tensors(op, sample, op.reference), tensors_of(sample), grad_output)[1]
    except NotImplementedError:  # torch has no kernel for this dtype
        return []
    grads = gradients(of_tensors(op, sample), tensors_of(sample), grad_output)[1]
    assert [x.dtype for x in grads] == [x.dtype for x in torch_grads]
    return [
        (
            (x.double() - true).norm().item(),
            (y.double() - true).norm().item(),
            torch.finfo(dtype).eps * true.norm().item(),
        )
        for true, x, y in zip(truth, grads, torch_grads, strict=True)
    ]


def test_low_precision_matches_torch(op: Op, number: int, device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        sample = make_sample(op, number, device, dtype)
        for error, torch_error, last_place in low_precision_errors(op, sample, dtype):
            assert error <= 1.1 * torch_error + last_place, dtype


def test_low_precision_at_full_size(op: Op, device: str) -> None:
    """With many elements the errors average out, so the tolerance is smaller."""
    for dtype in (torch.bfloat16, torch.float16):
        sample = op.benchmark_input(TensorFactory(dtype, device))
        for error, torch_error, _ in low_precision_errors(op, sample, dtype):
            assert error <= 1.01 * torch_error, dtype


# --- strides, sizes, special values ---


def layouts(tensor: Tensor) -> list[Tensor]:
    """The same values with other strides."""
    found = [tensor.repeat_interleave(2, -1)[..., ::2]] if tensor.dim() else []
    if tensor.dim() > 1:
        found.append(tensor.transpose(0, -1).contiguous().transpose(0, -1))
    return found


def test_strides(op: Op, sample: SampleInput) -> None:
    function, reference = of_tensors(op, sample), of_tensors(op, sample, op.reference)
    tensors = tensors_of(sample)
    output, expected = gradients(function, tensors)
    for i, tensor in enumerate(tensors):
        for other in layouts(tensor.detach()):
            changed = [*tensors[:i], other.requires_grad_(), *tensors[i + 1 :]]
            if op.random:  # random numbers are drawn in memory order
                assert_close(gradients(function, changed), gradients(reference, changed))
            else:  # not torch's result: its batch norm reads a strided weight as if it were contiguous
                assert_close(gradients(function, changed), (output, expected))
    for grad_output in layouts(random_like(output)):
        assert_close(gradients(function, tensors, grad_output)[1], expected)


def raises(function: Callable[..., Any], sample: SampleInput) -> bool:
    try:
        function(*sample.args, **sample.kwargs)
    except (IndexError, RuntimeError):
        return True
    return False


def test_zero_size_matches_torch(op: Op, sample: SampleInput) -> None:
    first = sample.args[0]
    if first.dim() < 2:
        return
    batched = [path for path in sample.tensor_paths() if sample[path].shape[:1] == first.shape[:1]]
    empty = sample.replace(batched, [sample[path][:0] for path in batched])
    try:
        expected = gradients(of_tensors(op, empty, op.reference), tensors_of(empty))
    except (IndexError, RuntimeError):
        if raises(op.reference, empty):  # another argument depends on the batch size
            assert raises(op.function, empty)
        else:  # manualgrad supports more than torch
            gradients(of_tensors(op, empty), tensors_of(empty))
        return
    assert_close(gradients(of_tensors(op, empty), tensors_of(empty)), expected, equal_nan=True)


SPECIAL = (
    0.0,
    -0.0,
    float("inf"),
    -float("inf"),
    float("nan"),
    1.0,
    -1.0,
    0.5,
    0.3,
    -0.3,
    1e-38,
    88.0,
    -88.0,
    1e30,
)


def test_special_values_match_torch(op: Op, number: int, device: str) -> None:
    """±0, ±inf, nan and the kinks, in each input and in grad_output. Any number may replace torch's nan."""
    for dtype in (torch.float64, torch.float32):
        sample = make_sample(op, number, device, dtype)
        if not op.supports_special_values:
            return
        function, reference = of_tensors(op, sample), of_tensors(op, sample, op.reference)
        tensors = tensors_of(sample)
        output = function(*tensors).detach()
        cases: list[tuple[list[Tensor], Tensor]] = [(tensors, with_special_values(output))]
        for i, tensor in enumerate(tensors):
            for shift in range(0, len(SPECIAL), max(1, tensor.numel())):
                changed = [
                    *tensors[:i],
                    with_special_values(tensor.detach(), shift).requires_grad_(),
                    *tensors[i + 1 :],
                ]
                cases += [(changed, random_like(output)), (changed, with_special_values(output, 4))]
        for inputs, grad_output in cases:
            output, grads = gradients(function, inputs, grad_output)
            torch_output, torch_grads = gradients(reference, inputs, grad_output)
            assert_close(output, torch_output, equal_nan=True)
            for x, a, b in zip(inputs, grads, torch_grads, strict=True):
                # for a nan, torch's gradient depends on whether its kernel is vectorized
                known = ~b.isnan() & ~(x.isnan() & a.isnan())
                largest = b[b.isfinite()].abs().amax().item() if b.isfinite().any() else 0
                tolerance = 64 * torch.finfo(dtype).eps
                details = f"\ninputs {inputs}\ngrad_output {grad_output}\nmanualgrad {a}\ntorch {b}"
                assert_close(
                    *(a[known], b[known]),
                    rtol=tolerance,
                    atol=tolerance * largest,
                    msg=lambda m, details=details: m + details,
                )


def test_supports_special_values_is_not_stale(op: Op, device: str) -> None:
    if op.supports_special_values:
        return
    enabled = dataclasses.replace(op, supports_special_values=True)
    failures: list[Exception | AssertionError] = []
    for number, _ in enumerate(op.sample_inputs(TensorFactory())):
        try:
            test_special_values_match_torch(enabled, number, device)
        except (AssertionError, RuntimeError, ValueError) as failure:
            failures.append(failure)
    assert failures, "the declaration is stale"


def with_special_values(tensor: Tensor, shift: int = 0) -> Tensor:
    values = [SPECIAL[(i + shift) % len(SPECIAL)] for i in range(tensor.numel())]
    return torch.tensor(values, dtype=tensor.dtype, device=tensor.device).reshape(tensor.shape)


def invalid_samples(sample: SampleInput) -> list[SampleInput]:
    """The sample with one argument of a wrong shape, dtype or type."""
    found = []
    for path in [*range(len(sample.args)), *sample.kwargs]:
        value = sample[path]
        if isinstance(value, Tensor):
            changes: list[Any] = [
                value.to(torch.int64),
                value.to(torch.bool),
                value.to(torch.float32),
                None,
                "text",
            ]
            changes += [value.unsqueeze(0), torch.cat([value, value], -1) if value.dim() else value.expand(2)]
            changes += [value[..., :0] if value.dim() else value, value[0] if value.dim() else value]
            changes += [value + 1000 if not value.is_floating_point() else value]
        elif isinstance(value, str):
            changes = ["unknown", 3]
        else:
            changes = ["text", -7, (2, 2)]
        found += [sample.replace([path], [change]) for change in changes]
    return found


@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:.*out of bounds")
def test_errors_match_torch(op: Op, sample: SampleInput) -> None:
    """Invalid arguments raise the same type of error as in torch, or have the same result."""
    for bad in invalid_samples(sample):
        outcomes: list[Any] = []
        for function in (op.function, op.reference):
            try:
                outcomes.append(concatenated(seeded(function)(*bad.args, **bad.kwargs)))
            except Exception as error:
                outcomes.append(error)
        outcome, torch_outcome = outcomes
        if isinstance(torch_outcome, Exception):
            assert type(outcome) is type(torch_outcome), f"{bad}: {outcome!r}, but torch: {torch_outcome!r}"
            assert str(outcome)
        else:
            assert not isinstance(outcome, Exception), f"{bad}: {outcome!r}, but torch returns a value"
            assert_close(outcome, torch_outcome, equal_nan=True)


# --- side effects ---


def test_saves_no_more_than_torch(op: Op, device: str) -> None:
    """The bytes saved for backward, for each subset of inputs that require grad."""
    sample = op.benchmark_input(TensorFactory(torch.float32, device))
    for needed in itertools.product((False, True), repeat=len(sample.differentiable_paths())):
        saved, torch_saved = (
            saved_bytes(of_tensors(op, sample, function), *tensors_of(sample, needed)).grand_total
            for function in (op.function, op.reference)
        )
        assert saved <= torch_saved, needed


def _without_grad(output: Tensor) -> None:
    with torch.no_grad():
        output.add_(1)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda output: output.mul_(2),
    "setitem": lambda output: output.__setitem__(0 if output.dim() else (), 0),
    "into a view": lambda output: output.unsqueeze(0).add_(1),
    "without grad": _without_grad,
    "detached": lambda output: output.detach().add_(1),
}


def write_to_outputs(sample: SampleInput, function: Callable[..., Any], write: Callable[[Tensor], Any]) -> Any:
    """Outputs, inputs and gradients after a write to each output, or the step that raises an error."""
    leaves = tensors_of(sample)
    inputs, step = [x * 1 for x in leaves], "write"
    full = sample.replace(sample.differentiable_paths(), inputs)
    outputs = tensors_in(seeded(function)(*full.args, **full.kwargs))
    try:
        for output in outputs:
            write(output)
        step = "backward"
        total = concatenated(
            [(x * random_like(x, seed)).sum() for seed, x in enumerate([*outputs, *inputs])]
        ).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    except RuntimeError:
        return step
    return outputs, inputs, gradients


def test_inplace_writes_to_outputs(op: Op, sample: SampleInput) -> None:
    """A write to an output has torch's values and gradients.

    If torch has saved the output, its backward raises an error. Then manualgrad's raises one too, or has the
    gradients of a write to a copy.
    """

    def copied(*args: Any, **kwargs: Any) -> list[Tensor]:
        return [x.clone() for x in tensors_in(op.function(*args, **kwargs))]

    for name, write in WRITES.items():
        found, expected = (write_to_outputs(sample, function, write) for function in (op.function, op.reference))
        if expected == "backward" and found != expected:
            expected = write_to_outputs(sample, copied, write)
        if isinstance(found, str) or isinstance(expected, str):
            assert found == expected, f"{name}: manualgrad {found}, torch {expected}"
            continue
        for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert (x is None) == (y is None), name
            if x is not None:
                assert_close(x, y, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def test_graph_has_no_torch_derivatives(op: Op, sample: SampleInput) -> None:
    output = of_tensors(op, sample)(*tensors_of(sample))
    assert not torch_derivatives(output)
    rules = {name for name in nodes(output) if name.endswith("FunctionBackward")}
    assert rules or output is sample.args[0] or not sample.kwargs.get("training", True)
