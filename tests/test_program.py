"""`manualgrad.program`: exact gradients, a file that runs without manualgrad, readable text."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import manualgrad
from manualgrad.program import Program, UnsupportedOperators, export
from manualgrad.torch_internals import PROGRAMS_HAVE_FIXED_SIZES

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5), nn.Conv2d(4, 8, 5, stride=2, padding=1)
        self.head = nn.Linear(8 * 5 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.head(F.relu(self.conv2(x)).flatten(1))


class Residual(nn.Module):
    """Batch norm, activations in place, a sum in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += x
        return F.silu(F.relu(y, inplace=True))


class LanguageModel(nn.Module):
    """Embedding, causal blocks, a loss; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(8) for _ in range(3)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, target: Tensor) -> dict[str, Tensor]:
        x = self.embedding(tokens) + torch.arange(tokens.shape[1]).unsqueeze(-1) * 0.1
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), target.flatten()), "logits": logits}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.2), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(x)


class Operators(nn.Module):
    """Operators between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.frozen = nn.Parameter(torch.rand(6), requires_grad=False)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (x * self.scale + self.frozen).chunk(2, -1)
        c = torch.cat([a.exp(), b.sin() / 2, a[:, 1:] - 3], 1)
        d = torch.where(mask, c.square().mean(-1, keepdim=True).rsqrt() * c, 0.0)
        e = torch.stack([d, -d.roll(1, 1)]).amax(0).cumsum(1)
        return torch.einsum("bi,bj->bij", e, a), 1 - e.max(1)[0]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 2))


class WithLoss(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(4, 3), loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.linear(x), target)


def images(channels: int = 3, size: int = 8) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.rand(4, channels, size, size, dtype=torch.float64),)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "mlp": (mlp, lambda: (torch.rand(5, 4, dtype=torch.float64),)),
    "lenet": (LeNet, images(1, 28)),
    "resnet": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), Residual(4), Residual(4), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 3)
        ),
        images(),
    ),
    "language_model": (LanguageModel, lambda: (torch.randint(11, (2, 5)), torch.randint(11, (2, 5)))),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=False
        ),
        lambda: (torch.rand(2, 5, 8, dtype=torch.float64, requires_grad=True),),
    ),
    "operators": (
        Operators,
        lambda: (torch.rand(3, 6, dtype=torch.float64, requires_grad=True), torch.rand(3, 8) > 0.3),
    ),
}
CASES = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]
    return model().double(), inputs()


def outputs_and_gradients(
    compute: Callable[..., Any], tensors: dict[str, Tensor], inputs: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor | None]]:
    torch.manual_seed(1)
    outputs = [x for x in pytree.tree_leaves(compute(*inputs)) if isinstance(x, Tensor) and x.requires_grad]
    wanted = [x for x in (*tensors.values(), *inputs) if x.requires_grad]
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    return outputs, list(torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))


def assert_same(model: nn.Module, inputs: tuple[Tensor, ...], compute: Callable[..., Any]) -> None:
    """The outputs, gradients and buffers of a computation are those of a copy of the model."""
    reference = copy.deepcopy(model)
    outputs, gradients = outputs_and_gradients(compute, dict(model.named_parameters()), inputs)
    expected = outputs_and_gradients(reference, dict(reference.named_parameters()), inputs)
    for x, y in zip((*outputs, *gradients), (*expected[0], *expected[1]), strict=True):
        assert_close(x, y, rtol=1e-10, atol=1e-12)
    for x, y in zip(model.buffers(), reference.buffers(), strict=True):
        assert_close(x, y, rtol=0, atol=1e-14)


def functions(program: Program) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "program"}
    exec(compile(program.code, "program", "exec"), namespace)
    return namespace


@CASES
@pytest.mark.parametrize("memory", ["eager", "least"])
def test_gradients_of_the_text(name: str, memory: Any) -> None:
    model, inputs = make(name)
    run = functions(export(model, inputs, memory=memory))["run"]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert_same(model, inputs, lambda *args: run(state, *args))


@CASES
@pytest.mark.parametrize("memory", ["eager", "least"])
def test_gradients_of_the_module(name: str, memory: Any) -> None:
    model, inputs = make(name)
    module = export(model, inputs, memory=memory).module()
    for _ in range(2):
        assert_same(model, inputs, module)
    with torch.no_grad():
        results = [pytree.tree_structure(x(*inputs)) for x in (module, model)]
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["mlp", "encoder"])
def test_converted_model(name: str) -> None:
    """The program of a converted model is that of the model itself, and the model stays converted."""
    model, inputs = make(name)
    code = export(model, inputs).code
    manualgrad.convert(model, functional=True)
    classes = [type(x) for x in model.modules()]
    assert export(model, inputs).code == code
    assert [type(x) for x in model.modules()] == classes
    assert_same(model, inputs, export(model, inputs).module())


@CASES
def test_file_runs_without_manualgrad(name: str, tmp_path: Path) -> None:
    """The file checks itself, in a process that cannot import manualgrad, and ruff finds nothing to change."""
    export(*make(name)).save(tmp_path / "program.py")
    done = subprocess.run([sys.executable, "-I", "program.py"], cwd=tmp_path, capture_output=True, text=True)
    match = re.fullmatch(r"largest difference from torch's autograd: (.*)\n", done.stdout)
    assert match, done.stderr
    assert float(match[1]) < 1e-9
    for command in (["format", "--diff"], ["check", "--select", "E,F,W,I"]):
        line = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "115", "program.py"]
        assert subprocess.run(line, cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.slow
@CASES
def test_compiled_module(name: str) -> None:
    model, inputs = make(name)
    assert_same(model.eval(), inputs, export(model, inputs).module(compile=True))


@pytest.mark.parametrize("name", ["mlp", "lenet", "encoder", "operators"])
def test_second_derivatives(name: str) -> None:
    model, inputs = make(name)
    model.eval()
    parameters = [x for x in model.parameters() if x.requires_grad]

    def second(compute: Callable[..., Any]) -> list[Tensor]:
        loss = torch.stack([x.square().sum() for x in pytree.tree_leaves(compute(*inputs))]).sum()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        return list(torch.autograd.grad(torch.stack([x.square().sum() for x in first]).sum(), parameters))

    with sdpa_kernel(SDPBackend.MATH):
        expected = second(model)
    for x, y in zip(second(export(model, inputs).module()), expected, strict=True):
        assert_close(x, y, rtol=1e-8, atol=1e-10)


def test_second_derivative_with_dropout_is_refused() -> None:
    model, inputs = make("mlp")
    output = export(model, inputs).module()(*inputs)
    with pytest.raises(
        RuntimeError, match="cannot be differentiated twice: native_dropout would run a second time"
    ):
        torch.autograd.grad(output.sum(), [*model.parameters()], create_graph=True)


LOSSES: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
    **{
        type(x).__name__: (x, lambda: torch.rand(5, 3, dtype=torch.float64))
        for x in (
            nn.MSELoss(),
            nn.L1Loss(),
            nn.SmoothL1Loss(),
            nn.HuberLoss(),
            nn.BCEWithLogitsLoss(),
            nn.KLDivLoss(),
        )
    },
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), lambda: torch.randint(4, (5, 3)).double()),
    "SoftMarginLoss": (nn.SoftMarginLoss(), lambda: torch.randint(2, (5, 3)).double() * 2 - 1),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(label_smoothing=0.1), lambda: torch.randint(3, (5,))),
    "MultiMarginLoss": (nn.MultiMarginLoss(), lambda: torch.randint(3, (5,))),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    loss, make_target = LOSSES[name]
    torch.manual_seed(0)
    model, inputs = (
        WithLoss(loss).double(),
        (torch.rand(5, 4, dtype=torch.float64, requires_grad=True), make_target()),
    )
    assert_same(model, inputs, export(model, inputs).module())


# --- the text ---


def test_two_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    code = export(model, (torch.rand(5, 8),)).code
    assert (
        '''
def forward(state, input):
    """The output of the model, and what the backward needs."""
    # 0: Linear
    layer0 = F.linear(input, state["0.weight"], state["0.bias"])
    # 1: ReLU
    layer1 = F.relu(layer0)
    # 2: Linear
    layer2 = F.linear(layer1, state["2.weight"], state["2.bias"])
    # saved: 480 bytes
    return layer2, (input, layer1)


def backward(state, saved, grad_layer2):
    """The gradients of the parameters by name."""
    input, layer1 = saved
    grads = {}
    # 2: LinearFunction
    grad_layer1 = grad_layer2 @ state["2.weight"]
    grads["2.weight"] = grad_layer2.mT @ layer1
    grads["2.bias"] = grad_layer2.sum(0)
    # 1: ReLUFunction
    grad_layer0 = torch.where(layer1.bool(), grad_layer1, 0)
    # 0: LinearFunction
    grads["0.weight"] = grad_layer0.mT @ input
    grads["0.bias"] = grad_layer0.sum(0)
    return grads
'''
        in code
    )


def test_repeated_module_is_written_once() -> None:
    code = export(*make("language_model")).code
    assert code.count("def Block_forward(") == code.count("def Block_backward(") == 1
    assert code.count(" = Block_forward(") == code.count(" = Block_backward(") == 3


def test_no_line_for_a_gradient_that_nobody_needs() -> None:
    model, inputs = make("mlp")
    model[0].requires_grad_(False)  # type: ignore[index]
    model[1].bias.requires_grad_(False)  # type: ignore[index]
    code = export(model, inputs).code
    backward = code[code.index("def backward(") : code.index("class Run")]
    assert set(re.findall(r'grads\["(.*?)"\] =', backward)) == {"1.weight", "4.weight", "4.bias"}
    assert "grad_layer0" not in backward
    assert 'state["0.weight"]' not in backward
    state = {**dict(model.named_parameters())}
    run = functions(export(model, inputs))["run"]
    assert_same(model, inputs, lambda *args: run(state, *args))


def test_large_tensors_are_computed_again() -> None:
    model, inputs = make("mlp")
    saved = {
        memory: re.findall(r"return layer4, \((.*)\)", export(model, inputs, memory=memory).code)[0].split(", ")
        for memory in ("eager", "least")
    }
    assert set(saved["eager"]) - set(saved["least"]) == {"layer1", "layer3"}
    assert set(saved["least"]) <= set(saved["eager"])


@pytest.mark.skipif(PROGRAMS_HAVE_FIXED_SIZES, reason="dynamic_shapes needs torch 2.13 or later")
def test_dynamic_shapes() -> None:
    model, (x,) = make("encoder")
    batch = torch.export.Dim("batch", min=2)
    program = export(model, (x,), dynamic_shapes=({0: batch},))
    assert "    batch = input.shape[0]\n" in program.code
    module, run = program.module(), functions(program)["run"]
    for size in (2, 7):
        inputs = (torch.rand(size, 5, 8, dtype=torch.float64, requires_grad=True),)
        assert_same(model, inputs, module)
        assert_same(model, inputs, lambda *args: run(dict(model.named_parameters()), *args))
    with pytest.raises(
        ValueError, match=r"expected a tensor of torch.float64 \['any', 5, 8\], but got .* \[2, 6, 8\]"
    ):
        module(torch.rand(2, 6, 8, dtype=torch.float64))


# --- writes in place ---


class Writes(nn.Module):
    """Writes into views, reads the base and other views afterwards."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.register_buffer("seen", torch.zeros(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        rows, matrix = y[1:], y.view(5, 2, 3)
        y[:, 0] = 1
        y[2, 1:3] *= 2
        matrix[0].transpose(0, 1).add_(x[0, :1])
        matrix[1:, :, 1].copy_(rows[:, 2:4] * 3)
        shifted = y.new_zeros(y.shape)
        shifted[:, 1:] = y[:, :-1].clone()
        self.seen[0] += y.detach().mean(0)
        return (rows * 2).sin() + y[1:] * matrix.flatten(1)[1:] + shifted[1:].exp()


def test_writes_into_views() -> None:
    torch.manual_seed(0)
    model, inputs = Writes().double(), (torch.rand(5, 4, dtype=torch.float64, requires_grad=True),)
    program = export(model, inputs)
    assert_same(model, inputs, program.module())
    run = functions(program)["run"]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert_same(model, inputs, lambda *args: run(state, *args))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: x.add_(1), "the model writes into its input 'x'"),
        (
            lambda self, x: (self.weight * x).expand(2, 3).select(0, 0).add_(1),
            "a write into a view made by expand",
        ),
    ],
)
def test_writes_that_are_refused(forward: Any, message: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    Model.forward = forward
    with pytest.raises(UnsupportedOperators, match=message):
        export(Model(), (torch.rand(3),))


# --- errors ---


def test_unsupported_operators_are_listed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(self.inner(x)) + torch.special.i0(self.inner(x))

    with pytest.raises(UnsupportedOperators, match=r"linalg_inv, called by the model\n    special_i0, called by"):
        export(Model(), (torch.rand(3, 3),))


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((torch.rand(6, 4, dtype=torch.float64),), ValueError),
        ((torch.rand(5, 4),), ValueError),
        ((None,), ValueError),
        ((), TypeError),
    ],
)
def test_wrong_arguments(args: tuple[Any, ...], error: type[Exception]) -> None:
    module = export(*make("mlp")).module()
    with pytest.raises(error, match="expected"):
        module(*args)


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text("from torch import nn\ndef small():\n    return nn.Linear(3, 2)\n")
    command = [sys.executable, "-m", "manualgrad", "export"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True)

    done = run("models:small", "--input", "4,3", "-o", "step.py")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    printed = run("models:small", "--input", "4,3")
    assert printed.stdout == (tmp_path / "step.py").read_text()
    assert "there is no dtype 'float7'" in run("models:small", "--input", "4,3:float7").stderr
    assert run("models:small", "--input", "4,5").returncode == 2


# --- the page ---

PAGE = Path(manualgrad.__file__).parent / "program" / "README.md"
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def output_of_example(text: str) -> str:
    """What the example of the page prints."""
    match = EXAMPLE.search(text)
    assert match
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(match[1], str(PAGE), "exec"), {})
    return printed.getvalue()


def test_page() -> None:
    match = EXAMPLE.search(PAGE.read_text())
    assert match
    assert match[2] == output_of_example(PAGE.read_text()), "python tests/test_program.py updates the page"


if __name__ == "__main__":
    page = PAGE.read_text()
    found = EXAMPLE.search(page)
    assert found
    PAGE.write_text(page[: found.start(2)] + output_of_example(page) + page[found.end(2) :])
