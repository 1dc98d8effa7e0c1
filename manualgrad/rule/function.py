"""The methods of the `torch.autograd.Function` of a rule: forward, setup_context, backward, jvp.

A rule has one `Implementation`. It makes a `Plan` (plan.py) for each set of needed gradients, and holds the
methods from which dispatch.py builds the Functions. One call runs like this:

    forward          the rule's own ``forward``
    setup_context    chooses the plan by ``ctx.needs_input_grad``. The tensors of the plan go through
                     ``ctx.save_for_backward``, everything else into one `Saved` on ``ctx``. In the memory-saving
                     variant, a large tensor that can be recomputed is replaced by what it is computed from, and
                     the node gets a recipe for its own output (recomputation.py)
    backward         gets the saved tensors (recomputes those that were replaced), chooses a program of the plan,
                     and runs it on the saved values and ``grad``
    jvp              a backward is linear in ``grad``, so its transpose is the ``jvp``: one `torch.func.vjp` of the
                     plan's formulas with respect to ``grad``

`Implementation.compute_gradients` chooses the program:

    the backward is differentiated, in forward mode or transformed      plan.differentiable
    otherwise, if writing in place is safe (`inplace_is_safe`):
        a tensor is large                                               plan.reusing, in blocks if that is faster
        all are small, and the rule has a vendor kernel                 plan.plain_with_kernels
    otherwise                                                           plan.plain
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from manualgrad import blocking, recomputation
from manualgrad.fallback import UNRELATED_ERRORS
from manualgrad.memory_format import CHANNELS_LAST, is_channels_last
from manualgrad.rule.formulas import Program, add_source_location
from manualgrad.rule.plan import Compute, Gradients, Plan, check_differentiable, compile_with_reuse
from manualgrad.rule.spec import OUTPUT_SHAPE, RuleSpec
from manualgrad.torch_internals import (
    as_non_view,
    backward_is_differentiated,
    enable_outer_forward_mode,
    in_forward_mode,
    inplace_is_safe,
    is_any_autocast_enabled,
    is_dtensor,
    unpack_primal,
    unwrap_dead_wrappers,
)

LOW_PRECISION = (torch.bfloat16, torch.float16)

MIN_ELEMENTS_FOR_REUSE = 2**15
"""With fewer elements in its largest tensor, the plain program is faster than the one that reuses temporaries."""


class Saved(NamedTuple):
    """What a node of the graph saves besides its tensors (``ctx.saved``)."""

    plan: Plan
    unpack: Callable[[Any], list[Any]] | None
    """Computes the plan's tensors from the saved tensors. None if they are the same."""
    settings: tuple[Any, ...]
    """The values of the plan's settings."""
    dtypes: list[torch.dtype | None] | None
    """The dtypes of the inputs, if the gradients are computed in float32 and then rounded to them."""


def saved_values(node: Any) -> tuple[type[Any], dict[str, Any]] | None:
    """The rule of an autograd node, and its saved inputs, output, statistics and settings by name.

    None if the node does not come from a rule.

    Raises:
        RuntimeError: a backward without ``retain_graph`` has freed the tensors, or (torch 2.11) all outputs of the
            node are gone.
    """
    match getattr(node, "saved", None):
        case Saved(plan, unpack, settings, _):
            tensors = node.saved_tensors if unpack is None else unpack(node.saved_tensors)
            return plan.rule, dict(zip(plan.names, (*tensors, *settings), strict=True))
    return None


class Implementation:
    """The plans of a rule, and the methods of its Functions."""

    def __init__(self, spec: RuleSpec) -> None:
        self.spec = spec
        rule = self.rule = spec.rule
        self.forward = rule.forward
        self.num_inputs = len(spec.inputs)
        self.has_statistics = bool(rule.statistics)
        self.upcast_gradients = rule.upcast_gradients
        self.supports_complex = rule.supports_complex
        self._plans: dict[Any, Plan] = {}
        self._pullbacks: dict[Any, Compute] = {}

    def plan(self, needed: tuple[bool, ...], forward_mode: bool = False, memory_saving: bool = False) -> Plan:
        """The plan for ``ctx.needs_input_grad`` and a mode. It is made once."""
        key = needed, forward_mode, memory_saving
        found = self._plans.get(key)
        if found is None:
            names = [name for name, need in zip(self.spec.gradients, needed, strict=True) if need]
            found = self._plans[key] = Plan(self.spec, names, forward_mode, memory_saving)
        return found

    # --- how the output is recomputed ---

    @cached_property
    def recompute_call(self) -> tuple[Callable[..., Any], list[tuple[str, int]]] | None:
        """The function that recomputes the output, and the names of its arguments with their positions in
        `RuleSpec.values`. None if the rule does not support it."""
        if self.rule.recomputable:
            function, names = self.rule.apply, self.spec.inputs
        elif "recompute" in self.spec.formulas:
            function, names = self._recompute, self.spec.formulas["recompute"].parameters
        else:
            return None
        return function, [(name, self.spec.values.index(name)) for name in names]

    def _recompute(self, *values: Any) -> Any:
        """The formula ``recompute``. A backward that is differentiated computes statistics from the inputs."""
        differentiated = backward_is_differentiated()
        return (self._recompute_differentiable if differentiated else self._recompute_plain)(*values)[0]

    @cached_property
    def _recompute_plain(self) -> Callable[..., Any]:
        return compile_with_reuse(self._recompute_program(self.spec.available))

    @cached_property
    def _recompute_differentiable(self) -> Callable[..., Any]:
        return self._recompute_program(self.spec.available_when_differentiated).compile()

    def _recompute_program(self, available: frozenset[str]) -> Program:
        parameters = self.spec.formulas["recompute"].parameters
        return Program("forward", self.spec.formulas_for(["recompute"], available), parameters, ["recompute"])

    # --- forward ---

    def forward_without_views(self, *args: Any) -> Any:
        """``forward``, with no output that is a view. (autograd would forbid writes into it.)"""
        found = self.forward(*args)
        return tuple(as_non_view(x, args) for x in found) if self.has_statistics else as_non_view(found, args)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], result: Any) -> None:
        self._check_complex(inputs[0])
        output, *statistics = self._outputs(ctx, result)
        values = (*inputs, output, *statistics)
        forward_mode = in_forward_mode()
        if forward_mode:
            values += (output.new_zeros(()).expand(output.shape),)  # OUTPUT_SHAPE
        plan = self.plan(ctx.needs_input_grad, forward_mode)
        tensors = plan.select_tensors(values)
        ctx.save_for_backward(*tensors)
        ctx.saved = Saved(plan, None, plan.select_settings(values), self._gradient_dtypes(inputs, output))
        if forward_mode:
            ctx.save_for_forward(*tensors)  # must be the same tensors, or grad(vmap) is wrong
            ctx.set_materialize_grads(False)  # jvp receives None for an input without a tangent

    def setup_context_memory_saving(self, ctx: Any, inputs: tuple[Any, ...], result: Any) -> None:
        """`setup_context` that replaces large tensors by what they are recomputed from."""
        is_large = recomputation.is_large(result[0] if self.has_statistics else result)
        if in_forward_mode() or not (is_large or recomputation.is_large(inputs[0])):
            self.setup_context(ctx, inputs, result)
            return
        self._check_complex(inputs[0])
        output, *statistics = self._outputs(ctx, result)
        values = (*inputs, output, *statistics)
        plan = self.plan(ctx.needs_input_grad, memory_saving=True)
        dtypes = self._gradient_dtypes(inputs, output)
        self._save(ctx, plan, values, self._precompute(plan, values, dtypes), dtypes, add_recipe=is_large)

    def _check_complex(self, input: Tensor) -> None:
        if not self.supports_complex and input.is_complex():
            raise RuntimeError(
                f"{self.rule.__name__} does not support automatic differentiation for complex numbers"
            )

    def _outputs(self, ctx: Any, result: Any) -> tuple[Any, ...]:
        """The result of ``forward`` as (output, *statistics). The statistics are marked as not differentiable."""
        if not self.has_statistics:
            return (result,)
        ctx.mark_non_differentiable(*result[1:])
        ctx.set_materialize_grads(False)  # otherwise backward receives zeros for the statistics
        return result

    def _gradient_dtypes(self, inputs: tuple[Any, ...], output: Tensor) -> list[torch.dtype | None] | None:
        """The field ``dtypes`` of `Saved`."""
        if not self.upcast_gradients or output.dtype not in LOW_PRECISION:
            return None
        return [x.dtype if isinstance(x, Tensor) else None for x in inputs]

    def _precompute(self, plan: Plan, values: tuple[Any, ...], dtypes: Any) -> tuple[Any, ...]:
        """The results of the methods that ``save_instead`` names, in float32 if the gradients are."""
        if not plan.precomputed:
            return ()
        inputs = plan.select_precompute_inputs(values)
        return plan.precompute(*(upcast(inputs) if dtypes else inputs))

    def _save(
        self,
        ctx: Any,
        plan: Plan,
        values: tuple[Any, ...],
        precomputed: Any,
        dtypes: Any,
        add_recipe: bool,
        pending_writes: int = 0,
    ) -> None:
        """Save what the backward needs, large tensors by their recipes.

        Args:
            add_recipe: give the node a recipe for its output, unless the node saves the output itself.
            pending_writes: see `SavedTensorPacker.recipe`.
        """
        packer = recomputation.SavedTensorPacker((*plan.select_tensors(values), *precomputed))
        if add_recipe and self.recompute_call is not None and "output" not in plan.names:
            function, arguments = self.recompute_call
            parts = dict(zip(plan.names, packer.parts, strict=False))  # the settings at the end have no part
            args = [(values[position], parts.get(name)) for name, position in arguments]
            ctx.recipe = packer.recipe(function, args, values[self.num_inputs], pending_writes)
        ctx.save_for_backward(*packer.tensors)
        ctx.saved = Saved(plan, packer.unpack(), plan.select_settings(values), dtypes)

    # --- forward in place ---

    @cached_property
    def _precompute_needs_output(self) -> bool:
        formulas = self.spec.formulas_for(self.rule.save_instead, self.spec.available)
        return any("output" in formula.parameters for formula in formulas)

    def forward_inplace(self, ctx: Any, plan: Plan, original: Any, *inputs: Any) -> Any:
        """Run ``forward_``, which overwrites the first input, and save what the plan names.

        Args:
            original: what is saved in place of the overwritten input: its recipe, or a 1-tuple with a copy. None
                if the input is not saved. (autograd would treat a tensor argument as an input.)
        """
        self._check_complex(inputs[0])
        is_large, dtypes = recomputation.is_large(inputs[0]), self._gradient_dtypes(inputs, inputs[0])
        # Precompute before forward_ overwrites the input, unless the formulas need the output.
        precomputed = () if self._precompute_needs_output else self._precompute(plan, inputs, dtypes)
        result = self.rule.forward_(*inputs)
        ctx.mark_dirty(inputs[0])
        saved_input = original[0] if type(original) is tuple else original
        values = (saved_input, *inputs[1:], *self._outputs(ctx, result))
        if self._precompute_needs_output:
            precomputed = self._precompute(plan, values, dtypes)
        if is_large:
            add_recipe = original is not None
            self._save(ctx, plan, values, precomputed, dtypes, add_recipe=add_recipe, pending_writes=1)
        else:
            ctx.save_for_backward(*plan.select_tensors(values))
            ctx.saved = Saved(plan, None, plan.select_settings(values), dtypes)
        return result

    def backward_inplace(self, ctx: Any, *grads: Any) -> Gradients:
        """`backward`, with None for the arguments ``plan`` and ``original`` of `forward_inplace`."""
        return (None, None, *self.backward(ctx, *grads))

    # --- backward ---

    def backward(self, ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
        """The gradients of all inputs. The further arguments belong to the statistics."""
        if grad is None:
            return (None,) * self.num_inputs
        plan, unpack, settings, dtypes = ctx.saved
        tensors = ctx.saved_tensors
        if unpack is not None:
            with disable_autocast(tensors) if is_any_autocast_enabled() else nullcontext():
                tensors = unpack(tensors)
        try:
            found = self.compute_gradients(plan, (*tensors, *settings, grad), dtypes)
        except Exception as error:
            add_source_location(error)
            raise
        return self._match_memory_format(found, grad) if self.rule.preserve_memory_format else found

    def compute_gradients(self, plan: Plan, args: tuple[Any, ...], dtypes: Any) -> Gradients:
        """Choose a program of the plan and run it. The last argument is ``grad``."""
        grad: Tensor = args[-1]
        is_large = plan.uses_scatter or _has_large_tensor(args)
        if backward_is_differentiated():
            compute, args = plan.differentiable, unwrap_dead_wrappers(args)
        elif (is_large or plan.vendor_kernel is not None) and inplace_is_safe(*_tensors(args)):
            compute = plan.reusing if is_large else plan.plain_with_kernels
            if is_large and plan.has_batch_dims:
                found = _compute_in_blocks(plan, args, dtypes)
                if found is not None:
                    return found
        else:
            compute = plan.plain
        if type(grad) is not Tensor and is_dtensor(grad):
            compute = support_dtensors(compute)
        if dtypes or is_any_autocast_enabled():
            return _compute_without_autocast(compute, args, dtypes)
        return compute(*args)

    def _match_memory_format(self, found: Gradients, grad: Tensor) -> Gradients:
        """Give the gradients that ``preserve_memory_format`` names the memory format of ``grad``."""
        if not inplace_is_safe(grad) or not is_channels_last(grad):  # under vmap, the memory format is unknown
            return found
        return tuple(
            x.contiguous(memory_format=CHANNELS_LAST[grad.dim()])
            if name in self.rule.preserve_memory_format and x is not None and x.dim() == grad.dim()
            else x
            for name, x in zip(self.spec.gradients, found, strict=True)
        )

    # --- forward mode ---

    def jvp(self, ctx: Any, *tangents: Tensor | None) -> Any:
        """The tangent of the output, J t, from the tangents t of the inputs.

        The formulas compute the linear map g ↦ Jᵀ g, where g is ``grad``. `torch.func.vjp` computes its transpose
        J. The point at which it differentiates the map does not matter; it is zero.
        """
        plan, _, settings, dtypes = ctx.saved
        with enable_outer_forward_mode():
            args = [*[unpack_primal(x) for x in ctx.saved_tensors], *settings]
            with_tangent = [i for i, tangent in enumerate(tangents) if tangent is not None]
            pullback = self._pullback(plan, with_tangent)
            result_dtypes = [dtypes[i] for i in with_tangent] if dtypes else None
            zero = args[plan.names.index(OUTPUT_SHAPE)].contiguous()
            transpose = torch.func.vjp(
                lambda grad: _compute_without_autocast(pullback, [*args, grad], result_dtypes), zero
            )[1]
            tangent = transpose(tuple(unpack_primal(tangents[i]) for i in with_tangent))[0]
            if 0 in tangent.stride():  # torch refuses it for an output that is a view (F.linear of 3-d tensors)
                tangent = tangent.contiguous()
        return (tangent, *[None] * len(self.rule.statistics)) if self.has_statistics else tangent

    def _pullback(self, plan: Plan, with_tangent: list[int]) -> Compute:
        """The program of the gradients for the inputs that have a tangent."""
        key = plan.names, tuple(with_tangent)
        compute = self._pullbacks.get(key)
        if compute is None:
            targets = [self.spec.gradients[i] for i in with_tangent]
            check_differentiable(self.spec, targets)
            formulas = self.spec.formulas_for(targets, self.spec.available_when_differentiated)
            compute = Program("pullback", formulas, (*plan.names, "grad"), targets).compile()
            self._pullbacks[key] = compute
        return compute


def make_function(rule: type[Any], **members: Any) -> Any:
    """A `torch.autograd.Function` with these methods and attributes, named like the rule."""
    methods = {name: staticmethod(member) if callable(member) else member for name, member in members.items()}
    return type(rule.__name__, (Function,), methods)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor)]


def _has_large_tensor(values: Iterable[Any]) -> bool:
    """A plain tensor has at least `MIN_ELEMENTS_FOR_REUSE` elements. (Subclasses may have a symbolic size.)"""
    for x in values:  # noqa: SIM110 (any() of a generator takes twice the time)
        if (type(x) is Tensor or type(x) is Parameter) and x.numel() >= MIN_ELEMENTS_FOR_REUSE:
            return True
    return False


def _compute_in_blocks(plan: Plan, args: tuple[Any, ...], dtypes: Any) -> Gradients | None:
    """The gradients, computed in blocks of rows. None if that is impossible or not faster."""
    if not blocking.is_worthwhile(args[-1]):
        return None
    (batch_dims,) = plan.batch_dims(*args)
    if not blocking.is_worthwhile(args[-1], batch_dims):
        return None
    compute = plan.reusing
    compute_block = (lambda *block: compute(*upcast(block))) if dtypes else compute
    with disable_autocast(args) if is_any_autocast_enabled() else nullcontext():
        return blocking.compute_in_blocks(compute_block, args, batch_dims, plan.statistic_positions, dtypes)


# --- precision ---


def upcast(values: Iterable[Any]) -> list[Any]:
    """The values, with tensors of low precision cast to float32."""
    return [x.float() if isinstance(x, Tensor) and x.dtype in LOW_PRECISION else x for x in values]


def _compute_without_autocast(compute: Compute, args: Iterable[Any], dtypes: Iterable[Any] | None) -> Gradients:
    """Run a program. If there are dtypes, run it in float32, and round the results to the dtypes."""
    if dtypes:
        args = upcast(args)
    with disable_autocast(args):
        found = compute(*args)
    if dtypes:
        return tuple(x if x is None else x.to(dtype) for x, dtype in zip(found, dtypes, strict=True))
    return found


def device_type(values: Iterable[Any]) -> str:
    return next(x.device.type for x in values if isinstance(x, Tensor))


def disable_autocast(values: Iterable[Any]) -> torch.autocast:
    """A context without autocast. (`autocast_inputs` has cast the inputs.)"""
    return torch.autocast(device_type(values), enabled=False)


# --- DTensors ---


def support_dtensors(compute: Compute) -> Compute:
    """A program that also takes DTensors.

    A plain tensor in the program (a target, an index, a new mask) is the same in every process, so it is
    replicated implicitly. If torch cannot shard an operation, each process computes the program on the full
    tensors.
    """
    from torch.distributed.tensor import DTensor, Replicate  # takes half a second to import
    from torch.distributed.tensor.experimental import implicit_replication

    def compute_distributed(*args: Any) -> Any:
        enabled_already = DTensor._op_dispatcher._allow_implicit_replication
        try:
            # leaving the context would disable an implicit replication that was enabled before
            with nullcontext() if enabled_already else implicit_replication():
                return compute(*args)
        except UNRELATED_ERRORS:  # out of memory, for example
            raise
        except RuntimeError:  # or NotImplementedError: torch has no sharding rule for an operation
            mesh = args[-1].device_mesh
            found = compute(*[x.full_tensor() if isinstance(x, DTensor) else x for x in args])
            placements = [Replicate()] * mesh.ndim
            return tuple(
                x if x is None else DTensor.from_local(x, mesh, placements, run_check=False) for x in found
            )

    return compute_distributed
