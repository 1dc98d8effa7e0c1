"""Random numbers: which generators a function uses, and equal numbers in every dtype."""

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

from manualgrad.verification.tensors import is_differentiable

_FLOAT64 = (torch.float64, torch.complex128)
_CONTINUOUS = {
    f"{name}{suffix}"
    for name in ("rand", "randn", "uniform", "normal", "exponential", "log_normal", "cauchy")
    for suffix in ("", "_", "_like")
} | {"normal_functional"}

_REPARAMETERIZED = {torch.ops.aten._standard_gamma.default, torch.ops.aten._sample_dirichlet.default}


def set_seed(seed: int) -> None:
    """Seed torch's generators.

    `torch.manual_seed` also records the call stack for each accelerator that is not initialized yet, which takes
    as long as a small operator. Without an accelerator this function skips that.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of the global generators, in a form that can be compared."""
    states: dict[str, Any] = {"torch": torch.get_rng_state().numpy().tobytes(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["CUDA"] = bytes(torch.cuda.get_rng_state().tolist())
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = kind, keys.tobytes(), *rest
    return states


@contextmanager
def preserve_random_states() -> Iterator[None]:
    """Restore the states of torch's, Python's and numpy's global generators on exit."""
    python = random.getstate()
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                sys.modules["numpy"].random.set_state(numpy)


class OperatorObserver(TorchDispatchMode):
    """Records which random generators the operators use, and their lowest precision for float64 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.draws_random_numbers = False
        self.generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        """Generators other than torch's default one, with their states before the first use."""
        self.lowest_precision = torch.float64
        self.reparameterized = False
        """Some gradient is that of a distribution by implicit reparameterization, not that of the sample."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        generator = kwargs.get("generator") or torch.default_generator
        before = generator.get_state() if seeded else None
        result = func(*args, **kwargs)
        self.reparameterized |= func in _REPARAMETERIZED
        if before is not None and not (self.draws_random_numbers and generator is torch.default_generator):
            advanced = not torch.equal(before, generator.get_state())
            self.draws_random_numbers |= advanced
            if advanced and generator is not torch.default_generator:
                self.generators.setdefault(id(generator), (generator, before))
        if self._lowers_precision(args, result):
            self.lowest_precision = max(
                self.lowest_precision,
                *(y.dtype.to_real() for y in _floating_tensors(result)),
                key=lambda dtype: torch.finfo(dtype).eps,
            )
        return result

    @staticmethod
    def _lowers_precision(args: Any, result: Any) -> bool:
        if isinstance(result, Tensor):
            if result.dtype in _FLOAT64 or not is_differentiable(result):
                return False
        elif not any(y.dtype not in _FLOAT64 for y in _floating_tensors(result)):
            return False
        return any(isinstance(x, Tensor) and x.dtype in _FLOAT64 for x in args)


class SameRandomNumbersInAllDtypes(TorchDispatchMode):
    """Makes random numbers independent of the dtype in which they are drawn.

    Each random operator runs in float64. Its results are rounded so coarsely that every dtype represents them,
    and to the middle of a step, so that none is close to a probability that a dtype rounds.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        input_dtype = next((x.dtype for x in _floating_tensors(args)), None)
        dtype = kwargs.get("dtype") or input_dtype
        if dtype is None or not dtype.is_floating_point:
            return func(*args, **kwargs)
        if kwargs.get("dtype"):
            kwargs["dtype"] = torch.float64
        args64 = [tree_map(_to_float64, x) for x in args]
        sample = func(*args64, **kwargs)
        if name in _CONTINUOUS:
            sample = sample.copy_(_round_coarsely(sample))
        for i, argument in enumerate(func._schema.arguments[: len(args)]):
            if argument.alias_info is not None and argument.alias_info.is_write and args64[i] is not args[i]:
                args[i].copy_(args64[i])

        def to_dtype(y: Any) -> Any:
            for i, x in enumerate(args64):
                if y is x:
                    return args[i]
            return y.to(dtype) if isinstance(y, Tensor) and y.dtype == torch.float64 else y

        return tree_map(to_dtype, sample)


def _floating_tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor) and is_differentiable(x)]


def _to_float64(x: Any) -> Any:
    return x.to(torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x


def _round_coarsely(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(((mantissa * 32).floor() + 0.5) / 32, exponent)
