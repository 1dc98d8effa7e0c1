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
        forward_mode: forward mode is active. An input may then have a tangent although its gradient is not needed,
            so the plan also saves what the other gradients name.
        memory_saving: the forward computes the methods that ``save_instead`` names. Their results are saved
            instead of their parameters.
    """

    def __init__(self, spec: RuleSpec, needed: Iterable[str], forward_mode: bool, memory_saving: bool) -> None:
        self.spec = spec
        self.rule = spec.rule
        needed = tuple(needed)
        check_differentiable(spec, needed)
        precomputed = frozenset(self.rule.save_instead if memory_saving else ())
        self.formulas = spec.formulas_for(needed, spec.available | precomputed)
        self._differentiable_formulas = spec.formulas_for(needed, spec.available_when_differentiated | precomputed)
        self.has_batch_dims = "batch_dims" in spec.formulas
        self._batch_formulas = spec.formulas_for(["batch_dims"] if self.has_batch_dims else [], spec.available)
        used = _parameters([*self.formulas, *self._differentiable_formulas, *self._batch_formulas])
        if forward_mode:
            gradients = [name for name in spec.gradients if name in spec.formulas]
            used |= _parameters(spec.formulas_for(gradients, spec.available_when_differentiated)) | {OUTPUT_SHAPE}

        values = (*spec.values, OUTPUT_SHAPE)
        tensors = [name for name in values if name in used and name not in spec.settings]
        settings = [name for name in values if name in used and name in spec.settings]
        self.precomputed = [name for name in self.rule.save_instead if name in used & precomputed]
        """The methods that the forward computes."""
        self.names = (*tensors, *self.precomputed, *settings)
        """The names of the saved tensors, then of the saved settings."""
        self.statistic_positions = {self.names.index(x) for x in self.rule.statistics if x in self.names}
        """The positions of the statistics in `names`."""

        self._precompute_formulas = spec.formulas_for(self.precomputed, spec.available)
        precompute_used = _parameters(self._precompute_formulas)
        self._precompute_parameters = [name for name in spec.values if name in precompute_used]
        # Each of these takes some of (*inputs, output, *statistics, tensor with the output's shape).
        self.select_tensors = _select(values, tensors)
        self.select_settings = _select(values, settings)
        self.select_precompute_inputs = _select(values, self._precompute_parameters)

    def program(self, formulas: list[Formula] | None = None) -> Program:
        """The program of these formulas, by default of `formulas`."""
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
        return self._program_with_kernels(with_reuse=False).compile()

    @cached_property
    def reusing(self) -> Compute:
        return compile_with_reuse(self._program_with_kernels(with_reuse=True))

    @cached_property
    def precompute(self) -> Callable[..., tuple[Any, ...]]:
        """Computes the results of the `precomputed` methods."""
        return compile_with_reuse(
            Program("forward", self._precompute_formulas, self._precompute_parameters, self.precomputed)
        )

    @cached_property
    def batch_dims(self) -> Callable[..., tuple[int]]:
        """(*saved values, grad) -> the number of leading axes of ``grad`` that are batch axes (blocking.py)."""
        return Program("batch_dims", self._batch_formulas, (*self.names, "grad"), ["batch_dims"]).compile()

    @cached_property
    def vendor_kernel(self) -> tuple[tuple[str, ...], Callable[..., Any]] | None:
        """The names of some needed gradients, and the vendor kernel that computes them."""
        for names, kernel in self.rule.vendor_kernels.items():
            if {x.target for x in self.formulas}.issuperset(names):
                return names, kernel
        return None

    @cached_property
    def uses_scatter(self) -> bool:
        """A gradient may be far larger than all saved tensors, for example that of an embedding."""
        return any(uses_scatter(formula.function) for formula in self.formulas)

    def _program_with_kernels(self, with_reuse: bool) -> Program:
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
            found.append(_prefer_kernel(formula, names.index(formula.target), len(names) == 1, with_reuse))
        return self.program(found)


_BY_KERNEL = "gradients_by_kernel"


def check_differentiable(spec: RuleSpec, gradients: Iterable[str]) -> None:
    """Raise a RuntimeError if the rule has no formula for one of these gradients."""
    for gradient in gradients:
        if gradient not in spec.formulas:
            raise RuntimeError(
                f"{spec.rule.__name__} is not differentiable with respect to {gradient.removeprefix('grad_')!r}: "
                "pass a tensor that does not require a gradient"
            )


def _parameters(formulas: Iterable[Formula]) -> set[str]:
    return {name for formula in formulas for name in formula.parameters}


def _if_enabled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def compute(*args: Any) -> Any:
        return kernel(*args) if vendor_kernels.enabled else None

    return compute


def _prefer_kernel(formula: Formula, index: int, is_only: bool, with_reuse: bool) -> Formula:
    """The result of the vendor kernel, or of the formula if the kernel does not apply.

    A program calls this formula and cannot inline it. So with_reuse rewrites the formula here.
    """
    function = fast_version(formula.function) if with_reuse else formula.function

    def compute(by_kernel: Any, *args: Any) -> Any:
        if by_kernel is None:
            return function(*args)
        return by_kernel if is_only else by_kernel[index]

    compute.__qualname__ = f"{formula.target}.by_kernel"
    return Formula(formula.target, compute, (_BY_KERNEL, *formula.parameters))


def compile_with_reuse(program: Program) -> Callable[..., Any]:
    """The program with reused temporaries, if it can be rewritten."""
    try:
        return ReusingProgram(program).compile()
    except Unsupported:
        return program.compile()


def _select(names: tuple[str, ...], selected: list[str]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that takes a tuple of values with these names, and returns the tuple of the selected values."""
    positions = [names.index(name) for name in selected]
    if not positions:
        return lambda values: ()
    if len(positions) == 1:  # itemgetter of one index would not return a tuple
        return itemgetter(slice(positions[0], positions[0] + 1))
    return itemgetter(*positions)
