"""Recomputation: the same gradients from fewer saved bytes, with hooks, writes, checkpoints and transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from test_laws import verify_op
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import manualgrad.nn.functional as F
from manualgrad import nn, override_torch_functions, recomputation, saved_bytes
from manualgrad.ops.arithmetic import multiply
from manualgrad.ops.linear import LinearFunction
from manualgrad.registry import Op
from manualgrad.rule import saved_values

Model = Callable[[Tensor], Tensor]

WIDTH, ROWS = 8, 16


@pytest.fixture(autouse=True)
def _recompute_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputation, "MIN_ELEMENTS", 0)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, dtype=torch.float64)


def saved_size(function: Callable[..., Any], *args: Any) -> int:
    return saved_bytes(function, *args).grand_total


def bytes_of_bits(n: int) -> int:
    return (n + 7) // 8


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(multiply(F.silu(self.gate(x)), self.up(x)))


class Image(nn.Module):
    """Convolutions on an input of shape (rows, width)."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.BatchNorm2d(2),
            nn.ReLU(inplace),
            nn.MaxPool2d(2),
            nn.Conv2d(2, 2, 1),
            nn.GroupNorm(1, 2),
            nn.SiLU(),
            nn.InstanceNorm2d(2),
            nn.Hardtanh(),
            nn.Conv2d(2, 2, 1),
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.reshape(4, 1, 4, 8))


def chain(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(linear(), *between, linear()).double()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: chain(nn.GELU()),
    "gelu, dropout": lambda: chain(nn.GELU(), nn.Dropout(0.3)),
    "relu, dropout": lambda: chain(nn.ReLU(), nn.Dropout(0.3)),
    "layer norm": lambda: chain(nn.LayerNorm(WIDTH)),
    "rms norm, dropout": lambda: chain(nn.RMSNorm(WIDTH), nn.Dropout(0.3)),
    "batch norm, relu, dropout": lambda: chain(nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.3)),
    "batch norm, relu in place": lambda: chain(nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True)),
    "batch norm in eval mode": lambda: chain(nn.BatchNorm1d(WIDTH), nn.SiLU()).eval(),
    "many activations": lambda: chain(
        nn.GELU(), nn.LayerNorm(WIDTH), nn.SiLU(), nn.LayerNorm(WIDTH), nn.ELU(), nn.Softplus()
    ),
    "gate": Gated,
    "image": lambda: Image(inplace=False),
    "image, in place": lambda: Image(inplace=True),
    "transformer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.2, "gelu", batch_first=True).double(),
}
"""Models in which a tensor is recomputed."""


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[request.param]()


def run(model: Model, x: Tensor) -> Tensor:
    torch.manual_seed(2)
    return model(x)


def gradients(model: nn.Module, x: Tensor, *, memory_saving: bool = True) -> list[Tensor]:
    """The gradients of the sum of squares with respect to x and all parameters."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if not memory_saving:
            patch.setattr(recomputation, "MIN_ELEMENTS", 2**40)
        return list(torch.autograd.grad(run(model, x).square().sum(), [x, *model.parameters()]))


def total(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.sum() for tensor in tensors]).sum()


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_same_gradients_from_fewer_saved_bytes(model: nn.Module, x: Tensor) -> None:
    assert_same(gradients(model, x), gradients(model, x, memory_saving=False))

    def size() -> int:
        return saved_size(run, copy.deepcopy(model), x.clone().requires_grad_())

    less = size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recomputation, "MIN_ELEMENTS", 2**40)
        assert less < size()


def test_tensor_with_a_hook_is_saved() -> None:
    """The hook may be FSDP's, which gathers the weights of the norm. The output cannot be recomputed before it."""
    x, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH, requires_grad=True)

    def norm_and_linear(hook: Callable[[Tensor], None] | None) -> Tensor:
        y = F.layer_norm(x, (WIDTH,), weight[0])
        if hook:
            y.register_hook(hook)
        return F.linear(y, weight)

    assert saved_size(norm_and_linear, lambda grad: None) == saved_size(norm_and_linear, None) + 4 * ROWS * WIDTH


def test_saved_bytes_of_layers_between_two_linears() -> None:
    """An activation or dropout costs only its mask."""
    n = ROWS * WIDTH
    x, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH, requires_grad=True)

    def size(between: Model) -> int:
        return saved_size(lambda: F.linear(between(F.linear(x, weight)), weight)) - saved_size(F.linear, x, weight)

    assert size(F.gelu) == 4 * n
    assert size(lambda z: F.dropout(F.gelu(z), 0.5)) == 4 * n + bytes_of_bits(n)
    assert size(lambda z: F.dropout(z, 0.5)) == 4 * n + bytes_of_bits(n)
    assert size(F.relu) == 4 * n + bytes_of_bits(n)
    assert size(lambda z: F.relu(F.layer_norm(z, (WIDTH,)))) == 4 * n + bytes_of_bits(n) + 2 * 4 * ROWS
    assert size(lambda z: F.dropout(F.relu(F.rms_norm(z, (WIDTH,))), 0.5)) == 4 * n + 2 * bytes_of_bits(n)


def test_saved_values_by_name(x: Tensor) -> None:
    """Recomputed tensors are included. The backward still works afterwards."""
    first, second = linear(), linear()
    hidden = F.gelu(first(x))
    output = second(hidden)
    (rule, values), of_hidden = saved_values(output.grad_fn) or (None, {}), saved_values(hidden.grad_fn)
    assert rule is LinearFunction
    assert values.keys() == {"input", "weight"}
    torch.testing.assert_close(values["input"], hidden)
    assert values["weight"] is second.weight
    assert of_hidden is not None
    torch.testing.assert_close(of_hidden[1], {"input": first(x)})
    leaky = F.leaky_relu(hidden, 0.2)
    of_leaky = saved_values(leaky.grad_fn)
    assert of_leaky is not None
    torch.testing.assert_close(of_leaky[1], {"positive": hidden > 0, "negative_slope": 0.2})
    output.sum().backward()
    torch.testing.assert_close(second.weight.grad, hidden.sum(0).expand(WIDTH, WIDTH))
    with pytest.raises(RuntimeError, match="saved"):
        saved_values(output.grad_fn)
    assert saved_values(None) is saved_values((hidden + 1).grad_fn) is None


def test_gate_with_overridden_torch_functions() -> None:
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH, requires_grad=True)

    def gated() -> Tensor:
        return torch.nn.functional.linear(torch.nn.functional.silu(x @ weight) * (x @ weight), weight)

    with override_torch_functions():
        less = saved_size(gated)
    assert less == saved_size(gated) - 2 * x.nbytes  # neither the gate nor the product


def test_frozen_parameters_save_nothing() -> None:
    x, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH)
    assert saved_size(lambda: F.linear(F.relu(x), weight)) == 4 * WIDTH * WIDTH + bytes_of_bits(ROWS * WIDTH)


@pytest.mark.parametrize("modes", ["create_graph", "twice"])
def test_double_backward(model: nn.Module, x: Tensor, modes: str) -> None:
    def second(memory_saving: bool) -> list[Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            if not memory_saving:
                patch.setattr(recomputation, "MIN_ELEMENTS", 2**40)
            other, at = copy.deepcopy(model), x.clone().requires_grad_()
            wanted = [at, *other.parameters()]
            first = torch.autograd.grad(run(other, at).square().sum(), wanted, create_graph=True)
            if modes == "twice":
                first = torch.autograd.grad(total(g.sin() for g in first), wanted, create_graph=True)
            return list(torch.autograd.grad(total(g.square() for g in first), wanted))

    found, expected = second(True), second(False)
    largest = max(float(g.abs().max()) for g in expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * largest)


def test_gradient_is_differentiable_with_respect_to_an_activation(x: Tensor) -> None:
    """The backward uses the original activation while it is alive."""
    first, second = linear(), linear()
    y = F.gelu(first(x))
    (g,) = torch.autograd.grad(second(y).square().sum(), [second.weight], create_graph=True)
    (found,) = torch.autograd.grad(g.square().sum(), [y])
    z = y.detach().requires_grad_()
    (g,) = torch.autograd.grad(second(z).square().sum(), [second.weight], create_graph=True)
    assert_same([found], list(torch.autograd.grad(g.square().sum(), [z])))


def test_backward_twice(model: nn.Module, x: Tensor) -> None:
    parameters, at = list(model.parameters()), x.clone().requires_grad_()
    loss = run(model, at).square().sum()
    once = torch.autograd.grad(loss, [at, *parameters], retain_graph=True)
    assert_same(list(torch.autograd.grad(loss, [at, *parameters])), list(once))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, [at, *parameters])


def test_some_parameters_only(model: nn.Module, x: Tensor) -> None:
    expected = gradients(model, x, memory_saving=False)[1:]
    parameters = list(model.parameters())
    loss = run(model, x).square().sum()
    for i in reversed(range(len(parameters))):
        assert_same(list(torch.autograd.grad(loss, parameters[i : i + 1], retain_graph=True)), expected[i : i + 1])


def test_two_losses_on_one_trunk(x: Tensor) -> None:
    torch.manual_seed(0)
    trunk, heads = chain(nn.GELU(), nn.Dropout(0.2), linear(), nn.LayerNorm(WIDTH)), [linear(), linear()]

    def losses() -> list[Tensor]:
        features = run(trunk, x)
        return [head(features).square().sum() for head in heads]

    parameters = list(trunk.parameters())
    together = torch.autograd.grad(total(losses()), parameters)
    one, two = losses()
    first = torch.autograd.grad(one, parameters, retain_graph=True)
    del one
    second = torch.autograd.grad(two, parameters)
    assert_same([a + b for a, b in zip(first, second, strict=True)], list(together))


IN_PLACE: list[Callable[[Tensor], object]] = [
    lambda y: y.mul_(2),
    lambda y: y[0].zero_(),
    lambda y: y.detach().mul_(2),
    torch.no_grad()(lambda y: y.add_(1)),
    lambda y: y.view(-1)[3:].sin_(),
]


@pytest.mark.parametrize("write", IN_PLACE)
def test_write_between_producer_and_consumer(write: Callable[[Tensor], object], x: Tensor) -> None:
    """The consumer saves the tensor that was written to."""
    torch.manual_seed(0)
    first, second = linear(), linear()
    y = F.gelu(first(x))
    write(y)
    out = second(y)
    expected = y.detach().clone()
    del y
    (found,) = torch.autograd.grad(out.sum(), [second.weight])
    assert_same([found], [expected.sum(0).expand(WIDTH, WIDTH)])


def test_write_after_the_consumer(x: Tensor) -> None:
    """torch raises an error. Here the backward recomputes the value, and does not use the changed tensor."""
    first, second = linear(), linear()
    y = F.gelu(first(x))
    expected = y.detach().sum(0).expand(WIDTH, WIDTH)
    out = second(y)
    with torch.no_grad():
        y.mul_(2)
    assert_same(list(torch.autograd.grad(out.sum(), [second.weight])), [expected])


def test_write_to_the_source_after_the_consumer(x: Tensor) -> None:
    first, second = linear(), linear()
    z = first(x)
    out = second(F.gelu(z))
    with torch.no_grad():
        z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_write_to_the_source_before_the_consumer(x: Tensor) -> None:
    first, second = linear(), linear()
    z = first(x)
    y = F.gelu(z)
    with torch.no_grad():
        z.mul_(2)
    (found,) = torch.autograd.grad(second(y).sum(), [second.weight])
    assert_same([found], [y.detach().sum(0).expand(WIDTH, WIDTH)])


def test_saved_tensor_hooks_that_only_count(model: nn.Module, x: Tensor) -> None:
    expected = gradients(model, x)
    seen: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        assert_same(gradients(model, x), expected)
    assert seen


def test_saved_tensor_hooks_that_replace_tensors(model: nn.Module, x: Tensor) -> None:
    expected = gradients(model, x)
    with save_on_cpu():
        assert_same(gradients(model, x), expected)
    with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        assert_same(gradients(model, x), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(model: nn.Module, x: Tensor, reentrant: bool) -> None:
    expected = gradients(model, x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    if reentrant:
        other, at = Checkpointed(), x.clone().requires_grad_()
        run(other, at).square().sum().backward()
        assert_same([at.grad, *[p.grad for p in other.parameters()]], expected)  # type: ignore[list-item]
    else:
        assert_same(gradients(Checkpointed(), x), expected)


def test_checkpoint_after_a_recomputable_layer(x: Tensor) -> None:
    torch.manual_seed(0)
    before, after = chain(nn.GELU()), chain(nn.GELU())
    norm = nn.LayerNorm(WIDTH, dtype=torch.float64)
    whole = nn.Sequential(before, norm, after)
    expected = gradients(whole, x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.norm, self.after = copy.deepcopy((before, norm, after))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.after, self.norm(self.before(x)), use_reentrant=False)

    assert_same(gradients(Checkpointed(), x), expected)


def test_transforms_and_forward_mode(model: nn.Module, x: Tensor) -> None:
    parameters: dict[str, Any] = dict(model.named_parameters())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.training:
            module.running_mean = module.running_var = module.num_batches_tracked = (
                None  # transforms do not allow writes
            )

    def loss(values: dict[str, Any]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    torch.manual_seed(2)
    expected = list(torch.autograd.grad(loss(parameters), list(parameters.values())))
    torch.manual_seed(2)
    assert_same(list(torch.func.grad(loss)(parameters).values()), expected)
    torch.manual_seed(2)
    directions = {name: torch.ones_like(value) for name, value in parameters.items()}
    along = torch.func.jvp(loss, (parameters,), (directions,))[1]
    torch.testing.assert_close(along, sum(g.sum() for g in expected))


def test_no_leak(x: Tensor) -> None:
    """The backward frees all tensors of recipes, although the loss is still alive."""
    model = chain(nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(WIDTH))
    loss = run(model, x).square().sum()
    node, waiting, recipes = None, [loss.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is not None:
            recipes.append(getattr(node, "recipe", None))
            waiting += [next_node for next_node, _ in node.next_functions]
    named = [
        part for recipe in recipes if recipe for part in recipe.parts if isinstance(part, recomputation.WeakTensor)
    ]
    assert any(part.get() is not None for part in named)
    parameters = {id(parameter) for parameter in model.parameters()}
    loss.backward()
    assert all(part.get() is None or id(part.get()) in parameters for part in named)


@pytest.mark.parametrize("shape", [(8,), (7,), (3, 5), (2, 3, 5, 7), (0,), (1,)])
def test_mask_as_bits(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    packed = recomputation.pack_bits(mask)
    assert packed is not None
    assert packed[0].numel() == bytes_of_bits(mask.numel())
    assert torch.equal(recomputation.unpack_bits(*packed), mask)


def test_bits_preserve_the_memory_format() -> None:
    mask = (torch.rand(2, 3, 5, 5) > 0.5).contiguous(memory_format=torch.channels_last)
    packed = recomputation.pack_bits(mask)
    assert packed is not None
    unpacked = recomputation.unpack_bits(*packed)
    assert torch.equal(unpacked, mask)
    assert unpacked.stride() == mask.stride()
    assert recomputation.pack_bits(mask[:, ::2]) is None


@pytest.mark.parametrize(
    "law",
    [
        "gradient_of_input_subsets",
        "double_backward",
        "preserved_memory_format",
        "low_precision",
        "no_memory_leaks",
    ],
)
def test_laws_where_recompute_small_tensors(law: str, op: Op, number: int, device: str) -> None:
    """What the samples are too small for: bits, offsets, recipes."""
    verify_op(op, number, device, law).raise_if_failed()
