"""What a checkpoint can hold."""

import collections
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, MultiplicativeLR, StepLR
from training_helpers import DATA, Interruption, assert_same, interrupt, loss_with_action, network, newest, trainer

from manualgrad.training import CheckpointError
from manualgrad.training.checkpoint import list_checkpoints, load, save
from manualgrad.training.serialization import to_serializable

torch.set_num_threads(1)


class Table:
    """A custom schedule with a numpy array. LambdaLR saves its attributes."""

    def __init__(self) -> None:
        self.table = np.linspace(1, 0.5, 30, dtype=np.float32)

    def __call__(self, epoch: int) -> Any:
        return self.table[epoch]


def with_numpy(name: str, model: nn.Module) -> dict[str, Any]:
    """Return an optimizer and a scheduler that hold numpy numbers."""
    rate: Any = np.float32(0.1) if name == "float32" else np.float64(0.01)
    if name == "betas":
        betas: Any = tuple(np.array([0.8, 0.9]))
        optimizer: Any = torch.optim.AdamW(model.parameters(), rate, betas, amsgrad=np.True_)  # pyright: ignore
    else:
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=np.float64(0.9))
    scheduler = {
        "cosine": lambda: LambdaLR(optimizer, lambda epoch: 0.5 * (1 + np.cos(np.pi * epoch / 30))),
        "table": lambda: LambdaLR(optimizer, Table()),
        "float32": lambda: MultiplicativeLR(optimizer, lambda epoch: np.float32(0.9)),  # pyright: ignore
        "betas": lambda: StepLR(optimizer, np.int64(2), np.float64(0.7)),  # pyright: ignore
    }[name]()
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


@pytest.mark.parametrize("name", ["cosine", "table", "float32", "betas"])
def test_numpy_numbers_are_resumed_exactly(name: str, tmp_path: Path) -> None:
    def run(folder: str, stop: bool = False) -> None:
        model = network()
        loss = loss_with_action(nn.MSELoss(), 6 if stop else None, interrupt)
        metrics = {"error": lambda p, t: np.float32((p - t).abs().mean().item())}
        trainer(
            model,
            DATA * 3,
            loss=loss,
            run_dir=tmp_path / folder,
            resume_from_checkpoint=True,
            max_epochs=4,
            checkpoint_every_n_steps=1,
            metrics=metrics,
            **with_numpy(name, model),
        ).fit()

    run("whole")
    with pytest.raises(Interruption):
        run("cut", stop=True)
    run("cut")
    assert_same(to_serializable(newest(tmp_path / "whole")), to_serializable(newest(tmp_path / "cut")))


WEIGHT = torch.arange(6.0).view(2, 3)
ARRAY = np.arange(6).reshape(2, 3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.1), None),
        (np.int64(3), None),
        (np.bool_(True), None),
        (np.str_("a"), "a"),
        (np.float32(0.1), None),
        (np.uint8(200), None),
        (np.complex64(1j), None),
        (ARRAY, None),
        (ARRAY.astype(">i4"), ARRAY.astype(np.int32)),
        (ARRAY[::-1, ::2], ARRAY[::-1, ::2]),
        (np.array(2.5), None),
        (np.zeros((0, 2), np.uint16), None),
        ({np.int64(1): (np.float16(2), [np.arange(2)])}, {1: (np.float16(2), [np.arange(2)])}),
        ({np.float32(0.1), ("a", np.int8(1))}, {float(np.float32(0.1)), ("a", 1)}),
        (collections.OrderedDict(a=np.int64(1)), None),
        (collections.Counter("aab"), None),
        ([None, True, 10**30, -1.5, float("inf"), "ü", b"b", bytearray(b"c"), 1j], None),
        ([torch.float16, torch.device("cpu"), torch.Size((1, 2)), torch.strided], None),
        (nn.Parameter(WEIGHT), None),
        (torch.tensor(1.5, dtype=torch.bfloat16), None),
        (torch.arange(4).view(2, 2).to(torch.complex64).conj(), None),
        (torch.zeros(0, 3), None),
    ],
    ids=str,
)
def test_saved_values_are_loaded(value: Any, expected: Any, tmp_path: Path) -> None:
    expected = value if expected is None else expected
    save(tmp_path / "c.pt", {"x": value})
    found = load(tmp_path / "c.pt")["x"]

    def same(a: Any, b: Any) -> bool:
        if type(a) is not type(b):
            return False
        if isinstance(b, np.ndarray):
            return a.dtype == b.dtype and np.array_equal(a, b)
        if isinstance(b, dict):
            return same(list(a.items()), list(b.items()))
        if isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
        return torch.equal(a, b) if isinstance(b, Tensor) else bool(a == b)

    assert same(found, expected)


def test_sparse_and_shared_tensors_and_module_versions_are_kept(tmp_path: Path) -> None:
    state = nn.BatchNorm1d(3).state_dict()
    number = torch.arange(4).view(2, 2).to(torch.complex64)
    content = {
        "model": state,
        "sparse": WEIGHT.to_sparse(),
        "shared": [WEIGHT, WEIGHT],
        "conjugate": [number, number.conj()],
    }
    save(tmp_path / "c.pt", to_serializable(content))
    found = load(tmp_path / "c.pt")
    assert found["model"]._metadata == state._metadata  # pyright: ignore
    assert torch.equal(found["sparse"].to_dense(), WEIGHT)
    assert found["shared"][0] is found["shared"][1]
    assert torch.equal(found["conjugate"][1], number.conj())


class HalvingSchedule:
    """A custom schedule with any attribute."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, epoch: int) -> float:
        return 0.5**epoch


Pair = collections.namedtuple("Pair", "a b")
CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"by": [lambda: 1]}, "by[0] is a function"),
        (partial(int), " is a functools.partial"),
        (collections.deque([1]), " is a collections.deque"),
        (collections.defaultdict(list), " is a collections.defaultdict"),
        (frozenset({1}), " is a frozenset"),
        (Path("a"), f" is a {type(Path()).__module__}.{type(Path()).__name__}"),
        (signal.SIGINT, " is a signal.Signals"),
        (Pair(1, 2), " is a test_checkpoint_contents.Pair"),
        (torch.Generator(), " is a torch._C.Generator"),
        (WEIGHT.as_subclass(type("Sub", (Tensor,), {"__module__": "mine"})), " is a mine.Sub"),
        (np.array(["a"]), " is a numpy ndarray of dtype <U1"),
        (np.datetime64("2020-01-01"), " is a numpy datetime64 of dtype"),
        (np.ma.masked_equal([1.0], 1), " is a numpy.ma.MaskedArray"),
        ({Path("a"): 1}, ", the key "),
        (CYCLE, "[0] contains itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_values_are_refused_before_training(value: Any, name: str, tmp_path: Path) -> None:
    model, calls = network(), []
    scheduler = LambdaLR(optimizer := torch.optim.SGD(model.parameters(), 0.1), HalvingSchedule(value))
    loss = loss_with_action(nn.MSELoss(), 1, lambda: calls.append(1))
    run = trainer(model, DATA, loss=loss, optimizer=optimizer, lr_scheduler=scheduler, run_dir=tmp_path)
    with pytest.raises(CheckpointError) as caught:
        run.fit()
    separator = "" if name.startswith((" ", "[", ",")) else "."
    assert str(caught.value).startswith(f"lr_scheduler.lr_lambdas[0].value{separator}{name}")
    assert (calls, list_checkpoints(tmp_path)) == ([], [])


def test_unsupported_optimizer_state_is_refused_after_the_first_update(tmp_path: Path) -> None:
    class SGDWithWindow(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["window"] = collections.deque([1])

    run = trainer(model := network(), DATA * 5, optimizer=SGDWithWindow(model.parameters(), 0.1), run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"^optimizer.state\[0\].window is a collections.deque"):
        run.fit()
    assert run.state.global_step == 1
    assert newest(tmp_path)["trainer_state"]["global_step"] == 0


class LinearWithExtraState(nn.Linear):
    """Has extra state that changes and grows."""

    def __init__(self) -> None:
        super().__init__(4, 1)
        self.extra: dict[str, Any] = {"calls": 0, "means": np.zeros(0)}

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.extra["calls"] += 1
            self.extra["means"] = np.append(self.extra["means"], input.mean().item())
        return super().forward(input)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_is_resumed(tmp_path: Path) -> None:
    trainer(LinearWithExtraState(), DATA * 3, run_dir=tmp_path, max_epochs=1).fit()
    trainer(
        model := LinearWithExtraState(), DATA * 3, run_dir=tmp_path, max_epochs=2, resume_from_checkpoint=True
    ).fit()
    assert model.extra["calls"] == 7  # the first batch twice: the bytes it saves are measured
    assert len(model.extra["means"]) == 7
    assert torch.equal(torch.from_numpy(model.extra["means"][1:4]), torch.from_numpy(model.extra["means"][4:]))
