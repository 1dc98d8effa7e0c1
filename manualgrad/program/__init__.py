"""A model's forward and backward as one readable Python program."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from manualgrad import recomputation, vendor_kernels
from manualgrad.conversion import reverted
from manualgrad.program.blocks import find_units
from manualgrad.program.capture import Capture
from manualgrad.program.capture import UnsupportedOperators as UnsupportedOperators
from manualgrad.program.fast import FastProgram
from manualgrad.program.file import FileWriter
from manualgrad.program.module import ProgramModule
from manualgrad.program.text import has_effect
from manualgrad.program.trace import Variable, function_name
from manualgrad.torch_internals import PROGRAMS_HAVE_FIXED_SIZES


class Program:
    """The forward and the backward of a model as Python text. See `export`.

    Attributes:
        code: the whole file. It imports torch alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dynamic_shapes: Any,
        memory: str,
    ) -> None:
        min_elements = {"eager": recomputation.MIN_ELEMENTS, "least": 0}[memory]
        self._model = model
        with reverted(model):
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        leaves, self._in_spec = pytree.tree_flatten((args, kwargs))
        self._inputs = leaves
        self._graph = Capture(model, exported, leaves, _dimension_names(dynamic_shapes)).run()
        outputs = [x for x in self._graph.outputs if isinstance(x, Variable)]
        fake_mode = detect_fake_mode([x.tensor for x in (*self._graph.state.values(), *outputs)])
        assert fake_mode is not None
        self._fake_mode, self._min_elements = fake_mode, min_elements
        largest = [_largest(x) for x in leaves if isinstance(x, Tensor)]
        with fake_mode:
            writer = FileWriter(self._graph, find_units(self._graph), largest, min_elements)
            self.code = writer.text(f"Forward and backward of {type(model).__name__}.")

    @property
    def _output_variables(self) -> list[Variable]:
        return list(dict.fromkeys(x for x in self._graph.outputs if isinstance(x, Variable)))

    def save(self, path: str | Path) -> None:
        """Write `code` to a file."""
        Path(path).write_text(self.code)

    def __str__(self) -> str:
        return self.code

    def module(self, *, compile: bool = False) -> ProgramModule:
        """A module that runs the program over the model's own parameters and buffers.

        Args:
            compile: compile forward and backward by `torch.compile`, each as one function, so that what is saved
                stays as the program says.
        """
        with self._fake_mode:
            fast = FastProgram(
                self._graph, self._output_variables, self._min_elements, vendor_kernels.enabled, reuse=not compile
            )
        forward, backward = fast.forward, fast.backward
        if compile:
            forward, backward = torch.compile(forward), torch.compile(backward)
        return ProgramModule(
            self._model,
            fast.state,
            forward,
            backward,
            self._make_differentiable,
            self._make_check(),
            self._outputs(),
        )

    @functools.cached_property
    def _differentiable(self) -> Any:
        """(tensors, grads) -> gradients, for a backward that is itself differentiated."""
        effects = sorted({function_name(x.function) for x in self._graph.calls if has_effect(x)})
        if effects:
            raise RuntimeError(
                f"this program cannot be differentiated twice: {', '.join(effects)} would run a second time, and "
                "draws random numbers or updates buffers. Export the model in evaluation mode"
            )
        with self._fake_mode:
            program = FastProgram(
                self._graph, self._output_variables, 2**62, vendor_kernels=False, reuse=False, differentiable=True
            )

        def compute(tensors: Any, grads: Any) -> Any:
            saved = program.forward(*tensors)[1]
            return program.backward([*saved], *grads)

        return compute

    def _make_differentiable(self) -> Any:
        return self._differentiable

    def _make_check(self) -> Any:
        """A function that takes the arguments of a call and returns the tensors among them."""
        shapes = iter(tuple(x.tensor.shape) for x in self._graph.inputs)
        examples = [(_Shape(next(shapes)), x.dtype) if isinstance(x, Tensor) else None for x in self._inputs]
        only_tensors = all(x is not None for x in examples) and self._in_spec == pytree.tree_structure(
            (tuple(self._inputs), {})
        )
        in_spec = self._in_spec

        def check(args: Any, kwargs: Any) -> Any:
            if only_tensors and not kwargs and len(args) == len(examples):
                leaves = args
            else:
                leaves, spec = pytree.tree_flatten((args, kwargs))
                if spec != in_spec:
                    raise TypeError(f"expected arguments of the structure {in_spec}, but got {spec}")
            for x, example in zip(leaves, examples, strict=True):
                if example is not None and not (
                    isinstance(x, Tensor) and x.dtype == example[1] and example[0].matches(x.shape)
                ):
                    raise ValueError(f"expected a tensor of {example[1]} {example[0]}, but got {_describe(x)}")
            return leaves if only_tensors else [x for x in leaves if isinstance(x, Tensor)]

        return check

    def _outputs(self) -> Any:
        variables = list(dict.fromkeys(x for x in self._graph.outputs if isinstance(x, Variable)))
        positions = [variables.index(x) if isinstance(x, Variable) else None for x in self._graph.outputs]
        constants = list(self._graph.outputs)
        spec = self._graph.exported.call_spec.out_spec
        assert spec is not None
        single = len(variables) == 1

        if single and len(constants) == 1 and spec == pytree.tree_structure(0):
            return lambda results: results

        def restore(results: Any) -> Any:
            tensors = (results,) if single else results
            leaves = [
                constant if position is None else tensors[position]
                for position, constant in zip(positions, constants, strict=True)
            ]
            return pytree.tree_unflatten(leaves, spec)

        return restore


class _Shape:
    """The shape of an input. A dynamic size matches any."""

    def __init__(self, shape: tuple[Any, ...]) -> None:
        self.shape = shape
        self.is_static = all(isinstance(size, int) for size in shape)

    def matches(self, shape: torch.Size) -> bool:
        if self.is_static:
            return shape == self.shape
        return len(shape) == len(self.shape) and all(
            not isinstance(size, int) or size == given for size, given in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return str([size if isinstance(size, int) else "any" for size in self.shape])


def _dimension_names(dynamic_shapes: Any) -> list[str]:
    """The names of the `torch.export.Dim`s, in the order of the inputs and axes."""
    if isinstance(dynamic_shapes, dict):
        return [name for value in dynamic_shapes.values() for name in _dimension_names(value)]
    if isinstance(dynamic_shapes, (list, tuple)):
        return [name for value in dynamic_shapes for name in _dimension_names(value)]
    return [dynamic_shapes.__name__] if hasattr(dynamic_shapes, "__name__") else []


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
        model: a module of torch or manualgrad. It is captured in its current mode, training or evaluation.
        args, kwargs: example inputs, as for `torch.export.export`. Those that require a gradient get one.
        dynamic_shapes: as for `torch.export.export`.

    Raises:
        UnsupportedOperators: the model calls operators that no rule covers.
    """
    if dynamic_shapes is not None and PROGRAMS_HAVE_FIXED_SIZES:
        raise NotImplementedError("dynamic_shapes needs torch 2.13 or later")
    return Program(model, args, dict(kwargs or {}), dynamic_shapes, memory)
