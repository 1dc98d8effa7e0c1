r"""A rule: a formula, and by hand the gradient for each of its inputs. Everything else follows.

A `Rule` is a `torch.autograd.Function` written as a set of pure functions that speak to each other **by
name**. Nothing in it ever sees ``ctx``:

    class LinearFunction(Rule):
        def forward(input: Tensor, weight: Tensor, bias: Tensor | None): return F.linear(input, weight, bias)
        def grad_input(grad: Tensor, weight: Tensor):                    return grad @ weight
        def grad_weight(grad: Tensor, input: Tensor):                    return rows(grad).mT @ rows(input)
        def grad_bias(grad: Tensor):                                     return rows(grad).sum(0)

The names a rule's functions may ask for:

    an input of `forward`       a tensor, or a setting (whatever is not annotated as a Tensor)
    ``output``                  what `forward` returned
    a *statistic*               what `forward` returned besides the output, named in `statistics`
    ``grad``                    ∂L/∂output, in the gradients alone
    any method of the rule      its value, computed once in each backward and shared by all that name it

Where nothing looks on less is kept, and the results are the same (see saving.py):

    keeps            methods that are computed in the forward already, and kept in place of what they name
    cheap            the output may be made again, by the rule, for others that are to keep it;
    ``recompute``    a method that does so from what is kept anyway (dropout's: from its input and its mask)
    ``forward_``     the output may be written over the input: `apply_` does it, and keeps no more than torch

A method ``independent`` tells how many leading axes of ``grad`` number rows that do not know of each other, so
that the gradients may be computed for some of them at a time (see fuse.py). It names ``grad`` and settings alone.

``grad_x`` is ∂L/∂x. An input without a ``grad_`` method has no gradient. The names that a gradient asks
for, followed down to inputs, output and statistics, are exactly what is kept for it; what no *needed*
gradient names is not kept.

A statistic that depends on a differentiable input *moves* with it (a mean, a logsumexp), so its own
derivative counts as soon as the backward is itself differentiated. A method of the statistic's name says how
to compute it from the inputs, and takes its place then. A statistic without such a method is a constant.

What follows from these alone, for every rule:

    reverse mode     the gradients, in an order that computes shared quantities once
    forward mode     a backward is linear in ``grad``, L = Jᵀ; so the pushforward is its transpose, J = (Jᵀ)ᵀ,
                     which `torch.func.vjp` takes of the formula in ``grad``, at zero
    higher orders    the formulas are torch operations (or rules), so they are differentiated again
    vmap             `generate_vmap_rule`
    autocast         the cast that `autocast` declares, made before the Function, so it is differentiated too
    torch.compile    a twin without ``jvp`` (which Dynamo refuses), put into the graph as it is
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._C import _autograd as autograd  # pyright: ignore[reportAttributeAccessIssue]
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch import eager_transforms
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from manualgrad import fuse, saving
from manualgrad.fallback import TRACED, UNRELATED_ERRORS, fallback, tracing_state


class Formula(NamedTuple):
    """``target = function(*names)``"""

    target: str
    function: Callable[..., Any]
    names: tuple[str, ...]


class Plan(NamedTuple):
    """What one set of needed gradients takes: which values to keep, and how to compute from them."""

    rule: type[Rule]
    tensors: Callable[[tuple[Any, ...]], tuple[Any, ...]]  # out of inputs and outputs, what to keep
    early: Callable[..., tuple[Any, ...]] | None  # of some inputs and outputs, what to compute and keep
    early_from: Callable[[tuple[Any, ...]], tuple[Any, ...]]  # those
    settings: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    names: tuple[str, ...]  # of the tensors, then of the settings
    backward: Callable[..., tuple[Tensor | None, ...]]  # (*kept, grad) -> a gradient, or None, for each input
    differentiable: Callable[..., tuple[Tensor | None, ...]]  # the same, with moving statistics computed anew
    independent: Callable[..., tuple[Any, ...]] | None  # (*kept, grad) -> how many leading axes can be taken apart
    statistics: frozenset[int]  # the places of statistics among the names


class Rule:
    """A `torch.autograd.Function` from pure functions that name what they need; see the module's text."""

    statistics: ClassVar[tuple[str, ...]] = ()
    """Names of what `forward` returns besides the output (it then returns a tuple)."""

    autocast: ClassVar[Mapping[str, str]] = {}
    """By device type, what autocast does to floating inputs: "lower" (to autocast's dtype), "float32",
    "promote" (to the widest among them) or "refuse". Absent: nothing, as for torch's own operation."""

    in_float32: ClassVar[bool] = True
    """Gradients of bfloat16 and float16 are computed in float32 and rounded once, as torch's kernels do."""

    complex: ClassVar[bool] = False
    """The gradients hold for complex numbers."""

    keeps: ClassVar[tuple[str, ...]] = ()
    """Names of methods whose value is small: computed in the forward, and kept in place of what they name."""

    cheap: ClassVar[bool] = False
    """The output takes one pass over memory to make: a rule that is to keep it may make it again (see saving.py),
    by this rule. Where that would not do, its method ``recompute`` does it, and `cheap` is not said."""

    forward: ClassVar[Callable[..., Any]]
    forward_: ClassVar[Callable[..., Any]]
    """The same, written over the first input, the only one that has a gradient. With it the rule has `apply_`."""

    function: ClassVar[type[Function]]
    apply: ClassVar[Callable[..., Any]]
    apply_: ClassVar[Callable[..., Any]]
    """`apply`, written over the input (see `_entry_in_place`)."""

    def __init_subclass__(cls) -> None:
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method):
                setattr(cls, name, staticmethod(method))
        if hasattr(cls, "forward"):
            _complete(cls)


def kept_by(node: Any) -> tuple[type[Rule], dict[str, Any]] | None:
    """The rule behind a node of an autograd graph, and by name what it has kept for its backward: inputs, output,
    statistics, settings. None for a node that is of no rule.

    Raises:
        RuntimeError: a backward without ``retain_graph`` has let go of it, or (torch 2.11) no output of the node
            exists any more.
    """
    match getattr(node, "kept", None):
        case (Plan() as plan, again, settings, _):
            tensors = node.saved_tensors if again is None else again(node.saved_tensors)
            return plan.rule, dict(zip(plan.names, (*tensors, *settings), strict=True))
    return None


_ZERO = "zero_"
"""What forward mode keeps for the output's shape: a gradient of zeros, one number in memory. (If the output itself
were kept, nobody could write into it.)"""

_LOW = (torch.bfloat16, torch.float16)
LOWER = {"cpu": "lower", "cuda": "lower"}
FLOAT32 = {"cpu": "float32", "cuda": "float32"}


def _complete(rule: type[Rule]) -> None:
    """Give `rule` what a `torch.autograd.Function` has: setup_context, backward, jvp, and an entry, apply."""
    parameters = inspect.signature(rule.forward).parameters
    inputs = tuple(parameters)
    values = (*inputs, "output", *rule.statistics)
    every_name = (*values, _ZERO)
    is_tensor = {name: name not in inputs or "Tensor" in str(parameters[name].annotation) for name in every_name}
    methods = {
        name: Formula(name, method, tuple(inspect.signature(method).parameters))
        for name in dir(rule)
        if name not in Rule.__annotations__
        and not hasattr(Rule, name)
        and inspect.isfunction(method := getattr(rule, name))
    }
    gradients = tuple(f"grad_{name}" for name in inputs)
    n, has_statistics, in_float32 = len(inputs), bool(rule.statistics), rule.in_float32
    refuses_complex = not rule.complex
    given = frozenset((*values, "grad"))
    moving = frozenset(rule.statistics) & frozenset(methods)
    _check(rule, parameters, given, methods)
    recompute = methods.get("recompute")
    if rule.cheap:
        recompute = Formula("recompute", lambda *args: rule.apply(*args), inputs)
    remade_from = () if recompute is None else tuple((name, values.index(name)) for name in recompute.names)

    def in_order(targets: Iterable[str], given: frozenset[str]) -> list[Formula]:
        """The formulas that compute `targets` from what is given, each after those it names."""
        order: dict[str, Formula] = {}

        def visit(name: str) -> None:
            if name not in given and name not in order:
                for needed in methods[name].names:
                    visit(needed)
                order[name] = methods[name]

        for target in targets:
            visit(target)
        return list(order.values())

    keeps_of_output = any("output" in formula.names for formula in in_order(rule.keeps, given))

    @cache
    def plan(needed: tuple[bool, ...], forward_mode: bool, thrifty: bool = False) -> Plan:
        wanted = [name for name, need in zip(gradients, needed, strict=True) if need]
        for name in wanted:
            check_differentiable(name)
        kept = frozenset(rule.keeps if thrifty else ())
        formulas, anew = in_order(wanted, given | kept), in_order(wanted, given - moving | kept)
        named = {name for formula in (*formulas, *anew) for name in formula.names}
        if forward_mode:  # any input may have a tangent
            any_of = in_order([name for name in gradients if name in methods], given - moving)
            named |= {name for formula in any_of for name in formula.names} | {_ZERO}
        apart = in_order(["independent"], given) if "independent" in methods else []
        named |= {name for formula in apart for name in formula.names}
        tensors = [name for name in every_name if name in named and is_tensor[name]]
        settings = [name for name in values if name in named and not is_tensor[name]]
        early = [name for name in rule.keeps if name in named & kept]
        names = (*tensors, *early, *settings)
        first = in_order(early, given)
        early_from = [name for name in values if any(name in formula.names for formula in first)]
        return Plan(
            rule,
            _taking([every_name.index(name) for name in tensors]),
            _written(first, early_from, early) if early else None,
            _taking([values.index(name) for name in early_from]),
            _taking([values.index(name) for name in settings]),
            names,
            _written(formulas, (*names, "grad"), gradients),
            _written(anew, (*names, "grad"), gradients),
            _written(apart, (*names, "grad"), ["independent"]) if apart else None,
            frozenset(names.index(name) for name in rule.statistics if name in names),
        )

    @cache
    def transposed(names: tuple[str, ...], targets: tuple[str, ...]) -> Callable[..., tuple[Tensor | None, ...]]:
        for name in targets:
            check_differentiable(name)
        return _written(in_order(targets, given - moving), (*names, "grad"), targets)

    def check_differentiable(gradient: str) -> None:
        if gradient not in methods:
            raise RuntimeError(
                f"{rule.__name__} is not differentiable with respect to {gradient.removeprefix('grad_')!r}: "
                "pass a tensor that does not require a gradient"
            )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        every = prepared(ctx, inputs, output)
        forward_mode = _forward_mode()
        if forward_mode:
            every += (every[n].new_zeros(()).expand(every[n].shape),)
        chosen = plan(ctx.needs_input_grad, forward_mode)
        tensors = chosen.tensors(every)
        ctx.save_for_backward(*tensors)
        ctx.kept = chosen, None, chosen.settings(every), low_precision(inputs, every[n])
        if forward_mode:
            ctx.save_for_forward(*tensors)  # the same: else grad(vmap) goes wrong
            ctx.set_materialize_grads(False)

    def setup_thriftily(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """The same where nothing looks on: whatever is large is kept by its recipe, if there is one."""
        large = saving.large(output[0] if has_statistics else output)
        if _forward_mode() or not (large or saving.large(inputs[0])):
            return setup_context(ctx, inputs, output)
        every = prepared(ctx, inputs, output)
        chosen = plan(ctx.needs_input_grad, False, thrifty=True)
        dtypes = low_precision(inputs, every[n])
        keep(ctx, chosen, every, early_values(chosen, every, dtypes), dtypes, leaves_recipe=large)
        return None

    def early_values(chosen: Plan, values: tuple[Any, ...], dtypes: Any) -> tuple[Any, ...]:
        """What the rule keeps in place of inputs and outputs."""
        if chosen.early is None:
            return ()
        known = chosen.early_from(values)
        return chosen.early(*(_in_float32(known) if dtypes else known))

    def keep(
        ctx: Any,
        chosen: Plan,
        every: tuple[Any, ...],
        early: Any,
        dtypes: Any,
        leaves_recipe: bool,
        writes: int = 0,
    ) -> None:
        pantry = saving.Pantry((*chosen.tensors(every), *early))
        if leaves_recipe and recompute is not None and "output" not in chosen.names:
            parts = dict(zip(chosen.names, pantry.parts, strict=False))
            asked = [(every[place], parts.get(name)) for name, place in remade_from]
            ctx.recipe = pantry.recipe(recompute.function, asked, every[n], writes)
        ctx.save_for_backward(*pantry.tensors)
        ctx.kept = chosen, pantry.again(), chosen.settings(every), dtypes

    def forward_in_place(ctx: Any, chosen: Plan, before: Any, *inputs: Any) -> Any:
        """`forward_`, and keep what the plan names. For the input itself stands what it was before: its recipe, or
        a copy (in a tuple, so that it is no input), or None where nothing that is kept names it."""
        refuse_complex(inputs[0])
        large, dtypes = saving.large(inputs[0]), low_precision(inputs, inputs[0])
        early = () if keeps_of_output else early_values(chosen, inputs, dtypes)
        written = rule.forward_(*inputs)
        ctx.mark_dirty(inputs[0])
        every = (before[0] if type(before) is tuple else before, *inputs[1:])
        every = (*every, *tell_of_statistics(ctx, written)) if has_statistics else (*every, written)
        if keeps_of_output:
            early = early_values(chosen, every, dtypes)
        if large:
            keep(ctx, chosen, every, early, dtypes, leaves_recipe=before is not None, writes=1)
        else:
            ctx.save_for_backward(*chosen.tensors(every))
            ctx.kept = chosen, None, chosen.settings(every), dtypes
        return written

    def backward_in_place(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return (None, None, *backward(ctx, *grads))

    def prepared(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Any, ...]:
        """All values; what autograd is to know of the output is said."""
        refuse_complex(inputs[0])
        return (*inputs, *tell_of_statistics(ctx, output)) if has_statistics else (*inputs, output)

    def refuse_complex(input: Tensor) -> None:
        if refuses_complex and input.is_complex():
            raise RuntimeError(f"{rule.__name__} does not support automatic differentiation for complex numbers")

    def tell_of_statistics(ctx: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or backward is given zeros for the statistics
        return output

    def low_precision(inputs: tuple[Any, ...], output: Tensor) -> list[torch.dtype | None] | None:
        """To which dtypes the gradients are rounded, if they are computed in float32."""
        if not in_float32 or output.dtype not in _LOW:
            return None
        return [x.dtype if isinstance(x, Tensor) else None for x in inputs]

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(inputs)
        chosen, again, settings, dtypes = ctx.kept
        tensors = ctx.saved_tensors
        if again is not None:
            with _without_autocast(tensors) if _autocasting() else nullcontext():
                tensors = again(tensors)
        known, compute = (*tensors, *settings, grad), chosen.backward
        if differentiated():
            known, compute = _without_dead_wrappers(known), chosen.differentiable
        elif chosen.independent is not None and type(grad) is Tensor and fuse.large(grad):  # no symbolic size
            found = some_at_a_time(chosen, known, dtypes)
            if found is not None:
                return found
        if type(grad) is not Tensor and _is_distributed(grad):
            compute = _among_distributed(compute)
        if dtypes or _autocasting():
            return _computed_in_float32(compute, known, dtypes)
        return compute(*known)

    def some_at_a_time(chosen: Plan, known: tuple[Any, ...], dtypes: Any) -> tuple[Tensor | None, ...] | None:
        """The gradients, by blocks of rows, where that can be."""
        if chosen.independent is None or not nothing_looks_on(*[x for x in known if isinstance(x, Tensor)]):
            return None
        (leading,), compute = chosen.independent(*known), chosen.backward
        if not fuse.large(known[-1], leading):
            return None
        precise = (lambda *some: compute(*_in_float32(some))) if dtypes else compute
        with _without_autocast(known) if _autocasting() else nullcontext():
            return fuse.in_blocks(precise, known, leading, chosen.statistics, dtypes)

    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | tuple[Tensor | None, ...]:
        chosen, _, settings, dtypes = ctx.kept
        with _outer_tangents():
            known = [*[_primal(x) for x in ctx.saved_tensors], *settings]
            moved = [i for i, tangent in enumerate(tangents) if tangent is not None]
            compute = transposed(chosen.names, tuple(gradients[i] for i in moved))
            rounded = [dtypes[i] for i in moved] if dtypes else None
            zero = known[chosen.names.index(_ZERO)].contiguous()
            pushforward = torch.func.vjp(
                lambda grad: _computed_in_float32(compute, [*known, grad], rounded), zero
            )[1]
            tangent = pushforward(tuple(_primal(tangents[i]) for i in moved))[0]
            if 0 in tangent.stride():  # expanded: refused for an output that is a view (F.linear's, of three axes)
                tangent = tangent.contiguous()
        return (tangent, *[None] * len(rule.statistics)) if has_statistics else tangent

    def function(setup_context: Callable[..., None], forward: Callable[..., Any], **more: Any) -> Any:
        return _function(rule, forward=forward, setup_context=setup_context, backward=backward, **more)

    def writable(*args: Any) -> Any:
        """What `forward` returns, none of it a view, which autograd would let nobody write into."""
        found = rule.forward(*args)
        return tuple(_no_view(x, args) for x in found) if has_statistics else _no_view(found, args)

    rule.function = function(setup_context, writable, jvp=jvp, generate_vmap_rule=True)
    thrifty = function(setup_thriftily, writable, jvp=jvp)
    rule.apply = staticmethod(_entry(rule, thrifty, function(setup_context, writable)))
    if hasattr(rule, "forward_"):
        in_place = _function(rule, forward=forward_in_place, backward=backward_in_place)
        first_alone = (True, *[False] * (n - 1))
        rule.apply_ = staticmethod(_entry_in_place(rule, in_place, lambda large: plan(first_alone, False, large)))


def _check(
    rule: type[Rule],
    parameters: Mapping[str, inspect.Parameter],
    given: frozenset[str],
    methods: Mapping[str, Formula],
) -> None:
    """Tell the author of a rule at once what it lacks."""
    for name, parameter in parameters.items():
        if parameter.annotation is inspect.Parameter.empty:
            raise TypeError(f"{rule.__name__}.forward: annotate {name!r} (a Tensor, or the type of a setting)")
    if hasattr(rule, "forward_") and _definer(rule, "forward_") is not _definer(rule, "forward"):
        raise TypeError(
            f"{rule.__name__}: define forward_ where forward is defined, so that both compute the same"
        )
    for target, _, names in methods.values():
        if target.startswith("grad_") and target.removeprefix("grad_") not in parameters:
            raise TypeError(f"{rule.__name__}.{target}: forward has no input {target.removeprefix('grad_')!r}")
        for name in set(names) - given - set(methods):
            raise TypeError(
                f"{rule.__name__}.{target} asks for {name!r}, which is no input, output, statistic or method"
            )


def _definer(rule: type[Rule], name: str) -> type:
    return next(cls for cls in rule.__mro__ if name in vars(cls))


def _taking(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """The function that takes the values at `places` out of a tuple."""
    if not places:
        return lambda values: ()
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


def _written(
    formulas: Iterable[Formula], names: Iterable[str], results: Iterable[str]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """The formulas as one function, as one would write it: a line each, then all results (None: not computed)."""
    lines = [f"    {target} = _{target}({', '.join(args)})" for target, _, args in formulas]
    computed = {target for target, _, _ in formulas}
    returned = ", ".join(name if name in computed else "None" for name in results)
    scope: dict[str, Any] = {f"_{target}": function for target, function, _ in formulas}
    exec("\n".join([f"def compute({', '.join(names)}):", *lines, f"    return ({returned},)"]), scope)
    return scope["compute"]


def _computed_in_float32(
    compute: Callable[..., tuple[Tensor | None, ...]], known: Iterable[Any], dtypes: Iterable[Any] | None
) -> tuple[Tensor | None, ...]:
    """`compute` without autocast, and if there are `dtypes` in float32, rounded to them once at the end."""
    if dtypes:
        known = _in_float32(known)
    with _without_autocast(known):
        found = compute(*known)
    if dtypes:
        return tuple(x if x is None else x.to(dtype) for x, dtype in zip(found, dtypes, strict=True))
    return found


def _in_float32(values: Iterable[Any]) -> list[Any]:
    return [x.float() if isinstance(x, Tensor) and x.dtype in _LOW else x for x in values]


def _entry(rule: type[Rule], thrifty: Any, twin: Any) -> Callable[..., Any]:
    @torch.compiler.allow_in_graph
    def compiled(*args: Any) -> Any:
        return twin.apply(*args)

    general = rule.function.apply
    parent: Any = super(Function, thrifty)
    direct = parent.apply  # Function.apply without the 10 µs in which it reads the signature
    forward = rule.forward
    has_statistics = bool(rule.statistics)

    def traced(*args: Any) -> Any:
        fallback(rule, TRACED)
        return forward(*args)

    def apply(*args: Any, with_statistics: bool = False) -> Any:
        if _autocasting():
            args = cast(rule, args)
            with _without_autocast(args):
                return apply(*args, with_statistics=with_statistics)
        if torch.compiler.is_compiling():
            result = compiled(*args)
        elif _transformed():
            result = general(*[_Whole(x) if type(x) is tuple else x for x in args])
        elif torch.is_grad_enabled() or _forward_mode():
            # torch.jit.trace records no Function, but torch's functions
            result = direct(*args) if tracing_state() is None else traced(*args)
        else:
            result = forward(*args)
        return result[0] if has_statistics and not with_statistics else result

    # Dynamo keeps what it compiled with the code object, and two rules may not share it.
    apply.__code__ = apply.__code__.replace(co_name=f"{rule.__name__}.apply")
    return apply


def _entry_in_place(rule: type[Rule], in_place: Any, plan: Callable[[bool], Plan]) -> Callable[..., Any]:
    """`apply`, written over the input, which keeps no more than torch does when it writes there.

    If what is kept names the input, and that has no recipe, a copy is kept, as torch keeps one: whoever is to keep
    the output keeps the copy instead. A rule that names the output and not the input keeps what is there anyway.
    """
    parent: Any = super(Function, in_place)
    direct = parent.apply
    has_statistics = bool(rule.statistics)
    first = next(iter(inspect.signature(rule.forward).parameters))

    def apply_(input: Tensor, *settings: Any) -> Tensor:
        if rule.autocast or not _may_be_overwritten(input, as_view=not has_statistics):
            return input.copy_(rule.apply(input.clone(), *settings))
        if not (input.requires_grad and torch.is_grad_enabled()):
            result = rule.forward_(input, *settings)
        else:
            large = saving.large(input)
            chosen = plan(large)
            before: Any = saving.usable_recipe_of(input) if large else None
            if before is None and first in chosen.names:
                before = (input.clone(),)
            result = direct(chosen, before, input, *settings)
        return result[0] if has_statistics else result

    return apply_


def _function(rule: type[Rule], **parts: Any) -> Any:
    methods = {name: staticmethod(part) if callable(part) else part for name, part in parts.items()}
    return type(rule.__name__, (Function,), methods)


class _Whole(tuple[Any, ...]):
    """A tuple that torch.func takes for one setting. A plain one it spreads out, and loses count of its parts
    where forward modes are nested."""


def _device(args: Iterable[Any]) -> str:
    return next(x.device.type for x in args if isinstance(x, Tensor))


def cast(rule: type[Rule], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating tensors as autocast gives them to the rule (float64 it leaves alone)."""
    device = _device(args)
    policy = rule.autocast.get(device)
    if policy is None or not torch.is_autocast_enabled(device):
        return args
    if policy == "refuse":
        raise RuntimeError(f"{rule.__name__} is unsafe to autocast on {device}")
    floats = [x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()]
    if policy == "float32" or (policy == "promote" and torch.float32 in floats):
        to = torch.float32
    else:
        to = torch.get_autocast_dtype(device)
    return tuple(
        x.to(to) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in args
    )


def _without_autocast(args: Iterable[Any]) -> torch.autocast:
    """The casts have been made: what runs inside takes its inputs as they are, in forward and in backward."""
    return torch.autocast(_device(args), enabled=False)


# What torch keeps private, each behind one name.


_autocasting = torch._C._is_any_autocast_enabled
_transformed = torch._C._are_functorch_transforms_active  # a torch.func transform is active
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_batched = functorch.is_legacy_batchedtensor
_without_dead_wrappers = unwrap_dead_wrappers  # a pullback called after its torch.func.vjp has ended is given some


def _forward_mode() -> bool:
    return forward_ad._current_level >= 0


def differentiated() -> bool:
    """The backward that runs now may itself be differentiated. Grad mode alone does not tell."""
    return torch.is_grad_enabled() or beyond_reverse_mode()


def beyond_reverse_mode() -> bool:
    """A level of forward mode is open, or a transform of torch.func is active."""
    return _forward_mode() or _transformed()


def cuda_autocasts(operation: str) -> bool:
    """CUDA's autocast treats this operation of torch (read off the dispatcher, with or without a GPU)."""
    return _has_kernel(f"aten::{operation}", "AutocastCUDA")


def nothing_looks_on(*tensors: Tensor) -> bool:
    """Neither differentiated nor transformed, compiled or a subclass: memory may be taken and written as it is."""
    if differentiated():
        return False
    for x in tensors:  # noqa: SIM110 (all() of a generator takes twice the time)
        if type(x) is not Tensor or _batched(x):  # batched by the older vmap, of grad(is_grads_batched=True)
            return False
    return True


def _is_distributed(tensor: Tensor) -> bool:
    """A DTensor. (Its module takes half a second to import, and has been if this is one.)"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _among_distributed(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A formula of DTensors.

    A plain tensor in it (a target, an index, a mask that it makes) is the same in every process: torch takes it so
    in its kernels, but not in the operations that a formula is of. What torch cannot share out among the processes
    each of them does, of the whole.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.experimental import implicit_replication

    def distributed(*known: Any) -> Any:
        on_already = DTensor._op_dispatcher._allow_implicit_replication  # and is to stay on
        try:
            with nullcontext() if on_already else implicit_replication():
                return compute(*known)
        except UNRELATED_ERRORS:
            raise
        except RuntimeError:  # also NotImplementedError: torch has no rule for sharding an operation
            mesh = known[-1].device_mesh
            found = compute(*[x.full_tensor() if isinstance(x, DTensor) else x for x in known])
            each = [Replicate()] * mesh.ndim
            return tuple(x if x is None else DTensor.from_local(x, mesh, each, run_check=False) for x in found)

    return distributed


def _no_view(output: Tensor, inputs: Iterable[Any]) -> Tensor:
    """`output`, which is a view of nothing but what `forward` made itself: as a tensor that is no view.

    torch's own operations return such views (a product of three axes is one of a product of two) and take writes
    into them. Autograd refuses those into a view that was made inside a Function. ``.data`` shares the memory.
    """
    if not output._is_view() or any(_shares(x, output) for x in inputs if isinstance(x, Tensor)):
        return output
    return output.data


def _shares(input: Tensor, view: Tensor) -> bool:
    """`view` is a view of `input`, or of what `input` is a view of."""
    return view._base is (input._base if input._is_view() else input)


def _may_be_overwritten(tensor: Tensor, as_view: bool) -> bool:
    """A rule may write its output over this input: in reverse mode alone. Of a leaf that requires a gradient, and
    of some views, torch refuses it: its own functions say so before they write."""
    if type(tensor) is not Tensor or beyond_reverse_mode() or torch.compiler.is_compiling():
        return False
    if not tensor._is_view():
        return not (tensor.is_leaf and tensor.requires_grad)
    base: Any = tensor._base
    usual = autograd._get_creation_meta(tensor) == autograd.CreationMeta.DEFAULT
    return as_view and usual and not (base.is_leaf and base.requires_grad)


def plain(tensor: Tensor) -> Tensor:
    """The tensor under torch.func's wrappers: what it holds, for a check that may not depend on a batch."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def is_batched(tensor: Tensor) -> bool:
    """One of torch.func's wrappers around the tensor is `torch.vmap`'s, which knows no memory format."""
    if torch.compiler.is_compiling() or not _transformed():
        return False
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _nested_forward_mode() -> bool:
    return eager_transforms.JVP_NESTING > 1


def _outer_tangents() -> AbstractContextManager[None]:
    """torch turns forward mode off while it calls `jvp`, which loses the tangents of the levels around it
    (pytorch#197867): turn it on again."""
    return forward_ad._set_fwd_grad_enabled(True) if _nested_forward_mode() else nullcontext()


def _primal(tensor: Any) -> Any:
    """`tensor` without its tangent of the innermost level, but with those of the levels around it."""
    if isinstance(tensor, Tensor) and _nested_forward_mode() and not functorch.is_batchedtensor(tensor):
        return forward_ad.unpack_dual(tensor, level=0).primal
    return tensor


def last_backward() -> bool:
    """The graph is not retained: what a rule has kept is read now for the last time."""
    return not torch.compiler.is_compiling() and not autograd._get_current_graph_task_keep_graph()
