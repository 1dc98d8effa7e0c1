"""Padding: a constant, or copies of a tensor's own values, around the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.registration import with_torch_errors
from manualgrad.ops.shapes import with_size
from manualgrad.registry import SampleInput, register
from manualgrad.rule import Rule, replaces


@dataclass(frozen=True)
class Border:
    """How many values are added before and after each axis, last axis first. Negative numbers remove values."""

    sizes: tuple[int, ...]

    def inverse(self) -> Border:
        return Border(tuple(-size for size in self.sizes))

    def padded_axes(self) -> list[tuple[int, int, int]]:
        """(axis, before, after) for each padded axis, -1 for the last axis."""
        pairs = zip(self.sizes[::2], self.sizes[1::2], strict=True)
        return [(-axis, before, after) for axis, (before, after) in enumerate(pairs, 1) if before or after]


class ConstantPadFunction(Rule):
    r"""y[i] = x[i - before] inside, else a constant

    y[i + before] = x[i]:      ∂L/∂x[i] = g[i + before],  which is g padded by the negative sizes
    """

    supports_complex = True

    def forward(input: Tensor, border: Border, value: float | None) -> Tensor:
        return F.pad(input, border.sizes, "constant", value)

    def grad_input(grad: Tensor, border: Border) -> Tensor:
        return ConstantPadFunction.apply(grad, border.inverse(), None)


class BorderPadFunction(Rule):
    r"""y[i] = x[j(i)]      along each padded axis, of size n, for i from -before to n + after - 1

    reflect     j = n - 1 - | n - 1 - |i| |       replicate     j = i, clamped to [0, n - 1]
    circular    j = i mod n

    ⟨g, dy⟩ = Σᵢ g[i] dx[j(i)], so each element of x receives the sum of g over all its copies:
    ∂L/∂x[j] = Σ g[i] over j(i) = j,  one axis after the other
    """

    supports_complex = True
    preserve_memory_format = ("grad_input",)

    def forward(input: Tensor, border: Border, mode: str, value: float | None) -> Tensor:
        return F.pad(input, border.sizes, mode, value)

    def grad_input(grad: Tensor, border: Border, mode: str) -> Tensor:
        for axis, before, after in border.padded_axes():
            grad = sum_over_copies(grad, axis, before, after, mode)
        return grad


def sum_over_copies(g: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Σ g[i] over j(i) = j, along one axis."""
    n = g.shape[axis] - before - after
    j = source_index(torch.arange(-before, n + after, device=g.device), n, mode)
    return g.new_zeros(with_size(g.shape, axis, n)).index_add(axis, j, g)


def source_index(i: Tensor, n: int, mode: str) -> Tensor:
    """j(i)"""
    if mode == "reflect":
        return n - 1 - (n - 1 - i.abs()).abs()
    return i % n if mode == "circular" else i.clamp(0, n - 1)


@replaces(sum_over_copies)
def _sum_over_copies_inplace(g: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """g without the border, to which the slices of the border are added one by one."""
    n = g.shape[axis] - before - after
    total = F.pad(g, [*[0, 0] * (-1 - axis), -before, -after])  # [0, 0] for each axis after this one
    border = [i for i in range(-before, n + after) if not 0 <= i < n]
    for i, j in zip(border, source_index(torch.tensor(border, dtype=torch.int64), n, mode).tolist(), strict=True):
        total.select(axis, j).add_(g.select(axis, before + i))
    return total


class Float32BorderPadFunction(BorderPadFunction):
    """For the modes and numbers of axes that autocast on the CPU computes in float32."""

    autocast = {"cpu": "float32"}


@with_torch_errors
def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """Values before and after each axis, the last axis first, as `torch.nn.functional.pad`. Any shape.

    Raises:
        NotImplementedError: the mode is unknown, or cannot pad this number of axes.
    """
    border = Border(tuple(pad))
    if mode == "constant":
        return ConstantPadFunction.apply(input, border, value)
    if mode == "circular" and min(border.sizes) < 0:  # removed values are not copied
        input = ConstantPadFunction.apply(input, Border(tuple(min(size, 0) for size in border.sizes)), None)
        border = Border(tuple(max(size, 0) for size in border.sizes))
    in_float32 = mode == "replicate" or (mode == "reflect" and len(border.sizes) < 6)
    rule = Float32BorderPadFunction if in_float32 else BorderPadFunction
    return rule.apply(input, border, mode, value)


register(
    pad,
    sample_inputs=lambda t: [
        SampleInput(t(5, 3), (1, 2)),
        SampleInput(t(2, 1, 3, 3), (2, -1, -1, 1), value=0.5),
        SampleInput(t(1, 3, 4), (2, 1), "reflect"),
        SampleInput(t(2, 2, 3, 2), (1, 0, 0, 1, 1, 1), "reflect"),
        SampleInput(t(2, 2, 1, 2), (1, 2, 0, 1, 1, 1), "replicate"),
        SampleInput(t(1, 2, 3, 2), (1, 2, 3, 0), "circular"),
    ],
    benchmark_input=lambda t: SampleInput(t(16, 64, 56, 56), (1, 1, 1, 1), "reflect"),
)
