"""The laws that every operation holds, each tried on every sample of the table.

The oracle for values and first derivatives is torch's own operation; above first order it is not (torch is wrong
there in places), so there the oracle is the finite difference of the derivative one order below.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from manualgrad.registry import Call, Maker, Op
from manualgrad.saving import kept_bytes
from manualgrad.verification import derivative, line

SEED = 7


def sample(op: Op, number: int, device: str, dtype: torch.dtype = torch.float64) -> Call:
    return list(op.samples(Maker(dtype, device)))[number]


@pytest.fixture
def call(op: Op, number: int, device: str) -> Call:
    return sample(op, number, device)


def seeded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, drawing the same random numbers in every call."""

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(SEED)
        return function(*args, **kwargs)

    return run


def of_tensors(op: Op, call: Call, function: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """The operation as a function of the tensors that have a gradient."""
    places, chosen = call.differentiable(), seeded(function or op.function)

    def run(*tensors: Tensor) -> Tensor:
        full = call.replace(places, tensors)
        return chosen(*full.args, **full.kwargs)

    return run


def tensors_of(call: Call, needed: Sequence[bool] | None = None) -> list[Tensor]:
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
        assert torch.equal(ours, torch_s), "value"
        assert (ours.dtype, ours.shape, ours.stride()) == (torch_s.dtype, torch_s.shape, torch_s.stride())
        assert torch.equal(state, torch.get_rng_state()), "random stream"


def test_gradient_of_each_subset(op: Op, call: Call) -> None:
    for needed in itertools.product((False, True), repeat=len(call.differentiable())):
        ours, found = gradients(of_tensors(op, call), tensors_of(call, needed))
        torch_s, expected = gradients(of_tensors(op, call, op.reference), tensors_of(call, needed))
        assert_close(ours, torch_s, rtol=0, atol=0)
        assert_close(found, expected)


def test_gradcheck(op: Op, call: Call) -> None:
    if not call.gradient_is_derivative:
        return
    torch.autograd.gradcheck(
        of_tensors(op, call),
        tensors_of(call),
        check_forward_ad=True,
        check_batched_grad=not op.random,  # legacy vmap refuses random numbers
        check_batched_forward_grad=not op.random,
    )


def test_gradgradcheck(op: Op, call: Call) -> None:
    torch.autograd.gradgradcheck(
        of_tensors(op, call), tensors_of(call), check_fwd_over_rev=True, check_batched_grad=not op.random
    )


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_complex(op: Op, call: Call) -> None:
    """Differentiated wherever torch does, as torch does; never silently wrong."""
    places = call.differentiable()
    changed = call.replace(places, [torch.complex(call[place], like(call[place])) for place in places])

    def outcome(function: Callable[..., Tensor]) -> Any:
        try:
            return gradients(of_tensors(op, changed, function), tensors_of(changed))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            return type(error)

    ours, torch_s = outcome(op.function), outcome(op.reference)
    if isinstance(ours, type):
        assert isinstance(torch_s, type), "torch differentiates it"
    else:
        torch.autograd.gradcheck(of_tensors(op, changed), tensors_of(changed), check_forward_ad=True)
        if not isinstance(torch_s, type):
            assert_close(ours, torch_s)


# --- higher orders: along a line, where a derivative is one number ---

STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))


def along_a_line(op: Op, call: Call) -> Callable[[Tensor], Tensor]:
    """t -> Σ c sin f(x + t v): sin, so that no derivative of a linear f is zero."""
    points = [x.detach() for x in tensors_of(call)]
    directions = [like(x, seed=5 + i) for i, x in enumerate(points)]
    return line(of_tensors(op, call), points, directions, lambda y: (like(y) * torch.sin(y)).sum())


def check_order(op: Op, call: Call, mixtures: Sequence[str], step: float = 1e-4) -> None:
    if not call.gradient_is_derivative:
        return
    along = along_a_line(op, call)
    below = "r" * (len(mixtures[0]) - 1)
    values = [derivative(along, below, at=k * step) for k, _ in STENCIL]
    expected = sum(weight * value for (_, weight), value in zip(STENCIL, values, strict=True)) / step
    scale = max(abs(expected), *map(abs, values), 1)
    for modes in mixtures:
        assert derivative(along, modes) == pytest.approx(expected, abs=1e-8 * scale), modes


def test_first_order_in_both_modes(op: Op, call: Call) -> None:
    check_order(op, call, ["r", "f"])


def test_second_order_in_all_mixtures(op: Op, call: Call) -> None:
    check_order(op, call, ["rr", "rf", "fr", "ff"])


def test_hessian_vector_product_without_create_graph(op: Op, call: Call) -> None:
    """A backward inside a forward-mode level: differentiated, though grad mode is off."""
    if not call.gradient_is_derivative:
        return
    function, tensors = of_tensors(op, call), tensors_of(call)
    directions = [like(x, seed=5 + i) for i, x in enumerate(tensors)]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(tensors, directions, strict=True)]
        output = function(*duals)
        if not output.requires_grad:
            return
        found = torch.autograd.grad((like(output) * torch.sin(output)).sum(), tensors)
        products = [forward_ad.unpack_dual(x).tangent for x in found]
    each = grad(scalar(function), tuple(range(len(tensors))))
    points = tuple(x.detach() for x in tensors)
    expected = jvp(each, points, tuple(directions))[1]
    assert_close(
        [torch.zeros_like(x) if p is None else p for p, x in zip(products, points, strict=True)], list(expected)
    )


def test_third_order(op: Op, call: Call) -> None:
    check_order(op, call, ["".join(modes) for modes in itertools.product("rf", repeat=3)])


def test_fourth_order(op: Op, call: Call) -> None:
    check_order(op, call, ["rrrr", "ffff", "rfrf", "frfr"])


def test_backward_of_backward(op: Op, call: Call) -> None:
    """The same without torch.func: create_graph, three times over, against torch.func."""
    along = along_a_line(op, call)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = along(t)
    for order in range(1, 4):
        if value.requires_grad:
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        assert value.item() == pytest.approx(derivative(along, "r" * order), abs=1e-10, rel=1e-8)


# --- torch.func, compile, autocast ---


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: (like(out := function(*tensors)) * torch.sin(out)).sum()


def test_jacobians_and_hessians(op: Op, call: Call) -> None:
    """All four ways to a Hessian agree, and both ways to a Jacobian."""
    function, tensors = of_tensors(op, call), [x.detach() for x in tensors_of(call)]
    which = tuple(range(len(tensors)))
    modes = (jacrev, lambda f, argnums: jacfwd(f, argnums, randomness="same"))
    jacobians = [mode(function, which)(*tensors) for mode in modes if not (op.random and mode is jacrev)]
    for other in jacobians[1:]:
        assert_close(other, jacobians[0])
    if op.random:  # jacrev has no way to say what vmap is to do with random numbers
        return
    first, *others = [
        outer(inner(scalar(function), which), which)(*tensors)
        for outer, inner in itertools.product(modes, repeat=2)
    ]
    for other in others:
        assert_close(other, first)


@pytest.mark.filterwarnings(
    "ignore:An output with one or more elements was resized", "ignore:There is a performance"
)
def test_vmap(op: Op, call: Call) -> None:
    """Every subset of the tensors batched, and each at another axis, against a loop."""
    function, tensors = of_tensors(op, call), [x.detach() for x in tensors_of(call)]
    for batched in itertools.product((None, 0, -1), repeat=len(tensors)):
        if all(axis is None for axis in batched):
            continue
        stacked = [
            x if axis is None else torch.stack([x, x + 0.25, x * 0.5], axis)
            for x, axis in zip(tensors, batched, strict=True)
        ]

        def one(
            i: int, stacked: list[Tensor] = stacked, batched: tuple[int | None, ...] = batched
        ) -> list[Tensor]:
            return [x if axis is None else x.select(axis, i) for x, axis in zip(stacked, batched, strict=True)]

        if op.name == "binary_cross_entropy":
            stacked = [x.clamp(0.05, 0.95) for x in stacked]
        mapped = {"in_dims": batched, "randomness": "same"}
        assert_close(
            vmap(function, **mapped)(*stacked), torch.stack([function(*one(i, stacked)) for i in range(3)])
        )
        which = tuple(range(len(tensors)))
        each = grad(scalar(function), which)
        expected = [torch.stack(parts) for parts in zip(*[each(*one(i, stacked)) for i in range(3)], strict=True)]
        assert_close(list(vmap(each, **mapped)(*stacked)), expected)
        through = grad(lambda *xs, m=mapped: vmap(scalar(function), **m)(*xs).sum(), which)(*stacked)
        for found, parts, axis in zip(through, expected, batched, strict=True):
            assert_close(found, parts.sum(0) if axis is None else parts.movedim(0, axis))


def test_compile(op: Op, number: int, device: str) -> None:
    """One graph without a break, the same gradients."""
    torch._dynamo.reset()
    call = sample(op, number, device, torch.float32)
    places = call.differentiable()

    def function(*tensors: Tensor) -> Tensor:
        full = call.replace(places, tensors)
        return op.function(*full.args, **full.kwargs)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(gradients(seeded(compiled), tensors_of(call)), gradients(seeded(function), tensors_of(call)))


def test_autocast(op: Op, number: int, device: str) -> None:
    """Forward and backward in the dtypes that torch's own operation takes there."""
    for dtype, lower in itertools.product((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        call = sample(op, number, device, dtype)
        results = []
        for function in (op.function, op.reference):
            with torch.autocast(device, lower):
                results.append(gradients(of_tensors(op, call, function), tensors_of(call)))
        (ours, found), (torch_s, expected) = results
        assert (ours.dtype, [x.dtype for x in found]) == (torch_s.dtype, [x.dtype for x in expected])
        rounding = 16 * torch.finfo(lower).eps
        assert_close((ours, found), (torch_s, expected), rtol=rounding, atol=rounding)


def low_precision_errors(op: Op, call: Call, dtype: torch.dtype) -> list[tuple[float, float, float]]:
    """For each gradient the error against float64 of ours and of torch's, and the size of its last place."""
    places = [*call.differentiable(), *call.fixed()]
    exact = call.replace(places, [call[place].double() for place in places])
    output = seeded(op.function)(*exact.args, **exact.kwargs)
    upstream = like(output).to(dtype)
    truth = gradients(of_tensors(op, exact), tensors_of(exact), upstream.double().to(output.dtype))[1]
    ours = gradients(of_tensors(op, call), tensors_of(call), upstream)[1]
    torch_s = gradients(of_tensors(op, call, op.reference), tensors_of(call), upstream)[1]
    assert [x.dtype for x in ours] == [x.dtype for x in torch_s]
    return [
        (
            (our.double() - true).norm().item(),
            (their.double() - true).norm().item(),
            torch.finfo(dtype).eps * true.norm().item(),
        )
        for true, our, their in zip(truth, ours, torch_s, strict=True)
    ]


def test_low_precision(op: Op, number: int, device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        call = sample(op, number, device, dtype)
        for ours, allowed, last_place in low_precision_errors(op, call, dtype):
            assert ours <= 1.1 * allowed + last_place, dtype


def test_low_precision_at_full_size(op: Op, device: str) -> None:
    """Over many elements chance averages out: the error is no worse than torch's, with nothing added."""
    for dtype in (torch.bfloat16, torch.float16):
        for ours, allowed, _ in low_precision_errors(op, op.big(Maker(dtype, device)), dtype):
            assert ours <= 1.01 * allowed, dtype


# --- strides, sizes, special values ---


def layouts(tensor: Tensor) -> list[Tensor]:
    """The same values with other strides."""
    found = [tensor.repeat_interleave(2, -1)[..., ::2]] if tensor.dim() else []
    if tensor.dim() > 1:
        found.append(tensor.transpose(0, -1).contiguous().transpose(0, -1))
    return found


def test_strides(op: Op, call: Call) -> None:
    function, reference = of_tensors(op, call), of_tensors(op, call, op.reference)
    tensors = tensors_of(call)
    output, expected = gradients(function, tensors)
    for i, tensor in enumerate(tensors):
        for other in layouts(tensor.detach()):
            changed = [*tensors[:i], other.requires_grad_(), *tensors[i + 1 :]]
            assert_close(gradients(function, changed), gradients(reference, changed))
            if not op.random:  # which draws in the order of memory
                assert_close(gradients(function, changed), (output, expected))
    for upstream in layouts(like(output)):
        assert_close(gradients(function, tensors, upstream)[1], expected)


def test_expanded_gradient(op: Op, call: Call) -> None:
    """What sum() sends back: one number with stride 0."""
    function, tensors = of_tensors(op, call), tensors_of(call)
    output = function(*tensors).detach()
    ones = torch.ones_like(output)
    expanded = ones.new_ones(()).expand_as(ones)
    expected = gradients(of_tensors(op, call, op.reference), tensors, ones)
    assert_close(gradients(function, tensors, expanded), expected)


def test_zero_size(op: Op, call: Call) -> None:
    first = call.args[0]
    if first.dim() < 2:
        return
    tensors = [
        (place, call[place]) for place in [*range(len(call.args)), *call.kwargs] if isinstance(call[place], Tensor)
    ]
    batched = [(place, x) for place, x in tensors if x.dim() and x.shape[0] == first.shape[0]]
    empty = call.replace([place for place, _ in batched], [x[:0] for _, x in batched])
    assert_close(
        gradients(of_tensors(op, empty), tensors_of(empty)),
        gradients(of_tensors(op, empty, op.reference), tensors_of(empty)),
        equal_nan=True,
    )


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


def test_special_values(op: Op, number: int, device: str) -> None:
    """±0, ±inf, nan and the kinks, in each input and upstream: torch's value, or better where torch has nan."""
    for dtype in (torch.float64, torch.float32):
        call = sample(op, number, device, dtype)
        if not op.special:
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
            for a, b in zip(found, expected, strict=True):
                known = ~b.isnan()
                size = b[b.isfinite()].abs().amax().item() if b.isfinite().any() else 0  # what may cancel
                tolerance = 64 * torch.finfo(dtype).eps
                explain = f"\ninputs {inputs}\nupstream {upstream}\nours {a}\ntorch {b}"
                assert_close(
                    a[known], b[known], rtol=tolerance, atol=tolerance * size, msg=lambda m, more=explain: m + more
                )


def special(tensor: Tensor, shift: int = 0) -> Tensor:
    values = [SPECIAL[(i + shift) % len(SPECIAL)] for i in range(tensor.numel())]
    return torch.tensor(values, dtype=tensor.dtype, device=tensor.device).reshape(tensor.shape)


def broken(call: Call) -> list[Call]:
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
def test_errors(op: Op, call: Call) -> None:
    """Where torch refuses, so do we, with the same type of error; where it does not, we agree."""
    for bad in broken(call):
        outcomes: list[Any] = []
        for function in (op.function, op.reference):
            try:
                output = seeded(function)(*bad.args, **bad.kwargs)
                outcomes.append(output)
            except Exception as error:
                outcomes.append(error)
        ours, torch_s = outcomes
        if isinstance(torch_s, Exception):
            assert type(ours) is type(torch_s), f"{bad}: {ours!r} where torch has {torch_s!r}"
            assert str(ours)
        else:
            assert not isinstance(ours, Exception), f"{bad}: {ours!r} where torch has a value"
            assert_close(ours, torch_s, equal_nan=True)


# --- manners ---


def test_nothing_is_mutated(op: Op, call: Call) -> None:
    function, tensors = of_tensors(op, call), tensors_of(call)
    output = function(*tensors)
    if not output.requires_grad:
        return
    upstream = like(output)
    watched = [*tensors, output, upstream]
    before = [(x.detach().clone(), x._version) for x in watched]
    first = torch.autograd.grad(output, tensors, upstream, retain_graph=True)
    again = torch.autograd.grad(output, tensors, upstream)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other), "a second backward differs"
    for x, (value, version) in zip(watched, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version


def test_nothing_leaks(op: Op, call: Call) -> None:
    """Without the garbage collector, everything is gone once the output is."""
    gc.collect()
    gc.disable()
    try:
        tensors = tensors_of(call)
        output = of_tensors(op, call)(*tensors)
        if not output.requires_grad:
            return
        watched = [weakref.ref(x) for x in (output, *tensors)]
        torch.autograd.grad(output, tensors, like(output), create_graph=False)
        del tensors, output
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()


def test_kept_for_backward(op: Op, device: str) -> None:
    """No more bytes than torch keeps, for each subset of inputs."""
    call = op.big(Maker(torch.float32, device))
    for needed in itertools.product((False, True), repeat=len(call.differentiable())):
        ours = kept_bytes(of_tensors(op, call), *tensors_of(call, needed))
        assert ours <= kept_bytes(of_tensors(op, call, op.reference), *tensors_of(call, needed)), needed


def test_adjoint_at_full_size(op: Op, device: str) -> None:
    """⟨g, J v⟩ = ⟨Jᵀ g, v⟩, at the size that real models have."""
    call = op.big(Maker(torch.float64, device))
    function, tensors = of_tensors(op, call), tensors_of(call)
    output, found = gradients(function, tensors)
    directions = tuple(like(x, seed=11 + i) for i, x in enumerate(tensors))
    tangent = jvp(function, tuple(x.detach() for x in tensors), directions)[1]
    pushed = (like(output) * tangent).sum()
    pulled = sum((x * v).sum() for x, v in zip(found, directions, strict=True))
    scale = like(output).norm() * tangent.norm() + 1e-300
    assert abs(pushed - pulled) <= 1e-13 * scale


def test_hooks_and_checkpoint(op: Op, call: Call) -> None:
    """Saved tensors moved away and back, and recomputed: the same gradients."""
    function, tensors = of_tensors(op, call), tensors_of(call)
    expected = gradients(function, tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        assert_close(gradients(function, tensors), expected)
    assert_close(gradients(lambda *xs: checkpoint(function, *xs, use_reentrant=False), tensors), expected)


MOVES_OR_ADDS = {
    *("AccumulateGrad", "AliasBackward0", "CloneBackward0", "CopyBackwards", "CopySlices", "ExpandBackward0"),
    *(
        "SqueezeBackward1",
        "UnsqueezeBackward0",
        "ToCopyBackward0",
        "ViewBackward0",
        "AddBackward0",
        "DivBackward0",
    ),
    *("MeanBackward0", "MulBackward0", "SumBackward0"),
}


def test_only_our_rules_in_the_graph(op: Op, call: Call) -> None:
    output = of_tensors(op, call)(*tensors_of(call))
    found, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            found.add(node.name().removeprefix("torch::autograd::"))
            waiting += [before for before, _ in node.next_functions]
    ours = {name for name in found if name.endswith("FunctionBackward")}
    assert found - ours <= MOVES_OR_ADDS
    assert ours or output is call.args[0] or not call.kwargs.get("training", True)
