"""Which planted defects gradcheck finds, and the table on manualgrad/verification/README.md."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from manualgrad.verification import LAWS
from manualgrad.verification.graph import function_class, function_nodes

from .base import DEFECTS, Defect


def found_by_gradcheck(defect: Defect) -> bool:
    """Whether torch.autograd.gradcheck with default options fails, in float64."""
    return _fails(torch.autograd.gradcheck, defect)


def found_by_gradcheck_with_all_options(defect: Defect) -> bool:
    """Whether gradcheck or gradgradcheck fails, with every option for features that the Functions define."""
    if _fails(torch.autograd.gradcheck, defect, check_undefined_grad=True, check_grad_dtypes=True):
        return True
    functions = _functions(defect)
    forward = all(function.jvp is not Function.jvp for function in functions)
    batched = all(function.generate_vmap_rule or function.vmap is not Function.vmap for function in functions)
    first = {"check_forward_ad": forward, "check_batched_grad": batched}
    if _fails(torch.autograd.gradcheck, defect, **first, check_batched_forward_grad=forward and batched):
        return True
    if any(hasattr(function.backward, "__wrapped__") for function in functions):
        return False  # once_differentiable: there is no second order to check
    second = {"check_fwd_over_rev": forward, "check_batched_grad": batched, "gen_non_contig_grad_outputs": True}
    return _fails(torch.autograd.gradgradcheck, defect, **second)


def table() -> str:
    """For each law, how many defects are planted and how many each checker finds.

    tests/test_verification.py asserts that verify finds every one.
    """
    rows = [
        "| law: examples of defects | planted | gradcheck | gradcheck, all options | verify |",
        "|---|---|---|---|---|",
    ]
    total = [0, 0, 0]
    for law in LAWS:
        defects = [defect for defect in DEFECTS if defect.law == law]
        if not defects:
            continue
        default = [found_by_gradcheck(defect) for defect in defects]
        any_option = [a or found_by_gradcheck_with_all_options(d) for a, d in zip(default, defects, strict=True)]
        counts = [len(defects), sum(default), sum(any_option)]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        examples = "; ".join(defect.name for defect in defects[:2])
        rows.append(f"| `{law}`: {examples} | {' | '.join(map(str, counts))} | {counts[0]} |")
    rows.append(f"| **total** | {' | '.join(map(str, total))} | {total[0]} |")
    return "\n".join(rows)


def _fails(check: Callable[..., bool], defect: Defect, **options: bool) -> bool:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            return not check(defect.function, _float64_inputs(defect), **options)
        except Exception:
            return True


def _float64_inputs(defect: Defect) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().requires_grad_() if x.is_floating_point() else x for x in defect.inputs())


def _functions(defect: Defect) -> set[Any]:
    """The Functions in the graph of the outputs."""
    outputs = defect.function(*_float64_inputs(defect))
    return {function_class(node) for node in function_nodes(outputs if isinstance(outputs, tuple) else (outputs,))}
