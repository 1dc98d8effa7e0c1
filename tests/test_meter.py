"""`saved_bytes`: all that autograd saves is counted, for the right layer, without side effects."""

from __future__ import annotations

import gc
import threading
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import checkpoint

import manualgrad.nn
from manualgrad import saved_bytes
from manualgrad.meter import MAX_BARS, TENSORBOARD_MAX_BARS, SavedBytes, _Packed

N = 4 * 8 * 16
"""The bytes of a tensor made by `x`."""


def x(**kwargs: Any) -> Tensor:
    return torch.randn(8, 16, requires_grad=True, **kwargs)


def sizes(report: SavedBytes) -> dict[str, int]:
    return {row.name: row.bytes for row in report.rows}


@pytest.fixture(autouse=True)
def _no_hook_remains() -> Any:
    yield
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert not hooks._global_forward_hooks_always_called


@pytest.mark.parametrize("nn", [torch.nn, manualgrad.nn], ids=["torch", "manualgrad"])
def test_network_layer_by_layer(nn: Any) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh())
    report = saved_bytes(net, x())
    assert [(row.name, row.class_name, row.bytes, row.share) for row in report.rows] == [
        ("1", "ReLU", N, 0.5),  # the second linear layer saves it too
        ("3", "Tanh", N, 0.5),
    ]
    assert report.total == 2 * N
    assert report.inputs == N
    assert report.parameters == 2 * 4 * 16 * 16
    assert report.grand_total == report.total + report.inputs + report.parameters


def test_function_that_calls_modules() -> None:
    net, loss = torch.nn.Sequential(torch.nn.Sigmoid(), torch.nn.Tanh()), torch.nn.MSELoss()
    target = torch.zeros(8, 16)

    def run(a: Tensor) -> Tensor:
        return loss(net(a.exp()), target).log()

    assert sizes(saved_bytes(run, x())) == {
        "": 2 * N,  # the exponential; the logarithm saves a number in the storage of the squares
        "Sequential.0": N,
        "Sequential.1": N,
        "MSELoss": N,  # its target; its input is the tanh
    }
    assert "run" in str(saved_bytes(run, x()))


# --- what is counted ---


def test_freed_tensors_do_not_count() -> None:
    def run(a: Tensor, count: int) -> list[Tensor]:
        for _ in range(5):
            a.exp()  # each reuses the memory of the one before
        return [a.exp() for _ in range(5)][:count]

    for count in (0, 1, 5):
        assert saved_bytes(run, x(), count).total == count * N


def test_nothing_is_saved_after_a_backward() -> None:
    def step(a: Tensor) -> Tensor:
        loss = a.exp().sum()
        loss.backward()
        return loss

    a = x()
    assert saved_bytes(step, a).grand_total == 0
    assert a.grad is not None


def test_a_storage_counts_once_and_whole() -> None:
    a, part, number = x(), torch.randn(100, 8, 16), torch.tensor(2.0)
    assert saved_bytes(lambda: a * part[0] + a * part[1]).total == 100 * N  # the views hold the whole storage
    assert saved_bytes(lambda: a * number.expand(8, 16)).total == 4
    assert saved_bytes(lambda: a * torch.empty(0)[:, None].expand(0, 16).sum()).total == 4
    assert saved_bytes(lambda: x(dtype=torch.complex64).exp()).total == 2 * N


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_components_of_a_sparse_tensor_count() -> None:
    dense = torch.eye(8)
    for matrix, names in (
        (dense.to_sparse(), ("_indices", "_values")),
        (dense.to_sparse_csr(), ("crow_indices", "col_indices", "values")),
        (dense.to_sparse_csc(), ("ccol_indices", "row_indices", "values")),
    ):
        expected = sum(getattr(matrix, name)().untyped_storage().nbytes() for name in names)
        assert saved_bytes(lambda matrix, a: matrix @ a, matrix, x()).inputs == expected
        assert saved_bytes(lambda a, matrix=matrix: matrix @ a, x()).total == expected


def test_inplace_on_a_view() -> None:
    """The graph does not show what torch saves in this case."""

    def run(a: Tensor, b: Tensor) -> Tensor:
        y = a.clone()
        y[1:] *= b.exp()[1:]
        return y

    assert saved_bytes(run, x(), x()).total == N + N * 7 // 8  # exp(b), and seven rows of a


class SavesOnCtx(Function):
    """Holds a tensor as an attribute of ctx."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, wrap: Callable[[Tensor], Any]) -> Tensor:
        ctx.attribute = wrap(a * 2)
        return a * 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@dataclass
class Pair:
    first: Any
    second: Any


def identity(a: Tensor) -> Tensor:
    return a


@pytest.mark.parametrize(
    "wrap",
    [
        identity,
        lambda a: [a, {"b": (a, None, "c")}],
        lambda a: Pair({"a": a}, 3),
        lambda a: UserDict(a=a),
    ],
)
def test_attributes_of_ctx(wrap: Callable[[Tensor], Any]) -> None:
    class Layer(torch.nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return SavesOnCtx.apply(a, wrap)

    net = torch.nn.Sequential(torch.nn.Sigmoid(), Layer(), torch.nn.Tanh())
    assert sizes(saved_bytes(net, x())) == {"0": N, "1": N, "2": N}


def test_outputs_of_any_form() -> None:
    """The graph is found from the output, whatever container the output is."""
    for form in (identity, lambda y: (0, [y]), lambda y: {"a": {"b": y}}, lambda y: Pair(1, y), UserDict):
        wrap: Any = (lambda y: UserDict(y=y)) if form is UserDict else form
        assert saved_bytes(lambda a, wrap=wrap: wrap(SavesOnCtx.apply(a, identity)), x()).total == N


def test_the_graph_of_an_input_does_not_count() -> None:
    before = SavesOnCtx.apply(x().exp(), identity)
    assert saved_bytes(torch.tanh, before).grand_total == N
    assert saved_bytes(lambda: before.tanh()).grand_total == N


def test_meta_device() -> None:
    with torch.device("meta"):
        net, a = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)), x()
    assert sizes(saved_bytes(net, a)) == {"1": 4 * N, "2": 4 * N}


# --- other hooks, checkpointing, compilation ---


def test_hooks_inside() -> None:
    def run(a: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda tensor: (0, tensor.bfloat16()), lambda packed: packed[1].float()):
            a = torch.nn.Sigmoid()(a.exp())
        return a.tanh()

    assert sizes(saved_bytes(run, x())) == {"": N + N // 2, "Sigmoid": N // 2}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    block = torch.nn.Sequential(torch.nn.Sigmoid(), torch.nn.Linear(16, 16), torch.nn.Tanh())

    def run(a: Tensor) -> Tensor:
        y = checkpoint(block, a.exp(), use_reentrant=use_reentrant, preserve_rng_state=False)
        assert isinstance(y, Tensor)
        return y

    report = saved_bytes(run, x())
    assert report.total == N
    assert report.parameters == 0


def test_outer_hooks_stay_active() -> None:
    seen: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append("packed")
        return tensor.bfloat16()

    def unpack(packed: Tensor) -> Tensor:
        seen.append("unpacked")
        return packed.float()

    def run(a: Tensor) -> tuple[Tensor, ...]:
        y = a.exp().tanh()
        return y, *torch.autograd.grad(y.sum(), a, retain_graph=True)

    with saved_tensors_hooks(pack, unpack):
        report = saved_bytes(run, x())
        assert report.total == 2 * N // 2
        assert seen == ["packed"] * 2 + ["unpacked"] * 2
        x().exp()
        assert len(seen) == 5


def test_nested_measurements() -> None:
    found: list[SavedBytes] = []

    def run(a: Tensor) -> Tensor:
        found.append(saved_bytes(torch.nn.Tanh(), a))
        return torch.nn.functional.tanh(a)

    assert saved_bytes(run, x()).total == N
    assert found[0].total == N


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted() -> None:
    net = torch.jit.script(torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Sigmoid()))
    assert saved_bytes(net, x()).total == 2 * N


def test_disabled_hooks() -> None:
    with disable_saved_tensors_hooks("not here"), pytest.raises(RuntimeError, match="not here"):
        saved_bytes(torch.exp, x())
    saved_bytes(torch.exp, x())


def test_torch_func_is_refused() -> None:
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        saved_bytes(torch.func.grad(lambda a: a.exp().sum()), x())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's
@pytest.mark.parametrize("part", ["function", "model", "inplace", "block"])
def test_compiled(part: str) -> None:
    torch.manual_seed(0)
    net: Any = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Tanh()))
    a = x()
    whole = part != "block"
    if part == "function":
        run: Any = torch.compile(lambda a: net(a), backend="aot_eager")
    elif part == "model":
        run = torch.compile(net, backend="aot_eager")
    elif part == "inplace":
        net.compile(backend="aot_eager")
        run = net
    else:
        net[1] = torch.compile(net[1], backend="aot_eager")
        run = net
    expected = torch.autograd.grad(run(a).sum(), a)
    torch._dynamo.utils.counters.clear()
    report = saved_bytes(run, a)
    if whole:
        assert not torch._dynamo.utils.counters["stats"]  # nothing is recompiled
        assert len(report.rows) == 1
    assert report.total == 2 * N
    torch._dynamo.utils.counters.clear()
    assert torch.equal(torch.autograd.grad(run(a).sum(), a)[0], expected[0])
    assert not torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


# --- for which layer ---


def test_layers_that_raise_an_error_end() -> None:
    class Fails(torch.nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            raise LookupError

    class Tries(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails = Fails()

        def forward(self, a: Tensor) -> Tensor:
            try:
                return self.fails(a)
            except LookupError:
                return SavesOnCtx.apply(a.exp(), identity)

    assert sizes(saved_bytes(Tries(), x())) == {"": 2 * N}


def test_a_shared_module_and_one_made_in_forward() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.other = torch.nn.Tanh()

        def forward(self, a: Tensor) -> Tensor:
            return torch.nn.Sigmoid()(self.other(self.one(a)))

    assert sizes(saved_bytes(Net(), x())) == {"one": 2 * N, "Sigmoid": N}


def test_a_method_of_a_model() -> None:
    net = torch.nn.Sequential(torch.nn.Tanh())
    assert sizes(saved_bytes(net.forward, x())) == {"0": N}


@pytest.mark.parametrize("case", ["plain", "inplace on a view", "several outputs", "manualgrad"])
def test_everything_is_freed_afterwards(case: str) -> None:
    """An output that holds the node that holds it would never be freed."""

    def run(a: Tensor) -> Tensor:
        if case == "inplace on a view":
            a = a.clone()
            a[1:].exp_()
            a[0].tanh_()
        elif case == "several outputs":
            a = torch.cat(torch.linalg.qr(a @ a.T))
        elif case == "manualgrad":
            a = manualgrad.nn.functional.softmax(manualgrad.nn.functional.layer_norm(a, (16,)), -1)
        return a.exp().softmax(-1)

    gc.collect()  # objects of earlier tests
    assert saved_bytes(run, x()).total
    assert not any(type(thing) is _Packed for thing in gc.get_objects())


def test_other_threads_are_ignored() -> None:
    class Spawns(torch.nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            thread = threading.Thread(target=torch.nn.Sigmoid(), args=(a,))
            thread.start()
            thread.join()
            return a.exp()

    assert sizes(saved_bytes(torch.nn.Sequential(Spawns(), torch.nn.Tanh()), x())) == {"0": N, "1": N}


# --- no side effects ---


def test_the_state_is_restored() -> None:
    class Replaces(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("none", None)

        def forward(self, a: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return a

    net = torch.nn.Sequential(
        torch.nn.BatchNorm1d(16),
        torch.nn.Dropout(),
        torch.nn.utils.spectral_norm(torch.nn.Linear(16, 16)),
        Replaces(),
    )
    a, buffers = x(), dict(net.named_buffers())
    before, state = {name: buffer.clone() for name, buffer in buffers.items()}, torch.get_rng_state()
    random, expected = torch.get_rng_state(), net(a)
    torch.set_rng_state(random)
    net.load_state_dict(before, strict=False)
    flags, attributes = [m.training for m in net.modules()], [set(vars(m)) for m in net.modules()]
    saved_bytes(net, a)
    saved_bytes(lambda a: net(a), a)
    with pytest.raises(RuntimeError):
        saved_bytes(net, a[:, :3])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == flags
    assert [set(vars(m)) for m in net.modules()] == attributes
    for name, buffer in net.named_buffers():
        assert buffer is buffers[name] or name == "3.calls"
        assert torch.equal(buffer, before[name]), name
    assert a.grad is None
    assert torch.equal(net(a), expected)


def test_an_unchanged_buffer_is_not_written() -> None:
    """A write would make the backward of a graph that saved the buffer fail."""
    net = torch.nn.BatchNorm1d(16).eval()
    y = net(x())
    saved_bytes(net, x())
    y.sum().backward()


def test_a_graph_made_inside_can_run_backward_later() -> None:
    outputs: list[Tensor] = []
    a = x()
    saved_bytes(lambda: outputs.append(a.exp()))
    outputs[0].sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad, a.detach().exp())


def test_nothing_is_saved_without_a_gradient() -> None:
    net = torch.nn.Sequential(torch.nn.Tanh())
    assert saved_bytes(net, x().detach()).rows == []
    with torch.no_grad():
        assert saved_bytes(net, x()).grand_total == 0
    with torch.inference_mode():
        assert saved_bytes(net, x()).grand_total == 0
    assert "total" in str(saved_bytes(net, x().detach()))


def test_lazy_module() -> None:
    net = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.LazyLinear(3))
    for function in (net, lambda a: net(a)):
        with pytest.raises(ValueError, match=r"1 \(LazyLinear\) is lazy"):
            saved_bytes(function, x())
    net(x())
    assert saved_bytes(net, x()).total == N


# --- tables and charts ---


def test_table() -> None:
    net = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Sigmoid())
    assert (
        str(saved_bytes(net, x()))
        == """\
| layer                       |   saved |  share |
| --------------------------- | ------: | -----: |
| 0 (Tanh)                    |   512 B |  50.0% |
| 1 (Sigmoid)                 |   512 B |  50.0% |
| total                       | 1.0 KiB | 100.0% |
| plus inputs                 |     0 B |        |
| plus parameters and buffers |     0 B |        |"""
    )


def test_table_of_two_reports() -> None:
    first = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.ReLU())
    second = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Sigmoid())
    assert (
        str(saved_bytes(first, x()).compare(saved_bytes(second, x())))
        == """\
| layer                       | manualgrad |   torch | manualgrad / torch |
| --------------------------- | ---------: | ------: | -----------------: |
| 0 (Tanh)                    |      512 B |   512 B |               1.00 |
| 1 (ReLU)                    |      512 B |     0 B |                    |
| 1 (Sigmoid)                 |        0 B |   512 B |               0.00 |
| total                       |    1.0 KiB | 1.0 KiB |               1.00 |
| plus inputs                 |        0 B |     0 B |                    |
| plus parameters and buffers |        0 B |     0 B |                    |"""
    )


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    report = saved_bytes(torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Sigmoid()), x())
    with SummaryWriter(tmp_path) as writer:
        report.log(writer, "memory/one", 3)
        report.compare(report).log(writer, "memory/two", 4)
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    for tag, step, table in (("one", 3, report), ("two", 4, report.compare(report))):
        (text,) = events.Tensors(f"memory/{tag}/text_summary")
        (image,) = events.Images(f"memory/{tag}")
        assert (text.step, image.step) == (step, step)
        assert text.tensor_proto.string_val[0].decode() == str(table)
        assert (image.width, image.height) == table.chart(for_tensorboard=True).size


def test_chart() -> None:
    pytest.importorskip("PIL")
    one = saved_bytes(torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(MAX_BARS)]), x())
    many = saved_bytes(torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(3 * MAX_BARS)]), x())
    none = saved_bytes(torch.nn.Tanh(), x().detach())
    assert none.chart().height < one.chart().height == many.chart().height
    few = saved_bytes(torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(TENSORBOARD_MAX_BARS)]), x())
    assert one.chart(for_tensorboard=True).height == few.chart(for_tensorboard=True).height == few.chart().height
    blue = sum(pixel == (0x1A, 0x73, 0xE8) for pixel in one.chart().get_flattened_data())
    assert blue > 50 * 900 * 20
