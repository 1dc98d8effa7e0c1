"""Vendor kernels give the gradients of the formulas, and run only in a plain eager backward."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import manualgrad
import manualgrad.nn.functional as F
from manualgrad import vendor_kernels
from manualgrad.rule import every_rule


class BackwardOperations(TorchDispatchMode):
    """Records the names of backward operations of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "backward" in func.__name__:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[list[Tensor], list[str]]:
    """The gradients of all tensors, and the backward kernels of torch that ran."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator).to(output)
    upstream = torch.empty_like(output).copy_(upstream)
    with BackwardOperations() as recorded:
        found = torch.autograd.grad(output, leaves, upstream)
    return list(found), recorded.names


def compare(function: Callable[..., Tensor], tensors: list[Tensor], kernel: str) -> list[Tensor]:
    """The kernel runs, and gives the gradients of the formula."""
    found, names = gradients(function, tensors)
    assert names == [kernel]
    with vendor_kernels.flags(enabled=False):
        expected, names = gradients(function, tensors)
    assert names == []
    for a, b, x in zip(found, expected, tensors, strict=True):
        assert a.dtype == x.dtype
        assert a.shape == x.shape
        rounding = 64 * torch.finfo(a.dtype).eps
        assert_close(a, b, rtol=rounding, atol=rounding * (1 + b.abs().max().item() if b.numel() else 1))
    return found


Case = tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]
CONVOLUTIONS: list[Case] = [
    ((3, 4, 9), (6, 4, 3), {}),
    ((3, 4, 9), (6, 2, 3), {"stride": 2, "padding": 1, "groups": 2}),
    ((2, 3, 17, 16), (5, 3, 3, 3), {"padding": 1}),
    ((2, 3, 17, 16), (5, 3, 3, 2), {"stride": (2, 3), "dilation": (2, 1)}),
    ((2, 3, 9, 9), (5, 3, 3, 3), {"padding": "same"}),
    ((2, 8, 9, 9), (8, 1, 3, 3), {"padding": 1, "groups": 8}),
    ((2, 8, 9, 9), (16, 1, 3, 3), {"stride": 2, "groups": 8}),
    ((20, 8, 9, 9), (4, 8, 1, 1), {"stride": 2}),
    ((8, 9, 9), (4, 8, 5, 5), {"padding": 2}),
    ((2, 3, 5, 6, 4), (4, 3, 2, 3, 1), {"stride": (1, 2, 1), "padding": (1, 1, 0)}),
    ((0, 3, 5, 5), (4, 3, 3, 3), {}),
]
TRANSPOSED: list[Case] = [
    ((3, 4, 9), (4, 6, 3), {"stride": 2, "output_padding": 1}),
    ((2, 3, 7, 6), (3, 5, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    ((2, 8, 7, 6), (8, 2, 3, 2), {"groups": 4, "dilation": 2, "output_padding": 1}),
    ((2, 3, 4, 3, 2), (3, 2, 2, 2, 2), {"stride": 2}),
]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "case"),
    [*[("conv", case) for case in CONVOLUTIONS], *[("conv_transpose", case) for case in TRANSPOSED]],
)
def test_convolution_weight(name: str, case: Case, dtype: torch.dtype, last: bool, device: str) -> None:
    shape, kernel, settings = case
    function = partial(getattr(F, f"{name}{len(kernel) - 2}d"), bias=None, **settings)
    torch.manual_seed(0)
    x, w = (torch.randn(size, device=device).to(dtype) for size in (shape, kernel))
    if last:
        if len(shape) != 4:
            pytest.skip("channels_last needs 4 axes")
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    found = compare(function, [x, w], "convolution_backward")
    form = torch.channels_last if last and len(x) else torch.contiguous_format
    assert all(gradient.is_contiguous(memory_format=form) for gradient in found if len(x))


def test_convolution_uses_the_formula_outside_plain_eager_backward() -> None:
    x, w = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    with BackwardOperations() as recorded:
        torch.autograd.grad(F.conv2d(x, w).square().sum(), w, create_graph=True)
        torch.func.grad(lambda w: F.conv2d(x, w).sum())(w)
        torch.func.vmap(torch.func.grad(lambda w: F.conv2d(x, w).sum()))(w.expand(2, *w.shape))
        upstream = torch.randn(3, 2, 4, 3, 3)
        torch.autograd.grad(F.conv2d(x, w), w, upstream, is_grads_batched=True)
        torch.autograd.grad(F.conv2d(x.to(torch.complex64), w.to(torch.complex64)).abs().sum(), w)
    assert recorded.names == []


def test_double_backward_with_output_padding_above_the_stride() -> None:
    """For a transposed convolution, output_padding may be as large as the dilation."""
    x, w = (torch.randn(2, 3, 5, 5, dtype=torch.float64) for _ in range(2))
    w = w[..., :3, :3]
    leaves = [t.detach().requires_grad_() for t in (x, w.transpose(0, 1))]

    def second() -> list[Tensor]:
        y = F.conv_transpose2d(*leaves, stride=1, dilation=2, output_padding=1)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad([g.square().sum() for g in first], leaves))

    found = second()
    with vendor_kernels.flags(enabled=False):
        expected = second()
    assert_close(found, expected)


def test_flags_are_restored() -> None:
    def fail(enabled: bool) -> None:
        with vendor_kernels.flags(enabled=enabled):
            assert vendor_kernels.enabled is enabled
            raise ZeroDivisionError

    for before, inside in itertools.product((True, False), repeat=2):
        with vendor_kernels.flags(enabled=before):
            with pytest.raises(ZeroDivisionError):
                fail(inside)
            assert vendor_kernels.enabled is before


@pytest.mark.parametrize("value", ["0", "1"])
def test_environment_variable(value: str) -> None:
    program = "from manualgrad import vendor_kernels; print(vendor_kernels.enabled)"
    environment = os.environ | {"MANUALGRAD_VENDOR_KERNELS": value}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == str(value == "1")


def test_only_vendor_kernels_call_a_backward_of_torch() -> None:
    """Other functions call neither a backward kernel of torch nor autograd."""
    named = re.compile(r"aten\.\w*backward|\w(?<!save_for)(?<!last)_backward\(|torch\.nn\.grad|autograd\.grad\(")
    root = Path(manualgrad.__file__).parent
    directories = ("rule", "ops", "nn")
    files = [path for name in directories for path in (root / name).glob("*.py")] + [root / "vendor_kernels.py"]
    found = set()
    for path in files:
        text = path.read_text()
        functions = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef)]
        own = re.compile("|".join(rf"(?<![\w.]){x.name}\(" for x in functions))  # they are searched themselves
        for function in functions:
            if named.search(own.sub("(", ast.unparse(function))):
                found.add((path.stem, function.name))
        assert not any(named.search(ast.unparse(x)) for x in ast.parse(text).body if isinstance(x, ast.Assign))
    kernels = [kernel for rule in every_rule() for kernel in rule.vendor_kernels.values()]
    allowed = {(kernel.__module__.rpartition(".")[2], kernel.__name__) for kernel in kernels}
    allowed.add(("convolution", "_vendor_gradients"))  # its two kernels call it
    assert ("convolution", "_vendor_gradients") in found
    assert found <= allowed
