"""The operations that a program with reused temporaries calls (see reuse.py).

Each gives the result of the plain operation up to rounding. An operation with "into" in its name writes into an
operand and returns it, if the result has the shape and dtype of the operand. Otherwise it returns a new tensor.
reuse.py calls it only where nothing else reads the operand later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def _result_fits(operand: Any, other: Any) -> bool:
    """The result of an arithmetic operation on both has the shape and dtype of the operand."""
    if not isinstance(operand, Tensor):
        return False
    if not isinstance(other, Tensor):
        return operand.is_floating_point() and not isinstance(other, complex)
    if operand.dtype != other.dtype:
        return False
    return other.shape == operand.shape or _broadcasts_to(other, operand)


def _into_left(plain: Callable[..., Any], into: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """A binary operation that writes into its left operand by ``into`` if the result fits, else ``plain``."""
    return lambda left, right: into(left, right) if _result_fits(left, right) else plain(left, right)


def _into_right(plain: Callable[..., Any], into: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda left, right: into(left, right) if _result_fits(right, left) else plain(left, right)


def _subtract_into_right(left: Any, right: Tensor) -> Tensor:
    return torch.sub(left, right, out=right) if isinstance(left, Tensor) else right.neg_().add_(left)


def _divide_into_right(left: Any, right: Tensor) -> Tensor:
    return torch.div(left if isinstance(left, Tensor) else right.new_tensor(left), right, out=right)


def _neg_into(operand: Any) -> Any:
    return operand.neg_() if isinstance(operand, Tensor) else -operand


def _into(method: str, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an in-place method, or its out-of-place variant if the result does not fit into the tensor."""
    others = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    fits = (
        tensor.is_floating_point()
        and _result_has_shape_of(method, tensor, others)
        and all(x.dtype == tensor.dtype for x in others if x.is_floating_point())
    )
    return getattr(tensor, method if fits else method.removesuffix("_"))(*args, **kwargs)


def _result_has_shape_of(method: str, tensor: Tensor, others: list[Tensor]) -> bool:
    """The result of the method has the shape of the tensor."""
    if method in ("addmm_", "baddbmm_"):
        return tensor.shape == (*others[0].shape[:-1], others[1].shape[-1])
    return method in ("scatter_add_", "index_add_", "index_put_") or all(_broadcasts_to(x, tensor) for x in others)


def _broadcasts_to(other: Tensor, tensor: Tensor) -> bool:
    sizes = zip(reversed(other.shape), reversed(tensor.shape), strict=False)
    return other.dim() <= tensor.dim() and all(m in (1, n) for m, n in sizes)


def _addcmul(term: Any, a: Any, b: Any, sign: int) -> Any:
    """term ± a b"""
    if _addcmul_applies(term, a, b):
        return torch.addcmul(term, a, b, value=sign)
    return _add_signed(term, a * b, sign)


def _add_signed(term: Any, product: Any, sign: int) -> Any:
    """term ± product. May write into the product."""
    if _result_fits(product, term):
        if sign > 0:
            return product.add_(term)
        return _subtract_into_right(term, product)
    return term + product if sign > 0 else term - product


def _addcmul_into_term(term: Any, a: Any, b: Any, sign: int) -> Any:
    """term ± a b. The term is the operand to write into."""
    if _addcmul_applies(term, a, b):
        return term.addcmul_(a, b, value=sign)
    for tensor, number in ((a, b), (b, a)):
        if isinstance(number, (int, float)) and isinstance(tensor, Tensor) and _result_fits(term, tensor):
            return term.add_(tensor, alpha=sign * number)
    product = a * b
    if _result_fits(term, product):
        return term.add_(product) if sign > 0 else term.sub_(product)
    return _add_signed(term, product, sign)


def _addcmul_into_factor(term: Any, factor: Any, other: Any, sign: int) -> Any:
    """term ± factor other. The factor is the operand to write into."""
    return _add_signed(term, factor.mul_(other) if _result_fits(factor, other) else factor * other, sign)


def _addcmul_applies(term: Any, a: Any, b: Any) -> bool:
    """All are tensors of one dtype and shape. One factor may broadcast. (If both do, addcmul is not
    vectorized.)"""
    if not (isinstance(term, Tensor) and isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if not (term.dtype == a.dtype == b.dtype) or not (term.is_floating_point() or term.is_complex()):
        return False
    shape = term.shape
    return (a.shape == shape and _result_fits(term, b)) or (b.shape == shape and _result_fits(term, a))


# --- comparisons and torch.where ---
#
# On the CPU, operations that read or write booleans are not vectorized. So a comparison writes the numbers 1 and 0
# in the dtype of its operands: an *indicator*. A mask that only torch.where reads stays an indicator.


def _is_vectorized(a: Any, b: Any) -> bool:
    """a and b can be compared into an indicator."""
    return (
        isinstance(a, Tensor)
        and a.is_cpu
        and a.is_floating_point()
        and (not isinstance(b, Tensor) or (b.dtype == a.dtype and b.shape == a.shape))
    )


def _compare(name: str, a: Any, b: Any) -> Any:
    """A comparison as booleans. ``name`` is that of a function of `operator`."""
    if not _is_vectorized(a, b):
        return getattr(operator, name)(a, b)
    return _indicator(name, a, b).bool()


def _indicator(name: str, a: Any, b: Any) -> Any:
    """A comparison as an indicator if that is faster, otherwise as booleans."""
    if not _is_vectorized(a, b):
        return getattr(operator, name)(a, b)
    return getattr(torch, name)(a, b, out=torch.empty_like(a))


def _and(a: Any, b: Any) -> Any:
    """a & b, for indicators or booleans. May write into a."""
    if a.dtype == torch.bool or b.dtype == torch.bool or a.shape != b.shape:
        return a.bool() & b.bool()
    return a.mul_(b)


def _or(a: Any, b: Any) -> Any:
    """a | b, for indicators or booleans. May write into a."""
    if a.dtype == torch.bool or b.dtype == torch.bool or a.shape != b.shape:
        return a.bool() | b.bool()
    return torch.maximum(a, b, out=a)


def _not(a: Any) -> Any:
    """~a, for an indicator or booleans. May write into a."""
    return ~a if a.dtype == torch.bool else a.eq_(0)


def where(mask: Any, a: Any, b: Any) -> Any:
    """`torch.where`. The mask has booleans, or is an indicator, which it may overwrite."""
    first = a if isinstance(a, Tensor) else b
    if not _can_select_bitwise(mask, first, a, b):
        return torch.where(mask if mask.dtype == torch.bool else mask.bool(), a, b)
    # Read the bits of the numbers as integers. Integer arithmetic is vectorized and exact, and a nan that is not
    # selected has no influence.
    integer = _INTEGERS[first.element_size()]
    if mask.dtype == torch.bool:
        selected = mask.expand(first.shape).to(integer)
    else:
        selected = mask.view(integer).ne_(0)
    if _is_zero(a):  # selected - 1 has all bits set where b is selected, and none elsewhere
        return selected.sub_(1).bitwise_and_(b.view(integer)).view(first.dtype)
    if _is_zero(b):  # so has -selected where a is selected
        return selected.neg_().bitwise_and_(a.view(integer)).view(first.dtype)
    a, b = ((x if isinstance(x, Tensor) else torch.full_like(first, x)).view(integer) for x in (a, b))
    return selected.mul_(a - b).add_(b).view(first.dtype)


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _can_select_bitwise(mask: Tensor, first: Any, *values: Any) -> bool:
    """`where` may use integer arithmetic: on the CPU, if all tensors have one floating dtype and shape."""
    if not isinstance(first, Tensor) or not first.is_cpu or not first.is_floating_point():
        return False
    for x in values:
        if isinstance(x, Tensor) and (x.shape != first.shape or x.dtype != first.dtype):
            return False
    if mask.dtype != torch.bool:
        return mask.shape == first.shape and mask.dtype == first.dtype
    return _broadcasts_to(mask, first)


NAMESPACE: dict[str, Any] = {
    "_mul_into_left": _into_left(operator.mul, Tensor.mul_),
    "_add_into_left": _into_left(operator.add, Tensor.add_),
    "_sub_into_left": _into_left(operator.sub, Tensor.sub_),
    "_div_into_left": _into_left(operator.truediv, Tensor.div_),
    "_mul_into_right": _into_right(operator.mul, lambda left, right: right.mul_(left)),
    "_add_into_right": _into_right(operator.add, lambda left, right: right.add_(left)),
    "_sub_into_right": _into_right(operator.sub, _subtract_into_right),
    "_div_into_right": _into_right(operator.truediv, _divide_into_right),
    "_neg_into": _neg_into,
    "_into": _into,
    "_addcmul": _addcmul,
    "_addcmul_into_term": _addcmul_into_term,
    "_addcmul_into_factor": _addcmul_into_factor,
    "_compare": _compare,
    "_indicator": _indicator,
    "_and": _and,
    "_or": _or,
    "_not": _not,
}
"""The functions that the source of a program with reused temporaries calls, by name."""
