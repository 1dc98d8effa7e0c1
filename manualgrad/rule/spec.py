"""What a rule declares, read from its class and checked when the class is made."""

from __future__ import annotations

import ast
import difflib
import inspect
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from manualgrad.rule.formulas import Formula, topological_order

SHAPE_OF_OUTPUT = "shape_of_output_"
"""What forward mode saves for the output's shape: zeros that are one number in memory. (If the output itself were
saved, nobody could write into it.)"""

_OPTIONS = (
    *("statistics", "autocast", "upcast_gradients", "supports_complex", "save_instead", "recomputable"),
    *("vendor_kernels", "format_of_grad"),
)
_METHODS = ("forward", "forward_", "recompute", "batch_dims")
_DEVICES = ("cpu", "cuda")
_POLICIES = ("lower", "float32", "promote", "refuse")


@dataclass(frozen=True)
class Spec:
    """The declaration of a rule.

    Raises:
        TypeError: the class does not hold together. The message says which method, and where it is.
    """

    rule: type[Any]
    base: type[Any]
    """`Rule` itself."""

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.rule.forward).parameters

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """What ``forward`` takes: tensors and settings."""
        return tuple(self.parameters)

    @cached_property
    def values(self) -> tuple[str, ...]:
        """What is known after the forward."""
        return (*self.inputs, "output", *self.rule.statistics)

    @cached_property
    def settings(self) -> frozenset[str]:
        """The inputs that are no tensors, by their annotations."""
        hints = typing.get_type_hints(self.rule.forward)
        return frozenset(name for name in self.inputs if not _is_tensor(hints[name]))

    @cached_property
    def formulas(self) -> dict[str, Formula]:
        """The methods of the rule, its own and inherited, except ``forward`` and ``forward_``."""
        methods = {name: getattr(self.rule, name) for name in dir(self.rule) if not hasattr(self.base, name)}
        return {
            name: Formula.of(name, method)
            for name, method in methods.items()
            if inspect.isfunction(method) and name not in self.base.__annotations__
        }

    @cached_property
    def gradients(self) -> tuple[str, ...]:
        return tuple(f"grad_{name}" for name in self.inputs)

    @cached_property
    def given(self) -> frozenset[str]:
        """What no formula needs to compute."""
        return frozenset((*self.values, "grad"))

    @cached_property
    def moving(self) -> frozenset[str]:
        """Statistics that are functions of the inputs: a formula of the same name computes them."""
        return frozenset(self.rule.statistics) & frozenset(self.formulas)

    def order(self, targets: Iterable[str], given: frozenset[str]) -> list[Formula]:
        return topological_order(self.formulas, targets, given)

    def check(self) -> None:
        self._check_attributes()
        self._check_forward()
        for name, formula in self.formulas.items():
            self._check_formula(name, formula)
        self._check_use()
        for formula in self.formulas.values():
            for line, what in impurities(formula.tree, ["writes"]):
                raise TypeError(f"{formula.place(line)}: a formula computes new tensors, but this one {what}")

    def _check_attributes(self) -> None:
        classes = self.rule.__mro__[: self.rule.__mro__.index(self.base)]
        annotated = {name for cls in classes for name in inspect.get_annotations(cls)}
        for cls in classes:
            for name, value in vars(cls).items():
                if name.startswith("_") or name in annotated or inspect.isroutine(value) or value is None:
                    continue
                if name not in (*_OPTIONS, "function", "implementation") and not isinstance(
                    value, staticmethod | property
                ):
                    raise TypeError(
                        f"{cls.__name__}.{name}: a rule has no such option{_suggestion(name, _OPTIONS)}"
                    )
        for device, policy in self.rule.autocast.items():
            if device not in _DEVICES or policy not in _POLICIES:
                raise TypeError(
                    f"{self.rule.__name__}.autocast: for a device ({', '.join(_DEVICES)}) one of "
                    f"{', '.join(_POLICIES)}, but it is {{{device!r}: {policy!r}}}"
                )

    def _check_forward(self) -> None:
        name = self.rule.__name__
        for parameter in self.parameters.values():
            if parameter.annotation is inspect.Parameter.empty:
                raise TypeError(
                    f"{name}.forward: annotate {parameter.name!r} (a Tensor, or the type of a setting)"
                )
        if hasattr(self.rule, "forward_") and self._definer("forward_") is not self._definer("forward"):
            raise TypeError(f"{name}: define forward_ where forward is defined, so that both compute the same")
        for option in ("save_instead", "vendor_kernels", "format_of_grad"):
            for method in getattr(self.rule, option):
                if method not in self.formulas:
                    suggestion = _suggestion(method, self.formulas)
                    raise TypeError(f"{name}.{option} names {method!r}, which is no method{suggestion}")

    def _definer(self, name: str) -> type:
        return next(cls for cls in self.rule.__mro__ if name in vars(cls))

    def _check_formula(self, name: str, formula: Formula) -> None:
        target = name.removeprefix("grad_")
        if name.startswith("grad_") and target not in self.inputs:
            raise TypeError(
                f"{formula.place()}: forward has no input {target!r}{_suggestion(target, self.inputs)}"
            )
        known = {*self.given, *self.formulas}
        for needed in formula.names:
            if needed not in known:
                raise TypeError(
                    f"{formula.place()} asks for {needed!r}, which is no input, output, statistic or method"
                    f"{_suggestion(needed, known)}"
                )
        try:
            self.order([name], self.given)
        except TypeError as error:
            raise TypeError(f"{formula.place()}: {error}") from None

    def _check_use(self) -> None:
        """Each method that the class itself has is part of a gradient."""
        roots = [name for name in (*self.gradients, *_METHODS, *self.rule.save_instead) if name in self.formulas]
        used = {formula.target for formula in self.order(roots, self.given)} | self.moving
        used |= {formula.target for formula in self.order(self.moving, self.given - self.moving)}
        for name, method in vars(self.rule).items():
            if name in self.formulas and name not in used and isinstance(method, staticmethod):
                names = {*self.gradients, *_METHODS}
                raise TypeError(f"{self.formulas[name].place()}: no gradient names it{_suggestion(name, names)}")
        if not any(name in self.formulas for name in self.gradients):
            raise TypeError(f"{self.rule.__name__} has no gradient: define grad_{self.inputs[0]}, for example")


def _is_tensor(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, Tensor):
        return True
    return any(_is_tensor(x) for x in typing.get_args(hint))


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {close[0]!r}?" if close else ""


# --- what a formula may not do ---


def impurities(tree: ast.FunctionDef | None, kinds: Iterable[str] = ("writes", "tests")) -> list[tuple[int, str]]:
    """What a function does besides mathematics, each with its line.

    It "writes" by an operation in place, by ``out=`` or by an augmented assignment, or "tests" the device or the
    size of a tensor.
    """
    found: list[tuple[int, str]] = []
    for node in () if tree is None else ast.walk(tree):
        if "writes" in kinds:
            match node:
                case ast.Call(ast.Attribute(_, name)) if name.endswith("_") and not name.startswith("_"):
                    found.append((node.lineno, f"calls {name}, which writes into a tensor"))
                case ast.Call(keywords=keywords) if any(x.arg == "out" for x in keywords):
                    found.append((node.lineno, "passes out=, which writes into a tensor"))
                case ast.AugAssign():
                    found.append((node.lineno, "has an augmented assignment, which may write into a tensor"))
                case ast.Assign(targets=targets) if any(isinstance(x, ast.Subscript) for x in targets):
                    found.append((node.lineno, "assigns to an index, which writes into a tensor"))
        if "tests" in kinds:
            match node:
                case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                    for x in ast.walk(test):
                        if isinstance(x, ast.Attribute) and x.attr in _TESTED:
                            found.append((node.lineno, f"depends on {x.attr}"))
    return found


_TESTED = frozenset(["is_cpu", "is_cuda", "device", "numel", "element_size", "is_contiguous", "data_ptr"])
