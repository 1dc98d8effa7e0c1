"""The planted defects that PyTorch's own checkers find: the table on manualgrad/verification/README.md."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from manualgrad.verification import LAWS
from manualgrad.verification.graph import function_class, function_nodes

from .base import DEFECTS, Defect


def table() -> str:
    """The laws, how many planted defects break each, and how many of them each checker finds.

    tests/test_verification.py asserts that verify finds every one.
    """
    checkers = (found_by_gradcheck, found_by_gradcheck_with_all_options, found_by_opcheck)
    rows = [
        "| law | property | planted | gradcheck | all options | opcheck | verify |",
        "|---|---|---|---|---|---|---|",
    ]
    total = [0] * (len(checkers) + 1)
    for law in LAWS.values():
        defects = [defect for defect in DEFECTS if defect.law == law.name]
        counts = [len(defects), *(sum(map(checker, defects)) for checker in checkers)]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        name = f"`{law.name}`{' (on request)' if law.on_request else ''}"
        cells = map(str, [*counts, counts[0]]) if defects else ["-"] * (len(counts) + 1)
        rows.append(f"| {name} | {law.property} | {' | '.join(cells)} |")
    rows.append(f"| **total** | | {' | '.join(map(str, total))} | {total[0]} |")
    return "\n".join(rows)


def found_by_gradcheck(defect: Defect) -> bool:
    """Whether torch.autograd.gradcheck with default options fails, in float64."""
    return _fails(lambda: torch.autograd.gradcheck(defect.function, _float64_inputs(defect)))


def found_by_gradcheck_with_all_options(defect: Defect) -> bool:
    """Whether gradcheck or gradgradcheck fails, with every option for features that the Functions define."""

    def fails(check: Callable[..., bool], **options: bool) -> bool:
        return _fails(lambda: check(defect.function, _float64_inputs(defect), **options))

    if found_by_gradcheck(defect):
        return True
    if fails(torch.autograd.gradcheck, check_undefined_grad=True, check_grad_dtypes=True):
        return True
    functions = _functions(defect)
    forward = all(function.jvp is not Function.jvp for function in functions)
    batched = all(function.generate_vmap_rule or function.vmap is not Function.vmap for function in functions)
    options = {"check_batched_grad": batched}
    if fails(
        torch.autograd.gradcheck,
        check_forward_ad=forward,
        check_batched_forward_grad=forward and batched,
        **options,
    ):
        return True
    if any(hasattr(function.backward, "__wrapped__") for function in functions):
        return False  # once_differentiable: there is no second order to check
    return fails(
        torch.autograd.gradgradcheck, check_fwd_over_rev=forward, gen_non_contig_grad_outputs=True, **options
    )


_library = torch.library.Library("planted_defects", "FRAGMENT")
_operator_numbers = itertools.count()


def found_by_opcheck(defect: Defect) -> bool:
    """Whether torch.library.opcheck fails for the function, registered as a composite operator."""
    inputs = defect.inputs()
    result = defect.function(*defect.inputs())
    returns = f"({', '.join('Tensor' for _ in result)})" if isinstance(result, tuple) else "Tensor"
    name = f"operator{next(_operator_numbers)}"
    _library.define(f"{name}({', '.join(f'Tensor x{i}' for i in range(len(inputs)))}) -> {returns}")
    _library.impl(name, defect.function, "CompositeImplicitAutograd")
    operator = getattr(torch.ops.planted_defects, name).default
    logging.disable()
    try:
        return _fails(lambda: torch.library.opcheck(operator, inputs))
    finally:
        logging.disable(logging.NOTSET)


def _fails(check: Callable[[], Any]) -> bool:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            return not check()
        except Exception:
            return True


def _float64_inputs(defect: Defect) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().requires_grad_() if x.is_floating_point() else x for x in defect.inputs())


def _functions(defect: Defect) -> set[Any]:
    """The Functions in the graph of the outputs."""
    outputs = defect.function(*_float64_inputs(defect))
    return {function_class(node) for node in function_nodes(outputs if isinstance(outputs, tuple) else (outputs,))}
