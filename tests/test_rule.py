"""The rule itself: what it keeps, what it refuses, and the private names of torch that it stands on."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from graph import nodes
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp
from torch.testing import assert_close

from manualgrad import registry
from manualgrad.ops.linear import LinearFunction
from manualgrad.ops.normalization import LayerNormFunction
from manualgrad.rule import Rule, every_rule, torch_internals


class CubeFunction(Rule):
    """y = s x³, by way of a statistic that moves with x and a quantity that two gradients share."""

    statistics = ("square",)
    computed: list[str] = []

    def forward(input: Tensor, scale: Tensor, unused: int) -> tuple[Tensor, Tensor]:
        return scale * input**3, input**2

    def square(input: Tensor) -> Tensor:
        CubeFunction.computed.append("square")
        return input**2

    def cube(input: Tensor, square: Tensor) -> Tensor:
        CubeFunction.computed.append("cube")
        return input * square

    def grad_input(grad: Tensor, square: Tensor, scale: Tensor) -> Tensor:
        return 3 * grad * scale * square

    def grad_scale(grad: Tensor, cube: Tensor) -> Tensor:
        return (grad * cube).sum()


class ForgetfulCubeFunction(CubeFunction):
    """The same, with its statistic declared a constant: right to first order, wrong above."""

    square = None  # type: ignore[assignment]


def kept(function: torch.autograd.Function | None) -> list[Tensor]:
    return list(getattr(function, "saved_tensors"))  # noqa: B009


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_it_is_an_autograd_function() -> None:
    assert issubclass(LinearFunction.function, torch.autograd.Function)
    output = LinearFunction.apply(leaf(2, 3), leaf(4, 3), None)
    assert output.grad_fn is not None
    assert output.grad_fn.name() == "LinearFunctionBackward"


def test_what_the_needed_gradients_name_is_kept_and_nothing_else() -> None:
    x, w, b = leaf(5, 3), leaf(4, 3), leaf(4)
    for needed in itertools.product((False, True), repeat=3):
        arguments = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), needed, strict=True)]
        output = LinearFunction.apply(*arguments)
        pointers = {t.data_ptr() for t in kept(output.grad_fn)} if output.requires_grad else set()
        expected = {arguments[1].data_ptr()} if needed[0] else set()
        expected |= {arguments[0].data_ptr()} if needed[1] else set()
        assert pointers == expected


def test_shared_quantities_are_computed_once_and_statistics_not_again() -> None:
    CubeFunction.computed.clear()
    x, s = leaf(4), leaf()
    CubeFunction.apply(x, s, 3).sum().backward()
    assert CubeFunction.computed == ["cube"]
    assert_close(x.grad, 3 * s.detach() * x.detach() ** 2)


def test_moving_statistics_are_computed_anew_where_the_backward_is_differentiated() -> None:
    x, s = leaf(4), leaf().detach()
    value = CubeFunction.apply(x, s, 3).sum()
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_close(second, 6 * s * x.detach())
    third = grad(
        lambda t: jvp(lambda u: grad(lambda v: CubeFunction.apply(v, s, 3).sum())(u), (t,), (t,))[1].sum()
    )
    assert_close(third(x.detach()), 12 * s * x.detach())


def test_a_statistic_without_its_method_is_taken_as_a_constant() -> None:
    """The laws' reason to test above first order: this rule passes gradcheck and is wrong."""
    x, s = leaf(4), leaf().detach()
    assert torch.autograd.gradcheck(lambda t: ForgetfulCubeFunction.apply(t, s, 3), x)
    (first,) = torch.autograd.grad(ForgetfulCubeFunction.apply(x, s, 3).sum(), x, create_graph=True)
    assert not first.requires_grad


def test_a_tensor_without_a_gradient_is_refused_when_it_requires_one() -> None:
    nll_loss = registry.ops()["nll_loss"].function
    x, target, weight = leaf(4, 3), torch.tensor([0, 1, 2, 1]), torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"not differentiable with respect to .*'weight'"):
        nll_loss(x, target, weight.requires_grad_()).backward()
    with pytest.raises(RuntimeError, match=r"not differentiable with respect to .*'weight'"):
        jvp(lambda w: nll_loss(x, target, w), (weight.detach(),), (weight.detach(),))


def test_a_rule_that_does_not_hold_together_is_refused_when_it_is_written() -> None:
    with pytest.raises(TypeError, match="asks for 'wieght', which is no input"):

        class Misspelt(Rule):
            def forward(input: Tensor, weight: Tensor) -> Tensor: ...
            def grad_input(grad: Tensor, wieght: Tensor) -> Tensor: ...

    with pytest.raises(TypeError, match="forward has no input 'x'"):

        class Misnamed(Rule):
            def forward(input: Tensor) -> Tensor: ...
            def grad_x(grad: Tensor) -> Tensor: ...

    with pytest.raises(TypeError, match="annotate 'p'"):

        class Unannotated(Rule):
            def forward(input: Tensor, p) -> Tensor: ...  # type: ignore[no-untyped-def]


def test_in_no_grad_nothing_is_kept() -> None:
    x, w = leaf(5, 3), leaf(4, 3)
    with torch.no_grad():
        assert LinearFunction.apply(x, w, None).grad_fn is None
    with torch.inference_mode():
        assert_close(LinearFunction.apply(x, w, None), F.linear(x, w))


def test_low_precision_gradients_are_rounded_once() -> None:
    """The formulas of LayerNorm run in float32, and only the result is bfloat16."""
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    upstream = torch.randn(64, 256, dtype=torch.bfloat16)
    (found,) = torch.autograd.grad(LayerNormFunction.apply(x, None, None, 1, 1e-5), x, upstream)
    (true,) = torch.autograd.grad(LayerNormFunction.apply(exact, None, None, 1, 1e-5), exact, upstream.double())
    assert found.dtype == torch.bfloat16
    assert (found.double() - true).norm() < 1e-2 * true.norm()


def test_two_rules_compiled_one_after_the_other_are_not_mistaken() -> None:
    """Dynamo keeps what it compiled with the code object: with one for all rules, the second was the first."""
    operations = registry.ops()
    x = torch.randn(4, 3, requires_grad=True)
    for name in ("relu", "sigmoid", "tanh"):
        op = operations[name]
        entry = (
            inspect.unwrap(op.function)
            .__globals__[{"relu": "ReLU", "sigmoid": "Sigmoid", "tanh": "Tanh"}[name] + "Function"]
            .apply
        )
        compiled = torch.compile(entry, fullgraph=True, backend="aot_eager")
        (found,) = torch.autograd.grad(compiled(x).sum(), x)
        assert_close(found, torch.autograd.grad(op.reference(x).sum(), x)[0])


def test_names_of_rules_tell_them_apart() -> None:
    registry.ops()
    names = [found.__name__ for found in set(every_rule()) if found.__module__.startswith("manualgrad.ops.")]
    assert len(names) == len(set(names))


BY_HAND = {
    **dict.fromkeys(("hinge_embedding_loss", "triplet_margin_loss"), "cast before it is composed"),
    "cross_map_lrn2d": "torch's pow writes into a buffer, which autocast leaves alone",
}
if not torch_internals.cuda_autocasts("rms_norm"):
    BY_HAND["rms_norm"] = "torch 2.11 composes it inside of one operation"


def test_cuda_autocast_as_torch_registers_it(op: registry.Op) -> None:
    """Which operations autocast treats on CUDA, read off torch's dispatcher, without a GPU: of all that torch's
    function runs, as the profiler sees it."""
    rules = {f"{found.__name__}Backward": found for found in every_rule()}
    ours, run = set(), set()
    for call in op.sample_inputs(registry.TensorFactory()):
        args, kwargs = call.marked()
        ours |= {
            name for name in nodes(op.function(*args, **kwargs)) & rules.keys() if "cuda" in rules[name].autocast
        }
        with torch.autograd.profiler.profile() as profile:
            op.reference(*args, **kwargs)
        events = getattr(profile, "function_events")  # noqa: B009
        run |= {event.name.removeprefix("aten::") for event in events}
    sums = {"sum", "cumsum"}  # plain arithmetic, which ours does by torch's operations too
    expected = {name for name in run - sums if any(map(torch_internals.cuda_autocasts, overloads(name)))}
    assert bool(ours) == bool(expected) or op.name in BY_HAND, (ours, expected)


def overloads(name: str) -> list[str]:
    packet = getattr(torch.ops.aten, name, None)
    every = [] if packet is None else packet.overloads()
    schemas = [name if overload == "default" else f"{name}.{overload}" for overload in every]
    return [schema for schema in schemas if torch._C._dispatch_has_kernel(f"aten::{schema}")]


def test_the_import_does_not_load_dynamo() -> None:
    """It takes as long to import as the rest of torch."""
    code = "import sys, torch, manualgrad; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


# --- the private names of torch, each with what is taken from it ---


def test_private_modes() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append(
            (
                torch_internals.is_transformed(),
                torch_internals.in_forward_mode(),
                torch_internals.in_nested_forward_mode(),
            )
        )
        return x * x

    one = torch.ones(())
    look(one)
    grad(look)(one)
    jvp(look, (one,), (one,))
    jvp(lambda x: jvp(look, (x,), (one,))[1], (one,), (one,))
    with forward_ad.dual_level():
        look(forward_ad.make_dual(one, one))
    assert seen == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
        (False, True, False),
    ]
    assert not torch_internals.is_any_autocast_enabled()
    with torch.autocast("cpu"):
        assert torch_internals.is_any_autocast_enabled()


def test_private_nothing_looks_on() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_internals.inplace_is_safe(x, x))
        return x

    x = torch.ones(3)
    look(x)
    with torch.no_grad():
        look(x)
        look(torch.nn.Parameter(x))
        torch.vmap(look)(x)
        with forward_ad.dual_level():
            look(forward_ad.make_dual(x, x))
    y = (x.requires_grad_() * 2).sum()
    y.register_hook(look)
    torch.autograd.grad(y, x, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2), is_grads_batched=True)
    assert seen == [False, True, True, False, False, True, False]


def test_nested_forward_mode_through_a_plain_function_still_loses_its_outer_tangent() -> None:
    """pytorch#197867, which `_outer_tangents` and `_primal` work around; when this fails they can go."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * x

        @staticmethod
        def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx: torch.autograd.function.FunctionCtx, dx: Tensor) -> Tensor:
            (x,) = getattr(ctx, "saved_tensors")  # noqa: B009
            return 2 * x * dx

    one = torch.ones(())
    found = jvp(lambda x: jvp(lambda u: Square.apply(u), (x,), (one,))[1], (one,), (one,))[1]
    assert found.item() == 0, "the truth is 2"
