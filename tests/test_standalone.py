"""The standalone file of each operation: torch's values, manualgrad's gradients, no import of manualgrad."""

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
from manualgrad.standalone import standalone_source


def outputs_and_gradients(function: Any, sample: SampleInput) -> tuple[list[Tensor], list[Tensor | None]]:
    args, kwargs = sample.with_requires_grad()
    torch.manual_seed(0)
    found = function(*args, **kwargs)
    outputs = [x for x in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(x, Tensor)]
    differentiable = [x for x in outputs if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in differentiable]
    leaves = [x for v in (*args, *kwargs.values()) for x in (v if isinstance(v, (list, tuple)) else [v])]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return outputs, list(torch.autograd.grad(differentiable, wanted, upstream, allow_unused=True))


def load_module(text: str, name: str) -> ModuleType:
    module = ModuleType(f"standalone_{name}")
    sys.modules[module.__name__] = module  # dataclasses look it up
    exec(compile(text, f"{name}.py", "exec"), vars(module))
    return module


@pytest.mark.filterwarnings("ignore")
def test_same_values_and_gradients(op: Op) -> None:
    text = standalone_source(op)
    assert "manualgrad" not in text
    function = getattr(load_module(text, op.name), op.name)
    for sample in op.sample_inputs(TensorFactory()):
        outputs, gradients = outputs_and_gradients(function, sample)
        expected, manual_gradients = (
            outputs_and_gradients(op.reference, sample)[0],
            outputs_and_gradients(op.function, sample)[1],
        )
        assert_close(outputs, expected, equal_nan=True)
        assert_close(gradients, manual_gradients)


@pytest.mark.parametrize("name", ["layer_norm", "gelu", "max_pool2d", "cross_entropy"])
def test_torch_signature(name: str) -> None:
    function = getattr(load_module(standalone_source(ops()[name]), name), name)
    assert next(iter(inspect.signature(function).parameters)) == "input"


def test_runs_and_passes_gradcheck_without_manualgrad(tmp_path: Path) -> None:
    (tmp_path / "gelu.py").write_text(standalone_source(ops()["gelu"]))
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
