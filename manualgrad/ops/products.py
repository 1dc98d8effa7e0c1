"""Matrix products of whole-model programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from manualgrad.ops.elementwise import add, mul
from manualgrad.ops.shapes import Shape, sum_to_shape
from manualgrad.ops.views import permute, reshape, squeeze, unsqueeze
from manualgrad.registry import SampleInput, register
from manualgrad.rule import LOWER_PRECISION, Rule


class MatmulFunction(Rule):
    r"""Y = A B, for each matrix of a batch      ∂L/∂A = g Bᴴ      ∂L/∂B = Aᴴ g

    The batch axes broadcast: the gradient of a matrix that was repeated is the sum over its repetitions.
    """

    autocast = LOWER_PRECISION
    upcast_gradients = False  # matrix products accumulate in float32 already
    supports_complex = True

    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor:
        return a @ b

    def grad_a(grad: Tensor, b: Tensor, a_shape: Shape) -> Tensor:
        return sum_to_shape(grad @ b.mH, a_shape)

    def grad_b(grad: Tensor, a: Tensor, b_shape: Shape) -> Tensor:
        return sum_to_shape(a.mH @ grad, b_shape)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """`torch.matmul`: products of vectors, matrices, and batches of matrices."""
    if input.dim() == 0 or other.dim() == 0:
        raise RuntimeError("both arguments to matmul need to be at least 1D, but they are scalars")
    a = unsqueeze(input, 0) if input.dim() == 1 else input
    b = unsqueeze(other, 1) if other.dim() == 1 else other
    product = MatmulFunction.apply(a, b, tuple(a.shape), tuple(b.shape))
    axes = (*[-2] * (input.dim() == 1), *[-1] * (other.dim() == 1))
    return squeeze(product, axes) if axes else product


def mm(input: Tensor, mat2: Tensor) -> Tensor:
    """`torch.mm`."""
    return MatmulFunction.apply(input, mat2, tuple(input.shape), tuple(mat2.shape))


def mv(input: Tensor, vec: Tensor) -> Tensor:
    """`torch.mv`."""
    return matmul(input, vec)


def dot(input: Tensor, tensor: Tensor) -> Tensor:
    """`torch.dot`."""
    return matmul(input, tensor)


def outer(input: Tensor, vec2: Tensor) -> Tensor:
    """`torch.outer`."""
    return mul(unsqueeze(input, 1), vec2)


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`torch.addmm`: β C + α A B."""
    product = mm(mat1, mat2)
    product = product if alpha == 1 else mul(product, alpha)
    return add(input if beta == 1 else mul(input, beta), product)


def einsum(equation: str, *operands: Any) -> Tensor:
    """`torch.einsum`, without repeated letters in one operand and without an ellipsis.

    One operand after the other is joined: axes are ordered as (batch, own, summed), and a matrix product sums.
    """
    tensors = (
        list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else list(operands)
    )
    left, _, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in equation or any(len(set(term)) != len(term) for term in terms):
        raise NotImplementedError(f"einsum {equation!r}: an ellipsis or a repeated letter")
    if "->" not in equation:
        output = "".join(sorted(x for x in set(left) - {","} if left.count(x) == 1))
    letters, found = terms[0], tensors[0]
    for i, (term, tensor) in enumerate(zip(terms[1:], tensors[1:], strict=True)):
        needed = set(output).union(*terms[i + 2 :])
        letters, found = _join(letters, found, term, tensor, needed)
    return _order(letters, found, output)


def _join(a: str, x: Tensor, b: str, y: Tensor, needed: set[str]) -> tuple[str, Tensor]:
    """The product of two tensors with named axes, summed over the shared letters that are not needed."""
    batch = [c for c in a if c in b and c in needed]
    summed = [c for c in a if c in b and c not in needed]
    own_a, own_b = ([c for c in s if c not in other] for s, other in ((a, b), (b, a)))
    sizes = {**dict(zip(a, x.shape, strict=True)), **dict(zip(b, y.shape, strict=True))}

    def matrix(s: str, tensor: Tensor, own: list[str], summed_last: bool) -> Tensor:
        order = [*batch, *own, *summed] if summed_last else [*batch, *summed, *own]
        ordered = permute(tensor, [s.index(c) for c in order]) if order != list(s) else tensor
        groups = (own, summed) if summed_last else (summed, own)
        shape = [sizes[c] for c in batch] + [_product(sizes[c] for c in group) for group in groups]
        return reshape(ordered, shape)

    product = matmul(matrix(a, x, own_a, True), matrix(b, y, own_b, False))
    letters = "".join([*batch, *own_a, *own_b])
    return letters, reshape(product, [sizes[c] for c in letters])


def _product(sizes: Any) -> Any:
    found = 1
    for size in sizes:
        found = found * size
    return found


def _order(letters: str, tensor: Tensor, output: str) -> Tensor:
    from manualgrad.ops.reduction import sum as sum_axes

    summed = [i for i, c in enumerate(letters) if c not in output]
    if summed:
        tensor = sum_axes(tensor, summed)
        letters = "".join(c for c in letters if c in output)
    return tensor if letters == output else permute(tensor, [letters.index(c) for c in output])


def _register(
    function: Callable[..., Any], samples: Callable[[Any], Sequence[SampleInput]], **options: Any
) -> None:
    register(
        function,
        sample_inputs=samples,
        benchmark_input=lambda t: samples(t)[0],
        in_graphs_only=True,
        **options,
    )


_register(
    matmul,
    lambda t: [
        SampleInput(t(2, 1, 3, 4), t(5, 4, 2)),
        SampleInput(t(3, 4), t(4)),
        SampleInput(t(4), t(2, 4, 3)),
    ],
)
_register(mm, lambda t: [SampleInput(t(3, 4), t(4, 2))])
_register(mv, lambda t: [SampleInput(t(3, 4), t(4))])
_register(dot, lambda t: [SampleInput(t(4), t(4))])
_register(outer, lambda t: [SampleInput(t(3), t(4))])
_register(
    addmm,
    lambda t: [SampleInput(t(2), t(3, 4), t(4, 2)), SampleInput(t(3, 2), t(3, 4), t(4, 2), beta=0.5, alpha=2.0)],
)
_register(
    einsum,
    lambda t: [
        SampleInput("bij,bjk->bik", t(2, 3, 4), t(2, 4, 5)),
        SampleInput("bhqd,bkhd->bhqk", t(2, 2, 3, 4), t(2, 5, 2, 4)),
        SampleInput("ij->j", t(3, 4)),
    ],
)
