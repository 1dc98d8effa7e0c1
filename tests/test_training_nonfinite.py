"""NaN and infinity in training: the source is named, the update is skipped or rolled back."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_helpers import (
    DATA,
    BatchNormNetwork,
    Interruption,
    Pairs,
    assert_same,
    batches,
    curves,
    interrupt,
    loss_with_action,
    network,
    trainer,
)

import manualgrad.nn
from manualgrad.training import (
    NonFiniteError,
)
from manualgrad.training.nonfinite import find_nonfinite

torch.set_num_threads(1)


class Root(nn.Module):
    """√|x| is finite everywhere. Its derivative is infinite at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


class Reciprocal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / x


class DividesBetweenLayers(nn.Module):
    """Divides by zero between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) / torch.zeros(()))


class RootOfWeight(nn.Module):
    """Adds √w. The derivative by w is infinite at 0, that by the input is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w.sqrt()


def zeros_before(layer: nn.Module) -> nn.Module:
    """Return a model in which `layer` gets zeros that depend on weights."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Identity(), layer), nn.Linear(3, 1))
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.zero_()
    return model


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1] = math.nan
    return tensor


def batches_with_nan(part: int) -> Pairs:
    """Return five batches. The last one has a NaN in its input (part 0) or target (part 1)."""
    good = batches([8] * 5)
    bad = [with_nan(tensor) if place == part else tensor for place, tensor in enumerate(good[4])]
    return [*good[:4], (bad[0], bad[1])]


def network_with_inf() -> nn.Module:
    model = network()
    with torch.no_grad():
        model.get_parameter("3.weight")[0, 2] = math.inf
    return model


@pytest.mark.parametrize(
    ("step", "kind", "layer", "model", "data", "loss"),
    [
        (5, "input data", "", network(), batches_with_nan(0), nn.MSELoss()),
        (5, "target data", "", network(), batches_with_nan(1), nn.MSELoss()),
        (1, "parameter", "3.weight", network_with_inf(), batches([8]), nn.MSELoss()),
        (1, "output", "1.1", zeros_before(Reciprocal()), batches([8]), nn.MSELoss()),
        (1, "output", "model", DividesBetweenLayers(), batches([8]), nn.MSELoss()),
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
def test_the_source_is_named(
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
    assert len(curves(tmp_path)) == 0  # the file is closed and can be read


def six_batches(nan_in: tuple[int, ...] = ()) -> Pairs:
    data = [(x.clone(), y) for x, y in batches([8] * 6)]
    for number in nan_in:
        data[number][0][3, 1] = math.nan
    return data


def test_skip(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The weights are those of a run without the batch. The saved file reproduces the NaN."""
    result = trainer(model := BatchNormNetwork(), six_batches((2,)), on_nonfinite="skip", run_dir=tmp_path).fit()
    assert (result.global_step, result.skipped_updates) == (5, 1)
    trainer(without := BatchNormNetwork(), [pair for i, pair in enumerate(six_batches()) if i != 2]).fit()
    assert_same(dict(model.state_dict()), dict(without.state_dict()))

    path = tmp_path / "nonfinite-step-3.pt"
    report = "step 3 (epoch 1, update 3): the input data is NaN or infinite"
    where = f"the batches, the weights before the update and the random states are in {path}"
    assert capfd.readouterr().err == f"warning: {report}: skipped this update; {where}\n"
    saved = torch.load(path, weights_only=True)
    assert saved["report"] == report
    ((input, target),) = saved["batches"]
    again = BatchNormNetwork()
    again.load_state_dict(saved["model"])
    assert not nn.MSELoss()(again(input), target).isfinite()
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_rollback(tmp_path: Path) -> None:
    """The weights go back to the checkpoint after the second update. Training continues with the next batches, and
    resumes exactly after an interruption."""
    options: dict[str, Any] = {"on_nonfinite": "rollback", "checkpoint_every_n_steps": 2, "log_every_n_steps": 1}
    result = trainer(model := BatchNormNetwork(), six_batches((3,)), run_dir=tmp_path / "whole", **options).fit()
    assert (result.global_step, result.skipped_updates) == (4, 1)
    trainer(other := BatchNormNetwork(), [six_batches()[i] for i in (0, 1, 4, 5)]).fit()
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert [step for step, _ in curves(tmp_path / "whole")["loss/train"]] == [1, 2, 3, 4]

    options["loss"] = loss_with_action(nn.MSELoss(), 5 + 1, interrupt)  # the batch with the NaN is run twice
    with pytest.raises(Interruption):
        trainer(BatchNormNetwork(), six_batches((3,)), run_dir=tmp_path / "cut", **options).fit()
    options["loss"] = loss_with_action(nn.MSELoss(), None, interrupt)
    trainer(
        model := BatchNormNetwork(),
        six_batches((3,)),
        run_dir=tmp_path / "cut",
        resume_from_checkpoint=True,
        **options,
    ).fit()
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert curves(tmp_path / "cut") == curves(tmp_path / "whole")


def test_nonfinite_limit() -> None:
    with pytest.raises(NonFiniteError, match=r"step 1 \(epoch 1, update 3\)"):
        trainer(BatchNormNetwork(), six_batches((0, 1, 2)), on_nonfinite="skip", nonfinite_limit=2).fit()


@pytest.mark.parametrize("layers", [nn, manualgrad.nn], ids=["torch", "manualgrad"])
def test_divergence_is_named(layers: Any) -> None:
    model = network(layers)
    optimizer = torch.optim.SGD(model.parameters(), 1e12)
    with pytest.raises(NonFiniteError, match=r"step \d+ \(.*\): the (output|loss|gradient) .*is NaN or infinite"):
        trainer(model, batches([8] * 20), loss=layers.MSELoss(), optimizer=optimizer, max_epochs=5).fit()


def test_the_second_run_draws_the_same_dropout() -> None:
    """The failure depends on the dropout mask."""

    class FailsForOneMask(nn.Module):
        """Fails if dropout zeroes all four units of the first example."""

        def forward(self, x: Tensor) -> Tensor:
            return x / (x[0] != 0).any()

    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), FailsForOneMask(), nn.Linear(4, 1))
    with pytest.raises(NonFiniteError) as caught:
        trainer(model, batches([8] * 400), optimizer=torch.optim.SGD(model.parameters(), 1e-6)).fit()
    assert (caught.value.kind, caught.value.layer) == ("output", "2")


def test_validation_is_checked() -> None:
    with pytest.raises(
        NonFiniteError, match=r"step 1 \(epoch 1, evaluation\): the target data is NaN or infinite"
    ):
        trainer(network(), batches([8]), batches_with_nan(1)).fit()


def test_a_gradient_that_overflows_as_a_sum_is_named() -> None:
    """Each of two batches has more than half of the largest float32."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity())
    data = [(torch.full((1, 1), 3e38), torch.zeros(1, 1))] * 2
    found = find_nonfinite(model, data, lambda x, t: model(x / 1.0).sum() * 0.9)
    assert found == ("gradient", "0")
