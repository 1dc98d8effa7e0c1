r"""A rule: a function, and by hand the gradient for each of its inputs. Everything else follows.

A `Rule` is a `torch.autograd.Function` written as a set of pure functions that name what they need. They never see
``ctx``:

    class LinearFunction(Rule):
        def forward(input: Tensor, weight: Tensor, bias: Tensor | None): return F.linear(input, weight, bias)
        def grad_input(grad: Tensor, weight: Tensor):                    return grad @ weight
        def grad_weight(grad: Tensor, input: Tensor):                    return rows(grad).mT @ rows(input)
        def grad_bias(grad: Tensor):                                     return rows(grad).sum(0)

The parameters of a method may be

    an input of ``forward``    a tensor, or a setting (a parameter that is not annotated as a Tensor)
    ``output``                 what ``forward`` returned
    a statistic                what ``forward`` returned besides the output, named in `statistics`
    ``grad``                   ∂L/∂output, in the gradients only
    another method             its value, computed once in each backward

``grad_x`` is ∂L/∂x. An input without a ``grad_`` method has no gradient. What a gradient names, directly or
through other methods, is what is saved for it. What no needed gradient names is not saved.

Except for ``forward`` a method is mathematics: it makes new tensors, and never writes into one. So it is a
formula (see formulas.py). The program of a backward is written from the formulas: as they stand for whoever reads
or differentiates it, and with its temporaries reused for large tensors (see reuse.py).

A statistic that depends on a differentiable input (a mean, a logsumexp) has a derivative of its own, which counts
if the backward is itself differentiated. A method of the statistic's name computes it from the inputs and replaces
it then. A statistic without such a method is a constant.

    forward mode     a backward is linear in ``grad``, so the pushforward is its transpose
    higher orders    the formulas are torch operations (or rules), so they are differentiated again
    vmap             `generate_vmap_rule`
    autocast         the cast that `Rule.autocast` declares, made before the Function, so it is differentiated too
    torch.compile    the same Function without ``jvp`` (which Dynamo refuses), put into the graph

spec.py reads and checks the class, function.py makes the Function, dispatch.py makes ``apply``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch.autograd import Function

from manualgrad.rule import torch_internals as torch_internals
from manualgrad.rule.dispatch import cast as cast
from manualgrad.rule.dispatch import make_apply, make_apply_
from manualgrad.rule.function import Implementation
from manualgrad.rule.function import saved_by as saved_by
from manualgrad.rule.reuse import replaces as replaces
from manualgrad.rule.reuse import reusing as reusing
from manualgrad.rule.spec import Spec


class Rule:
    """A `torch.autograd.Function` from pure functions that name what they need; see the module's text.

    Raises:
        TypeError: when a class is defined that does not hold together: an unknown name, a circle, no gradient, a
            formula that writes into a tensor. The message says where.
    """

    statistics: ClassVar[tuple[str, ...]] = ()
    """Names of what ``forward`` returns besides the output (it then returns a tuple)."""

    autocast: ClassVar[Mapping[str, str]] = {}
    """By device type, what autocast does to floating inputs: "lower" (to autocast's dtype), "float32",
    "promote" (to the widest among them) or "refuse". Absent: nothing, as for torch's own operation."""

    upcast_gradients: ClassVar[bool] = True
    """Gradients of bfloat16 and float16 are computed in float32 and rounded once, as torch's kernels do."""

    supports_complex: ClassVar[bool] = False
    """The gradients hold for complex numbers."""

    save_instead: ClassVar[tuple[str, ...]] = ()
    """Names of methods with a small value: computed in the forward, and saved in place of what they name."""

    recomputable: ClassVar[bool] = False
    """The output takes one pass over memory to compute: a rule that would save it may compute it again by this
    rule instead (see recomputation.py). A method ``recompute``, which uses saved quantities, replaces this."""

    vendor_kernels: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """For the name of a gradient a vendor's kernel that computes it from the same parameters (or returns None: it
    does not apply). It is used where nothing observes the backward (see vendor_kernels.py)."""

    format_of_grad: ClassVar[tuple[str, ...]] = ()
    """Names of gradients with a channel axis that have the memory format of ``grad``, channels_last or not."""

    forward: ClassVar[Callable[..., Any]]
    forward_: ClassVar[Callable[..., Any]]
    """The same, written over the first input, the only one that has a gradient. With it the rule has `apply_`."""

    implementation: ClassVar[Implementation]
    function: ClassVar[type[Function]]
    apply: ClassVar[Callable[..., Any]]
    apply_: ClassVar[Callable[..., Any]]
    """`apply`, written over the input."""

    def __init_subclass__(cls) -> None:
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method):
                setattr(cls, name, staticmethod(method))
        if hasattr(cls, "forward"):
            spec = Spec(cls, Rule)
            spec.check()
            implementation = Implementation(spec)
            cls.apply = staticmethod(make_apply(implementation))
            if hasattr(cls, "forward_"):
                cls.apply_ = staticmethod(make_apply_(implementation))
            cls.implementation = implementation


def every_rule(of: type[Rule] = Rule) -> Iterator[type[Rule]]:
    """The rules that are defined so far. One with several bases comes several times."""
    for rule in of.__subclasses__():
        yield rule
        yield from every_rule(rule)


LOWER = {"cpu": "lower", "cuda": "lower"}
FLOAT32 = {"cpu": "float32", "cuda": "float32"}
