"""The standalone file of each operation: torch's values, our gradients, and no import of ours."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manualgrad.registry import Op, SampleInput, TensorFactory, ops
from manualgrad.standalone import standalone


def outputs_and_gradients(function: Any, call: SampleInput) -> tuple[list[Tensor], list[Tensor | None]]:
    args, kwargs = call.marked()
    torch.manual_seed(0)
    found = function(*args, **kwargs)
    outputs = [x for x in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(x, Tensor)]
    differentiable = [x for x in outputs if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in differentiable]
    leaves = [x for v in (*args, *kwargs.values()) for x in (v if isinstance(v, (list, tuple)) else [v])]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return outputs, list(torch.autograd.grad(differentiable, wanted, upstream, allow_unused=True))


def loaded(text: str, name: str) -> ModuleType:
    module = ModuleType(f"standalone_{name}")
    sys.modules[module.__name__] = module  # as dataclasses expect
    exec(compile(text, f"{name}.py", "exec"), vars(module))
    return module


@pytest.mark.filterwarnings("ignore")
def test_it_computes_the_same(op: Op) -> None:
    text = standalone(op)
    assert "manualgrad" not in text
    function = getattr(loaded(text, op.name), op.name)
    for call in op.sample_inputs(TensorFactory()):
        outputs, gradients = outputs_and_gradients(function, call)
        expected, of_ours = (
            outputs_and_gradients(op.reference, call)[0],
            outputs_and_gradients(op.function, call)[1],
        )
        assert_close(outputs, expected, equal_nan=True)
        assert_close(gradients, of_ours)


@pytest.mark.parametrize("name", ["layer_norm", "gelu", "max_pool2d", "cross_entropy"])
def test_it_has_torchs_signature(name: str) -> None:
    function = getattr(loaded(standalone(ops()[name]), name), name)
    assert next(iter(inspect.signature(function).parameters)) == "input"


def test_it_runs_where_manualgrad_is_not_installed(tmp_path: Path) -> None:
    """And passes gradcheck."""
    (tmp_path / "gelu.py").write_text(standalone(ops()["gelu"]))
    check = """
import sys
sys.modules["manualgrad"] = None
import torch
from gelu import gelu
x = torch.randn(5, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(gelu, x)
assert torch.autograd.gradgradcheck(gelu, x)
"""
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True)
