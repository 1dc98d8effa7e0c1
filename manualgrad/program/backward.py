"""The backward of a captured model, by the chain rule: the formulas of its rules, last step first."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from manualgrad.program.blocks import BlockCall
from manualgrad.program.capture import Step, record_rules
from manualgrad.program.capture import identifier as _identifier
from manualgrad.program.trace import Call, Trace, Variable, function_name, variables
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

    def __init__(
        self,
        trace: Trace,
        items: Sequence[Step | BlockCall],
        outputs: Iterable[Variable],
        vendor_kernels: bool = False,
        differentiable: bool = False,
    ) -> None:
        self.differentiable = differentiable
        self.vendor_kernels = vendor_kernels
        self.trace = trace
        self.saved_by_block: dict[BlockCall, Variable] = {}
        self.sections: list[Section] = []
        self.gradients: dict[Variable, Variable] = {}
        self.output_gradients: dict[Variable, Variable] = {}
        self.items = items
        self._parts: dict[Variable, list[Part]] = {}
        self.history: dict[Variable, Variable] = {}
        """By each gradient that was computed, also those to which another was added later: its variable."""
        for output in outputs:
            if output.needs_grad and output not in self.gradients:
                grad = trace.add(Variable(f"grad_{output.name}", torch.empty_like(output.tensor)))
                grad.is_named = True
                self.gradients[output] = self.output_gradients[output] = grad
        with record_rules(lambda rule, args: rule.forward(*args)), torch.no_grad():
            for item in reversed(items):
                for output in item.outputs if isinstance(item, BlockCall) else [item.output]:
                    self._join_parts(output)
                if isinstance(item, BlockCall):
                    if any(x in self.gradients for x in item.outputs):
                        self._add_block(item)
                elif item.needed and item.output in self.gradients:
                    self._add_section(item)
            for variable in [*self._parts]:
                self._join_parts(variable)

    def _add_section(self, step: Step) -> None:
        assert step.rule is not None
        assert step.output is not None
        spec = step.rule.implementation.spec
        targets = [f"grad_{name}" for name in step.needed]
        values = {**step.inputs, "output": step.output, **step.statistics, "grad": self.gradients[step.output]}
        self.trace.calls = []
        tensors = pytree.tree_map_only(Variable, lambda x: x.tensor, values)
        available = spec.available_when_differentiated if self.differentiable else spec.available
        for name in spec.available - available:
            del values[name], tensors[name]
        formulas = spec.formulas_for(targets, available)
        in_float32 = step.rule.upcast_gradients and step.output.tensor.dtype in LOW_PRECISION
        if in_float32:
            tensors = {name: self._upcast(value) for name, value in tensors.items()}
        tensors |= self._by_vendor_kernel(step, targets, tensors)
        if not tensors.keys() >= set(targets):
            formulas = spec.formulas_for(targets, available | tensors.keys())
        for formula in formulas:
            if formula.target not in tensors:
                tensors[formula.target] = self._compute(step, formula, tensors)
        for name, target in zip(step.needed, targets, strict=True):
            variable = step.inputs[name]
            gradient = tensors[target]
            if in_float32:
                with self.trace:
                    gradient = gradient.to(variable.tensor.dtype)
            if not self._add_part(variable, gradient, step):
                self._accumulate(variable, gradient)
        self.sections.append(Section(step, self.trace.calls))

    def _by_vendor_kernel(self, step: Step, targets: list[str], tensors: dict[str, Any]) -> dict[str, Any]:
        """Some of the gradients, by a vendor kernel of the rule."""
        if not self.vendor_kernels or step.rule is None:
            return {}
        for names, kernel in step.rule.vendor_kernels.items():
            if set(names) <= set(targets):
                with self.trace:
                    found = kernel(*(tensors[x] for x in inspect.signature(kernel).parameters))
                if found is not None:
                    return dict(zip(names, found if len(names) > 1 else [found], strict=True))
        return {}

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
            found.name, found.is_named = name, variable.is_named or variable.path is not None
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

    # --- gradients of parts ---

    def _add_part(self, variable: Variable, gradient: Tensor, step: Step) -> bool:
        """Keep the gradient of a part of a variable until those of the other parts are known."""
        calls = self.trace.calls
        if len(calls) < 2 or calls[-1].outputs is not self.trace.find(gradient):
            return False
        scatter, zeros = calls[-1], calls[-2]
        if function_name(zeros.function) != "new_zeros" or scatter.args[:1] != (zeros.outputs,):
            return False
        match function_name(scatter.function), scatter.args:
            case "select_scatter", (_, grad, int(axis), int(index)):
                part = Part(step, grad, axis % variable.tensor.dim(), index, None, [zeros, scatter])
            case "slice_scatter", (_, grad, int(axis), int(start), int(end), *rest) if rest in ([], [1]):
                part = Part(step, grad, axis % variable.tensor.dim(), start, end, [zeros, scatter])
            case _:
                return False
        del calls[-2:]
        self._parts.setdefault(variable, []).append(part)
        return True

    def _join_parts(self, variable: Variable | None) -> None:
        """The gradient of a variable from those of its parts: joined if the parts are the whole."""
        if variable is None or variable not in self._parts:
            return
        parts = sorted(self._parts.pop(variable), key=lambda x: x.start)
        self.trace.calls = []
        if _cover(parts, variable):
            join = torch.stack if parts[0].end is None else torch.cat
            with self.trace:
                found = join([x.grad.tensor for x in parts], parts[0].axis)
            self._accumulate(variable, found)
        else:
            for part in parts:
                self.trace.calls += part.calls
                self._accumulate(variable, part.calls[-1].outputs.tensor)
        self.sections.append(Section(parts[0].step, self.trace.calls))

    # --- what is saved ---

    def find_saved(self, available: set[Variable]) -> list[Variable]:
        """What the calls read, but neither make nor find in `available`."""
        calls = [call for section in self.sections for call in section.calls]
        given = {*(x for call in calls for x in call.writes), *self.output_gradients.values(), *available}
        return [x for x in dict.fromkeys(x for call in calls for x in call.reads) if x not in given]

    def recompute(self, available: set[Variable], min_elements: int) -> None:
        """Compute large saved tensors again, from others that are saved, where one pass over memory is enough."""
        steps = {x.output: x for x in self.items if isinstance(x, Step) and x.rule is not None}
        saved = set(self.find_saved(available))
        for variable in [x for x in reversed(steps) if x in saved]:
            assert variable is not None
            if variable.tensor.numel() < min_elements:
                continue
            calls = self._recomputation(variable, steps, {*saved, *available} - {variable}, _MAX_DEPTH)
            if calls is not None:
                saved.discard(variable)
                first = next(x for x in self.sections if any(variable in call.reads for call in x.calls))
                first.calls[:0] = calls

    def _recomputation(
        self, variable: Variable, steps: dict[Variable | None, Step], known: set[Variable], depth: int
    ) -> list[Call] | None:
        """The calls that compute a variable from known ones. None if that is impossible or not cheap."""
        step = steps.get(variable)
        if step is None or step.rule is None or depth == 0:
            return None
        formula = step.rule.implementation.spec.formulas.get("recompute")
        if not step.rule.recomputable and formula is None:
            return None
        values = {**step.inputs, **step.statistics}
        if formula is not None:
            inputs = [x for name in formula.parameters for x in variables(values[name])]
        else:
            inputs = variables(step.inputs)
        calls: list[Call] = []
        for x in dict.fromkeys(inputs):
            if x not in known:
                found = self._recomputation(x, steps, known, depth - 1)
                if found is None:
                    return None
                calls += found
        if formula is None:
            return [*calls, *(self._with_outputs(call, variable) for call in step.calls)]
        tensors = pytree.tree_map_only(Variable, lambda x: x.tensor, values)
        self.trace.calls = []
        self._compute(step, formula, tensors)
        last = self.trace.calls[-1]
        self.trace.calls[-1] = Call(last.function, last.args, last.kwargs, variable)
        return [*calls, *self.trace.calls]

    def _with_outputs(self, call: Call, variable: Variable) -> Call:
        """The call, with new variables for all outputs but this one."""
        if isinstance(call.outputs, Variable):
            return call
        outputs = pytree.tree_map_only(Variable, lambda x: x if x is variable else None, call.outputs)
        return Call(call.function, call.args, call.kwargs, outputs)


@dataclass
class Part:
    """The gradient of a slice of a variable, or with ``end`` None of one index along an axis."""

    step: Step
    grad: Variable
    axis: int
    start: int
    end: int | None
    calls: list[Call]
    """They write it into a tensor of zeros."""


def _cover(parts: Sequence[Part], variable: Variable) -> bool:
    """Each element of the variable is in one of the parts."""
    axis, size = parts[0].axis, variable.tensor.shape[parts[0].axis]
    if len(parts) < 2 or any(x.axis != axis or (x.end is None) != (parts[0].end is None) for x in parts):
        return False
    ends = [x.start + 1 if x.end is None else x.end for x in parts]
    return [x.start for x in parts] == [0, *ends[:-1]] and ends[-1] == size


_MAX_DEPTH = 3
"""The number of steps that a recomputation may run one after the other, as in `manualgrad.recomputation`."""
