"""Formulas: they are pure mathematics, and the programs that are written from them agree."""

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

registry.ops()  # all rules are defined
RULES = sorted({rule for rule in every_rule() if rule.__module__.startswith("manualgrad.ops.")}, key=str)


def called(function: Any, seen: set[Any]) -> Iterator[FunctionType]:
    """A function of ours with all that it calls."""
    if (
        not isinstance(function, FunctionType)
        or function in seen
        or not function.__module__.startswith("manualgrad.ops")
    ):
        return
    seen.add(function)
    yield function
    for name in names(function.__code__):
        yield from called(function.__globals__.get(name), seen)


def names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(names(x) for x in code.co_consts if isinstance(x, CodeType)))


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule.__name__) for rule in RULES])
def test_formulas_are_pure(rule: type[Rule]) -> None:
    """They write into no tensor and test neither sizes nor devices; nor does any helper that they call."""
    methods = [method for name, method in inspect.getmembers(rule, inspect.isfunction) if not hasattr(Rule, name)]
    formulas = [method for method in methods if method.__name__ not in ("forward", "forward_")]
    found = [
        f"{function.__qualname__} {what} ({function.__code__.co_filename}, line {line})"
        for formula in formulas
        for function in called(formula, set())
        for line, what in impurities(reuse.tree_of(function))
    ]
    assert not found, "\n".join(sorted(set(found)))


def saved_tensors(output: Any) -> list[Tensor]:
    """What the nodes of the graph have saved."""
    found: list[Tensor] = []
    seen, waiting = set(), [x.grad_fn for x in tensors(output)]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [x for x in getattr(node, "saved_tensors", ()) if isinstance(x, Tensor)]
        waiting += [below for below, _ in node.next_functions]
    return found


def tensors(output: Any) -> list[Tensor]:
    outputs = output if isinstance(output, (tuple, list)) else [output]
    return [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]


def gradients(op: Op, call: SampleInput, large: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """With the program that reuses temporaries from so many numbers on. Nothing that it is given changes."""
    monkeypatch.setattr(rule_function, "LARGE", large)
    args, kwargs = call.marked()
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
    for x, kept in zip(watched, before, strict=True):
        assert_close(x, kept, rtol=0, atol=0, equal_nan=True, check_stride=False)
    return list(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_both_programs_agree(op: Op, number: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    call = [*op.sample_inputs(TensorFactory(dtype))][number]
    plain, reusing = (gradients(op, call, large, monkeypatch) for large in (2**62, 0))
    assert_close(reusing, plain, equal_nan=True, check_stride=True)


def test_both_programs_agree_at_full_size(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    call = op.benchmark_input(TensorFactory(torch.float32))
    plain, reusing = (gradients(op, call, large, monkeypatch) for large in (2**62, 0))
    monkeypatch.setattr(blocking, "block", None)
    whole = gradients(op, call, 0, monkeypatch)
    for found in (reusing, whole):
        for x, y in zip(found, plain, strict=True):
            if x is not None and y is not None:
                assert (x - y).norm() <= 1e-4 * y.norm()


# --- what the author of a rule is told ---


class Scaled(Rule):
    """y = s x, whose backward writes two temporaries."""

    def forward(input: Tensor, scale: Tensor) -> Tensor:
        return input * scale

    def both(grad: Tensor, scale: Tensor) -> Tensor:
        return grad * scale

    def grad_input(both: Tensor) -> Tensor:
        return both + 0

    def grad_scale(grad: Tensor, input: Tensor) -> Tensor:
        product = grad * input
        return product.unsqueeze(0).sum(0)


def test_an_error_shows_the_line_of_its_author() -> None:
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


def refused(source: str, message: str) -> None:
    """The class is refused when it is made, with the method and its line."""
    with pytest.raises(TypeError, match=message):
        exec(source, {"Rule": Rule, "Tensor": Tensor, "__name__": "test"})


FORWARD = "    def forward(input: Tensor, weight: Tensor): ...\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "    def grad_input(grad, wieght): ...",
            r"grad_input .*line 3.* asks for 'wieght'.*did you mean 'weight'",
        ),
        ("    def grad_inptu(grad): ...", r"grad_inptu .*line 3.*has no input 'inptu'.*did you mean 'input'"),
        (
            "    def grad_input(a): ...\n    def a(b): ...\n    def b(a): ...",
            r"a .*line 4.*: a -> b -> a is a circle",
        ),
        ("    def half(grad): ...", r"half .*line 3.*: no gradient names it"),
        ("", r"Broken has no gradient"),
        ("    autocats = {}\n    def grad_input(grad): ...", r"autocats.*did you mean 'autocast'"),
        ("    autocast = {'cpu': 'lowest'}\n    def grad_input(grad): ...", r"'lowest'"),
        (
            "    save_instead = ('hlaf',)\n    def grad_input(half): ...\n    def half(grad): ...",
            r"did you mean 'half'",
        ),
    ],
)
def test_a_rule_that_does_not_hold_together_is_refused(body: str, message: str) -> None:
    refused(f"class Broken(Rule):\n{FORWARD}{body}\n", message)


def test_a_formula_that_writes_is_refused() -> None:
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


def test_a_missing_gradient_is_named() -> None:
    x, w = (torch.ones(3, requires_grad=True) for _ in range(2))

    class Half(Rule):
        def forward(input: Tensor, weight: Tensor) -> Tensor:
            return input * weight

        def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
            return grad * weight

    with pytest.raises(RuntimeError, match="Half is not differentiable with respect to 'weight'"):
        Half.apply(x, w).sum().backward()


# --- what is written into ---


def written(function: Any) -> str:
    """The program with reuse of one formula."""
    formula = Formula.of("result", function)
    return reuse.Reusing(Program("compute", [formula], formula.names, ["result"])).source


def test_a_temporary_is_written_into_once_it_is_not_read_any_more() -> None:
    def formula(grad: Tensor, output: Tensor) -> Tensor:
        return grad * (output * (1 - output))

    assert "_mul_into_right(output, t" in written(formula)
    assert "_mul_into_right(grad, t" in written(formula)


def test_what_is_read_later_is_not_written_into() -> None:
    def formula(grad: Tensor, output: Tensor) -> Tensor:
        s = output.sigmoid()
        return s * (1 - s)

    assert "_sub_into_right(1, s" not in written(formula)
    assert "into_left(s" in written(formula)


def test_a_view_of_an_argument_is_not_written_into() -> None:
    def formula(grad: Tensor, output: Tensor) -> Tensor:
        flat = output.reshape(-1)
        return flat * 2 + grad.conj() * 3

    assert "into_left(flat" not in written(formula)


def test_a_view_that_is_read_later_protects_its_base() -> None:
    def formula(grad: Tensor) -> Tensor:
        double = grad * 2
        row = double.select(0, 0)
        more = double * 3
        return more + row

    assert "into_left(double" not in written(formula)


def test_gradients_that_are_returned_are_not_written_into() -> None:
    x, s = torch.randn(2**16, requires_grad=True), torch.randn(2**16, requires_grad=True)
    upstream = torch.randn(2**16)
    found = torch.autograd.grad(Scaled.apply(x, s), (x, s), upstream)
    assert_close(found, (upstream * s.detach(), upstream * x.detach()))
