"""What a rule saves and computes for one set of needed gradients: `Plan`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from functools import cached_property
from operator import itemgetter
from typing import Any

from torch import Tensor

from manualgrad import vendor_kernels
from manualgrad.rule.formulas import Formula, Program
from manualgrad.rule.reuse import ReusingProgram, Unsupported, fast_version, uses_scatter
from manualgrad.rule.spec import OUTPUT_SHAPE, RuleSpec

Gradients = tuple[Tensor | None, ...]
Compute = Callable[..., Gradients]


class Plan:
    """The saved values and the programs for one set of needed gradients.

    The saved values are what the formulas of the needed gradients name, directly or through other formulas. Each
    program takes them and ``grad``, and returns a gradient or None for every input. The programs:

        plain                  the formulas as written
        differentiable         the formulas as written, and statistics are recomputed from the inputs: for a
                               backward that is itself differentiated
        plain_with_kernels     plain, with vendor kernels
        reusing                plain, with vendor kernels and reused temporaries: for large tensors

    A program is compiled when it is first used.

    Args:
        needed: the names of the needed gradients.
        forward_mode: an input has a tangent. Then the plan also saves what the other gradients name.
        memory_saving: the forward computes the methods that ``save_instead`` names (``precomputed``), and their
            values are saved in place of the tensors that they name.
    """

    def __init__(self, spec: RuleSpec, needed: Iterable[str], forward_mode: bool, memory_saving: bool) -> None:
        self.spec = spec
        self.rule = spec.rule
        self.needed = [name for name in needed if self.check_differentiable(name)]
        precomputed = frozenset(self.rule.save_instead if memory_saving else ())
        self.formulas = spec.formulas_for(self.needed, spec.available | precomputed)
        self._differentiable_formulas = spec.formulas_for(
            self.needed, spec.available_when_differentiated | precomputed
        )
        self._batch_formulas = (
            spec.formulas_for(["batch_dims"], spec.available) if "batch_dims" in spec.formulas else []
        )
        names = _parameters([*self.formulas, *self._differentiable_formulas, *self._batch_formulas])
        if forward_mode:
            gradients = [name for name in spec.gradients if name in spec.formulas]
            names |= _parameters(spec.formulas_for(gradients, spec.available_when_differentiated)) | {OUTPUT_SHAPE}

        values = (*spec.values, OUTPUT_SHAPE)
        tensors = [name for name in values if name in names and name not in spec.settings]
        settings = [name for name in spec.values if name in names and name in spec.settings]
        self.precomputed = [name for name in self.rule.save_instead if name in names & precomputed]
        self.names = (*tensors, *self.precomputed, *settings)
        """The names of the saved tensors, then of the saved settings."""
        self.select_tensors = _select([values.index(name) for name in tensors])
        """Takes the tensors to save from (*inputs, output, *statistics, output shape)."""
        self.select_settings = _select([spec.values.index(name) for name in settings])
        self._precompute_formulas = spec.formulas_for(self.precomputed, spec.available)
        used = _parameters(self._precompute_formulas)
        self._precompute_parameters = [name for name in spec.values if name in used]
        self.select_precompute_inputs = _select([spec.values.index(name) for name in self._precompute_parameters])
        self.statistics = frozenset(self.names.index(name) for name in self.rule.statistics if name in self.names)
        """The positions of the statistics in `names`."""
        self.has_batch_dims = bool(self._batch_formulas)

    def check_differentiable(self, gradient: str) -> bool:
        if gradient in self.spec.formulas:
            return True
        raise RuntimeError(
            f"{self.rule.__name__} is not differentiable with respect to {gradient.removeprefix('grad_')!r}: "
            "pass a tensor that does not require a gradient"
        )

    def program(self, formulas: list[Formula] | None = None) -> Program:
        formulas = self.formulas if formulas is None else formulas
        return Program("backward", formulas, (*self.names, "grad"), self.spec.gradients)

    @cached_property
    def plain(self) -> Compute:
        return self.program().compile()

    @cached_property
    def differentiable(self) -> Compute:
        if self._differentiable_formulas == self.formulas:
            return self.plain
        return self.program(self._differentiable_formulas).compile()

    @cached_property
    def plain_with_kernels(self) -> Compute:
        return self._program_with_kernels(fast_formulas=False).compile()

    @cached_property
    def reusing(self) -> Compute:
        return compile_with_reuse(self._program_with_kernels(fast_formulas=True))

    @cached_property
    def precompute(self) -> Callable[..., tuple[Any, ...]]:
        """Computes the ``precomputed`` values."""
        return compile_with_reuse(
            Program("forward", self._precompute_formulas, self._precompute_parameters, self.precomputed)
        )

    @cached_property
    def batch_dims(self) -> Callable[..., tuple[int]]:
        """(*saved values, grad) -> the number of leading axes of ``grad`` that count independent rows."""
        return Program("batch_dims", self._batch_formulas, (*self.names, "grad"), ["batch_dims"]).compile()

    @cached_property
    def vendor_kernel(self) -> tuple[tuple[str, ...], Callable[..., Any]] | None:
        """The names of some needed gradients, and the vendor kernel that computes them."""
        for names, kernel in self.rule.vendor_kernels.items():
            if set(names) <= set(self.needed):
                return names, kernel
        return None

    @cached_property
    def uses_scatter(self) -> bool:
        return any(uses_scatter(formula.function) for formula in self.formulas)

    def _program_with_kernels(self, fast_formulas: bool) -> Program:
        if self.vendor_kernel is None:
            return self.program()
        names, kernel = self.vendor_kernel
        found: list[Formula] = []
        for formula in self.formulas:
            if formula.target not in names:
                found.append(formula)
                continue
            if formula.target == names[0]:
                found.append(Formula.from_function(_BY_KERNEL, _if_enabled(kernel)))
            found.append(_prefer_kernel(formula, names.index(formula.target), len(names) == 1, fast_formulas))
        return self.program(found)


_BY_KERNEL = "gradients_by_kernel"


def _parameters(formulas: Iterable[Formula]) -> set[str]:
    return {name for formula in formulas for name in formula.parameters}


def _if_enabled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def compute(*args: Any) -> Any:
        return kernel(*args) if vendor_kernels.enabled else None

    return compute


def _prefer_kernel(formula: Formula, index: int, is_only: bool, fast_formula: bool) -> Formula:
    """The result of the vendor kernel, or of the formula if the kernel does not apply."""
    function = fast_version(formula.function) if fast_formula else formula.function

    def compute(by_kernel: Any, *args: Any) -> Any:
        if by_kernel is None:
            return function(*args)
        return by_kernel if is_only else by_kernel[index]

    compute.__qualname__ = f"{formula.target}.by_kernel"
    return Formula(formula.target, compute, (_BY_KERNEL, *formula.parameters))


def compile_with_reuse(program: Program) -> Callable[..., Any]:
    try:
        return ReusingProgram(program).compile()
    except Unsupported:
        return program.compile()


def _select(positions: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that takes the values at these positions of a tuple."""
    if not positions:
        return lambda values: ()
    return itemgetter(*positions) if len(positions) > 1 else itemgetter(slice(positions[0], positions[0] + 1))
