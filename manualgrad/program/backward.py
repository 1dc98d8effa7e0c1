"""The backward of a captured model, by the chain rule: the formulas of its rules, last step first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from manualgrad.program.blocks import BlockCall
from manualgrad.program.capture import Step, record_rules
from manualgrad.program.capture import identifier as _identifier
from manualgrad.program.trace import Call, Trace, Variable, variables
from manualgrad.rule.formulas import Formula
from manualgrad.rule.function import LOW_PRECISION


class Section:
    """The lines of the backward of one step or block."""

    def __init__(self, item: Step | BlockCall, calls: list[Call]) -> None:
        self.item, self.calls = item, calls


class BlockFunction:
    """The forward or the backward of a unit, as the function of a `Call`."""

    def __init__(self, block: BlockCall, direction: str) -> None:
        self.block, self.direction = block, direction
        self.__name__ = f"{block.unit.name}_{direction}"


class Backward:
    """Derives the gradients of some variables from those of the outputs.

    Attributes:
        sections: the calls, in their order.
        gradients: by variable.
    """

    def __init__(self, trace: Trace, items: Sequence[Step | BlockCall], outputs: Iterable[Variable]) -> None:
        self.trace = trace
        self.saved_by_block: dict[BlockCall, Variable] = {}
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
            for item in reversed(items):
                if isinstance(item, BlockCall):
                    if any(x in self.gradients for x in item.outputs):
                        self._add_block(item)
                elif item.needed and item.output in self.gradients:
                    self._add_section(item)

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

    def _add_block(self, block: BlockCall) -> None:
        self.trace.calls = []
        outputs = [x for x in block.outputs if x.needs_grad]
        example = next(self.gradients[x] for x in outputs if x in self.gradients)
        grads = []
        for output in outputs:
            if output not in self.gradients:
                with self.trace:
                    zeros = example.tensor.new_zeros(tuple(output.tensor.shape))
                self.gradients[output] = self.trace.replace(zeros)
            grads.append(self.gradients[output])
        saved = self.saved_by_block[block] = Variable(f"saved_{_identifier(block.path)}", torch.empty(()))
        inputs = [x for x in block.inputs if x.needs_grad]
        results = [self.trace.add(Variable(f"grad_{x.name}", torch.empty_like(x.tensor))) for x in inputs]
        self.trace.calls.append(Call(BlockFunction(block, "backward"), (saved, *grads), {}, tuple(results)))
        for variable, gradient in zip(inputs, results, strict=True):
            self._accumulate(variable, gradient.tensor)
        self.sections.append(Section(block, self.trace.calls))

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
