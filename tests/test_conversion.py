"""convert, revert, override_torch_functions: classes and called functions change, nothing else."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph import foreign, nodes
from test_pytorchs_inputs import DTYPE, FunctionInput, compare, op_db, tried
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import manualgrad
from manualgrad import adapters, conversion, convert, override_torch_functions, revert
from manualgrad.override import find_override


class Mine(nn.Linear):
    """Overrides nothing."""


class Meta(type):
    """A user's metaclass."""


class Strict(nn.Linear, metaclass=Meta):
    """With a constructor of its own, a slot, and a word about subclasses."""

    __slots__ = ("extra",)

    def __init_subclass__(cls, *, needed: int) -> None:
        raise AssertionError("no subclass has been asked for")

    def __init__(self, features: int) -> None:
        super().__init__(features, features, bias=False, dtype=DTYPE)
        self.extra = "extra"


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Network(nn.Module):
    """A bit of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Mine(4, 4), Strict(4), Doubled(4, 4), nn.Identity())
        self.twice = self.first[0]
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True, activation=F.gelu)
        self.parametrized = parametrizations.weight_norm(nn.Linear(4, 4))
        self.hooked = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.listed = nn.ModuleList([nn.LayerNorm(4)])
        self.listed[0].weight = self.listed[0].bias  # tied
        self.to(DTYPE)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.twice(self.hooked(self.parametrized(self.attention(self.first(input)))))
        hidden = checkpoint(self.listed[0], self.lstm(hidden)[0], use_reentrant=False)
        return F.gelu(hidden.relu() @ hidden.mT.softmax(-1))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def step(model: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The output and all gradients, for equal random numbers."""
    torch.manual_seed(1)
    model.zero_grad()
    output = model(torch.randn(2, 3, 4, dtype=DTYPE))
    (output**2).sum().backward()
    return output.detach(), [parameter.grad for parameter in model.parameters()]


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# --- convert and revert ---


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_converted_model_computes_the_same_and_is_given_back(functional: bool) -> None:
    model: Any = network()
    before, modules, state = kinds(model), list(model.modules()), list(model.state_dict())
    held = [dict(vars(module)) for module in modules]
    expected = step(copy.deepcopy(model))
    assert convert(model, functional=functional) is model
    assert list(model.modules()) == modules
    assert list(model.state_dict()) == state
    assert [kind.__name__ for kind in kinds(model)] == [kind.__name__ for kind in before]
    assert all(
        issubclass(kind, was) for kind, was in zip(kinds(model), before, strict=True) if "P" not in kind.__name__
    )
    converted = kinds(model)
    convert(model, functional=functional)
    assert kinds(model) == converted
    assert_close(step(copy.deepcopy(model)), expected)
    assert revert(model) is model
    assert kinds(model) == before
    assert [dict(vars(module)) for module in modules] == held
    assert_close(step(model), expected, rtol=0, atol=0)


def test_what_is_left_to_torch() -> None:
    inner = {"MvBackward0", "DotBackward0", "VdotBackward0", "WeightNormInterfaceBackward0"}  # of the two norms
    x = torch.randn(2, 3, 4, dtype=DTYPE)
    assert {"AddmmBackward0", "ReluBackward0", "GeluBackward0"} <= foreign(convert(network())(x))
    assert foreign(convert(network(), functional=True)(x)) <= {"MmBackward0", "BmmBackward0"} | inner


def test_report() -> None:
    model = convert(network())
    rows = {row.name: row for row in manualgrad.conversion_report(model).rows}
    assert list(rows) == [name for name, _ in model.named_modules()]
    assert rows["first.0"].converted
    assert rows["first.2"].converted
    assert rows["parametrized"].converted
    assert not rows["first.4"].converted
    assert "overrides forward of Linear" in rows["first.4"].note
    assert "functional=True" in rows[""].note
    assert "calls nothing" in rows["first.5"].note
    table = str(manualgrad.conversion_report(convert(model, functional=True)))
    assert "converted     1 Network" in table
    assert "(first, ...)" in table or "(first)" in table
    fresh = manualgrad.conversion_report(nn.Linear(2, 2)).rows
    assert fresh == (("", "Linear", False, "can be converted"),)


def test_compiled_by_torchscript_or_with_a_forward_of_the_instance() -> None:
    with pytest.warns((DeprecationWarning, FutureWarning), match="jit"):  # which of them depends on torch
        scripted = torch.jit.script(nn.Linear(2, 2))
    wrapped = nn.Linear(2, 2)
    wrapped.forward = wrapped.forward  # as accelerate's hooks do
    model = nn.Sequential(scripted, wrapped)
    before = kinds(model)
    assert kinds(convert(model, functional=True)) == before
    assert [row.note for row in manualgrad.conversion_report(model).rows[1:]] == [
        "was compiled by TorchScript",
        "has a forward set on the module itself",
    ]


def test_the_model_itself_may_be_a_layer_or_a_loss() -> None:
    for module in (nn.Linear(2, 2), nn.CrossEntropyLoss(), nn.Sequential(), nn.Identity()):
        assert isinstance(convert(module), type(module))
    assert type(convert(nn.Linear(2, 2))) is manualgrad.nn.Linear
    for function in (convert, revert, manualgrad.conversion_report):
        with pytest.raises(TypeError, match="a str"):
            function("model")  # pyright: ignore[reportArgumentType]


def test_a_subclass_keeps_its_name_and_place() -> None:
    model = convert(nn.Sequential(Mine(2, 2), Strict(2)))
    for kind, was in zip(kinds(model)[1:], (Mine, Strict), strict=True):
        assert issubclass(kind, was)
        assert issubclass(kind, manualgrad.nn.Linear)
        assert (kind.__name__, kind.__qualname__, kind.__module__) == (
            was.__name__,
            was.__qualname__,
            was.__module__,
        )
    assert isinstance(type(model[1]), Meta)
    assert model[1].extra == "extra"


@pytest.mark.parametrize("functional", [False, True])
def test_copies_and_pickles(functional: bool) -> None:
    model = convert(nn.Sequential(Mine(4, 4), Doubled(4, 4), Strict(4), nn.LSTM(4, 4)), functional=functional)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (
        copy.deepcopy(model),
        *(pickle.loads(pickle.dumps(model, protocol)) for protocol in (2, pickle.HIGHEST_PROTOCOL)),
        pickle.loads(pickle._dumps(model)),  # pyright: ignore[reportAttributeAccessIssue]
        torch.load(stored, weights_only=False),
    ):
        assert kinds(other) == kinds(model)
        assert_close(other.state_dict(), model.state_dict())
        assert kinds(revert(other))[1:] == [Mine, Doubled, Strict, nn.LSTM]


def test_optimizers_and_hooks_stay() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    before = model[0].weight.detach().clone()
    convert(model)(torch.randn(3, 4, requires_grad=True)).sum().backward()
    optimizer.step()
    assert seen == ["forward", "backward"]
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("first", [False, True])
def test_lazy_modules(first: bool) -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    x = torch.randn(5, 4)
    if first:
        model(x)
    convert(model)
    model(x)
    assert kinds(model)[1:] == [manualgrad.nn.Linear, manualgrad.nn.BatchNorm1d]
    assert kinds(revert(model))[1:] == [nn.Linear, nn.BatchNorm1d]


def test_parametrizations_come_and_go() -> None:
    layer = convert(parametrizations.weight_norm(nn.Linear(3, 3)))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is manualgrad.nn.Linear
    parametrizations.orthogonal(layer)
    assert type(revert(layer)).__mro__[1] is nn.Linear
    parametrize.remove_parametrizations(convert(layer), "weight")
    assert type(revert(layer)) is nn.Linear


def test_a_wrapped_model() -> None:
    model: Any = convert(nn.DataParallel(network()), functional=True)
    assert_close(step(model), step(network()))
    replica = model.module._replicate_for_data_parallel()
    assert type(replica) is type(model.module)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = Inner(), reentrant

    def forward(self, input: Tensor) -> Tensor:
        return checkpoint(self.block, input, use_reentrant=self.reentrant)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4, dtype=DTYPE))

    def forward(self, input: Tensor) -> Tensor:
        return F.selu(F.layer_norm(F.linear(input, self.weight), (4,))).tanh()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_with_ours(reentrant: bool) -> None:
    """Ours keeps selu's input and torch its output: were it recomputed by torch's, the gradient would be wrong."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=DTYPE), Checkpointed(reentrant))
    expected = step(copy.deepcopy(model))
    assert_close(step(convert(model, functional=True)), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Mine(4, 4), Inner(), Doubled(4, 4)).to(DTYPE)

    expected = step(model())
    found = torch.compile(convert(model(), functional=True), fullgraph=True, backend=backend)
    assert_close(step(found), expected)
    with override_torch_functions():
        assert_close(step(torch.compile(model(), fullgraph=True, backend=backend)), expected)


def test_converted_when_already_compiled() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 4)
    compiled(x)
    convert(model)
    assert "ReLUFunctionBackward" in nodes(compiled(x))
    revert(model)
    assert "ReluBackward0" in nodes(compiled(x))


def test_conversion_in_several_threads() -> None:
    found: list[type] = []

    class Local(nn.Linear):
        pass

    def run() -> None:
        start.wait()
        found.append(type(convert(Local(2, 2))))

    start = threading.Barrier(8)
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


# --- override_torch_functions ---


def _names(info: Any) -> list[tuple[str, Callable[..., Any]]]:
    """By what a user calls an operation: a function, a method, a method that writes over its input."""
    found = [("function", info.op), ("method", info.method_variant)]
    if (inplace := info.inplace_variant) is not None:
        found.append(("in place", lambda input, *args, **kwargs: inplace(input.clone(), *args, **kwargs)))
    return [(kind, function) for kind, function in found if function is not None]


OURS = {name for space in (manualgrad.registry.ops(), vars(manualgrad.nn.functional)) for name in space} | {
    "abs",
    "pow",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "info",
    [
        pytest.param(info, id="-".join(filter(None, (info.name, info.variant_test_name))))
        for info in op_db
        if DTYPE in info.supported_dtypes("cpu") and info.name.rpartition(".")[2] in OURS
    ],
)
def test_every_name_that_torch_has_for_ours(info: Any) -> None:
    for _, function in _names(info):
        for sample in info.sample_inputs("cpu", DTYPE, requires_grad=True):
            arguments = FunctionInput(sample.input, *sample.args, **sample.kwargs)
            try:
                expected = tried(function, arguments)
            except RuntimeError:  # a sample that cannot be written in place
                continue
            with override_torch_functions():
                found = tried(function, arguments)
            compare(found, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.relu(x),
        lambda x: torch.relu(x),
        lambda x: x.relu(),
        lambda x: x.clone().relu_(),
        lambda x: F.relu(x.clone(), inplace=True),
        lambda x: x.softmax(-1),
        lambda x: torch.softmax(x, dim=1),
        lambda x: torch.softmax(input=x, dim=1),
        lambda x: torch.special.log_softmax(x, -1, dtype=torch.float64),
        lambda x: x.sigmoid(),
        lambda x: x.clone().tanh_(),
        lambda x: torch.layer_norm(x, (4,), None, None, 1e-5, False),
        lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        lambda x: F.max_pool1d(x, 2, return_indices=True)[0],
        lambda x: torch.bmm(x[None], x.mT[None]),
        lambda x: torch.embedding(x, indices=torch.tensor([0, 2])),
        lambda x: x.abs(),
        lambda x: F.mse_loss(x, x.detach()),
    ],
)
def test_led_to_ours(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True)
    with override_torch_functions():
        found = call(x)
    assert any(name.endswith("FunctionBackward") for name in nodes(found))
    assert not foreign(found)
    assert_close(found, call(x))
    assert foreign(call(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.pow(x.detach().abs()),  # another overload
        lambda x: torch.pow(2.0, x),
        lambda x: x.detach().relu(),
        lambda x: torch.tanh(x.detach(), out=torch.empty_like(x)),
        lambda x: x.detach().int().relu(),
        lambda x: x.detach().to_sparse().relu(),
        lambda x: torch.relu(x.to("meta")),
        lambda x: torch.relu(torch.quantize_per_tensor(x.detach().float(), 0.1, 0, torch.qint8)).dequantize(),
        lambda x: torch.nested.nested_tensor([x.detach()], layout=torch.jagged, requires_grad=True).relu().sum(),
        lambda x: x.unfold(0, 2, 1),  # not F.unfold
        lambda x: x.detach().char().abs(),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*deprecated:DeprecationWarning")
def test_left_to_torch(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True)
    with override_torch_functions():
        found = call(x)
    assert not any(name.endswith("FunctionBackward") for name in nodes(found))
    if not found.is_meta:
        assert_close(found, call(x), equal_nan=True)


class Tagged(Tensor):
    """A subclass that looks at functions itself."""

    seen: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_of_tensor_is_asked() -> None:
    x = torch.randn(3).as_subclass(Tagged).requires_grad_()
    with override_torch_functions():
        assert type(F.gelu(x)) is Tagged
    assert F.gelu in Tagged.seen


def test_a_gradient_is_not_needed() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert find_override(F.relu, (), (x,), {}) is not None
    with torch.no_grad():
        assert find_override(F.relu, (), (x,), {}) is None
    assert find_override(F.relu, (), (x.detach(),), {}) is None
    assert find_override(torch.add, (), (x, x), {}) is None


def test_nested_left_by_an_error_and_as_a_decorator() -> None:
    x = torch.randn(3, requires_grad=True)

    @override_torch_functions()
    def function(x: Tensor) -> Tensor:
        with override_torch_functions():
            inner = F.relu(x)
        return F.relu(inner)

    assert nodes(function(x)) == {"ReLUFunctionBackward", "AccumulateGrad"}
    assert nodes(function(x)) == {"ReLUFunctionBackward", "AccumulateGrad"}
    with pytest.raises(ZeroDivisionError), override_torch_functions():
        raise ZeroDivisionError
    assert nodes(F.relu(x)) == {"ReluBackward0", "AccumulateGrad"}


@pytest.mark.parametrize("exponent", [0, 1, 2, 0.5, -1])
def test_powers_at_zero(exponent: float) -> None:
    x = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    (expected,) = torch.autograd.grad(x.pow(exponent).sum(), x)
    with override_torch_functions():
        output = x.pow(exponent)
    assert nodes(output) == {"PowerFunctionBackward", "AccumulateGrad"}
    assert_close(torch.autograd.grad(output.sum(), x)[0], expected)


def test_only_in_its_own_thread() -> None:
    x = torch.randn(3, requires_grad=True)
    found: list[set[str]] = []
    with override_torch_functions():
        thread = threading.Thread(target=lambda: found.append(nodes(F.relu(x))))
        thread.start()
        thread.join()
    assert found == [{"ReluBackward0", "AccumulateGrad"}]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.linear(x, torch.randn(2, 5, dtype=x.dtype)),
        lambda x: x.softmax(7),
        lambda x: F.gelu(x, approximate="no"),
        lambda x: F.relu(x, nonsense=1),  # pyright: ignore[reportCallIssue]
        lambda x: x.relu_(),  # a leaf
        lambda x: F.cross_entropy(x, torch.tensor([1, 2, 9])),
    ],
)
def test_torchs_own_errors(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call(x)
    with pytest.raises(type(expected.value)) as found, override_torch_functions():
        call(x)
    assert str(found.value) == str(expected.value)


def test_transforms_forward_mode_and_second_derivatives() -> None:
    def function(x: Tensor) -> Tensor:
        return F.layer_norm(torch.tanh(x).softmax(-1), (4,)).pow(3).sum()

    x, v = torch.randn(2, 3, 4, dtype=DTYPE)
    for transformed in (
        lambda: torch.func.grad(function)(x),
        lambda: torch.func.vmap(torch.func.grad(function))(x),
        lambda: torch.func.jvp(function, (x,), (v,))[1],
        lambda: torch.func.hessian(function)(x),
        lambda: torch.autograd.functional.hvp(function, x, v)[1],
    ):
        expected = transformed()
        with override_torch_functions():
            assert_close(transformed(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 8, 8, requires_grad=True)
    results = []
    for context in (override_torch_functions(), nullcontext()):
        with context, torch.autocast("cpu", dtype=dtype):
            output = F.layer_norm(F.linear(x, w).softmax(-1), (8,))
        results.append((output, torch.autograd.grad(output.float().pow(3).sum(), x)[0]))
    assert results[0][0].dtype == results[1][0].dtype
    assert_close(*results, rtol=0.05, atol=0.05)


def test_backward_inside() -> None:
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True)
    with override_torch_functions():
        (g,) = torch.autograd.grad(x.sigmoid().pow(2).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), x)
    (g0,) = torch.autograd.grad(x.sigmoid().pow(2).sum(), x, create_graph=True)
    assert_close(h, torch.autograd.grad(g0.sum(), x)[0])


# --- all or nothing ---


class Final(type):
    """A metaclass whose classes have no subclasses."""

    def __new__(cls, name: str, bases: tuple[type, ...], contents: dict[str, Any]) -> Any:
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("final")
        return super().__new__(cls, name, bases, contents)


class FinalLinear(nn.Linear, metaclass=Final):
    pass


class Disguised(nn.Linear):
    """Cannot be given another class."""

    __class__ = property(lambda self: Disguised)  # type: ignore[assignment]


class Stubborn(nn.Linear):
    """With a __setattr__ that refuses."""

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("_parameters", {}).keys() == {"weight", "bias"}:
            raise RuntimeError("nothing may be set")
        super().__setattr__(name, value)


def everything(model: nn.Module) -> list[Any]:
    return [(type(module), dict(vars(module))) for module in model.modules()]


@pytest.mark.parametrize("bad", [FinalLinear, Disguised])
@pytest.mark.parametrize("functional", [False, True])
def test_convert_changes_all_or_nothing(bad: type[nn.Module], functional: bool) -> None:
    first = nn.TransformerEncoderLayer(4, 2, 8, activation=F.gelu)
    model = nn.Sequential(first, nn.Linear(2, 2), bad(2, 2), nn.ReLU())
    before = everything(model)
    with pytest.raises((TypeError, AttributeError)) as caught:
        convert(model, functional=functional)
    assert f"at 2 ({bad.__name__}): the model is unchanged" in str(caught.value.__notes__)
    assert everything(model) == before


def test_an_odd_setattr_does_not_matter() -> None:
    model = nn.Sequential(Stubborn(2, 2), nn.ReLU())
    before = everything(model)
    assert issubclass(type(convert(model)[0]), manualgrad.nn.Linear)
    assert everything(revert(model)) == before


@pytest.mark.parametrize("function", [convert, revert])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_stopped_midway(function: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.TransformerDecoderLayer(4, 2, 8, activation=F.gelu), nn.ReLU())
    if function is revert:
        convert(model)
    before, given, set_class = everything(model), [], conversion._set_class

    def stops(module: nn.Module, kind: type) -> None:
        given.append(module)
        set_class(module, kind)
        if len(given) == 5:
            raise error

    monkeypatch.setattr(conversion, "_set_class", stops)
    with pytest.raises(error):
        function(model)
    assert everything(model) == before


def test_an_adapter_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input.relu()

    monkeypatch.setattr(adapters, "_adapters", [])
    model = nn.Sequential(nn.Linear(2, 2), Odd())
    before = everything(model)
    for error in (KeyboardInterrupt(), torch.OutOfMemoryError()):

        @manualgrad.register_adapter("Odd")
        def adapter(module: Any, input: Tensor, error: BaseException = error) -> Tensor:
            raise error

        with pytest.raises(type(error)):
            convert(model)
        assert everything(model) == before
