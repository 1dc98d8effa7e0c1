"""manualgrad/rule/README.md agrees with the code.

Its blocks are generated. After a change, run

    python tests/test_rule_readme.py
"""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import manualgrad
from manualgrad.ops import activation
from manualgrad.ops.activation import LogSigmoidFunction
from manualgrad.rule import Rule
from manualgrad.rule.formulas import Program
from manualgrad.rule.reuse import ReusingProgram
from manualgrad.rule.spec import _METHODS, _OPTIONS

PAGE = Path(manualgrad.__file__).parent / "rule" / "README.md"

INCONSISTENT = (
    "    def grad_input(grad, wieght): ...",
    "    def grad_inptu(grad): ...",
    "    def grad_input(a): ...\n    def a(b): ...\n    def b(a): ...",
    "    def half(grad): ...",
    "    recomputabel = True\n    def grad_input(grad): ...",
)


def program(rule: type[Rule]) -> Program:
    implementation = rule.implementation
    return implementation.plan(
        tuple(x in implementation.spec.formulas for x in implementation.spec.gradients)
    ).program()


def errors() -> str:
    messages = []
    for body in INCONSISTENT:
        source = f"class MyFunction(Rule):\n    def forward(input: Tensor, weight: Tensor): ...\n{body}\n"
        with pytest.raises(TypeError) as caught:
            exec(compile(source, "my_rules.py", "exec"), {"Rule": Rule, "Tensor": Tensor, "__name__": "my_rules"})
        messages.append(str(caught.value))
    return "\n".join(messages)


def blocks() -> dict[str, str]:
    return {
        "rule": inspect.getsource(LogSigmoidFunction),
        "plain": program(LogSigmoidFunction).source,
        "reusing": ReusingProgram(program(LogSigmoidFunction)).source,
        "function": re.findall(r"^logsigmoid = .*$", inspect.getsource(activation), re.M)[0],
        "errors": errors(),
    }


def updated(page: str) -> str:
    for name, text in blocks().items():
        pattern = rf"(<!-- block: {name} -->\n```\w+\n)(.*?)(```)"
        page, count = re.subn(pattern, lambda m, text=text: f"{m[1]}{text.strip()}\n{m[3]}", page, flags=re.S)
        assert count == 1, f"{PAGE.name} has {count} blocks {name!r}"
    return page


def test_blocks_are_current() -> None:
    page = PAGE.read_text()
    assert page == updated(page), "run python tests/test_rule_readme.py"


def test_plain_program_is_part_of_show() -> None:
    assert textwrap.indent(program(LogSigmoidFunction).source, "    ").rstrip() in manualgrad.show("logsigmoid")


def test_every_option_is_listed() -> None:
    options = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.M)
    methods = re.findall(r"^\| method `(\w+)` \|", PAGE.read_text(), re.M)
    assert sorted(options) == sorted(_OPTIONS)
    assert {*methods, "forward"} == {*_METHODS}


def test_error_in_a_formula_has_the_note() -> None:
    source = """class MyFunction(Rule):
    def forward(input: Tensor): return input * 2
    def grad_input(grad): return grad @ torch.ones(7)
"""
    scope: dict[str, Any] = {"Rule": Rule, "Tensor": Tensor, "torch": torch, "__name__": "my_rules"}
    exec(compile(source, "my_rules.py", "exec"), scope)
    with pytest.raises(RuntimeError) as caught:
        scope["MyFunction"].apply(torch.ones(3, requires_grad=True)).sum().backward()
    assert 'in the formula MyFunction.grad_input (file "my_rules.py", line 3)' in caught.value.__notes__


def test_links() -> None:
    for target in re.findall(r"\]\(([^)h][^)]*)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
