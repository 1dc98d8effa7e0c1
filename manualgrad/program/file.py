"""The file of a program: ``forward``, ``backward``, ``run`` and a check of itself."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from manualgrad.program.backward import Backward, Section
from manualgrad.program.capture import Graph, Step
from manualgrad.program.text import WIDTH, Writer, render, split_line
from manualgrad.program.trace import Call, Variable, variables

_RUN = '''
class Run(torch.autograd.Function):
    """`forward` and `backward` as one node of autograd's graph."""

    @staticmethod
    def forward(ctx, names, *tensors):
        ctx.names = names
        state, inputs = dict(zip(names, tensors)), tensors[len(names) :]
        outputs, saved = forward(state, *inputs)
        ctx.save_for_backward(*state.values(), *saved)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):
        tensors, count = ctx.saved_tensors, len(ctx.names)
        state = dict(zip(ctx.names, tensors[:count]))
        grads, grad_inputs = backward(state, tensors[count:], *grad_outputs)
        return None, *(grads.get(name) for name in ctx.names), *grad_inputs


def run(state, {inputs}):
    """The output of the model. It is differentiable with respect to the parameters in `state` and the inputs.

    Args:
        state: the model's parameters and buffers by name: {{**dict(model.named_parameters()), **dict(model.named_buffers())}}.
    """
    names = tuple(state)
    {outputs} = Run.apply(names, *state.values(), {inputs})
    return {result}
'''


class Layout:
    """What a program saves, takes and returns."""

    def __init__(self, graph: Graph, backward: Backward) -> None:
        self.graph, self.backward = graph, backward
        self.outputs = list(dict.fromkeys(x for x in graph.outputs if isinstance(x, Variable)))
        made = {variable for section in backward.sections for call in section.calls for variable in call.writes}
        given = set(backward.output_gradients.values())
        self.saved: list[Variable] = []
        for section in backward.sections:
            for variable in (x for call in section.calls for x in call.reads):
                if variable.path is None and variable not in made and variable not in given:
                    if variable not in self.saved:
                        self.saved.append(variable)
        order = {v: i for i, v in enumerate(x for step in graph.steps for call in step.calls for x in call.writes)}
        self.saved.sort(key=lambda x: order.get(x, -1))


def name_steps(graph: Graph) -> None:
    """Name the output of each step after its module, or after its module and operator."""
    counts: dict[str, int] = {}
    for step in graph.steps:
        if step.rule is not None:
            counts[step.module] = counts.get(step.module, 0) + 1
    for step in graph.steps:
        if step.output is None:
            continue
        path = "_".join(x if x[:1].isalpha() else f"layer{x}" for x in step.module.split(".") if x)
        operator = step.operator.rstrip("_").removesuffix("_default")
        step.output.name = path if path and counts[step.module] == 1 else f"{path}_{operator}" if path else operator
        for name, variable in step.statistics.items():
            variable.name = f"{step.output.name}_{name}"
    for step in graph.steps:
        if step.rule is None:
            for call in step.calls:
                for variable in call.writes:
                    if variable.path is None and not variable.is_named and step.module:
                        pass


def write(graph: Graph, backward: Backward, title: str) -> str:
    layout = Layout(graph, backward)
    writer = Writer()
    forward = _forward(writer, layout)
    back = _backward(writer, layout)
    inputs = ", ".join(writer.name(x) for x in graph.inputs)
    outputs = ", ".join(writer.name(x) for x in layout.outputs)
    single = len(layout.outputs) == 1
    run = _RUN.format(inputs=inputs, outputs=outputs, result=outputs)
    imports = sorted({"import torch", *writer.imports})
    imports = [x for x in imports if "torch" not in x] + [""] * any("torch" not in x for x in imports) + [x for x in imports if "torch" in x]
    head = f'"""{title}"""\n\n' + "\n".join(imports)
    return "\n\n\n".join([head, forward, back, run.strip("\n")]) + "\n"


def _function(head: str, docstring: str, body: Iterable[str]) -> str:
    lines = [f'"""{docstring}"""', *body]
    return "\n".join([*split_line(f"def {head}:", WIDTH), *(f"    {x}" if x else "" for x in lines)])


def _tuple(names: Sequence[str]) -> str:
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def _forward(writer: Writer, layout: Layout) -> str:
    graph = layout.graph
    arguments = [writer.name(x) for x in graph.inputs]
    kept = {*layout.saved, *layout.outputs}
    body: list[str] = []
    calls = [call for step in graph.steps for call in step.calls]
    readers = {variable for call in calls for variable in call.reads}
    module = None
    for step in graph.steps:
        lines = writer.lines(step.calls, kept | (readers - {x for call in step.calls for x in call.reads}) | _read_later(graph.steps, step))
        if lines and step.module != module and step.module:
            body.append(f"# {step.module}: {graph.modules.get(step.module, '')}")
        module = step.module if lines else module
        body += lines
    saved = _tuple([writer.name(x) for x in layout.saved])
    outputs = [ast.unparse(writer.value(x)) for x in layout.outputs]
    result = outputs[0] if len(outputs) == 1 else _tuple(outputs)
    body += split_line(f"return {result}, {saved}", WIDTH - 4)
    return _function(f"forward(state, {', '.join(arguments)})", "The output and what the backward needs.", body)


def _read_later(steps: list[Step], step: Step) -> set[Variable]:
    found = set()
    seen = False
    for other in steps:
        if seen:
            found |= {x for call in other.calls for x in call.reads}
        seen = seen or other is step
    return found


def _backward(writer: Writer, layout: Layout) -> str:
    graph, backward = layout.graph, layout.backward
    body: list[str] = []
    grads = [writer.name(backward.output_gradients[x]) for x in layout.outputs if x in backward.output_gradients]
    if layout.saved:
        names = [writer.name(x) for x in layout.saved]
        body += split_line(f"{', '.join(names)}{',' if len(names) == 1 else ''} = saved", WIDTH - 4)
    body.append("grads = {}")
    paths: dict[Variable, str] = {}
    aliases: list[tuple[str, Variable]] = []
    for variable, gradient in backward.gradients.items():
        if variable.path is not None:
            paths[gradient] = variable.path
    calls = [call for section in backward.sections for call in section.calls]
    accumulated: dict[Variable, str] = {}
    for call in calls:
        for variable in call.writes:
            if variable.is_named and variable.name.startswith("grad_"):
                pass
    by_name = {f"grad_{x.name}": x.path for x in graph.state.values()}
    state_gradients = {x for x in backward.history if backward.history[x].path is not None}
    for gradient in state_gradients:
        path = backward.history[gradient].path
        writer.expressions[gradient] = ast.Subscript(ast.Name("grads", ast.Load()), ast.Constant(path), ast.Load())
    input_gradients = [backward.gradients.get(x) for x in graph.inputs]
    kept = {x for x in (*backward.gradients.values(),) }
    results = {x for x in input_gradients if x is not None} | state_gradients
    for i, call in enumerate(calls):
        for x in call.reads:
            writer.last_read[x] = i
    for x in (*layout.saved, *graph.inputs, *results, *graph.state.values()):
        writer.last_read[x] = float("inf")
    start = 0
    for section in backward.sections:
        later = {x for call in calls[start + len(section.calls) :] for x in call.reads}
        lines = writer.lines(section.calls, later | results, start, rebind=True)
        start += len(section.calls)
        step = section.step
        assert step.rule is not None
        where = f"{step.module}: " if step.module else ""
        body += [f"# {where}{step.rule.__name__}", *lines]
    for variable, gradient in backward.gradients.items():
        if variable.path is not None and gradient not in writer.expressions:
            body.append(f"grads[{variable.path!r}] = {writer.name(gradient)}")
    inputs = _tuple(["None" if x is None else ast.unparse(writer.value(x)) for x in input_gradients])
    body += split_line(f"return grads, {inputs}", WIDTH - 4)
    return _function(f"backward(state, saved, {', '.join(grads)})", "The gradients of the parameters by name, and of the inputs.", body)
