"""Capture a model as a list of steps: which rules it applies, to what, and the torch functions that compute them.

`torch.export` gives a graph of torch's operators as the model calls them (``linear``, ``layer_norm``, ``gelu``).
Each operator is called with fake tensors. If a gradient flows through it, manualgrad's function of the same name
runs, which checks its arguments and applies rules. Each application of a rule is a `Step`. An operator through
which no gradient flows (masks, positions, counters) is a step without a rule.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from manualgrad import registry
from manualgrad.ops import elementwise, views
from manualgrad.override import override_by_schema
from manualgrad.program.trace import Call, Trace, Variable, function_name, is_inplace, variables
from manualgrad.rule import Rule, dispatch


class UnsupportedOperators(NotImplementedError):
    """The model calls operators that no rule covers. The message lists all of them, with the modules that call
    them."""


@dataclass
class Step:
    """One application of a rule, or one call of a torch function without a gradient."""

    module: str
    """The path of the module in the model."""
    operator: str
    rule: type[Rule] | None
    inputs: dict[str, Any]
    """The arguments of the rule by name, with a `Variable` for each tensor."""
    output: Variable | None
    statistics: dict[str, Variable]
    calls: list[Call]
    """They compute the output and the statistics."""

    @property
    def needed(self) -> list[str]:
        """The inputs for which a gradient is needed."""
        if self.rule is None:
            return []
        formulas = self.rule.implementation.spec.formulas
        return [
            name
            for name, value in self.inputs.items()
            if isinstance(value, Variable) and value.needs_grad and f"grad_{name}" in formulas
        ]


_STRUCTURAL = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "transpose",
        "t",
        "permute",
        "expand",
        "select",
        "slice",
        "contiguous",
        "to",
        "float",
        "unbind",
        "split",
        "chunk",
        "narrow",
        "clone",
        "movedim",
        "swapaxes",
    ]
)


def is_structural(step: Step) -> bool:
    """The step moves or copies numbers and computes none. Its line may be joined with the next one."""
    return step.operator.strip("_") in _STRUCTURAL


@dataclass
class Graph:
    """A captured model."""

    steps: list[Step]
    state: dict[str, Variable]
    """Parameters and buffers by their names in the model."""
    inputs: list[Variable]
    outputs: list[Any]
    """Variables, or constants."""
    trace: Trace
    exported: ExportedProgram
    modules: dict[str, str]
    """The class of each module, by its path."""
    symbols: dict[str, str] = field(default_factory=dict)
    """By the symbol of a dynamic size: its name."""
    constants: dict[Variable, Tensor] = field(default_factory=dict)
    """Tensors that the model creates from numbers."""

    @property
    def calls(self) -> list[Call]:
        return [call for step in self.steps for call in step.calls]


WITHOUT_GRADIENT = frozenset(
    [
        "detach",
        "detach_",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "sign",
        "floor",
        "ceil",
        "round",
        "trunc",
        "lift_fresh_copy",
        "lift_fresh",
        "alias_copy",
        "fill",
        "zero",
    ]
)
"""Their outputs have no gradient, or the gradient is zero."""

_IGNORED = frozenset(
    [
        "_assert_tensor_metadata",
        "_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_assert_async",
    ]
)
_ALIASES = {
    "__radd__": "add",
    "__rmul__": "mul",
    "__rsub__": "rsub",
    "__rpow__": "pow",
    "__rtruediv__": "rdiv",
    "__rdiv__": "rdiv",
    "__rmatmul__": "rmatmul",
    "_unsafe_view": "view",
    "_to_copy": "to",
    "true_divide": "div",
}


@functools.cache
def manual_functions() -> Mapping[str, Callable[..., Any]]:
    """manualgrad's functions by the name of torch's operator, with the operator's arguments."""
    found: dict[str, Callable[..., Any]] = {name: op.function for name, op in registry.graph_ops().items()}
    found |= {"slice": views.slice_axis, "rdiv": elementwise.rdiv, "copy": views.copy_values}
    for kernel, function in registry.kernel_replacements.items():
        name = getattr(kernel, "__name__", "")
        if override := override_by_schema(name, function, by_position=True):
            found.setdefault(name, override)
    for op in registry.ops().values():
        for by_position in (False, True):
            if override := override_by_schema(op.name, op.function, by_position):
                found.setdefault(op.name, override)
    return found


@dataclass
class View:
    """A tensor that shares the memory of another one."""

    tensor: Tensor
    base: Tensor
    operator: str
    args: Any
    kwargs: Any
    make: Callable[[Tensor], Tensor]
    """Makes the view of another value of the base."""
    made_again: dict[int, Tensor] = field(default_factory=dict)
    """By the id of a value of the base."""


def _reshape_back(base: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return value.reshape(base.shape)


def _permute_back(base: Tensor, value: Tensor, dims: Any) -> Tensor:
    n = base.dim()
    return value.permute(sorted(range(n), key=lambda i: dims[i] % n))


_INVERSES: dict[str, Callable[..., Tensor]] = {
    "select": lambda base, value, dim, index: torch.select_scatter(base, value, dim, index),
    "slice": lambda base, value, dim=0, start=None, end=None, step=1: torch.slice_scatter(
        base, value, dim, start, end, step
    ),
    "transpose": lambda base, value, dim0, dim1: value.transpose(dim0, dim1),
    "t": lambda base, value: value.t(),
    "permute": _permute_back,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "alias"), _reshape_back),
}
"""By an operator that makes views: (base, new value of the view, its arguments) -> new value of the base."""


class Capture:
    """Runs a graph of torch.export with fake tensors and collects its steps."""

    def __init__(
        self, model: torch.nn.Module, exported: ExportedProgram, inputs: list[Any], dimension_names: list[str]
    ) -> None:
        self._dimension_names = dimension_names
        self.exported = exported
        self.trace = Trace(self._override)
        self.steps: list[Step] = []
        self.missing: dict[str, set[str]] = {}
        self.module = ""
        self.operator = ""
        self.modules: dict[str, str] = {}
        self._views: dict[int, View] = {}
        self._user_inputs: set[Variable] = set()
        self._current: dict[int, Tensor] = {}
        """By the id of a tensor that was written to: its new value."""
        self._open_functions: list[str] = []
        self._in_rule = False
        self._inputs = inputs
        self._names = _canonical_names(model)
        self._requires_grad = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def run(self) -> Graph:
        module = self.exported.graph_module
        fake_mode = detect_fake_mode(
            [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
        )
        graph = Graph(self.steps, {}, [], [], self.trace, self.exported, self.modules)
        arguments = self._add_placeholders(graph)
        with fake_mode or nullcontext(), record_rules(self._on_rule), torch.enable_grad():
            results = self._run_graph(module, arguments)
        self._flush()
        if self.missing:
            lines = [
                f"    {name}, called by {', '.join(sorted(where))}" for name, where in sorted(self.missing.items())
            ]
            raise UnsupportedOperators("there is no rule for these operators of torch:\n" + "\n".join(lines))
        graph.outputs = [self.trace.replace(x) for x in results]
        return graph

    def _add_placeholders(self, graph: Graph) -> list[Any]:
        signature = self.exported.graph_signature
        placeholders = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        arguments: list[Any] = []
        names = iter(self._dimension_names)
        user_inputs = iter(self._inputs)
        for spec, node in zip(signature.input_specs, placeholders, strict=True):
            value = node.meta.get("val")
            if spec.kind is InputKind.USER_INPUT:
                given = next(user_inputs)
                if isinstance(value, Tensor):
                    variable = self.trace.add(Variable(identifier(node.name), value))
                    variable.needs_grad = isinstance(given, Tensor) and given.requires_grad
                    variable.is_named = True
                    graph.inputs.append(variable)
                    self._user_inputs.add(variable)
                    for size in value.shape:
                        if isinstance(size, torch.SymInt):
                            graph.symbols.setdefault(str(size.node.expr), next(names, ""))
            elif isinstance(value, Tensor):
                path = self._names.get(str(spec.target), str(spec.target))
                if path in graph.state:
                    value = graph.state[path].tensor  # tied to a parameter that has been seen
                else:
                    is_constant = spec.kind is InputKind.CONSTANT_TENSOR
                    variable = self.trace.add(Variable(identifier(path), value, None if is_constant else path))
                    variable.needs_grad = path in self._requires_grad
                    if is_constant:
                        constant = self.exported.constants[str(spec.target)]
                        assert isinstance(constant, Tensor)
                        graph.constants[variable] = constant
                    else:
                        graph.state[path] = variable
            arguments.append(value)
        return arguments

    def _run_graph(self, module: torch.fx.GraphModule, arguments: list[Any]) -> Any:
        values: dict[Any, Any] = {}
        waiting = iter(arguments)

        def load(node: Any) -> Any:
            value = values[node]
            return self._current_value(value) if isinstance(value, Tensor) else value

        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(waiting)
                continue
            if node.op == "get_attr":
                values[node] = functools.reduce(getattr, str(node.target).split("."), module)
                continue
            args, kwargs = map_arg((node.args, node.kwargs), load)
            if node.op == "output":
                return [*pytree.tree_leaves(args[0])]
            self._enter_module(node)
            values[node] = self._call(node, args, kwargs)
        raise AssertionError

    def _enter_module(self, node: torch.fx.Node) -> None:
        stack = node.meta.get("nn_module_stack") or {}
        path = ""
        for name, kind in stack.values():
            path = name
            self.modules[name] = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
        if stack:
            self.module = self.trace.module = path

    # --- calls ---

    def _call(self, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._call_higher_order(target, args, kwargs)
        if not isinstance(target, torch._ops.OpOverload):
            assert callable(target)
            return target(*args, **kwargs)  # getitem, or arithmetic of symbolic sizes
        name = self.operator = function_name(target)
        if name in _IGNORED:
            return None
        if is_inplace(target):
            root = self.trace.find(self._root(args[0]))
            if root is None or root.path is None:  # writes into a buffer stay writes in place
                return self._call_inplace(target, args, kwargs)
        subscript = _SUBSCRIPTS.get(name) if not self._needs_grad((args, kwargs)) else None
        call = subscript or _torch_call(target)
        with self.trace:
            result = call(*args, **kwargs)
        self._add_views(name, call, args, kwargs, result)
        return result

    def _add_views(self, name: str, call: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Remember which outputs are views of the first argument."""
        base = args[0] if args else None
        if not isinstance(base, Tensor):
            return
        for i, x in enumerate(pytree.tree_leaves(result)):
            is_view = isinstance(x, Tensor) and x is not base and id(x) not in self._views
            if is_view and x.untyped_storage()._cdata == base.untyped_storage()._cdata:

                def make(new: Tensor, i: int = i) -> Tensor:
                    return pytree.tree_leaves(call(new, *args[1:], **kwargs))[i]

                self._views[id(x)] = View(x, base, name, args[1:], kwargs, make)

    def _call_higher_order(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target.name() == "wrap_with_set_grad_enabled":
            enabled, module, *rest = args
            with torch.set_grad_enabled(enabled):
                return tuple(self._run_graph(module, rest))
        self.missing.setdefault(target.name(), set()).add(self._where())
        raise UnsupportedOperators(f"{target.name()} (in {self._where()}) has no rule")

    # --- writes in place ---

    def _current_value(self, tensor: Tensor) -> Tensor:
        """The value of a tensor after the writes so far. A view of a tensor that was written to is made again."""
        while id(tensor) in self._current:
            tensor = self._current[id(tensor)]
        view = self._views.get(id(tensor))
        if view is None:
            return tensor
        base = self._current_value(view.base)
        if base is view.base:
            return tensor
        if id(base) not in view.made_again:
            with self.trace:
                again = view.made_again[id(base)] = view.make(base)
            self._views[id(again)] = View(again, base, view.operator, view.args, view.kwargs, view.make)
        return view.made_again[id(base)]

    def _call_inplace(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call the operator that does not write in place. Its output becomes the value of the tensor, or a part of
        the value of the tensor of which it is a view."""
        tensor = args[0]
        name = function_name(target)[:-1]
        overload = getattr(torch.ops.aten, name)
        overload = getattr(overload, target._overloadname, overload)
        with self.trace:
            result = _torch_call(overload)(*args, **kwargs)
        if result.dtype != tensor.dtype:
            raise UnsupportedOperators(f"{target} changes the dtype of its input (in {self._where()})")
        self._write(tensor, result)
        return tensor

    def _write(self, tensor: Tensor, value: Tensor) -> None:
        variable = self.trace.find(tensor)
        if variable is not None and variable in self._user_inputs:
            raise UnsupportedOperators(f"the model writes into its input {variable.name!r} (in {self._where()})")
        view = self._views.get(id(tensor))
        if view is None:
            self._current[id(tensor)] = value
            return
        if view.operator not in _INVERSES:
            raise UnsupportedOperators(f"a write into a view made by {view.operator} (in {self._where()})")
        base = self._current_value(view.base)
        with self.trace:
            written = _INVERSES[view.operator](base, value, *view.args, **view.kwargs)
        self._write(base, written)  # a view itself, or the tensor of which all are views

    def _root(self, tensor: Tensor) -> Tensor:
        """The tensor of which this one is a view, directly or not."""
        while id(tensor) in self._views:
            tensor = self._views[id(tensor)].base
        return tensor

    def _override(self, func: Any, args: Any, kwargs: Any) -> Callable[..., Any] | None:
        """manualgrad's function for a call through which a gradient flows."""
        if self._in_rule or not torch.is_grad_enabled():
            return None
        name = function_name(func)
        name = _ALIASES.get(name, name).strip("_")
        if name in WITHOUT_GRADIENT or not self._needs_grad((args, kwargs)):
            return None
        if name == "to" and _moves(args, kwargs):
            return functools.partial(self._without_rule, func, "to (another device)")
        if name == "alias" or (name == "to" and _keeps_dtype(args, kwargs)):
            return _first_argument  # as torch, which returns the tensor itself
        function = manual_functions().get(name)
        if function is None or name in self._open_functions:
            return functools.partial(self._without_rule, func, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._open_functions.append(name)
            try:
                result = function(*args, **kwargs)
            finally:
                self._open_functions.pop()
            return self._without_rule(func, name, *args, **kwargs) if result is NotImplemented else result

        return call

    def _needs_grad(self, values: Any) -> bool:
        tensors = [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]
        found = [self.trace.find(x) for x in tensors]
        return any(x is not None and x.needs_grad for x in found)

    def _without_rule(self, func: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """Record a call for which there is no rule. It is an error if its output could have a gradient."""
        self._in_rule = True
        before = len(self.trace.calls)
        try:
            result = self.trace.record(func, args, kwargs)
        finally:
            self._in_rule = False
        outputs = variables([call.outputs for call in self.trace.calls[before:]])
        if any(x.tensor.is_floating_point() or x.tensor.is_complex() for x in outputs):
            self.missing.setdefault(name, set()).add(self._where())
        return result

    def _where(self) -> str:
        return f"{self.modules.get(self.module, 'the model')} {self.module!r}" if self.module else "the model"

    # --- steps ---

    def _on_rule(self, rule: type[Rule], args: tuple[Any, ...]) -> Any:
        if self._in_rule:
            return rule.forward(*args)
        self._flush()
        self._in_rule = True
        try:
            result = rule.forward(*args)
        finally:
            self._in_rule = False
        calls, self.trace.calls = self.trace.calls, []
        spec = rule.implementation.spec
        outputs = self.trace.replace(result)
        output, *statistics = outputs if rule.statistics else (outputs,)
        inputs = self.trace.replace(dict(zip(spec.inputs, args, strict=True)))
        if any(output is x for x in variables(inputs)):  # the rule returned its input
            if self.operator.strip("_") in _STRUCTURAL:
                return result
            result, output, calls = self._copy_output(result, calls, bool(rule.statistics))
        step = Step(
            self.module,
            self.operator,
            rule,
            inputs,
            output,
            dict(zip(rule.statistics, statistics, strict=True)),
            calls,
        )
        output.needs_grad = bool(step.needed)
        output.is_named = not is_structural(step)
        self.steps.append(step)
        return result

    def _copy_output(self, result: Any, calls: list[Call], has_statistics: bool) -> Any:
        first = result[0] if has_statistics else result
        self._in_rule = True
        copy = first.view_as(first)
        self._in_rule = False
        variable = self.trace.add(Variable("view", copy))
        calls.append(Call(Tensor.view_as, (self.trace.find(first), self.trace.find(first)), {}, variable))
        return ((copy, *result[1:]) if has_statistics else copy), variable, calls

    def _flush(self) -> None:
        for call in self.trace.calls:
            self.steps.append(Step(call.module, function_name(call.function), None, {}, None, {}, [call]))
        self.trace.calls = []


def _keeps_dtype(args: Any, kwargs: Any) -> bool:
    """A call of ``to`` with the dtype that the tensor has."""
    dtypes = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)]
    return all(x == args[0].dtype for x in dtypes) and True not in (*args[1:], *kwargs.values())


def _moves(args: Any, kwargs: Any) -> bool:
    """A call of ``to`` with another device."""
    devices = [torch.device(x) for x in (*args[1:], *kwargs.values()) if isinstance(x, (str, torch.device))]
    return any(x.type != args[0].device.type for x in devices)


def _first_argument(*args: Any, **kwargs: Any) -> Any:
    return args[0]


def _torch_call(target: Any) -> Any:
    """torch's function of an operator, which reads better in the text than the operator."""
    name = function_name(target)
    for space in (torch, torch._C._nn, Tensor):  # type: ignore[attr-defined]
        function = getattr(space, name, None)
        if function is not None and not isinstance(function, type(_torch_call)):
            return functools.partial(_call_with_fallback, function, target)
    return target


def _slice(input: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    axis = dim % input.dim()
    end = None if isinstance(end, int) and end >= 2**62 else end
    return input[(*[slice(None)] * axis, slice(start or None, end, step if step != 1 else None))]


def _index(input: Tensor, indices: Any) -> Tensor:
    return input[tuple(slice(None) if x is None else x for x in indices)]


_SUBSCRIPTS = {"slice": _slice, "index": _index}
"""Operators that read better as subscripts. (Where a gradient flows, their rules are applied.)"""


def _call_with_fallback(function: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except TypeError:
        return target(*args, **kwargs)


def _canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """For each name of a parameter or buffer: its first name. Tied parameters have several."""
    first: dict[int, str] = {}
    found = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        found[name] = first.setdefault(id(tensor), name)
    return found


def identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return name if name[:1].isalpha() else f"layer{name}"


@contextmanager
def record_rules(recorder: Callable[..., Any]) -> Iterator[None]:
    before, dispatch.recorder = dispatch.recorder, recorder
    try:
        yield
    finally:
        dispatch.recorder = before
