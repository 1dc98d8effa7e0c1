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
from manualgrad.rule import Rule, saved_by
from manualgrad.verification import LAWS

WIDTH = 100
_ROOT = Path(__file__).parent


def show(thing: Any, *, standalone: bool = False) -> str:
    """How the gradient of an operation is derived and computed.

    Args:
        thing: the name of a function or a module of torch.nn ("layer_norm", "LayerNorm"), such a module, its class
            or the function itself, ours or torch's, or a `Rule`.
        standalone: the operation as a Python file that imports only torch: plain `torch.autograd.Function`s with
            the derivation as their text, and a function of torch's signature.

    Returns:
        For each rule that the operation uses: the derivation, the forward, the gradients as written, what is saved
        for each gradient, the program of the backward that is generated from them, and the file. Then the laws
        that the operation holds, and those that it lacks with the reason.

    Raises:
        ValueError: no operation is found. The message suggests a name.
    """
    if isinstance(thing, type) and issubclass(thing, Rule) and not standalone:
        return of_rule(thing)
    found = operations_of(thing)
    if standalone:
        from manualgrad.standalone import standalone as file_of  # which imports this

        if len(found) > 1:
            names = ", ".join(op.name for op in found)
            raise ValueError(f"{thing} calls several operations: show one of {names}")
        return file_of(found[0])
    return "\n\n\n".join(map(of_operation, found))


def catalog() -> str:
    """All operations, a line each, with the modules that call them."""
    table = {name: ", ".join(coverage.modules_of(op)) for name, op in ops().items()}
    width = max(map(len, table))
    return "\n".join(f"{name:{width}}  {modules}".rstrip() for name, modules in table.items())


# --- what is asked for ---


def operations_of(thing: Any) -> list[Op]:
    """The operations that a name, a function, a module or its class uses."""
    table = ops()
    if isinstance(thing, torch.nn.Module):
        thing = type(thing)
    if isinstance(thing, type):
        if issubclass(thing, torch.nn.Module) and (called := _called_by(thing)):
            return called
        raise _unknown(thing.__name__)
    name = thing if isinstance(thing, str) else getattr(thing, "__name__", str(thing))
    if name in table:
        return [table[name]]
    module = getattr(nn, name, None) or getattr(torch.nn, name, None)
    if isinstance(module, type):
        return operations_of(module)
    raise _unknown(name)


def _called_by(module: type[torch.nn.Module]) -> list[Op]:
    names = coverage.called(getattr(nn, module.__name__, module))
    return [op for name, op in ops().items() if name in names]


def _unknown(name: str) -> ValueError:
    known = [*ops(), *(name for name, value in vars(nn).items() if isinstance(value, type))]
    close = difflib.get_close_matches(name, known, 1, 0.5)
    suggestion = f": did you mean {close[0]!r}?" if close else "; `python -m manualgrad show` lists all"
    return ValueError(f"no operation is called {name!r}{suggestion}")


def rules_of(op: Op) -> list[type[Rule]]:
    """The rules that the samples of an operation use, in the order of the forward."""
    found: dict[type[Rule], None] = {}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        for call in op.sample_inputs(TensorFactory()):
            args, kwargs = call.marked()
            outputs = op.function(*args, **kwargs)
            found |= dict.fromkeys(_rules_behind(outputs))
    return list(found)


def _rules_behind(outputs: Any) -> list[type[Rule]]:
    """The rules in the graph of the outputs, the first one first."""
    tensors = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    waiting = [x.grad_fn for x in tensors if isinstance(x, Tensor)]
    seen: dict[Any, None] = {}
    while waiting:
        node = waiting.pop(0)
        if node is not None and node not in seen:
            seen[node] = None
            waiting += [below for below, _ in node.next_functions]
    kept = [saved_by(node) for node in reversed(seen)]
    return [saved[0] for saved in kept if saved is not None]


# --- the text ---


def of_operation(op: Op) -> str:
    modules = coverage.modules_of(op)
    title = op.name + (f", called by {', '.join(modules)}" if modules else "")
    parts = [title, "=" * len(title), *(f"\n{of_rule(rule)}" for rule in rules_of(op)), "", _laws(op)]
    return "\n".join(parts)


def of_rule(rule: type[Rule]) -> str:
    """The derivation, the formulas and the program of one rule."""
    spec = rule.implementation.spec
    gradients = [name for name in spec.gradients if name in spec.formulas]
    plan = rule.implementation.plan(tuple(name in gradients for name in spec.gradients))
    file, line = inspect.getsourcefile(rule), inspect.getsourcelines(rule)[1]
    order = spec.order([*rule.save_instead, *gradients], spec.given - spec.moving)
    functions = [rule.forward, *(formula.function for formula in order)]
    parts = [
        f"{rule.__name__}      {_relative(file)}, line {line}",
        *_section("Derivation", derivation(rule)),
        *_section("As written", "\n\n".join(map(_source, functions))),
        *_section("Saved for the backward", _saved(rule, gradients)),
        *_section("Generated backward, all gradients needed", wrapped(plan.program().source)),
    ]
    return "\n".join(parts)


def _section(title: str, text: str) -> list[str]:
    return ["", f"{title}:", "", textwrap.indent(text.strip("\n"), "    ")]


def _relative(file: str | None) -> str:
    path = Path(file or "?")
    return str(path.relative_to(_ROOT.parent)) if path.is_relative_to(_ROOT) else str(path)


def derivation(rule: type[Rule]) -> str:
    """The docstring of a rule, and of those that it has a formula from."""
    texts = []
    for part in rule.__mro__[: rule.__mro__.index(Rule)]:
        formulas = vars(part).keys() - {"forward", "batch_dims", "recompute"}
        methods = [name for name in formulas if isinstance(vars(part)[name], staticmethod)]
        shared = any(getattr(rule, name) is getattr(part, name) for name in methods)
        if (part is rule or shared) and part.__doc__:
            texts.append(inspect.cleandoc(part.__doc__))
    return "\n\n".join(texts)


def _source(function: Callable[..., Any]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function)).rstrip()
    except OSError:
        return f"{function.__qualname__}: no source"


def _saved(rule: type[Rule], gradients: Iterable[str]) -> str:
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
    lacking = {law for law in LAWS if any(key == law or key.startswith(f"{law}-") for key in op.expected_failures)}
    holds = ", ".join(law for law in LAWS if law not in lacking)
    text = "\n".join(
        textwrap.wrap(f"Laws that hold on {len([*op.sample_inputs(TensorFactory())])} samples: {holds}.", WIDTH)
    )
    if op.expected_failures:
        reasons = "\n".join(f"    {law}: {reason}" for law, reason in op.expected_failures.items())
        text += f"\nWhat it lacks:\n{reasons}"
    return text


def wrapped(source: str) -> str:
    """Lines at most as wide as a page, broken inside brackets."""
    return "\n".join(part for line in source.splitlines() for part in _broken(line))


def _broken(line: str) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    found = []
    while len(line) > WIDTH:
        places = [i + 1 for i in _breaks(line) if len(indent) + 8 < i < WIDTH]
        if not places:
            break
        found.append(line[: places[-1]].rstrip())
        line = f"{indent}        {line[places[-1] :].lstrip()}"
        if len(found) > 50:
            break
    return [*found, line]


def _breaks(line: str) -> list[int]:
    """Where a line may be broken: at a space inside brackets and outside of quotes."""
    found, depth, quote = [], 0, ""
    for i, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
            if character == " " and depth > 0:
                found.append(i)
    return found
