"""Accumulated, distributed and averaged batches have the loss and gradient of one batch with all their examples.

This is true for every loss, because each mean is weighted by its count.
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
from manualgrad.training.distributed import full_tensor
from manualgrad.training.weighted_means import LossOrMetric, compute_mean

torch.set_num_threads(1)

Pairs = list[tuple[Tensor, Tensor]]

CLASSES = 3
WEIGHT = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
SIZES = (3, 4, 1, 2, 5)
"""The sizes of the batches."""


def columns(rows: int) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def labels(rows: int, ignored: int = -100) -> Tensor:
    """Return class indices. Many are ignored, and all of the third batch."""
    indices = torch.randint(0, CLASSES, (rows,), generator=torch.Generator().manual_seed(2))
    indices[[0, 2, 3, 7, 9, 10, 11, 13]] = ignored
    return indices


def split(*tensors: Tensor) -> Pairs:
    return list(zip(*(tensor.split(SIZES) for tensor in tensors), strict=True))  # pyright: ignore


def concatenated(batches: Pairs) -> Pairs:
    inputs, targets = zip(*batches, strict=True)
    return [(torch.cat(inputs), torch.cat(targets))]


Fitted = tuple[nn.Module, FitResult]


def fit(loss: LossOrMetric, batches: Pairs, validation: Pairs | None = None, **options: Any) -> Fitted:
    """Train for two epochs, by default with one update per epoch."""
    torch.manual_seed(0)
    model = nn.Linear(4, options.pop("outputs", CLASSES)).double()
    metrics = options.pop("metrics", {})
    settings = TrainingSettings(
        device="cpu", progress_bar=False, **{"max_epochs": 2, "accumulate_grad_batches": len(batches), **options}
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    trainer = Trainer(model, loss, optimizer, batches, validation or batches, settings=settings, metrics=metrics)
    return model, trainer.fit()


def expect_same(found: Fitted, expected: Fitted) -> None:
    for one, other in zip(found[0].parameters(), expected[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for name in ("train", "validation"):
        assert getattr(found[1], name) == pytest.approx(getattr(expected[1], name), rel=1e-10, nan_ok=True)
    assert found[1].global_step == expected[1].global_step


# The count of each loss


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


@pytest.mark.parametrize("functions", [F, manualgrad.nn.functional], ids=["torch", "manualgrad"])
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
    mean, count = compute_mean(lambda *_: function(**kwargs), normal(5), normal(5), 1000)
    assert torch.equal(mean, expected)
    assert float(count) == pytest.approx((total / mean).item(), rel=1e-6)


def test_the_count_of_linear_cross_entropy_in_chunks() -> None:
    options = manualgrad.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    loss = partial(manualgrad.nn.functional.linear_cross_entropy, options=options, ignore_index=2)
    found = compute_mean(lambda x, t: loss(x, normal(CLASSES, 4), t), normal(5, 4), ROWS, 1000)
    assert found.count == 3


# Accumulation


class Wrapped(nn.Module):
    """Calls a loss with keyword arguments."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.loss = layers.CrossEntropyLoss(WEIGHT)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.loss(target=target, input=prediction) / math.log(2) + 0.1


class Derived(nn.CrossEntropyLoss):
    """Overrides forward."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target)


def mean_over_two_classes(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A custom loss that counts labels 0 and 1 only, and returns its count."""
    counts = (target == 0) | (target == 1)
    return (prediction.square().sum(1) * counts).sum() / counts.sum(), counts.sum()


LOSSES: dict[str, Callable[[Any], LossOrMetric]] = {
    "ignore_index": lambda layers: layers.CrossEntropyLoss(),
    "class weights": lambda layers: layers.CrossEntropyLoss(WEIGHT),
    "label smoothing": lambda layers: layers.CrossEntropyLoss(WEIGHT, label_smoothing=0.2),
    "wrapped": Wrapped,
    "derived": lambda layers: Derived(WEIGHT),
    "partial": lambda layers: partial(layers.functional.cross_entropy, weight=WEIGHT),
    "function": lambda layers: lambda p, t: layers.functional.nll_loss(p.log_softmax(1), t),
    "custom loss": lambda layers: mean_over_two_classes,
}


@pytest.mark.parametrize("layers", [nn, manualgrad.nn], ids=["torch", "manualgrad"])
@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_batches(name: str, layers: Any) -> None:
    """All targets of one batch are ignored, so its mean is NaN."""
    loss, batches = LOSSES[name](layers), split(columns(15), labels(15))
    options = {"metrics": {"again": loss}, "max_epochs": 3}
    expected = fit(loss, concatenated(batches), **options)
    assert math.isfinite(expected[1].train["loss"])
    expect_same(fit(loss, batches, **options), expected)
    expect_same(fit(loss, batches[2:] + batches[:2], **options), expected)  # the ignored batch comes first


@pytest.mark.parametrize("layers", [nn, manualgrad.nn], ids=["torch", "manualgrad"])
def test_accumulated_sequences_of_different_lengths(layers: Any) -> None:
    """The mean over elements differs from the mean over examples."""
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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised by Dynamo
def test_the_count_of_a_compiled_loss() -> None:
    batches = split(columns(15), labels(15))
    for layers in (nn, manualgrad.nn):
        loss = layers.CrossEntropyLoss(WEIGHT)
        expect_same(fit(torch.compile(loss, backend="eager"), batches), fit(loss, concatenated(batches)))


def test_the_scaled_loss_of_float16_stays_in_range() -> None:
    """Large counts do not overflow."""

    def loss(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(prediction, target), 1e9 * (target != -100).sum()

    inputs, targets = columns(15).float(), labels(15)
    models = []
    for batches in (split(inputs, targets), concatenated(split(inputs, targets))):
        torch.manual_seed(0)
        model = nn.Linear(4, CLASSES)
        settings = TrainingSettings(
            device="cpu",
            progress_bar=False,
            max_epochs=3,
            accumulate_grad_batches=len(batches),
            precision="float16",
        )
        trainer = Trainer(model, loss, torch.optim.SGD(model.parameters(), 0.5), batches, settings=settings)
        trainer.fit()
        assert trainer.scaler.get_scale() == 2.0**16  # no overflow
        models.append(model)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0.01, atol=0.001)


# Count 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_with_count_0_is_skipped(accumulate: int, capsys: pytest.CaptureFixture[str]) -> None:
    batches = split(columns(15), labels(15))
    empty = (columns(3), torch.full((3,), -100))
    with_empty = [*batches[:2], *[empty] * (2 * accumulate), *batches[3:]]
    loss = nn.CrossEntropyLoss()
    found = fit(loss, with_empty, accumulate_grad_batches=accumulate, metrics={"again": loss})
    assert capsys.readouterr().err.count("the count of the loss is 0") == 1
    expect_same(
        found, fit(loss, batches[:2] + batches[3:], accumulate_grad_batches=accumulate, metrics={"again": loss})
    )


def test_a_validation_with_count_0_is_refused() -> None:
    batches = split(columns(15), labels(15))
    with pytest.raises(ValueError, match="the count of the loss is 0 in all batches of validation_loader"):
        fit(nn.CrossEntropyLoss(), batches, [(columns(3), torch.full((3,), -100))])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "must be a mean, but this is a sum"),
        (partial(F.cross_entropy, size_average=False, reduce=True), "must be a mean, but this is a sum"),
        (lambda p, t: (F.cross_entropy(p, t, reduction="sum"), len(t)), "must be a mean, but this is a sum"),
        (lambda p, t: (F.cross_entropy(p, t), t), r"the count .* must be a number, not of shape \(3,\)"),
        (lambda p, t: (F.cross_entropy(p, t), "3"), "the count .* must be a number, not a str"),
        (lambda p, t: (F.cross_entropy(p, t), -1), "the count of 'loss' is -1.0: it must not be negative"),
        (
            lambda p, t: (F.cross_entropy(p, t), torch.tensor(math.nan)),
            "the count of 'loss' is nan: it must not be",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
def test_wrong_means_and_counts_are_refused(loss: LossOrMetric, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(loss, split(columns(15), labels(15)))


# After an interruption, and with several processes


class FailingLoader:
    """Raises after some batches."""

    def __init__(self, batches: Pairs, after: int | None) -> None:
        self.batches, self.after = batches, after

    def __iter__(self) -> Any:
        for number, batch in enumerate(self.batches):
            if number == self.after:
                raise OSError("the data are gone")
            yield batch


def test_the_means_of_an_epoch_are_resumed(tmp_path: Path) -> None:
    batches, loss = split(columns(15), labels(15)), nn.CrossEntropyLoss(WEIGHT)

    def run(folder: str, after: int | None, resume: bool = False) -> FitResult:
        torch.manual_seed(0)
        model = nn.Linear(4, CLASSES).double()
        settings = TrainingSettings(
            device="cpu",
            progress_bar=False,
            max_epochs=1,
            accumulate_grad_batches=2,
            run_dir=tmp_path / folder,
            resume_from_checkpoint=resume,
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        metrics = {"own": mean_over_two_classes}
        return Trainer(
            model, loss, optimizer, FailingLoader(batches, after), settings=settings, metrics=metrics
        ).fit()

    with pytest.raises(OSError, match="the data are gone"):
        run("stopped", 4)
    found, expected = run("stopped", None, resume=True), run("whole", None)
    assert found.train == expected.train
    assert math.isfinite(found.train["own"])


def train_in_process(rank: int, rendezvous: str) -> None:
    """Train in one of two processes, and compare with the updates of a single process."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    batches = split(columns(15), labels(15))
    cases = [
        (LOSSES["label smoothing"](nn), {"strategy": "ddp", "accumulate_grad_batches": 5}),
        (mean_over_two_classes, {"strategy": "ddp", "accumulate_grad_batches": 1}),
        (LOSSES["class weights"](nn), {"strategy": "fsdp", "accumulate_grad_batches": 3}),
    ]
    expected = [fit(loss, batches, **options) for loss, options in cases]
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for (loss, options), one in zip(cases, expected, strict=True):
        model, result = fit(loss, batches, **options)
        for found, parameter in zip(model.parameters(), one[0].parameters(), strict=True):
            torch.testing.assert_close(full_tensor(found.detach()), parameter.detach(), rtol=1e-10, atol=1e-12)
        assert result.train == pytest.approx(one[1].train, rel=1e-10)
        assert result.validation == pytest.approx(one[1].validation, rel=1e-10)
        assert result.global_step == one[1].global_step
    dist.destroy_process_group()


def test_two_processes_make_the_same_updates_as_one(tmp_path: Path) -> None:
    """One shard is empty, and in some shards all targets are ignored."""
    mp.spawn(train_in_process, args=(str(tmp_path / "rendezvous"),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
