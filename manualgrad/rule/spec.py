"""What a rule declares, read from its class and checked when the class is defined."""

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

OUTPUT_SHAPE = "output_shape_"
"""The name of a tensor that forward mode saves to know the shape of ``grad``: a zero, expanded to the shape of
the output. If the output itself were saved, autograd would refuse later in-place writes into it."""

_OPTIONS = (
    "statistics",
    "autocast",
    "upcast_gradients",
    "supports_complex",
    "save_instead",
    "recomputable",
    "vendor_kernels",
    "preserve_memory_format",
)
_METHODS = ("forward", "forward_", "recompute", "batch_dims")
_DEVICES = ("cpu", "cuda")
_POLICIES = ("lower_precision", "float32", "promote", "banned")
_LAYOUT_ATTRIBUTES = ("is_cpu", "is_cuda", "device", "numel", "element_size", "is_contiguous", "data_ptr")


@dataclass(frozen=True)
class RuleSpec:
    """The declaration of a rule.

    Raises:
        TypeError: the class is inconsistent. The message names the method and its line.
    """

    rule: type[Any]
    base: type[Any]
    """`Rule` itself."""

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.rule.forward).parameters

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The parameters of ``forward``: tensors and settings."""
        return tuple(self.parameters)

    @cached_property
    def values(self) -> tuple[str, ...]:
        """Everything that is known after the forward: inputs, output, statistics."""
        return (*self.inputs, "output", *self.rule.statistics)

    @cached_property
    def settings(self) -> frozenset[str]:
        """The inputs that are not annotated as a Tensor."""
        hints = typing.get_type_hints(self.rule.forward)
        return frozenset(name for name in self.inputs if not _is_tensor(hints[name]))

    @cached_property
    def formulas(self) -> dict[str, Formula]:
        """The methods of the rule, also inherited ones, except ``forward``, ``forward_`` and generated ones."""
        excluded = {*dir(self.base), *self.base.__annotations__}
        methods = {name: getattr(self.rule, name) for name in dir(self.rule) if name not in excluded}
        return {
            name: Formula.from_function(name, method)
            for name, method in methods.items()
            if inspect.isfunction(method)
        }

    @cached_property
    def gradients(self) -> tuple[str, ...]:
        """``grad_x`` for each input ``x``, with or without a formula."""
        return tuple(f"grad_{name}" for name in self.inputs)

    @cached_property
    def available(self) -> frozenset[str]:
        """What a backward need not compute: what is known after the forward, and ``grad``."""
        return frozenset((*self.values, "grad"))

    @cached_property
    def differentiable_statistics(self) -> frozenset[str]:
        """Statistics with a formula of the same name, which computes them from the inputs."""
        return frozenset(self.rule.statistics) & frozenset(self.formulas)

    @cached_property
    def available_when_differentiated(self) -> frozenset[str]:
        """`available` in a backward that is differentiated, which computes `differentiable_statistics`."""
        return self.available - self.differentiable_statistics

    def formulas_for(self, targets: Iterable[str], available: frozenset[str]) -> list[Formula]:
        """The formulas that compute the targets from the available quantities, in order."""
        return topological_order(self.formulas, targets, available)

    def check(self) -> None:
        self._check_attributes()
        self._check_forward()
        self._check_options()
        for name, formula in self.formulas.items():
            self._check_formula(name, formula)
        self._check_unused_methods()
        if not any(name in self.formulas for name in self.gradients):
            raise TypeError(f"{self.rule.__name__} has no gradient: define grad_{self.inputs[0]}, for example")
        if self.rule.__module__.startswith("manualgrad.ops."):
            return  # a test reads these formulas: parsing all files at import takes longer than the rest of it
        for formula in self.formulas.values():
            for line, problem in impurities(formula.tree, ["writes"]):
                raise TypeError(
                    f"{formula.location(line)}: a formula computes new tensors, but this one {problem}"
                )

    def _check_attributes(self) -> None:
        """Every attribute is a method, a property, None, an option, or annotated by its class."""
        classes = self.rule.__mro__[: self.rule.__mro__.index(self.base)]
        allowed = {*_OPTIONS, "function", "implementation"}
        allowed |= {name for cls in classes for name in inspect.get_annotations(cls)}
        for cls in classes:
            for name, value in vars(cls).items():
                is_method = inspect.isroutine(value) or isinstance(value, property)
                if not (name.startswith("_") or name in allowed or is_method or value is None):
                    raise TypeError(
                        f"{cls.__name__}.{name}: a rule has no such option{_suggestion(name, _OPTIONS)}"
                    )

    def _check_options(self) -> None:
        name = self.rule.__name__
        for option in ("save_instead", "vendor_kernels", "preserve_memory_format"):
            names = getattr(self.rule, option)
            if option == "vendor_kernels":
                names = [name for key in names for name in key]
            for method in names:
                if method not in self.formulas:
                    suggestion = _suggestion(method, self.formulas)
                    raise TypeError(f"{name}.{option}: there is no method {method!r}{suggestion}")
        for device, policy in self.rule.autocast.items():
            if device not in _DEVICES or policy not in _POLICIES:
                raise TypeError(
                    f"{name}.autocast: {{{device!r}: {policy!r}}} is not a device "
                    f"({', '.join(_DEVICES)}) with a policy ({', '.join(_POLICIES)})"
                )

    def _check_forward(self) -> None:
        name = self.rule.__name__
        for parameter in self.parameters.values():
            if parameter.annotation is inspect.Parameter.empty:
                raise TypeError(
                    f"{name}.forward: annotate {parameter.name!r} (a Tensor, or the type of a setting)"
                )
        if hasattr(self.rule, "forward_") and self._defining_class("forward_") is not self._defining_class(
            "forward"
        ):
            raise TypeError(f"{name}: define forward_ in the class that defines forward, so that both agree")

    def _defining_class(self, name: str) -> type:
        return next(cls for cls in self.rule.__mro__ if name in vars(cls))

    def _check_formula(self, name: str, formula: Formula) -> None:
        target = name.removeprefix("grad_")
        if name.startswith("grad_") and target not in self.inputs:
            raise TypeError(
                f"{formula.location()}: forward has no input {target!r}{_suggestion(target, self.inputs)}"
            )
        known = {*self.available, *self.formulas}
        for parameter in formula.parameters:
            if parameter not in known:
                raise TypeError(
                    f"{formula.location()}: parameter {parameter!r} is no input, output, statistic, grad or method"
                    f"{_suggestion(parameter, known)}"
                )
        try:
            self.formulas_for([name], self.available)
        except TypeError as error:
            raise TypeError(f"{formula.location()}: {error}") from None

    def _check_unused_methods(self) -> None:
        """A gradient, an option or a statistic uses every method that this class defines. (Not every inherited
        one: a base class may define methods that only some of its subclasses use.)"""
        roots = [name for name in (*self.gradients, *_METHODS, *self.rule.save_instead) if name in self.formulas]
        used = [
            *self.formulas_for(roots, self.available),
            *self.formulas_for(self.differentiable_statistics, self.available_when_differentiated),
        ]
        unused = vars(self.rule).keys() & self.formulas.keys() - {formula.target for formula in used}
        for name in vars(self.rule):
            if name in unused:
                suggestion = _suggestion(name, {*self.gradients, *_METHODS})
                raise TypeError(f"{self.formulas[name].location()}: no gradient uses it{suggestion}")


def derivation(rule: type[Any]) -> str:
    """The docstring of a rule, and those of the base classes that define one of its formulas."""
    base = rule.implementation.spec.base
    texts = []
    for cls in rule.__mro__[: rule.__mro__.index(base)]:
        methods = [name for name, value in vars(cls).items() if isinstance(value, staticmethod)]
        formulas = {*methods} - {"forward", "batch_dims", "recompute"}
        defines_formula = any(getattr(rule, name) is getattr(cls, name) for name in formulas)  # not overridden
        if (cls is rule or defines_formula) and cls.__doc__:
            texts.append(inspect.cleandoc(cls.__doc__))
    return "\n\n".join(texts)


def _is_tensor(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, Tensor):
        return True
    return any(_is_tensor(x) for x in typing.get_args(hint))


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {close[0]!r}?" if close else ""


# --- impurities ---


def impurities(
    tree: ast.FunctionDef | None, kinds: Iterable[str] = ("writes", "branches")
) -> list[tuple[int, str]]:
    """What a function does besides mathematics: the line and a description of each.

    Args:
        kinds: "writes" finds in-place operations, ``out=``, augmented and indexed assignments. "branches" finds
            conditions on the device, the size or the memory layout of a tensor.
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
        if "branches" in kinds:
            match node:
                case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                    for x in ast.walk(test):
                        if isinstance(x, ast.Attribute) and x.attr in _LAYOUT_ATTRIBUTES:
                            found.append((node.lineno, f"branches on {x.attr}"))
    return found
