"""Compute a formula in blocks of rows that fit into the cache.

A gradient is a formula of several torch operations. Each operation reads and writes whole tensors, so for large
tensors on the CPU the time goes into page faults of new temporaries and into cache misses. If the leading axes of
``grad`` are batch axes, the formula can be computed for some rows at a time. (A row is an index along these axes.)
The temporaries of a block stay in the cache, and the next block reuses their memory.

torch splits an operation among threads in pieces of 2¹⁵ elements, and a call costs a few µs. So a block has 2¹⁸
elements per thread; smaller blocks leave threads idle. The blocks depend only on the tensors, the number of
threads and `block_size`, so a run can be repeated to the bit.

Inductor compiles a formula to slightly faster code, but takes seconds for each. To use it, compile the whole model
with `torch.compile(model)`; that compiles the backward as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

block_size: int | None = 2**18
"""Elements per thread and block. None disables blocks. One setting for all threads."""

_MIN_BLOCKS = 4
"""Fewer blocks are not faster."""

_MIN_BLOCKS_WITH_SUMS = 16
"""The same if results are sums over rows. Blocks are then faster only for tensors of about 32 MiB or more, for
which the C library maps new memory each time."""

Results = tuple[Tensor | None, ...]


def elements_per_block() -> int | None:
    return block_size and block_size * torch.get_num_threads()


def is_worthwhile(grad: Tensor, batch_dims: int | None = None) -> bool:
    """It is faster to compute the gradients in blocks.

    Args:
        batch_dims: the number of batch axes. None if it is not known yet. Then False means that blocks are not
            faster for any number.
    """
    size = elements_per_block()
    min_blocks = _MIN_BLOCKS if batch_dims is None or batch_dims == grad.dim() else _MIN_BLOCKS_WITH_SUMS
    return size is not None and grad.is_cpu and grad.numel() >= min_blocks * size


def compute_in_blocks(
    compute: Callable[..., Results],
    args: Sequence[Any],
    batch_dims: int,
    statistics: Collection[int] = (),
    dtypes: Sequence[torch.dtype | None] | None = None,
) -> Results | None:
    """compute(*args) in blocks of rows. None if the memory layout of the arguments does not allow it.

    Args:
        compute: the formula. A result with as many axes as ``grad`` has the same rows as ``grad``. A result with
            fewer axes is a sum over rows.
        args: the last is ``grad``. A tensor with as many axes as ``grad`` is split into the same rows. A tensor
            with no more axes than one row is passed to each block.
        batch_dims: the number of leading axes of ``grad`` that are batch axes.
        statistics: positions of arguments with one entry per row along their first axis.
        dtypes: the results are rounded to these dtypes at the end.
    """
    grad: Tensor = args[-1]
    # If each element is a row, the order of the axes does not matter. Tensors in a channels-last format are
    # contiguous after their channels have become the last axis.
    if batch_dims == grad.dim() and grad.dim() in (4, 5) and not grad.is_contiguous():
        channels_last = [x.movedim(1, -1) if isinstance(x, Tensor) and x.dim() == grad.dim() else x for x in args]
        if channels_last[-1].is_contiguous():
            found = compute_in_blocks(compute, channels_last, batch_dims, statistics, dtypes)
            return found and tuple(x if x is None else x.movedim(-1, 1) for x in found)
    split = _split_axes(args, batch_dims, statistics) if batch_dims else None
    if split is None:
        return None
    num_rows = grad.shape[:batch_dims].numel()
    num_blocks = _ceil_div(grad.numel(), elements_per_block() or grad.numel())
    rows_per_block = _ceil_div(num_rows, num_blocks)
    totals: list[Tensor | None] = []
    for start in range(0, num_rows, rows_per_block):
        count = min(rows_per_block, num_rows - start)
        results = compute(*[x if axis is None else x.narrow(axis, start, count) for x, axis in split])
        if not totals:
            result_dtypes = dtypes or [x if x is None else x.dtype for x in results]
            totals = [
                _allocate(x, grad, batch_dims, dtype) for x, dtype in zip(results, result_dtypes, strict=True)
            ]
        for total, x in zip(totals, results, strict=True):
            if total is not None and x is not None:
                if x.dim() == grad.dim():
                    _merge_batch_axes(total, batch_dims).narrow(batch_dims - 1, start, count).copy_(x)
                else:
                    total.add_(x)
    if dtypes is not None:  # the sums
        totals = [x if x is None else x.to(dtype) for x, dtype in zip(totals, dtypes, strict=True)]
    return tuple(totals)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _allocate(result: Tensor | None, grad: Tensor, batch_dims: int, dtype: torch.dtype | None) -> Tensor | None:
    """The memory for the result of all rows, given that of the first block.

    It has the final dtype, but a sum has the dtype of its terms, and is rounded at the end.
    """
    if result is None:
        return None
    if result.dim() < grad.dim():
        return torch.zeros_like(result)
    shape = grad.shape[:batch_dims] + result.shape[batch_dims:]
    return torch.empty_like(grad, dtype=dtype) if shape == grad.shape else result.new_empty(shape, dtype=dtype)


def _split_axes(
    args: Sequence[Any], batch_dims: int, statistics: Collection[int]
) -> list[tuple[Any, int | None]] | None:
    """Each argument and the axis along which it is split into blocks. The axis is None if all rows share it."""
    grad: Tensor = args[-1]
    found: list[tuple[Any, int | None]] = []
    for i, x in enumerate(args):
        if i in statistics:
            found.append((x, 0))
        elif not isinstance(x, Tensor) or x.dim() <= grad.dim() - batch_dims:
            found.append((x, None))
        elif (
            x.dim() == grad.dim()
            and x.shape[:batch_dims] == grad.shape[:batch_dims]
            and (batch_dims == 1 or x.is_contiguous())
        ):
            found.append((_merge_batch_axes(x, batch_dims), batch_dims - 1))
        else:
            return None
    return found


def _merge_batch_axes(x: Tensor, batch_dims: int) -> Tensor:
    """The tensor with its batch axes merged into the last of them.

    The others stay with size 1, because a formula may depend on the number of axes.
    """
    return x if batch_dims == 1 else x.view(*[1] * (batch_dims - 1), -1, *x.shape[batch_dims:])
