"""A model's forward and backward as one readable Python program."""

from __future__ import annotations

import linecache
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from manualgrad.program.capture import Capture
from manualgrad.program.capture import UnsupportedOperators as UnsupportedOperators
from manualgrad import recomputation
from manualgrad.program.blocks import find_units
from manualgrad.program.file import FileWriter
from manualgrad.program.module import ProgramModule
from manualgrad.program.trace import Variable


class Program:
    """The forward and the backward of a model as Python text. See `export`.

    Attributes:
        code: the whole file. It imports torch alone.
    """

    def __init__(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, memory: str
    ) -> None:
        min_elements = {"eager": recomputation.MIN_ELEMENTS, "least": 0}[memory]
        self._model = model
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        leaves, self._in_spec = pytree.tree_flatten((args, kwargs))
        self._inputs = leaves
        self._graph = Capture(model, exported, leaves).run()
        outputs = [x for x in self._graph.outputs if isinstance(x, Variable)]
        fake_mode = torch._guards.detect_fake_mode([x.tensor for x in (*self._graph.state.values(), *outputs)])
        assert fake_mode is not None
        largest = [_largest(x) for x in leaves if isinstance(x, Tensor)]
        with fake_mode:
            writer = FileWriter(self._graph, find_units(self._graph), largest, min_elements)
            self.code = writer.text(f"Forward and backward of {type(model).__name__}.", "")

    def save(self, path: str | Path) -> None:
        """Write `code` to a file."""
        Path(path).write_text(self.code)

    def __str__(self) -> str:
        return self.code

    def module(self) -> ProgramModule:
        """A module that runs the program over the model's own parameters and buffers."""
        name = f"<program of {type(self._model).__name__}>"
        linecache.cache[name] = (len(self.code), None, self.code.splitlines(keepends=True), name)
        namespace: dict[str, Any] = {"__name__": name}
        exec(compile(self.code, name, "exec"), namespace)
        return ProgramModule(
            self._model,
            list(self._graph.state),
            namespace["Run"],
            self._check_inputs,
            self._outputs(),
        )

    def _check_inputs(self, args: Any) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(args)
        if spec != self._in_spec:
            raise TypeError(f"expected arguments of the structure {self._in_spec}, but got {spec}")
        found = []
        for given, example in zip(leaves, self._inputs, strict=True):
            if not isinstance(example, Tensor):
                continue
            if not isinstance(given, Tensor) or given.shape != example.shape or given.dtype != example.dtype:
                raise ValueError(f"expected a tensor of {example.dtype} {list(example.shape)}, but got {_describe(given)}")
            found.append(given)
        return found

    def _outputs(self) -> Any:
        variables = list(dict.fromkeys(x for x in self._graph.outputs if isinstance(x, Variable)))
        positions = [variables.index(x) if isinstance(x, Variable) else None for x in self._graph.outputs]
        constants = list(self._graph.outputs)
        spec = self._graph.exported.call_spec.out_spec
        single = len(variables) == 1

        def restore(results: Any) -> Any:
            tensors = (results,) if single else results
            leaves = [
                constant if position is None else tensors[position]
                for position, constant in zip(positions, constants, strict=True)
            ]
            return pytree.tree_unflatten(leaves, spec)

        return restore


def _largest(tensor: Tensor) -> int:
    """The largest value of a tensor of integers."""
    return 0 if tensor.is_floating_point() or tensor.is_complex() or not tensor.numel() else int(tensor.max())


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    memory: str = "eager",
) -> Program:
    """Write a model's forward and backward as one Python program.

        program = manualgrad.program.export(model, (x,))
        print(program.code)

    Args:
        model: a module. It is captured in its current mode, training or evaluation.
        args, kwargs: example inputs, as for `torch.export.export`. A gradient is derived for those that require it.
        dynamic_shapes: as for `torch.export.export`.

    Raises:
        UnsupportedOperators: the model calls operators that no rule covers.
    """
    return Program(model, args, dict(kwargs or {}), dynamic_shapes, memory)
