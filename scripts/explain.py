"""Backpropagation step by step: every quantity of it, for a small network and one batch.

    python scripts/explain.py                                                 2 inputs, 3 hidden units, 1 output
    python scripts/explain.py --widths 2,4,4,3 --activation Tanh --loss CrossEntropyLoss
    python scripts/explain.py --run-dir runs/explain                          the same for TensorBoard as well

The network goes forward, the loss is taken, and the autograd graph is walked back from it: at each node the
derivation of its rule, the gradient that arrives, and those that it sends on. Then the weights are moved, and
every gradient is held against torch.nn's and a finite difference. If one disagrees, the exit status is 1.
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

import manualgrad.nn
from manualgrad.meter import TENSORBOARD_LENGTH, add_pil_image, bar_chart
from manualgrad.rule import Rule, saved_by
from manualgrad.show import derivation
from manualgrad.training import CliSettings, fail, parse_settings

WIDTH = 96
"""Columns of the text."""


# What there is to choose from


def shape_keeping() -> dict[str, nn.Module]:
    """The activations of manualgrad.nn that need no settings and give a number for each."""
    found: dict[str, nn.Module] = {}
    for name in sorted(activation.__all__):
        kind = getattr(manualgrad.nn, name)
        settings = {"dim": -1} if "dim" in inspect.signature(kind).parameters else {}
        try:
            module = kind(**settings)
            fits = module(torch.zeros(1, 2)).shape == (1, 2)
        except (TypeError, ValueError):
            continue
        if fits:
            found[name] = module
    return found


def numbers(batch: int, outputs: int) -> Tensor:
    return _rounded(torch.randn(batch, outputs, dtype=torch.float64))


def zeros_and_ones(batch: int, outputs: int) -> Tensor:
    return torch.randint(2, (batch, outputs)).double()


def signs(batch: int, outputs: int) -> Tensor:
    return 2 * zeros_and_ones(batch, outputs) - 1


def classes(batch: int, outputs: int) -> Tensor:
    return torch.randint(outputs, (batch,))


def _rounded(tensor: Tensor) -> Tensor:
    """To one digit, to be followed by hand."""
    return tensor.mul(10).round().div(10)


ACTIVATIONS = shape_keeping()
LOSSES: Mapping[str, Callable[[int, int], Tensor]] = {
    **dict.fromkeys(("MSELoss", "L1Loss", "HuberLoss", "SmoothL1Loss"), numbers),
    **dict.fromkeys(("CrossEntropyLoss", "MultiMarginLoss"), classes),
    **dict.fromkeys(("BCEWithLogitsLoss", "MultiLabelSoftMarginLoss"), zeros_and_ones),
    "SoftMarginLoss": signs,
}
"""Losses of manualgrad.nn, and what makes the targets that they take."""

Few = Annotated[int, Field(gt=0, le=8)]  # more are not read by anybody


class Settings(CliSettings):
    """Backpropagation step by step: every quantity of it, for a small network and one batch."""

    widths: tuple[Few, ...] = (2, 3, 1)
    """Inputs, units of each hidden layer and outputs, at most 8 of each, as 2,3,1."""
    activation: str = "Sigmoid"
    """The activation after each hidden layer, any of manualgrad.nn that needs no settings."""
    loss: str = "MSELoss"
    """The loss: MSELoss, L1Loss, HuberLoss, SmoothL1Loss, CrossEntropyLoss and others."""
    batch_size: Few = 4
    """Examples in the batch, at most 8."""
    learning_rate: PositiveFloat = 0.5
    """How far gradient descent goes down the gradient."""
    steps: PositiveInt = 10
    """Updates on the same batch; the first is told in full."""
    seed: NonNegativeInt = 0
    """Decides the batch and the initial weights."""
    digits: Annotated[int, Field(gt=0, le=6)] = 4
    """Digits after the point."""
    run_dir: Path | None = None
    """The folder for TensorBoard; None writes nothing."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        for option, name, names in (("activation", self.activation, ACTIVATIONS), ("loss", self.loss, LOSSES)):
            if name not in names:
                raise ValueError(f"--{option}: there is {', '.join(names)} (got {name})")
        if len(self.widths) < 2:
            raise ValueError("--widths: a network has at least inputs and outputs, as 2,1")
        if LOSSES[self.loss] is classes and self.widths[-1] == 1:
            raise ValueError(f"--loss {self.loss} chooses between the outputs: --widths must end in 2 or more")
        return self


def network(settings: Settings) -> nn.Module:
    """Linear layers with the activation between them, in float64."""
    modules: dict[str, nn.Module] = {}
    for number, (inputs, outputs) in enumerate(pairwise(settings.widths), start=1):
        if modules:
            modules[f"activation{number - 1}"] = deepcopy(ACTIVATIONS[settings.activation])
        modules[f"linear{number}"] = manualgrad.nn.Linear(inputs, outputs)
    return nn.Sequential(OrderedDict(modules)).double()


# What happens


class Layer(NamedTuple):
    """A module that has run: what went in, its parameters, what came out, and its nodes in the graph."""

    name: str
    module: nn.Module
    tensors: dict[str, Tensor]
    nodes: list[Any]


class Arrow(NamedTuple):
    """A gradient that a node sends."""

    of: str
    """The name of the input that it is the gradient of."""
    to: str
    """The layer or the parameter that it goes to."""
    grad: Tensor


class Passage(NamedTuple):
    """What the backward did at one node of the graph."""

    layer: str
    name: str
    rule: type[Rule] | None
    arrived: list[Tensor]
    """∂L/∂output; of more than one output that of each."""
    used: dict[str, Tensor]
    """What was kept for it, and what its formulas share."""
    sent: list[Arrow]


def run(model: nn.Module, loss: nn.Module, input: Tensor, target: Tensor) -> Tensor:
    """The loss, with the same draws each time where the network draws (RReLU)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return loss(model(input), target)


def run_forward(model: nn.Module, loss: nn.Module, input: Tensor, target: Tensor) -> tuple[Tensor, list[Layer]]:
    """The loss, and the layers in the order in which they ran."""
    layers: list[Layer] = []

    def seen(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        tensors = dict(zip(inspect.signature(module.forward).parameters, args, strict=False))
        tensors |= dict(module.named_parameters(recurse=False)) | {"output": output}
        before = [node for x in args if isinstance(x, Tensor) for node in behind(x.grad_fn, ())]
        shown = {key: value.detach().clone() for key, value in tensors.items() if isinstance(value, Tensor)}
        layers.append(Layer(name, module, shown, behind(output.grad_fn, before)))

    modules = [*model.named_modules(), *loss.named_modules(prefix="loss")]
    hooks = [
        module.register_forward_hook(partial(seen, name))
        for name, module in modules
        if next(module.children(), None) is None
    ]
    value = run(model, loss, input, target)
    for hook in hooks:
        hook.remove()
    return value, layers


def behind(node: Any, before: Iterable[Any]) -> list[Any]:
    """The nodes of the graph from `node` back to those `before`, the first first; not the leaves."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if node is not None and not hasattr(node, "variable") and node not in before and node not in found:
            for earlier, _ in node.next_functions:
                visit(earlier)
            found.append(node)

    visit(node)
    return found


def run_backward(model: nn.Module, value: Tensor, layers: list[Layer]) -> list[Passage]:
    """Call ``value.backward()``, and tell what it did at each node, in the order in which it came there."""
    owners = {node: layer.name for layer in layers for node in layer.nodes}
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    passages: list[Passage] = []

    def place(node: Any) -> str:
        if hasattr(node, "variable"):
            return parameters.get(id(node.variable), "a leaf")
        return owners.get(node, "the model")

    def seen(node: Any, known: Any, sent: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]) -> None:
        arrived = [grad.detach().clone() for grad in grads if grad is not None]
        edges = [(to, grad) for (to, _), grad in zip(node.next_functions, sent, strict=True) if to is not None]
        if known is None:
            rule, used = None, {}
            names = ["input"] if len(edges) == 1 else [f"input {i}" for i, _ in enumerate(edges, start=1)]
        else:
            rule, kept = known
            names = list(compress(inspect.signature(rule.forward).parameters, node.needs_input_grad))
            used = quantities(rule, kept, arrived[0], names)
        arrows = [
            Arrow(name, label(to) if place(to) == place(node) else place(to), grad.detach().clone())
            for name, (to, grad) in zip(names, edges, strict=True)
            if grad is not None
        ]
        passages.append(Passage(place(node), label(node), rule, arrived, used, arrows))

    for node in behind(value.grad_fn, ()):
        node.register_hook(partial(seen, node, saved_by(node)))
    value.backward()
    return passages


def label(node: Any) -> str:
    """MSELossFunction of MSELossFunctionBackward, Mean of MeanBackward0."""
    return node.name().partition("Backward")[0]


@torch.no_grad()
def quantities(rule: type[Rule], kept: Mapping[str, Any], grad: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """What the gradients of these inputs are computed from, by name: what is kept, then what is computed of it."""
    known = dict(kept) | {"grad": grad}

    def parameters(method: str) -> Iterable[str]:
        return inspect.signature(getattr(rule, method)).parameters

    def find(name: str) -> Any:
        if name not in known:
            known[name] = getattr(rule, name)(*map(find, parameters(name)))
        value = known[name]
        return value.clone() if isinstance(value, Tensor) else value  # a formula may write over what it is given

    for gradient in (f"grad_{name}" for name in names):
        for name in parameters(gradient):
            if not name.startswith("grad_"):
                find(name)
    return {name: find(name) for name, value in known.items() if isinstance(value, Tensor) and name != "grad"}


class Checked(NamedTuple):
    """The gradient of a parameter by hand, and by its two judges; each of the parameter's shape."""

    name: str
    by_hand: Tensor
    torchs: Tensor
    finite: Tensor

    def agrees(self, size: float) -> Tensor:
        """Which numbers agree, up to what a finite difference of a loss of this size rounds; nan with nothing."""
        judges = (self.torchs, self.finite)
        allowed = 1e-6 * max(x.abs().max().item() for x in judges) + 1e-9 * (1 + abs(size))
        return torch.stack([(self.by_hand - x).abs() <= allowed for x in judges]).all(0)


def check(model: nn.Module, loss: nn.Module, input: Tensor, target: Tensor) -> list[Checked]:
    """The gradients that the parameters hold, beside those of the same network in plain torch.nn and beside
    (L(w + h) - L(w - h)) / 2h for each number w."""
    torchs, torchs_loss = manualgrad.revert(deepcopy(model)), manualgrad.revert(deepcopy(loss))
    torchs.zero_grad()
    value = run(torchs, torchs_loss, input, target)
    if ours := [label(node) for node in behind(value.grad_fn, ()) if saved_by(node)]:
        raise RuntimeError(f"the network in torch.nn still calls {ours[0]}")
    value.backward()
    return [
        Checked(
            name,
            _grad(parameter),
            _grad(theirs),
            finite_difference(partial(run, model, loss, input, target), parameter),
        )
        for (name, parameter), theirs in zip(model.named_parameters(), torchs.parameters(), strict=True)
    ]


def _grad(parameter: Tensor) -> Tensor:
    """Zero for one that no gradient has come to."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


@torch.no_grad()
def finite_difference(value: Callable[[], Tensor], parameter: Tensor, h: float = 1e-6) -> Tensor:
    """Of `value` by each number of a parameter, which is put back to the bit."""
    found = torch.empty_like(parameter)
    numbers, slopes = parameter.view(-1), found.view(-1)
    for i, number in enumerate(numbers.tolist()):
        numbers[i] = number + h
        above = value()
        numbers[i] = number - h
        slopes[i] = (above - value()) / (2 * h)
        numbers[i] = number
    return found


# How it is told

INTRODUCTION = """\
In the derivations x is the input, W the weight, b the bias and y the output of a layer, t the
target, and g the gradient that arrives, ∂L/∂y. A row of input or output is an example.
"""


class Step(NamedTuple):
    """A heading, and text under it."""

    heading: str
    text: str


def form(size: float, digits: int) -> str:
    """How to write numbers up to this size: so many digits after the point, or in all with an exponent."""
    return f"z.{digits}f" if size == 0 or 10 ** (1 - digits) <= size < 1e6 else f".{digits - 1}e"


def matrix(title: str, tensor: Tensor, digits: int) -> list[str]:
    """The lines of a block: the title, and the numbers in columns below it."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
    if rows.is_floating_point():
        style = form(rows.abs().max().item(), digits)
    else:
        rows, style = rows.long(), "d"
    cells = [[format(x, style) for x in row] for row in rows.tolist()]
    width = max(len(cell) for row in cells for cell in row)
    return [title, *("  ".join(cell.rjust(width) for cell in row) for row in cells)]


def side_by_side(tensors: Mapping[str, Tensor], digits: int) -> str:
    """Blocks in rows that are not wider than the page."""
    rows: list[list[list[str]]] = [[]]
    taken = 0
    for title, tensor in tensors.items():
        block = matrix(title, tensor, digits)
        width = max(map(len, block))
        if rows[-1] and taken + width > WIDTH:
            rows.append([])
            taken = 0
        taken += width + 4
        rows[-1].append([line.ljust(width + 4) for line in block])
    return "\n\n".join(map(_joined, rows))


def _joined(blocks: list[list[str]]) -> str:
    lines = zip_longest(*blocks)
    widths = [len(block[0]) for block in blocks]
    return "\n".join(
        "".join((x or "").ljust(n) for x, n in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def told_forward(layers: list[Layer], digits: int) -> list[Step]:
    """A step for each layer: its formula, what goes in, its parameters, what comes out."""
    steps = []
    for name, module, tensors, nodes in layers:
        reduction = f", reduction {module.reduction!r}" if hasattr(module, "reduction") else ""
        text = "\n".join(map(formula, nodes)) + "\n\n" + side_by_side(tensors, digits)
        steps.append(Step(f"{name}: {module}{reduction}", text))
    return steps


def formula(node: Any) -> str:
    """How the derivation begins; of a node of torch's own its name."""
    found = saved_by(node)
    return label(node) if found is None else derivation(found[0]).partition("\n")[0].partition("      ")[0]


def told_backward(passages: list[Passage], digits: int) -> list[Step]:
    """A step for each node: the derivation, what arrives and what is used, and the gradients that it sends."""
    steps = []
    for layer, name, rule, arrived, used, sent in passages:
        if rule is None:
            text, where = "Plain arithmetic or movement, which is torch's own.", ""
        else:
            text, where = derivation(rule), f"  ({rule.__module__})"
        counts = [""] if len(arrived) == 1 else [f" {i}" for i, _ in enumerate(arrived, start=1)]
        grads = {f"g = ∂L/∂output{count}": grad for count, grad in zip(counts, arrived, strict=True)}
        arrives = side_by_side(grads | used, digits)
        sends = side_by_side({f"∂L/∂{of} → {to}": grad for of, to, grad in sent}, digits)
        steps.append(Step(f"{layer}: {name}{where}", f"{text}\n\n{arrives}\n\n{sends}"))
    return steps


def told_update(
    before: Mapping[str, Tensor], model: nn.Module, rate: float, losses: tuple[float, float], digits: int
) -> list[Step]:
    """A step for each parameter, and one for what came of them."""
    steps = [
        Step(
            f"{name}: w - {rate:g} ∂L/∂w",
            side_by_side({"w": before[name], "∂L/∂w": _grad(parameter), "new w": parameter.detach()}, digits),
        )
        for name, parameter in model.named_parameters()
    ]
    before_and_after = "{} before, {} after".format(*(format(x, form(x, digits + 2)) for x in losses))
    return [*steps, Step("the loss on the same batch", before_and_after)]


def told_check(checked: list[Checked], size: float) -> list[Step]:
    """A row for each number, then the largest differences."""
    rows = [["gradient of", "by hand", "torch.nn", "finite difference", ""]]
    for one in checked:
        name, *gradients = one
        agrees = one.agrees(size).flatten().tolist()
        places = map(list, product(*map(range, one.by_hand.shape)))
        for place, good, *numbers in zip(places, agrees, *(x.flatten().tolist() for x in gradients), strict=True):
            rows.append([f"{name}{place}", *(f"{x:z.8f}" for x in numbers), "" if good else "  disagrees"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [f"{row[0]:{widths[0]}}  {'  '.join(map(str.rjust, row[1:4], widths[1:4]))}{row[4]}" for row in rows]
    apart = [
        max((x.by_hand - getattr(x, judge)).abs().max().item() for x in checked) for judge in ("torchs", "finite")
    ]
    differences = "largest difference: from torch.nn {:.1e}, from the finite difference {:.1e}".format(*apart)
    return [Step("each gradient and its two judges", "\n".join(table) + f"\n\n{differences}")]


Chapters = dict[str, list[Step]]


class Lesson(NamedTuple):
    """One update of a network, told."""

    chapters: Chapters
    passages: list[Passage]
    losses: tuple[float, float]
    """Before and after."""
    wrong: list[str]
    """Parameters whose gradient disagrees with a judge."""


def explain(
    model: nn.Module, loss: nn.Module, input: Tensor, target: Tensor, *, rate: float = 0.5, digits: int = 4
) -> Lesson:
    """Tell one step of gradient descent, and take it.

    Args:
        model: any small module of ours, in float64; a layer inside it takes and gives tensors.
        loss: a loss of ours, a scalar.
        input, target: what they take.
        rate: the learning rate.
        digits: after the point.
    """
    model.zero_grad()
    value, layers = run_forward(model, loss, input, target)
    forward = told_forward(layers, digits)  # while the graph still holds what it has kept
    passages = run_backward(model, value, layers)
    checked = check(model, loss, input, target)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.optim.SGD(model.parameters(), rate).step()
    losses = value.item(), run(model, loss, input, target).item()
    chapters = {
        "forward, from the input to the loss": forward,
        "backward, from the loss to the input": told_backward(passages, digits),
        "the update": told_update(before, model, rate, losses, digits),
        "the check": told_check(checked, losses[0]),
    }
    wrong = [one.name for one in checked if not one.agrees(losses[0]).all()]
    return Lesson(chapters, passages, losses, wrong)


def descend(
    model: nn.Module, loss: nn.Module, input: Tensor, target: Tensor, rate: float, steps: int
) -> Iterator[float]:
    """Take so many steps more on the same batch: the loss after each."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model, loss, input, target).backward()
        optimizer.step()
        yield run(model, loss, input, target).item()


def told_descent(losses: list[float], digits: int) -> list[Step]:
    """The loss after about ten of the steps, the last among them."""
    every = math.ceil((len(losses) - 1) / 10)
    shown = [*range(0, len(losses) - 1, every), len(losses) - 1]
    width = len(str(shown[-1]))
    lines = [f"{i:{width}}  {format(losses[i], form(losses[i], digits + 2))}" for i in shown]
    return [Step("the loss after each step", "\n".join(lines))]


def numbered(chapters: Chapters) -> Chapters:
    """The same with the steps counted through all chapters."""
    number = count(1)
    return {
        title: [Step(f"{next(number)}. {heading}", text) for heading, text in steps]
        for title, steps in chapters.items()
    }


def page(chapters: Chapters) -> Iterator[str]:
    """The lesson as text."""
    yield INTRODUCTION
    for title, steps in chapters.items():
        yield f"{title.upper()}\n{'=' * WIDTH}\n"
        for heading, text in steps:
            yield f"{heading}\n{'-' * len(heading)}\n{text}\n"


def log(folder: Path, chapters: Chapters, passages: list[Passage], losses: list[float]) -> None:
    """The lesson for TensorBoard: a text card for each chapter, the curve of the loss, and a picture of how
    large the gradient is that arrives at each node, from the loss back to the input."""
    with SummaryWriter(folder) as writer:
        for number, (title, steps) in enumerate(chapters.items(), start=1):
            card = [f"#### {heading}\n\n{indent(text, ' ' * 4)}" for heading, text in steps]
            if number <= 2:  # where there are derivations
                card.insert(0, INTRODUCTION)
            name = title.partition(",")[0].replace(" ", "_")
            writer.add_text(f"lesson/{number}_{name}", "\n\n".join(card))
        for step, value in enumerate(losses):
            writer.add_scalar("loss", value, step)
        norms = [(f"{x.layer}: {x.name}", [get_total_norm(x.arrived).item()]) for x in passages]
        picture = bar_chart(norms, ["norm of the gradient that arrives"], "{:.3g}".format, TENSORBOARD_LENGTH)
        add_pil_image(writer, "gradient_norms", picture)


def main() -> None:
    """The command line: wrong input ends it with one line and status 2, a gradient that is wrong with status 1."""
    settings = parse_settings(Settings)
    folder, rate, digits = settings.run_dir, settings.learning_rate, settings.digits
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"{folder} cannot be written: {error.strerror}")
        if any(folder.glob("events.out.tfevents.*")):
            fail(f"{folder} holds a run already: take another folder")
    torch.manual_seed(settings.seed)
    input = _rounded(torch.randn(settings.batch_size, settings.widths[0], dtype=torch.float64))
    target = LOSSES[settings.loss](settings.batch_size, settings.widths[-1])
    model, loss = network(settings), getattr(manualgrad.nn, settings.loss)()

    lesson = explain(model, loss, input, target, rate=rate, digits=digits)
    losses = [*lesson.losses, *descend(model, loss, input, target, rate, settings.steps - 1)]
    chapters = numbered(lesson.chapters | {"the descent": told_descent(losses, digits)})
    print("\n".join(page(chapters)))
    if folder is not None:
        log(folder, chapters, lesson.passages, losses)
        print(f"the same with pictures: tensorboard --logdir {folder}")
    if lesson.wrong:
        names = ", ".join(lesson.wrong)
        sys.exit(f"error: the gradient of {names} disagrees with torch.nn or the finite difference")
    if not math.isfinite(losses[-1]):
        sys.exit("error: the loss has grown beyond all numbers; a lower --learning-rate may help")


if __name__ == "__main__":
    main()
