r"""`Rule`: a function and its hand-derived gradients. A `torch.autograd.Function` is generated from it.

A rule is a class of pure functions. Each of them names the quantities that it needs as parameters. None of them
sees ``ctx``:

    class LinearFunction(Rule):
        def forward(input: Tensor, weight: Tensor, bias: Tensor | None): return F.linear(input, weight, bias)
        def grad_input(grad: Tensor, weight: Tensor):                    return grad @ weight
        def grad_weight(grad: Tensor, input: Tensor):                    return rows(grad).mT @ rows(input)
        def grad_bias(grad: Tensor):                                     return rows(grad).sum(0)

``grad_x`` computes ∂L/∂x. An input without a ``grad_`` method has no gradient. A parameter of a method is

    an input of ``forward``    a tensor, or a setting (a parameter that is not annotated as a Tensor)
    ``output``                 the output of ``forward``
    a statistic                what ``forward`` returns besides the output, named in `statistics`
    ``grad``                   ∂L/∂output
    another method             its value, computed once per backward

How a rule becomes a Function:

    spec.py        reads the class when it is defined, and refuses it with file and line if it is inconsistent
    formulas.py    keeps each method as a formula (a syntax tree with parameters), orders formulas, and joins them
                   into one program
    reuse.py       writes a variant of the program that reuses its temporaries, for large tensors
    inplace.py     the operations that this variant calls
    plan.py        for each set of needed gradients: what is saved, and the programs that compute the gradients
                   from it. A plan saves what the needed gradients name, directly or through other methods, and
                   nothing else
    function.py    setup_context, backward and jvp of the Function: they save, choose a program of the plan and run
                   it
    dispatch.py    ``Rule.apply``: chooses the Function for autocast, torch.compile, torch.func, forward mode,
                   no_grad

Methods other than ``forward`` are mathematics: they create new tensors and never write into one. Writing in place
is the generator's work (reuse.py).

What follows from the formulas:

    forward mode     a backward is linear in ``grad``, so its transpose is the ``jvp``
    higher orders    the formulas consist of torch operations and rules, so autograd differentiates them
    vmap             `generate_vmap_rule`
    autocast         inputs are cast before the Function, as `Rule.autocast` says, so the cast is differentiated
                     too
    torch.compile    a Function without ``jvp``, which Dynamo does not accept, is put into the graph

A statistic that depends on a differentiable input (a mean, a logsumexp) contributes to higher derivatives. A
method named like the statistic computes it from the inputs, and a backward that is differentiated uses this method
instead of the saved value. A statistic without such a method is a constant.

README.md in this directory has a worked example, all options, and how to add an operation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch.autograd import Function

from manualgrad.rule.dispatch import autocast_inputs as autocast_inputs
from manualgrad.rule.dispatch import make_apply, make_inplace_apply
from manualgrad.rule.function import Implementation
from manualgrad.rule.function import saved_values as saved_values
from manualgrad.rule.reuse import replaces as replaces
from manualgrad.rule.reuse import with_reuse as with_reuse
from manualgrad.rule.spec import RuleSpec
from manualgrad.rule.spec import derivation as derivation


class Rule:
    """The base class of rules. The module's docstring describes how a subclass becomes an autograd Function.

    Raises:
        TypeError: a subclass is inconsistent: an unknown name, a circular definition, no gradient, a formula that
            writes into a tensor. The message has the file and the line.
    """

    statistics: ClassVar[tuple[str, ...]] = ()
    """Names of what ``forward`` returns besides the output. It then returns a tuple."""

    autocast: ClassVar[Mapping[str, str]] = {}
    """Device type -> how autocast casts floating inputs: "lower_precision" (to autocast's dtype), "float32",
    "promote" (to float32 if one of them is float32) or "banned" (raise an error). No entry: no cast."""

    upcast_gradients: ClassVar[bool] = True
    """Gradients of bfloat16 and float16 are computed in float32 and rounded once, as in torch's kernels."""

    supports_complex: ClassVar[bool] = False
    """The gradients are right for complex numbers. If False, a complex input raises an error."""

    save_instead: ClassVar[tuple[str, ...]] = ()
    """Names of methods with a small result, for example a mask. For large tensors, the forward computes and saves
    the result instead of the parameters of the method."""

    recomputable: ClassVar[bool] = False
    """The output is cheap: one pass over memory. A later rule that would save it may recompute it by ``apply`` of
    this rule (see recomputation.py). If ``apply`` is too slow or random, define a method ``recompute`` instead of
    setting this option."""

    vendor_kernels: ClassVar[Mapping[tuple[str, ...], Callable[..., Any]]] = {}
    """Names of gradients -> a function of saved quantities that computes them by a vendor's kernel: a tuple of
    gradients, or one gradient for one name. It may return None to use the formulas. It runs in a backward that
    is not differentiated or transformed (see vendor_kernels.py). The first entry applies that has only needed
    gradients."""

    preserve_memory_format: ClassVar[tuple[str, ...]] = ()
    """Names of gradients that get the memory format of ``grad``, channels_last or contiguous."""

    forward: ClassVar[Callable[..., Any]]
    forward_: ClassVar[Callable[..., Any]]
    """``forward`` that overwrites its first input, the only one with a gradient. Optional."""

    # The rest is generated:

    implementation: ClassVar[Implementation]
    function: ClassVar[type[Function]]
    """The Function, in the variant for torch.func. `apply` chooses among all variants."""

    apply: ClassVar[Callable[..., Any]]
    """Computes the output, and records the Function for the backward if necessary (see dispatch.py)."""

    apply_: ClassVar[Callable[..., Any]]
    """`apply` that overwrites the input. It exists if ``forward_`` does."""

    def __init_subclass__(cls) -> None:
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method):
                setattr(cls, name, staticmethod(method))  # methods of a rule have no ``self``
        if hasattr(cls, "forward"):  # otherwise it is a base class of rules
            spec = RuleSpec(cls, Rule)
            spec.check()
            implementation = Implementation(spec)
            cls.apply = staticmethod(make_apply(implementation))
            if hasattr(cls, "forward_"):
                cls.apply_ = staticmethod(make_inplace_apply(implementation))
            cls.implementation = implementation


def every_rule(base: type[Rule] = Rule) -> Iterator[type[Rule]]:
    """All rules that are defined so far. A rule with several bases occurs several times."""
    for rule in base.__subclasses__():
        yield rule
        yield from every_rule(rule)


# values of `Rule.autocast`
LOWER_PRECISION = {"cpu": "lower_precision", "cuda": "lower_precision"}
FLOAT32 = {"cpu": "float32", "cuda": "float32"}
