"""`verify`: tests the laws of a correct autograd.Function, on any Function, function or module.

    report = manualgrad.verify(MyFunction, torch.randn(3, 4), torch.randn(4))
    print(report)
    report.raise_if_failed()  # in a test

The page README.md in this folder explains the laws and the report.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.autograd import Function

from manualgrad.verification import laws as _laws
from manualgrad.verification.function_under_test import FunctionUnderTest
from manualgrad.verification.randomness import preserve_random_states
from manualgrad.verification.report import (
    FAILS,
    HOLDS,
    LAWS,
    NOT_APPLICABLE,
    UNSUPPORTED,
    WARNING,
    Law,
    LawFailure,
    LawResult,
    LawWarning,
    NotApplicable,
    Report,
    Unsupported,
)
from manualgrad.verification.shrinking import minimal_example

__all__ = ["LAWS", "Law", "LawResult", "Report", "verify"]
assert _laws  # importing the modules registers the laws


def verify(
    fn: Callable[..., Any],
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    reference: Callable[..., Any] | None = None,
    require: Iterable[str] = (),
    laws: Iterable[str] | None = None,
    surrogate: bool = False,
) -> Report:
    """Test every law on a function and report which laws hold.

    Args:
        fn: an `autograd.Function` or its ``apply``, a function, or a module (its parameters are inputs too).
        inputs: positional arguments of `fn`: tensors of any dtype on any device, structures of tensors, and other
            values. The differentiable inputs are the floating and complex tensors that require a gradient, or all
            of them if none does. Use small tensors with ordinary values, away from kinks: finite differences test
            each element, and the laws add special values themselves.
        kwargs: keyword arguments of `fn`.
        reference: a plain implementation with the same arguments. Values, gradients and rounding errors are
            compared with it. Without a reference, gradients are compared with finite differences of the values,
            and rounding errors with those of the Function's forward, differentiated by torch.
        require: names of laws that must hold. An unsupported feature then is a failure. Laws that run only on
            request ("compile", "distributed", "third_order", ...) are added.
        laws: test only these laws.
        surrogate: the gradient is not the derivative by definition, as in straight-through estimators, gradient
            reversal and surrogate gradients of spikes. Laws that compare it with finite differences do not apply.

    Returns:
        A report with `ok`, `failures`, `warnings`, `rows` and `raise_if_failed()`. Its str() is a table.

    Raises:
        TypeError: `fn` is not callable.
        ValueError: no input or output is differentiable, an input holds nan or inf, or a law does not exist.
        Exception: what `fn` itself raises for these inputs.
    """
    required = _check_names(require)
    selected = (
        _check_names(laws)
        if laws is not None
        else {name for name, law in LAWS.items() if not law.on_request} | required
    )
    report = Report(_name_of(fn))
    with warnings.catch_warnings(), preserve_random_states():
        warnings.simplefilter("ignore")
        under_test = FunctionUnderTest(fn, inputs, dict(kwargs or {}), reference, surrogate)
        try:
            for name, law in LAWS.items():
                if name in selected:
                    report.rows.append(_test_law(law, under_test, name in required))
        finally:
            for generator, state in under_test.generators:
                generator.set_state(state)
    return report


def _check_names(names: Iterable[str]) -> set[str]:
    names = {names} if isinstance(names, str) else set(names)
    for name in names - set(LAWS):
        raise ValueError(f"there is no law {name!r}; the laws are: {', '.join(LAWS)}")
    return names


_REENTRANT_ERROR = "When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad()"


def _test_law(law: Law, fn: FunctionUnderTest, required: bool) -> LawResult:
    result = _run_check(law, fn, required)
    if _REENTRANT_ERROR in result.evidence:
        reason = (
            "fn calls torch.utils.checkpoint with use_reentrant=True, which does not support "
            "torch.autograd.grad: set use_reentrant=False"
        )
        return LawResult(law.name, FAILS if required else NOT_APPLICABLE, reason)
    return result


def _run_check(law: Law, fn: FunctionUnderTest, required: bool) -> LawResult:
    try:
        law.check(fn)
    except LawWarning as warning:
        return LawResult(law.name, WARNING, str(warning), law.likely_cause)
    except NotApplicable as reason:
        return LawResult(law.name, NOT_APPLICABLE, str(reason))
    except Unsupported as reason:
        if not required:
            return LawResult(law.name, UNSUPPORTED, str(reason))
        return LawResult(law.name, FAILS, f"required, but unsupported: {reason}")
    except LawFailure as failure:
        cause = failure.likely_cause or law.likely_cause
        return LawResult(law.name, FAILS, str(failure), cause, minimal_example(law, fn))
    except Exception as error:
        message = str(error).strip().splitlines()
        evidence = f"raises {type(error).__name__}: {message[0] if message else ''}"
        return LawResult(law.name, FAILS, evidence, law.likely_cause, minimal_example(law, fn))
    return LawResult(law.name, HOLDS)


def _name_of(fn: Any) -> str:
    owner = getattr(fn, "__self__", fn)
    if isinstance(owner, type) and issubclass(owner, Function):
        return owner.__name__
    return type(fn).__name__ if isinstance(fn, nn.Module) else getattr(fn, "__name__", repr(fn))
