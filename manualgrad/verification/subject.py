"""What is verified: a function and the inputs it is tried on, brought into one form.

Whatever was given, an `autograd.Function`'s apply, a function or a module, becomes a function of its
*differentiable* tensors alone that returns a tuple of tensors and draws the same random numbers in every call.
"""

from __future__ import annotations

import inspect
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from manualgrad.verification import modules
from manualgrad.verification.drawing import Watch, random_states, set_seed

SAMPLED = 32
"""Of a larger tensor this many elements are tried one by one (and all of them together along a line)."""

_STEPS = {torch.float64: (1e-3, 1e-4, 1e-5), torch.float32: (3e-2, 1e-2, 3e-3)}
_STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))


class Subject:
    """A function of some tensors, and where it is tried.

    Args:
        function: called with the arguments that follow.
        args, kwargs: tensors, structures of tensors, and settings. Differentiable are the floating tensors that
            require a gradient; if none does, all of them.
        reference: a plain implementation with the same arguments.
        surrogate: the gradient is what its author defines, not the derivative.
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
                f"a function, a Function's apply or a module is verified, not a {type(function).__name__}"
            )
        if isinstance(function, type) and issubclass(function, Function):
            function = function.apply
        self.names = _names(function, args, kwargs or {})
        state: dict[str, Tensor] = {}
        self.module: nn.Module | None = None
        self.parameters: list[Tensor] = []
        if isinstance(function, nn.Module):
            self.module = function
            function, state = modules.as_function(function)
            kwargs = {**(kwargs or {}), "state": state}
            reference = None if reference is None else modules.ignoring_state(reference)
            self.names += list(state)
        self.function = function
        self.reference = reference
        self.surrogate = surrogate
        self.seed = seed
        self.leaves, self.structure = tree_flatten((tuple(args), kwargs or {}))
        floating = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and _has_gradient(x)]
        marked = [i for i in floating if self.leaves[i].requires_grad]
        given = self.given = len(self.leaves) - len(state)
        if not any(i < given for i in marked):  # of the inputs all, of a module's state its parameters
            marked = [i for i in floating if i < given or self.leaves[i].requires_grad]
        self.places = marked
        if not self.places:
            raise ValueError("nothing to differentiate: no input is a tensor of floating or complex numbers")
        self.leaves = [x.detach() if isinstance(x, Tensor) else x for x in self.leaves]
        for i in self.places:
            if not bool(self.leaves[i].isfinite().all()):
                raise ValueError(f"{self.names[i]!r} holds nan or inf: the laws make special values themselves")
        self._check_that_it_runs()

    def _check_that_it_runs(self) -> None:
        """Settle once whether inputs are written in place, and which random states a call begins with."""
        self.writes_in_place = False
        self.generators: list[tuple[torch.Generator, Tensor]] = []
        self.seeds_too: list[Callable[[int], Any]] = []
        self.narrowed: torch.dtype | None = None
        before, watch = random_states(), Watch()
        try:
            outputs = self._first_run(watch)
        except Exception:
            if self.module is None:
                raise
            outputs = None
        if self.module is not None and (outputs is None or _reaches(outputs, self.module)):
            self.function = modules.as_function_that_swaps(self.module)
            outputs = self._first_run(watch)
        after = random_states()
        self.surrogate |= watch.implicit
        self.generators = list(watch.generators.values())
        if before["python"] != after["python"]:
            self.seeds_too.append(random.seed)
        if "numpy" in before and before["numpy"] != after["numpy"]:
            self.seeds_too.append(sys.modules["numpy"].random.seed)
        assert outputs is not None
        if not any(_has_gradient(y) for y in outputs):
            raise ValueError("nothing to differentiate: no output is a tensor of floating or complex numbers")

    def _first_run(self, watch: Watch) -> tuple[Tensor, ...]:
        try:
            return self._watched(watch, self.tensors())
        except RuntimeError as error:
            if "leaf Variable" not in str(error):
                raise
        self.writes_in_place = True
        return self._watched(watch, self.tensors())

    # --- the tensors ---

    @property
    def points(self) -> list[Tensor]:
        """The values of the differentiable tensors."""
        return [self.leaves[i] for i in self.places]

    def tensors(self, needed: Sequence[bool] | None = None) -> list[Tensor]:
        """Fresh leaves of these values, with their strides."""
        fresh = [_copied(x) for x in self.points]
        return [x.requires_grad_(needed is None or needed[i]) for i, x in enumerate(fresh)]

    def named(self, k: int) -> str:
        return repr(self.names[self.places[k]])

    # --- the function ---

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.call(self.function, tensors)

    def call(
        self, function: Callable[..., Any], tensors: Sequence[Tensor], others_copied: bool = True
    ) -> tuple[Tensor, ...]:
        """`function` on these tensors and the other arguments; all tensors that it returns."""
        leaves = [x.clone() if isinstance(x, Tensor) and others_copied else x for x in self.leaves]
        for i, x in zip(self.places, tensors, strict=True):
            leaves[i] = x.clone() if self.writes_in_place else x
        args, kwargs = tree_unflatten(leaves, self.structure)
        set_seed(self.seed)
        for seed in self.seeds_too:
            seed(self.seed)
        for generator, state in self.generators:
            generator.set_state(state)
        return tuple(x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor))

    def differentiable(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [y for y in outputs if y.requires_grad]

    def scalar(self, *tensors: Tensor) -> Tensor:
        """Σ ⟨u, sin y⟩ of the differentiable outputs: no derivative vanishes even where the function is linear."""
        outputs = self(*tensors)
        chosen = [outputs[i] for i in self.differentiable_places]
        return sum(
            ((upstream(y) * torch.sin(y)).real.sum() for y in chosen),
            torch.zeros((), dtype=self.points[0].dtype).real,
        )

    @cached_property
    def differentiable_places(self) -> list[int]:
        """Which of the outputs require a gradient."""
        return [i for i, y in enumerate(self(*self.tensors())) if y.requires_grad]

    # --- the same function elsewhere ---

    def at(self, points: Sequence[Tensor]) -> Subject:
        """The same function, tried at other values of the differentiable tensors."""
        return self.replaced(dict(zip(self.places, points, strict=True)))

    def replaced(self, leaves: dict[int, Tensor]) -> Subject:
        other = self._copy()
        other.leaves = [leaves.get(i, x) for i, x in enumerate(self.leaves)]
        return other

    def cast(self, dtype: torch.dtype) -> Subject:
        """All floating tensors in `dtype` (complex ones in the complex dtype of that precision)."""
        other = self.replaced({i: _cast(x, dtype) for i, x in enumerate(self.leaves) if isinstance(x, Tensor)})
        other.narrowed = None
        return other

    def to(self, device: str) -> Subject:
        return self.replaced({i: x.to(device) for i, x in enumerate(self.leaves) if isinstance(x, Tensor)})

    def of(self, function: Callable[..., Any]) -> Subject:
        """Another function on the same arguments."""
        other = self._copy()
        other.function = function
        return other

    def in_use(self) -> Subject:
        """A module as a program calls it: its parameters and buffers are its own, from one call to the next."""
        if self.module is None:
            return self
        given = {name: x.detach().clone() for name, x in self.module.named_buffers()}
        for name, x in self.module.named_parameters():
            given[name] = x.detach().clone().requires_grad_(x.requires_grad)
        module = modules.with_state(self.module, given)
        other = self.of(lambda *args, state, **kwargs: module(*args, **kwargs))
        other.places = [i for i in self.places if i < self.given]
        other.parameters = [x for x in given.values() if x.requires_grad]
        return other

    def lengths(self, size: int) -> list[int]:
        """The lengths of axes that may be cut to `size`: a module's parameters keep their shapes."""
        of_state = {n for x in self.leaves[self.given :] if isinstance(x, Tensor) for n in x.shape}
        found = sorted({n for x in self.points for n in x.shape if n > size} - of_state)
        return [length for length in found if not self._counts_beyond(size, length)]

    def _counts_beyond(self, size: int, length: int) -> bool:
        """An argument holds an integer above `size`, up to `length`: perhaps a length that the cut axis would not
        have. Some functions of torch (ctc_loss) then read past the end of a tensor, and the process may die."""
        for x in self.leaves:
            if isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
                counts = x.device.type != "meta" and bool(((x > size) & (x <= length)).any())
            else:
                counts = isinstance(x, (tuple, list)) and any(type(n) is int and size < n <= length for n in x)
            if counts:
                return True
        return False

    def cut(self, length: int, size: int) -> Subject:
        """All axes of one length cut to `size`: a batch, a feature or a time axis."""
        leaves: dict[int, Tensor] = {}
        for i, x in enumerate(self.leaves):
            if isinstance(x, Tensor) and length in x.shape:
                for axis, n in enumerate(x.shape):
                    x = x.narrow(axis, 0, size) if n == length else x
                leaves[i] = x.contiguous()
        return self.replaced(leaves)

    def _copy(self) -> Subject:
        other = object.__new__(Subject)
        of_these_values = ("exact", "plain", "jacobian", "differentiable_places", "random")
        other.__dict__.update(
            {name: value for name, value in self.__dict__.items() if name not in of_these_values}
        )
        return other

    @cached_property
    def exact(self) -> Subject:
        """In float64, or where the function refuses that, as it was given."""
        double = self.cast(torch.float64)
        watch = Watch()
        try:
            gradients(double, double.tensors())
            outputs = double.differentiable(double._watched(watch, double.tensors()))
        except Exception:
            return self
        if not all(y.dtype in (torch.float64, torch.complex128) for y in outputs):
            return self.cast(torch.float32)
        if watch.narrowest != torch.float64 and double._is_coarse():
            double.narrowed = watch.narrowest
        return double

    def _watched(self, watch: Watch, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        try:
            with watch:
                return self(*tensors)
        except Exception:
            return self(*tensors)  # an error under the watch alone is not the function's

    def _is_coarse(self) -> bool:
        """Fourth differences of the values, which are tiny where the function computes in float64 throughout."""
        moves = {k: numbers(x) * upstream(numbers(x), 61 + k).sigmoid() for k, x in enumerate(self.points)}
        values = [self.values(self.moved(moves, 1e-4 * n)) for n in range(5)]
        fourth = sum((w * v for w, v in zip((1, -4, 6, -4, 1), values, strict=True)), torch.zeros(()))
        size = values[0].abs().nan_to_num(0, 0, 0).amax() if values[0].numel() else torch.zeros(())
        constant = all(torch.equal(v, values[0]) for v in values[1:])
        return constant or bool((fourth.abs() > 1e-10 * size).any())

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the inputs, or that which the function computes in if it is coarser."""
        return self.narrowed or self.points[0].dtype.to_real()

    @property
    def tolerance(self) -> float:
        """What a finite difference can tell."""
        return 1e-6 if self.dtype == torch.float64 else 3e-2

    @property
    def rounding(self) -> float:
        """By how much, of the largest element, two ways to compute one thing may differ."""
        if self.narrowed in (torch.float16, torch.bfloat16):
            return 32 * torch.finfo(self.narrowed).eps
        return 1e-9 if self.dtype == torch.float64 else 1e-3

    @cached_property
    def random(self) -> bool:
        """It draws random numbers, forward or backward."""
        watch = Watch()
        tensors = self.tensors()
        chosen, upstreams = with_upstream(self._watched(watch, tensors))
        if chosen:
            with suppress(Exception), watch:
                torch.autograd.grad(chosen, tensors, upstreams, allow_unused=True)
        return watch.random or bool(self.seeds_too)

    def runs(self, dtype: torch.dtype) -> bool:
        try:
            other = self.cast(dtype)
            other(*other.tensors())
        except Exception:
            return False
        return True

    @cached_property
    def plain(self) -> Subject | None:
        """The same values by plain operations that torch differentiates: the reference if there is one, else the
        Functions' own forwards without their backwards; None if torch cannot follow those."""
        if self.reference is not None:
            return self.of(self.reference)
        other = self.of(_unwrapped(self.function))
        try:
            found, expected = other(*other.tensors()), self(*self.tensors())
            if len(found) != len(expected) or not all(map(_same, found, expected)):
                return None
            if functions_of(found) or not all(found[i].requires_grad for i in self.differentiable_places):
                return None
            gradients(other, other.tensors())
        except Exception:
            return None
        return other

    # --- what is true, by the function's values alone ---

    @cached_property
    def jacobian(self) -> list[Columns]:
        """∂y/∂x by finite differences, for each differentiable tensor."""
        return [self._columns(k) for k in range(len(self.places))]

    def _columns(self, k: int) -> Columns:
        point = self.points[k]
        chosen = range(numbers(point).numel())
        if len(chosen) > SAMPLED:
            drawn = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(1))
            chosen = sorted(drawn[:SAMPLED].tolist())
        found = []
        for index in chosen:
            direction = torch.zeros_like(numbers(point))
            direction[index] = 1
            # steps grow with the value only where its own rounding would swallow them: a sine turns in between
            scale = 1.0 if self.dtype == torch.float64 else max(1.0, abs(numbers(point)[index].item()))
            found.append(self.difference({k: direction.view_as(numbers(point))}, scale))
        empty = torch.zeros(0, 0, dtype=torch.float64)
        values = torch.stack([value for value, _ in found]) if found else empty
        errors = torch.stack([error for _, error in found]) if found else empty
        return Columns(list(chosen), values, errors)

    def difference(
        self,
        directions: dict[int, Tensor],
        scale: float = 1.0,
        of: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The derivative of all outputs, as one vector, along a direction, and how far it can be trusted.

        Two step sizes that agree are believed; how they differ is the error of the better.
        """
        of = of or self.values
        best: tuple[Tensor, Tensor] | None = None
        previous: Tensor | None = None
        steps = _STEPS[torch.float64 if self.dtype == torch.float64 else torch.float32]
        if self.narrowed in (torch.float16, torch.bfloat16):
            steps = ()  # differences of such values tell nothing
        for step in steps:
            h = step * scale
            try:
                value = sum(
                    (of(self.moved(directions, n * h)) * (w / h) for n, w in _STENCIL), torch.zeros(()).double()
                )
            except Exception:  # out of the function's domain: nearer
                continue
            if previous is not None:
                error = (value - previous).abs().nan_to_num(math.inf, math.inf, math.inf)
                if best is None:
                    best = value, error
                else:
                    better = error < best[1]
                    best = torch.where(better, value, best[0]), torch.where(better, error, best[1])
                if not best[1].numel() or best[1].amax() <= 1e-9 * (1 + value.abs().amax()):
                    break
            previous = value
        if best is None:
            value = of(self.points)
            best = torch.full_like(value, math.nan), torch.full_like(value, math.inf)
        return best

    def moved(self, directions: dict[int, Tensor], step: float) -> list[Tensor]:
        moved = list(self.points)
        for k, direction in directions.items():
            moved[k] = from_numbers(numbers(moved[k]) + step * direction.to(numbers(moved[k])), moved[k])
        return moved

    def values(self, points: Sequence[Tensor]) -> Tensor:
        """The differentiable outputs as one vector of float64."""
        with torch.no_grad():
            outputs = self(*[_copied(x) for x in points])
        return torch.cat([numbers(outputs[i]).double() for i in self.differentiable_places])


class Columns(NamedTuple):
    """Rows of the transposed Jacobian: for the tried elements of one input, the derivative of every output."""

    chosen: list[int]
    values: Tensor
    errors: Tensor


# --- gradients, as autograd gives them ---


def upstream(output: Tensor, seed: int = 3) -> Tensor:
    """An upstream gradient that differs for each element."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*output.shape, 2) if output.is_complex() else output.shape
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
    drawn = torch.view_as_complex(drawn) if output.is_complex() else drawn
    return drawn.to(output.dtype).to(output.device)


def with_upstream(outputs: Sequence[Tensor], seed: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that require a gradient, each with its own, whichever of the others require one."""
    chosen = [(i, y) for i, y in enumerate(outputs) if y.requires_grad]
    return [y for _, y in chosen], [upstream(y, seed + i) for i, y in chosen]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For a backward that writes into its upstream gradient, which is one law's business, not every law's."""
    return [x.clone() for x in tensors]


def gradients(
    subject: Subject, tensors: Sequence[Tensor], upstreams: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """Of the tensors that need one, for the upstream gradients of the differentiable outputs."""
    outputs, default = with_upstream(subject(*tensors))
    needed = [x for x in tensors if x.requires_grad]
    if not outputs:
        return [None] * len(needed)
    return list(
        torch.autograd.grad(outputs, needed, default if upstreams is None else upstreams, allow_unused=True)
    )


# --- the Functions inside ---


def functions_of(outputs: Sequence[Tensor]) -> list[BackwardCFunction]:
    """The nodes that Python Functions left in the graph of these outputs."""
    return [node for node in _nodes(outputs) if isinstance(node, BackwardCFunction)]


def _nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the graph of these outputs."""
    seen: set[Any] = set()
    waiting: list[Any] = [y.grad_fn for y in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [before for before, _ in node.next_functions]


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """For a while an attribute is another."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _reaches(outputs: Sequence[Tensor], module: nn.Module) -> bool:
    """Whether these outputs depend on the module's own parameters."""
    own = {id(p) for p in module.parameters()}
    return any(id(getattr(node, "variable", None)) in own for node in _nodes(outputs))


def class_of(node: Any) -> type[Function]:
    return node._forward_cls


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with every Function's forward in place of the Function."""

    def forward(cls: Any, *args: Any) -> Any:
        ctx: Any = FunctionCtx()
        ctx.needs_input_grad = tuple(isinstance(x, Tensor) and x.requires_grad for x in args)
        if cls.setup_context is Function.setup_context:
            return cls.forward(ctx, *args)
        return cls.forward(*args)

    own = getattr(function, "__self__", None)
    if isinstance(own, type) and issubclass(own, Function):
        return lambda *args: forward(own, *args)

    def run(*args: Any, **kwargs: Any) -> Any:
        with patched(Function, "apply", classmethod(forward)):
            return function(*args, **kwargs)

    return run


# --- tensors as numbers ---


def numbers(tensor: Tensor) -> Tensor:
    """The real numbers in a tensor, as a vector."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)


def from_numbers(flat: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        return torch.view_as_complex(flat.reshape(*like.shape, 2).contiguous())
    return flat.reshape(like.shape)


def position(tensor: Tensor, index: int) -> str:
    """Where the number of this index stands in the tensor."""
    part = ""
    if tensor.is_complex():
        index, part = index // 2, (".real", ".imag")[index % 2]
    where = []
    for size in reversed(tensor.shape):
        index, at = divmod(index, size)
        where.append(str(at))
    return f"[{', '.join(reversed(where))}]{part}"


def kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.shape))}]"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-6, atol=1e-8, equal_nan=True)


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to({torch.float64: torch.complex128}.get(dtype, torch.complex64))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _copied(tensor: Tensor) -> Tensor:
    """A copy with the same strides, gaps and repetitions too."""
    source = tensor.detach()
    if source.device.type == "meta" or not source.numel():
        return source.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True))
    storage = torch.as_strided(source, (extent,), (1,)).clone()
    return torch.as_strided(storage, source.shape, source.stride())


def _names(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """A name for each leaf of the arguments: the parameter's where one can be read off the signature."""
    target = getattr(function, "__self__", None)
    parameters: list[str] = []
    if isinstance(target, type) and issubclass(target, Function):
        parameters = list(inspect.signature(target.forward).parameters)
        if target.setup_context is Function.setup_context:
            parameters = parameters[1:]
    else:
        called = function.forward if isinstance(function, nn.Module) else function
        try:
            found = inspect.signature(called).parameters.values()
        except (TypeError, ValueError):
            found = []
        parameters = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [parameters[i] if i < len(parameters) else f"input {i}" for i in range(len(args))]
    found_names = []
    for name, value in [*zip(names, args, strict=True), *kwargs.items()]:
        n = len(tree_leaves(value))
        found_names += [name] if n == 1 else [f"{name}.{i}" for i in range(n)]
    return found_names
