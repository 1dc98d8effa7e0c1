"""A resumed run draws the same batches as an uninterrupted one."""

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
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
from training_helpers import (
    DATA,
    Interruption,
    assert_same,
    interrupt,
    loss_with_action,
    network,
    newest,
    regression,
    send_signal,
    trainer,
)

from manualgrad.training import CheckpointError, Interrupted

torch.set_num_threads(1)


X = torch.arange(24.0)[:, None]
ROWS = TensorDataset(X, torch.zeros(24, 1))


class GeneratorSampler(Sampler[int]):
    """Shuffles with a generator, or anything with a method `permutation`, stored in nested containers."""

    def __init__(self, generator: Any) -> None:
        self.nested = [{"deep": generator}]

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[int]:
        generator = self.nested[0]["deep"]
        draw = getattr(generator, "sample", None) or getattr(generator, "permutation", None)
        order = draw(range(24), 24) if isinstance(generator, random.Random) else draw(24)  # pyright: ignore
        yield from map(int, order)


class Wrapper:
    """Wraps an iterable, without a length."""

    __slots__ = ("base",)

    def __init__(self, base: Any) -> None:
        self.base = base

    def __iter__(self) -> Iterator[Any]:
        yield from self.base


class LazySampler(Sampler[int]):
    """Draws each index from the global generators when it is needed."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(24):
            yield (int(torch.randint(24, ())) + random.randrange(24) + np.random.randint(24)) % 24  # noqa: NPY002


class EpochSampler(Sampler[int]):
    """Has set_epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(24, generator=torch.Generator().manual_seed(self.epoch)).tolist()


class HiddenStateSampler(Sampler[int]):
    """Counts its epochs. A checkpoint cannot hold this state."""

    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        yield from random.Random(self.epochs).sample(range(24), 24)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Shuffles within a window, with the global generator of torch."""

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


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS: dict[str, Callable[[], Any]] = {
    "BatchSampler": lambda: DataLoader(
        ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS, generator=seeded()), 4, False)
    ),
    "BatchSampler as sampler": lambda: DataLoader(
        ROWS, sampler=BatchSampler(SubsetRandomSampler(range(24), seeded()), 4, False), batch_size=None
    ),
    "WeightedRandomSampler": lambda: DataLoader(
        ROWS, 4, sampler=WeightedRandomSampler([1.0] * 24, 24, generator=seeded())
    ),
    "no length": lambda: DataLoader(
        ROWS, batch_sampler=Wrapper(BatchSampler(Wrapper(RandomSampler(ROWS, generator=seeded())), 4, True))
    ),
    "random.Random": lambda: DataLoader(ROWS, 4, sampler=GeneratorSampler(random.Random(3))),
    "numpy's Generator": lambda: DataLoader(ROWS, 4, sampler=GeneratorSampler(np.random.default_rng(3))),
    "numpy's RandomState": lambda: DataLoader(ROWS, 4, sampler=GeneratorSampler(np.random.RandomState(3))),
    "a bound method": lambda: DataLoader(
        ROWS, 4, sampler=GeneratorSampler(SimpleNamespace(permutation=np.random.default_rng(3).permutation))
    ),
    "lazy sampler": lambda: DataLoader(ROWS, 4, sampler=LazySampler()),
    "wrapped set_epoch": lambda: DataLoader(ROWS, batch_sampler=Wrapper(BatchSampler(EpochSampler(), 4, False))),
    "stream": lambda: DataLoader(Stream(), 5),
    "stream, last batch dropped": lambda: DataLoader(Stream(), 5, drop_last=True),
    "stream, with workers": lambda: DataLoader(Stream(), 4, num_workers=2),
    "stream of a sampler": lambda: DataLoader(Stream(GeneratorSampler(random.Random(3))), 4),
    "stream of examples": lambda: DataLoader(
        Stream(EpochSampler()), batch_size=None, collate_fn=lambda row: (row[0][None], row[1][None])
    ),
    "other iterable": lambda: Wrapper(DataLoader(Stream(), 5)),
}


def run(
    folder: Path, loader: Any, stop_at: int | None = None, action: Callable[[], None] = interrupt
) -> list[list[float]]:
    """Train, and return the training batches. The action runs at the batch of this number."""
    found: list[list[float]] = []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled() and module.training:
            found.append(inputs[0].flatten().tolist())
            if len(found) == stop_at:
                action()

    model.register_forward_hook(record)
    options: dict[str, Any] = {
        "max_epochs": 3,
        "resume_from_checkpoint": True,
        "checkpoint_every_n_steps": 2,
        "histograms_every_n_epochs": None,
    }
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    fit = trainer(model, loader, optimizer=optimizer, run_dir=folder, **options).fit
    if stop_at is None:
        fit()
    else:
        with pytest.raises((Interruption, Interrupted)):
            fit()
    return found


@pytest.mark.parametrize("stop", ["in an epoch", "between epochs"])
@pytest.mark.parametrize("name", LOADERS)
def test_the_order_of_an_uninterrupted_run(name: str, stop: str, tmp_path: Path) -> None:
    """The run is stopped by SIGTERM in the second epoch, or by an error after it."""
    make_loader = LOADERS[name]
    whole = run(tmp_path / "whole", make_loader())[1:]  # without the first: its saved bytes are measured
    per_epoch = len(whole) // 3
    done = 2 * per_epoch - (2 if stop == "in an epoch" else 0)
    options: dict[str, Any] = (
        {"stop_at": done + 1, "action": send_signal(signal.SIGTERM)}
        if stop == "in an epoch"
        else {"stop_at": done + 2}
    )
    assert run(tmp_path / "cut", make_loader(), **options)[1 : done + 1] == whole[:done]
    assert newest(tmp_path / "cut")["trainer_state"]["updates_drawn"] == (
        per_epoch - 2 if stop == "in an epoch" else 0
    )
    assert run(tmp_path / "cut", make_loader()) == whole[done:]
    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "cut"))
    assert len({str(whole[epoch * per_epoch : (epoch + 1) * per_epoch]) for epoch in range(3)}) == 3


@pytest.mark.parametrize("stop_at", [10, 14])
def test_another_order_is_refused(stop_at: int, tmp_path: Path) -> None:
    """In the second epoch, and between the second and the third."""

    def make_loader() -> Any:
        return DataLoader(ROWS, 4, sampler=HiddenStateSampler())

    run(tmp_path, make_loader(), stop_at=stop_at)
    before = newest(tmp_path)
    where = (
        r"cannot be resumed \(epoch 2, before update 3\)"
        if stop_at == 10
        else "for epoch 2, which was begun again"
    )
    for _ in range(2):
        with pytest.raises(CheckpointError, match=where):
            run(tmp_path, make_loader())
    assert_same(newest(tmp_path), before)


def test_after_one_epoch_hidden_state_is_restored(tmp_path: Path) -> None:
    """All indices of the first epoch are drawn again, so the sampler is in the same state."""
    whole = run(tmp_path / "whole", DataLoader(ROWS, 4, sampler=HiddenStateSampler()))
    run(tmp_path / "cut", DataLoader(ROWS, 4, sampler=HiddenStateSampler()), stop_at=8)
    assert run(tmp_path / "cut", DataLoader(ROWS, 4, sampler=HiddenStateSampler())) == whole[7:]


def test_another_order_of_a_stream_is_refused_or_gives_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "within", DataLoader(Stream(Wrapper(HiddenStateSampler())), 4), stop_at=10)
    with pytest.raises(CheckpointError, match=r"cannot be resumed \(epoch 2, before update 3\)"):
        run(tmp_path / "within", DataLoader(Stream(Wrapper(HiddenStateSampler())), 4))
    run(tmp_path / "between", DataLoader(Stream(Wrapper(HiddenStateSampler())), 4), stop_at=14)
    capfd.readouterr()
    assert len(run(tmp_path / "between", DataLoader(Stream(Wrapper(HiddenStateSampler())), 4))) == 6
    assert capfd.readouterr().err.startswith(
        "warning: train_loader gives other batches than before for epoch 2, which"
    )


def test_a_shorter_stream_is_refused(tmp_path: Path) -> None:
    run(tmp_path, DataLoader(Stream(), 4), stop_at=12)  # the checkpoint is after four batches of epoch 2
    with pytest.raises(CheckpointError, match="other batches than before, and fewer of them"):
        run(tmp_path, DataLoader(Stream(range(12)), 4))


class UnseededNoise(Dataset[tuple[Tensor, Tensor]]):
    """Adds noise from an unseeded generator."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + 0.25 * np.random.default_rng().random(), torch.zeros(1)


@pytest.mark.parametrize("stop_at", [10, 14])
def test_noise_does_not_change_the_order(stop_at: int, tmp_path: Path) -> None:
    """Nor does the number of workers."""
    whole = run(tmp_path / "whole", DataLoader(UnseededNoise(), 4, sampler=LazySampler()))
    run(tmp_path / "cut", DataLoader(UnseededNoise(), 4, sampler=LazySampler()), stop_at=stop_at)
    rest = run(tmp_path / "cut", DataLoader(UnseededNoise(), 4, sampler=LazySampler(), num_workers=2))
    assert [list(map(int, x)) for x in rest] == [list(map(int, x)) for x in whole[stop_at - 1 :]]


def test_a_shuffled_validation_is_resumed_exactly(tmp_path: Path) -> None:
    """The order changes the last bit of the sum of the losses."""
    results = []
    for folder, stops in (("whole", [None]), ("cut", [11, None])):
        for stop in stops:
            torch.manual_seed(0)
            model = network()
            loss = loss_with_action(nn.MSELoss(), stop, send_signal(signal.SIGTERM))
            validation = DataLoader(TensorDataset(*regression(64, 1)), 4, shuffle=True, generator=seeded())
            fit = trainer(
                model,
                DATA * 4,
                validation,
                loss=loss,
                max_epochs=4,
                run_dir=tmp_path / folder,
                resume_from_checkpoint=True,
            ).fit
            if stop:
                with pytest.raises(Interrupted):
                    fit()
            else:
                results.append(fit())
    assert results[0] == results[1]


@pytest.mark.parametrize("loader", [DataLoader(ROWS, 4, num_workers=1, in_order=False)])
def test_in_order_false_is_refused(loader: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_loader has in_order=False"):
        run(tmp_path, loader)
