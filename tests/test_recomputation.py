"""Keeping less changes nothing: recipes, bits, and everything that may stand in their way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from test_laws import verify_op
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import manualgrad.nn.functional as F
from manualgrad import convert, nn, override_torch_functions, recomputation, revert, saved_bytes
from manualgrad.ops.elementary import product
from manualgrad.ops.linear import LinearFunction
from manualgrad.registry import Op, TensorFactory
from manualgrad.rule import saved_by

Model = Callable[[Tensor], Tensor]

WIDTH, ROWS = 8, 16


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputation, "SMALL", 0)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, dtype=torch.float64)


def kept_bytes(function: Callable[..., Any], *args: Any) -> int:
    return saved_bytes(function, *args).grand_total


def bits(n: int) -> int:
    return (n + 7) // 8


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(product(F.silu(self.gate(x)), self.up(x)))


class Image(nn.Module):
    """Convolutions, seen from rows."""

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
    "batch norm after training": lambda: chain(nn.BatchNorm1d(WIDTH), nn.SiLU()).eval(),
    "many": lambda: chain(nn.GELU(), nn.LayerNorm(WIDTH), nn.SiLU(), nn.LayerNorm(WIDTH), nn.ELU(), nn.Softplus()),
    "gate": Gated,
    "image": lambda: Image(inplace=False),
    "image, in place": lambda: Image(inplace=True),
    "transformer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.2, "gelu", batch_first=True).double(),
}
"""Models in which something is made again."""


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[request.param]()


def run(model: Model, x: Tensor) -> Tensor:
    torch.manual_seed(2)
    return model(x)


def gradients(model: nn.Module, x: Tensor, *, thrifty: bool = True) -> list[Tensor]:
    """Of the squares' sum, to every parameter and to x."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if not thrifty:
            patch.setattr(recomputation, "SMALL", 2**40)
        return list(torch.autograd.grad(run(model, x).square().sum(), [x, *model.parameters()]))


def total(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.sum() for tensor in tensors]).sum()


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_same_gradients_from_less(model: nn.Module, x: Tensor) -> None:
    same(gradients(model, x), gradients(model, x, thrifty=False))

    def kept() -> int:
        return kept_bytes(run, copy.deepcopy(model), x.clone().requires_grad_())

    less = kept()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recomputation, "SMALL", 2**40)
        assert less < kept()


def test_a_tensor_with_a_hook_is_kept() -> None:
    """The hook may be FSDP's, which has a norm's weights only after it: the output is not made again before."""
    x, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH, requires_grad=True)

    def behind_a_norm(hook: Callable[[Tensor], None] | None) -> Tensor:
        y = F.layer_norm(x, (WIDTH,), weight[0])
        if hook:
            y.register_hook(hook)
        return F.linear(y, weight)

    assert kept_bytes(behind_a_norm, lambda grad: None) == kept_bytes(behind_a_norm, None) + 4 * ROWS * WIDTH


def test_what_is_kept() -> None:
    """To the byte: what stands between two layers costs its mask."""
    n = ROWS * WIDTH
    x, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH, requires_grad=True)

    def kept(between: Model) -> int:
        return kept_bytes(lambda: F.linear(between(F.linear(x, weight)), weight)) - kept_bytes(F.linear, x, weight)

    assert kept(F.gelu) == 4 * n
    assert kept(lambda z: F.dropout(F.gelu(z), 0.5)) == 4 * n + bits(n)
    assert kept(lambda z: F.dropout(z, 0.5)) == 4 * n + bits(n)
    assert kept(F.relu) == 4 * n + bits(n)
    assert kept(lambda z: F.relu(F.layer_norm(z, (WIDTH,)))) == 4 * n + bits(n) + 2 * 4 * ROWS
    assert kept(lambda z: F.dropout(F.relu(F.rms_norm(z, (WIDTH,))), 0.5)) == 4 * n + 2 * bits(n)


def test_what_a_node_has_kept_is_told_by_name(x: Tensor) -> None:
    """Whatever is made again too; and the backward runs afterwards as if nobody had asked."""
    first, second = linear(), linear()
    hidden = F.gelu(first(x))
    output = second(hidden)
    (rule, values), below = saved_by(output.grad_fn) or (None, {}), saved_by(hidden.grad_fn)
    assert rule is LinearFunction
    assert values.keys() == {"input", "weight"}
    torch.testing.assert_close(values["input"], hidden)
    assert values["weight"] is second.weight
    assert below is not None
    torch.testing.assert_close(below[1], {"input": first(x)})
    sloped = F.leaky_relu(hidden, 0.2)
    rectified = saved_by(sloped.grad_fn)
    assert rectified is not None
    torch.testing.assert_close(rectified[1], {"positive": hidden > 0, "negative_slope": 0.2})
    output.sum().backward()
    torch.testing.assert_close(second.weight.grad, hidden.sum(0).expand(WIDTH, WIDTH))
    with pytest.raises(RuntimeError, match="saved"):
        saved_by(output.grad_fn)
    assert saved_by(None) is saved_by((hidden + 1).grad_fn) is None


def test_a_gate_within_enabled() -> None:
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH, requires_grad=True)

    def gated() -> Tensor:
        return torch.nn.functional.linear(torch.nn.functional.silu(x @ weight) * (x @ weight), weight)

    with override_torch_functions():
        less = kept_bytes(gated)
    assert less == kept_bytes(gated) - 2 * x.nbytes  # neither the gate nor the product


def test_frozen_parameters_keep_nothing() -> None:
    x, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH)
    assert kept_bytes(lambda: F.linear(F.relu(x), weight)) == 4 * WIDTH * WIDTH + bits(ROWS * WIDTH)


@pytest.mark.parametrize("modes", ["create_graph", "twice"])
def test_double_backward(model: nn.Module, x: Tensor, modes: str) -> None:
    def second(thrifty: bool) -> list[Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            if not thrifty:
                patch.setattr(recomputation, "SMALL", 2**40)
            other, at = copy.deepcopy(model), x.clone().requires_grad_()
            wanted = [at, *other.parameters()]
            first = torch.autograd.grad(run(other, at).square().sum(), wanted, create_graph=True)
            if modes == "twice":
                first = torch.autograd.grad(total(g.sin() for g in first), wanted, create_graph=True)
            return list(torch.autograd.grad(total(g.square() for g in first), wanted))

    found, expected = second(True), second(False)
    largest = max(float(g.abs().max()) for g in expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * largest)


def test_derivative_by_a_tensor_in_between(x: Tensor) -> None:
    """Whoever holds the activation can differentiate the gradient by it."""
    first, second = linear(), linear()
    y = F.gelu(first(x))
    (g,) = torch.autograd.grad(second(y).square().sum(), [second.weight], create_graph=True)
    (found,) = torch.autograd.grad(g.square().sum(), [y])
    z = y.detach().requires_grad_()
    (g,) = torch.autograd.grad(second(z).square().sum(), [second.weight], create_graph=True)
    same([found], list(torch.autograd.grad(g.square().sum(), [z])))


def test_backward_twice(model: nn.Module, x: Tensor) -> None:
    parameters, at = list(model.parameters()), x.clone().requires_grad_()
    loss = run(model, at).square().sum()
    once = torch.autograd.grad(loss, [at, *parameters], retain_graph=True)
    same(list(torch.autograd.grad(loss, [at, *parameters])), list(once))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, [at, *parameters])


def test_some_parameters_only(model: nn.Module, x: Tensor) -> None:
    expected = gradients(model, x, thrifty=False)[1:]
    parameters = list(model.parameters())
    loss = run(model, x).square().sum()
    for i in reversed(range(len(parameters))):
        same(list(torch.autograd.grad(loss, parameters[i : i + 1], retain_graph=True)), expected[i : i + 1])


def test_two_losses_share_a_trunk(x: Tensor) -> None:
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
    same([a + b for a, b in zip(first, second, strict=True)], list(together))


IN_PLACE: list[Callable[[Tensor], object]] = [
    lambda y: y.mul_(2),
    lambda y: y[0].zero_(),
    lambda y: y.detach().mul_(2),
    torch.no_grad()(lambda y: y.add_(1)),
    lambda y: y.view(-1)[3:].sin_(),
]


@pytest.mark.parametrize("write", IN_PLACE)
def test_write_between_producer_and_consumer(write: Callable[[Tensor], object], x: Tensor) -> None:
    """The consumer sees what was written: it keeps that."""
    torch.manual_seed(0)
    first, second = linear(), linear()
    y = F.gelu(first(x))
    write(y)
    out = second(y)
    expected = y.detach().clone()
    del y
    (found,) = torch.autograd.grad(out.sum(), [second.weight])
    same([found], [expected.sum(0).expand(WIDTH, WIDTH)])


def test_write_after_the_consumer(x: Tensor) -> None:
    """torch refuses; a value made again is the right one, and the tensor that lives is not mistaken for it."""
    first, second = linear(), linear()
    y = F.gelu(first(x))
    expected = y.detach().sum(0).expand(WIDTH, WIDTH)
    out = second(y)
    with torch.no_grad():
        y.mul_(2)
    same(list(torch.autograd.grad(out.sum(), [second.weight])), [expected])


def test_write_to_what_it_is_made_from(x: Tensor) -> None:
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
    same([found], [y.detach().sum(0).expand(WIDTH, WIDTH)])


def test_hooks_that_count_change_nothing(model: nn.Module, x: Tensor) -> None:
    expected = gradients(model, x)
    seen: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        same(gradients(model, x), expected)
    assert seen


def test_hooks_that_take_the_tensors_away(model: nn.Module, x: Tensor) -> None:
    expected = gradients(model, x)
    with save_on_cpu():
        same(gradients(model, x), expected)
    with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        same(gradients(model, x), expected)


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
        same([at.grad, *[p.grad for p in other.parameters()]], expected)  # type: ignore[list-item]
    else:
        same(gradients(Checkpointed(), x), expected)


def test_checkpoint_that_begins_after_a_cheap_layer(x: Tensor) -> None:
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

    same(gradients(Checkpointed(), x), expected)


def test_transforms_and_forward_mode(model: nn.Module, x: Tensor) -> None:
    parameters: dict[str, Any] = dict(model.named_parameters())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.training:
            module.running_mean = module.running_var = module.num_batches_tracked = (
                None  # a transform may not write
            )

    def loss(values: dict[str, Any]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    torch.manual_seed(2)
    expected = list(torch.autograd.grad(loss(parameters), list(parameters.values())))
    torch.manual_seed(2)
    same(list(torch.func.grad(loss)(parameters).values()), expected)
    torch.manual_seed(2)
    directions = {name: torch.ones_like(value) for name, value in parameters.items()}
    along = torch.func.jvp(loss, (parameters,), (directions,))[1]
    torch.testing.assert_close(along, sum(g.sum() for g in expected))


def test_no_leak(x: Tensor) -> None:
    """Nothing outlives the backward, though the loss be held."""
    model = chain(nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(WIDTH))
    loss = run(model, x).square().sum()
    node, waiting, recipes = None, [loss.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is not None:
            recipes.append(getattr(node, "recipe", None))
            waiting += [before for before, _ in node.next_functions]
    named = [part for recipe in recipes if recipe for part in recipe.parts if isinstance(part, recomputation.Kept)]
    assert any(part.tensor() is not None for part in named)
    parameters = {id(parameter) for parameter in model.parameters()}
    loss.backward()
    assert all(part.tensor() is None or id(part.tensor()) in parameters for part in named)


@pytest.mark.parametrize("shape", [(8,), (7,), (3, 5), (2, 3, 5, 7), (0,), (1,)])
def test_bits(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    packed = recomputation.in_bits(mask)
    assert packed is not None
    assert packed[0].numel() == bits(mask.numel())
    assert torch.equal(recomputation.from_bits(*packed), mask)


def test_bits_lie_as_the_mask_does() -> None:
    mask = (torch.rand(2, 3, 5, 5) > 0.5).contiguous(memory_format=torch.channels_last)
    packed = recomputation.in_bits(mask)
    assert packed is not None
    again = recomputation.from_bits(*packed)
    assert torch.equal(again, mask)
    assert again.stride() == mask.stride()
    assert recomputation.in_bits(mask[:, ::2]) is None


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
def test_laws_where_nothing_is_small(law: str, op: Op, number: int, device: str) -> None:
    """What the samples are too small for: bits, offsets, recipes."""
    verify_op(op, number, device, law).raise_if_failed()


# --- in place ---

SIDE = 16
ACTIVATIONS: dict[str, Callable[[bool], torch.nn.Module]] = {
    "relu": lambda inplace: torch.nn.ReLU(inplace),
    "leaky relu": lambda inplace: torch.nn.LeakyReLU(0.1, inplace),
    "elu": lambda inplace: torch.nn.ELU(0.7, inplace),
    "celu": lambda inplace: torch.nn.CELU(0.7, inplace),
    "selu": lambda inplace: torch.nn.SELU(inplace),
    "relu6": lambda inplace: torch.nn.ReLU6(inplace),
    "hardtanh": lambda inplace: torch.nn.Hardtanh(-0.5, 0.7, inplace),
    "threshold": lambda inplace: torch.nn.Threshold(0.1, 7.0, inplace),
    "rrelu": lambda inplace: torch.nn.RReLU(inplace=inplace),
    "rrelu after training": lambda inplace: torch.nn.RReLU(inplace=inplace).eval(),
    "silu": lambda inplace: torch.nn.SiLU(inplace),
    "mish": lambda inplace: torch.nn.Mish(inplace),
    "hardswish": lambda inplace: torch.nn.Hardswish(inplace),
    "hardsigmoid": lambda inplace: torch.nn.Hardsigmoid(inplace),
    "dropout": lambda inplace: torch.nn.Dropout(0.3, inplace),
    "dropout2d": lambda inplace: torch.nn.Dropout2d(0.3, inplace),
    "alpha dropout": lambda inplace: torch.nn.AlphaDropout(0.3, inplace),
    "feature alpha dropout": lambda inplace: torch.nn.FeatureAlphaDropout(0.3, inplace),
}


class Doubled(torch.nn.Module):
    """A residual connection."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.detach()


BEFORE: dict[str, Callable[[], torch.nn.Module]] = {
    "nothing": torch.nn.Identity,
    "batch norm": lambda: torch.nn.BatchNorm2d(4),
    "batch norm after training": lambda: torch.nn.BatchNorm2d(4).eval(),
    "group norm": lambda: torch.nn.GroupNorm(2, 4),
    "instance norm": lambda: torch.nn.InstanceNorm2d(4, affine=True),
    "layer norm": lambda: torch.nn.LayerNorm(SIDE),
    "sum": lambda: torch.nn.Sequential(torch.nn.BatchNorm2d(4), Doubled()),
    "gelu": torch.nn.GELU,
}
AFTER = {"convolution": lambda: torch.nn.Conv2d(4, 2, 1), "linear": lambda: torch.nn.Linear(SIDE, 2)}


def network(before: str, activation: str, after: str, inplace: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 4, 1), BEFORE[before](), ACTIVATIONS[activation](inplace), AFTER[after]()]
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_place_keeps_no_more(activation: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than torch in place, nor than ours not in place; and the gradients are torch's."""
    monkeypatch.setattr(recomputation, "SMALL", 2**40 if small else 0)
    x = torch.randn(2, 2, SIDE, SIDE)
    for before in BEFORE:
        for after in AFTER:
            theirs = network(before, activation, after, inplace=True)
            ours = convert(copy.deepcopy(theirs))
            kept = kept_bytes(ours, x)
            assert kept <= kept_bytes(theirs, x), (before, after)
            assert kept <= kept_bytes(convert(network(before, activation, after, inplace=False)), x), (
                before,
                after,
            )
            if after == "linear":
                continue
            found, expected = [
                torch.autograd.grad(run(model, x).sin().sum(), list(model.parameters()))
                for model in (ours, theirs)
            ]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "leaky relu"])
def test_in_place_before_a_pool(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool saves nothing of its input, so a bit mask is enough."""
    monkeypatch.setattr(recomputation, "SMALL", 0)
    x = torch.randn(2, 2, SIDE, SIDE)

    def network(inplace: bool) -> torch.nn.Module:
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(2, 4, 1), ACTIVATIONS[activation](inplace), torch.nn.MaxPool2d(2)]
        return torch.nn.Sequential(*layers, torch.nn.Conv2d(4, 2, 1))

    theirs, out_of_place = network(True), convert(network(False))
    ours = convert(convert(copy.deepcopy(theirs)))
    assert kept_bytes(ours, x) == kept_bytes(out_of_place, x) < kept_bytes(theirs, x) / 2
    found, expected = [
        torch.autograd.grad(run(model, x).sin().sum(), list(model.parameters())) for model in (ours, theirs)
    ]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    kinds = [type(layer) for layer in ours.children()]
    assert [type(layer) for layer in pickle.loads(pickle.dumps(ours)).children()] == kinds
    assert [type(layer) for layer in revert(ours).children()] == [type(layer) for layer in theirs.children()]


def test_in_place_in_halves_and_channels_last() -> None:
    x = torch.randn(2, 2, SIDE, SIDE).bfloat16().contiguous(memory_format=torch.channels_last)
    for activation in ACTIVATIONS:
        theirs = network("batch norm", activation, "convolution", inplace=True).bfloat16()
        assert kept_bytes(convert(copy.deepcopy(theirs)), x) <= kept_bytes(theirs, x), activation


@pytest.mark.parametrize("name", ["sigmoid_", "tanh_", "relu_"])
def test_methods_that_write_keep_their_output_alone(name: str) -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with override_torch_functions():
        assert kept_bytes(lambda: getattr(x * 2, name)().square()) == x.nbytes  # shared by both
        (found,) = torch.autograd.grad(getattr(x * 2, name)().sin().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(getattr(x * 2, name)().sin().sum(), x)[0])


def written_into(torchs: bool, activation: str, part: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """The activation, in place, of a part of something; first and second derivative, or torch's error."""
    whole = x * 1
    try:
        torch.manual_seed(0)
        module = ACTIVATIONS[activation](True)
        at = part(x if part is itself else whole)
        output = module(at) if torchs else convert(module)(at)
        (first,) = torch.autograd.grad(whole.sin().sum() + output.cos().sum(), x, create_graph=True)
        return output is at, output.detach().clone(), first, *torch.autograd.grad(first.square().sum(), x)
    except RuntimeError as error:
        return str(error)


def itself(x: Tensor) -> Tensor:
    return x


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all of it": lambda x: x.view_as(x),
    "some rows": lambda x: x[1:3],
    "flat": lambda x: x.flatten(1).unflatten(1, x.shape[1:]),
    "transposed": lambda x: x.transpose(1, 2),
    "one of several": lambda x: x.chunk(2)[0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "made without a graph": torch.no_grad()(lambda x: x[1:3]),
    "a leaf": itself,
}


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_in_place_on_a_part(part: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest sees what was written; what torch refuses is refused with its words, and nothing is written."""
    monkeypatch.setattr(recomputation, "SMALL", 2**40 if small else 0)
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    unchanged = x.detach().clone()
    for activation in ACTIVATIONS:
        if activation == "hardsigmoid":  # torch has no second derivative
            continue
        found, expected = (written_into(torchs, activation, PARTS[part], x) for torchs in (False, True))
        if isinstance(expected, str):
            assert found == expected, activation
        else:
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(x.detach(), unchanged, rtol=0, atol=0)


def test_what_is_written_afterwards_is_refused_as_by_torch() -> None:
    """Whose gradient is told from the output cannot have that changed; whose gradient is not, can."""
    for activation, make in ACTIVATIONS.items():
        found = []
        for model in (make(True), convert(make(True))):
            x = torch.randn(4, 2, 3, 3, requires_grad=True)
            output = model(x * 1).add_(1)
            try:
                output.sum().backward()
                found.append("computed")
            except RuntimeError as error:
                found.append("refused" if "modified by an inplace operation" in str(error) else str(error))
        if not activation.startswith("rrelu"):  # keeps its slopes alone while training
            assert found[0] == found[1], activation


def test_slopes_for_which_the_output_does_not_tell_the_input() -> None:
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    calls: list[Callable[..., Tensor]] = [
        lambda functional, x, inplace: functional.leaky_relu(x, -0.5, inplace),
        lambda functional, x, inplace: functional.elu(x, -0.5, inplace),
        lambda functional, x, inplace: functional.celu(x, -0.5, inplace),
        lambda functional, x, inplace: functional.threshold(x, 0.1, 7.0, inplace),
    ]
    for call in calls:  # some of which torch does not differentiate in place
        (expected,) = torch.autograd.grad(call(torch.nn.functional, x * 1, False).sin().sum(), x)
        for inplace in (False, True):
            (found,) = torch.autograd.grad(call(F, x * 1, inplace).sin().sum(), x)
            torch.testing.assert_close(found, expected)


def test_every_output_may_be_written_over(op: Op, number: int) -> None:
    """A view that a custom Function has made may not: no rule returns one."""
    args, kwargs = list(op.sample_inputs(TensorFactory()))[number].marked()
    output = op.function(*args, **kwargs)
    for tensor in output if isinstance(output, tuple) else (output,):
        if isinstance(tensor, Tensor) and not tensor.is_leaf:
            tensor.mul_(2)
