"""Private names of torch, and what depends on the version of torch."""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import manualgrad
from manualgrad import nn, torch_internals

manual_functional: Any = nn.functional
IMPORTED_ON_USE = ("torch.distributed", "torch._dynamo")
METHODS = {
    "torch.Tensor._is_view",
    "torch.Tensor._version",
}  # methods: the source does not show the class


def private_names(source: str) -> Iterator[str]:
    """The private names of torch that a source uses, as dotted names."""
    known: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {name.asname or "torch": name.name if name.asname else "torch" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = dotted(node, known)
            if name.startswith("torch.") and re.search(r"\._[^_]", name):
                yield resolved(name)


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return known.get(node.id, "")
    return f"{dotted(node.value, known)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def resolved(name: str) -> str:
    """The name up to the first object that is not a module. Empty for a module."""
    found: Any = torch
    parts = name.split(".")
    for i, part in enumerate(parts[1:], 2):
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(".".join(parts[:i]))
        if not isinstance(found, ModuleType):
            return ".".join(parts[:i])
    return ""


def test_every_private_name_is_listed() -> None:
    paths = Path(manualgrad.__file__).parent.rglob("*.py")
    used = {name for path in paths for name in private_names(path.read_text())}
    needed = {name for name in used if name and not name.startswith(IMPORTED_ON_USE)}
    assert needed | METHODS == set(torch_internals.PRIVATE_NAMES)


def test_missing_private_name_is_reported() -> None:
    with pytest.raises(ImportError, match=r"torch\._C\._gone, which torch .* does not have"):
        torch_internals.check(["torch._C._nn", "torch._C._gone"])


def test_newer_torch_gives_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    major, minor, *_ = torch.__version__.split(".")
    monkeypatch.setattr(torch_internals, "TESTED_VERSIONS", (f"{major}.{int(minor) - 1}.0",))
    with pytest.warns(UserWarning, match=rf"not tested with torch {major}\.{minor}"):
        torch_internals.check()
    monkeypatch.setattr(torch_internals, "TESTED_VERSIONS", (f"{major}.{minor}.0",))
    torch_internals.check()  # another patch version: no warning


@pytest.mark.parametrize("at", [0.0, 1.0])
def test_gradient_of_clamp_at_its_bound(at: float) -> None:
    """It agrees with torch. torch 2.14 changed it from 1 to 0."""
    for signs in (-1.0, 1.0):
        found = []
        for functional in (manual_functional, F):
            x = torch.tensor([at], dtype=torch.float64, requires_grad=True)
            functional.hinge_embedding_loss(x, torch.full_like(x, signs)).backward()
            found.append(x.grad)
        assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("norm", [math.inf, -math.inf])
def test_lp_pool_with_infinite_norm(n: int, norm: float) -> None:
    """It agrees with torch. torch 2.11 has no formula for it."""
    found = []
    for functional in (manual_functional, F):
        x = torch.linspace(-3, 3, 2 * 4**n, dtype=torch.float64).reshape(2, *[4] * n).requires_grad_()
        output = getattr(functional, f"lp_pool{n}d")(x, norm, 2)
        found.append((output, torch.autograd.grad(output.sum(), x)))
    assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)
