"""The trainer against loops written out by hand, and against its own uninterrupted runs."""

import errno
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from torch.utils.tensorboard import FileWriter, SummaryWriter

import manualgrad.nn
from manualgrad.training import (
    CheckpointError,
    Interrupted,
    NonFiniteError,
    Trainer,
    TrainingSettings,
    checkpoint,
    parse_settings,
)
from manualgrad.training.checkpoint import all_in, load
from manualgrad.training.logging import _by_layer
from manualgrad.training.nonfinite import find_nonfinite

torch.set_num_threads(1)

Pairs = list[tuple[Tensor, Tensor]]


def regression(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of four columns, and a target that a small network can learn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator, dtype=dtype)
    return x, (x[:, :1] * x[:, 1:2]).sin() + x[:, 2:3]


def batches(sizes: list[int], dtype: torch.dtype = torch.float32) -> Pairs:
    """The same rows, cut into batches of these sizes."""
    x, y = regression(sum(sizes), dtype=dtype)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def network(layers: Any = nn, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(layers.Linear(4, 16), layers.ReLU(), layers.Dropout(dropout), layers.Linear(16, 1)).to(
        dtype
    )


DATA = batches([8])


def trainer(model: nn.Module, loader: Any, validation: Any = None, **options: Any) -> Trainer:
    """A trainer with the mean squared error and plain gradient descent, unless the options say otherwise."""
    names = ("loss", "optimizer", "schedule", "metrics", "summary")
    parts = {name: options.pop(name) for name in names if name in options}
    loss = parts.pop("loss", nn.MSELoss())
    optimizer = parts.pop("optimizer", None) or torch.optim.SGD(model.parameters(), 0.1)
    options.setdefault("epochs", 1)
    settings = TrainingSettings(device="cpu", progress=False, **options)
    return Trainer(model, loss, optimizer, loader, validation, settings=settings, **parts)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that TensorBoard shows of a run, but for the times."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def assert_same(one: Any, other: Any) -> None:
    """Equal to the last bit, through dictionaries and lists."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


# The loop


@pytest.mark.parametrize("layers", [nn, manualgrad.nn], ids=["torch", "ours"])
def test_it_is_the_loop_one_would_write(layers: Any) -> None:
    data = batches([8, 8, 8, 4])
    expected, model = network(layers), network(layers)
    optimizer = torch.optim.AdamW(expected.parameters(), 0.01)
    schedule = OneCycleLR(optimizer, 0.01, total_steps=12)
    for _, (x, y) in itertools.product(range(3), data):
        optimizer.zero_grad()
        layers.MSELoss()(expected(x), y).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
        schedule.step()

    mine = torch.optim.AdamW(model.parameters(), 0.01)
    result = trainer(
        model,
        data,
        loss=layers.MSELoss(),
        optimizer=mine,
        schedule=OneCycleLR(mine, 0.01, total_steps=12),
        epochs=3,
        clip_norm=0.5,
    ).fit()
    assert_same(dict(model.state_dict()), dict(expected.state_dict()))
    assert (result.epochs, result.steps, result.best_epoch, result.stopped_early) == (3, 12, 3, False)


@pytest.mark.parametrize("layers", [nn, manualgrad.nn], ids=["torch", "ours"])
def test_accumulated_batches_make_the_gradient_of_one(layers: Any) -> None:
    """Of unequal batches too, and in the last group, which has fewer."""
    pieces = batches([5, 3, 1, 4, 2], dtype=torch.float64)
    whole = [tuple(map(torch.cat, zip(*group, strict=True))) for group in (pieces[:3], pieces[3:])]
    one, other = network(layers, dtype=torch.float64), network(layers, dtype=torch.float64)
    from_pieces = trainer(one, pieces, epochs=2, accumulate=3, loss=layers.MSELoss()).fit()
    from_whole = trainer(other, whole, epochs=2, loss=layers.MSELoss()).fit()
    assert from_pieces.steps == from_whole.steps == 4
    assert from_pieces.train["loss"] == pytest.approx(from_whole.train["loss"], rel=1e-12)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-12, atol=1e-14)


def test_losses_and_metrics_are_means_over_examples() -> None:
    data = batches([7, 2, 1])
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    model = network(dropout=0.5)
    run = trainer(model, data, metrics={"absolute_error": lambda p, t: (p - t).abs().mean()})
    model.train()
    figures = run.evaluate(data)
    assert model.training
    model.eval()
    with torch.no_grad():
        error = model(x) - y
    assert figures == pytest.approx(
        {"loss": error.square().mean().item(), "absolute_error": error.abs().mean().item()}
    )


def test_schedules_advance_when_told() -> None:
    model, data = network(), batches([8, 8, 8])

    def final_rate(schedule: Callable[[Any], Any], validation: Any = None, **options: Any) -> float:
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        trainer(
            model,
            data,
            validation,
            optimizer=optimizer,
            schedule=schedule(optimizer),
            epochs=2,
            clip_norm=1e-9,
            **options,
        ).fit()
        return optimizer.param_groups[0]["lr"]

    assert final_rate(lambda o: StepLR(o, 1, 0.5), schedule_every="update") == 0.5**6
    assert final_rate(lambda o: StepLR(o, 1, 0.5), schedule_every="epoch") == 0.5**2
    # The second epoch is not better by half, so the rate falls once.
    assert final_rate(lambda o: ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=0.5), data) == 0.1


def test_patience_stops_and_the_best_weights_return() -> None:
    model = nn.Linear(4, 1)
    kept: list[dict[str, Tensor]] = []

    class Rising(nn.MSELoss):
        """The validation loss falls for two epochs and then rises."""

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return super().forward(input, target)
            kept.append(deepcopy(model.state_dict()))
            return torch.tensor([3.0, 2.0, 4.0, 5.0, 6.0][len(kept) - 1])

    data = batches([8])
    result = trainer(model, data, data, loss=Rising(), epochs=50, patience=2).fit()
    assert (result.epochs, result.best_epoch, result.stopped_early) == (4, 2, True)
    assert result.validation == {"loss": 2.0}
    assert_same(dict(model.state_dict()), dict(kept[1]))
    assert not torch.equal(kept[1]["weight"], kept[3]["weight"])
    assert not model.training


def test_the_best_weights_return_after_a_resume_too(tmp_path: Path) -> None:
    """Training goes away from the validation data, whose targets are the opposite: the first epoch is best."""
    opposite = [(x, -y) for x, y in DATA]
    for resume in (False, True):
        trainer(model := network(), DATA, opposite, epochs=3, run_dir=tmp_path, resume=resume).fit()
        assert_same(dict(model.state_dict()), dict(load(tmp_path / "best.pt")["model"]))
    assert load(tmp_path / "best.pt")["progress"]["epoch"] == 1
    assert not torch.equal(model.state_dict()["0.weight"], last(tmp_path)["model"]["0.weight"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast(precision: str) -> None:
    """The layers compute in the lower precision, the weights stay float32, and the loss falls."""
    model = network()
    seen: set[torch.dtype] = set()
    model[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))  # pyright: ignore
    run = trainer(model, batches([32] * 4), epochs=20, precision=precision)
    before = run.evaluate(run.train_loader)["loss"]
    run.fit()
    assert seen == {getattr(torch, precision)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert run.evaluate(run.train_loader)["loss"] < before / 2


def test_the_gradient_is_clipped_at_its_true_scale(tmp_path: Path) -> None:
    """And not at that of the loss, which float16 multiplies by 65536."""
    for precision in ("float32", "float16"):
        trainer(network(), DATA, precision=precision, log_every=1, run_dir=tmp_path / precision).fit()
    norms = [curves(tmp_path / p)["optimizer/gradient_norm"][0][1] for p in ("float32", "float16")]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_a_float16_overflow_skips_the_update_and_lowers_the_scale() -> None:
    model = network()
    schedule = StepLR(optimizer := torch.optim.SGD(model.parameters(), 1e-3), 1, 0.5)
    run = trainer(model, batches([8] * 3), precision="float16", optimizer=optimizer, schedule=schedule)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # far too large: many halvings from fitting
    before = deepcopy(model.state_dict())
    run.fit()
    assert run.scaler.get_scale() == 2.0**37
    assert_same(dict(model.state_dict()), dict(before))
    assert optimizer.param_groups[0]["lr"] == 1e-3


# Interruptions


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Rows with noise drawn at every access, as an augmentation draws it: from python, numpy and torch."""

    def __init__(self, rows: int) -> None:
        self.x, self.y = regression(rows)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import numpy as np

        noise = torch.randn(4) + random.random() + np.random.rand()  # noqa: NPY002
        return self.x[index] + 0.1 * noise, self.y[index]


class Interruption(Exception):
    """What a test raises in the middle of an epoch."""


def raising() -> None:
    raise Interruption


def signalled(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def acting_at(loss: Any, call: int | None, act: Callable[[], None], training: bool) -> Callable[..., Tensor]:
    """The loss, which acts before one of its calls in training, or in validation."""
    calls = itertools.count(1)

    def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.requires_grad == training and next(calls) == call:
            act()
        return loss(prediction, target)

    return mean_squared_error


def train(
    folder: Path,
    *,
    resume: bool = False,
    interrupt: int | None = None,
    act: Callable[[], None] = raising,
    training: bool = True,
    workers: int = 0,
    layers: Any = manualgrad.nn,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> None:
    """A run with all that a resume has to put back: dropout, shuffling, noise, groups, a schedule."""
    torch.set_num_threads(1)
    model = change(network(layers, dropout=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    trainer(
        model,
        DataLoader(Noisy(50), batch_size=8, shuffle=True, num_workers=workers),
        DataLoader(TensorDataset(*regression(20, seed=1)), batch_size=16),
        loss=acting_at(manualgrad.nn.MSELoss(), interrupt, act, training),
        optimizer=optimizer,
        schedule=OneCycleLR(optimizer, 0.01, total_steps=16),
        metrics={"absolute_error": lambda p, t: (p - t).abs().mean()},
        epochs=4,
        accumulate=2,
        clip_norm=1.0,
        run_dir=folder,
        resume=resume,
        checkpoint_every=1,
        log_every=1,
        histogram_every=1,
    ).fit()


def last(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of a run."""
    return load(all_in(folder)[0])


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, optimizer, schedule and random states, to the last bit, and the same curves."""
    assert_same(last(one), last(other))
    assert_same(load(one / "best.pt"), load(other / "best.pt"))
    assert curves(one) == curves(other)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_resumes_exactly(workers: int, tmp_path: Path) -> None:
    """Seven batches make four updates; the 12th batch is in the third update of the second epoch."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, workers=workers)
    assert len(curves(whole)["loss/train"]) == 16
    with pytest.raises(Interruption):
        train(cut, interrupt=12, workers=workers)
    assert last(cut)["progress"]["step"] == 6
    with pytest.raises(Interruption):  # at once again: some points are written twice, and must be there once
        train(cut, interrupt=3, workers=workers, resume=True)
    train(cut, resume=True, workers=workers)
    assert_same_run(whole, cut)


def test_a_run_resumed_from_an_epoch_s_end_is_exact(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    with pytest.raises(Interruption):
        train(cut, interrupt=15)
    assert last(cut)["progress"]["drawn"] == 0
    train(cut, resume=True)
    train(cut, resume=True)  # nothing is left to do, and nothing changes
    assert_same_run(whole, cut)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT is heeded, though the tests may have been started by nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("training", [True, False], ids=["in training", "in validation"])
@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_ends_the_update_and_loses_nothing(sent: int, training: bool, tmp_path: Path) -> None:
    """Twice, the second time at the very first moment after the first."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    for interrupt, resume in ((12 if training else 3, False), (1, True)):
        with pytest.raises(Interrupted, match=rf"stopped by .* after step \d+; to go on: resume {cut}") as caught:
            train(cut, interrupt=interrupt, act=signalled(sent), training=training, resume=resume)
        assert caught.value.status == 128 + sent
        assert last(cut)["progress"]["step"] == caught.value.step
        assert last(cut)["progress"]["trained"] == (not training)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(cut, resume=True)
    assert_same_run(whole, cut)


@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_before_the_first_batch_of_an_epoch(tmp_path: Path) -> None:
    """A signal that reaches loader workers ends them, so the loader raises. The epoch before keeps its points."""

    class Killed:
        epoch = 0

        def __len__(self) -> int:
            return len(DATA)

        def __iter__(self) -> Any:
            self.epoch += 1
            if self.epoch == 2 and not resume:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("a worker was killed")
            yield from DATA

    def run(folder: Path) -> None:
        trainer(network(), Killed(), epochs=3, run_dir=folder, resume=resume, log_every=1).fit()

    resume = True
    run(tmp_path / "whole")
    resume = False
    with pytest.raises(Interrupted):
        run(tmp_path / "cut")
    resume = True
    run(tmp_path / "cut")
    assert_same(last(tmp_path / "whole"), last(tmp_path / "cut"))
    assert curves(tmp_path / "whole") == curves(tmp_path / "cut")


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(tmp_path, interrupt=12, act=twice)
    assert not isinstance(caught.value, Interrupted)
    assert last(tmp_path)["progress"]["step"] == 6
    train(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("layers", "change"),
    [(nn, lambda model: model), (nn, manualgrad.convert), (nn, torch.compile)],
    ids=["torch", "converted", "compiled"],
)
def test_any_model_is_resumed(layers: Any, change: Any, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, layers=layers, change=change)
    with pytest.raises(Interruption):
        train(cut, interrupt=12, layers=layers, change=change)
    train(cut, resume=True, layers=layers, change=change)
    assert_same_run(whole, cut)


def test_a_loader_that_raises_loses_nothing(tmp_path: Path) -> None:
    """The error is told where it happened, and all that was trained before is saved."""

    class Raising(Dataset[tuple[Tensor, Tensor]]):
        broken = True

        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index == 17 and self.broken:
                raise OSError("a broken sector")
            return X[index], Y[index]

    X, Y = regression(24)
    data = Raising()
    with pytest.raises(OSError, match="a broken sector") as caught:
        trainer(network(), DataLoader(data, batch_size=8), run_dir=tmp_path / "cut").fit()
    assert caught.value.__notes__ == ["raised by train_loader, batch 3"]
    assert last(tmp_path / "cut")["progress"]["step"] == 2
    data.broken = False
    for folder, resume in (("cut", True), ("whole", False)):
        trainer(network(), DataLoader(data, batch_size=8), run_dir=tmp_path / folder, resume=resume).fit()
    assert_same(last(tmp_path / "cut")["model"], last(tmp_path / "whole")["model"])


def test_a_loader_that_hangs_is_spoken_of(capfd: pytest.CaptureFixture[str]) -> None:
    def slowly() -> Iterator[tuple[Tensor, Tensor]]:
        yield DATA[0]
        time.sleep(0.5)
        yield DATA[0]

    class Slow:
        __iter__ = staticmethod(slowly)

    trainer(network(), Slow(), loader_warning=0.1).fit()
    warning = "warning: nothing for 0.1 s from train_loader, batch 2: still waiting\n"
    assert capfd.readouterr().err == warning


def test_samplers_and_generators_of_one_s_own_are_seeded() -> None:
    """A sampler with set_epoch is told the epoch; a generator given to the loader is seeded for it."""

    class Told(Sampler[int]):
        epochs: list[int]

        def __init__(self) -> None:
            self.epochs = []

        def __len__(self) -> int:
            return 20

        def __iter__(self) -> Iterator[int]:
            return iter(range(20))

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    told, data = Told(), TensorDataset(*regression(20))
    trainer(network(), DataLoader(data, sampler=told), epochs=3).fit()
    assert told.epochs == [0, 1, 2]

    def weights(seed: int, position: int) -> Tensor:
        generator = torch.Generator().manual_seed(position)  # where the generator stands must not matter
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
        trainer(model := network(), loader, seed=seed, epochs=2).fit()
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(0, position=1), weights(0, position=2))
    assert not torch.equal(weights(0, position=1), weights(1, position=1))


# Checkpoints that do not fit


def run_in(folder: Path, model: nn.Module | None = None, **options: Any) -> Trainer:
    data = options.pop("data", batches([8, 8]))
    return trainer(model or network(), data, batches([8]), run_dir=folder, epochs=2, **options)


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run_in(tmp_path).fit()
    with pytest.raises(CheckpointError, match="holds a run already: resume it or take another folder"):
        run_in(tmp_path)


def test_what_differs_from_the_checkpoint_is_named(tmp_path: Path) -> None:
    run_in(tmp_path).fit()
    wider = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.0), nn.Linear(32, 1))
    cases: list[tuple[str, Callable[[], Trainer]]] = [
        (
            r"step-0000000004.pt is of a different model: 0.weight is 16×4 float32 in the checkpoint"
            r" and 32×4 float32 here \(and 2 more\)",
            lambda: run_in(tmp_path, wider, resume=True),
        ),
        (
            "0.weight is 16×4 float32 in the checkpoint and 16×4 float64 here",
            lambda: run_in(tmp_path, network(dtype=torch.float64), resume=True),
        ),
        (
            "different run: seed is 0 in the checkpoint and 1 here",
            lambda: run_in(tmp_path, seed=1, resume=True),
        ),
        (
            "batches per epoch is 2 in the checkpoint and 3 here",
            lambda: run_in(tmp_path, data=batches([8, 8, 8]), resume=True),
        ),
        (
            "optimizer is 'SGD' in the checkpoint and 'Adam' here",
            lambda: run_in(tmp_path, m := network(), optimizer=torch.optim.Adam(m.parameters()), resume=True),
        ),
    ]
    for message, build in cases:
        with pytest.raises(CheckpointError, match=message):
            build()


def test_damaged_checkpoints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Cut short at any length or with any bit of it changed, one is refused, and the one before it used."""
    run_in(tmp_path).fit()
    newest, before = all_in(tmp_path)
    whole = newest.read_bytes()
    draw = random.Random(0)
    flips = [bytearray(whole) for _ in range(50)]
    for flipped in flips:
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    for damaged in (*(whole[:length] for length in range(0, len(whole), 512)), whole[:-1], *map(bytes, flips)):
        newest.write_bytes(damaged)
        assert run_in(tmp_path, resume=True).progress.step == 2
        assert capfd.readouterr().err.startswith(f"warning: {newest} is not a whole checkpoint (")

    before.write_bytes(b"")
    assert run_in(tmp_path, resume=True).progress.step == 4  # of the best one
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{newest} is not a .*{before} is not a .*best.pt is not a whole"):
        run_in(tmp_path, resume=True)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_checkpoints_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another program, of another version, or with code in them, which does not run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-0000000001.pt"
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match=r"nothing that was saved here"):
        load(path)
    for content, message in (
        ({"format": 1}, rf"not a checkpoint of this trainer \(format 1, not {checkpoint.FORMAT}\)"),
        ([1, 2], r"not a checkpoint of this trainer \(format None"),
        ({"format": checkpoint.FORMAT, "model": Malicious()}, "something else than tensors and plain data"),
    ):
        torch.save(content, path)
        checkpoint._seal(path)
        with pytest.raises(CheckpointError, match=message):
            load(path)
    assert not Path("executed").exists()


def test_the_best_one_is_newer_than_the_last(tmp_path: Path) -> None:
    """As after a kill between the two, or where the last are broken: the same run in the end."""
    train(tmp_path / "whole")
    with pytest.raises(Interruption):
        train(tmp_path / "cut", interrupt=12)
    newest, _ = all_in(tmp_path / "cut")
    newest.write_bytes(b"")
    train(tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run_in(tmp_path, keep_last=3, checkpoint_every=1).fit()
    assert [path.name for path in all_in(tmp_path)] == [f"step-{step:010}.pt" for step in (4, 3, 2)]
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(("events", "step"))} == {
        "best.pt",
        "settings.json",
    }


def test_more_epochs_may_be_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run_in(tmp_path / "more").fit()
    again = trainer(network(), batches([8, 8]), batches([8]), run_dir=tmp_path / "more", epochs=4, resume=True)
    assert again.fit().epochs == 4
    trainer(network(), batches([8, 8]), batches([8]), run_dir=tmp_path / "once", epochs=4).fit()
    assert_same(last(tmp_path / "more")["model"], last(tmp_path / "once")["model"])


# Disks


def test_a_full_disk_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last good checkpoint stays, and when there is room again nothing is missing."""
    train(tmp_path / "whole")
    fsync, full = os.fsync, itertools.count()

    def refusing(handle: int) -> None:
        if 8 <= next(full) < 14:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refusing)
    train(tmp_path / "full")
    assert_same_run(tmp_path / "whole", tmp_path / "full")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 6
    assert all(
        "could not be written (No space left on device); the checkpoints before are whole" in x for x in lines
    )
    assert not [
        path for path in (tmp_path / "full").iterdir() if path.name.startswith(".")
    ]  # nothing half-written


def test_a_full_disk_stops_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(handle: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", refusing)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*Make room, or make .* and resume"):
        run_in(tmp_path, on_disk_error="stop").fit()


def test_curves_wait_for_a_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Points that were half written, or only waited, are there once in the end."""
    train(tmp_path / "whole")
    flush, full = SummaryWriter.flush, itertools.count()

    def refusing(writer: SummaryWriter) -> None:
        flush(writer)
        if next(full) in (3, 4, 9):  # what came before may be in the file already
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SummaryWriter, "flush", refusing)
    train(tmp_path / "full")
    assert_same_run(tmp_path / "whole", tmp_path / "full")
    assert capfd.readouterr().err.count("curves cannot be written (No space left on device): they wait") == 3


# Curves


def test_what_tensorboard_gets(tmp_path: Path) -> None:
    model, data = network(), batches([8] * 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    result = trainer(
        model,
        data,
        batches([6]),
        optimizer=optimizer,
        schedule=LinearLR(optimizer, 1.0, 0.5, total_iters=10),
        metrics={"absolute_error": lambda p, t: (p - t).abs().mean()},
        summary=lambda log, step: {"test_loss": 0.25},
        run_dir=tmp_path,
        epochs=3,
        log_every=2,
        histogram_every=2,
    ).fit()
    events = EventAccumulator(str(tmp_path)).Reload()
    points = curves(tmp_path)
    steps = {tag: [step for step, _ in values] for tag, values in points.items()}
    updates, epochs = [2, 4, 6, 8, 10, 12, 14], [5, 10, 15]
    final = [f"summary/{part}_{name}" for part in ("train", "validation") for name in ("loss", "absolute_error")]
    assert steps == {
        "loss/train": updates,
        "absolute_error/train": updates,
        "optimizer/learning_rate": updates,
        "optimizer/gradient_norm": updates,
        "loss/train_epoch": epochs,
        "absolute_error/train_epoch": epochs,
        "loss/validation_epoch": epochs,
        "absolute_error/validation_epoch": epochs,
        **{tag: [16] for tag in (*final, "summary/test_loss")},
    }
    assert [rate for _, rate in points["optimizer/learning_rate"]][:3] == pytest.approx([0.095, 0.085, 0.075])
    assert points["loss/train_epoch"][-1][1] == pytest.approx(result.train["loss"])
    best = min(value for _, value in points["loss/validation_epoch"])
    assert points["summary/validation_loss"] == [(16, best)] == [(16, pytest.approx(result.validation["loss"]))]
    assert result.summary == {"test_loss": 0.25}

    names = [name for name, _ in model.named_parameters()]
    kinds = ("weights", "weights_gradient")
    assert set(events.Tags()["histograms"]) == {f"{kind}/{name}" for kind in kinds for name in names}
    assert [histogram.step for histogram in events.Histograms("weights/0.weight")] == [10]
    assert events.Histograms("weights/0.weight")[0].histogram_value.num == 64
    assert min(event.value for event in events.Scalars("speed/examples_per_second")) > 0

    card = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| clip norm | None |" in card
    assert "| parameters | 97 |" in card
    assert "Linear(in_features=4, out_features=16" in card
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    assert set(events.Tags()["images"]) == {"gradient_flow", "saved_bytes"}
    assert {"custom_scalars__config__", "saved_bytes/text_summary", "summary/text_summary"} <= set(
        events.Tags()["tensors"]
    )


def test_the_gradient_s_flow_is_by_modules_that_a_picture_can_show() -> None:
    """Norms of parts put together are those of the whole."""
    norms = {f"blocks.{block}.{layer}.weight": 3.0 for block in range(8) for layer in ("mix", "norm", "out")}
    assert _by_layer(norms | {"head.bias": 4.0}) == pytest.approx(
        {**{f"blocks.{i}": 27**0.5 for i in range(8)}, "head": 4.0}
    )
    assert _by_layer({"a.b.weight": 3.0, "a.b.bias": 4.0, "a.c.weight": 1.0}) == {"a.b": 5.0, "a.c": 1.0}
    assert _by_layer({"weight": 3.0}) == {"weight": 3.0}


def test_no_checkpoint_is_ahead_of_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was logged is handed to the system before each checkpoint, lest a kill after it lose points."""
    order: list[str] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **more: (order.append(name), function(*arguments, **more))[1]

    monkeypatch.setattr(FileWriter, "add_summary", recorded("point", FileWriter.add_summary))
    monkeypatch.setattr(SummaryWriter, "flush", recorded("flush", SummaryWriter.flush))
    monkeypatch.setattr(checkpoint.Checkpoints, "save", recorded("save", checkpoint.Checkpoints.save))
    trainer(network(), batches([8] * 4), run_dir=tmp_path, log_every=1, checkpoint_every=1).fit()
    saves = [place for place, name in enumerate(order) if name == "save"]
    assert len(saves) == 5  # before the first update and after each
    assert [order[place - 1] for place in saves] == ["flush"] * 5
    assert all("point" in order[one:next] for one, next in itertools.pairwise(saves))


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer(network(), batches([8]), batches([8])).fit()
    assert list(tmp_path.iterdir()) == []


# NaN and infinity


class Root(nn.Module):
    """√|x|: finite everywhere, its derivative infinite at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


class Reciprocal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / x


class Around(nn.Module):
    """A model whose own code, between its layers, divides by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) / torch.zeros(()))


class RootOfWeight(nn.Module):
    """Adds √w, whose derivative by w is infinite at 0; the gradient goes back through it unharmed."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w.sqrt()


def zeros_before(layer: nn.Module) -> nn.Module:
    """A model that gives `layer` zeros, that come from weights."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Identity(), layer), nn.Linear(3, 1))
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.zero_()
    return model


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1] = math.nan
    return tensor


def broken_data(part: int) -> Pairs:
    """Four good batches and one with a NaN in its input or its target."""
    good = batches([8] * 5)
    bad = [with_nan(tensor) if place == part else tensor for place, tensor in enumerate(good[4])]
    return [*good[:4], (bad[0], bad[1])]


def poisoned() -> nn.Module:
    model = network()
    with torch.no_grad():
        model.get_parameter("3.weight")[0, 2] = math.inf
    return model


@pytest.mark.parametrize(
    ("step", "kind", "layer", "model", "data", "loss"),
    [
        (5, "input data", "", network(), broken_data(0), nn.MSELoss()),
        (5, "target data", "", network(), broken_data(1), nn.MSELoss()),
        (1, "parameter", "3.weight", poisoned(), batches([8]), nn.MSELoss()),
        (1, "output", "1.1", zeros_before(Reciprocal()), batches([8]), nn.MSELoss()),
        (1, "output", "model", Around(), batches([8]), nn.MSELoss()),
        (1, "loss", "loss", network(), batches([8]), lambda p, t: (p - t).mean() + math.inf),
        (1, "gradient", "1.1", zeros_before(Root()), batches([8]), nn.MSELoss()),
        (1, "gradient", "2", nn.Sequential(nn.Linear(4, 1), RootOfWeight(), RootOfWeight()), DATA, nn.MSELoss()),
        (1, "gradient", "loss", network(), batches([8]), lambda p, t: ((p - p) ** 2).sum().sqrt()),
    ],
    ids=[
        "input",
        "target",
        "parameter",
        "output",
        "between layers",
        "loss",
        "gradient",
        "gradient of a weight",
        "gradient of the loss",
    ],
)
def test_what_went_bad_is_named(
    step: int, kind: str, layer: str, model: nn.Module, data: Pairs, loss: Any, tmp_path: Path
) -> None:
    run = trainer(model, data, loss=loss, run_dir=tmp_path)
    before = deepcopy(model.state_dict()) if step == 1 else None
    with pytest.raises(NonFiniteError) as caught:
        run.fit()
    assert (caught.value.step, caught.value.kind, caught.value.layer) == (step, kind, layer)
    assert str(caught.value).startswith(f"step {step} (epoch 1, update {step}): the {kind}")
    if before is not None and kind != "parameter":
        assert_same(dict(model.state_dict()), dict(before))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for parameter in model.parameters():
        assert not parameter._backward_hooks
    assert len(curves(tmp_path)) == 0  # but the file is closed, and can be read


class Normed(nn.Module):
    """With running statistics, which a bad batch would spoil for ever."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(self.norm(input))


def spoiled(*numbers: int) -> Pairs:
    """Six batches, some with a NaN."""
    data = [(x.clone(), y) for x, y in batches([8] * 6)]
    for number in numbers:
        data[number][0][3, 1] = math.nan
    return data


def test_a_bad_update_can_be_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As if the batch had not been; and the file that is left shows it again."""
    result = trainer(model := Normed(), spoiled(2), on_nonfinite="skip", run_dir=tmp_path).fit()
    assert (result.steps, result.left_out) == (5, 1)
    trainer(without := Normed(), [pair for i, pair in enumerate(spoiled()) if i != 2]).fit()
    assert_same(dict(model.state_dict()), dict(without.state_dict()))

    path = tmp_path / "nonfinite-step-3.pt"
    report = "step 3 (epoch 1, update 3): the input data is NaN or infinite"
    where = f"its batches, the weights before it and the random states are in {path}"
    assert capfd.readouterr().err == f"warning: {report}: left out; {where}\n"
    kept = torch.load(path, weights_only=True)
    assert kept["report"] == report
    ((input, target),) = kept["batches"]
    again = Normed()
    again.load_state_dict(kept["model"])
    assert not nn.MSELoss()(again(input), target).isfinite()
    assert all(value.isfinite().all() for value in kept["model"].values())


def test_a_bad_update_can_send_the_weights_back(tmp_path: Path) -> None:
    """To the checkpoint after the second update; the data goes on. Interrupted after that, it resumes exactly."""
    options: dict[str, Any] = {"on_nonfinite": "back_up", "checkpoint_every": 2, "log_every": 1}
    result = trainer(model := Normed(), spoiled(3), run_dir=tmp_path / "whole", **options).fit()
    assert (result.steps, result.left_out) == (4, 1)
    trainer(other := Normed(), [spoiled()[i] for i in (0, 1, 4, 5)]).fit()
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert [step for step, _ in curves(tmp_path / "whole")["loss/train"]] == [1, 2, 3, 4]

    options["loss"] = acting_at(nn.MSELoss(), 5 + 1, raising, True)  # the bad one is run twice
    with pytest.raises(Interruption):
        trainer(Normed(), spoiled(3), run_dir=tmp_path / "cut", **options).fit()
    options["loss"] = acting_at(nn.MSELoss(), None, raising, True)
    trainer(model := Normed(), spoiled(3), run_dir=tmp_path / "cut", resume=True, **options).fit()
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert curves(tmp_path / "cut") == curves(tmp_path / "whole")


def test_too_many_bad_updates_end_it() -> None:
    with pytest.raises(NonFiniteError, match=r"step 1 \(epoch 1, update 3\)"):
        trainer(Normed(), spoiled(0, 1, 2), on_nonfinite="skip", nonfinite_limit=2).fit()


@pytest.mark.parametrize("layers", [nn, manualgrad.nn], ids=["torch", "ours"])
def test_a_rate_that_is_far_too_high_ends_with_a_name(layers: Any) -> None:
    model = network(layers)
    optimizer = torch.optim.SGD(model.parameters(), 1e12)
    with pytest.raises(NonFiniteError, match=r"step \d+ \(.*\): the (output|loss|gradient) .*is NaN or infinite"):
        trainer(model, batches([8] * 20), loss=layers.MSELoss(), optimizer=optimizer, epochs=5).fit()


def test_the_second_run_draws_the_same_dropout() -> None:
    """Only the units that dropout leaves in reach the reciprocal as other than zero."""

    class Trap(nn.Module):
        """Fails for one pattern of dropout in sixteen."""

        def forward(self, x: Tensor) -> Tensor:
            return x / (x[0] != 0).any()

    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), Trap(), nn.Linear(4, 1))
    with pytest.raises(NonFiniteError) as caught:
        trainer(model, batches([8] * 400), optimizer=torch.optim.SGD(model.parameters(), 1e-6)).fit()
    assert (caught.value.kind, caught.value.layer) == ("output", "2")


def test_validation_is_watched_too() -> None:
    with pytest.raises(
        NonFiniteError, match=r"step 1 \(epoch 1, evaluation\): the target data is NaN or infinite"
    ):
        trainer(network(), batches([8]), broken_data(1)).fit()


def test_a_gradient_that_overflows_only_as_a_sum_is_named() -> None:
    """Two batches, each with half of the largest number there is and a bit more."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity())
    data = [(torch.full((1, 1), 3e38), torch.zeros(1, 1))] * 2
    found = find_nonfinite(model, data, lambda x, t: model(x / 1.0).sum() * 0.9)
    assert found == ("gradient", "0")


# What is refused


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize(
    ("message", "build"),
    [
        ("train_loader is empty", lambda m: trainer(m, [])),
        ("train_loader is empty", lambda m: trainer(m, DataLoader(TensorDataset(torch.zeros(0, 4))))),
        ("validation_loader is empty", lambda m: trainer(m, DATA, [])),
        ("train_loader is an iterator", lambda m: trainer(m, iter(DATA))),
        ("no parameter that requires a gradient", lambda m: trainer(nn.ReLU(), DATA, optimizer=sgd(m))),
        ("holds no parameter of the model", lambda m: trainer(m, DATA, optimizer=sgd(network()))),
        ("LBFGS", lambda m: trainer(m, DATA, optimizer=torch.optim.LBFGS(m.parameters()))),
        ("schedule is of another optimizer", lambda m: trainer(m, DATA, schedule=StepLR(sgd(m), 1))),
        ("patience needs a validation_loader", lambda m: trainer(m, DATA, patience=1)),
        (
            "ReduceLROnPlateau needs a validation_loader",
            lambda m: trainer(m, DATA, optimizer=(o := sgd(m)), schedule=ReduceLROnPlateau(o)),
        ),
        ("a metric cannot be called 'loss'", lambda m: trainer(m, DATA, metrics={"loss": nn.MSELoss()})),
        (
            "train_loader has persistent_workers",
            lambda m: trainer(m, DataLoader(Noisy(8), num_workers=1, persistent_workers=True), run_dir="no"),
        ),
    ],
)
def test_parts_that_do_not_belong_together(message: str, build: Callable[[nn.Module], Trainer]) -> None:
    with pytest.raises(ValueError, match=message):
        build(network())


x, y = regression(8)


@pytest.mark.parametrize(
    ("message", "loader", "loss"),
    [
        (r"shape \(8, 1\) and the target \(8,\)", [(x, y[:, 0])], nn.MSELoss()),
        (r"shape \(8, 1\) and the target \(1, 8\)", [(x, y.T)], nn.MSELoss()),
        (r"pairs of tensors, not a tensor of shape \(8, 4\)", [x], nn.MSELoss()),
        (r"pairs of tensors, not a tuple of Tensor, Tensor, int", [(x, y, 1)], nn.MSELoss()),
        (r"pairs of tensors, not a dict", [{"x": x}], nn.MSELoss()),
        (r"a target of shape \(0, 1\), with no examples", [(x[:0], y[:0])], nn.MSELoss()),
        (r"a scalar, the mean over the batch, not of shape \(8, 1\)", [(x, y)], nn.MSELoss(reduction="none")),
        (r"a scalar tensor, not a float", [(x, y)], lambda p, t: 0.5),
        ("depends on no parameter", [(x, y)], lambda p, t: t.mean()),
    ],
)
def test_batches_and_losses_that_are_something_else(message: str, loader: Any, loss: Any) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(network(), loader, loss=loss).fit()


def test_what_the_model_does_not_take_is_told_beside_it() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        trainer(network(), [(x[:, :3], y)]).fit()
    given = (
        "train_loader gave an input of shape (8, 3), float32, on cpu and a target of shape (8, 1), float32, on cpu"
    )
    assert caught.value.__notes__ == [
        f"{given}; the first parameter, 0.weight, is of shape (16, 4), float32, on cpu"
    ]


def test_a_last_batch_of_one_is_refused_at_the_first() -> None:
    """Not after hours, at the end of the epoch; nothing has been trained, and no running statistic has moved."""
    data = TensorDataset(*regression(17))
    model = Normed()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"ends with 1 example, and batch norm needs two: give .* drop_last=True"):
        trainer(model, DataLoader(data, batch_size=8)).fit()
    assert_same(dict(model.state_dict()), dict(before))
    trainer(Normed(), DataLoader(data, batch_size=8, drop_last=True)).fit()
    trainer(network(), DataLoader(data, batch_size=8)).fit()


def test_integer_targets_have_shapes_of_their_own() -> None:
    """Classes of shape (N,) against scores of shape (N, C) are no mistake."""
    model = nn.Linear(4, 8)
    classes = [(x, torch.arange(8) % 8)]
    assert trainer(model, classes, loss=nn.CrossEntropyLoss()).fit().train["loss"] > 0


def test_a_loader_without_a_length_may_turn_out_empty() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ValueError, match="train_loader gave no batches"):
        trainer(network(), DataLoader(Stream())).fit()


def test_sparse_gradients_are_clipped_too() -> None:
    """As the same gradients are when they are dense, which a norm over both kinds has to see."""

    def trained(sparse: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 1))
        words = torch.randint(0, 10, (8, 2))
        trainer(model, [(words, y)], epochs=3, clip_norm=0.1, histogram_every=1).fit()
        return model

    for one, other in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_fit_is_for_once() -> None:
    run = trainer(network(), batches([8]))
    run.fit()
    with pytest.raises(RuntimeError, match="make a new Trainer"):
        run.fit()


# Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("seed", -1),
        ("device", "gpu"),
        ("device", "cuda:99"),
        ("precision", "float64"),
        ("accumulate", 0),
        ("clip_norm", 0.0),
        ("patience", 0),
        ("resume", True),
        ("log_every", 0),
        ("learning_rate", 0.1),
    ],
)
def test_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match="1 validation error"):
        TrainingSettings(**{field: value})


def test_settings_come_from_arguments_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("EPOCHS", "70")
    settings = parse_settings(TrainingSettings, ["--log-every", "3"])
    assert (settings.seed, settings.epochs, settings.log_every) == (0, 10, 3)
    with pytest.raises(ValidationError, match="frozen"):
        TrainingSettings().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--epochs", "-3"], "error: --epochs: Input should be greater than 0 (got -3)"),
        (["--device", "gpu"], "error: --device: Input should be 'auto', 'cpu', 'cuda' or 'cuda:N' (got gpu)"),
        (["--resume"], "error: resume needs run_dir, the folder of the run to continue"),
        (["--epoch", "3"], "error: unrecognized arguments: --epoch 3"),
        (["--epochs"], "error: argument --epochs: expected one argument"),
        (
            ["--epochs", "x", "--seed", "-1"],
            "error: --epochs: Input should be a valid integer, unable to parse string as an integer (got x);"
            " --seed: Input should be greater than or equal to 0 (got -1)",
        ),
    ],
)
def test_a_wrong_argument_gives_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(TrainingSettings, arguments)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", line + "\n")


def test_without_the_extra_the_import_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['tensorboard'] = sys.modules['tqdm'] = None; import manualgrad\n"
        "try: import manualgrad.training\n"
        "except ImportError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "manualgrad.training needs tensorboard, tqdm: pip install 'manualgrad[examples]'\n"
