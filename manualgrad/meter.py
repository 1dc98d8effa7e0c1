"""What a forward keeps for its backward, layer by layer: ``manualgrad.saved_bytes``.

Tensors are kept in three ways, and each is looked into:

    saved tensors    a hook sees each as it is saved. What it hands to autograd instead lives exactly as long as
                     autograd holds it, so what is let go before the end does not count.
    under a hook     of the model's own (offloading to the CPU, say): the graph is asked for what that hook made
    on a ctx         of a Function that keeps them there itself: the graph is walked

Memory is counted by storage, each once, for the layer that was the first to keep it.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from PIL.Image import Image


def saved_bytes(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> SavedBytes:
    """What autograd keeps for the backward of ``function(*inputs, **kwargs)``.

        print(manualgrad.saved_bytes(model, x))
        print(manualgrad.saved_bytes(lambda x: loss(model(x), target), x))
        saved_bytes(ours, x).beside(saved_bytes(torchs, x)).log(writer, "saved_bytes", step)

    Args:
        function: a module, or any function; the modules that it calls are told apart in either case. One that
            torch.compile made of the whole is one layer.
        inputs, kwargs: its arguments. Tensors among them are counted apart, as are the modules' parameters.

    The forward runs once, as it would by itself: in the model's mode (``model.train()`` or not) and the caller's
    (under ``torch.no_grad`` nothing is kept), the model's own saved-tensor hooks and the caller's in force.
    Afterwards torch's random generators and the modules' buffers (running statistics) are what they were.

    Raises:
        ValueError: for a lazy module that has not run yet: its parameters have no size.
        Whatever the function raises; everything is put back before.
    """
    meter = _Meter(function)
    with meter.watching():
        output = function(*inputs, **kwargs)
        return meter.report(output, (inputs, kwargs))


class Layer(NamedTuple):
    """A module by its path in the model and its class; the function itself has no path."""

    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})" if self.name not in ("", self.kind) else self.kind


class Row(NamedTuple):
    """What one layer keeps, the layers inside it apart."""

    name: str
    kind: str
    bytes: int
    share: float
    """Of the total."""


class Writer(Protocol):
    """What is asked of TensorBoard's SummaryWriter."""

    def add_text(self, tag: str, text_string: str, global_step: int | None = None) -> None: ...
    def add_image(
        self, tag: str, img_tensor: Any, global_step: int | None = None, *, dataformats: str
    ) -> None: ...


class _Shown:
    """A report, or several side by side, as a table and as a picture."""

    def columns(self) -> dict[str, SavedBytes]:
        raise NotImplementedError

    def lines(self) -> list[tuple[Layer, list[int]]]:
        """Each layer that keeps something in any column, and how much in each."""
        columns = self.columns().values()
        layers = dict.fromkeys(layer for column in columns for layer in column.layers)
        lines = [(layer, [column.layers.get(layer, 0) for column in columns]) for layer in layers]
        return [line for line in lines if any(line[1])]

    def __str__(self) -> str:
        """A table in Markdown, laid out to be read as it is."""
        columns = self.columns()
        totals = [column.total for column in columns.values()]
        parts = [*self.lines(), ("total", totals)]
        if len(columns) == 1:
            last = ["share", *(f"{sizes[0] / max(totals[0], 1):.1%}" for _, sizes in parts)]
        else:
            last = [" / ".join(columns), *(f"{a / b:.2f}" if b else "" for _, (a, b) in parts)]
        parts.append(("apart: inputs", [column.inputs for column in columns.values()]))
        parts.append(("apart: parameters and buffers", [column.parameters for column in columns.values()]))
        cells = [["layer", *columns], *([str(name), *map(readable, sizes)] for name, sizes in parts)]
        cells = [[*row, end] for row, end in zip(cells, [*last, "", ""], strict=True)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])])
        return "\n".join(
            f"| {first:<{widths[0]}} | {' | '.join(map(str.rjust, others, widths[1:]))} |"
            for first, *others in cells
        )

    def figure(self, shrunk: bool = False) -> Image:
        """The table as a picture: a bar for each layer; of many layers the smallest together.

        With `shrunk` small enough, and the layers few enough, to be read where TensorBoard shows it.

        Drawn by pillow, which TensorBoard needs for any picture and brings along.
        """
        columns = self.columns()
        legend = [f"{name}: {readable(column.total)}" for name, column in columns.items()]
        return bars(
            [(str(layer), sizes) for layer, sizes in self.lines()],
            legend,
            length=SHRUNK if shrunk else 900,
            most=FEW if shrunk else MOST_BARS,
        )

    def log(self, writer: Writer, tag: str = "saved_bytes", step: int | None = None) -> None:
        """Give TensorBoard the table as a text card and the picture as an image."""
        writer.add_text(tag, str(self), step)
        add_picture(writer, tag, self.figure(shrunk=True), step)


@dataclass(frozen=True)
class SavedBytes(_Shown):
    """What is kept for backward, in bytes; ``print`` shows it as a table."""

    layers: Mapping[Layer, int]
    """What each layer was the first to keep (it may be nothing), in the order in which they ran."""
    inputs: int
    """The inputs of the call that are kept. They are there in any case, as are the parameters."""
    parameters: int
    """The parameters and buffers that are kept, and whatever else is a leaf of the graph."""

    @property
    def total(self) -> int:
        """What is there for the backward alone: neither inputs nor parameters."""
        return sum(self.layers.values())

    @property
    def everything(self) -> int:
        """The total, the inputs and the parameters."""
        return self.total + self.inputs + self.parameters

    @property
    def rows(self) -> list[Row]:
        """The layers that keep something."""
        return [Row(*layer, size, size / self.total) for layer, size in self.layers.items() if size]

    def columns(self) -> dict[str, SavedBytes]:
        return {"kept": self}

    def beside(self, other: SavedBytes, names: tuple[str, str] = ("ours", "torch")) -> Comparison:
        """This report and another as one table and one picture, layer beside layer."""
        return Comparison(self, other, names)


@dataclass(frozen=True)
class Comparison(_Shown):
    """Two reports side by side."""

    one: SavedBytes
    other: SavedBytes
    names: tuple[str, str]

    def columns(self) -> dict[str, SavedBytes]:
        return dict(zip(self.names, (self.one, self.other), strict=True))


# The count


@dataclass(eq=False)
class _Kept:
    """What autograd is given to keep in a tensor's place; its life tells whether autograd still does."""

    packed: Any
    """The tensor, or what the hooks in force made of it."""
    layer: Layer


class _Meter:
    """Sees what is saved, and which layer is running, while one function runs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.saved: list[weakref.ref[_Kept]] = []
        self.layers: dict[nn.Module, Layer] = {}
        self.buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []
        self.thread = threading.get_ident()
        self.running = [Layer("", getattr(function, "__name__", type(function).__name__))]
        self.moments: list[tuple[int, Layer]] = []
        """From which node of the graph on which layer was running."""
        model = getattr(function, "__self__", function)  # of a method
        if isinstance(model, nn.Module):
            self.meet(model, "")
            self.running = [self.layers[model]]

    @contextmanager
    def watching(self) -> Iterator[None]:
        outer = _outer_hooks()

        def pack(tensor: Tensor) -> _Kept:
            kept = _Kept(outer[0](tensor) if outer else _held(tensor), self.running[-1])
            self.saved.append(weakref.ref(kept))
            return kept

        def unpack(kept: _Kept) -> Tensor:
            return outer[1](kept.packed) if outer else kept.packed

        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        self.mark()
        with ExitStack() as stack:
            stack.callback(self.restore)
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(saved_tensors_hooks(pack, unpack))
            if not _compiled(self.function):  # it would be compiled anew, with the hooks
                # of all modules: none is touched, and one made on the way is seen
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
                for handle in (
                    register_module_forward_pre_hook(self.enter),
                    register_module_forward_hook(self.leave, always_call=True),
                ):
                    stack.callback(handle.remove)
            yield

    def meet(self, model: nn.Module, name: str) -> None:
        """A model that is seen for the first time: name its layers, and remember its buffers."""
        for path, module in model.named_modules():
            if module in self.layers:
                continue
            self.layers[module] = Layer(".".join(filter(None, (name, path))), type(module).__name__)
            if any(map(is_lazy, _state(module))):
                raise ValueError(f"{self.layers[module]} is lazy: run the model once before it is measured")
            for key, buffer in module._buffers.items():
                self.buffers.append((module, key, buffer, None if buffer is None else buffer.detach().clone()))

    def restore(self) -> None:
        for module, key, buffer, before in self.buffers:
            module._buffers[key] = buffer
            if buffer is not None and before is not None and not _same(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)

    def enter(self, module: nn.Module, _: Any) -> None:
        if self.on_duty():
            if module not in self.layers:
                self.meet(module, type(module).__name__)
            self.running.append(self.layers[module])
            self.mark()

    def leave(self, *_: Any) -> None:
        if self.on_duty() and len(self.running) > 1:  # unless `enter` has raised
            self.running.pop()
            self.mark()

    def on_duty(self) -> bool:
        """Not in the middle of compiling, nor in another thread, whose modules are its own."""
        return not torch.compiler.is_compiling() and threading.get_ident() == self.thread

    def mark(self) -> None:
        self.moments.append((_next_number(), self.running[-1]))

    def report(self, output: Any, inputs: Any) -> SavedBytes:
        """Counts while `output` holds the graph, so that no storage is counted under another's address."""
        alive = [kept for reference in self.saved if (kept := reference()) is not None]
        found = [(tensor, kept.layer) for kept in alive for tensor in tensors(kept.packed)]
        nodes = list(_graph(tensors(output), since=self.moments[0][0]))
        found += self.found_in(nodes)
        leaves = [node.variable for node in nodes if hasattr(node, "variable")]
        parameters, given, other = (
            {key for x in tensors(part) for key, _ in storages(x)}
            for part in (list(map(_state, self.layers)), inputs, leaves)
        )
        given -= parameters
        parameters |= other - given
        sizes: dict[int, int] = {}
        layers = dict.fromkeys((layer for _, layer in self.moments), 0)
        for tensor, layer in found:
            for key, size in storages(tensor):
                if key not in sizes and key not in parameters | given:
                    layers[layer] += size
                sizes[key] = size
        return SavedBytes(
            layers,
            sum(sizes[key] for key in given if key in sizes),
            sum(sizes[key] for key in parameters if key in sizes),
        )

    def found_in(self, nodes: Iterable[Any]) -> Iterator[tuple[Tensor, Layer]]:
        """The tensors that hang on a ctx, or that a hook has packed (ours have been found), with their layers."""
        for node in nodes:
            i = bisect_right(self.moments, node._sequence_nr(), key=itemgetter(0))
            for tensor in tensors([getattr(node, "__dict__", {}), *_packed(node)]):
                yield tensor, self.moments[i - 1][1]


def _state(module: nn.Module) -> list[Any]:
    """Its own parameters and buffers (some may be None)."""
    return [*module._parameters.values(), *module._buffers.values()]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _graph(outputs: Iterable[Tensor], since: int) -> Iterator[Any]:
    """The nodes behind `outputs`, of those that were made `since`."""
    seen: set[Node] = set()
    found = [x.grad_fn for x in outputs]
    while found:
        node = found.pop()
        if node is not None and node not in seen and node._sequence_nr() >= since:
            seen.add(node)
            found += [following for following, _ in node.next_functions]
            yield node


def _packed(node: Node) -> Iterator[Any]:
    """What the hooks have packed for a node."""
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved = getattr(node, name)
            for variable in saved if isinstance(saved, (tuple, list)) else [saved]:
                if variable.unpack_hook is not None:  # a mere number has none
                    yield variable.data


def _held(tensor: Tensor) -> Tensor:
    """The tensor for autograd to hold: itself. But an output of the node that saves it, the newest, would hold the
    node, and neither would ever be let go."""
    node = tensor.grad_fn
    return tensor if node is None or node._sequence_nr() != _next_number() - 1 else tensor.detach()


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings, dataclasses, and what else torch takes for a container."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors([getattr(leaf, field.name, None) for field in fields(leaf)])


_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}


def storages(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """The memory that a tensor holds, all of it, however little of it the tensor shows: address and bytes."""
    if is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    else:
        parts = [getattr(tensor, name)() for name in _PARTS.get(tensor.layout, ())]
    if parts:
        for part in parts:
            yield from storages(part)
    else:
        storage = tensor.untyped_storage()
        yield storage._cdata, storage.nbytes()


def _compiled(function: Callable[..., Any]) -> bool:
    """torch.compile made it, and will trace whatever it calls."""
    if isinstance(function, nn.Module):
        return hasattr(function, "_orig_mod") or function._compiled_call_impl is not None
    return hasattr(function, "_torchdynamo_orig_callable")


# What torch keeps private


_next_number: Callable[[], int] = torch.autograd._get_sequence_nr  # pyright: ignore[reportPrivateImportUsage]


def _outer_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The saved-tensor hooks in force. Only the innermost are called, so ours have to call them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]


# The picture


def readable(size: float) -> str:
    """1536 as "1.5 KiB"."""
    if size < 1024:
        return f"{size} B"
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} GiB"


MOST_BARS = 50
SHRUNK, FEW = 240, 16
"""A length of bars, and how many, whose picture can be read where TensorBoard shows it, some 300 pixels wide."""
_COLOURS = ("#1a73e8", "#b0b6bd")


def add_picture(writer: Writer, tag: str, picture: Image, step: int | None = None) -> None:
    """Give TensorBoard a picture."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    writer.add_image(tag, pixels.view(picture.height, picture.width, 3), step, dataformats="HWC")


def bars(
    parts: Sequence[tuple[str, Sequence[float]]],
    legend: list[str],
    label: Callable[[float], str] = readable,
    length: int = 900,
    most: int = MOST_BARS,
) -> Image:
    """A bar for each part and column, to one scale, and its size as `label` says it; the longest has `length`. Of
    more than `most` parts the smallest are one."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise ImportError("the picture needs pillow: pip install 'manualgrad[examples]'") from None
    if len(parts) > most:
        order = sorted(range(len(parts)), key=lambda i: -sum(parts[i][1]))
        large, small = sorted(order[: most - 1]), order[most - 1 :]
        rest = [sum(column) for column in zip(*(parts[i][1] for i in small), strict=True)]
        parts = [*(parts[i] for i in large), (f"{len(small)} others", rest)]
    font, thick, gap = ImageFont.load_default(20), 22, 14
    left = 30 + max((font.getlength(name) for name, _ in parts), default=0)
    longest = max((size for _, sizes in parts for size in sizes), default=0) or 1
    scale, line = length / longest, thick * len(legend) + gap
    picture = Image.new("RGB", (round(left) + length + 160, 80 + line * len(parts)), "white")
    draw = ImageDraw.Draw(picture)
    x = left
    for words, colour in zip(legend, _COLOURS, strict=False):
        draw.rectangle((x, 22, x + 18, 40), fill=colour)
        draw.text((x + 26, 31), words, "black", font, anchor="lm")
        x += 60 + font.getlength(words)
    for row, (name, sizes) in enumerate(parts):
        top = 64 + row * line
        draw.text((left - 10, top + thick * len(sizes) / 2), name, "#202124", font, anchor="rm")
        for size, colour in zip(sizes, _COLOURS, strict=False):
            draw.rectangle((left, top, left + size * scale, top + thick - 2), fill=colour)
            draw.text((left + size * scale + 8, top + thick / 2 - 1), label(size), "#5f6368", font, "lm")
            top += thick
    return picture
