"""As torch.nn.functional: what every operation shares with torch's own, tried on every sample of the table.

The oracle for values and first derivatives is torch's own operation; above first order it is not (torch is wrong
there in places), so there the oracle is the finite difference of the derivative one order below.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graph import foreign, nodes
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from manualgrad.meter import saved_bytes
from manualgrad.registry import Op, SampleInput, TensorFactory
from manualgrad.verification.randomness import set_seed

SEED = 7
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def sample(op: Op, number: int, device: str, dtype: torch.dtype = torch.float64) -> SampleInput:
    return list(op.sample_inputs(TensorFactory(dtype, device)))[number]


@pytest.fixture
def call(op: Op, number: int, device: str) -> SampleInput:
    return sample(op, number, device)


def seeded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, drawing the same random numbers in every call."""

    def run(*args: Any, **kwargs: Any) -> Any:
        set_seed(SEED)
        return function(*args, **kwargs)

    return run


def of_tensors(op: Op, call: SampleInput, function: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """The operation as a function of the tensors that have a gradient; several results as one vector."""
    places, chosen = call.differentiable(), seeded(function or op.function)

    def run(*tensors: Tensor) -> Tensor:
        full = call.replace(places, tensors)
        return joined(chosen(*full.args, **full.kwargs))

    return run


def tensors_in(result: Any) -> list[Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def joined(result: Any) -> Tensor:
    """A result of several tensors as one."""
    if isinstance(result, Tensor):
        return result
    parts = [part.flatten() for part in tensors_in(result)]
    with torch.autocast(parts[0].device.type, enabled=False):
        return torch.cat(parts)


def tensors_of(call: SampleInput, needed: Sequence[bool] | None = None) -> list[Tensor]:
    found = [call[place].detach().clone() for place in call.differentiable()]
    return [x.requires_grad_(needed is None or needed[i]) for i, x in enumerate(found)]


def like(output: Tensor, seed: int = 3) -> Tensor:
    """An upstream gradient: different for each element."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output)


def gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], upstream: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    output = function(*tensors)
    needed = [x for x in tensors if x.requires_grad]
    if not output.requires_grad:
        return output.detach(), []
    upstream = like(output) if upstream is None else upstream
    return output.detach(), list(torch.autograd.grad(output, needed, upstream))


# --- value and first order: as torch's own ---


def test_value(op: Op, number: int, device: str) -> None:
    for dtype in (torch.float64, torch.float32):
        call = sample(op, number, device, dtype)
        ours = seeded(op.function)(*call.args, **call.kwargs)
        state = torch.get_rng_state()
        torch_s = seeded(op.reference)(*call.args, **call.kwargs)
        for our, their in zip(tensors_in(ours), tensors_in(torch_s), strict=True):
            assert torch.equal(our, their), "value"
            assert (our.dtype, our.shape, our.stride()) == (their.dtype, their.shape, their.stride())
        assert torch.equal(state, torch.get_rng_state()), "random stream"


def test_torchs_gradient_of_each_subset(op: Op, call: SampleInput) -> None:
    for needed in itertools.product((False, True), repeat=len(call.differentiable())):
        ours, found = gradients(of_tensors(op, call), tensors_of(call, needed))
        torch_s, expected = gradients(of_tensors(op, call, op.reference), tensors_of(call, needed))
        assert_close(ours, torch_s, rtol=0, atol=0)
        assert_close(found, expected)


def test_gradcheck(op: Op, call: SampleInput) -> None:
    if not call.gradient_is_derivative:
        return
    torch.autograd.gradcheck(
        of_tensors(op, call),
        tensors_of(call),
        check_forward_ad=True,
        check_batched_grad=not op.random,  # legacy vmap refuses random numbers
        check_batched_forward_grad=not op.random,
    )


def test_gradgradcheck(op: Op, call: SampleInput) -> None:
    torch.autograd.gradgradcheck(
        of_tensors(op, call), tensors_of(call), check_fwd_over_rev=True, check_batched_grad=not op.random
    )


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_complex(op: Op, call: SampleInput) -> None:
    """Differentiated wherever torch does, as torch does; never silently wrong."""
    places = call.differentiable()
    changed = call.replace(places, [torch.complex(call[place], like(call[place])) for place in places])

    def outcome(function: Callable[..., Tensor]) -> Any:
        try:
            return gradients(of_tensors(op, changed, function), tensors_of(changed))
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            return type(error)

    ours, torch_s = outcome(op.function), outcome(op.reference)
    if isinstance(ours, type):
        assert isinstance(torch_s, type), "torch differentiates it"
    else:
        torch.autograd.gradcheck(of_tensors(op, changed), tensors_of(changed), check_forward_ad=True)
        if not isinstance(torch_s, type):
            assert_close(ours, torch_s)


# --- higher orders: along a line, where a derivative is one number ---

# --- torch.func, compile, autocast ---


def test_torchs_autocast(op: Op, number: int, device: str) -> None:
    """Forward and backward in the dtypes that torch's own operation takes there."""
    for dtype, lower in itertools.product((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        call = sample(op, number, device, dtype)
        with torch.autocast(device, lower):
            try:
                torch_s, expected = gradients(of_tensors(op, call, op.reference), tensors_of(call))
            except RuntimeError:  # torch has no kernel for this dtype
                continue
            ours, found = gradients(of_tensors(op, call), tensors_of(call))
        assert (ours.dtype, [x.dtype for x in found]) == (torch_s.dtype, [x.dtype for x in expected])
        rounding = 16 * torch.finfo(lower).eps
        assert_close((ours, found), (torch_s, expected), rtol=rounding, atol=rounding)


def low_precision_errors(op: Op, call: SampleInput, dtype: torch.dtype) -> list[tuple[float, float, float]]:
    """For each gradient the error against float64 of ours and of torch's, and the size of its last place."""
    places = [*call.differentiable(), *call.fixed()]
    exact = call.replace(places, [call[place].double() for place in places])
    output = of_tensors(op, exact)(*tensors_of(exact, [False] * len(exact.differentiable())))
    upstream = like(output).to(dtype)
    truth = gradients(of_tensors(op, exact), tensors_of(exact), upstream.double().to(output.dtype))[1]
    try:
        torch_s = gradients(of_tensors(op, call, op.reference), tensors_of(call), upstream)[1]
    except NotImplementedError:  # torch has no kernel for the dtype
        return []
    ours = gradients(of_tensors(op, call), tensors_of(call), upstream)[1]
    assert [x.dtype for x in ours] == [x.dtype for x in torch_s]
    return [
        (
            (our.double() - true).norm().item(),
            (their.double() - true).norm().item(),
            torch.finfo(dtype).eps * true.norm().item(),
        )
        for true, our, their in zip(truth, ours, torch_s, strict=True)
    ]


def test_torchs_low_precision(op: Op, number: int, device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        call = sample(op, number, device, dtype)
        for ours, allowed, last_place in low_precision_errors(op, call, dtype):
            assert ours <= 1.1 * allowed + last_place, dtype


def test_low_precision_at_full_size(op: Op, device: str) -> None:
    """Over many elements chance averages out: the error is no worse than torch's, with nothing added."""
    for dtype in (torch.bfloat16, torch.float16):
        for ours, allowed, _ in low_precision_errors(op, op.benchmark_input(TensorFactory(dtype, device)), dtype):
            assert ours <= 1.01 * allowed, dtype


# --- strides, sizes, special values ---


def layouts(tensor: Tensor) -> list[Tensor]:
    """The same values with other strides."""
    found = [tensor.repeat_interleave(2, -1)[..., ::2]] if tensor.dim() else []
    if tensor.dim() > 1:
        found.append(tensor.transpose(0, -1).contiguous().transpose(0, -1))
    return found


def test_strides(op: Op, call: SampleInput) -> None:
    function, reference = of_tensors(op, call), of_tensors(op, call, op.reference)
    tensors = tensors_of(call)
    output, expected = gradients(function, tensors)
    for i, tensor in enumerate(tensors):
        for other in layouts(tensor.detach()):
            changed = [*tensors[:i], other.requires_grad_(), *tensors[i + 1 :]]
            if op.random:  # which draws in the order of memory
                assert_close(gradients(function, changed), gradients(reference, changed))
            else:  # torch's batch norm reads a strided weight as if contiguous: its oracle is itself, contiguous
                assert_close(gradients(function, changed), (output, expected))
    for upstream in layouts(like(output)):
        assert_close(gradients(function, tensors, upstream)[1], expected)


def refused(function: Callable[..., Any], call: SampleInput) -> bool:
    try:
        function(*call.args, **call.kwargs)
    except (IndexError, RuntimeError):
        return True
    return False


def test_torchs_zero_size(op: Op, call: SampleInput) -> None:
    first = call.args[0]
    if first.dim() < 2:
        return
    batched = [place for place in call.tensors() if call[place].shape[:1] == first.shape[:1]]
    empty = call.replace(batched, [call[place][:0] for place in batched])
    try:
        expected = gradients(of_tensors(op, empty, op.reference), tensors_of(empty))
    except (IndexError, RuntimeError):
        if refused(op.reference, empty):  # the size of the batch stands elsewhere too
            assert refused(op.function, empty)
        else:  # a gradient where torch has none
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


def test_torchs_special_values(op: Op, number: int, device: str) -> None:
    """±0, ±inf, nan and the kinks, in each input and upstream: torch's value, or better where torch has nan."""
    for dtype in (torch.float64, torch.float32):
        call = sample(op, number, device, dtype)
        if not op.supports_special_values:
            return
        function, reference = of_tensors(op, call), of_tensors(op, call, op.reference)
        tensors = tensors_of(call)
        output = function(*tensors).detach()
        trials: list[tuple[list[Tensor], Tensor]] = [(tensors, special(output))]
        for i, tensor in enumerate(tensors):
            for shift in range(0, len(SPECIAL), max(1, tensor.numel())):
                changed = [*tensors[:i], special(tensor.detach(), shift).requires_grad_(), *tensors[i + 1 :]]
                trials += [(changed, like(output)), (changed, special(output, 4))]
        for inputs, upstream in trials:
            ours, found = gradients(function, inputs, upstream)
            torch_s, expected = gradients(reference, inputs, upstream)
            assert_close(ours, torch_s, equal_nan=True)
            for x, a, b in zip(inputs, found, expected, strict=True):
                # At a nan torch gives another gradient where its kernel is vectorized and where it is not.
                known = ~b.isnan() & ~(x.isnan() & a.isnan())
                size = b[b.isfinite()].abs().amax().item() if b.isfinite().any() else 0  # what may cancel
                tolerance = 64 * torch.finfo(dtype).eps
                explain = f"\ninputs {inputs}\nupstream {upstream}\nours {a}\ntorch {b}"
                assert_close(
                    a[known], b[known], rtol=tolerance, atol=tolerance * size, msg=lambda m, more=explain: m + more
                )


def test_special_values_are_declared_where_they_fail(op: Op, device: str) -> None:
    if op.supports_special_values:
        return
    trial = dataclasses.replace(op, supports_special_values=True)
    failures: list[Exception | AssertionError] = []
    for number, _ in enumerate(op.sample_inputs(TensorFactory())):
        try:
            test_torchs_special_values(trial, number, device)
        except (AssertionError, RuntimeError, ValueError) as failure:
            failures.append(failure)
    assert failures, "the declaration is stale"


def special(tensor: Tensor, shift: int = 0) -> Tensor:
    values = [SPECIAL[(i + shift) % len(SPECIAL)] for i in range(tensor.numel())]
    return torch.tensor(values, dtype=tensor.dtype, device=tensor.device).reshape(tensor.shape)


def broken(call: SampleInput) -> list[SampleInput]:
    """The call with one argument of a wrong shape, dtype or kind."""
    found = []
    for place in [*range(len(call.args)), *call.kwargs]:
        value = call[place]
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
        found += [call.replace([place], [change]) for change in changes]
    return found


@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:.*out of bounds")
def test_errors(op: Op, call: SampleInput) -> None:
    """Where torch refuses, so do we, with the same type of error; where it does not, we agree."""
    for bad in broken(call):
        outcomes: list[Any] = []
        for function in (op.function, op.reference):
            try:
                outcomes.append(joined(seeded(function)(*bad.args, **bad.kwargs)))
            except Exception as error:
                outcomes.append(error)
        ours, torch_s = outcomes
        if isinstance(torch_s, Exception):
            assert type(ours) is type(torch_s), f"{bad}: {ours!r} where torch has {torch_s!r}"
            assert str(ours)
        else:
            assert not isinstance(ours, Exception), f"{bad}: {ours!r} where torch has a value"
            assert_close(ours, torch_s, equal_nan=True)


# --- side effects ---


def test_kept_for_backward(op: Op, device: str) -> None:
    """No more bytes than torch keeps, for each subset of inputs."""
    call = op.benchmark_input(TensorFactory(torch.float32, device))
    for needed in itertools.product((False, True), repeat=len(call.differentiable())):
        ours, torch_s = (
            saved_bytes(of_tensors(op, call, function), *tensors_of(call, needed)).grand_total
            for function in (op.function, op.reference)
        )
        assert ours <= torch_s, needed


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


def written_into(call: SampleInput, function: Callable[..., Any], write: Callable[[Tensor], Any]) -> Any:
    """Outputs and inputs after a write into each output, and the gradients; or where it raises."""
    leaves = tensors_of(call)
    inputs, raises = [x * 1 for x in leaves], "write"
    full = call.replace(call.differentiable(), inputs)
    outputs = tensors_in(seeded(function)(*full.args, **full.kwargs))
    try:
        for output in outputs:
            write(output)
        raises = "backward"
        total = joined([(x * like(x, seed)).sum() for seed, x in enumerate([*outputs, *inputs])]).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    except RuntimeError:
        return raises
    return outputs, inputs, gradients


def test_writes_into_outputs(op: Op, call: SampleInput) -> None:
    """What torch lets one write into, ours does, with torch's values and gradients. Where torch has kept what was
    written over, and raises in backward, ours raises, or has the gradients of a write into a copy."""

    def copied(*args: Any, **kwargs: Any) -> list[Tensor]:
        return [x.clone() for x in tensors_in(op.function(*args, **kwargs))]

    for name, write in WRITES.items():
        ours, expected = (written_into(call, function, write) for function in (op.function, op.reference))
        if expected == "backward" and ours != expected:
            expected = written_into(call, copied, write)
        if isinstance(ours, str) or isinstance(expected, str):
            assert ours == expected, f"{name}: ours {ours}, torch {expected}"
            continue
        for our, their in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
            assert (our is None) == (their is None), name
            if our is not None:
                assert_close(our, their, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def test_only_our_rules_in_the_graph(op: Op, call: SampleInput) -> None:
    output = of_tensors(op, call)(*tensors_of(call))
    assert not foreign(output)
    ours = {name for name in nodes(output) if name.endswith("FunctionBackward")}
    assert ours or output is call.args[0] or not call.kwargs.get("training", True)
