"""Padding: values around a tensor, given or taken from within it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from manualgrad.ops.elementary import drop_in
from manualgrad.registry import Call, register
from manualgrad.rule import Rule, nothing_looks_on


@dataclass(frozen=True)
class Border:
    """How many values are put before and after each axis, the last axis first (less than none: cut off)."""

    sizes: tuple[int, ...]

    def inverse(self) -> Border:
        return Border(tuple(-size for size in self.sizes))


class ConstantPadFunction(Rule):
    r"""y[i] = x[i - before] inside, else the value

    ⟨g, dy⟩ = Σ g[i + before] dx[i]:  ∂L/∂x is g without the border, which is g padded by the negative sizes.
    """

    complex = True

    def forward(input: Tensor, border: Border, value: float | None) -> Tensor:
        return F.pad(input, border.sizes, "constant", value)

    def grad_input(grad: Tensor, border: Border) -> Tensor:
        return ConstantPadFunction.apply(grad, border.inverse(), None)


class BorderPadFunction(Rule):
    r"""y[i] = x[j(i)]      along each padded axis, of length n, for i from -before to n + after - 1

    reflect     j = n - 1 - | n - 1 - |i| |       replicate     j = i, clamped to [0, n - 1]
    circular    j = i mod n

    ⟨g, dy⟩ = Σᵢ g[i] dx[j(i)]:  each x collects the g of every place it was copied to,
    ∂L/∂x[j] = Σ g[i] over j(i) = j:  what is inside, and the border folded back onto it, axis by axis.
    """

    complex = True

    def forward(input: Tensor, border: Border, mode: str, value: float | None) -> Tensor:
        return F.pad(input, border.sizes, mode, value)

    def grad_input(grad: Tensor, border: Border, mode: str) -> Tensor:
        for axis, (before, after) in enumerate(zip(border.sizes[::2], border.sizes[1::2], strict=True), 1):
            if before or after:
                n = grad.shape[-axis] - before - after
                inside = Border((*(0, 0) * (axis - 1), -before, -after))
                total = ConstantPadFunction.apply(grad, inside, None)
                if not nothing_looks_on(grad):
                    total = total.clone()  # its derivative keeps what is written over here
                for i in (*range(-before, min(0, n + after)), *range(max(n, -before), n + after)):
                    total.select(-axis, _SOURCE[mode](i, n)).add_(grad.select(-axis, before + i))
                grad = total
        return grad


class Float32BorderPadFunction(BorderPadFunction):
    """The modes and dimensions that autocast widens on the CPU."""

    autocast = {"cpu": "float32"}


_SOURCE: dict[str, Callable[[int, int], int]] = {
    "reflect": lambda i, n: n - 1 - abs(n - 1 - abs(i)),
    "replicate": lambda i, n: min(max(i, 0), n - 1),
    "circular": lambda i, n: i % n,
}


@drop_in
def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """Values before and after each axis, the last axis first, as `torch.nn.functional.pad`. Any shape.

    Raises:
        NotImplementedError: an unknown mode, or one that does not pad so many axes of such an input.
    """
    border = Border(tuple(pad))
    if mode == "constant":
        return ConstantPadFunction.apply(input, border, value)
    if mode == "circular" and min(border.sizes) < 0:  # what is cut off is not copied
        input = ConstantPadFunction.apply(input, Border(tuple(min(size, 0) for size in border.sizes)), None)
        border = Border(tuple(max(size, 0) for size in border.sizes))
    widened = mode == "replicate" or (mode == "reflect" and len(border.sizes) < 6)
    rule = Float32BorderPadFunction if widened else BorderPadFunction
    return rule.apply(input, border, mode, value)


register(
    pad,
    samples=lambda t: [
        Call(t(5, 3), (1, 2)),
        Call(t(2, 1, 3, 3), (2, -1, -1, 1), value=0.5),
        Call(t(1, 3, 4), (2, 1), "reflect"),
        Call(t(2, 2, 3, 2), (1, 0, 0, 1, 1, 1), "reflect"),
        Call(t(2, 2, 1, 2), (1, 2, 0, 1, 1, 1), "replicate"),
        Call(t(1, 2, 3, 2), (1, 2, 3, 0), "circular"),
    ],
    big=lambda t: Call(t(16, 64, 56, 56), (1, 1, 1, 1), "reflect"),
)
