"""Random numbers: who draws them, and the same ones in every precision."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_WIDE = (torch.float64, torch.complex128)
_CONTINUOUS = {
    f"{name}{suffix}"
    for name in ("rand", "randn", "uniform", "normal", "exponential", "log_normal", "cauchy")
    for suffix in ("", "_", "_like")
} | {"normal_functional"}

_IMPLICIT = {torch.ops.aten._standard_gamma.default, torch.ops.aten._sample_dirichlet.default}


def set_seed(number: int) -> None:
    """torch.manual_seed, which notes the whole call stack three times over, for accelerators that may yet be used:
    half the time of a small operation."""
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


def random_states() -> dict[str, Any]:
    """The state of every generator that a program shares."""
    states: dict[str, Any] = {"torch": torch.get_rng_state().numpy().tobytes(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["CUDA"] = bytes(torch.cuda.get_rng_state().tolist())
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = kind, keys.tobytes(), *rest
    return states


@contextmanager
def random_states_kept() -> Iterator[None]:
    """torch's, Python's and numpy's are afterwards as they were."""
    python = random.getstate()
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                sys.modules["numpy"].random.set_state(numpy)


class Watch(TorchDispatchMode):
    """Notes whether random numbers are drawn, by which generators, and the coarsest dtype that float64 becomes."""

    def __init__(self) -> None:
        super().__init__()
        self.random = False
        self.generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        self.narrowest = torch.float64
        self.implicit = False  # the gradient of a draw is that of its distribution, not of the number drawn

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = torch.Tag.nondeterministic_seeded in func.tags
        generator = kwargs.get("generator") or torch.default_generator
        before = generator.get_state() if draws else None
        result = func(*args, **kwargs)
        self.implicit |= func in _IMPLICIT
        if before is not None and not (self.random and generator is torch.default_generator):
            moved = not torch.equal(before, generator.get_state())
            self.random |= moved
            if moved and generator is not torch.default_generator:
                self.generators.setdefault(id(generator), (generator, before))
        if self._narrows(args, result):
            self.narrowest = max(
                self.narrowest,
                *(y.dtype.to_real() for y in _floats(result)),
                key=lambda dtype: torch.finfo(dtype).eps,
            )
        return result

    @staticmethod
    def _narrows(args: Any, result: Any) -> bool:
        if isinstance(result, Tensor):
            if result.dtype in _WIDE or not _is_float(result):
                return False
        elif not any(y.dtype not in _WIDE for y in _floats(result)):
            return False
        return any(isinstance(x, Tensor) and x.dtype in _WIDE for x in args)


class DrawnAlike(TorchDispatchMode):
    """Random numbers do not depend on the dtype they are drawn in.

    Each operation that draws runs in float64. Its numbers are rounded so coarsely that every dtype holds them,
    and to the middles of steps, so that none lies near a probability that a dtype rounds.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        given = next((x.dtype for x in tree_leaves(args) if isinstance(x, Tensor) and _is_float(x)), None)
        dtype = kwargs.get("dtype") or given
        if dtype is None or not dtype.is_floating_point:
            return func(*args, **kwargs)
        if kwargs.get("dtype"):
            kwargs["dtype"] = torch.float64
        wide = [tree_map(_widened, x) for x in args]
        drawn = func(*wide, **kwargs)
        if name in _CONTINUOUS:
            drawn = drawn.copy_(_coarse(drawn))
        for i, argument in enumerate(func._schema.arguments[: len(args)]):
            if argument.alias_info is not None and argument.alias_info.is_write and wide[i] is not args[i]:
                args[i].copy_(wide[i])

        def narrowed(y: Any) -> Any:
            for i, x in enumerate(wide):
                if y is x:
                    return args[i]
            return y.to(dtype) if isinstance(y, Tensor) and y.dtype == torch.float64 else y

        return tree_map(narrowed, drawn)


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _floats(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor) and _is_float(x)]


def _widened(x: Any) -> Any:
    return x.to(torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x


def _coarse(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(((mantissa * 32).floor() + 0.5) / 32, exponent)
