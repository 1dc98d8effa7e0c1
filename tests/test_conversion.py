"""`convert` and `revert` change the classes of modules and the functions that they hold, and nothing else."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph import nodes, torch_derivatives
from test_pytorchs_inputs import DTYPE
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import manualgrad
from manualgrad import adapters, conversion, convert, override_torch_functions, revert


class Subclass(nn.Linear):
    """Overrides nothing."""


class Meta(type):
    """A metaclass."""


class Strict(nn.Linear, metaclass=Meta):
    """Has a constructor, a slot and a hook that refuses subclasses."""

    __slots__ = ("extra",)

    def __init_subclass__(cls, *, needed: int) -> None:
        raise AssertionError("a subclass was made")

    def __init__(self, features: int) -> None:
        super().__init__(features, features, bias=False, dtype=DTYPE)
        self.extra = "extra"


class Doubled(nn.Linear):
    """Overrides forward."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Network(nn.Module):
    """Layers, subclasses, tied weights, parametrizations, hooks, functions in attributes."""

    def __init__(self) -> None:
        super().__init__()
        subclasses = (Subclass(4, 4), Strict(4), Doubled(4, 4))
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), *subclasses, nn.Identity())
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


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# --- convert and revert ---


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_convert_and_revert(functional: bool) -> None:
    model: Any = network()
    before, modules, state = classes(model), list(model.modules()), list(model.state_dict())
    attributes = [dict(vars(module)) for module in modules]
    expected = step(copy.deepcopy(model))
    assert convert(model, functional=functional) is model
    assert list(model.modules()) == modules
    assert list(model.state_dict()) == state
    assert [cls.__name__ for cls in classes(model)] == [cls.__name__ for cls in before]
    for cls, original in zip(classes(model), before, strict=True):
        assert issubclass(cls, original) or "Parametrized" in cls.__name__
    converted = classes(model)
    convert(model, functional=functional)
    assert classes(model) == converted
    assert_close(step(copy.deepcopy(model)), expected)
    assert revert(model) is model
    assert classes(model) == before
    assert [dict(vars(module)) for module in modules] == attributes
    assert_close(step(model), expected, rtol=0, atol=0)


def test_derivatives_that_stay_torchs() -> None:
    of_norms = {"MvBackward0", "DotBackward0", "VdotBackward0", "WeightNormInterfaceBackward0"}
    x = torch.randn(2, 3, 4, dtype=DTYPE)
    assert {"AddmmBackward0", "ReluBackward0", "GeluBackward0"} <= torch_derivatives(convert(network())(x))
    assert torch_derivatives(convert(network(), functional=True)(x)) <= {"MmBackward0", "BmmBackward0"} | of_norms


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
    rows_before = manualgrad.conversion_report(nn.Linear(2, 2)).rows
    assert rows_before == (("", "Linear", False, "can be converted"),)


def test_scripted_modules_and_forwards_set_on_a_module() -> None:
    with pytest.warns((DeprecationWarning, FutureWarning), match="jit"):  # depends on the version
        scripted = torch.jit.script(nn.Linear(2, 2))
    wrapped = nn.Linear(2, 2)
    wrapped.forward = wrapped.forward  # as accelerate does
    model = nn.Sequential(scripted, wrapped)
    before = classes(model)
    assert classes(convert(model, functional=True)) == before
    assert [row.note for row in manualgrad.conversion_report(model).rows[1:]] == [
        "was compiled by TorchScript",
        "has a forward set on the module itself",
    ]


def test_a_single_layer_or_loss() -> None:
    for module in (nn.Linear(2, 2), nn.CrossEntropyLoss(), nn.Sequential(), nn.Identity()):
        assert isinstance(convert(module), type(module))
    assert type(convert(nn.Linear(2, 2))) is manualgrad.nn.Linear
    for function in (convert, revert, manualgrad.conversion_report):
        with pytest.raises(TypeError, match="a str"):
            function("model")  # pyright: ignore[reportArgumentType]


def test_a_converted_subclass_keeps_its_names() -> None:
    model = convert(nn.Sequential(Subclass(2, 2), Strict(2)))
    for cls, original in zip(classes(model)[1:], (Subclass, Strict), strict=True):
        assert issubclass(cls, original)
        assert issubclass(cls, manualgrad.nn.Linear)
        for name in ("__name__", "__qualname__", "__module__"):
            assert getattr(cls, name) == getattr(original, name)
    assert isinstance(type(model[1]), Meta)
    assert model[1].extra == "extra"


@pytest.mark.parametrize("functional", [False, True])
def test_copies_and_pickles(functional: bool) -> None:
    model = convert(nn.Sequential(Subclass(4, 4), Doubled(4, 4), Strict(4), nn.LSTM(4, 4)), functional=functional)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        *(pickle.loads(pickle.dumps(model, protocol)) for protocol in (2, pickle.HIGHEST_PROTOCOL)),
        pickle.loads(pickle._dumps(model)),  # pyright: ignore[reportAttributeAccessIssue]
        torch.load(file, weights_only=False),
    ):
        assert classes(other) == classes(model)
        assert_close(other.state_dict(), model.state_dict())
        assert classes(revert(other))[1:] == [Subclass, Doubled, Strict, nn.LSTM]


def test_optimizers_and_hooks_keep_working() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called: list[str] = []
    model[0].register_forward_hook(lambda *_: called.append("forward"))
    model[0].register_full_backward_hook(lambda *_: called.append("backward"))
    before = model[0].weight.detach().clone()
    convert(model)(torch.randn(3, 4, requires_grad=True)).sum().backward()
    optimizer.step()
    assert called == ["forward", "backward"]
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("run_first", [False, True])
def test_lazy_modules(run_first: bool) -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    x = torch.randn(5, 4)
    if run_first:
        model(x)
    convert(model)
    model(x)
    assert classes(model)[1:] == [manualgrad.nn.Linear, manualgrad.nn.BatchNorm1d]
    assert classes(revert(model))[1:] == [nn.Linear, nn.BatchNorm1d]


def test_parametrizations_added_and_removed() -> None:
    layer = convert(parametrizations.weight_norm(nn.Linear(3, 3)))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is manualgrad.nn.Linear
    parametrizations.orthogonal(layer)
    assert type(revert(layer)).__mro__[1] is nn.Linear
    parametrize.remove_parametrizations(convert(layer), "weight")
    assert type(revert(layer)) is nn.Linear


def test_data_parallel() -> None:
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
def test_a_checkpoint_recomputes_inside_the_override(reentrant: bool) -> None:
    """manualgrad saves the input of selu, torch the output. Recomputed by torch, the gradient would be wrong."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=DTYPE), Checkpointed(reentrant))
    expected = step(copy.deepcopy(model))
    assert_close(step(convert(model, functional=True)), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Subclass(4, 4), Inner(), Doubled(4, 4)).to(DTYPE)

    expected = step(model())
    found = torch.compile(convert(model(), functional=True), fullgraph=True, backend=backend)
    assert_close(step(found), expected)
    with override_torch_functions():
        assert_close(step(torch.compile(model(), fullgraph=True, backend=backend)), expected)


def test_convert_after_compile() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 4)
    compiled(x)
    convert(model)
    assert "ReLUFunctionBackward" in nodes(compiled(x))
    revert(model)
    assert "ReluBackward0" in nodes(compiled(x))


def test_threads_share_generated_classes() -> None:
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


# --- all or nothing ---


class Final(type):
    """A metaclass of classes that cannot have subclasses."""

    def __new__(cls, name: str, bases: tuple[type, ...], contents: dict[str, Any]) -> Any:
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("final")
        return super().__new__(cls, name, bases, contents)


class FinalLinear(nn.Linear, metaclass=Final):
    pass


class FixedClass(nn.Linear):
    """Its class cannot be set."""

    __class__ = property(lambda self: FixedClass)  # type: ignore[assignment]


class RefusesSetattr(nn.Linear):
    """Has a __setattr__ that raises an error."""

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("_parameters", {}).keys() == {"weight", "bias"}:
            raise RuntimeError("set an attribute")
        super().__setattr__(name, value)


def state_of(model: nn.Module) -> list[Any]:
    return [(type(module), dict(vars(module))) for module in model.modules()]


@pytest.mark.parametrize("bad", [FinalLinear, FixedClass])
@pytest.mark.parametrize("functional", [False, True])
def test_convert_changes_all_or_nothing(bad: type[nn.Module], functional: bool) -> None:
    first = nn.TransformerEncoderLayer(4, 2, 8, activation=F.gelu)
    model = nn.Sequential(first, nn.Linear(2, 2), bad(2, 2), nn.ReLU())
    before = state_of(model)
    with pytest.raises((TypeError, AttributeError)) as caught:
        convert(model, functional=functional)
    assert f"at 2 ({bad.__name__}): the model is unchanged" in str(caught.value.__notes__)
    assert state_of(model) == before


def test_setattr_is_not_called() -> None:
    model = nn.Sequential(RefusesSetattr(2, 2), nn.ReLU())
    before = state_of(model)
    assert issubclass(type(convert(model)[0]), manualgrad.nn.Linear)
    assert state_of(revert(model)) == before


@pytest.mark.parametrize("function", [convert, revert])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_while_classes_are_set(
    function: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.TransformerDecoderLayer(4, 2, 8, activation=F.gelu), nn.ReLU())
    if function is revert:
        convert(model)
    before, done, set_class = state_of(model), [], conversion._set_class

    def interrupted(module: nn.Module, cls: type) -> None:
        done.append(module)
        set_class(module, cls)
        if len(done) == 5:
            raise error

    monkeypatch.setattr(conversion, "_set_class", interrupted)
    with pytest.raises(error):
        function(model)
    assert state_of(model) == before


def test_interrupted_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input.relu()

    monkeypatch.setattr(adapters, "_adapters", [])
    model = nn.Sequential(nn.Linear(2, 2), Odd())
    before = state_of(model)
    for error in (KeyboardInterrupt(), torch.OutOfMemoryError()):

        @manualgrad.register_adapter("Odd")
        def adapter(module: Any, input: Tensor, error: BaseException = error) -> Tensor:
            raise error

        with pytest.raises(type(error)):
            convert(model)
        assert state_of(model) == before
