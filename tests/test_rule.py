"""Rules: saved tensors, statistics, refused classes, precision, and the wrappers of torch's private names."""

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

from manualgrad import registry, torch_internals
from manualgrad.ops.linear import LinearFunction
from manualgrad.ops.normalization import LayerNormFunction
from manualgrad.rule import Rule, every_rule


class CubeFunction(Rule):
    """y = s x³, with a statistic x² that depends on x and a quantity that two gradients share."""

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


class ConstantStatisticCubeFunction(CubeFunction):
    """The statistic is treated as a constant, so derivatives above first order are wrong."""

    square = None  # type: ignore[assignment]


def saved_tensors(function: torch.autograd.Function | None) -> list[Tensor]:
    return list(getattr(function, "saved_tensors"))  # noqa: B009


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_rule_has_an_autograd_function() -> None:
    assert issubclass(LinearFunction.function, torch.autograd.Function)
    output = LinearFunction.apply(leaf(2, 3), leaf(4, 3), None)
    assert output.grad_fn is not None
    assert output.grad_fn.name() == "LinearFunctionBackward"


def test_saves_only_what_needed_gradients_use() -> None:
    x, w, b = leaf(5, 3), leaf(4, 3), leaf(4)
    for needed in itertools.product((False, True), repeat=3):
        arguments = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), needed, strict=True)]
        output = LinearFunction.apply(*arguments)
        pointers = {t.data_ptr() for t in saved_tensors(output.grad_fn)} if output.requires_grad else set()
        expected = {arguments[1].data_ptr()} if needed[0] else set()
        expected |= {arguments[0].data_ptr()} if needed[1] else set()
        assert pointers == expected


def test_shared_quantity_is_computed_once_and_statistic_is_saved() -> None:
    CubeFunction.computed.clear()
    x, s = leaf(4), leaf()
    CubeFunction.apply(x, s, 3).sum().backward()
    assert CubeFunction.computed == ["cube"]
    assert_close(x.grad, 3 * s.detach() * x.detach() ** 2)


def test_statistics_are_recomputed_in_double_backward() -> None:
    x, s = leaf(4), leaf().detach()
    value = CubeFunction.apply(x, s, 3).sum()
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_close(second, 6 * s * x.detach())
    third = grad(
        lambda t: jvp(lambda u: grad(lambda v: CubeFunction.apply(v, s, 3).sum())(u), (t,), (t,))[1].sum()
    )
    assert_close(third(x.detach()), 12 * s * x.detach())


def test_statistic_without_a_method_is_a_constant() -> None:
    """This rule passes gradcheck although it is wrong, so the laws must test higher orders."""
    x, s = leaf(4), leaf().detach()
    assert torch.autograd.gradcheck(lambda t: ConstantStatisticCubeFunction.apply(t, s, 3), x)
    (first,) = torch.autograd.grad(ConstantStatisticCubeFunction.apply(x, s, 3).sum(), x, create_graph=True)
    assert not first.requires_grad


def test_input_without_a_gradient_raises_if_it_requires_grad() -> None:
    nll_loss = registry.ops()["nll_loss"].function
    x, target, weight = leaf(4, 3), torch.tensor([0, 1, 2, 1]), torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"not differentiable with respect to .*'weight'"):
        nll_loss(x, target, weight.requires_grad_()).backward()
    with pytest.raises(RuntimeError, match=r"not differentiable with respect to .*'weight'"):
        jvp(lambda w: nll_loss(x, target, w), (weight.detach(),), (weight.detach(),))


def test_inconsistent_class_is_refused() -> None:
    with pytest.raises(TypeError, match="parameter 'wieght' is no input"):

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


def test_no_grad_saves_nothing() -> None:
    x, w = leaf(5, 3), leaf(4, 3)
    with torch.no_grad():
        assert LinearFunction.apply(x, w, None).grad_fn is None
    with torch.inference_mode():
        assert_close(LinearFunction.apply(x, w, None), F.linear(x, w))


def test_low_precision_gradients_are_rounded_once() -> None:
    """The formulas run in float32. Only the result is rounded to bfloat16."""
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    upstream = torch.randn(64, 256, dtype=torch.bfloat16)
    (found,) = torch.autograd.grad(LayerNormFunction.apply(x, None, None, 1, 1e-5), x, upstream)
    (true,) = torch.autograd.grad(LayerNormFunction.apply(exact, None, None, 1, 1e-5), exact, upstream.double())
    assert found.dtype == torch.bfloat16
    assert (found.double() - true).norm() < 1e-2 * true.norm()


def test_compiled_rules_are_not_confused() -> None:
    """Dynamo caches by code object. If rules shared one, the second rule would run the code of the first."""
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


def test_rule_names_are_unique() -> None:
    registry.ops()
    names = [found.__name__ for found in set(every_rule()) if found.__module__.startswith("manualgrad.ops.")]
    assert len(names) == len(set(names))


AUTOCAST_IN_FUNCTION = {
    **dict.fromkeys(
        ("hinge_embedding_loss", "triplet_margin_loss"), "the function casts its inputs before it calls rules"
    ),
    "cross_map_lrn2d": "torch's pow writes into a buffer, and autocast does not cast those",
}
if not torch_internals.is_autocast_on_cuda("rms_norm"):
    AUTOCAST_IN_FUNCTION["rms_norm"] = "in torch 2.11 it is a single operation without autocast"


def test_cuda_autocast_as_torch_registers_it(op: registry.Op) -> None:
    """Autocast treats an operation on CUDA if torch's dispatcher has a kernel for it, which needs no GPU. The
    operations that torch's function runs come from the profiler."""
    rules = {f"{found.__name__}Backward": found for found in every_rule()}
    manual, run = set(), set()
    for sample in op.sample_inputs(registry.TensorFactory()):
        args, kwargs = sample.with_requires_grad()
        manual |= {
            name for name in nodes(op.function(*args, **kwargs)) & rules.keys() if "cuda" in rules[name].autocast
        }
        with torch.autograd.profiler.profile() as profile:
            op.reference(*args, **kwargs)
        events = getattr(profile, "function_events")  # noqa: B009
        run |= {event.name.removeprefix("aten::") for event in events}
    sums = {"sum", "cumsum"}  # rules use torch's operations for these too
    expected = {name for name in run - sums if any(map(torch_internals.is_autocast_on_cuda, overloads(name)))}
    assert bool(manual) == bool(expected) or op.name in AUTOCAST_IN_FUNCTION, (manual, expected)


def overloads(name: str) -> list[str]:
    packet = getattr(torch.ops.aten, name, None)
    every = [] if packet is None else packet.overloads()
    schemas = [name if overload == "default" else f"{name}.{overload}" for overload in every]
    return [schema for schema in schemas if torch._C._dispatch_has_kernel(f"aten::{schema}")]


def test_import_does_not_load_dynamo() -> None:
    """Importing Dynamo takes as long as importing the rest of torch."""
    code = "import sys, torch, manualgrad; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


# --- private names of torch ---


def test_modes_are_detected() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def record(x: Tensor) -> Tensor:
        seen.append(
            (
                torch_internals.in_functorch_transform(),
                torch_internals.in_forward_mode(),
                torch_internals.in_nested_forward_mode(),
            )
        )
        return x * x

    one = torch.ones(())
    record(one)
    grad(record)(one)
    jvp(record, (one,), (one,))
    jvp(lambda x: jvp(record, (x,), (one,))[1], (one,), (one,))
    with forward_ad.dual_level():
        record(forward_ad.make_dual(one, one))
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


def test_inplace_is_safe() -> None:
    seen: list[bool] = []

    def record(x: Tensor) -> Tensor:
        seen.append(torch_internals.inplace_is_safe(x, x))
        return x

    x = torch.ones(3)
    record(x)
    with torch.no_grad():
        record(x)
        record(torch.nn.Parameter(x))
        torch.vmap(record)(x)
        with forward_ad.dual_level():
            record(forward_ad.make_dual(x, x))
    y = (x.requires_grad_() * 2).sum()
    y.register_hook(record)
    torch.autograd.grad(y, x, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2), is_grads_batched=True)
    assert seen == [False, True, True, False, False, True, False]


def test_torch_still_loses_the_outer_tangent_of_nested_forward_mode() -> None:
    """pytorch#197867. If this test fails, remove `enable_outer_forward_mode` and `unpack_primal`."""

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
