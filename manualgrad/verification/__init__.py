"""`verify`: the laws that a sound autograd.Function holds, tried on anyone's.

    report = manualgrad.verify(MyFunction.apply, torch.randn(3, 4), torch.randn(4))
    print(report)

or, as one assertion in a test, ``manualgrad.verify(...).raise_if_failed()``; or from a shell,
``python -m manualgrad verify package.module:MyFunction --inputs package.module:make_inputs``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.autograd import Function

from manualgrad.verification import laws as _laws
from manualgrad.verification.drawing import random_states_kept
from manualgrad.verification.report import (
    FAILS,
    HOLDS,
    LAWS,
    NOT_APPLICABLE,
    NOT_OFFERED,
    Fails,
    Law,
    NotApplicable,
    NotOffered,
    Report,
    Row,
    Wastes,
)
from manualgrad.verification.shrinking import minimal_example
from manualgrad.verification.subject import Subject

__all__ = ["LAWS", "Law", "Report", "Row", "verify"]
assert _laws  # importing them enters them into the table


def verify(
    fn: Callable[..., Any],
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    reference: Callable[..., Any] | None = None,
    require: Iterable[str] = (),
    laws: Iterable[str] | None = None,
    surrogate: bool = False,
) -> Report:
    """Try every law on a function, and say which hold.

    Args:
        fn: an `autograd.Function` or its ``apply``, a function, or a module (whose parameters are inputs too).
        inputs: what to call it with: tensors of any dtype on any device, structures of them, and other arguments.
            Differentiable are the floating tensors that require a gradient; if none does, all. Small is best, and
            away from kinks: elements are tried one by one, and the laws make the special values themselves.
        kwargs: keyword arguments of `fn`.
        reference: a plain implementation with the same arguments, to hold values, gradients and rounding against.
            Without one the finite differences of the function's own values are the judge, and for rounding the
            Function's forward, differentiated by torch.
        require: names of laws that must hold: one that is not offered then fails, and those that run on request
            alone ("compile", "distributed", "third_order", ...) are tried.
        laws: only these.
        surrogate: the gradient is by definition not the derivative (straight-through, reversal, surrogate spikes):
            laws that compare it with finite differences do not apply.

    Returns:
        A report: `ok`, `failures`, `warnings`, `rows`, `raise_if_failed()`; its str() is a table.

    Raises:
        TypeError, ValueError: there is nothing to verify (`fn` cannot be called, no floating tensor among inputs
            or outputs), or an unknown law.
        Exception: whatever `fn` raises on `inputs` as they are.
    """
    required = _known(require)
    chosen = (
        _known(laws) if laws is not None else {name for name, law in LAWS.items() if not law.on_request} | required
    )
    report = Report(_name_of(fn))
    with warnings.catch_warnings(), random_states_kept():
        warnings.simplefilter("ignore")
        subject = Subject(fn, inputs, dict(kwargs or {}), reference, surrogate)
        try:
            for name, law in LAWS.items():
                if name in chosen:
                    report.rows.append(_tried(law, subject, name in required))
        finally:
            for generator, state in subject.generators:
                generator.set_state(state)
    return report


def _known(names: Iterable[str]) -> set[str]:
    names = {names} if isinstance(names, str) else set(names)
    for name in names - set(LAWS):
        raise ValueError(f"no law is called {name!r}; there are: {', '.join(LAWS)}")
    return names


_REENTRANT = "When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad()"


def _tried(law: Law, subject: Subject, required: bool) -> Row:
    row = _verdict(law, subject, required)
    if _REENTRANT in row.evidence:
        reason = "a reentrant checkpoint inside refuses torch.autograd.grad: try it with use_reentrant=False"
        return Row(law.name, FAILS if required else NOT_APPLICABLE, reason)
    return row


def _verdict(law: Law, subject: Subject, required: bool) -> Row:
    try:
        law.check(subject)
    except Wastes as waste:
        return Row(law.name, HOLDS, str(waste), law.cause)
    except NotApplicable as reason:
        return Row(law.name, NOT_APPLICABLE, str(reason))
    except NotOffered as reason:
        if not required:
            return Row(law.name, NOT_OFFERED, str(reason))
        return Row(law.name, FAILS, f"required, but not offered: {reason}")
    except Fails as failure:
        return Row(law.name, FAILS, str(failure), failure.cause or law.cause, minimal_example(law, subject))
    except Exception as error:
        text = str(error).strip().splitlines()
        evidence = f"stops with {type(error).__name__}: {text[0] if text else ''}"
        return Row(law.name, FAILS, evidence, law.cause, minimal_example(law, subject))
    return Row(law.name, HOLDS)


def _name_of(fn: Any) -> str:
    owner = getattr(fn, "__self__", fn)
    if isinstance(owner, type) and issubclass(owner, Function):
        return owner.__name__
    return type(fn).__name__ if isinstance(fn, nn.Module) else getattr(fn, "__name__", repr(fn))
