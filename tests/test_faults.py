"""scripts/faults.py: each check in its shortest form, and that it detects failures."""

from collections.abc import Callable
from pathlib import Path

import fault_job
import faults
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from manualgrad.training import checkpoint

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a single core


SCRIPT_ONLY = (faults.long, faults.models)  # slow; test_training_interruptions.py tests models too
CHECKS = [check for check in faults.CHECKS if check not in SCRIPT_ONLY]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_passes(check: Callable[..., None], tmp_path: Path) -> None:
    row = faults.run_check(check, faults.Settings(short=True).resolved(), tmp_path)
    assert row.failures == []
    assert row.counts
    assert str(row).endswith("| passed |")


def change_last_bit_of_weight(run: fault_job.Run) -> None:
    newest = run.checkpoints()[-1]
    payload = checkpoint.load(newest)
    weight = payload["model"]["1.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1.0))
    checkpoint.save(newest, payload)


def leave_temporary_file(run: fault_job.Run) -> None:
    (run.folder / ".step-0000000001.pt.tmp").touch()


def repeat_point(run: fault_job.Run) -> None:
    with SummaryWriter(run.folder) as writer:
        writer.add_scalar("loss/train", 1.0, 40)


def delete_curves(run: fault_job.Run) -> None:
    for path in run.folder.glob("events.*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_last_bit_of_weight, r"1 differences .* \['newest'\]\['model'\]\['1.weight'\]"),
        (leave_temporary_file, r"1 differences .* \['files'\]\['.step-0000000001.pt.tmp'\] is True, not 'absent'"),
        (repeat_point, "TensorBoard shows loss/train at 40 twice"),
        (delete_curves, r"\d{3} differences .* is 'absent', not"),
    ],
)
def test_differences_are_detected(change: Callable[[fault_job.Run], None], message: str, tmp_path: Path) -> None:
    expected, run = (fault_job.undisturbed_run(tmp_path / name, workers=0) for name in ("expected", "run"))
    run.expect_same_outcome(expected)
    change(run)
    with pytest.raises(fault_job.Failure, match=message):
        run.expect_same_outcome(expected)


def test_wait_for_batch(tmp_path: Path) -> None:
    """It returns inside of the batch, and returns False for a run that ends before."""
    run = fault_job.Run(tmp_path / "run", workers=0, pause=0.2, max_epochs=1, rows=80).start()
    assert run.wait_for_batch(3, 0.5)
    run.kill()
    assert run.batches() == 3
    run.options["pause"] = 0
    assert not run.start().wait_for_batch(6, 0.5)
    assert run.finish().batches() <= 5


def test_timings_of_alternating_runs_include_writing(tmp_path: Path) -> None:
    options = {"rows": 320, "batch_size": 16, "max_epochs": 3, "accumulate_grad_batches": 1}
    job = fault_job.Job(run_dir=tmp_path, progress_bar=False, **options)  # pyright: ignore[reportArgumentType]
    logged, bare = faults.alternate(job, job.model_copy(update={"run_dir": None}))
    assert [len(times) for times in (logged.blocks, bare.blocks, logged.ends, bare.ends)] == [6, 6, 2, 2]
    assert sum(logged.ends) > sum(bare.ends) > 0


def test_an_error_in_an_alternating_run_is_raised(tmp_path: Path) -> None:
    job = fault_job.Job(run_dir=tmp_path, progress_bar=False, rows=320, batch_size=16, max_epochs=1)
    (tmp_path / "step-0000000001.pt").touch()
    with pytest.raises(checkpoint.CheckpointError, match="holds a run already"):
        faults.alternate(job, job.model_copy(update={"run_dir": None}))


def test_a_failure_gives_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def kill(row: faults.Row, settings: faults.Settings, folder: Path) -> None:
        """Nothing goes wrong."""
        for number in (1, 2, 3):
            with row.trial("trials", f"number {number}"):
                fault_job.expect(number == 1, "a | b\nc")

    monkeypatch.setattr(faults, "CHECKS", (kill,))
    monkeypatch.setattr("sys.argv", ["faults.py", "--only", "kill", "--seed", "7"])
    with pytest.raises(SystemExit) as caught:
        faults.main()
    assert caught.value.code == 1
    output = capsys.readouterr().out
    assert output.startswith("seed 7, torch ")
    result = r"**failed** trials (number 2): Failure: a \| b c (and 1 more)"
    assert output.endswith(f"| Nothing goes wrong. | 3 trials | {result} |\n")


def test_wrong_options_give_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["faults.py", "--only", "fire"])
    with pytest.raises(SystemExit) as caught:
        faults.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --only: Input should be 'kill', 'signals', ")
    assert error.count("\n") == 1
