"""The gradient of an operation as text: ``python -m manualgrad show layer_norm``, or `show(nn.LayerNorm)`."""

from __future__ import annotations

import difflib
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manualgrad import coverage, nn
from manualgrad.registry import Op, TensorFactory, ops
from manualgrad.rule import Rule, derivation, saved_values
from manualgrad.rule.formulas import wrap_source
from manualgrad.standalone import standalone_source
from manualgrad.verification import LAWS

_WIDTH = 100
_PACKAGE = Path(__file__).parent


def show(target: Any, *, standalone: bool = False) -> str:
    """The derivation and the generated backward of an operation.

    Args:
        target: the name of a function or module of torch.nn ("layer_norm", "LayerNorm"), a module, a module class
            or a function of manualgrad or torch, or a `Rule`.
        standalone: return a Python file that imports only torch: plain `torch.autograd.Function`s with the
            derivations as docstrings, and a function with torch's signature.

    Returns:
        For each rule of the operation: the derivation, the formulas, the saved tensors of each gradient, the
        generated backward, and the file. Then the laws that the operation passes, and its expected failures with
        their reasons.

    Raises:
        ValueError: there is no such operation. The message suggests a name.
    """
    if isinstance(target, type) and issubclass(target, Rule) and not standalone:
        return describe_rule(target)
    operations = find_operations(target)
    if standalone:
        if len(operations) > 1:
            names = ", ".join(op.name for op in operations)
            raise ValueError(f"{target} calls several operations: show one of {names}")
        return standalone_source(operations[0])
    return "\n\n\n".join(map(describe_operation, operations))


def list_operations() -> str:
    """All operations, one per line, with the modules that call them."""
    table = {name: ", ".join(coverage.modules_calling(op)) for name, op in ops().items()}
    width = max(map(len, table))
    return "\n".join(f"{name:{width}}  {modules}".rstrip() for name, modules in table.items())


# --- find operations and rules ---


def find_operations(target: Any) -> list[Op]:
    """The operations of a name, a function, a module or a module class."""
    table = ops()
    if isinstance(target, torch.nn.Module):
        target = type(target)
    if isinstance(target, type):
        if issubclass(target, torch.nn.Module) and (called := _operations_called_by(target)):
            return called
        raise _unknown_operation(target.__name__)
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if name in table:
        return [table[name]]
    module = getattr(nn, name, None) or getattr(torch.nn, name, None)
    if isinstance(module, type):
        return find_operations(module)
    raise _unknown_operation(name)


def _operations_called_by(module: type[torch.nn.Module]) -> list[Op]:
    names = coverage.called_functions(getattr(nn, module.__name__, module))
    return [op for name, op in ops().items() if name in names]


def _unknown_operation(name: str) -> ValueError:
    known = [*ops(), *(name for name, value in vars(nn).items() if isinstance(value, type))]
    close = difflib.get_close_matches(name, known, 1, 0.5)
    suggestion = f": did you mean {close[0]!r}?" if close else "; `python -m manualgrad show` lists all"
    return ValueError(f"there is no operation {name!r}{suggestion}")


def find_rules(op: Op) -> list[type[Rule]]:
    """The rules that the samples of an operation use, in the order of the forward."""
    found: dict[type[Rule], None] = {}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        for sample in op.sample_inputs(TensorFactory()):
            args, kwargs = sample.with_requires_grad()
            found |= dict.fromkeys(_rules_in_graph(op.function(*args, **kwargs)))
    return list(found)


def _rules_in_graph(outputs: Any) -> list[type[Rule]]:
    tensors = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    waiting = [x.grad_fn for x in tensors if isinstance(x, Tensor)]
    seen: dict[Any, None] = {}
    while waiting:
        node = waiting.pop(0)
        if node is not None and node not in seen:
            seen[node] = None
            waiting += [next_node for next_node, _ in node.next_functions]
    saved = [saved_values(node) for node in reversed(seen)]
    return [found[0] for found in saved if found is not None]


# --- the text ---


def describe_operation(op: Op) -> str:
    modules = coverage.modules_calling(op)
    title = op.name + (f", called by {', '.join(modules)}" if modules else "")
    parts = [title, "=" * len(title), *(f"\n{describe_rule(rule)}" for rule in find_rules(op)), "", _laws(op)]
    return "\n".join(parts)


def describe_rule(rule: type[Rule]) -> str:
    """The derivation, the formulas and the generated backward of a rule."""
    spec = rule.implementation.spec
    gradients = [name for name in spec.gradients if name in spec.formulas]
    plan = rule.implementation.plan(tuple(name in gradients for name in spec.gradients))
    file, line = inspect.getsourcefile(rule), inspect.getsourcelines(rule)[1]
    formulas = spec.formulas_for([*rule.save_instead, *gradients], spec.available_when_differentiated)
    functions = [rule.forward, *(formula.function for formula in formulas)]
    parts = [
        f"{rule.__name__}      {_relative_path(file)}, line {line}",
        *_section("Derivation", derivation(rule)),
        *_section("Formulas", "\n\n".join(map(_source, functions))),
        *_section("Saved for backward", _saved_tensors(rule, gradients)),
        *_section("Generated backward, if all gradients are needed", wrap_source(plan.program().source)),
    ]
    return "\n".join(parts)


def _section(title: str, text: str) -> list[str]:
    return ["", f"{title}:", "", textwrap.indent(text.strip("\n"), "    ")]


def _relative_path(file: str | None) -> str:
    path = Path(file or "?")
    return str(path.relative_to(_PACKAGE.parent)) if path.is_relative_to(_PACKAGE) else str(path)


def _source(function: Callable[..., Any]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function)).rstrip()
    except OSError:
        return f"{function.__qualname__}: no source"


def _saved_tensors(rule: type[Rule], gradients: Iterable[str]) -> str:
    """The tensors that each gradient saves if only that gradient is needed."""
    implementation = rule.implementation
    lines = []
    for gradient in gradients:
        needed = tuple(name == gradient for name in implementation.spec.gradients)
        plan = implementation.plan(needed, False, True)
        settings = implementation.spec.settings
        names = [name for name in plan.names if name not in settings]
        lines.append(f"{gradient}: {', '.join(names) or 'no tensor'}")
    return "\n".join(lines)


def _laws(op: Op) -> str:
    failing = {law for law in LAWS if any(key == law or key.startswith(f"{law}-") for key in op.expected_failures)}
    passing = ", ".join(law for law in LAWS if law not in failing)
    samples = len([*op.sample_inputs(TensorFactory())])
    text = "\n".join(textwrap.wrap(f"Laws that hold on all {samples} samples: {passing}.", _WIDTH))
    if op.expected_failures:
        reasons = "\n".join(f"    {law}: {reason}" for law, reason in op.expected_failures.items())
        text += f"\nExpected failures:\n{reasons}"
    return text
