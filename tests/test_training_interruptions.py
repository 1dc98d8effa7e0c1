"""Interrupted runs, compared with uninterrupted ones; checkpoint files; full disks."""

import errno
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from training_helpers import (
    DATA,
    Interruption,
    assert_same,
    assert_same_run,
    batches,
    curves,
    network,
    newest,
    regression,
    run_in,
    send_signal,
    train,
    trainer,
)

import manualgrad.nn
from manualgrad.training import (
    CheckpointError,
    Interrupted,
    Trainer,
    checkpoint,
)
from manualgrad.training.checkpoint import list_checkpoints, load

torch.set_num_threads(1)


# Interruptions


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_resumes_exactly(workers: int, tmp_path: Path) -> None:
    """Seven batches make four updates; the 12th batch is in the third update of the second epoch."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, workers=workers)
    assert len(curves(whole)["loss/train"]) == 16
    with pytest.raises(Interruption):
        train(cut, at_call=12, workers=workers)
    assert newest(cut)["trainer_state"]["global_step"] == 6
    with pytest.raises(Interruption):  # some points are logged twice, and must be shown once
        train(cut, at_call=3, workers=workers, resume=True)
    train(cut, resume=True, workers=workers)
    assert_same_run(whole, cut)


def test_a_run_resumed_between_epochs_is_exact(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    with pytest.raises(Interruption):
        train(cut, at_call=15)
    assert newest(cut)["trainer_state"]["updates_drawn"] == 0
    train(cut, resume=True)
    train(cut, resume=True)  # nothing is left to train, and nothing changes
    assert_same_run(whole, cut)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Handle SIGINT, even if the tests were started by nohup."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("training", [True, False], ids=["in training", "in validation"])
@pytest.mark.usefixtures("ctrl_c")
def test_a_run_stopped_by_a_signal_resumes_exactly(sent: int, training: bool, tmp_path: Path) -> None:
    """Stopped twice, the second time at the first update after resuming."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for call, resume in ((12 if training else 3, False), (1, True)):
        with pytest.raises(
            Interrupted, match=rf"stopped by .* after step \d+; to continue: resume {cut}"
        ) as caught:
            train(cut, at_call=call, action=send_signal(sent), training=training, resume=resume)
        assert caught.value.status == 128 + sent
        assert newest(cut)["trainer_state"]["global_step"] == caught.value.step
        assert newest(cut)["trainer_state"]["epoch_trained"] == (not training)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(cut, resume=True)
    assert_same_run(whole, cut)


@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_before_the_first_batch_of_an_epoch(tmp_path: Path) -> None:
    """A signal ends the loader's workers too, so the loader raises. The points of the previous epoch are kept."""

    class StoppedLoader:
        def __init__(self, stop: bool) -> None:
            self.stop, self.epoch = stop, 0

        def __len__(self) -> int:
            return len(DATA)

        def __iter__(self) -> Any:
            self.epoch += 1
            if self.epoch == 2 and self.stop:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("a worker was killed")
            yield from DATA

    def run(folder: str, stop: bool = False) -> None:
        options: dict[str, Any] = {"max_epochs": 3, "log_every_n_steps": 1, "resume_from_checkpoint": True}
        trainer(network(), StoppedLoader(stop), run_dir=tmp_path / folder, **options).fit()

    run("whole")
    with pytest.raises(Interrupted):
        run("cut", stop=True)
    run("cut")
    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "cut"))
    assert curves(tmp_path / "whole") == curves(tmp_path / "cut")


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_stops_immediately(tmp_path: Path) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(tmp_path, at_call=12, action=twice)
    assert not isinstance(caught.value, Interrupted)
    assert newest(tmp_path)["trainer_state"]["global_step"] == 6
    train(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("layers", "change"),
    [(nn, lambda model: model), (nn, manualgrad.convert), (nn, torch.compile)],
    ids=["torch", "converted", "compiled"],
)
def test_every_kind_of_model_resumes_exactly(layers: Any, change: Any, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, layers=layers, change=change)
    with pytest.raises(Interruption):
        train(cut, at_call=12, layers=layers, change=change)
    train(cut, resume=True, layers=layers, change=change)
    assert_same_run(whole, cut)


def test_after_an_error_of_the_loader_the_run_resumes_exactly(tmp_path: Path) -> None:
    """The error gets a note with the batch, and a checkpoint is saved."""

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
    assert newest(tmp_path / "cut")["trainer_state"]["global_step"] == 2
    data.broken = False
    for folder, resume in (("cut", True), ("whole", False)):
        trainer(
            network(), DataLoader(data, batch_size=8), run_dir=tmp_path / folder, resume_from_checkpoint=resume
        ).fit()
    assert_same(newest(tmp_path / "cut")["model"], newest(tmp_path / "whole")["model"])


def test_a_slow_loader_gives_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    def slowly() -> Iterator[tuple[Tensor, Tensor]]:
        yield DATA[0]
        time.sleep(0.5)
        yield DATA[0]

    class Slow:
        __iter__ = staticmethod(slowly)

    trainer(network(), Slow(), loader_warning_seconds=0.1).fit()
    warning = "warning: no batch for 0.1 s from train_loader, batch 2: still waiting\n"
    assert capfd.readouterr().err == warning


def test_custom_samplers_and_generators_are_seeded() -> None:
    """set_epoch of a sampler is called, and the generator of a loader is seeded."""

    class EpochSampler(Sampler[int]):
        epochs: list[int]

        def __init__(self) -> None:
            self.epochs = []

        def __len__(self) -> int:
            return 20

        def __iter__(self) -> Iterator[int]:
            return iter(range(20))

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    sampler, data = EpochSampler(), TensorDataset(*regression(20))
    trainer(network(), DataLoader(data, sampler=sampler), max_epochs=3).fit()
    assert sampler.epochs == [0, 1, 2]

    def weights(seed: int, state: int) -> Tensor:
        generator = torch.Generator().manual_seed(state)  # must not matter
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
        trainer(model := network(), loader, seed=seed, max_epochs=2).fit()
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(0, state=1), weights(0, state=2))
    assert not torch.equal(weights(0, state=1), weights(1, state=1))


# Checkpoint files


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run_in(tmp_path).fit()
    with pytest.raises(CheckpointError, match="holds a run already: resume it or take another folder"):
        run_in(tmp_path)


def test_a_difference_from_the_checkpoint_is_named(tmp_path: Path) -> None:
    run_in(tmp_path).fit()
    wider = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.0), nn.Linear(32, 1))
    cases: list[tuple[str, Callable[[], Trainer]]] = [
        (
            r"step-0000000004.pt is of a different model: 0.weight is 16×4 float32 in the checkpoint"
            r" and 32×4 float32 here \(and 2 more\)",
            lambda: run_in(tmp_path, wider, resume_from_checkpoint=True),
        ),
        (
            "0.weight is 16×4 float32 in the checkpoint and 16×4 float64 here",
            lambda: run_in(tmp_path, network(dtype=torch.float64), resume_from_checkpoint=True),
        ),
        (
            "different run: seed is 0 in the checkpoint and 1 here",
            lambda: run_in(tmp_path, seed=1, resume_from_checkpoint=True),
        ),
        (
            "batches per epoch is 2 in the checkpoint and 3 here",
            lambda: run_in(tmp_path, data=batches([8, 8, 8]), resume_from_checkpoint=True),
        ),
        (
            "optimizer is 'SGD' in the checkpoint and 'Adam' here",
            lambda: run_in(
                tmp_path, m := network(), optimizer=torch.optim.Adam(m.parameters()), resume_from_checkpoint=True
            ),
        ),
    ]
    for message, build in cases:
        with pytest.raises(CheckpointError, match=message):
            build()


def test_damaged_checkpoints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A checkpoint truncated anywhere, or with any bit flipped, is refused, and the previous one is used."""
    run_in(tmp_path).fit()
    path, previous = list_checkpoints(tmp_path)
    intact = path.read_bytes()
    generator = random.Random(0)
    flips = [bytearray(intact) for _ in range(50)]
    for flipped in flips:
        flipped[generator.randrange(len(intact))] ^= 1 << generator.randrange(8)
    for damaged in (*(intact[:n] for n in range(0, len(intact), 512)), intact[:-1], *map(bytes, flips)):
        path.write_bytes(damaged)
        assert run_in(tmp_path, resume_from_checkpoint=True).state.global_step == 2
        assert capfd.readouterr().err.startswith(f"warning: {path} is not an intact checkpoint (")

    previous.write_bytes(b"")
    assert run_in(tmp_path, resume_from_checkpoint=True).state.global_step == 4  # from best.pt
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=rf"{path} is not an .*{previous} is not an .*best.pt is not an intact"
    ):
        run_in(tmp_path, resume_from_checkpoint=True)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_files_that_are_no_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of another program or version, or with code, which is not executed."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-0000000001.pt"
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match=r"written by another program"):
        load(path)
    for content, message in (
        ({"format": 1}, rf"not a checkpoint of this trainer \(format 1, not {checkpoint.FORMAT}\)"),
        ([1, 2], r"not a checkpoint of this trainer \(format None"),
        ({"format": checkpoint.FORMAT, "model": Malicious()}, "more than tensors and plain data"),
    ):
        torch.save(content, path)
        checkpoint._append_checksum(path)
        with pytest.raises(CheckpointError, match=message):
            load(path)
    assert not Path("executed").exists()


def test_best_pt_may_be_newer_than_the_newest_intact_checkpoint(tmp_path: Path) -> None:
    """As after a kill between writing the two, or if the newest is damaged: the run ends the same."""
    train(tmp_path / "whole")
    with pytest.raises(Interruption):
        train(tmp_path / "cut", at_call=12)
    path, _ = list_checkpoints(tmp_path / "cut")
    path.write_bytes(b"")
    train(tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run_in(tmp_path, keep_last=3, checkpoint_every_n_steps=1).fit()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:010}.pt" for step in (4, 3, 2)]
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(("events", "step"))} == {
        "best.pt",
        "settings.json",
    }


def test_a_resumed_run_may_have_more_epochs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run_in(tmp_path / "more").fit()
    again = trainer(
        network(),
        batches([8, 8]),
        batches([8]),
        run_dir=tmp_path / "more",
        max_epochs=4,
        resume_from_checkpoint=True,
    )
    assert again.fit().epochs == 4
    trainer(network(), batches([8, 8]), batches([8]), run_dir=tmp_path / "once", max_epochs=4).fit()
    assert_same(newest(tmp_path / "more")["model"], newest(tmp_path / "once")["model"])


# Full disks


def test_training_continues_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The previous checkpoint stays intact. When there is room again nothing is missing."""
    train(tmp_path / "whole")
    fsync, calls = os.fsync, itertools.count()

    def failing(handle: int) -> None:
        if 8 <= next(calls) < 14:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    train(tmp_path / "full")
    assert_same_run(tmp_path / "whole", tmp_path / "full")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 6
    assert all(
        "could not be written (No space left on device); the previous checkpoints are intact" in x for x in lines
    )
    assert not [path for path in (tmp_path / "full").iterdir() if path.name.startswith(".")]  # no temporary files


def test_a_full_disk_stops_training_if_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(handle: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*Make room, or make .* and resume"):
        run_in(tmp_path, on_disk_error="stop").fit()


def test_curves_are_complete_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Points that were partly written, or stayed in memory, are there once."""
    train(tmp_path / "whole")
    flush, calls = SummaryWriter.flush, itertools.count()

    def failing(writer: SummaryWriter) -> None:
        flush(writer)
        if next(calls) in (3, 4, 9):  # the points may be in the file already
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SummaryWriter, "flush", failing)
    train(tmp_path / "full")
    assert_same_run(tmp_path / "whole", tmp_path / "full")
    assert (
        capfd.readouterr().err.count(
            "curves cannot be written (No space left on device): the points stay in memory"
        )
        == 3
    )
