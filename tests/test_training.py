"""The training loop against hand-written loops; its arguments and settings."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset
from training_helpers import (
    DATA,
    BatchNormNetwork,
    NoisyRows,
    assert_same,
    batches,
    curves,
    network,
    newest,
    regression,
    sgd,
    trainer,
)

import manualgrad.nn
from manualgrad.training import (
    Trainer,
    TrainingSettings,
    parse_settings,
)
from manualgrad.training.checkpoint import load

torch.set_num_threads(1)


# The loop


@pytest.mark.parametrize("layers", [nn, manualgrad.nn], ids=["torch", "manualgrad"])
def test_training_equals_a_hand_written_loop(layers: Any) -> None:
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

    adamw = torch.optim.AdamW(model.parameters(), 0.01)
    result = trainer(
        model,
        data,
        loss=layers.MSELoss(),
        optimizer=adamw,
        lr_scheduler=OneCycleLR(adamw, 0.01, total_steps=12),
        max_epochs=3,
        max_grad_norm=0.5,
    ).fit()
    assert_same(dict(model.state_dict()), dict(expected.state_dict()))
    assert (result.epochs, result.global_step, result.best_epoch, result.stopped_early) == (3, 12, 3, False)


@pytest.mark.parametrize("layers", [nn, manualgrad.nn], ids=["torch", "manualgrad"])
def test_accumulated_batches_have_the_gradient_of_one_batch(layers: Any) -> None:
    """Batches of different sizes too, and the last group, which has fewer batches."""
    pieces = batches([5, 3, 1, 4, 2], dtype=torch.float64)
    whole = [tuple(map(torch.cat, zip(*group, strict=True))) for group in (pieces[:3], pieces[3:])]
    model_pieces, model_whole = network(layers, dtype=torch.float64), network(layers, dtype=torch.float64)
    from_pieces = trainer(
        model_pieces, pieces, max_epochs=2, accumulate_grad_batches=3, loss=layers.MSELoss()
    ).fit()
    from_whole = trainer(model_whole, whole, max_epochs=2, loss=layers.MSELoss()).fit()
    assert from_pieces.global_step == from_whole.global_step == 4
    assert from_pieces.train["loss"] == pytest.approx(from_whole.train["loss"], rel=1e-12)
    for name, value in model_pieces.state_dict().items():
        torch.testing.assert_close(value, model_whole.state_dict()[name], rtol=1e-12, atol=1e-14)


def test_losses_and_metrics_are_means_over_examples() -> None:
    data = batches([7, 2, 1])
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    model = network(dropout=0.5)
    run = trainer(model, data, metrics={"absolute_error": lambda p, t: (p - t).abs().mean()})
    model.train()
    means = run.evaluate(data)
    assert model.training
    model.eval()
    with torch.no_grad():
        error = model(x) - y
    assert means == pytest.approx(
        {"loss": error.square().mean().item(), "absolute_error": error.abs().mean().item()}
    )


def test_schedulers_step_by_update_or_epoch() -> None:
    model, data = network(), batches([8, 8, 8])

    def final_rate(make_scheduler: Callable[[Any], Any], validation: Any = None, **options: Any) -> float:
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        trainer(
            model,
            data,
            validation,
            optimizer=optimizer,
            lr_scheduler=make_scheduler(optimizer),
            max_epochs=2,
            max_grad_norm=1e-9,
            **options,
        ).fit()
        return optimizer.param_groups[0]["lr"]

    assert final_rate(lambda o: StepLR(o, 1, 0.5), lr_scheduler_interval="step") == 0.5**6
    assert final_rate(lambda o: StepLR(o, 1, 0.5), lr_scheduler_interval="epoch") == 0.5**2
    # The second epoch is not better by half, so the rate is lowered once.
    assert final_rate(lambda o: ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=0.5), data) == 0.1


def test_patience_stops_training_and_the_best_weights_are_loaded() -> None:
    model = nn.Linear(4, 1)
    states: list[dict[str, Tensor]] = []

    class FallingThenRising(nn.MSELoss):
        """The validation loss falls for two epochs and then rises."""

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return super().forward(input, target)
            states.append(deepcopy(model.state_dict()))
            return torch.tensor([3.0, 2.0, 4.0, 5.0, 6.0][len(states) - 1])

    data = batches([8])
    result = trainer(model, data, data, loss=FallingThenRising(), max_epochs=50, patience=2).fit()
    assert (result.epochs, result.best_epoch, result.stopped_early) == (4, 2, True)
    assert result.validation == {"loss": 2.0}
    assert_same(dict(model.state_dict()), dict(states[1]))
    assert not torch.equal(states[1]["weight"], states[3]["weight"])
    assert not model.training


def test_the_best_weights_are_loaded_after_a_resume(tmp_path: Path) -> None:
    """The validation targets are the opposite of the training targets, so the first epoch is best."""
    opposite = [(x, -y) for x, y in DATA]
    for resume in (False, True):
        trainer(
            model := network(), DATA, opposite, max_epochs=3, run_dir=tmp_path, resume_from_checkpoint=resume
        ).fit()
        assert_same(dict(model.state_dict()), dict(load(tmp_path / "best.pt")["model"]))
    assert load(tmp_path / "best.pt")["trainer_state"]["epoch"] == 1
    assert not torch.equal(model.state_dict()["0.weight"], newest(tmp_path)["model"]["0.weight"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast(precision: str) -> None:
    """The layers compute in the lower precision, the weights stay float32, and the loss falls."""
    model = network()
    seen: set[torch.dtype] = set()
    model[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))  # pyright: ignore
    run = trainer(model, batches([32] * 4), max_epochs=20, precision=precision)
    before = run.evaluate(run.train_loader)["loss"]
    run.fit()
    assert seen == {getattr(torch, precision)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert run.evaluate(run.train_loader)["loss"] < before / 2


def test_the_gradient_is_unscaled_before_clipping(tmp_path: Path) -> None:
    """With float16 the loss is multiplied by 65536."""
    for precision in ("float32", "float16"):
        trainer(network(), DATA, precision=precision, log_every_n_steps=1, run_dir=tmp_path / precision).fit()
    norms = [curves(tmp_path / p)["optimizer/gradient_norm"][0][1] for p in ("float32", "float16")]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_a_float16_overflow_skips_the_update_and_lowers_the_scale() -> None:
    model = network()
    schedule = StepLR(optimizer := torch.optim.SGD(model.parameters(), 1e-3), 1, 0.5)
    run = trainer(model, batches([8] * 3), precision="float16", optimizer=optimizer, lr_scheduler=schedule)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows in every update
    before = deepcopy(model.state_dict())
    run.fit()
    assert run.scaler.get_scale() == 2.0**37
    assert_same(dict(model.state_dict()), dict(before))
    assert optimizer.param_groups[0]["lr"] == 1e-3


# Arguments and batches


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
        ("lr_scheduler has another optimizer", lambda m: trainer(m, DATA, lr_scheduler=StepLR(sgd(m), 1))),
        ("patience needs a validation_loader", lambda m: trainer(m, DATA, patience=1)),
        (
            "ReduceLROnPlateau needs a validation_loader",
            lambda m: trainer(m, DATA, optimizer=(o := sgd(m)), lr_scheduler=ReduceLROnPlateau(o)),
        ),
        ("a metric cannot have the name 'loss'", lambda m: trainer(m, DATA, metrics={"loss": nn.MSELoss()})),
        (
            "train_loader has persistent_workers",
            lambda m: trainer(m, DataLoader(NoisyRows(8), num_workers=1, persistent_workers=True), run_dir="no"),
        ),
    ],
)
def test_arguments_that_do_not_fit_together(message: str, build: Callable[[nn.Module], Trainer]) -> None:
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
def test_wrong_batches_and_losses(message: str, loader: Any, loss: Any) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(network(), loader, loss=loss).fit()


def test_an_error_of_the_model_has_a_note_with_the_shapes() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        trainer(network(), [(x[:, :3], y)]).fit()
    batch = (
        "train_loader gave an input of shape (8, 3), float32, on cpu and a target of shape (8, 1), float32, on cpu"
    )
    assert caught.value.__notes__ == [
        f"{batch}; the first parameter, 0.weight, is of shape (16, 4), float32, on cpu"
    ]


def test_a_last_batch_of_one_is_refused_before_training() -> None:
    """Weights and running statistics do not change."""
    data = TensorDataset(*regression(17))
    model = BatchNormNetwork()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"ends with 1 example, and batch norm needs two: set drop_last=True"):
        trainer(model, DataLoader(data, batch_size=8)).fit()
    assert_same(dict(model.state_dict()), dict(before))
    trainer(BatchNormNetwork(), DataLoader(data, batch_size=8, drop_last=True)).fit()
    trainer(network(), DataLoader(data, batch_size=8)).fit()


def test_integer_targets_may_have_another_shape() -> None:
    """Classes have shape (N,), scores (N, C)."""
    model = nn.Linear(4, 8)
    classes = [(x, torch.arange(8) % 8)]
    assert trainer(model, classes, loss=nn.CrossEntropyLoss()).fit().train["loss"] > 0


def test_an_empty_loader_without_a_length_is_refused() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ValueError, match="train_loader gave no batches"):
        trainer(network(), DataLoader(Stream())).fit()


def test_sparse_gradients_are_clipped_like_dense_ones() -> None:
    def trained(sparse: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 1))
        words = torch.randint(0, 10, (8, 2))
        trainer(model, [(words, y)], max_epochs=3, max_grad_norm=0.1, histograms_every_n_epochs=1).fit()
        return model

    for parameter, expected in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


def test_fit_can_be_called_once() -> None:
    run = trainer(network(), batches([8]))
    run.fit()
    with pytest.raises(RuntimeError, match="make a new Trainer"):
        run.fit()


# Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_epochs", 0),
        ("seed", -1),
        ("device", "gpu"),
        ("device", "cuda:99"),
        ("precision", "float64"),
        ("accumulate_grad_batches", 0),
        ("max_grad_norm", 0.0),
        ("patience", 0),
        ("resume_from_checkpoint", True),
        ("log_every_n_steps", 0),
        ("learning_rate", 0.1),
    ],
)
def test_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match="1 validation error"):
        TrainingSettings(**{field: value})


def test_environment_variables_do_not_change_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("MAX_EPOCHS", "70")
    settings = parse_settings(TrainingSettings, ["--log-every-n-steps", "3"])
    assert (settings.seed, settings.max_epochs, settings.log_every_n_steps) == (0, 10, 3)
    with pytest.raises(ValidationError, match="frozen"):
        TrainingSettings().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--max-epochs", "-3"], "error: --max-epochs: Input should be greater than 0 (got -3)"),
        (["--device", "gpu"], "error: --device: Input should be 'auto', 'cpu', 'cuda' or 'cuda:N' (got gpu)"),
        (
            ["--resume-from-checkpoint"],
            "error: resume_from_checkpoint needs run_dir, the folder of the run to continue",
        ),
        (["--epoch", "3"], "error: unrecognized arguments: --epoch 3"),
        (["--max-epochs"], "error: argument --max-epochs: expected one argument"),
        (
            ["--max-epochs", "x", "--seed", "-1"],
            "error: --max-epochs: Input should be a valid integer, unable to parse string as an integer (got x);"
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


def test_the_import_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['tensorboard'] = sys.modules['tqdm'] = None; import manualgrad\n"
        "try: import manualgrad.training\n"
        "except ImportError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "manualgrad.training needs tensorboard, tqdm: pip install 'manualgrad[training]'\n"
