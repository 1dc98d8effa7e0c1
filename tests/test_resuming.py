"""What a resumed run takes up again: all that a checkpoint can hold, the order of any data, and frozen modules."""

import collections
import importlib.metadata
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_training import DATA, Interruption, assert_same, last, network, raising, regression, trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, MultiplicativeLR, StepLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

import manualgrad
from manualgrad.training import CheckpointError, Interrupted, Trainer, TrainingSettings
from manualgrad.training.checkpoint import all_in, load, plain, save

torch.set_num_threads(1)
# ruff: noqa: NPY002 (numpy's global generator is one of those that samplers draw from)


# What a checkpoint holds


class Table:
    """A schedule of one's own, which torch saves by its attributes: a table in numpy's numbers."""

    def __init__(self) -> None:
        self.table = np.linspace(1, 0.5, 30, dtype=np.float32)

    def __call__(self, epoch: int) -> Any:
        return self.table[epoch]


def with_numpy(name: str, model: nn.Module) -> dict[str, Any]:
    """An optimizer and a schedule that hold numbers of numpy's."""
    rate: Any = np.float32(0.1) if name == "float32" else np.float64(0.01)
    if name == "betas":
        betas: Any = tuple(np.array([0.8, 0.9]))
        optimizer: Any = torch.optim.AdamW(model.parameters(), rate, betas, amsgrad=np.True_)  # pyright: ignore
    else:
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=np.float64(0.9))
    schedule = {
        "cosine": lambda: LambdaLR(optimizer, lambda epoch: 0.5 * (1 + np.cos(np.pi * epoch / 30))),
        "table": lambda: LambdaLR(optimizer, Table()),
        "float32": lambda: MultiplicativeLR(optimizer, lambda epoch: np.float32(0.9)),  # pyright: ignore
        "betas": lambda: StepLR(optimizer, np.int64(2), np.float64(0.7)),  # pyright: ignore
    }[name]()
    return {"optimizer": optimizer, "schedule": schedule}


@pytest.mark.parametrize("name", ["cosine", "table", "float32", "betas"])
def test_numbers_of_numpy_are_resumed_exactly(name: str, tmp_path: Path) -> None:
    def run(folder: str, stop: bool = False) -> None:
        model = network()
        calls = iter(range(100))
        metric: Any = lambda p, t: np.float32((p - t).abs().mean().item())  # noqa: E731
        loss: Any = lambda p, t: raising() if stop and next(calls) == 5 else (p - t).square().mean()  # noqa: E731
        options: dict[str, Any] = {"epochs": 4, "checkpoint_every": 1, "metrics": {"error": metric}}
        trainer(
            model,
            DATA * 3,
            loss=loss,
            run_dir=tmp_path / folder,
            resume=True,
            **options,
            **with_numpy(name, model),
        ).fit()

    run("whole")
    with pytest.raises(Interruption):
        run("cut", stop=True)
    run("cut")
    assert_same(plain(last(tmp_path / "whole")), plain(last(tmp_path / "cut")))


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
        (torch.randn(2, 2, dtype=torch.complex64).conj(), None),
        (torch.zeros(0, 3), None),
    ],
    ids=str,
)
def test_whatever_is_saved_is_loaded(value: Any, expected: Any, tmp_path: Path) -> None:
    expected = value if expected is None else expected
    save(tmp_path / "c.pt", {"x": value})
    found = load(tmp_path / "c.pt")["x"]

    def same(one: Any, other: Any) -> bool:
        if isinstance(other, np.ndarray):
            return type(one) is np.ndarray and one.dtype == other.dtype and np.array_equal(one, other)
        if isinstance(other, (dict, list, tuple)):
            entries = zip(one.items(), other.items()) if isinstance(other, dict) else zip(one, other)  # noqa: B905
            return type(one) is type(other) and len(one) == len(other) and all(same(a, b) for a, b in entries)
        return type(one) is type(other) and (
            torch.equal(one, other) if isinstance(other, Tensor) else bool(one == other)
        )

    assert same(found, expected)


def test_sparse_tensors_views_and_versions_are_kept(tmp_path: Path) -> None:
    state = nn.BatchNorm1d(3).state_dict()
    number = torch.randn(3, dtype=torch.complex64)
    content = {
        "model": state,
        "sparse": WEIGHT.to_sparse(),
        "tied": [WEIGHT, WEIGHT],
        "two": [number, number.conj()],
    }
    save(tmp_path / "c.pt", plain(content))
    found = load(tmp_path / "c.pt")
    assert found["model"]._metadata == state._metadata  # pyright: ignore
    assert torch.equal(found["sparse"].to_dense(), WEIGHT)
    assert found["tied"][0] is found["tied"][1]
    assert torch.equal(found["two"][1], number.conj())


class Halving:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, epoch: int) -> float:
        return 0.5**epoch


Pair = collections.namedtuple("Pair", "one other")
ITSELF: list[Any] = []
ITSELF.append(ITSELF)


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
        (Pair(1, 2), " is a test_resuming.Pair"),
        (torch.Generator(), " is a torch._C.Generator"),
        (WEIGHT.as_subclass(type("Sub", (Tensor,), {"__module__": "mine"})), " is a mine.Sub"),
        (np.array(["a"]), " is a ndarray of numpy's of dtype <U1"),
        (np.datetime64("2020-01-01"), " is a datetime64 of numpy's"),
        (np.ma.masked_equal([1.0], 1), " is a numpy.ma.MaskedArray"),
        ({Path("a"): 1}, ", the key "),
        (ITSELF, "[0] contains itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_loaded_is_refused_before_it_is_trained(value: Any, name: str, tmp_path: Path) -> None:
    model, losses = network(), []
    schedule = LambdaLR(optimizer := torch.optim.SGD(model.parameters(), 0.1), Halving(value))
    loss: Any = lambda p, t: losses.append(1) or (p - t).square().mean()  # noqa: E731
    run = trainer(model, DATA, loss=loss, optimizer=optimizer, schedule=schedule, run_dir=tmp_path)
    with pytest.raises(CheckpointError) as caught:
        run.fit()
    separator = "" if name.startswith((" ", "[", ",")) else "."
    assert str(caught.value).startswith(f"schedule.lr_lambdas[0].value{separator}{name}")
    assert (losses, all_in(tmp_path)) == ([], [])


def test_what_an_optimizer_has_only_later_is_refused_at_its_first_update(tmp_path: Path) -> None:
    class Later(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["window"] = collections.deque([1])

    run = trainer(model := network(), DATA * 5, optimizer=Later(model.parameters(), 0.1), run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"^optimizer.state\[0\].window is a collections.deque"):
        run.fit()
    assert run.progress.step == 1
    assert last(tmp_path)["progress"]["step"] == 0


class Counting(nn.Linear):
    """Keeps something beside its tensors, which changes, and grows."""

    def __init__(self) -> None:
        super().__init__(4, 1)
        self.seen: dict[str, Any] = {"calls": 0, "means": np.zeros(0)}

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.seen["calls"] += 1
            self.seen["means"] = np.append(self.seen["means"], input.mean().item())
        return super().forward(input)

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


def test_extra_state_goes_on_where_it_was(tmp_path: Path) -> None:
    trainer(Counting(), DATA * 3, run_dir=tmp_path, epochs=1).fit()
    trainer(model := Counting(), DATA * 3, run_dir=tmp_path, epochs=2, resume=True).fit()
    assert model.seen["calls"] == 7  # the first batch once more, to count its bytes
    assert len(model.seen["means"]) == 7
    assert torch.equal(torch.from_numpy(model.seen["means"][1:4]), torch.from_numpy(model.seen["means"][4:]))


# The order of the data

X = torch.arange(24.0)[:, None]
ROWS = TensorDataset(X, torch.zeros(24, 1))


class Own(Sampler[int]):
    """Shuffles with whatever it is given: something with a method of one of these names."""

    def __init__(self, generator: Any) -> None:
        self.inside = [{"deep": generator}]

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[int]:
        generator = self.inside[0]["deep"]
        draw = getattr(generator, "sample", None) or getattr(generator, "permutation", None)
        order = draw(range(24), 24) if isinstance(generator, random.Random) else draw(24)  # pyright: ignore
        yield from map(int, order)


class Wrapper:
    """Around a sampler, with no length, which torch allows."""

    __slots__ = ("base",)

    def __init__(self, base: Any) -> None:
        self.base = base

    def __iter__(self) -> Iterator[Any]:
        yield from self.base


class Lazy(Sampler[int]):
    """Draws each index when it is asked for it, from one of the global generators or all."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(24):
            yield (int(torch.randint(24, ())) + random.randrange(24) + np.random.randint(24)) % 24


class Told(Sampler[int]):
    """Is told the epoch, by itself or by what holds it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(24, generator=torch.Generator().manual_seed(self.epoch)).tolist()


class Hidden(Sampler[int]):
    """Counts its epochs, and tells nobody."""

    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        yield from random.Random(self.epochs).sample(range(24), 24)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Shuffles within a window, drawing from the global generator of torch while it goes along."""

    def __init__(self, order: Any = None) -> None:
        self.order = order

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows, worker = list(self.order or range(24)), get_worker_info()
        rows = rows[worker.id :: worker.num_workers] if worker else rows
        window: list[int] = []
        for row in rows:
            window.append(row)
            if len(window) == 6:
                yield X[window.pop(int(torch.randint(6, ())))], torch.zeros(1)
        for row in window:
            yield X[row], torch.zeros(1)


def generated(number: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(number)


LOADERS: dict[str, Callable[[], Any]] = {
    "batches of a sampler": lambda: DataLoader(
        ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS, generator=generated()), 4, False)
    ),
    "a sampler of batches": lambda: DataLoader(
        ROWS, sampler=BatchSampler(SubsetRandomSampler(range(24), generated()), 4, False), batch_size=None
    ),
    "weights": lambda: DataLoader(ROWS, 4, sampler=WeightedRandomSampler([1.0] * 24, 24, generator=generated())),
    "no length": lambda: DataLoader(
        ROWS, batch_sampler=Wrapper(BatchSampler(Wrapper(RandomSampler(ROWS, generator=generated())), 4, True))
    ),
    "random.Random": lambda: DataLoader(ROWS, 4, sampler=Own(random.Random(3))),
    "numpy's Generator": lambda: DataLoader(ROWS, 4, sampler=Own(np.random.default_rng(3))),
    "numpy's RandomState": lambda: DataLoader(ROWS, 4, sampler=Own(np.random.RandomState(3))),
    "a bound method": lambda: DataLoader(
        ROWS, 4, sampler=Own(SimpleNamespace(permutation=np.random.default_rng(3).permutation))
    ),
    "global, lazily": lambda: DataLoader(ROWS, 4, sampler=Lazy()),
    "told, within": lambda: DataLoader(ROWS, batch_sampler=Wrapper(BatchSampler(Told(), 4, False))),
    "stream": lambda: DataLoader(Stream(), 5),
    "stream, last batch dropped": lambda: DataLoader(Stream(), 5, drop_last=True),
    "stream, with workers": lambda: DataLoader(Stream(), 4, num_workers=2),
    "stream of a sampler": lambda: DataLoader(Stream(Own(random.Random(3))), 4),
    "stream of examples": lambda: DataLoader(
        Stream(Told()), batch_size=None, collate_fn=lambda row: (row[0][None], row[1][None])
    ),
    "another iterable": lambda: Wrapper(DataLoader(Stream(), 5)),
}


def run(
    folder: Path, loader: Any, stop_at: int | None = None, act: Callable[[], None] = raising
) -> list[list[float]]:
    """The batches that a run trains on; it is stopped when it begins that of this number."""
    seen: list[list[float]] = []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled() and module.training:
            seen.append(inputs[0].flatten().tolist())
            if len(seen) == stop_at:
                act()

    model.register_forward_hook(note)
    options: dict[str, Any] = {"epochs": 3, "resume": True, "checkpoint_every": 2, "histogram_every": None}
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    fit = trainer(model, loader, optimizer=optimizer, run_dir=folder, **options).fit
    if stop_at is None:
        fit()
    else:
        with pytest.raises((Interruption, Interrupted)):
            fit()
    return seen


def term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stop", ["within", "between"])
@pytest.mark.parametrize("name", LOADERS)
def test_the_order_goes_on(name: str, stop: str, tmp_path: Path) -> None:
    """Stopped by SIGTERM in the second epoch, or killed after it, a run goes on as if it had not been."""
    make = LOADERS[name]
    whole = run(tmp_path / "whole", make())[1:]  # the first batch once more, to count its bytes
    each = len(whole) // 3
    done = 2 * each - (2 if stop == "within" else 0)
    killed: dict[str, Any] = {"stop_at": done + 1, "act": term} if stop == "within" else {"stop_at": done + 2}
    assert run(tmp_path / "cut", make(), **killed)[1 : done + 1] == whole[:done]
    assert last(tmp_path / "cut")["progress"]["drawn"] == (each - 2 if stop == "within" else 0)
    assert run(tmp_path / "cut", make()) == whole[done:]
    assert_same(last(tmp_path / "whole"), last(tmp_path / "cut"))
    assert len({str(whole[epoch * each : (epoch + 1) * each]) for epoch in range(3)}) == 3


@pytest.mark.parametrize("stop_at", [10, 14])
def test_an_order_that_cannot_go_on_is_refused(stop_at: int, tmp_path: Path) -> None:
    """Of a sampler with a state that nobody can see: in the second epoch, and between it and the third."""
    make = lambda: DataLoader(ROWS, 4, sampler=Hidden())  # noqa: E731
    run(tmp_path, make(), stop_at=stop_at)
    before = last(tmp_path)
    where = r"cannot be resumed \(epoch 2, before update 3\)" if stop_at == 10 else "for epoch 2, begun once more"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=where):
            run(tmp_path, make())
    assert_same(last(tmp_path), before)


def test_what_a_sampler_hides_is_drawn_once_more_after_one_epoch(tmp_path: Path) -> None:
    """All of the indices of the first epoch are, and then it is where it was."""
    whole = run(tmp_path / "whole", DataLoader(ROWS, 4, sampler=Hidden()))
    run(tmp_path / "cut", DataLoader(ROWS, 4, sampler=Hidden()), stop_at=8)
    assert run(tmp_path / "cut", DataLoader(ROWS, 4, sampler=Hidden())) == whole[7:]


def test_a_stream_that_hides_its_state_is_refused_or_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "within", DataLoader(Stream(Wrapper(Hidden())), 4), stop_at=10)
    with pytest.raises(CheckpointError, match=r"cannot be resumed \(epoch 2, before update 3\)"):
        run(tmp_path / "within", DataLoader(Stream(Wrapper(Hidden())), 4))
    run(tmp_path / "between", DataLoader(Stream(Wrapper(Hidden())), 4), stop_at=14)
    capfd.readouterr()
    assert len(run(tmp_path / "between", DataLoader(Stream(Wrapper(Hidden())), 4))) == 6
    assert capfd.readouterr().err.startswith(
        "warning: train_loader gives other batches than before for epoch 2, be"
    )


def test_a_stream_that_has_become_shorter_is_refused(tmp_path: Path) -> None:
    run(tmp_path, DataLoader(Stream(), 4), stop_at=12)  # with a checkpoint after four batches of the second epoch
    with pytest.raises(CheckpointError, match="other batches than before, and fewer"):
        run(tmp_path, DataLoader(Stream(range(12)), 4))


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Noise that nobody can seed."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + 0.25 * np.random.default_rng().random(), torch.zeros(1)


@pytest.mark.parametrize("stop_at", [10, 14])
def test_noise_alone_is_no_other_order(stop_at: int, tmp_path: Path) -> None:
    """Nor are more workers, with a sampler that draws lazily."""
    whole = run(tmp_path / "whole", DataLoader(Augmented(), 4, sampler=Lazy()))
    run(tmp_path / "cut", DataLoader(Augmented(), 4, sampler=Lazy()), stop_at=stop_at)
    rest = run(tmp_path / "cut", DataLoader(Augmented(), 4, sampler=Lazy(), num_workers=2))
    assert [list(map(int, x)) for x in rest] == [list(map(int, x)) for x in whole[stop_at - 1 :]]


def test_validation_in_an_order_of_its_own_goes_on_too(tmp_path: Path) -> None:
    """As the sum of its losses depends on it in the last bit."""
    figures = []
    for folder, stops in (("whole", [None]), ("cut", [11, None])):
        for stop in stops:
            torch.manual_seed(0)
            model, calls = network(), iter(range(1, 100))
            act: Any = lambda p, t: (  # noqa: E731
                os.kill(os.getpid(), signal.SIGTERM) if p.requires_grad and next(calls) == stop else None,  # noqa: B023
                (p - t).square().mean(),
            )[1]
            validation = DataLoader(TensorDataset(*regression(64, 1)), 4, shuffle=True, generator=generated())
            fit = trainer(
                model, DATA * 4, validation, loss=act, epochs=4, run_dir=tmp_path / folder, resume=True
            ).fit
            if stop:
                with pytest.raises(Interrupted):
                    fit()
            else:
                figures.append(fit())
    assert figures[0] == figures[1]


@pytest.mark.parametrize("loader", [DataLoader(ROWS, 4, num_workers=1, in_order=False)])
def test_batches_that_overtake_each_other_are_refused(loader: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_loader has in_order=False"):
        run(tmp_path, loader)


# Modules that stay in eval mode


class Kept(nn.Module):
    """Keeps its norm in eval mode by a `train` of its own, as is often written."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(1), nn.Dropout(0.5), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(x)))

    def train(self, mode: bool = True) -> "Kept":
        super().train(mode)
        self.norm.eval()
        return self


def frozen_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 4), nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Dropout(0.5)), nn.Linear(4, 1)
    )


def frozen_body() -> nn.Module:
    model = frozen_norm().eval()
    model[2].train()  # pyright: ignore
    return model


@pytest.mark.parametrize(
    ("make", "training"),
    [
        (frozen_norm, {"", "0", "1", "1.1", "2"}),
        (frozen_body, {"2"}),
        (lambda: frozen_norm().eval(), {"", "0", "1", "1.0", "1.1", "2"}),
        (Kept, {"", "drop", "out"}),
    ],
    ids=["a norm", "all but the head", "all", "by itself"],
)
def test_modules_keep_their_mode(make: Callable[[], nn.Module], training: set[str], tmp_path: Path) -> None:
    """Through training, validation, pictures, an interruption, and with a last batch of one."""
    rows = TensorDataset(X[:17], X[:17])

    def run(folder: str, stop: int | None = None) -> nn.Module:
        model = make()
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        updates = iter(range(1, 100))

        def loss(prediction: Tensor, target: Tensor) -> Tensor:
            found = {name for name, module in model.named_modules() if module.training}
            assert found == (training if prediction.requires_grad else set())
            if prediction.requires_grad and next(updates) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return (prediction - target).square().mean()

        settings = TrainingSettings(
            device="cpu", epochs=3, run_dir=tmp_path / folder, resume=True, progress=False, histogram_every=None
        )
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        # Where a norm is trained, torch refuses one example; where all are frozen, it is as good as any other.
        train = DataLoader(rows, 4, drop_last="1.0" in training)
        fit = Trainer(
            model,
            loss,
            optimizer,
            train,
            DataLoader(rows, 8),
            settings=settings,
            on_epoch=lambda log, step: model(X[:2]),
            summary=lambda log, step: {"training": float(any(m.training for m in model.modules()))},
        ).fit
        if stop is None:
            assert fit().summary == {"training": 0.0}
        else:
            with pytest.raises(Interrupted):
                fit()
        return model

    model = run("whole")
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    assert norm.running_mean is not None
    assert bool(norm.running_mean.any()) == ("1.0" in training)
    assert not any(module.training for module in model.modules())
    run("cut", stop=6)
    run("cut")
    assert_same(last(tmp_path / "whole")["model"], last(tmp_path / "cut")["model"])


def test_evaluation_leaves_each_module_in_its_mode() -> None:
    for make in (frozen_norm, frozen_body, lambda: frozen_norm().eval()):
        model = make()
        modes = [module.training for module in model.modules()]
        trainer(model, [(X, X)]).evaluate([(X, X)])
        assert [module.training for module in model.modules()] == modes


def test_a_package_that_is_not_installed_trains_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr("manualgrad.training.trainer.version", missing, raising=False)
    trainer(network(), DATA, run_dir=tmp_path).fit()
    assert json.loads((tmp_path / "settings.json").read_text())["versions"]["manualgrad"] == manualgrad.__version__
