"""The backward of a captured model, by the chain rule: the formulas of its rules, last step first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from manualgrad.program.capture import Step, record_rules
from manualgrad.program.trace import Call, Trace, Variable, variables
from manualgrad.rule.formulas import Formula
from manualgrad.rule.function import LOW_PRECISION


class Section:
    """The lines of the backward of one step."""

    def __init__(self, step: Step, calls: list[Call]) -> None:
        self.step, self.calls = step, calls


class Backward:
    """Derives the gradients of some variables from those of the outputs.

    Attributes:
        sections: the calls, in their order.
        gradients: by variable.
    """

    def __init__(self, trace: Trace, steps: list[Step], outputs: Iterable[Variable]) -> None:
        self.trace = trace
        self.sections: list[Section] = []
        self.gradients: dict[Variable, Variable] = {}
        self.output_gradients: dict[Variable, Variable] = {}
        self.history: dict[Variable, Variable] = {}
        """By each gradient that was computed, also those to which another was added later: its variable."""
        for output in outputs:
            if output.needs_grad and output not in self.gradients:
                grad = trace.add(Variable(f"grad_{output.name}", torch.empty_like(output.tensor)))
                grad.is_named = True
                self.gradients[output] = self.output_gradients[output] = grad
        with record_rules(lambda rule, args: rule.forward(*args)), torch.no_grad():
            for step in reversed(steps):
                if step.needed and step.output in self.gradients:
                    self._add_section(step)

    def _add_section(self, step: Step) -> None:
        assert step.rule is not None and step.output is not None
        spec = step.rule.implementation.spec
        targets = [f"grad_{name}" for name in step.needed]
        values = {**step.inputs, "output": step.output, **step.statistics, "grad": self.gradients[step.output]}
        self.trace.calls = []
        tensors = pytree.tree_map_only(Variable, lambda x: x.tensor, values)
        formulas = spec.formulas_for(targets, spec.available)
        in_float32 = step.rule.upcast_gradients and step.output.tensor.dtype in LOW_PRECISION
        if in_float32:
            tensors = {name: self._upcast(value) for name, value in tensors.items()}
        for formula in formulas:
            tensors[formula.target] = self._compute(step, formula, tensors)
        for name, target in zip(step.needed, targets, strict=True):
            variable = step.inputs[name]
            gradient = tensors[target]
            if in_float32:
                with self.trace:
                    gradient = gradient.to(variable.tensor.dtype)
            self._accumulate(variable, gradient)
        self.sections.append(Section(step, self.trace.calls))

    def _upcast(self, value: Any) -> Any:
        with self.trace:
            return value.float() if isinstance(value, Tensor) and value.dtype in LOW_PRECISION else value

    def _compute(self, step: Step, formula: Formula, tensors: dict[str, Any]) -> Any:
        args = [tensors[name] for name in formula.parameters]
        before = len(self.trace.calls)
        with self.trace:
            value = formula.function(*args)
        if isinstance(value, Tensor):
            variable = self.trace.find(value)
            made_here = variables([call.outputs for call in self.trace.calls[before:]])
            if variable is not None and any(variable is x for x in made_here):
                variable.name = formula.target
        return value

    def _accumulate(self, variable: Variable, gradient: Tensor) -> None:
        name = f"grad_{variable.name}"
        found = self.trace.find(gradient)
        assert found is not None
        if tuple(gradient.shape) != tuple(variable.tensor.shape):
            raise RuntimeError(
                f"the gradient of {variable!r} has the shape {list(gradient.shape)}: this is a bug of the rule"
            )
        if variable not in self.gradients:
            if found in self.gradients.values() or found in variables(list(self.gradients)):
                self.gradients[variable] = found
                return
            found.name, found.is_named = name, True
            self.gradients[variable] = found
            self.history[found] = variable
            return
        with self.trace:
            total = self.gradients[variable].tensor + gradient
        added = self.trace.find(total)
        assert added is not None
        added.name, added.is_named = name, True
        self.gradients[variable] = added
        self.history[added] = variable
