"""Print forward, backward and update of a small network with all numbers.

    python scripts/explain.py                                                 2 inputs, 3 hidden units, 1 output
    python scripts/explain.py --widths 2,4,4,3 --activation Tanh --loss CrossEntropyLoss
    python scripts/explain.py --run-dir runs/explain                          also write to TensorBoard

The script runs the network forward, computes the loss, and follows the autograd graph backward from it. For each
node it prints the derivation of its rule, the gradient of its output and the gradients of its inputs. It then
updates the weights, and compares every gradient with torch.nn's and with a finite difference. If one differs, the
exit status is 1. At the end it prints forward and backward as one Python program (`manualgrad.export`).
"""

import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from itertools import compress, count, pairwise, product, zip_longest
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any, NamedTuple, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.utils import get_total_norm
from torch.utils.tensorboard import SummaryWriter

import manualgrad
import manualgrad.nn
from manualgrad.meter import TENSORBOARD_LENGTH, add_pil_image, bar_chart
from manualgrad.rule import Rule, derivation, saved_values
from manualgrad.training import CliSettings, fail, parse_settings

PAGE_WIDTH = 96
"""Columns of the text."""


# Settings


def compatible_activations() -> dict[str, nn.Module]:
    """The activations of manualgrad.nn that need no arguments and keep the shape."""
    modules: dict[str, nn.Module] = {}
    for name in sorted(activation.__all__):
        kind = getattr(manualgrad.nn, name)
        arguments = {"dim": -1} if "dim" in inspect.signature(kind).parameters else {}
        try:
            module = kind(**arguments)
            keeps_shape = module(torch.zeros(1, 2)).shape == (1, 2)
        except (TypeError, ValueError):
            continue
        if keeps_shape:
            modules[name] = module
    return modules


def random_numbers(batch: int, outputs: int) -> Tensor:
    return round_to_tenths(torch.randn(batch, outputs, dtype=torch.float64))


def zeros_and_ones(batch: int, outputs: int) -> Tensor:
    return torch.randint(2, (batch, outputs)).double()


def signs(batch: int, outputs: int) -> Tensor:
    return 2 * zeros_and_ones(batch, outputs) - 1


def class_labels(batch: int, outputs: int) -> Tensor:
    return torch.randint(outputs, (batch,))


def round_to_tenths(tensor: Tensor) -> Tensor:
    """Round, so that a reader can follow the numbers by hand."""
    return tensor.mul(10).round().div(10)


ACTIVATIONS = compatible_activations()
LOSSES: Mapping[str, Callable[[int, int], Tensor]] = {
    **dict.fromkeys(("MSELoss", "L1Loss", "HuberLoss", "SmoothL1Loss"), random_numbers),
    **dict.fromkeys(("CrossEntropyLoss", "MultiMarginLoss"), class_labels),
    **dict.fromkeys(("BCEWithLogitsLoss", "MultiLabelSoftMarginLoss"), zeros_and_ones),
    "SoftMarginLoss": signs,
}
"""Losses of manualgrad.nn, and the function that makes their targets."""

SmallInt = Annotated[int, Field(gt=0, le=8)]


class Settings(CliSettings):
    """Print forward, backward and update of a small network with all numbers."""

    widths: tuple[SmallInt, ...] = (2, 3, 1)
    """Numbers of inputs, units of each hidden layer, and outputs, separated by commas. At most 8 each."""
    activation: str = "Sigmoid"
    """The activation after each hidden layer: any of manualgrad.nn that needs no arguments."""
    loss: str = "MSELoss"
    """The loss: MSELoss, L1Loss, HuberLoss, SmoothL1Loss, CrossEntropyLoss and others."""
    batch_size: SmallInt = 4
    """Examples in the batch, at most 8."""
    learning_rate: PositiveFloat = 0.5
    """The learning rate of gradient descent."""
    steps: PositiveInt = 10
    """Updates on the same batch. The first one is shown in detail."""
    seed: NonNegativeInt = 0
    """The seed of the batch and the initial weights."""
    digits: Annotated[int, Field(gt=0, le=6)] = 4
    """Digits after the decimal point."""
    run_dir: Path | None = None
    """The folder for TensorBoard. None writes nothing."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for option, name, names in (("activation", self.activation, ACTIVATIONS), ("loss", self.loss, LOSSES)):
            if name not in names:
                raise ValueError(f"--{option}: choose from {', '.join(names)} (got {name})")
        if len(self.widths) < 2:
            raise ValueError("--widths: a network has at least inputs and outputs, for example 2,1")
        if LOSSES[self.loss] is class_labels and self.widths[-1] == 1:
            raise ValueError(f"--loss {self.loss} needs several classes: --widths must end in 2 or more")
        return self


def build_network(settings: Settings) -> nn.Module:
    """Linear layers with activations between them, in float64."""
    modules: dict[str, nn.Module] = {}
    for number, (inputs, outputs) in enumerate(pairwise(settings.widths), start=1):
        if modules:
            modules[f"activation{number - 1}"] = deepcopy(ACTIVATIONS[settings.activation])
        modules[f"linear{number}"] = manualgrad.nn.Linear(inputs, outputs)
    return nn.Sequential(OrderedDict(modules)).double()


# Forward and backward


class Layer(NamedTuple):
    """A call of a module: its inputs, parameters and output by name, and its nodes in the graph."""

    name: str
    module: nn.Module
    tensors: dict[str, Tensor]
    nodes: list[Any]


class InputGradient(NamedTuple):
    """A gradient that a node returns."""

    input: str
    destination: str
    """The layer or parameter that receives it."""
    grad: Tensor


class NodeBackward(NamedTuple):
    """The backward of one node of the graph."""

    layer: str
    name: str
    rule: type[Rule] | None
    grad_outputs: list[Tensor]
    """∂L/∂output, for each output."""
    quantities: dict[str, Tensor]
    """The tensors that its formulas use: saved ones and intermediate results."""
    input_grads: list[InputGradient]


def compute_loss(model: nn.Module, loss: nn.Module, input: Tensor, target: Tensor) -> Tensor:
    """Compute the loss, always from the same random state (for RReLU)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return loss(model(input), target)


def run_forward(model: nn.Module, loss: nn.Module, input: Tensor, target: Tensor) -> tuple[Tensor, list[Layer]]:
    """Return the loss, and the layers in the order of their calls."""
    layers: list[Layer] = []

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        tensors = dict(zip(inspect.signature(module.forward).parameters, args, strict=False))
        tensors |= dict(module.named_parameters(recurse=False)) | {"output": output}
        earlier = [node for x in args if isinstance(x, Tensor) for node in graph_nodes(x.grad_fn)]
        copies = {key: value.detach().clone() for key, value in tensors.items() if isinstance(value, Tensor)}
        layers.append(Layer(name, module, copies, graph_nodes(output.grad_fn, earlier)))

    modules = [*model.named_modules(), *loss.named_modules(prefix="loss")]
    hooks = [
        module.register_forward_hook(partial(record, name))
        for name, module in modules
        if next(module.children(), None) is None
    ]
    value = compute_loss(model, loss, input, target)
    for hook in hooks:
        hook.remove()
    return value, layers


def graph_nodes(node: Any, excluded: Iterable[Any] = ()) -> list[Any]:
    """The nodes of the graph from the inputs to `node`, without leaves and `excluded` ones."""
    nodes: list[Any] = []

    def visit(node: Any) -> None:
        if node is not None and not hasattr(node, "variable") and node not in excluded and node not in nodes:
            for earlier, _ in node.next_functions:
                visit(earlier)
            nodes.append(node)

    visit(node)
    return nodes


def run_backward(model: nn.Module, value: Tensor, layers: list[Layer]) -> list[NodeBackward]:
    """Call ``value.backward()``. Return what each node did, in order."""
    layer_names = {node: layer.name for layer in layers for node in layer.nodes}
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    backwards: list[NodeBackward] = []

    def layer_of(node: Any) -> str:
        if hasattr(node, "variable"):
            return parameters.get(id(node.variable), "a leaf")
        return layer_names.get(node, "the model")

    def record(
        node: Any, rule_and_saved: Any, grad_inputs: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]
    ) -> None:
        grad_outputs = [grad.detach().clone() for grad in grads if grad is not None]
        edges = zip(node.next_functions, grad_inputs, strict=True)
        targets = [(to, grad) for (to, _), grad in edges if to is not None]
        if rule_and_saved is None:
            rule, quantities = None, {}
            names = ["input"] if len(targets) == 1 else [f"input {i}" for i, _ in enumerate(targets, start=1)]
        else:
            rule, saved = rule_and_saved
            names = list(compress(inspect.signature(rule.forward).parameters, node.needs_input_grad))
            quantities = used_quantities(rule, saved, grad_outputs[0], names)
        layer = layer_of(node)
        input_grads = []
        for name, (to, grad) in zip(names, targets, strict=True):
            if grad is not None:
                destination = node_name(to) if layer_of(to) == layer else layer_of(to)
                input_grads.append(InputGradient(name, destination, grad.detach().clone()))
        backwards.append(NodeBackward(layer, node_name(node), rule, grad_outputs, quantities, input_grads))

    for node in graph_nodes(value.grad_fn):
        node.register_hook(partial(record, node, saved_values(node)))
    value.backward()
    return backwards


def node_name(node: Any) -> str:
    """The name without its suffix: MSELossFunction of MSELossFunctionBackward, Mean of MeanBackward0."""
    return node.name().partition("Backward")[0]


@torch.no_grad()
def used_quantities(
    rule: type[Rule], saved: Mapping[str, Any], grad: Tensor, inputs: Iterable[str]
) -> dict[str, Tensor]:
    """The tensors that the gradients of `inputs` use: the saved ones, then those computed from them."""
    values = dict(saved) | {"grad": grad}

    def parameters(method: str) -> Iterable[str]:
        return inspect.signature(getattr(rule, method)).parameters

    def compute(name: str) -> Any:
        if name not in values:
            values[name] = getattr(rule, name)(*map(compute, parameters(name)))
        value = values[name]
        return value.clone() if isinstance(value, Tensor) else value  # a formula may write into its arguments

    for gradient in (f"grad_{name}" for name in inputs):
        for name in parameters(gradient):
            if not name.startswith("grad_"):
                compute(name)
    return {name: compute(name) for name, x in values.items() if isinstance(x, Tensor) and name != "grad"}


# Checking the gradients


class GradientCheck(NamedTuple):
    """The gradient of a parameter, computed in three ways."""

    name: str
    manual_grad: Tensor
    torch_grad: Tensor
    finite_difference: Tensor

    def agrees(self, loss: float) -> Tensor:
        """Which elements agree, up to the rounding of a finite difference of this loss. nan never agrees."""
        expected = (self.torch_grad, self.finite_difference)
        tolerance = 1e-6 * max(x.abs().max().item() for x in expected) + 1e-9 * (1 + abs(loss))
        return torch.stack([(self.manual_grad - x).abs() <= tolerance for x in expected]).all(0)


def check_gradients(model: nn.Module, loss: nn.Module, input: Tensor, target: Tensor) -> list[GradientCheck]:
    """Compare the gradients in the parameters with torch.nn's and with (L(w + h) - L(w - h)) / 2h."""
    torch_model, torch_loss = manualgrad.revert(deepcopy(model)), manualgrad.revert(deepcopy(loss))
    torch_model.zero_grad()
    value = compute_loss(torch_model, torch_loss, input, target)
    if rules := [node_name(node) for node in graph_nodes(value.grad_fn) if saved_values(node)]:
        raise RuntimeError(
            f"the network reverted to torch.nn still calls {rules[0]}, so there is nothing to compare"
        )
    value.backward()
    loss_of_model = partial(compute_loss, model, loss, input, target)
    return [
        GradientCheck(
            name, grad_or_zeros(parameter), grad_or_zeros(torch_parameter), differences(loss_of_model, parameter)
        )
        for (name, parameter), torch_parameter in zip(
            model.named_parameters(), torch_model.parameters(), strict=True
        )
    ]


def grad_or_zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


@torch.no_grad()
def differences(function: Callable[[], Tensor], parameter: Tensor, h: float = 1e-6) -> Tensor:
    """Finite differences of a function with respect to each element of a parameter."""
    result = torch.empty_like(parameter)
    elements, quotients = parameter.view(-1), result.view(-1)
    for i, element in enumerate(elements.tolist()):
        elements[i] = element + h
        above = function()
        elements[i] = element - h
        quotients[i] = (above - function()) / (2 * h)
        elements[i] = element
    return result


# Text

NOTATION = """\
In the derivations x is the input, W the weight, b the bias, y the output of a layer, t the target,
and g the gradient of the output, ∂L/∂y. Each row of an input or output is an example.
"""


class Step(NamedTuple):
    """A heading and its text."""

    heading: str
    text: str


Sections = dict[str, list[Step]]


def number_format(largest: float, digits: int) -> str:
    """A format for numbers up to `largest`: fixed point, or scientific if they are very small or large."""
    return f"z.{digits}f" if largest == 0 or 10 ** (1 - digits) <= largest < 1e6 else f".{digits - 1}e"


def format_matrix(title: str, tensor: Tensor, digits: int) -> list[str]:
    """The lines of a block: a title, and below it the numbers in columns."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
    if rows.is_floating_point():
        style = number_format(rows.abs().max().item(), digits)
    else:
        rows, style = rows.long(), "d"
    cells = [[format(x, style) for x in row] for row in rows.tolist()]
    width = max(len(cell) for row in cells for cell in row)
    return [title, *("  ".join(cell.rjust(width) for cell in row) for row in cells)]


def format_tensors(tensors: Mapping[str, Tensor], digits: int) -> str:
    """Blocks side by side, in as many rows as the page width requires."""
    rows: list[list[list[str]]] = [[]]
    row_width = 0
    for title, tensor in tensors.items():
        block = format_matrix(title, tensor, digits)
        width = max(map(len, block))
        if rows[-1] and row_width + width > PAGE_WIDTH:
            rows.append([])
            row_width = 0
        row_width += width + 4
        rows[-1].append([line.ljust(width + 4) for line in block])
    return "\n\n".join(map(_join_blocks, rows))


def _join_blocks(blocks: list[list[str]]) -> str:
    lines = zip_longest(*blocks)
    widths = [len(block[0]) for block in blocks]
    return "\n".join(
        "".join((x or "").ljust(n) for x, n in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def forward_steps(layers: list[Layer], digits: int) -> list[Step]:
    """A step for each layer: formula, inputs, parameters and output."""
    steps = []
    for name, module, tensors, nodes in layers:
        reduction = f", reduction {module.reduction!r}" if hasattr(module, "reduction") else ""
        text = "\n".join(map(first_formula, nodes)) + "\n\n" + format_tensors(tensors, digits)
        steps.append(Step(f"{name}: {module}{reduction}", text))
    return steps


def first_formula(node: Any) -> str:
    """The first formula of a rule's derivation. The name of a node that has no rule."""
    rule_and_saved = saved_values(node)
    if rule_and_saved is None:
        return node_name(node)
    return derivation(rule_and_saved[0]).partition("\n")[0].partition("      ")[0]


def backward_steps(backwards: list[NodeBackward], digits: int) -> list[Step]:
    """A step for each node: derivation, output gradients, quantities and input gradients."""
    steps = []
    for layer, name, rule, grad_outputs, quantities, input_grads in backwards:
        if rule is None:
            text, module = "An operation of torch without a rule: arithmetic or data movement.", ""
        else:
            text, module = derivation(rule), f"  ({rule.__module__})"
        numbers = [""] if len(grad_outputs) == 1 else [f" {i}" for i, _ in enumerate(grad_outputs, start=1)]
        grads = {f"g = ∂L/∂output{number}": grad for number, grad in zip(numbers, grad_outputs, strict=True)}
        known = format_tensors(grads | quantities, digits)
        computed = format_tensors(
            {f"∂L/∂{x} → {destination}": grad for x, destination, grad in input_grads}, digits
        )
        steps.append(Step(f"{layer}: {name}{module}", f"{text}\n\n{known}\n\n{computed}"))
    return steps


def update_steps(
    before: Mapping[str, Tensor], model: nn.Module, rate: float, losses: tuple[float, float], digits: int
) -> list[Step]:
    """A step for each parameter, and one for the loss."""
    steps = []
    for name, parameter in model.named_parameters():
        tensors = {"w": before[name], "∂L/∂w": grad_or_zeros(parameter), "new w": parameter.detach()}
        steps.append(Step(f"{name}: w - {rate:g} ∂L/∂w", format_tensors(tensors, digits)))
    text = "{} before, {} after".format(*(format(x, number_format(x, digits + 2)) for x in losses))
    return [*steps, Step("loss of the same batch", text)]


def check_steps(checks: list[GradientCheck], loss: float) -> list[Step]:
    """A table with a row for each element, and the largest differences."""
    rows = [["gradient of", "manualgrad", "torch.nn", "finite difference", ""]]
    for check in checks:
        name, *gradients = check
        agrees = check.agrees(loss).flatten().tolist()
        indices = map(list, product(*map(range, check.manual_grad.shape)))
        for index, good, *numbers in zip(indices, agrees, *(x.flatten().tolist() for x in gradients), strict=True):
            rows.append([f"{name}{index}", *(f"{x:z.8f}" for x in numbers), "" if good else "  differs"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [f"{row[0]:{widths[0]}}  {'  '.join(map(str.rjust, row[1:4], widths[1:4]))}{row[4]}" for row in rows]
    largest = [
        max((x.manual_grad - getattr(x, field)).abs().max().item() for x in checks)
        for field in ("torch_grad", "finite_difference")
    ]
    summary = "largest difference: from torch.nn {:.1e}, from the finite difference {:.1e}".format(*largest)
    return [Step("each gradient, computed in three ways", "\n".join(table) + f"\n\n{summary}")]


def descent_steps(losses: list[float], digits: int) -> list[Step]:
    """The loss after about ten of the steps, including the last."""
    interval = math.ceil((len(losses) - 1) / 10)
    shown = [*range(0, len(losses) - 1, interval), len(losses) - 1]
    width = len(str(shown[-1]))
    lines = [f"{i:{width}}  {format(losses[i], number_format(losses[i], digits + 2))}" for i in shown]
    return [Step("loss after each step", "\n".join(lines))]


# The explanation


class Explanation(NamedTuple):
    """One update of a network."""

    sections: Sections
    backwards: list[NodeBackward]
    losses: tuple[float, float]
    """Before and after the update."""
    wrong: list[str]
    """Parameters with a gradient that differs from torch.nn or the finite difference."""


def explain(
    model: nn.Module, loss: nn.Module, input: Tensor, target: Tensor, *, rate: float = 0.5, digits: int = 4
) -> Explanation:
    """Take a step of gradient descent and explain it.

    Args:
        model: a small manualgrad module in float64. Its layers take and return tensors.
        loss: a manualgrad loss that returns a scalar.
        input: of the model.
        target: of the loss.
        rate: the learning rate.
        digits: after the decimal point.
    """
    model.zero_grad()
    value, layers = run_forward(model, loss, input, target)
    forward = forward_steps(layers, digits)  # before the backward frees the saved tensors
    backwards = run_backward(model, value, layers)
    checks = check_gradients(model, loss, input, target)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.optim.SGD(model.parameters(), rate).step()
    losses = value.item(), compute_loss(model, loss, input, target).item()
    sections = {
        "forward, from the input to the loss": forward,
        "backward, from the loss to the input": backward_steps(backwards, digits),
        "update": update_steps(before, model, rate, losses, digits),
        "gradient check": check_steps(checks, losses[0]),
    }
    wrong = [check.name for check in checks if not check.agrees(losses[0]).all()]
    return Explanation(sections, backwards, losses, wrong)


def gradient_descent(
    model: nn.Module, loss: nn.Module, input: Tensor, target: Tensor, rate: float, steps: int
) -> Iterator[float]:
    """Take further steps on the same batch. Yield the loss after each."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        compute_loss(model, loss, input, target).backward()
        optimizer.step()
        yield compute_loss(model, loss, input, target).item()


class TrainingStep(nn.Module):
    """The layers of a network and its loss as one module, so that they keep their names."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        for name, layer in model.named_children():
            self.add_module(name, layer)
        self.loss = loss
        self.compute = partial(compute_loss, model, loss)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.compute(input, target)


def program_steps(model: nn.Module, loss: nn.Module, input: Tensor, target: Tensor) -> list[Step]:
    """Forward and backward of the network as Python."""
    code = manualgrad.export(TrainingStep(model, loss), (input, target)).code
    text = code[code.index("def forward(") : code.index("class Run(")]
    return [Step("forward and backward as one program", text.rstrip())]


def number_steps(sections: Sections) -> Sections:
    """Number the headings through all sections."""
    number = count(1)
    return {
        title: [Step(f"{next(number)}. {heading}", text) for heading, text in steps]
        for title, steps in sections.items()
    }


def to_text(sections: Sections) -> Iterator[str]:
    """The lines for the terminal."""
    yield NOTATION
    for title, steps in sections.items():
        yield f"{title.upper()}\n{'=' * PAGE_WIDTH}\n"
        for heading, text in steps:
            yield f"{heading}\n{'-' * len(heading)}\n{text}\n"


def write_tensorboard(
    folder: Path, sections: Sections, backwards: list[NodeBackward], losses: list[float]
) -> None:
    """Write a text card for each section, the loss curve, and a chart of gradient norms at each node."""
    with SummaryWriter(folder) as writer:
        for number, (title, steps) in enumerate(sections.items(), start=1):
            card = [f"#### {heading}\n\n{indent(text, ' ' * 4)}" for heading, text in steps]
            if number <= 2:  # forward and backward have derivations
                card.insert(0, NOTATION)
            name = title.partition(",")[0].replace(" ", "_")
            writer.add_text(f"explanation/{number}_{name}", "\n\n".join(card))
        for step, value in enumerate(losses):
            writer.add_scalar("loss", value, step)
        norms = [(f"{x.layer}: {x.name}", [get_total_norm(x.grad_outputs).item()]) for x in backwards]
        chart = bar_chart(norms, ["norm of ∂L/∂output"], "{:.3g}".format, TENSORBOARD_LENGTH)
        add_pil_image(writer, "gradient_norms", chart)


def main() -> None:
    """Run the command line. Exit status 2 for wrong arguments, 1 for a wrong gradient."""
    settings = parse_settings(Settings)
    folder, rate, digits = settings.run_dir, settings.learning_rate, settings.digits
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"{folder} cannot be written: {error.strerror}")
        if any(folder.glob("events.out.tfevents.*")):
            fail(f"{folder} already contains a run: choose another folder")
    torch.manual_seed(settings.seed)
    input = round_to_tenths(torch.randn(settings.batch_size, settings.widths[0], dtype=torch.float64))
    target = LOSSES[settings.loss](settings.batch_size, settings.widths[-1])
    model, loss = build_network(settings), getattr(manualgrad.nn, settings.loss)()

    explanation = explain(model, loss, input, target, rate=rate, digits=digits)
    losses = [*explanation.losses, *gradient_descent(model, loss, input, target, rate, settings.steps - 1)]
    more = {
        "further steps": descent_steps(losses, digits),
        "the same in Python": program_steps(model, loss, input, target),
    }
    sections = number_steps(explanation.sections | more)
    print("\n".join(to_text(sections)))
    if folder is not None:
        write_tensorboard(folder, sections, explanation.backwards, losses)
        print(f"also in TensorBoard: tensorboard --logdir {folder}")
    if explanation.wrong:
        names = ", ".join(explanation.wrong)
        sys.exit(f"error: the gradient of {names} differs from torch.nn or the finite difference")
    if not math.isfinite(losses[-1]):
        sys.exit("error: the loss is not finite; a lower --learning-rate may help")


if __name__ == "__main__":
    main()
