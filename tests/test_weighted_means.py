"""Batches that are accumulated, split among processes, or averaged have the loss and gradient of one batch.

It holds them all, and this is so whatever the loss is a mean over.
"""

import math
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import manualgrad.nn
from manualgrad.training import FitResult, Trainer, TrainingSettings
from manualgrad.training.means import Measure, mean_of
from manualgrad.training.processes import whole

torch.set_num_threads(1)

Pairs = list[tuple[Tensor, Tensor]]

CLASSES = 3
WEIGHT = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
SIZES = (3, 4, 1, 2, 5)
"""Of the batches."""


def columns(rows: int) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def labels(rows: int, ignored: int = -100) -> Tensor:
    """Class indices, many of them ignored, and all of the third batch."""
    drawn = torch.randint(0, CLASSES, (rows,), generator=torch.Generator().manual_seed(2))
    drawn[[0, 2, 3, 7, 9, 10, 11, 13]] = ignored
    return drawn


def cut(*tensors: Tensor) -> Pairs:
    return list(zip(*(tensor.split(SIZES) for tensor in tensors), strict=True))  # pyright: ignore


def joined(batches: Pairs) -> Pairs:
    inputs, targets = zip(*batches, strict=True)
    return [(torch.cat(inputs), torch.cat(targets))]


Fitted = tuple[nn.Module, FitResult]


def fit(loss: Measure, batches: Pairs, validation: Pairs | None = None, **options: Any) -> Fitted:
    """Two epochs, of one update each unless the options say otherwise."""
    torch.manual_seed(0)
    model = nn.Linear(4, options.pop("outputs", CLASSES)).double()
    metrics = options.pop("metrics", {})
    settings = TrainingSettings(
        device="cpu", progress=False, **{"epochs": 2, "accumulate": len(batches), **options}
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    trainer = Trainer(model, loss, optimizer, batches, validation or batches, settings=settings, metrics=metrics)
    return model, trainer.fit()


def expect_same(found: Fitted, expected: Fitted) -> None:
    for one, other in zip(found[0].parameters(), expected[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for name in ("train", "validation"):
        assert getattr(found[1], name) == pytest.approx(getattr(expected[1], name), rel=1e-10, nan_ok=True)
    assert found[1].steps == expected[1].steps


# What each loss divides by


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.1


SCORES, INDICES = normal(5, CLASSES, 2), torch.tensor([[0, 1], [-100, 2], [1, 1], [2, -100], [0, 2]])
ROWS = torch.tensor([0, 2, 1, 1, 2])
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("cross_entropy", (SCORES, INDICES), {}),
    ("cross_entropy", (SCORES, INDICES.relu()), {"weight": WEIGHT, "ignore_index": 1}),
    ("cross_entropy", (SCORES, INDICES.relu()), {"weight": WEIGHT, "label_smoothing": 0.3, "ignore_index": 0}),
    ("cross_entropy", (SCORES, SCORES.softmax(1)), {"weight": WEIGHT, "label_smoothing": 0.3}),
    ("cross_entropy", (SCORES[0, :, 0], SCORES[0, :, 0].softmax(0)), {}),
    ("nll_loss", (SCORES, INDICES), {"weight": WEIGHT}),
    ("linear_cross_entropy", (normal(5, 4), normal(CLASSES, 4), ROWS), {"ignore_index": 2, "weight": WEIGHT}),
    ("mse_loss", (normal(5, 2), normal(5, 2)), {}),
    ("mse_loss", (normal(5, 2), normal(5, 2)), {"weight": positive(5, 2)}),
    ("l1_loss", (normal(5, 2), normal(5, 2)), {"weight": positive(5, 2)}),
    ("huber_loss", (normal(5, 2), normal(5, 2)), {"weight": positive(5, 2)}),
    ("smooth_l1_loss", (normal(5, 2), normal(5, 2)), {}),
    ("poisson_nll_loss", (normal(5, 2), positive(5, 2)), {}),
    ("gaussian_nll_loss", (normal(5, 2), normal(5, 2), positive(5)), {}),
    ("gaussian_nll_loss", (normal(5, 2), normal(5, 2), 0.3), {}),
    ("binary_cross_entropy", (positive(5, 2) / 2, positive(5, 2) / 2), {"weight": positive(5, 2)}),
    ("binary_cross_entropy_with_logits", (normal(5, 2), positive(5, 2)), {"pos_weight": positive(2)}),
    ("kl_div", (normal(5, 2), positive(5, 2)), {}),
    ("kl_div", (normal(5, 2), positive(5, 2)), {"reduction": "batchmean"}),
    ("hinge_embedding_loss", (normal(5, 2), normal(5, 2).sign()), {}),
    ("soft_margin_loss", (normal(5, 2), normal(5, 2).sign()), {}),
    ("margin_ranking_loss", (normal(5), normal(5), normal(5).sign()), {"margin": 9.0}),
    ("cosine_embedding_loss", (normal(5, 2), normal(5, 2), torch.ones(5)), {}),
    ("multi_margin_loss", (normal(5, CLASSES), ROWS), {"weight": WEIGHT}),
    ("multilabel_margin_loss", (normal(5, CLASSES), torch.tensor([[0, 2, -1]] * 5)), {}),
    ("multilabel_soft_margin_loss", (normal(5, CLASSES), positive(5, CLASSES)), {"weight": WEIGHT}),
    ("triplet_margin_loss", (normal(5, 2), normal(5, 2), normal(5, 2)), {"margin": 9.0}),
    ("triplet_margin_with_distance_loss", (normal(5, 2), normal(5, 2), normal(5, 2)), {"margin": 9.0}),
    ("ctc_loss", (normal(6, 5, CLASSES), torch.ones(5, 1).long(), torch.full((5,), 6), torch.ones(5).long()), {}),
]


@pytest.mark.parametrize("functions", [F, manualgrad.nn.functional], ids=["torch", "ours"])
@pytest.mark.parametrize(("name", "args", "kwargs"), CALLS)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
def test_the_count_is_what_the_loss_divides_by(
    functions: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if not hasattr(functions, name):
        pytest.skip("torch has it since 2.13")
    function = partial(getattr(functions, name), *args)
    try:
        total, expected = function(**{**kwargs, "reduction": "sum"}), function(**kwargs)
    except TypeError as error:
        pytest.skip(f"a later torch has it: {error}")
    mean, count = mean_of(lambda *_: function(**kwargs), normal(5), normal(5), 1000)
    assert torch.equal(mean, expected)
    assert float(count) == pytest.approx((total / mean).item(), rel=1e-6)


def test_the_count_of_a_linear_map_and_its_loss_in_pieces() -> None:
    """Where the scores are not made."""
    nothing_else = manualgrad.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    loss = partial(manualgrad.nn.functional.linear_cross_entropy, options=nothing_else, ignore_index=2)
    found = mean_of(lambda x, t: loss(x, normal(CLASSES, 4), t), normal(5, 4), ROWS, 1000)
    assert found.count == 3


# A group of batches is one batch


class Wrapped(nn.Module):
    """A module around a loss, which it calls by keywords."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.loss = layers.CrossEntropyLoss(WEIGHT)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.loss(target=target, input=prediction) / math.log(2) + 0.1


class Derived(nn.CrossEntropyLoss):
    """A class with another forward."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target)


def of_two_values(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A loss of the user's own, with its count: of labels 0 and 1 alone."""
    counts = (target == 0) | (target == 1)
    return (prediction.square().sum(1) * counts).sum() / counts.sum(), counts.sum()


LOSSES: dict[str, Callable[[Any], Measure]] = {
    "ignore_index": lambda layers: layers.CrossEntropyLoss(),
    "class weights": lambda layers: layers.CrossEntropyLoss(WEIGHT),
    "label smoothing": lambda layers: layers.CrossEntropyLoss(WEIGHT, label_smoothing=0.2),
    "wrapped": Wrapped,
    "derived": lambda layers: Derived(WEIGHT),
    "partial": lambda layers: partial(layers.functional.cross_entropy, weight=WEIGHT),
    "function": lambda layers: lambda p, t: layers.functional.nll_loss(p.log_softmax(1), t),
    "a loss of one's own": lambda layers: of_two_values,
}


@pytest.mark.parametrize("layers", [nn, manualgrad.nn], ids=["torch", "ours"])
@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_batches_are_one(name: str, layers: Any) -> None:
    """All targets of one batch are ignored; its mean is NaN, and the gradient of that with ours."""
    loss, batches = LOSSES[name](layers), cut(columns(15), labels(15))
    alike = {"metrics": {"again": loss}, "epochs": 3}
    expected = fit(loss, joined(batches), **alike)
    assert math.isfinite(expected[1].train["loss"])
    expect_same(fit(loss, batches, **alike), expected)
    expect_same(fit(loss, batches[2:] + batches[:2], **alike), expected)  # and it may be the first


@pytest.mark.parametrize("layers", [nn, manualgrad.nn], ids=["torch", "ours"])
def test_accumulated_sequences_of_other_lengths_are_one_batch(layers: Any) -> None:
    """The mean over elements is not that over examples."""
    inputs, targets = columns(16), columns(16)[:, :1].sin()
    shapes = [(2, 5), (3, 1), (1, 3)]
    rows = [a * b for a, b in shapes]
    batches = [
        (x.view(*shape, 4), y.view(*shape, 1))
        for x, y, shape in zip(inputs.split(rows), targets.split(rows), shapes, strict=True)
    ]
    for loss in (layers.MSELoss(), layers.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))):
        found = fit(loss, batches, outputs=1)
        expect_same(found, fit(loss, [(inputs, targets)], outputs=1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # in Dynamo itself
def test_a_compiled_loss_is_counted() -> None:
    batches = cut(columns(15), labels(15))
    for layers in (nn, manualgrad.nn):
        loss = layers.CrossEntropyLoss(WEIGHT)
        expect_same(fit(torch.compile(loss, backend="eager"), batches), fit(loss, joined(batches)))


def test_the_scaled_loss_of_float16_stays_in_range() -> None:
    """However large the counts are."""

    def loss(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(prediction, target), 1e9 * (target != -100).sum()

    inputs, targets = columns(15).float(), labels(15)
    models = []
    for batches in (cut(inputs, targets), joined(cut(inputs, targets))):
        torch.manual_seed(0)
        model = nn.Linear(4, CLASSES)
        settings = TrainingSettings(
            device="cpu", progress=False, epochs=3, accumulate=len(batches), precision="float16"
        )
        trainer = Trainer(model, loss, torch.optim.SGD(model.parameters(), 0.5), batches, settings=settings)
        trainer.fit()
        assert trainer.scaler.get_scale() == 2.0**16  # no overflow
        models.append(model)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0.01, atol=0.001)


# Where nothing counts


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_in_which_nothing_counts_is_left_out(
    accumulate: int, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = cut(columns(15), labels(15))
    empty = (columns(3), torch.full((3,), -100))
    with_empty = [*batches[:2], *[empty] * (2 * accumulate), *batches[3:]]
    loss = nn.CrossEntropyLoss()
    found = fit(loss, with_empty, accumulate=accumulate, metrics={"again": loss})
    assert capsys.readouterr().err.count("nothing counts for the loss") == 1
    expect_same(found, fit(loss, batches[:2] + batches[3:], accumulate=accumulate, metrics={"again": loss}))


def test_a_validation_in_which_nothing_counts_is_refused() -> None:
    batches = cut(columns(15), labels(15))
    with pytest.raises(ValueError, match="validation_loader has nothing that counts for the loss"):
        fit(nn.CrossEntropyLoss(), batches, [(columns(3), torch.full((3,), -100))])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "must be a mean, and this is a sum"),
        (partial(F.cross_entropy, size_average=False, reduce=True), "must be a mean, and this is a sum"),
        (lambda p, t: (F.cross_entropy(p, t, reduction="sum"), len(t)), "must be a mean, and this is a sum"),
        (lambda p, t: (F.cross_entropy(p, t), t), r"the count .* must be a number, not of shape \(3,\)"),
        (lambda p, t: (F.cross_entropy(p, t), "3"), "the count .* must be a number, not a str"),
        (lambda p, t: (F.cross_entropy(p, t), -1), "the count of 'loss' must not be negative"),
        (lambda p, t: (F.cross_entropy(p, t), torch.tensor(math.nan)), "the count of 'loss' must not be"),
    ],
)
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
def test_what_is_no_mean_is_refused(loss: Measure, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(loss, cut(columns(15), labels(15)))


# Over an interruption, and over processes


class Stopping:
    """Batches, of which some cannot be read."""

    def __init__(self, batches: Pairs, after: int | None) -> None:
        self.batches, self.after = batches, after

    def __iter__(self) -> Any:
        for number, batch in enumerate(self.batches):
            if number == self.after:
                raise OSError("the data are gone")
            yield batch


def test_the_means_of_an_epoch_outlast_an_interruption(tmp_path: Path) -> None:
    batches, loss = cut(columns(15), labels(15)), nn.CrossEntropyLoss(WEIGHT)

    def run(folder: str, after: int | None, resume: bool = False) -> FitResult:
        torch.manual_seed(0)
        model = nn.Linear(4, CLASSES).double()
        settings = TrainingSettings(
            device="cpu", progress=False, epochs=1, accumulate=2, run_dir=tmp_path / folder, resume=resume
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        metrics = {"own": of_two_values}
        return Trainer(model, loss, optimizer, Stopping(batches, after), settings=settings, metrics=metrics).fit()

    with pytest.raises(OSError, match="the data are gone"):
        run("stopped", 4)
    found, expected = run("stopped", None, resume=True), run("quiet", None)
    assert found.train == expected.train
    assert math.isfinite(found.train["own"])


def process(rank: int, rendezvous: str) -> None:
    """One of two: the same updates as one process makes of the whole batches."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    batches = cut(columns(15), labels(15))
    cases = [
        (LOSSES["label smoothing"](nn), {"parallel": "ddp", "accumulate": 5}),
        (of_two_values, {"parallel": "ddp", "accumulate": 1}),
        (LOSSES["class weights"](nn), {"parallel": "fsdp", "accumulate": 3}),
    ]
    expected = [fit(loss, batches, **options) for loss, options in cases]
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for (loss, options), one in zip(cases, expected, strict=True):
        model, result = fit(loss, batches, **options)
        for found, parameter in zip(model.parameters(), one[0].parameters(), strict=True):
            torch.testing.assert_close(whole(found.detach()), parameter.detach(), rtol=1e-10, atol=1e-12)
        assert result.train == pytest.approx(one[1].train, rel=1e-10)
        assert result.validation == pytest.approx(one[1].validation, rel=1e-10)
        assert result.steps == one[1].steps
    dist.destroy_process_group()


def test_two_processes_make_the_updates_of_one(tmp_path: Path) -> None:
    """Of a batch of one the second has nothing, and of some batches all that one of them has is ignored."""
    mp.spawn(process, args=(str(tmp_path / "rendezvous"),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
