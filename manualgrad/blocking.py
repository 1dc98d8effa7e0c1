"""One formula, evaluated at once or in blocks that stay in the cache.

A gradient is a formula of several torch operations, each of which reads and writes whole tensors. For large ones
on the CPU that is nearly all it costs: pages of fresh temporaries, and numbers read anew that the operation
before has just left. Where rows of a gradient do not know of each other, the formula can as well be evaluated
for some of them at a time: its temporaries then stay in the cache, and are the same memory from block to block.

torch shares an operation out among threads by 2¹⁵ numbers, and to call it costs a few µs, so that a block has
2¹⁸ numbers for each thread: smaller ones leave threads idle. Whether there are blocks, and which, follows from
the tensors, the number of threads and the setting `block` alone: a run can be repeated to the bit.

Compiled by Inductor a formula takes a little less time still, but seconds to compile, once for each formula.
Where that pays, compile the whole model, `torch.compile(model)`, and its backward is compiled with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

block: int | None = 2**18
"""How many numbers each thread works on at a time; None: on all at once. One setting for all threads."""

_FEWEST, _FEWEST_OF_ROWS = 4, 16
"""Blocks; fewer are not worth their making. Where rows are summed, blocks win only when fresh tensors are so large
that the C library maps each anew (32 MiB)."""

Results = tuple[Tensor | None, ...]


def size() -> int | None:
    """How many numbers are in a block."""
    return block and block * torch.get_num_threads()


def large(grad: Tensor, leading: int | None = None) -> bool:
    """Blocks are worth while for this upstream gradient, whose rows have so many leading axes (None: as many as it
    has itself, no row being longer than a number)."""
    numbers = size()
    fewest = _FEWEST if leading is None or leading == grad.dim() else _FEWEST_OF_ROWS
    return numbers is not None and grad.is_cpu and grad.numel() >= fewest * numbers


def in_blocks(
    compute: Callable[..., Results],
    known: Sequence[Any],
    leading: int,
    statistics: Collection[int] = (),
    dtypes: Sequence[torch.dtype | None] | None = None,
) -> Results | None:
    """compute(*known), some rows at a time; None if the tensors do not lie so that rows could be taken from them.

    Args:
        compute: the formula. A result with as many axes as the upstream gradient is of the rows, any other is a
            sum over them.
        known: its arguments; the last is the upstream gradient. A tensor with all of its axes is of the rows, one
            with no more axes than a row has is shared by them.
        leading: how many leading axes of the upstream gradient number the rows.
        statistics: the places of arguments whose first axis alone numbers the rows.
        dtypes: what the results are rounded to at last, if not left as they are.
    """
    grad: Tensor = known[-1]
    if leading == grad.dim() and grad.dim() in (4, 5) and not grad.is_contiguous():  # channels may lie innermost
        turned = [x.movedim(1, -1) if isinstance(x, Tensor) and x.dim() == grad.dim() else x for x in known]
        if turned[-1].is_contiguous():
            found = in_blocks(compute, turned, leading, statistics, dtypes)
            return found and tuple(x if x is None else x.movedim(-1, 1) for x in found)
    taken = _rows(known, leading, statistics) if leading else None
    if taken is None:
        return None
    rows = grad.shape[:leading].numel()
    step = -(-rows // -(-grad.numel() // (size() or grad.numel())))
    totals: list[Tensor | None] = []
    for start in range(0, rows, step):
        few = min(step, rows - start)
        results = compute(*[x if axis is None else x.narrow(axis, start, few) for x, axis in taken])
        if not totals:
            to = dtypes or [x if x is None else x.dtype for x in results]
            totals = [_room(x, grad, leading, dtype) for x, dtype in zip(results, to, strict=True)]
        for total, x in zip(totals, results, strict=True):
            if total is not None and x is not None:
                if x.dim() == grad.dim():
                    _numbered(total, leading).narrow(leading - 1, start, few).copy_(x)
                else:
                    total.add_(x)
    if dtypes is not None:
        totals = [x if x is None else x.to(dtype) for x, dtype in zip(totals, dtypes, strict=True)]
    return tuple(totals)


def _room(result: Tensor | None, grad: Tensor, leading: int, dtype: torch.dtype | None) -> Tensor | None:
    """For all rows where the result is of some, already rounded; for a sum as exact as its terms."""
    if result is None or result.dim() < grad.dim():
        return None if result is None else torch.zeros_like(result)
    shape = grad.shape[:leading] + result.shape[leading:]
    return torch.empty_like(grad, dtype=dtype) if shape == grad.shape else result.new_empty(shape, dtype=dtype)


def _rows(known: Sequence[Any], leading: int, statistics: Collection[int]) -> list[tuple[Any, int | None]] | None:
    """Each argument, its rows along one axis, and which that is, if it is of the rows."""
    grad: Tensor = known[-1]
    found: list[tuple[Any, int | None]] = []
    for place, x in enumerate(known):
        if place in statistics:
            found.append((x, 0))
        elif not isinstance(x, Tensor) or x.dim() <= grad.dim() - leading:
            found.append((x, None))
        elif (
            x.dim() == grad.dim()
            and x.shape[:leading] == grad.shape[:leading]
            and (leading == 1 or x.is_contiguous())
        ):
            found.append((_numbered(x, leading), leading - 1))
        else:
            return None
    return found


def _numbered(x: Tensor, leading: int) -> Tensor:
    """Its leading axes as one, and the others before it: as many as before, since a formula may count them."""
    return x if leading == 1 else x.view(*[1] * (leading - 1), -1, *x.shape[leading:])
