"""The memory that a forward saves for its backward, by layer: ``manualgrad.saved_bytes``.

Autograd saves tensors in three ways:

    saved tensors        A hook sees each one. It gives autograd an object that lives as long as autograd holds the
                         tensor, so tensors that are freed before the end do not count.
    packed tensors       A model may have its own saved-tensor hooks (CPU offloading, for example). The graph is
                         searched for what these returned.
    attributes of ctx    An autograd.Function may hold tensors there. The graph is searched for them.

Memory is counted by storage, once, for the first layer that saves it.
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
    """Measure what autograd saves for the backward of ``function(*inputs, **kwargs)``.

        print(manualgrad.saved_bytes(model, x))
        print(manualgrad.saved_bytes(lambda x: loss(model(x), target), x))
        saved_bytes(manual_model, x).compare(saved_bytes(torch_model, x)).log(writer, "saved_bytes", step)

    Args:
        function: a module or a function. The modules that it calls are the layers of the report. A function that
            torch.compile compiled as a whole is one layer.
        inputs, kwargs: its arguments. The tensors in them are reported separately, and so are parameters.

    The forward runs once, as it would without the measurement: in the model's mode (``model.train()`` or not), in
    the caller's (under ``torch.no_grad`` nothing is saved), with the model's and the caller's saved-tensor hooks.
    Then the states of torch's random generators and the modules' buffers (running statistics) are restored, also
    after an error.

    Raises:
        ValueError: a lazy module has not run yet, so its parameters have no size.
        Exception: what the function raises.
    """
    recorder = _Recorder(function)
    with recorder.recording():
        output = function(*inputs, **kwargs)
        return recorder.report(output, (inputs, kwargs))


class Layer(NamedTuple):
    """A module: its path in the model and the name of its class. The function itself has an empty path."""

    name: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.name} ({self.class_name})" if self.name not in ("", self.class_name) else self.class_name


class ReportRow(NamedTuple):
    """What one layer saves, without the layers inside it."""

    name: str
    class_name: str
    bytes: int
    share: float
    """Of the total."""


class Writer(Protocol):
    """The methods of TensorBoard's SummaryWriter that are used here."""

    def add_text(self, tag: str, text_string: str, global_step: int | None = None) -> None: ...
    def add_image(
        self, tag: str, img_tensor: Any, global_step: int | None = None, *, dataformats: str
    ) -> None: ...


class _Table:
    """A report, or two side by side, as a table and as a bar chart."""

    def columns(self) -> dict[str, SavedBytes]:
        raise NotImplementedError

    def sizes(self) -> list[tuple[Layer, list[int]]]:
        """Each layer that saves something in some column, and how much in each column."""
        columns = self.columns().values()
        layers = dict.fromkeys(layer for column in columns for layer in column.layers)
        rows = [(layer, [column.layers.get(layer, 0) for column in columns]) for layer in layers]
        return [row for row in rows if any(row[1])]

    def __str__(self) -> str:
        """A Markdown table with aligned columns."""
        columns = self.columns()
        totals = [column.total for column in columns.values()]
        rows = [*self.sizes(), ("total", totals)]
        if len(columns) == 1:
            last = ["share", *(f"{sizes[0] / max(totals[0], 1):.1%}" for _, sizes in rows)]
        else:
            last = [" / ".join(columns), *(f"{a / b:.2f}" if b else "" for _, (a, b) in rows)]
        rows.append(("plus inputs", [column.inputs for column in columns.values()]))
        rows.append(("plus parameters and buffers", [column.parameters for column in columns.values()]))
        cells = [["layer", *columns], *([str(name), *map(format_bytes, sizes)] for name, sizes in rows)]
        cells = [[*row, end] for row, end in zip(cells, [*last, "", ""], strict=True)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])])
        return "\n".join(
            f"| {first:<{widths[0]}} | {' | '.join(map(str.rjust, others, widths[1:]))} |"
            for first, *others in cells
        )

    def chart(self, for_tensorboard: bool = False) -> Image:
        """The table as a bar chart, drawn with pillow. The smallest of too many layers are one bar.

        Args:
            for_tensorboard: small enough, with few enough layers, to be read at the size that TensorBoard shows.
        """
        legend = [f"{name}: {format_bytes(column.total)}" for name, column in self.columns().items()]
        return bar_chart(
            [(str(layer), sizes) for layer, sizes in self.sizes()],
            legend,
            length=TENSORBOARD_LENGTH if for_tensorboard else 900,
            max_bars=TENSORBOARD_MAX_BARS if for_tensorboard else MAX_BARS,
        )

    def log(self, writer: Writer, tag: str = "saved_bytes", step: int | None = None) -> None:
        """Write the table to TensorBoard as text and the chart as an image."""
        writer.add_text(tag, str(self), step)
        add_pil_image(writer, tag, self.chart(for_tensorboard=True), step)


@dataclass(frozen=True)
class SavedBytes(_Table):
    """What is saved for the backward, in bytes. As a string: a table."""

    layers: Mapping[Layer, int]
    """By layer, in the order in which they ran, what it was the first to save (possibly nothing)."""
    inputs: int
    """The saved inputs of the call. They exist in any case, and so do the parameters."""
    parameters: int
    """The saved parameters and buffers, and other leaves of the graph."""

    @property
    def total(self) -> int:
        """What is in memory only for the backward: neither inputs nor parameters."""
        return sum(self.layers.values())

    @property
    def grand_total(self) -> int:
        """The total, the inputs and the parameters."""
        return self.total + self.inputs + self.parameters

    @property
    def rows(self) -> list[ReportRow]:
        """The layers that save something."""
        return [ReportRow(*layer, size, size / self.total) for layer, size in self.layers.items() if size]

    def columns(self) -> dict[str, SavedBytes]:
        return {"saved": self}

    def compare(self, other: SavedBytes, names: tuple[str, str] = ("manualgrad", "torch")) -> Comparison:
        """This report and another, layer by layer, in one table and one chart."""
        return Comparison(self, other, names)


@dataclass(frozen=True)
class Comparison(_Table):
    """Two reports side by side."""

    first: SavedBytes
    second: SavedBytes
    names: tuple[str, str]

    def columns(self) -> dict[str, SavedBytes]:
        return dict(zip(self.names, (self.first, self.second), strict=True))


# The measurement


@dataclass(eq=False)
class _Packed:
    """What autograd holds in place of a saved tensor. It is alive while autograd holds the tensor."""

    value: Any
    """The tensor, or what the outer hooks returned for it."""
    layer: Layer


class _Recorder:
    """Records what is saved, and which layer is running, while one function runs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.saved: list[weakref.ref[_Packed]] = []
        self.layers: dict[nn.Module, Layer] = {}
        self.buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []
        self.thread = threading.get_ident()
        self.running = [Layer("", getattr(function, "__name__", type(function).__name__))]
        """The stack of layers that are running."""
        self.switches: list[tuple[int, Layer]] = []
        """The sequence number of the next graph node at each change of the running layer, and that layer."""
        model = getattr(function, "__self__", function)  # of a method
        if isinstance(model, nn.Module):
            self.add_model(model, "")
            self.running = [self.layers[model]]

    @contextmanager
    def recording(self) -> Iterator[None]:
        outer = _outer_hooks()

        def pack(tensor: Tensor) -> _Packed:
            packed = _Packed(outer[0](tensor) if outer else _without_cycle(tensor), self.running[-1])
            self.saved.append(weakref.ref(packed))
            return packed

        def unpack(packed: _Packed) -> Tensor:
            return outer[1](packed.value) if outer else packed.value

        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        self.record_switch()
        with ExitStack() as stack:
            stack.callback(self.restore_buffers)
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(saved_tensors_hooks(pack, unpack))
            if not _is_compiled(self.function):  # hooks would recompile it
                # Global hooks leave the modules unchanged and see modules that are made during the forward
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
                for handle in (
                    register_module_forward_pre_hook(self.before_forward),
                    register_module_forward_hook(self.after_forward, always_call=True),
                ):
                    stack.callback(handle.remove)
            yield

    def add_model(self, model: nn.Module, name: str) -> None:
        """Name the layers of a model that has not been called before, and copy its buffers."""
        for path, module in model.named_modules():
            if module in self.layers:
                continue
            self.layers[module] = Layer(".".join(filter(None, (name, path))), type(module).__name__)
            if any(map(is_lazy, _parameters_and_buffers(module))):
                raise ValueError(f"{self.layers[module]} is lazy: run the model once before it is measured")
            for key, buffer in module._buffers.items():
                self.buffers.append((module, key, buffer, None if buffer is None else buffer.detach().clone()))

    def restore_buffers(self) -> None:
        for module, key, buffer, before in self.buffers:
            module._buffers[key] = buffer
            if buffer is not None and before is not None and not _equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)

    def before_forward(self, module: nn.Module, _: Any) -> None:
        if self.is_active():
            if module not in self.layers:
                self.add_model(module, type(module).__name__)
            self.running.append(self.layers[module])
            self.record_switch()

    def after_forward(self, *_: Any) -> None:
        if self.is_active() and len(self.running) > 1:  # it is 1 if `before_forward` raised an error
            self.running.pop()
            self.record_switch()

    def is_active(self) -> bool:
        """Hooks are ignored while torch.compile traces, and in other threads."""
        return not torch.compiler.is_compiling() and threading.get_ident() == self.thread

    def record_switch(self) -> None:
        self.switches.append((_next_sequence_number(), self.running[-1]))

    def report(self, output: Any, inputs: Any) -> SavedBytes:
        """Count what is saved, while `output` holds the graph: the address of a freed storage could be used
        again."""
        alive = [packed for reference in self.saved if (packed := reference()) is not None]
        found = [(tensor, packed.layer) for packed in alive for tensor in tensors_in(packed.value)]
        nodes = list(_graph_nodes(tensors_in(output), since=self.switches[0][0]))
        found += self.saved_by_other_means(nodes)
        leaves = [node.variable for node in nodes if hasattr(node, "variable")]
        parameters, arguments, other = (
            {key for x in tensors_in(values) for key, _ in storages(x)}
            for values in (list(map(_parameters_and_buffers, self.layers)), inputs, leaves)
        )
        arguments -= parameters
        parameters |= other - arguments
        sizes: dict[int, int] = {}
        layers = dict.fromkeys((layer for _, layer in self.switches), 0)
        for tensor, layer in found:
            for key, size in storages(tensor):
                if key not in sizes and key not in parameters | arguments:
                    layers[layer] += size
                sizes[key] = size
        return SavedBytes(
            layers,
            sum(sizes[key] for key in arguments if key in sizes),
            sum(sizes[key] for key in parameters if key in sizes),
        )

    def saved_by_other_means(self, nodes: Iterable[Any]) -> Iterator[tuple[Tensor, Layer]]:
        """The tensors in attributes of a ctx or in what another hook returned, with their layers. Those in a
        `_Packed` are found again, and their storages are counted already."""
        for node in nodes:
            i = bisect_right(self.switches, node._sequence_nr(), key=itemgetter(0))
            for tensor in tensors_in([getattr(node, "__dict__", {}), *_packed_values(node)]):
                yield tensor, self.switches[i - 1][1]


def _parameters_and_buffers(module: nn.Module) -> list[Any]:
    """Of the module itself, without its children; some may be None."""
    return [*module._parameters.values(), *module._buffers.values()]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _graph_nodes(outputs: Iterable[Tensor], since: int) -> Iterator[Any]:
    """The nodes of the graph of `outputs` with at least the sequence number `since`."""
    seen: set[Node] = set()
    pending = [x.grad_fn for x in outputs]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen and node._sequence_nr() >= since:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
            yield node


def _packed_values(node: Node) -> Iterator[Any]:
    """What saved-tensor hooks returned for the saved tensors of a node."""
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved = getattr(node, name)
            for variable in saved if isinstance(saved, (tuple, list)) else [saved]:
                if variable.unpack_hook is not None:  # a number has none
                    yield variable.data


def _without_cycle(tensor: Tensor) -> Tensor:
    """The tensor for autograd to hold. An output of the newest node is detached: it would hold the node that holds
    it, and neither would be freed."""
    node = tensor.grad_fn
    return tensor if node is None or node._sequence_nr() != _next_sequence_number() - 1 else tensor.detach()


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings, dataclasses and other containers that torch knows."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_in(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_in([getattr(leaf, field.name, None) for field in fields(leaf)])


_SPARSE_COMPONENTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}


def storages(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """The storages that a tensor holds, as address and bytes. A view holds the whole storage."""
    if is_traceable_wrapper_subclass(tensor):
        components = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    else:
        components = [getattr(tensor, name)() for name in _SPARSE_COMPONENTS.get(tensor.layout, ())]
    if components:
        for component in components:
            yield from storages(component)
    else:
        storage = tensor.untyped_storage()
        yield storage._cdata, storage.nbytes()


def _is_compiled(function: Callable[..., Any]) -> bool:
    """torch.compile compiled the function, and traces what it calls."""
    if isinstance(function, nn.Module):
        return hasattr(function, "_orig_mod") or function._compiled_call_impl is not None
    return hasattr(function, "_torchdynamo_orig_callable")


# torch's private API


_next_sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # pyright: ignore[reportPrivateImportUsage]


def _outer_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The active saved-tensor hooks. torch calls the innermost hooks only, so the recorder calls these."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]


# The chart


def format_bytes(size: float) -> str:
    """1536 as "1.5 KiB"."""
    if size < 1024:
        return f"{size} B"
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} GiB"


MAX_BARS = 50
TENSORBOARD_LENGTH, TENSORBOARD_MAX_BARS = 240, 16
"""The length of bars and the number of bars of a chart that can be read in TensorBoard, where it is 300 pixels
wide."""
_COLORS = ("#1a73e8", "#b0b6bd")


def add_pil_image(writer: Writer, tag: str, image: Image, step: int | None = None) -> None:
    """Write a pillow image to TensorBoard."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    writer.add_image(tag, pixels.view(image.height, image.width, 3), step, dataformats="HWC")


def bar_chart(
    rows: Sequence[tuple[str, Sequence[float]]],
    legend: list[str],
    label: Callable[[float], str] = format_bytes,
    length: int = 900,
    max_bars: int = MAX_BARS,
) -> Image:
    """A bar for each row and column, with its size as `label` writes it. The longest bar has `length`. If there
    are more rows than `max_bars`, the smallest ones are one bar."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise ImportError("the chart needs pillow: pip install 'manualgrad[training]'") from None
    if len(rows) > max_bars:
        order = sorted(range(len(rows)), key=lambda i: -sum(rows[i][1]))
        large, small = sorted(order[: max_bars - 1]), order[max_bars - 1 :]
        rest = [sum(column) for column in zip(*(rows[i][1] for i in small), strict=True)]
        rows = [*(rows[i] for i in large), (f"{len(small)} others", rest)]
    font, thickness, gap = ImageFont.load_default(20), 22, 14
    left = 30 + max((font.getlength(name) for name, _ in rows), default=0)
    longest = max((size for _, sizes in rows for size in sizes), default=0) or 1
    scale, row_height = length / longest, thickness * len(legend) + gap
    image = Image.new("RGB", (round(left) + length + 160, 80 + row_height * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    x = left
    for text, color in zip(legend, _COLORS, strict=False):
        draw.rectangle((x, 22, x + 18, 40), fill=color)
        draw.text((x + 26, 31), text, "black", font, anchor="lm")
        x += 60 + font.getlength(text)
    for i, (name, sizes) in enumerate(rows):
        top = 64 + i * row_height
        draw.text((left - 10, top + thickness * len(sizes) / 2), name, "#202124", font, anchor="rm")
        for size, color in zip(sizes, _COLORS, strict=False):
            draw.rectangle((left, top, left + size * scale, top + thickness - 2), fill=color)
            draw.text((left + size * scale + 8, top + thickness / 2 - 1), label(size), "#5f6368", font, "lm")
            top += thickness
    return image
