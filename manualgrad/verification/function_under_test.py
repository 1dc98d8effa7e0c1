"""What `verify` tests: a Function, function or module, with its arguments, in one form."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from manualgrad.verification import stateless_modules
from manualgrad.verification.finite_differences import JacobianRows, jacobian_rows, loses_float64_precision
from manualgrad.verification.gradients import gradients, random_grad_output, with_grad_outputs
from manualgrad.verification.graph import depends_on_parameters, function_nodes, with_plain_forwards
from manualgrad.verification.randomness import OperatorObserver, random_states, set_seed
from manualgrad.verification.tensors import (
    cast,
    clone_with_strides,
    from_real_vector,
    is_differentiable,
    nearly_equal,
    real_vector,
)


class FunctionUnderTest:
    """A function of its differentiable inputs only; its other arguments are fixed.

    A call takes one tensor for each differentiable input and returns all output tensors as a tuple. Every call
    draws the same random numbers. A module's parameters and buffers are inputs too.

    Args:
        function: an `autograd.Function` or its ``apply``, a function, or a module.
        args, kwargs: its arguments: tensors, structures of tensors, and other values. The differentiable inputs
            are the floating and complex tensors that require a gradient, or all of them if none does.
        reference: a plain implementation with the same arguments.
        surrogate: the gradient is not the derivative by definition.
        seed: of torch's random generator, in every call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        reference: Callable[..., Any] | None = None,
        surrogate: bool = False,
        seed: int = 7,
    ) -> None:
        if not callable(function):
            raise TypeError(
                f"fn must be an autograd.Function, a function or a module, but it is of type "
                f"{type(function).__name__}"
            )
        if isinstance(function, type) and issubclass(function, Function):
            function = function.apply
        self.names = _argument_names(function, args, kwargs or {})
        state: dict[str, Tensor] = {}
        self.module: nn.Module | None = None
        self.parameters: list[Tensor] = []
        if isinstance(function, nn.Module):
            self.module = function
            function, state = stateless_modules.functionalize(function)
            kwargs = {**(kwargs or {}), "state": state}
            reference = None if reference is None else stateless_modules.accepting_state(reference)
            self.names += list(state)
        self.function = function
        self.reference = reference
        self.surrogate = surrogate
        self.seed = seed
        self.leaves, self.treespec = tree_flatten((tuple(args), kwargs or {}))
        self.num_argument_leaves = len(self.leaves) - len(state)
        self.input_indices = self._find_differentiable_inputs()
        self.leaves = [x.detach() if isinstance(x, Tensor) else x for x in self.leaves]
        for i in self.input_indices:
            if not bool(self.leaves[i].isfinite().all()):
                raise ValueError(
                    f"input {self.names[i]!r} contains nan or inf: pass finite values, the laws add special ones"
                )
        self._run_once()

    def _find_differentiable_inputs(self) -> list[int]:
        floating = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and is_differentiable(x)]
        selected = [i for i in floating if self.leaves[i].requires_grad]
        if not any(i < self.num_argument_leaves for i in selected):
            # no argument requires a gradient: take all arguments, and the state that requires one
            selected = [i for i in floating if i < self.num_argument_leaves or self.leaves[i].requires_grad]
        if not selected:
            raise ValueError("nothing to differentiate: no input is a floating or complex tensor")
        return selected

    def _run_once(self) -> None:
        """Find out which random generators a call uses, and whether it writes into its inputs."""
        self.writes_in_place = False
        self.generators: list[tuple[torch.Generator, Tensor]] = []
        self.other_seeders: list[Callable[[int], Any]] = []
        self.compute_dtype: torch.dtype | None = None
        before, observer = random_states(), OperatorObserver()
        try:
            outputs = self._first_call(observer)
        except Exception:
            if self.module is None:
                raise
            outputs = None
        if self.module is not None and (outputs is None or depends_on_parameters(outputs, self.module)):
            self.function = stateless_modules.functionalize_by_swapping(self.module)
            outputs = self._first_call(observer)
        after = random_states()
        self.surrogate |= observer.reparameterized
        self.generators = list(observer.generators.values())
        if before["python"] != after["python"]:
            self.other_seeders.append(random.seed)
        if "numpy" in before and before["numpy"] != after["numpy"]:
            self.other_seeders.append(sys.modules["numpy"].random.seed)
        assert outputs is not None
        if not any(is_differentiable(y) for y in outputs):
            raise ValueError("nothing to differentiate: no output is a floating or complex tensor")

    def _first_call(self, observer: OperatorObserver) -> tuple[Tensor, ...]:
        try:
            return self._observed(observer, self.make_inputs())
        except RuntimeError as error:
            if "leaf Variable" not in str(error):
                raise
        self.writes_in_place = True
        return self._observed(observer, self.make_inputs())

    def _observed(self, observer: OperatorObserver, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        try:
            with observer:
                return self(*inputs)
        except Exception:
            return self(*inputs)  # the observer may have caused the error

    # --- calls ---

    @property
    def primals(self) -> list[Tensor]:
        """The values of the differentiable inputs."""
        return [self.leaves[i] for i in self.input_indices]

    def make_inputs(self, requires_grad: Sequence[bool] | None = None) -> list[Tensor]:
        """New leaf tensors with the values and strides of the primals."""
        inputs = [clone_with_strides(x) for x in self.primals]
        return [x.requires_grad_(requires_grad is None or requires_grad[i]) for i, x in enumerate(inputs)]

    def input_name(self, k: int) -> str:
        return repr(self.names[self.input_indices[k]])

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.call(self.function, inputs)

    def call(
        self, function: Callable[..., Any], inputs: Sequence[Tensor], clone_others: bool = True
    ) -> tuple[Tensor, ...]:
        """Call `function` with these inputs and the other arguments."""
        leaves = [x.clone() if isinstance(x, Tensor) and clone_others else x for x in self.leaves]
        for i, x in zip(self.input_indices, inputs, strict=True):
            leaves[i] = x.clone() if self.writes_in_place else x
        args, kwargs = tree_unflatten(leaves, self.treespec)
        set_seed(self.seed)
        for seed in self.other_seeders:
            seed(self.seed)
        for generator, state in self.generators:
            generator.set_state(state)
        return tuple(x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor))

    @cached_property
    def output_indices(self) -> list[int]:
        """Which outputs require a gradient."""
        return [i for i, y in enumerate(self(*self.make_inputs())) if y.requires_grad]

    def scalar_loss(self, *inputs: Tensor) -> Tensor:
        """Σ ⟨u, sin y⟩ over the outputs y, with random u. Due to the sine no derivative of any order vanishes."""
        outputs = self(*inputs)
        selected = [outputs[i] for i in self.output_indices]
        return sum(
            ((random_grad_output(y) * torch.sin(y)).real.sum() for y in selected),
            torch.zeros((), dtype=self.primals[0].dtype).real,
        )

    def output_vector(self, primals: Sequence[Tensor]) -> Tensor:
        """All outputs that require a gradient, as one vector of float64."""
        with torch.no_grad():
            outputs = self(*[clone_with_strides(x) for x in primals])
        return torch.cat([real_vector(outputs[i]).double() for i in self.output_indices])

    def perturbed(self, directions: dict[int, Tensor], step: float) -> list[Tensor]:
        """The primals, moved by `step` times the directions (real vectors, by the number of the input)."""
        primals = list(self.primals)
        for k, direction in directions.items():
            x = real_vector(primals[k])
            primals[k] = from_real_vector(x + step * direction.to(x), primals[k])
        return primals

    # --- variants of this function ---

    def with_primals(self, primals: Sequence[Tensor]) -> FunctionUnderTest:
        return self.with_leaves(dict(zip(self.input_indices, primals, strict=True)))

    def with_leaves(self, leaves: dict[int, Tensor]) -> FunctionUnderTest:
        other = self._copy()
        other.leaves = [leaves.get(i, x) for i, x in enumerate(self.leaves)]
        return other

    def with_function(self, function: Callable[..., Any]) -> FunctionUnderTest:
        """Another function with the same arguments."""
        other = self._copy()
        other.function = function
        return other

    def to_dtype(self, dtype: torch.dtype) -> FunctionUnderTest:
        """All floating tensors in `dtype`, complex ones in the complex dtype of that precision."""
        other = self.with_leaves({i: cast(x, dtype) for i, x in enumerate(self.leaves) if isinstance(x, Tensor)})
        other.compute_dtype = None
        return other

    def to_device(self, device: str) -> FunctionUnderTest:
        return self.with_leaves({i: x.to(device) for i, x in enumerate(self.leaves) if isinstance(x, Tensor)})

    def with_persistent_state(self) -> FunctionUnderTest:
        """For a module: a copy that keeps its state between calls, so parameters are not inputs any more."""
        if self.module is None:
            return self
        state = {name: x.detach().clone() for name, x in self.module.named_buffers()}
        for name, x in self.module.named_parameters():
            state[name] = x.detach().clone().requires_grad_(x.requires_grad)
        module = stateless_modules.with_state(self.module, state)
        other = self.with_function(lambda *args, state, **kwargs: module(*args, **kwargs))
        other.input_indices = [i for i in self.input_indices if i < self.num_argument_leaves]
        other.parameters = [x for x in state.values() if x.requires_grad]
        return other

    def _copy(self) -> FunctionUnderTest:
        other = object.__new__(FunctionUnderTest)
        cached = {name for name, value in vars(FunctionUnderTest).items() if isinstance(value, cached_property)}
        vars(other).update({name: value for name, value in vars(self).items() if name not in cached})
        return other

    def reducible_lengths(self, size: int) -> list[int]:
        """The lengths of axes that `with_axes_reduced` may reduce to `size`. Parameters keep their shapes."""
        state = [x for x in self.leaves[self.num_argument_leaves :] if isinstance(x, Tensor)]
        state_lengths = {n for x in state for n in x.shape}
        lengths = sorted({n for x in self.primals for n in x.shape if n > size} - state_lengths)
        return [length for length in lengths if not self._may_index_beyond(size, length)]

    def _may_index_beyond(self, size: int, length: int) -> bool:
        """Whether an argument holds an integer above `size` and up to `length`.

        It may be the length of the axis. Some functions of torch (ctc_loss) then read past the end of a reduced
        tensor, and the process may crash.
        """
        for x in self.leaves:
            if isinstance(x, Tensor) and not (is_differentiable(x) or x.dtype == torch.bool):
                found = x.device.type != "meta" and bool(((x > size) & (x <= length)).any())
            else:
                found = isinstance(x, (tuple, list)) and any(type(n) is int and size < n <= length for n in x)
            if found:
                return True
        return False

    def with_axes_reduced(self, length: int, size: int) -> FunctionUnderTest:
        """All axes of this length reduced to `size`: for example all batch axes."""
        leaves: dict[int, Tensor] = {}
        for i, x in enumerate(self.leaves):
            if isinstance(x, Tensor) and length in x.shape:
                for axis, n in enumerate(x.shape):
                    x = x.narrow(axis, 0, size) if n == length else x
                leaves[i] = x.contiguous()
        return self.with_leaves(leaves)

    @cached_property
    def highest_precision(self) -> FunctionUnderTest:
        """In float64 if the function accepts it, else in float32 or in the dtype of the arguments."""
        double = self.to_dtype(torch.float64)
        observer = OperatorObserver()
        try:
            gradients(double, double.make_inputs())
            outputs = [y for y in double._observed(observer, double.make_inputs()) if y.requires_grad]
        except Exception:
            return self
        if not all(y.dtype in (torch.float64, torch.complex128) for y in outputs):
            return self.to_dtype(torch.float32)
        if observer.lowest_precision != torch.float64 and loses_float64_precision(double):
            double.compute_dtype = observer.lowest_precision
        return double

    @cached_property
    def autograd_reference(self) -> FunctionUnderTest | None:
        """The same function, differentiated by torch: the reference, or the plain forwards of the Functions.

        None if torch cannot differentiate the forwards.
        """
        if self.reference is not None:
            return self.with_function(self.reference)
        other = self.with_function(with_plain_forwards(self.function))
        try:
            result, expected = other(*other.make_inputs()), self(*self.make_inputs())
            if len(result) != len(expected) or not all(map(nearly_equal, result, expected)):
                return None
            if function_nodes(result) or not all(result[i].requires_grad for i in self.output_indices):
                return None
            gradients(other, other.make_inputs())
        except Exception:
            return None
        return other

    # --- precision and randomness ---

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the inputs, or the lower one in which the function computes."""
        return self.compute_dtype or self.primals[0].dtype.to_real()

    @property
    def finite_difference_tolerance(self) -> float:
        return 1e-6 if self.dtype == torch.float64 else 3e-2

    @property
    def rounding_tolerance(self) -> float:
        """How much two ways to compute one tensor may differ, relative to its largest element."""
        if self.compute_dtype in (torch.float16, torch.bfloat16):
            return 32 * torch.finfo(self.compute_dtype).eps
        return 1e-9 if self.dtype == torch.float64 else 1e-3

    @cached_property
    def draws_random_numbers(self) -> bool:
        """In forward or backward."""
        observer = OperatorObserver()
        inputs = self.make_inputs()
        outputs, grad_outputs = with_grad_outputs(self._observed(observer, inputs))
        if outputs:
            with suppress(Exception), observer:
                torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)
        return observer.draws_random_numbers or bool(self.other_seeders)

    def supports_dtype(self, dtype: torch.dtype) -> bool:
        try:
            other = self.to_dtype(dtype)
            other(*other.make_inputs())
        except Exception:
            return False
        return True

    @cached_property
    def jacobian(self) -> list[JacobianRows]:
        """∂y/∂x by finite differences, for each differentiable input."""
        return [jacobian_rows(self, k) for k in range(len(self.input_indices))]


def _argument_names(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """A name for each leaf of the arguments, from the signature where it can be read."""
    owner = getattr(function, "__self__", None)
    parameters: list[str] = []
    if isinstance(owner, type) and issubclass(owner, Function):
        parameters = list(inspect.signature(owner.forward).parameters)
        if owner.setup_context is Function.setup_context:
            parameters = parameters[1:]  # ctx
    else:
        called = function.forward if isinstance(function, nn.Module) else function
        try:
            signature = inspect.signature(called).parameters.values()
        except (TypeError, ValueError):
            signature = []
        parameters = [p.name for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    argument_names = [parameters[i] if i < len(parameters) else f"input {i}" for i in range(len(args))]
    names = []
    for name, value in [*zip(argument_names, args, strict=True), *kwargs.items()]:
        n = len(tree_leaves(value))
        names += [name] if n == 1 else [f"{name}.{i}" for i in range(n)]
    return names
