"""scripts/faults.py: each promise in its shortest form; and what breaks one is seen."""

from collections.abc import Callable
from pathlib import Path

import faults
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from manualgrad.training import checkpoint

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a single core


ELSEWHERE = (faults.long, faults.models)  # time and memory are for the script; of models test_training has a word
TRIED = [promise for promise in faults.PROMISES if promise not in ELSEWHERE]


@pytest.mark.parametrize("promise", TRIED, ids=lambda promise: promise.__name__)
def test_the_promise_is_kept(promise: Callable[..., None], tmp_path: Path) -> None:
    row = faults.try_out(promise, faults.Settings(short=True).resolved(), tmp_path)
    assert row.broken == []
    assert row.done
    assert str(row).endswith("| kept |")


def change_a_weight(run: faults.Run) -> None:
    """By the last bit."""
    newest = run.checkpoints()[-1]
    payload = checkpoint.load(newest)
    weight = payload["model"]["1.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1.0))
    checkpoint.save(newest, payload)


def leave_a_file(run: faults.Run) -> None:
    (run.folder / ".step-0000000001.pt.tmp").touch()


def write_a_point(run: faults.Run) -> None:
    """Once more."""
    with SummaryWriter(run.folder) as writer:
        writer.add_scalar("loss/train", 1.0, 40)


def lose_the_curves(run: faults.Run) -> None:
    for path in run.folder.glob("events.*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_a_weight, r"1 of \d+ things differ .* \['newest'\]\['model'\]\['1.weight'\]"),
        (leave_a_file, r"1 of \d+ things differ .* \['files'\]\['.step-0000000001.pt.tmp'\]: True, not 'absent'"),
        (write_a_point, "TensorBoard shows loss/train at 40 twice"),
        (lose_the_curves, r"\d{3} of \d+ things differ .*: 'absent', not"),
    ],
)
def test_a_difference_is_seen(change: Callable[[faults.Run], None], told: str, tmp_path: Path) -> None:
    quiet, run = (faults.quiet_run(tmp_path / name, workers=0) for name in ("quiet", "run"))
    run.expect_same_end(quiet)
    change(run)
    with pytest.raises(faults.Broken, match=told):
        run.expect_same_end(quiet)


def test_a_run_is_reached_within_a_batch(tmp_path: Path) -> None:
    """Which it is killed in, however long it took to come there; and a run that ends before is seen to."""
    run = faults.Run(tmp_path / "run", workers=0, pause=0.2, epochs=1, rows=80).start()
    assert run.reach(3, 0.5)
    run.kill()
    assert run.batches() == 3
    run.options["pause"] = 0
    assert not run.start().reach(6, 0.5)
    assert run.end().batches() <= 5


def test_runs_take_turns_and_what_is_written_is_counted(tmp_path: Path) -> None:
    job = faults.Job(run_dir=tmp_path, progress=False, rows=320, batch_size=16, epochs=3, accumulate=1)
    written, bare = faults.in_turns(job, job.model_copy(update={"run_dir": None}), 2)
    assert [len(times) for times in (written.blocks, bare.blocks, written.ends, bare.ends)] == [6, 6, 2, 2]
    assert sum(written.ends) > sum(bare.ends) > 0


def test_an_error_in_one_of_two_runs_is_raised(tmp_path: Path) -> None:
    job = faults.Job(run_dir=tmp_path, progress=False, rows=320, batch_size=16, epochs=1, accumulate=1)
    (tmp_path / "step-0000000001.pt").touch()
    with pytest.raises(checkpoint.CheckpointError, match="holds a run already"):
        faults.in_turns(job, job.model_copy(update={"run_dir": None}), 2)


def test_a_broken_promise_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill(row: faults.Row, settings: faults.Settings, place: Path) -> None:
        """Nothing goes wrong."""
        for number in (1, 2, 3):
            with row.trial("trials", f"number {number}"):
                faults.expect(number == 1, "a | b\nc")

    monkeypatch.setattr(faults, "PROMISES", (kill,))
    monkeypatch.setattr("sys.argv", ["faults.py", "--only", "kill", "--seed", "7"])
    with pytest.raises(SystemExit) as caught:
        faults.main()
    assert caught.value.code == 1
    output = capsys.readouterr().out
    assert output.startswith("seed 7, torch ")
    result = r"**broken** trials (number 2): Broken: a \| b c (and 1 more)"
    assert output.endswith(f"| Nothing goes wrong. | 3 trials | {result} |\n")


def test_wrong_options_give_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["faults.py", "--only", "fire"])
    with pytest.raises(SystemExit) as caught:
        faults.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --only: Input should be 'kill', 'signals', ")
    assert error.count("\n") == 1
