"""The training loop, from the first batch to the final figures, in the order in which it happens."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from . import checkpoint
from .batches import Batch, Loader, groups, pairs, size
from .checkpoint import BEST, LAST, CheckpointError
from .checks import check_loss, check_parts, check_shapes
from .logging import TrainingLog
from .nonfinite import NonFiniteError, find_nonfinite
from .progress import Averages, Figures, FitResult, Progress
from .randomness import random_states, seed_epoch, set_random_states, set_torch_states, torch_states
from .settings import TrainingSettings

Measure = Callable[[Tensor, Tensor], Tensor]
"""A loss or a metric: from (prediction, target) to a scalar, the mean over the examples of the batch."""


class Update(NamedTuple):
    """What one update came to."""

    means: Figures
    examples: int
    norm: float
    """Of the gradient, before clipping."""
    skipped: bool
    """Whether float16 overflowed: then the scale of the loss went down, and the weights stayed."""


class Trainer:
    """Trains a model: the loop one would write by hand, with everything a real run needs.

    Args:
        model: any nn.Module; moved to the device of the settings.
        loss: callable(prediction, target) -> scalar tensor, the mean over the examples of a batch.
        optimizer: from torch.optim, made of the model's parameters.
        train_loader: an iterable of (input, target) pairs of tensors that can be gone through once per
            epoch, such as a DataLoader; the first dimension of the target counts the examples.
        validation_loader: likewise, gone through after every epoch.
        settings: how to train.
        schedule: from torch.optim.lr_scheduler, advanced every update or every epoch as the settings say;
            ReduceLROnPlateau after every epoch, with the validation loss.
        metrics: by name, callable(prediction, target) -> scalar, averaged over examples as the loss is.
        summary: called without arguments at the very end, with the best weights in the model; the figures
            it returns, such as those of a test set, join the final ones in TensorBoard.

    Every epoch begins by seeding python, numpy and torch with (seed, epoch). So a run repeats, and a run
    resumed in the middle of an epoch draws the batches it has seen once more and goes on exactly. What no
    checkpoint holds is state that a dataset or a custom loader keeps to itself from epoch to epoch.

    Raises:
        ValueError: for parts that do not fit together, before anything is allocated or written.
        CheckpointError: where run_dir holds a run already and `resume` is off; or `resume` is on and the
            checkpoint is missing, damaged, or of something else.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Measure,
        optimizer: Optimizer,
        train_loader: Loader,
        validation_loader: Loader | None = None,
        *,
        settings: TrainingSettings | None = None,
        schedule: LRScheduler | None = None,
        metrics: Mapping[str, Measure] | None = None,
        summary: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.model, self.loss, self.optimizer, self.schedule = model, loss, optimizer, schedule
        self.train_loader, self.validation_loader = train_loader, validation_loader
        self.settings = settings or TrainingSettings()
        self.metrics, self.summary = dict(metrics or {}), summary
        loaders = {"train_loader": train_loader, "validation_loader": validation_loader}
        check_parts(model, optimizer, schedule, loaders, self.metrics, self.settings)
        self.device = self.settings.torch_device()

        self.model.to(self.device)
        if isinstance(loss, nn.Module):
            loss.to(self.device)
        half = self.settings.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.autocast = partial(
            torch.autocast,
            self.device.type,
            dtype=torch.float16 if half else torch.bfloat16,
            enabled=self.settings.precision != "float32",
        )
        self.progress = Progress()
        self.best_weights: dict[str, Any] = {}
        self._random_states: dict[str, Any] | None = None  # to go on with, in the middle of an epoch
        self._fitted = False
        if self.settings.run_dir is not None:
            self._resume_or_refuse(self.settings.run_dir / LAST)

    def fit(self) -> FitResult:
        """Train to the last epoch, or until patience runs out; leaves the best weights, in eval mode.

        Can be called once: after an interruption, make a new Trainer with `resume`.

        Raises:
            NonFiniteError: where the loss or the gradient becomes NaN or infinite; the weights are still
                those before that update.
            ValueError: for batches that are not what the model and the loss need.
        """
        if self._fitted:
            raise RuntimeError("fit() was called before: make a new Trainer, with resume to continue its run")
        self._fitted = True
        settings, progress = self.settings, self.progress
        with TrainingLog(settings.run_dir, progress.step) as log, self._progress_bar() as bar:
            log.settings(settings, self.model, self.optimizer, self.device, progress.step + 1)
            if progress.step == 0:
                self._save(LAST, log)  # from here on there is something to resume
            while progress.epoch < settings.epochs and not self._out_of_patience():
                bar.set_description(f"epoch {progress.epoch + 1}/{settings.epochs}")
                self._train_epoch(log, bar)
                self._end_epoch(log)
            return self._finish(log)

    def evaluate(self, loader: Loader) -> Figures:
        """The mean "loss" and metrics over the examples of a loader, with the model in eval mode.

        Raises:
            NonFiniteError: where the loss is NaN or infinite.
            ValueError: for batches that are not what the model and the loss need.
        """
        averages = Averages()
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for batch in pairs(loader, "the loader"):
                input, target = self._to_device(batch)
                means = _floats(self._forward(input, target))
                if not math.isfinite(means["loss"]):
                    raise self._nonfinite([(input, target)], self.progress.step)
                averages.add(means, len(target))
        self.model.train(training)
        return averages.means()

    def _train_epoch(self, log: TrainingLog, bar: "tqdm[Any]") -> None:
        settings, progress = self.settings, self.progress
        self.model.train()
        seed_epoch(self.train_loader, settings.seed, progress.epoch)
        updates = groups(self.train_loader, "train_loader", settings.accumulate)
        self._skip_seen(updates)

        clock, counted = time.perf_counter(), progress.running.examples
        due: dict[str, Any] | None = None  # a checkpoint, with the random states before the next group
        for group in updates:
            if due is not None:  # now that the epoch is known to go on; its end has a checkpoint of its own
                self._save(LAST, log, due)
            update = self._update(group)
            progress.running.add(update.means, update.examples)
            progress.updates += 1
            progress.step += 1
            bar.update()
            if progress.step % settings.log_every == 0:
                seconds, examples = time.perf_counter() - clock, progress.running.examples - counted
                clock, counted = time.perf_counter(), progress.running.examples
                log.update(update.means, update.norm, self.optimizer, examples / seconds, progress.step)
                bar.set_postfix(self._postfix(update), refresh=False)
            if self.schedule is not None and not self._schedule_by_epoch() and not update.skipped:
                self.schedule.step()
            every = settings.checkpoint_every
            due = random_states() if every is not None and progress.step % every == 0 else None

    def _update(self, group: list[Batch]) -> Update:
        """One step of the optimizer, whose gradient is that of one batch made of all those in the group."""
        before = torch_states()
        group = [self._to_device(batch) for batch in group]
        examples = sum(len(target) for _, target in group)
        forwards: list[tuple[dict[str, Tensor], int]] = []
        self.optimizer.zero_grad()
        for input, target in group:
            means = self._forward(input, target)
            self.scaler.scale(means["loss"] * (len(target) / examples)).backward()
            forwards.append((means, len(target)))
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()

        averages = Averages()  # only now are numbers asked for, which waits for the device
        for means, count in forwards:
            averages.add(_floats(means), count)
        overflow = not math.isfinite(norm)
        curable = self.scaler.get_scale() > 1  # by a smaller scale, as float16 is meant to find it
        if not math.isfinite(averages.totals["loss"]) or (overflow and not curable):
            set_torch_states(before)  # for the same dropout again
            raise self._nonfinite(group, self.progress.step + 1)
        self.scaler.step(self.optimizer)  # not taken on an overflow
        self.scaler.update()
        return Update(averages.means(), examples, norm, skipped=overflow)

    def _end_epoch(self, log: TrainingLog) -> None:
        settings, progress = self.settings, self.progress
        progress.train = progress.running.means()
        progress.epoch, progress.updates, progress.running = progress.epoch + 1, 0, Averages()
        log.epoch("train", progress.train, progress.step)
        if settings.histogram_every and progress.epoch % settings.histogram_every == 0:
            log.histograms(self.model, progress.step)

        validation: Figures = {}
        if self.validation_loader is not None:
            validation = self.evaluate(self.validation_loader)
            log.epoch("validation", validation, progress.step)
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(validation["loss"])
        elif self.schedule is not None and self._schedule_by_epoch():
            self.schedule.step()

        if validation and validation["loss"] < progress.best.get("loss", math.inf):
            progress.best, progress.best_epoch = validation, progress.epoch
            self.best_weights = deepcopy(self.model.state_dict())
            # Before the last one, which must not speak of a best that is not there.
            self._save(BEST, log)
        self._save(LAST, log)

    def _finish(self, log: TrainingLog) -> FitResult:
        progress = self.progress
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)
        self.model.eval()
        summary = dict(self.summary()) if self.summary is not None else {}
        figures = {f"train_{name}": mean for name, mean in progress.train.items()}
        figures |= {f"validation_{name}": mean for name, mean in progress.best.items()}
        log.summary(self.settings, figures | summary, progress.step + 1)
        return FitResult(
            epochs=progress.epoch,
            steps=progress.step,
            best_epoch=progress.best_epoch or progress.epoch,
            stopped_early=progress.epoch < self.settings.epochs,
            train=progress.train,
            validation=progress.best,
            summary=summary,
        )

    def _forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The "loss" and the metrics of a batch."""
        with self.autocast():
            prediction = self.model(input)
            check_shapes(prediction, target)
            loss = self.loss(prediction, target)
        check_loss(loss, training=torch.is_grad_enabled())
        with torch.no_grad():
            metrics = {name: metric(prediction, target) for name, metric in self.metrics.items()}
        return {"loss": loss} | metrics

    def _clip(self) -> float:
        """The norm of the whole gradient, which is scaled down to clip_norm where it is larger."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])
        if self.settings.clip_norm is not None:
            sparse = any(gradient.is_sparse for gradient in gradients)
            clip_grads_with_norm_(parameters, self.settings.clip_norm, norm, foreach=False if sparse else None)
        return norm.item()

    def _nonfinite(self, batches: list[Batch], step: int) -> NonFiniteError:
        def run(input: Tensor, target: Tensor) -> Tensor:
            return self.scaler.scale(self._forward(input, target)["loss"])

        return NonFiniteError(step, *find_nonfinite(self.model, batches, run))

    def _to_device(self, batch: Batch) -> Batch:
        input, target = batch
        return input.to(self.device), target.to(self.device)

    def _schedule_by_epoch(self) -> bool:
        return self.settings.schedule_every == "epoch" or isinstance(self.schedule, ReduceLROnPlateau)

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.epoch - self.progress.best_epoch >= patience

    def _progress_bar(self) -> "tqdm[Any]":
        settings, batches = self.settings, size(self.train_loader)
        total = settings.epochs * math.ceil(batches / settings.accumulate) if batches is not None else None
        quiet = None if settings.progress else True  # None: quiet unless on a terminal
        return tqdm(total=total, initial=self.progress.step, disable=quiet, unit=" updates", dynamic_ncols=True)

    def _postfix(self, update: Update) -> dict[str, str]:
        best = {"best validation": f"{self.progress.best['loss']:.4g}"} if self.progress.best else {}
        return {"loss": f"{update.means['loss']:.4g}"} | best

    # What a checkpoint holds, and how it is taken up again.

    def _save(self, name: str, log: TrainingLog, random: dict[str, Any] | None = None) -> None:
        if self.settings.run_dir is None:
            return
        log.flush()
        payload = {"run": self._identity(), "progress": asdict(self.progress)}
        payload["random"] = random_states() if random is None else random
        payload |= {name: part.state_dict() for name, part in self._stateful().items()}
        checkpoint.save(self.settings.run_dir / name, payload)

    def _resume_or_refuse(self, path: Path) -> None:
        if not self.settings.resume:
            if path.exists():
                raise CheckpointError(f"{path.parent} holds a run already: resume it or take another folder")
            return
        saved = checkpoint.load(path)
        checkpoint.check_same(path, "run", saved["run"], self._identity())
        checkpoint.check_same(path, "model", saved["model"], self.model.state_dict())
        for name, part in self._stateful().items():
            part.load_state_dict(saved[name])
        self.progress = Progress.from_dict(saved["progress"])
        if self.progress.updates:  # an epoch that is yet to begin is seeded anyway
            self._random_states = saved["random"]
        if self.progress.best_epoch:
            self.best_weights = checkpoint.load(path.with_name(BEST))["model"]

    def _stateful(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        if isinstance(self.loss, nn.Module):
            parts["loss"] = self.loss
        if self.schedule is not None:
            parts["schedule"] = self.schedule
        return parts

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run it continues."""
        settings = self.settings.model_dump(mode="json", exclude=set(self.settings.free_on_resume))
        return settings | {
            "loss": type(self.loss).__name__,
            "optimizer": type(self.optimizer).__name__,
            "parameters per group": [len(group["params"]) for group in self.optimizer.param_groups],
            "schedule": type(self.schedule).__name__,
            "batches per epoch": size(self.train_loader),
        }

    def _skip_seen(self, updates: Iterator[Any]) -> None:
        """Draw the batches seen before an interruption once more, then take up its random states."""
        for _ in range(self.progress.updates):
            next(updates)
        if self._random_states is not None:
            set_random_states(self._random_states)
            self._random_states = None


def _floats(figures: Mapping[str, Tensor | float]) -> Figures:
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in figures.items()}
