"""The file of a program: ``forward``, ``backward``, ``run``, and the check that runs when the file is a script."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from manualgrad.program.backward import Backward, BlockFunction
from manualgrad.program.blocks import BlockCall, Unit
from manualgrad.program.capture import Graph, Step, is_structural
from manualgrad.program.text import WIDTH, Writer, split_line, wrap
from manualgrad.program.trace import Call, Variable

_SUBSTATE = '''def substate(state, path):
    """The parameters and buffers of the module at this path."""
    return {name.removeprefix(f"{path}."): x for name, x in state.items() if name.startswith(f"{path}.")}'''

_ADD_GRADS = '''def add_grads(grads, path, others):
    """Add the gradients of the module at this path to those of the model."""
    for name, grad in others.items():
        name = f"{path}.{name}"
        grads[name] = grads[name] + grad if name in grads else grad'''

_FLATTEN = '''def flatten(saved):
    """The tensors of nested tuples."""
    return [tensor for x in saved for tensor in (flatten(x) if isinstance(x, tuple) else [x])]


def unflatten(layout, tensors):
    """Nested tuples like `layout`, of the tensors that the iterator gives."""
    return tuple(unflatten(x, tensors) if isinstance(x, tuple) else next(tensors) for x in layout)


def without_tensors(saved):
    return tuple(without_tensors(x) if isinstance(x, tuple) else None for x in saved)'''

_RUN = '''class Run(torch.autograd.Function):
    """`forward` and `backward` as one node of autograd's graph."""

    @staticmethod
    def forward(ctx, names, *tensors):
        state, inputs = dict(zip(names, tensors)), tensors[len(names) :]
        outputs, saved = forward(state, *inputs)
        ctx.names{layout} = names{layout_value}
        ctx.save_for_backward(*state.values(), *{flat})
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, {grad_outputs}):
        tensors = ctx.saved_tensors
        state, saved = dict(zip(ctx.names, tensors)), tensors[len(ctx.names) :]
        {results} = backward(state, {restored}, {grad_outputs})
        return None, *map(grads.get, ctx.names), {grad_inputs}


def run(state, {inputs}):
    """The output of the model, differentiable with respect to the parameters in `state` and the inputs.

    Args:
        state: the parameters and buffers of the model by their names.
    """
    {outputs} = Run.apply(tuple(state), *state.values(), {inputs})
    return {result}'''

_CHECK = '''STATE = {state}
INPUTS = {inputs}


def check():
    """Compare `run` with torch's autograd through `forward`, on random numbers. Prints the largest difference."""
    torch.manual_seed(0)
    state = {{name: random_tensor(*x) for name, x in STATE.items()}}
    inputs = [random_tensor(*x) for x in INPUTS]
    tensors = [x for x in (*state.values(), *inputs) if x.requires_grad]
    results = []
    for compute in (lambda: run(state, *inputs), lambda: forward(state, *inputs)[0]):
        torch.manual_seed(1)
        outputs = compute()
        outputs = [x for x in (outputs if isinstance(outputs, tuple) else [outputs]) if x.requires_grad]
        torch.manual_seed(2)
        loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, tensors, allow_unused=True)])
    pairs = [(a, b) for a, b in zip(*results) if a is not None and b is not None and b.numel()]
    smallest = 1e-9 * max(b.abs().max() for _, b in pairs)
    differences = [((a - b).abs().max() / b.abs().max().clamp(min=smallest)).item() for a, b in pairs]
    print(f"largest difference from torch's autograd: {{max(differences):.1e}}")


def random_tensor(dtype, requires_grad, largest, *shape):
    if dtype.is_floating_point:
        return torch.empty(shape, dtype=torch.float64).uniform_(0.1, 0.3).requires_grad_(requires_grad)
    return torch.randint(largest + 1, shape).to(dtype)


if __name__ == "__main__":
    check()'''


class FileWriter:
    """Writes the functions of each unit, and the parts around them."""

    def __init__(self, graph: Graph, units: Sequence[Unit], largest: Sequence[int], min_elements: int) -> None:
        self.graph, self.units, self.largest = graph, units, largest
        self.imports: set[str] = {"import torch"}
        self.has_blocks = len(units) > 1
        self.functions: list[str] = []
        for unit in units:
            name_variables(unit)
            self.backward = Backward(graph.trace, unit.items, unit.outputs)
            writer = UnitWriter(graph, unit, self.backward, min_elements)
            self.functions += [writer.forward(), writer.backward_text()]
            self.imports |= writer.writer.imports
            self.root = writer

    def text(self, title: str) -> str:
        standard = sorted(x for x in self.imports if "torch" not in x)
        torch_imports = sorted(x for x in self.imports if "torch" in x)
        head = "\n\n".join("\n".join(x) for x in (standard, torch_imports) if x)
        helpers = [_SUBSTATE, _ADD_GRADS, _FLATTEN] if self.has_blocks else []
        constants = [f"{x.name} = {_tensor_literal(value)}" for x, value in self.graph.constants.items()]
        constants = ["\n".join(constants)] if constants else []
        top = f'"""{title}"""\n\n{head}'
        parts = [top, *constants, *helpers, *self.functions, self._run(), self._check()]
        return "\n\n\n".join(parts) + "\n"

    def _run(self) -> str:
        root = self.root
        name = root.writer.name
        inputs = ", ".join(name(x) for x in self.graph.inputs)
        needed = [x for x in self.graph.inputs if x.needs_grad]
        outputs = ", ".join(name(x) for x in root.unit.outputs)
        grad_inputs = ", ".join(name_of_gradient(root, x) if x in needed else "None" for x in self.graph.inputs)
        grads = [name_of_gradient(root, x) for x in needed]
        nested = self.has_blocks
        return wrap(
            _RUN.format(
                inputs=inputs,
                outputs=outputs,
                result=outputs,
                grad_outputs=", ".join(root.grad_outputs),
                results=", ".join(["grads", *grads]),
                grad_inputs=grad_inputs,
                layout=", ctx.layout" if nested else "",
                layout_value=", without_tensors(saved)" if nested else "",
                flat="flatten(saved)" if nested else "saved",
                restored="unflatten(ctx.layout, iter(saved))" if nested else "saved",
            )
        )

    def _check(self) -> str:
        state = [f'    "{path}": {_example(x, 0)},' for path, x in self.graph.state.items()]
        inputs = [f"    {_example(x, n)}," for x, n in zip(self.graph.inputs, self.largest, strict=True)]
        return _CHECK.format(
            state="\n".join(["{", *state, "}"]),
            inputs="\n".join(["[", *inputs, "]"]) if len(inputs) > 1 else f"[{''.join(inputs).strip(' ,')}]",
        )


def _example(variable: Variable, largest: int) -> str:
    """The arguments of ``random_tensor`` for a variable."""
    shape = [size.node.hint if isinstance(size, torch.SymInt) else size for size in variable.tensor.shape]
    values = variable.tensor.dtype, variable.needs_grad, largest, *shape
    return f"({', '.join(map(str, values))})"


def _tensor_literal(tensor: Tensor) -> str:
    if tensor.numel() > MAX_LITERAL:
        raise NotImplementedError(
            f"the model creates a constant of shape {list(tensor.shape)} in its forward: register it as a buffer"
        )
    return f"torch.tensor({tensor.tolist()}, dtype={tensor.dtype})"


MAX_LITERAL = 1024
"""Larger constants are not written into the file."""


def name_of_gradient(writer: UnitWriter, variable: Variable) -> str:
    gradient = writer.backward.gradients.get(variable)
    return "None" if gradient is None else writer.writer.name(gradient)


def name_variables(unit: Unit) -> None:
    """Name the output of each step after its module, or after its module and operator."""
    steps = [x for x in unit.items if isinstance(x, Step)]
    counts: dict[str, int] = {}
    for step in steps:
        if step.rule is not None:
            counts[step.module] = counts.get(step.module, 0) + 1
    for step in steps:
        module = step.module.removeprefix(unit.path).removeprefix(".")
        path = path_identifier(module)
        operator = _SHORT_NAMES.get(step.operator, step.operator).rstrip("_")
        name = path if path and counts.get(step.module) == 1 else f"{path}_{operator}" if path else operator
        if step.output is not None:
            step.output.name = name
            for statistic, variable in step.statistics.items():
                variable.name = f"{name}_{statistic}"
        else:
            for variable in (x for call in step.calls for x in call.writes):
                if variable.path is None:
                    variable.name = name
    for item in unit.items:
        if isinstance(item, BlockCall):
            path = path_identifier(item.path.removeprefix(unit.path).removeprefix("."))
            for i, output in enumerate(item.outputs):
                output.name = path if len(item.outputs) == 1 else f"{path}_{i}"
    if unit.path:
        differentiable = [x for x in unit.inputs if x.needs_grad] or unit.inputs
        for i, x in enumerate(differentiable):
            x.name = "input" if i == 0 else f"input_{i + 1}"


_SHORT_NAMES = {
    "scaled_dot_product_attention": "attention",
    "native_layer_norm": "layer_norm",
    "cross_entropy_loss": "loss",
}


def path_identifier(path: str) -> str:
    return "_".join(x if x[:1].isalpha() or i != 0 else f"layer{x}" for i, x in enumerate(path.split(".")) if x)


class UnitWriter:
    """Writes the two functions of a unit."""

    def __init__(self, graph: Graph, unit: Unit, backward: Backward, min_elements: int) -> None:
        self.graph, self.unit, self.backward = graph, unit, backward
        available = {*graph.constants, *(x for x in graph.state.values() if x not in unit.inputs)}
        backward.recompute(available, min_elements)
        self.available = available
        self.writer = Writer()
        self.writer.unit_path = unit.path
        self.writer.symbols = graph.symbols
        self.saved = self._find_saved()
        self.forward_calls = [self._forward_calls(item) for item in unit.items]
        self.grad_outputs: list[str] = []
        for variable in graph.constants:
            self.writer.expressions[variable] = ast.Name(variable.name, ast.Load())
        for path, variable in graph.state.items():
            if unit.path and path.startswith(f"{unit.path}."):
                self.writer.expressions[variable] = _item("state", path.removeprefix(f"{unit.path}."))
            elif unit.path and variable in unit.inputs:
                self.writer.name(variable)
            else:
                self.writer.expressions[variable] = _item("state", path)

    def _find_saved(self) -> list[Variable]:
        found = self.backward.find_saved(self.available)
        order: dict[Variable, int] = {}
        for i, item in enumerate(self.unit.items):
            calls = item.calls if isinstance(item, Step) else []
            for x in (x for call in calls for x in call.writes):
                order[x] = i
            if isinstance(item, BlockCall) and item in self.backward.saved_by_block:
                order[self.backward.saved_by_block[item]] = i
        return sorted(found, key=lambda x: order.get(x, -1))

    def _forward_calls(self, item: Step | BlockCall) -> list[Call]:
        if isinstance(item, Step):
            return item.calls
        saved = self.backward.saved_by_block.get(item)
        outputs = item.outputs[0] if len(item.outputs) == 1 else tuple(item.outputs)
        return [Call(BlockFunction(item, "forward"), tuple(item.inputs), {}, (outputs, saved))]

    def forward(self) -> str:
        writer, unit = self.writer, self.unit
        arguments = [writer.name(x) for x in unit.inputs]
        kept = {*self.saved, *unit.outputs}
        body: list[str] = []
        groups = [
            (place, [call for _, calls in items for call in calls])
            for place, items in groupby(
                zip(unit.items, self.forward_calls, strict=True), lambda x: self._title(x[0])
            )
        ]
        for i, (place, calls) in enumerate(groups):
            later = {x for _, others in groups[i + 1 :] for call in others for x in call.reads}
            if lines := writer.lines(calls, kept | later):
                body += [*([f"# {place}"] if place else []), *lines]
        body[:0] = writer.size_lines(unit.inputs)
        body += self._saved_bytes()
        outputs = [ast.unparse(writer.value(x)) for x in unit.outputs]
        result = outputs[0] if len(outputs) == 1 else _tuple(outputs)
        body += split_line(f"return {result}, {_tuple([writer.name(x) for x in self.saved])}", WIDTH - 4)
        head = f"{self._function('forward')}({', '.join(['state', *arguments])})"
        return _definition(head, f"The output of {unit.name or 'the model'}, and what the backward needs.", body)

    def _saved_bytes(self) -> list[str]:
        """A comment that says how much memory the saved tensors take."""
        sizes = [
            x.tensor.untyped_storage().nbytes()
            for x in self.saved
            if x not in self.backward.saved_by_block.values()
        ]
        if not self.saved or not all(isinstance(size, int) for size in sizes):
            return []
        blocks = len(self.saved) - len(sizes)
        more = (
            f", besides those of {blocks} blocks" if blocks > 1 else ", besides those of a block" if blocks else ""
        )
        return [f"# saved: {sum(sizes):,} bytes{more}"]

    def _title(self, item: Step | BlockCall) -> str:
        place = self._place(item)
        if isinstance(item, Step) and item.rule is None:
            return f"{place} (no gradient)" if place else "no gradient"
        return place

    def _place(self, item: Step | BlockCall) -> str:
        if isinstance(item, BlockCall):
            return f"{self._relative(item.path)}: {self.graph.modules[item.path]}"
        path = self._relative(item.module)
        return f"{path}: {self.graph.modules.get(item.module, '')}" if path else ""

    def _relative(self, path: str) -> str:
        return path.removeprefix(self.unit.path).removeprefix(".")

    def _function(self, direction: str) -> str:
        return f"{self.unit.name}_{direction}" if self.unit.name else direction

    def backward_text(self) -> str:
        writer, backward, unit = self.writer, self.backward, self.unit
        body: list[str] = []
        own = {x for x in self.graph.state.values() if x not in unit.inputs}
        for gradient, variable in (
            *backward.history.items(),
            *((x, v) for v, x in backward.output_gradients.items()),
        ):
            if variable in writer.names:
                gradient.name = f"grad_{writer.names[variable]}"
        writer.used_sizes.clear()
        self.grad_outputs = [
            writer.name(backward.output_gradients[x]) if x in backward.output_gradients else f"_{i}"
            for i, x in enumerate(unit.outputs)
        ]
        for gradient, variable in backward.history.items():
            if variable in own:
                writer.expressions[gradient] = _item("grads", self._relative_state(variable))
        results = [backward.gradients[x] for x in unit.inputs if x.needs_grad and x in backward.gradients]
        state_gradients = [x for x, variable in backward.history.items() if variable in own]
        if self.saved:
            names = [writer.name(x) for x in self.saved]
            line = f"{', '.join(names)}{',' if len(names) == 1 else ''} = saved"
            body += [line] if len(line) <= WIDTH - 4 else split_line(f"({', '.join(names)}) = saved", WIDTH - 4)
        body.append("grads = {}")
        calls = [call for section in backward.sections for call in section.calls]
        for i, call in enumerate(calls):
            for x in call.reads:
                writer.last_read[x] = i
        kept = {*results, *state_gradients}
        kept |= {x for v, x in backward.gradients.items() if v in own}
        for x in (*self.saved, *unit.inputs, *kept):
            writer.last_read[x] = math.inf
        groups = self._section_groups()
        start = 0
        for i, (title, calls) in enumerate(groups):
            later = {x for _, others in groups[i + 1 :] for call in others for x in call.reads}
            if lines := writer.lines(calls, later | kept, start, rebind=True):
                body += [*([f"# {title}"] if title else []), *lines]
            start += len(calls)
        for variable, gradient in backward.gradients.items():
            if variable in own and gradient not in writer.expressions:
                body.append(f'grads["{self._relative_state(variable)}"] = {writer.name(gradient)}')
        needed = [x for x in unit.inputs if x.needs_grad]
        returned = [
            ast.unparse(writer.value(backward.gradients[x])) if x in backward.gradients else "None" for x in needed
        ]
        body += split_line(f"return {', '.join(['grads', *returned])}", WIDTH - 4)
        given = [*self.saved, *(x for x in backward.output_gradients.values() if x in writer.names)]
        at = next(i for i, line in enumerate(body) if line == "grads = {}")
        body[at:at] = writer.size_lines(given)
        docstring = "The gradients of the parameters by name" + (", and of the inputs." if needed else ".")
        head = f"{self._function('backward')}({', '.join(['state', 'saved', *self._grad_parameters()])})"
        return _definition(head, docstring, body)

    def _grad_parameters(self) -> list[str]:
        if not self.unit.path:
            return self.grad_outputs
        return [x for x, output in zip(self.grad_outputs, self.unit.outputs, strict=True) if output.needs_grad]

    def _relative_state(self, variable: Variable) -> str:
        path = variable.path or ""
        return path.removeprefix(f"{self.unit.path}.") if self.unit.path else path

    def _section_groups(self) -> list[tuple[str, list[Call]]]:
        """The calls of each section, joined with those of the views that follow it in the same module."""
        groups: list[tuple[str, list[Call]]] = []
        module = None
        for section in self.backward.sections:
            item = section.item
            if isinstance(item, BlockCall):
                groups.append((self._place(item), [*section.calls]))
                module = None
                continue
            assert item.rule is not None
            path = self._relative(item.module)
            name = "" if is_structural(item) else item.rule.__name__
            if groups and module == path and not name:
                groups[-1][1].extend(section.calls)
            else:
                groups.append((": ".join(x for x in (path, name) if x), [*section.calls]))
            module = path
        return groups


def _item(mapping: str, key: str) -> ast.expr:
    return ast.Subscript(ast.Name(mapping, ast.Load()), ast.Constant(key), ast.Load())


def _tuple(names: Sequence[str]) -> str:
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def _definition(head: str, docstring: str, body: Iterable[str]) -> str:
    lines = [f'"""{docstring}"""', *body]
    return "\n".join([*split_line(f"def {head}:", WIDTH), *(f"    {x}" if x else "" for x in lines)])
