"""Formulas are pure, the generated programs agree, and errors point to the author's source."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manualgrad import blocking, registry
from manualgrad.registry import Op, SampleInput, TensorFactory
from manualgrad.rule import Rule, every_rule, reuse
from manualgrad.rule import function as rule_function
from manualgrad.rule.formulas import Formula, Program
from manualgrad.rule.spec import impurities

registry.ops()  # defines all rules
RULES = sorted({rule for rule in every_rule() if rule.__module__.startswith("manualgrad.ops.")}, key=str)


def function_and_callees(function: Any, seen: set[Any]) -> Iterator[FunctionType]:
    """A function of manualgrad.ops, and all functions of manualgrad.ops that it calls."""
    if (
        not isinstance(function, FunctionType)
        or function in seen
        or not function.__module__.startswith("manualgrad.ops")
    ):
        return
    seen.add(function)
    yield function
    for name in global_names(function.__code__):
        yield from function_and_callees(function.__globals__.get(name), seen)


def global_names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(global_names(x) for x in code.co_consts if isinstance(x, CodeType)))


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule.__name__) for rule in RULES])
def test_formulas_are_pure(rule: type[Rule]) -> None:
    """Formulas and their helpers do not write into tensors and do not branch on sizes or devices."""
    methods = [method for name, method in inspect.getmembers(rule, inspect.isfunction) if not hasattr(Rule, name)]
    formulas = [method for method in methods if method.__name__ not in ("forward", "forward_")]
    found = [
        f"{function.__qualname__} {problem} ({function.__code__.co_filename}, line {line})"
        for formula in formulas
        for function in function_and_callees(formula, set())
        for line, problem in impurities(reuse.syntax_tree(function))
    ]
    assert not found, "\n".join(sorted(set(found)))


def saved_tensors(output: Any) -> list[Tensor]:
    """The saved tensors of all nodes of the graph."""
    found: list[Tensor] = []
    seen, waiting = set(), [x.grad_fn for x in tensors(output)]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [x for x in getattr(node, "saved_tensors", ()) if isinstance(x, Tensor)]
        waiting += [next_node for next_node, _ in node.next_functions]
    return found


def tensors(output: Any) -> list[Tensor]:
    outputs = output if isinstance(output, (tuple, list)) else [output]
    return [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]


def gradients(
    op: Op, sample: SampleInput, min_elements: int, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor | None]:
    """The gradients, with reused temporaries from this size on. No tensor that the backward reads may change."""
    monkeypatch.setattr(rule_function, "MIN_ELEMENTS_FOR_REUSE", min_elements)
    args, kwargs = sample.with_requires_grad()
    torch.manual_seed(0)
    output = op.function(*args, **kwargs)
    outputs = tensors(output)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in outputs]
    leaves = [x for x in (*args, *kwargs.values()) for x in (x if isinstance(x, (list, tuple)) else [x])]
    leaves = [x for x in leaves if isinstance(x, Tensor)]
    watched = [x.detach() for x in (*leaves, *outputs, *upstream, *saved_tensors(output))]
    before = [x.clone() for x in watched]
    wanted = [x for x in leaves if x.requires_grad]
    found = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True, retain_graph=True)
    for x, old in zip(watched, before, strict=True):
        assert_close(x, old, rtol=0, atol=0, equal_nan=True, check_stride=False)
    return list(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_programs_agree(op: Op, number: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = [*op.sample_inputs(TensorFactory(dtype))][number]
    plain, reusing = (gradients(op, sample, size, monkeypatch) for size in (2**62, 0))
    assert_close(reusing, plain, equal_nan=True, check_stride=True)


def test_programs_agree_at_benchmark_size(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = op.benchmark_input(TensorFactory(torch.float32))
    plain, reusing = (gradients(op, sample, size, monkeypatch) for size in (2**62, 0))
    monkeypatch.setattr(blocking, "block_size", None)
    unblocked = gradients(op, sample, 0, monkeypatch)
    for found in (reusing, unblocked):
        for x, y in zip(found, plain, strict=True):
            if x is not None and y is not None:
                assert (x - y).norm() <= 1e-4 * y.norm()


# --- errors that the author of a rule sees ---


class Scaled(Rule):
    """y = s x, with two temporaries in the backward."""

    def forward(input: Tensor, scale: Tensor) -> Tensor:
        return input * scale

    def both(grad: Tensor, scale: Tensor) -> Tensor:
        return grad * scale

    def grad_input(both: Tensor) -> Tensor:
        return both + 0

    def grad_scale(grad: Tensor, input: Tensor) -> Tensor:
        product = grad * input
        return product.unsqueeze(0).sum(0)


def test_error_in_a_formula_shows_its_source_line() -> None:
    class Failing(Rule):
        def forward(input: Tensor) -> Tensor:
            return input.clone()

        def half(grad: Tensor) -> Tensor:
            return grad / 2

        def grad_input(half: Tensor) -> Tensor:
            return half @ torch.ones(7)

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError) as caught:
        Failing.apply(x).sum().backward()
    text = "".join(traceback.format_exception(caught.value))
    line = inspect.getsourcelines(getattr(Failing, "grad_input"))[1] + 1  # noqa: B009
    assert "Failing.grad_input" in text
    assert f'{__file__}", line {line}' in text
    assert "grad_input = half @ torch.ones(7)" in text


def assert_refused(source: str, message: str) -> None:
    """Defining the class raises a TypeError with this message."""
    with pytest.raises(TypeError, match=message):
        exec(source, {"Rule": Rule, "Tensor": Tensor, "__name__": "test"})


FORWARD = "    def forward(input: Tensor, weight: Tensor): ...\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "    def grad_input(grad, wieght): ...",
            r"grad_input .*line 3.* parameter 'wieght'.*did you mean 'weight'",
        ),
        ("    def grad_inptu(grad): ...", r"grad_inptu .*line 3.*has no input 'inptu'.*did you mean 'input'"),
        (
            "    def grad_input(a): ...\n    def a(b): ...\n    def b(a): ...",
            r"a .*line 4.*: circular definition: a -> b -> a",
        ),
        ("    def half(grad): ...", r"half .*line 3.*: no gradient uses it"),
        ("", r"Broken has no gradient"),
        ("    autocats = {}\n    def grad_input(grad): ...", r"autocats.*did you mean 'autocast'"),
        ("    autocast = {'cpu': 'lowest'}\n    def grad_input(grad): ...", r"'lowest'"),
        (
            "    save_instead = ('hlaf',)\n    def grad_input(half): ...\n    def half(grad): ...",
            r"did you mean 'half'",
        ),
    ],
)
def test_inconsistent_class_is_refused(body: str, message: str) -> None:
    assert_refused(f"class Broken(Rule):\n{FORWARD}{body}\n", message)


def test_formula_that_writes_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Writing.grad_input .*line \d+\): .* calls mul_, which writes"):

        class Writing(Rule):
            def forward(input: Tensor) -> Tensor: ...
            def grad_input(grad: Tensor) -> Tensor:
                return grad.mul_(2)

    with pytest.raises(TypeError, match=r"Out.grad_input .* passes out="):

        class Out(Rule):
            def forward(input: Tensor) -> Tensor: ...
            def grad_input(grad: Tensor) -> Tensor:
                return torch.exp(grad, out=grad)

    with pytest.raises(TypeError, match=r"Augmented.grad_input .* augmented assignment"):

        class Augmented(Rule):
            def forward(input: Tensor) -> Tensor: ...
            def grad_input(grad: Tensor, input: Tensor) -> Tensor:
                input *= grad
                return input


def test_missing_gradient_is_reported() -> None:
    x, w = (torch.ones(3, requires_grad=True) for _ in range(2))

    class Half(Rule):
        def forward(input: Tensor, weight: Tensor) -> Tensor:
            return input * weight

        def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
            return grad * weight

    with pytest.raises(RuntimeError, match="Half is not differentiable with respect to 'weight'"):
        Half.apply(x, w).sum().backward()


# --- reused temporaries ---


def source_with_reuse(function: Any) -> str:
    """The source of a formula as a program with reused temporaries."""
    formula = Formula.from_function("result", function)
    return reuse.ReusingProgram(Program("compute", [formula], formula.parameters, ["result"])).source


def test_temporary_is_overwritten_after_its_last_read() -> None:
    def formula(grad: Tensor, output: Tensor) -> Tensor:
        return grad * (output * (1 - output))

    assert "_mul_into_right(output, t" in source_with_reuse(formula)
    assert "_mul_into_right(grad, t" in source_with_reuse(formula)


def test_value_that_is_read_later_is_not_overwritten() -> None:
    def formula(grad: Tensor, output: Tensor) -> Tensor:
        s = output.sigmoid()
        return s * (1 - s)

    assert "_sub_into_right(1, s" not in source_with_reuse(formula)
    assert "into_left(s" in source_with_reuse(formula)


def test_view_of_an_argument_is_not_overwritten() -> None:
    def formula(grad: Tensor, output: Tensor) -> Tensor:
        flat = output.reshape(-1)
        return flat * 2 + grad.conj() * 3

    assert "into_left(flat" not in source_with_reuse(formula)


def test_base_of_a_view_that_is_read_later_is_not_overwritten() -> None:
    def formula(grad: Tensor) -> Tensor:
        double = grad * 2
        row = double.select(0, 0)
        more = double * 3
        return more + row

    assert "into_left(double" not in source_with_reuse(formula)


def test_returned_gradients_are_not_overwritten() -> None:
    x, s = torch.randn(2**16, requires_grad=True), torch.randn(2**16, requires_grad=True)
    upstream = torch.randn(2**16)
    found = torch.autograd.grad(Scaled.apply(x, s), (x, s), upstream)
    assert_close(found, (upstream * s.detach(), upstream * x.detach()))
