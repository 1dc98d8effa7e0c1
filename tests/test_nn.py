"""manualgrad.nn is a drop-in replacement of torch.nn: names, signatures, classes, in-place variants, training."""

from __future__ import annotations

import inspect
import runpy
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from graph import torch_derivatives
from torch.testing import assert_close

from manualgrad import nn
from manualgrad.rebinding import rebind
from manualgrad.registry import Op, TensorFactory


def public_names(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]


@pytest.mark.parametrize(("namespace", "torch_namespace"), [(nn, torch.nn), (nn.functional, torch.nn.functional)])
def test_has_every_public_name(namespace: ModuleType, torch_namespace: ModuleType) -> None:
    missing = [name for name in public_names(torch_namespace) if not hasattr(namespace, name)]
    assert not missing
    assert namespace is not torch_namespace


def test_functional_has_the_registered_function(op: Op) -> None:
    if hasattr(torch.nn.functional, op.name):
        assert getattr(nn.functional, op.name) is op.function
    assert op.function is not op.reference


def parameters(function: Any) -> list[tuple[Any, ...]]:
    return [(p.name, p.kind, rebind(p.default)) for p in inspect.signature(function).parameters.values()]


def test_function_signature(op: Op) -> None:
    try:
        expected = parameters(op.reference)
    except ValueError:  # a C function: the docstring has the signature
        signature = (op.reference.__doc__ or "").split("->")[0]
        names = [name for name, _, _ in parameters(op.function) if not name.startswith("_")]
        assert all(name in signature for name in names) or not signature
    else:
        assert parameters(op.function) == expected or expected[0][0] == "args"  # the `apply` of a Function


MODULES = [
    name
    for name, value in vars(torch.nn).items()
    if inspect.isclass(value) and getattr(nn, name) is not value  # the others call no function with a gradient
]


@pytest.mark.parametrize("name", MODULES)
def test_module_class(name: str) -> None:
    manual, original = getattr(nn, name), getattr(torch.nn, name)
    assert issubclass(manual, original)
    for base in original.__mro__:  # nn.LazyConv2d is a subclass of nn.Conv2d too
        assert issubclass(manual, getattr(nn, base.__name__, base))
    assert manual.__name__ == original.__name__
    assert (inspect.getdoc(manual) or "").startswith(inspect.cleandoc(original.__doc__ or ""))
    assert parameters(manual) == parameters(original)
    assert parameters(manual.forward) == parameters(original.forward)


def test_compile_distinguishes_torch_and_rebound_modules() -> None:
    """Dynamo caches compiled code by code object, which the rebound function must not share."""
    x = torch.randn(4, 3, requires_grad=True)
    names = []
    for module in (torch.nn.ReLU(), nn.ReLU()):
        output = torch.compile(module, fullgraph=True, backend="eager")(x)
        names.append(output.grad_fn.name())
    assert names == ["ReluBackward0", "ReLUFunctionBackward"]


def test_inplace_variants() -> None:
    for name in ("relu", "leaky_relu", "silu", "elu", "dropout"):
        results = []
        for functional in (nn.functional, torch.nn.functional):
            torch.manual_seed(0)
            leaf = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
            hidden = leaf * 2
            output = getattr(functional, name)(hidden, inplace=True)
            assert output is hidden
            output.sin().sum().backward()
            results.append((output.detach(), leaf.grad))
            with pytest.raises(RuntimeError, match="leaf Variable"):
                getattr(functional, name)(leaf, inplace=True)
        assert_close(results[0], results[1])


@pytest.mark.parametrize("name", ["relu_", "leaky_relu_", "elu_"])
def test_inplace_functions_use_rules(name: str) -> None:
    hidden = torch.randn(5, 3, requires_grad=True) * 2
    output = getattr(nn.functional, name)(hidden)
    assert output is hidden
    node = output.grad_fn
    rule = node.next_functions[-1][0] if node.name().endswith("CopyBackwards") else node
    assert rule.name().endswith("FunctionBackward")


def test_broadcast_target_warning_names_the_callers_file() -> None:
    for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
        with pytest.warns(UserWarning, match="Using a target size") as caught:
            getattr(nn.functional, name)(torch.zeros(4, 1), torch.zeros(4))
        assert caught[0].filename == __file__


def test_sparse_embedding_and_max_norm() -> None:
    results = []
    for functional in (nn.functional, torch.nn.functional):
        torch.manual_seed(0)
        weight = torch.randn(6, 2, requires_grad=True)
        index = torch.tensor([1, 2, 2, 5])
        with torch.no_grad():
            weight *= 3
        output = functional.embedding(index, weight, padding_idx=5, max_norm=1.0, sparse=True)
        output.sum().backward()
        assert weight.grad is not None
        assert weight.grad.is_sparse
        results.append((output.detach(), weight.grad.to_dense(), weight.detach().clone()))
    assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("a", "b", "groups"),
    [
        ((8, 8), (2, 8, 16), 2),
        ((2, 8, 8), (8, 8), 2),
        ((8, 8), (8, 16), 2),
        ((2, 4, 8), (2, 8, 16), 0),
        ((12, 8), (2, 8, 16), 2),
    ],
)
def test_grouped_products(a: tuple[int, ...], b: tuple[int, ...], groups: int) -> None:
    """Compared with `@` here: the laws need float64, which torch's grouped_mm does not support."""
    t = TensorFactory(torch.float32)
    x, y = t(*a).requires_grad_(), t(*b).requires_grad_()
    ends = torch.tensor([3, 8], dtype=torch.int32) if groups else None

    def plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not groups:
            return x @ y
        parts = []
        for g, part in enumerate((slice(0, 3), slice(3, 8))):
            left = x[g] if x.dim() == 3 else x[:, part] if y.dim() == 2 else x[part]
            right = y[g] if y.dim() == 3 else y[part] if x.dim() == 2 else y[:, part]
            parts.append(left @ right)
        return torch.stack(parts) if x.dim() == y.dim() else torch.cat(parts, 0 if x.dim() == 2 else 1)

    def derivatives(function: Any) -> list[torch.Tensor]:
        output = function(x, y)[:8]  # the memory behind the last group is uninitialized
        first = torch.autograd.grad(output.sin().sum(), (x, y), create_graph=True)
        second = torch.autograd.grad(first[0].cos().sum() + first[1].cos().sum(), (x, y))
        return [output, *first, *second]

    found = derivatives(lambda x, y: nn.functional.grouped_mm(x, y, offs=ends))
    assert not torch_derivatives(nn.functional.grouped_mm(x, y, offs=ends))
    assert_close(found, derivatives(plain), rtol=1e-4, atol=1e-4)


def make_network(nn: ModuleType, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Linear(8, 32),
        nn.GELU(),
        nn.LayerNorm(32),
        nn.Dropout(0.1),
        nn.Linear(32, 32),
        nn.SiLU(),
        nn.RMSNorm(32),
    )
    return nn.Sequential(*layers, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)).to(dtype)


def test_network_compiles_into_one_graph() -> None:
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    x, t = TensorFactory(torch.float32)(16, 8), TensorFactory(torch.float32)(16, 1)
    results = []
    for compiled in (False, True):
        model, loss = make_network(nn).eval(), nn.MSELoss()

        def step(x: torch.Tensor, t: torch.Tensor, model: Any = model, loss: Any = loss) -> torch.Tensor:
            return loss(model(x), t)

        run = torch.compile(step, fullgraph=True, backend=backend) if compiled else step
        run(x, t).backward()
        results.append([p.grad for p in model.parameters()])
    assert_close(results[0], results[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-2)])
def test_loss_curve_matches_torch(dtype: torch.dtype, tolerance: float) -> None:
    """200 steps with dropout, from the same seed: every step in float64, the last step in float32."""
    curves = []
    for module in (nn, torch.nn):
        model, loss = make_network(module, dtype), module.MSELoss()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        t = TensorFactory(dtype)
        curve = []
        for _ in range(200):
            x = t(32, 8)
            value = loss(model(x), x[:, :1] * x[:, 1:2])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(curve)
    curve, torch_curve = curves
    assert curve[-1] < curve[0]
    steps = slice(None) if dtype == torch.float64 else slice(-1, None)
    assert curve[steps] == pytest.approx(torch_curve[steps], rel=tolerance)


def test_layer_norm_derivatives_of_higher_order() -> None:
    """torch's are wrong: its backward uses the saved 1/σ as a constant."""
    torch_is_wrong = []
    for modes, truth, manual, original in layer_norm_derivatives():
        assert manual == pytest.approx(truth, rel=1e-9), modes
        if original != pytest.approx(truth, rel=1e-3):
            torch_is_wrong.append(modes)
    assert "rrr" in torch_is_wrong


def layer_norm_derivatives() -> list[tuple[str, float, float, float]]:
    """Modes, truth, manualgrad's and torch's derivative, as scripts/benchmark.py prints them."""
    script = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "benchmark.py"))
    return script["layer_norm_derivatives"]()
