"""From the formulas of a rule: the `torch.autograd.Function`, with setup_context, backward and jvp.

For each set of needed gradients there is one `Plan`: what to save, and the programs that compute from it:

    plain             the formulas as written
    differentiable    the same, with statistics computed from the inputs again, if the backward is differentiated
    reusing           the plain one with its temporaries reused, for large tensors that nothing observes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from manualgrad import blocking, recomputation, vendor_kernels
from manualgrad.fallback import UNRELATED_ERRORS
from manualgrad.rule.formulas import Formula, Program, note_place
from manualgrad.rule.operations import CHANNELS_LAST, is_channels_last
from manualgrad.rule.reuse import Reusing, Unsupported, fast, makes_tables
from manualgrad.rule.spec import SHAPE_OF_OUTPUT, Spec
from manualgrad.rule.torch_internals import (
    backward_is_differentiated,
    in_forward_mode,
    inplace_is_safe,
    is_any_autocast_enabled,
    is_distributed,
    outer_forward_mode,
    primal,
    without_dead_wrappers,
    without_view,
)

Gradients = tuple[Tensor | None, ...]
Compute = Callable[..., Gradients]

LOW_PRECISION = (torch.bfloat16, torch.float16)

LARGE = 2**15
"""With fewer numbers in its largest tensor the plain program is faster than the one that reuses temporaries."""


class Plan:
    """What one set of needed gradients takes.

    Args:
        needed: the names of the gradients.
        forward_mode: any input may have a tangent.
        memory_saving: what ``save_instead`` names is saved in place of what it is computed from.
    """

    def __init__(self, spec: Spec, needed: Iterable[str], forward_mode: bool, memory_saving: bool) -> None:
        self.spec = spec
        self.rule = spec.rule
        self.needed = [name for name in needed if self._check_differentiable(name)]
        early = frozenset(self.rule.save_instead if memory_saving else ())
        self.formulas = spec.order(self.needed, spec.given | early)
        again = spec.order(self.needed, spec.given - spec.moving | early)
        names = {name for formula in (*self.formulas, *again) for name in formula.names}
        if forward_mode:
            gradients = [name for name in spec.gradients if name in spec.formulas]
            reached = spec.order(gradients, spec.given - spec.moving)
            names |= {name for formula in reached for name in formula.names} | {SHAPE_OF_OUTPUT}
        self.batch_formulas = spec.order(["batch_dims"], spec.given) if "batch_dims" in spec.formulas else []
        names |= {name for formula in self.batch_formulas for name in formula.names}

        values = (*spec.values, SHAPE_OF_OUTPUT)
        tensors = [name for name in values if name in names and name not in spec.settings]
        settings = [name for name in spec.values if name in names and name in spec.settings]
        self.early = [name for name in self.rule.save_instead if name in names & early]
        self.names = (*tensors, *self.early, *settings)
        """Of the saved tensors, then of the settings."""
        self.tensors = _select([values.index(name) for name in tensors])
        """Of inputs and outputs, the tensors to save."""
        self.settings = _select([spec.values.index(name) for name in settings])
        first = spec.order(self.early, spec.given)
        self.early_names = [name for name in spec.values if any(name in formula.names for formula in first)]
        self.early_inputs = _select([spec.values.index(name) for name in self.early_names])
        self.early_formulas = first
        self.statistics = frozenset(self.names.index(name) for name in self.rule.statistics if name in self.names)
        self.has_batch_dims = bool(self.batch_formulas)
        self._again = again

    def _check_differentiable(self, gradient: str) -> bool:
        if gradient in self.spec.formulas:
            return True
        raise RuntimeError(
            f"{self.rule.__name__} is not differentiable with respect to {gradient.removeprefix('grad_')!r}: "
            "pass a tensor that does not require a gradient"
        )

    def program(self, formulas: list[Formula] | None = None) -> Program:
        return Program(
            "backward", self.formulas if formulas is None else formulas, (*self.names, "grad"), self.spec.gradients
        )

    @cached_property
    def plain(self) -> Compute:
        return self.program().compiled()

    @cached_property
    def has_kernels(self) -> bool:
        return any(formula.target in self.rule.vendor_kernels for formula in self.formulas)

    @cached_property
    def makes_tables(self) -> bool:
        return any(makes_tables(formula.function) for formula in self.formulas)

    def _with_kernels(self, fast_formulas: bool) -> Program:
        kernels = self.rule.vendor_kernels
        return self.program(
            [_kernel_or(x, kernels[x.target], fast_formulas) if x.target in kernels else x for x in self.formulas]
        )

    @cached_property
    def direct(self) -> Compute:
        """With vendor kernels."""
        return self._with_kernels(fast_formulas=False).compiled()

    @cached_property
    def differentiable(self) -> Compute:
        return self.program(self._again).compiled() if self._again != self.formulas else self.plain

    @cached_property
    def reusing(self) -> Compute:
        return compiled_with_reuse(self._with_kernels(fast_formulas=True))

    @cached_property
    def compute_early(self) -> Callable[..., tuple[Any, ...]]:
        return compiled_with_reuse(Program("forward", self.early_formulas, self.early_names, self.early))

    @cached_property
    def batch_dims(self) -> Callable[..., tuple[int]]:
        """(*saved, grad) -> how many leading axes of ``grad`` number rows that are independent."""
        return Program("batch_dims", self.batch_formulas, (*self.names, "grad"), ["batch_dims"]).compiled()


def _kernel_or(formula: Formula, kernel: Callable[..., Any], fast_formula: bool) -> Formula:
    """The formula, computed by a vendor's kernel where that applies."""
    function = fast(formula.function) if fast_formula else formula.function

    def compute(*args: Any) -> Any:
        found = kernel(*args) if vendor_kernels.enabled else None
        return function(*args) if found is None else found

    compute.__qualname__ = f"{formula.target}.by_kernel"
    return Formula(formula.target, compute, formula.names)


def compiled_with_reuse(program: Program) -> Callable[..., Any]:
    try:
        return Reusing(program).compiled()
    except Unsupported:
        return program.compiled()


def _select(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """The function that takes the values at some places of a tuple."""
    if not places:
        return lambda values: ()
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


class Saved(NamedTuple):
    """What a node of the graph saves besides its tensors."""

    plan: Plan
    unpack: Callable[[Any], list[Any]] | None
    """From the saved tensors those that the plan names, if they are not the same."""
    settings: tuple[Any, ...]
    dtypes: list[torch.dtype | None] | None
    """To which dtypes the gradients are rounded, if they are computed in float32."""


def saved_by(node: Any) -> tuple[type[Any], dict[str, Any]] | None:
    """The rule behind a node of an autograd graph, and by name what it has saved for its backward: inputs, output,
    statistics, settings. None for a node that is of no rule.

    Raises:
        RuntimeError: a backward without ``retain_graph`` has freed it, or (torch 2.11) no output of the node
            exists any more.
    """
    match getattr(node, "saved", None):
        case Saved(plan, unpack, settings, _):
            tensors = node.saved_tensors if unpack is None else unpack(node.saved_tensors)
            return plan.rule, dict(zip(plan.names, (*tensors, *settings), strict=True))
    return None


class Implementation:
    """The parts of the Functions of one rule."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        rule = self.rule = spec.rule
        self.forward = rule.forward
        self.n = len(spec.inputs)
        self.has_statistics = bool(rule.statistics)
        self.upcasts = rule.upcast_gradients
        self.refuses_complex = not rule.supports_complex
        self.plans: dict[Any, Plan] = {}
        self.pushforwards: dict[Any, Compute] = {}

    def plan(self, needed: tuple[bool, ...], forward_mode: bool = False, memory_saving: bool = False) -> Plan:
        key = needed, forward_mode, memory_saving
        found = self.plans.get(key)
        if found is None:
            names = [name for name, need in zip(self.spec.gradients, needed, strict=True) if need]
            found = self.plans[key] = Plan(self.spec, names, forward_mode, memory_saving)
        return found

    @cached_property
    def recipe(self) -> tuple[Callable[..., Any], list[tuple[str, int]]] | None:
        """How the output is recomputed, and from which values (see recomputation.py)."""
        if self.rule.recomputable:
            function, names = self.rule.apply, self.spec.inputs
        elif "recompute" in self.spec.formulas:
            function, names = self._recompute, self.spec.formulas["recompute"].names
        else:
            return None
        return function, [(name, self.spec.values.index(name)) for name in names]

    def _recompute(self, *values: Any) -> Any:
        """The formula ``recompute``, with statistics from the inputs if the backward is differentiated."""
        differentiated = backward_is_differentiated()
        return (self._recompute_differentiable if differentiated else self._recompute_saved)(*values)[0]

    @cached_property
    def _recompute_saved(self) -> Callable[..., Any]:
        return compiled_with_reuse(self._program_to_recompute(self.spec.given))

    @cached_property
    def _recompute_differentiable(self) -> Callable[..., Any]:
        return self._program_to_recompute(self.spec.given - self.spec.moving).compiled()

    def _program_to_recompute(self, given: frozenset[str]) -> Program:
        names = self.spec.formulas["recompute"].names
        return Program("forward", self.spec.order(["recompute"], given), names, ["recompute"])

    # --- forward ---

    def writable_forward(self, *args: Any) -> Any:
        """What ``forward`` returns, none of it a view, which autograd would refuse writes into."""
        found = self.forward(*args)
        return tuple(without_view(x, args) for x in found) if self.has_statistics else without_view(found, args)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values = self.all_values(ctx, inputs, output)
        forward_mode = in_forward_mode()
        if forward_mode:
            values += (values[self.n].new_zeros(()).expand(values[self.n].shape),)
        plan = self.plan(ctx.needs_input_grad, forward_mode)
        tensors = plan.tensors(values)
        ctx.save_for_backward(*tensors)
        ctx.saved = Saved(plan, None, plan.settings(values), self.low_dtypes(inputs, values[self.n]))
        if forward_mode:
            ctx.save_for_forward(*tensors)  # the same: else grad(vmap) is wrong
            ctx.set_materialize_grads(False)

    def setup_memory_saving(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """The same where nothing observes the forward: a large tensor is saved by its recipe, if there is one."""
        large = recomputation.large(output[0] if self.has_statistics else output)
        if in_forward_mode() or not (large or recomputation.large(inputs[0])):
            self.setup_context(ctx, inputs, output)
            return
        values = self.all_values(ctx, inputs, output)
        plan = self.plan(ctx.needs_input_grad, False, True)
        dtypes = self.low_dtypes(inputs, values[self.n])
        self.save(ctx, plan, values, self.early_values(plan, values, dtypes), dtypes, leaves_recipe=large)

    def all_values(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Any, ...]:
        self.check_complex(inputs[0])
        return (*inputs, *self.mark_statistics(ctx, output)) if self.has_statistics else (*inputs, output)

    def check_complex(self, input: Tensor) -> None:
        if self.refuses_complex and input.is_complex():
            raise RuntimeError(
                f"{self.rule.__name__} does not support automatic differentiation for complex numbers"
            )

    def mark_statistics(self, ctx: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or backward receives zeros for the statistics
        return output

    def low_dtypes(self, inputs: tuple[Any, ...], output: Tensor) -> list[torch.dtype | None] | None:
        if not self.upcasts or output.dtype not in LOW_PRECISION:
            return None
        return [x.dtype if isinstance(x, Tensor) else None for x in inputs]

    def early_values(self, plan: Plan, values: tuple[Any, ...], dtypes: Any) -> tuple[Any, ...]:
        """What ``save_instead`` names."""
        if not plan.early:
            return ()
        known = plan.early_inputs(values)
        return plan.compute_early(*(in_float32(known) if dtypes else known))

    def save(
        self,
        ctx: Any,
        plan: Plan,
        values: tuple[Any, ...],
        early: Any,
        dtypes: Any,
        leaves_recipe: bool,
        writes: int = 0,
    ) -> None:
        packer = recomputation.Pantry((*plan.tensors(values), *early))
        if leaves_recipe and self.recipe is not None and "output" not in plan.names:
            function, needed = self.recipe
            parts = dict(zip(plan.names, packer.parts, strict=False))
            asked = [(values[place], parts.get(name)) for name, place in needed]
            ctx.recipe = packer.recipe(function, asked, values[self.n], writes)
        ctx.save_for_backward(*packer.tensors)
        ctx.saved = Saved(plan, packer.again(), plan.settings(values), dtypes)

    # --- forward in place ---

    @cached_property
    def early_needs_output(self) -> bool:
        formulas = self.spec.order(self.rule.save_instead, self.spec.given)
        return any("output" in formula.names for formula in formulas)

    def forward_in_place(self, ctx: Any, plan: Plan, before: Any, *inputs: Any) -> Any:
        """``forward_``, and save what the plan names.

        For the input itself it saves what it was before: its recipe, or a copy (in a tuple, so that it is no
        input), or None where no saved quantity names it.
        """
        self.check_complex(inputs[0])
        large, dtypes = recomputation.large(inputs[0]), self.low_dtypes(inputs, inputs[0])
        early = () if self.early_needs_output else self.early_values(plan, inputs, dtypes)
        written = self.rule.forward_(*inputs)
        ctx.mark_dirty(inputs[0])
        values = (before[0] if type(before) is tuple else before, *inputs[1:])
        values = (*values, *self.mark_statistics(ctx, written)) if self.has_statistics else (*values, written)
        if self.early_needs_output:
            early = self.early_values(plan, values, dtypes)
        if large:
            self.save(ctx, plan, values, early, dtypes, leaves_recipe=before is not None, writes=1)
        else:
            ctx.save_for_backward(*plan.tensors(values))
            ctx.saved = Saved(plan, None, plan.settings(values), dtypes)
        return written

    def backward_in_place(self, ctx: Any, *grads: Any) -> Gradients:
        return (None, None, *self.backward(ctx, *grads))

    # --- backward ---

    def backward(self, ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
        if grad is None:
            return (None,) * self.n
        plan, unpack, settings, dtypes = ctx.saved
        tensors = ctx.saved_tensors
        if unpack is not None:
            with without_autocast(tensors) if is_any_autocast_enabled() else nullcontext():
                tensors = unpack(tensors)
        known = (*tensors, *settings, grad)
        try:
            found = self.gradients(plan, known, dtypes)
        except Exception as error:
            note_place(error)
            raise
        return self.formatted(found, grad) if self.rule.format_of_grad else found

    def gradients(self, plan: Plan, known: tuple[Any, ...], dtypes: Any) -> Gradients:
        grad: Tensor = known[-1]
        large = plan.makes_tables or is_large(known)
        if backward_is_differentiated():
            compute, known = plan.differentiable, without_dead_wrappers(known)
        elif (large or plan.has_kernels) and inplace_is_safe(*_tensors(known)):
            compute = plan.reusing if large else plan.direct
            if large and plan.has_batch_dims and (found := in_blocks(plan, known, dtypes)) is not None:
                return found
        else:
            compute = plan.plain
        if type(grad) is not Tensor and is_distributed(grad):
            compute = of_distributed(compute)
        if dtypes or is_any_autocast_enabled():
            return computed_in_float32(compute, known, dtypes)
        return compute(*known)

    def formatted(self, found: Gradients, grad: Tensor) -> Gradients:
        """With the memory format of the upstream gradient, where the rule says so."""
        if not inplace_is_safe(grad) or not is_channels_last(grad):  # (under vmap it cannot be asked)
            return found
        form = CHANNELS_LAST[grad.dim()]
        places = [self.spec.gradients.index(name) for name in self.rule.format_of_grad]
        return tuple(
            x.contiguous(memory_format=form) if i in places and x is not None and x.dim() == grad.dim() else x
            for i, x in enumerate(found)
        )

    # --- forward mode ---

    def jvp(self, ctx: Any, *tangents: Tensor | None) -> Any:
        """A backward is linear in ``grad``, L = Jᵀ. So the pushforward is its transpose, J = (Jᵀ)ᵀ, which
        `torch.func.vjp` takes of the formulas with respect to ``grad``, at zero."""
        plan, _, settings, dtypes = ctx.saved
        with outer_forward_mode():
            known = [*[primal(x) for x in ctx.saved_tensors], *settings]
            moved = [i for i, tangent in enumerate(tangents) if tangent is not None]
            compute = self.pushforward(plan, moved)
            rounded = [dtypes[i] for i in moved] if dtypes else None
            zero = known[plan.names.index(SHAPE_OF_OUTPUT)].contiguous()
            pullback = torch.func.vjp(lambda grad: computed_in_float32(compute, [*known, grad], rounded), zero)[1]
            tangent = pullback(tuple(primal(tangents[i]) for i in moved))[0]
            if 0 in tangent.stride():  # refused for an output that is a view (F.linear's, of three axes)
                tangent = tangent.contiguous()
        return (tangent, *[None] * len(self.rule.statistics)) if self.has_statistics else tangent

    def pushforward(self, plan: Plan, moved: list[int]) -> Compute:
        key = plan.names, tuple(moved)
        compute = self.pushforwards.get(key)
        if compute is None:
            targets = [self.spec.gradients[i] for i in moved]
            for name in targets:
                plan._check_differentiable(name)
            formulas = self.spec.order(targets, self.spec.given - self.spec.moving)
            compute = Program("pullback", formulas, (*plan.names, "grad"), targets).compiled()
            self.pushforwards[key] = compute
        return compute


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor)]


def is_large(values: Iterable[Any]) -> bool:
    """An ordinary tensor, whose size is no symbol, has many numbers."""
    for x in values:  # noqa: SIM110 (any() of a generator takes twice the time)
        if (type(x) is Tensor or type(x) is Parameter) and x.numel() >= LARGE:
            return True
    return False


def in_blocks(plan: Plan, known: tuple[Any, ...], dtypes: Any) -> Gradients | None:
    """The gradients, by blocks of rows, where that is possible and faster."""
    if not blocking.large(known[-1]):
        return None
    (leading,) = plan.batch_dims(*known)
    if not blocking.large(known[-1], leading):
        return None
    compute = plan.reusing
    precise = (lambda *some: compute(*in_float32(some))) if dtypes else compute
    with without_autocast(known) if is_any_autocast_enabled() else nullcontext():
        return blocking.in_blocks(precise, known, leading, plan.statistics, dtypes)


def in_float32(values: Iterable[Any]) -> list[Any]:
    return [x.float() if isinstance(x, Tensor) and x.dtype in LOW_PRECISION else x for x in values]


def computed_in_float32(compute: Compute, known: Iterable[Any], dtypes: Iterable[Any] | None) -> Gradients:
    """The gradients, without autocast; if there are dtypes, in float32 and rounded to them once at the end."""
    if dtypes:
        known = in_float32(known)
    with without_autocast(known):
        found = compute(*known)
    if dtypes:
        return tuple(x if x is None else x.to(dtype) for x, dtype in zip(found, dtypes, strict=True))
    return found


def device_type(values: Iterable[Any]) -> str:
    return next(x.device.type for x in values if isinstance(x, Tensor))


def without_autocast(values: Iterable[Any]) -> torch.autocast:
    """The casts have been made: what runs inside takes its inputs as they are, in forward and in backward."""
    return torch.autocast(device_type(values), enabled=False)


def of_distributed(compute: Compute) -> Compute:
    """A program of DTensors.

    A plain tensor in it (a target, an index, a mask that it makes) is the same in every process: torch accepts it
    in its kernels, but not in the operations of a formula. If torch cannot distribute an operation, each process
    computes all of it, from the whole tensors.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.experimental import implicit_replication

    def distributed(*known: Any) -> Any:
        enabled_already = DTensor._op_dispatcher._allow_implicit_replication  # and has to stay enabled
        try:
            with nullcontext() if enabled_already else implicit_replication():
                return compute(*known)
        except UNRELATED_ERRORS:
            raise
        except RuntimeError:  # also NotImplementedError: torch has no rule for sharding an operation
            mesh = known[-1].device_mesh
            found = compute(*[x.full_tensor() if isinstance(x, DTensor) else x for x in known])
            placements = [Replicate()] * mesh.ndim
            return tuple(
                x if x is None else DTensor.from_local(x, mesh, placements, run_check=False) for x in found
            )

    return distributed


def function(rule: type[Any], **parts: Any) -> Any:
    """A `torch.autograd.Function` of these parts."""
    methods = {name: staticmethod(part) if callable(part) else part for name, part in parts.items()}
    return type(rule.__name__, (Function,), methods)
