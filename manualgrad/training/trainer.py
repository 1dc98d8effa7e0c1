"""The training loop, from the first batch to the final figures, in the order in which it happens."""

import json
import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from .. import __version__
from . import checkpoint
from .batches import Loader, Watch, groups, pairs, size
from .checkpoint import BEST, CheckpointError, Checkpoints
from .checks import check_last_batch, check_loss, check_parts, check_shapes, explained
from .interruption import Interrupted, Signals
from .logging import TrainingLog
from .means import Mean, Measure, mean_of, nothing
from .nonfinite import NonFiniteError, find_nonfinite
from .order import Order, begin_alike, same
from .processes import Part, Processes, as_parted, parted_model, parted_optimizer, whole
from .progress import Averages, Drawn, Figures, FitResult, Progress, warn
from .randomness import (
    as_plain,
    random_states,
    seed_all,
    seed_epoch,
    seed_generators,
    set_random_states,
    set_torch_states,
    torch_states,
)
from .settings import TrainingSettings


class Update(NamedTuple):
    """What one update came to."""

    figures: Averages
    """Of all its batches, and of all processes."""
    norm: float
    """Of the gradient, before clipping."""
    skipped: bool
    """Whether float16 overflowed: then the scale of the loss went down, and the weights stayed."""


class Trainer:
    """Trains a model: the loop one would write by hand, with everything a real run needs.

    Args:
        model: any nn.Module; moved to the device of the settings.
        loss: callable(prediction, target) -> scalar tensor, the mean over a batch, or (mean, count). An update
            of several batches, or of several processes, has the loss and gradient of one batch that holds them
            all, and so has the validation: each mean is weighted by its count, what it is the mean over. The
            count of torch's and manualgrad's losses is known, such as the targets that are not ignored, or the
            sum of their class weights. That of another loss is the number of examples, unless it returns the
            pair. An update in which nothing counts (all targets are ignored) is left out.
        optimizer: from torch.optim, made of the model's parameters.
        train_loader: an iterable of (input, target) pairs of tensors that can be gone through once per
            epoch, such as a DataLoader; the first dimension of the target counts the examples.
        validation_loader: likewise, gone through after every epoch.
        settings: how to train.
        schedule: from torch.optim.lr_scheduler, advanced every update or every epoch as the settings say;
            ReduceLROnPlateau after every epoch, with the validation loss.
        metrics: by name, callable(prediction, target) -> scalar or (mean, count), averaged as the loss is.
        summary: called at the very end, with the best weights in the model, with the log and the step as
            `on_epoch` is; the figures it returns, such as those of a test set, join the final ones.
        on_epoch: called after each epoch's validation, in eval mode and without gradients, with the log and
            the step: what it gives to ``log.add(step, write)``, pictures, text or audio, is in TensorBoard.

    Every epoch begins by seeding python, numpy and torch with (seed, epoch), and the generators (of torch, numpy
    or python) that the train loader holds, in its samplers, their samplers and its dataset; `set_epoch` is called
    on each of them that has it. So a run repeats, and a run resumed in the middle of an epoch draws the batches it
    has seen once more and goes on exactly, whatever ended it. What no checkpoint holds is other state that a
    sampler, a dataset or a loader keeps to itself. Where this changes the batches, a resumed run says so: it
    compares the indices, or numbers of the batches of a stream, with those drawn before, and trains on no others.

    A module that is in eval mode when `fit` begins, such as a frozen batch norm, stays in eval mode. Only where
    the whole model is, as `from_pretrained` gives it, all of it is trained as by ``model.train()``.

    A checkpoint holds the state_dict of the model, the optimizer, the schedule and the loss: tensors, plain data,
    and numbers and arrays of numpy's. Anything else is refused by its name before the first update.

    Under torchrun the same code trains in all the processes, each on its part of every batch: the loaders
    are those of one process, and so are the updates (see processes.py).

    Attributes:
        first: whether this process is the one that speaks for all (a single one is).

    Raises:
        ValueError: for parts that do not fit together, before anything is allocated or written.
        CheckpointError: where run_dir holds a run already and `resume` is off; or `resume` is on and no
            checkpoint is whole, or it is of something else.
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
        summary: Callable[[TrainingLog, int], Mapping[str, float]] | None = None,
        on_epoch: Callable[[TrainingLog, int], object] | None = None,
    ) -> None:
        self.model, self.loss, self.optimizer, self.schedule = model, loss, optimizer, schedule
        self.settings = settings or TrainingSettings()
        self.metrics, self.summary, self.on_epoch = dict(metrics or {}), summary, on_epoch
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
        self.processes = Processes(self.device)
        self.first = self.processes.first
        self.whole_train_loader = train_loader
        self._order = Order(self.processes.loader(train_loader), counts=self.settings.run_dir is not None)
        self.train_loader = self._order.loader
        self.validation_loader = validation_loader and self.processes.loader(validation_loader)
        self._network = self.processes.share(model, optimizer, self.settings.parallel)
        self._run = torch.compile(self._network) if self.settings.compile else self._network

        self.progress = Progress()
        self._points: Figures = {}  # of the last update
        self.best_weights: dict[str, Any] = {}
        self._random_states: list[dict[str, Any]] | None = None  # to go on with, in the middle of an epoch
        self._resumed = False  # and has drawn nothing yet
        self._frozen: set[int] = set()  # the ids of modules that stay in eval mode
        self._fitted = False
        self._signals = Signals()
        self._warned = False  # of an update in which nothing counts
        self._stop = False  # one of the processes was sent a signal, and all know
        self._checkpoints: Checkpoints | None = None
        if self.settings.run_dir is not None:
            self._resume_or_refuse()

    def fit(self) -> FitResult:
        """Train to the last epoch, or until patience runs out; leaves the best weights, in eval mode.

        Can be called once: after an interruption, make a new Trainer with `resume`.

        Raises:
            Interrupted: after SIGINT (Ctrl-C) or SIGTERM, when the update is made and a checkpoint written.
            NonFiniteError: where the loss or the gradient becomes NaN or infinite; the weights are still
                those before that update. (Or see the setting `on_nonfinite`.)
            CheckpointError: for a state that no checkpoint can hold; where a resumed run draws other batches than
                before; and with on_disk_error="stop", if no checkpoint can be written.
            ValueError: for batches that are not what the model and the loss need.
        """
        if self._fitted:
            raise RuntimeError("fit() was called before: make a new Trainer, with resume to continue its run")
        self._fitted = True
        settings, progress = self.settings, self.progress
        self._frozen = _frozen(self.model)
        folder = settings.run_dir if self.first else None
        go_on = settings.on_disk_error == "go_on"
        if folder is not None:
            self._checkpoints = Checkpoints(folder, settings.keep_last, go_on)
            self._checkpoints.write_text("settings.json", self._recipe())
        # Purged are what a run has left that never saved, and the last step of one that was asked to stop.
        step = progress.step + (progress != Progress() and not progress.points)
        with (
            self._signals,
            TrainingLog(folder, step, go_on) as log,
            self._progress_bar() as bar,
            Watch(settings.loader_warning) as watch,
        ):
            try:
                log.settings(settings, self.model, self.optimizer, self.device, step)
                log.layout(["loss", *self.metrics], step)
                log.points(progress.points or {}, progress.step)
                progress.points = None
                if progress == Progress():
                    self._save(log)  # from here on there is something to resume
                while progress.epoch < settings.epochs and not self._out_of_patience():
                    bar.set_description(f"epoch {progress.epoch + 1}/{settings.epochs}")
                    if progress.trained:
                        self._take_up_random_states()
                    else:
                        self._train_epoch(log, bar, watch)
                    self._end_epoch(log, watch)
                return self._finish(log)
            finally:
                if self._checkpoints is not None:
                    self._checkpoints.close()

    def evaluate(self, loader: Loader) -> Figures:
        """The "loss" and metrics of all the batches of a loader together, with the model in eval mode.

        Raises:
            NonFiniteError: where the loss is NaN or infinite.
            ValueError: for batches that are not what the model and the loss need; where nothing counts in any.
        """
        return self._evaluate(self.processes.loader(loader), "the loader")

    def _evaluate(self, loader: Loader, name: str, watch: Watch | None = None) -> Figures:
        averages = Averages()
        modes = _modes(self.model)
        self.processes.agree_on_buffers(self.model)
        self.model.eval()
        try:
            with torch.no_grad():
                for part in self._parts(loader, name, watch):
                    part = part.to(self.device)
                    with explained(self.model, part, name):
                        means = self._forward(self.model, part)
                    mine = Averages()
                    mine.add(_floats(means), part.examples)
                    every = self._of_all(mine)
                    if not math.isfinite(every.totals["loss"]):
                        raise self._nonfinite([part], self.progress.step, "evaluation")
                    averages.merge(every)
                    if watch is not None and self._stop:
                        raise _StoppedInValidation
        finally:
            self.processes.part_again(self.model)
            _set_modes(self.model, modes)
        if not averages.counts["loss"]:
            raise ValueError(f"{name} has nothing that counts for the loss: all its targets are ignored")
        return averages.means()

    def _train_epoch(self, log: TrainingLog, bar: "tqdm[Any]", watch: Watch) -> None:
        settings, progress = self.settings, self.progress
        self._train_mode()
        self._compare_epoch_before()
        seed_epoch(self.train_loader, settings.seed, progress.epoch)
        self._order.begin(settings.seed, progress.epoch)
        batches = watch.over(self._order.over(pairs(self.train_loader, "train_loader")), "train_loader")
        updates = groups(self.processes.parts(self.train_loader, batches), settings.accumulate)
        self._skip_seen(updates)

        clock, counted, due = time.perf_counter(), progress.running.examples, False
        while True:
            if self._stop:  # and do not draw: the loader's workers may have been stopped too
                self._save_and_stop(log)
            states = random_states() if due else None  # before the draw, which a resumed run makes again
            try:
                group = next(updates, None)
            except Exception:
                if self.processes.size == 1:  # of several the others might not be here
                    if self._signals.received:  # the loader's workers heeded it before the trainer could
                        self._save_and_stop(log)
                    self._save(log)
                raise
            if group is None:  # the end of an epoch has a checkpoint of its own
                return
            if due:
                self._save(log, states)
            if progress == Progress():
                self._look_at_first(group[0].to(self.device), log)
            if progress.drawn == 0 and self.processes.size > 1:  # the order is drawn alike, the dropout is not
                seed_all(settings.seed, progress.epoch, self.processes.rank)
            progress.drawn, progress.order = progress.drawn + 1, self._order.drawn()
            self._points = {}
            try:
                update = self._update(group)
            except NonFiniteError as error:
                if not self._recovered(error, log, bar):
                    raise
                continue
            if update is None:
                self._warn_of_nothing()
                continue
            progress.running.merge(update.figures)
            progress.step += 1
            bar.update()
            if progress.step % settings.log_every == 0:
                seconds, examples = time.perf_counter() - clock, progress.running.examples - counted
                clock, counted = time.perf_counter(), progress.running.examples
                means, step = update.figures.means(), progress.step
                self._points = log.update(means, update.norm, self.optimizer, examples / seconds, step)
                bar.set_postfix(self._postfix(means), refresh=False)
            if self.schedule is not None and not self._schedule_by_epoch() and not update.skipped:
                self.schedule.step()
            if progress.step == 1:  # an optimizer has more to save now
                self._states()
            every = settings.checkpoint_every
            due = every is not None and progress.step % every == 0

    def _train_mode(self) -> None:
        """As by `model.train()`, but for the frozen modules."""
        self.model.train()
        _set_modes(self.model, _modes(self.model) | dict.fromkeys(self._frozen, False))

    def _look_at_first(self, part: Part, log: TrainingLog) -> None:
        """Refuse what would go wrong only at the end of the epoch, and measure what a batch keeps for backward."""
        check_last_batch(self._bare(), self.whole_train_loader, part, self.processes.size)
        if self.settings.parallel == "ddp" or self.processes.size == 1:  # one process alone may run it then
            with explained(self.model, part, "train_loader"), self.autocast():
                log.saved_bytes(self.model, part.input, self.progress.step)

    def _update(self, group: list[Part]) -> Update | None:
        """One step of the optimizer, whose gradient is that of one batch made of all those in the group.

        None: there is nothing that counts in any of them, and no step was made.

        Their gradient is Σ countᵢ gᵢ / Σ countᵢ, and Σ countᵢ is known after the last forward. Until then the
        gradients are divided by an estimate, the count of the first batch times the number of batches.
        """
        before = torch_states()
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]  # bad numbers would stay in them
        group = [part.to(self.device) for part in group]
        single = len(group) == self.processes.size == 1
        estimate = 0.0
        forwards: list[dict[str, Mean]] = []
        self.optimizer.zero_grad()
        for number, part in enumerate(group, start=1):
            with self.processes.without_sending(self._network, last=number == len(group)):
                with explained(self.model, part, "train_loader"):
                    means = self._forward(self._run, part, dropped=single)
                loss, count = means["loss"]
                if not single:
                    if not estimate:
                        estimate = len(group) * self.processes.sum([float(count)])[0]
                    if estimate:
                        loss = loss * (float(count) * self.processes.size / estimate)  # of a mean over processes
                self.scaler.scale(loss).backward()
            forwards.append(means)

        mine = Averages()  # only now are numbers asked for, which waits for the device
        for part, means in zip(group, forwards, strict=True):
            mine.add(_floats(means), part.examples)
        figures = self._of_all(mine)
        total = figures.counts["loss"]
        if not total:
            self.optimizer.zero_grad()
            return None
        if not single and total != estimate:
            for gradient in self._gradients():
                gradient.mul_(estimate / total)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        overflow = not math.isfinite(norm)
        curable = self.scaler.get_scale() > 1  # by a smaller scale, as float16 is meant to find it
        if not math.isfinite(figures.totals["loss"]) or (overflow and not curable):
            self.scaler.update()
            for buffer, value in buffers:
                buffer.copy_(value)
            after = torch_states()
            set_torch_states(before)  # for the same dropout again
            error = self._nonfinite(group, self.progress.step + 1, f"update {self.progress.drawn}")
            set_torch_states(after)
            for buffer, value in buffers:
                buffer.copy_(value)
            raise error
        self.scaler.step(self.optimizer)  # not taken on an overflow
        self.scaler.update()
        return Update(figures, norm, skipped=overflow)

    def _end_epoch(self, log: TrainingLog, watch: Watch) -> None:
        settings, progress = self.settings, self.progress
        seed_generators(self.validation_loader, settings.seed, progress.epoch)
        states = random_states()
        validation: Figures = {}
        if self.validation_loader is not None:
            try:
                validation = self._evaluate(self.validation_loader, "validation_loader", watch)
            except Exception as error:
                ended = self._signals.received and self.processes.size == 1  # the loader's workers, as above
                if not (ended or isinstance(error, _StoppedInValidation)):
                    raise
                progress.trained = True
                self._save_and_stop(log, states)

        if progress.running.counts.get("loss"):
            progress.train = progress.running.means()
        progress.epoch, progress.drawn, progress.running = progress.epoch + 1, 0, Averages()
        progress.order_before, progress.order = progress.order, Drawn()
        progress.left_out_before, progress.trained, self._points = progress.left_out, False, {}
        log.epoch("train", progress.train, progress.step)
        log.epoch("validation", validation, progress.step)
        every = settings.histogram_every if settings.run_dir is not None else None
        if every and progress.epoch % every == 0:
            log.histograms(self.model, progress.step)
        if self.on_epoch is not None:
            self.model.eval()
            with torch.no_grad():
                self.on_epoch(log, progress.step)
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(validation["loss"])
        elif self.schedule is not None and self._schedule_by_epoch():
            self.schedule.step()

        best = bool(validation) and validation["loss"] < progress.best.get("loss", math.inf)
        if best:
            progress.best, progress.best_epoch = validation, progress.epoch
            self.best_weights = deepcopy(self._bare().state_dict())
        self._save(log, best=best)

    def _finish(self, log: TrainingLog) -> FitResult:
        progress = self.progress
        if self.best_weights:
            self._bare().load_state_dict(self.best_weights)
        self.model.eval()
        with torch.no_grad():
            summary = dict(self.summary(log, progress.step + 1)) if self.summary is not None else {}
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
            left_out=progress.left_out,
            summary=summary,
        )

    def _forward(self, model: Callable[..., Any], part: Part, dropped: bool = False) -> dict[str, Mean]:
        """The "loss" and the metrics of a batch.

        Args:
            dropped: whether the gradients of a loss in which nothing counts are not used; else they must be zero.
        """
        with self.autocast():
            prediction = model(part.input)
            check_shapes(prediction, part.target)
            loss = mean_of(self.loss, prediction, part.target, part.examples)
        check_loss(loss.value, training=torch.is_grad_enabled())
        if not dropped and not float(loss.count):  # which asks for a number, and waits for the device
            loss = Mean(nothing(prediction, loss.value), 0)
        means = {"loss": loss}
        with torch.no_grad():
            for name, metric in self.metrics.items():
                means[name] = mean_of(metric, prediction, part.target, part.examples)
        return means

    def _clip(self) -> float:
        """The norm of the whole gradient, which is scaled down to clip_norm where it is larger."""
        gradients = self._gradients()
        norm = whole(get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients]))
        if self.settings.clip_norm is not None:
            sparse = any(gradient.is_sparse for gradient in gradients)
            clip_grads_with_norm_(
                self._parameters(), self.settings.clip_norm, norm, foreach=False if sparse else None
            )
        return norm.item()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters() if parameter.grad is not None]

    def _parts(self, loader: Loader, name: str, watch: Watch | None) -> Iterator[Part]:
        batches = pairs(loader, name)
        return self.processes.parts(loader, batches if watch is None else watch.over(batches, name))

    def _schedule_by_epoch(self) -> bool:
        return self.settings.schedule_every == "epoch" or isinstance(self.schedule, ReduceLROnPlateau)

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.epoch - self.progress.best_epoch >= patience

    def _progress_bar(self) -> "tqdm[Any]":
        settings, batches = self.settings, size(self.train_loader)
        total = settings.epochs * math.ceil(batches / settings.accumulate) if batches is not None else None
        quiet = None if settings.progress and self.first else True  # None: quiet unless on a terminal
        return tqdm(total=total, initial=self.progress.step, disable=quiet, unit=" updates", dynamic_ncols=True)

    def _postfix(self, means: Figures) -> dict[str, str]:
        best = {"best validation": f"{self.progress.best['loss']:.4g}"} if self.progress.best else {}
        return {"loss": f"{means['loss']:.4g}"} | best

    # Bad numbers, and being asked to stop.

    def _nonfinite(self, parts: list[Part], step: int, where: str) -> NonFiniteError:
        """What went bad; written to the run folder with all that it takes to see it again."""
        weights = self.processes.put_together(self._bare().state_dict())
        states = as_plain(random_states())

        def run(input: Tensor, target: Tensor) -> Tensor:
            return self.scaler.scale(self._forward(self.model, Part(input, target, len(target)))["loss"].value)

        batches = [(part.input, part.target) for part in parts]
        found = find_nonfinite(self.model, batches, run, self.processes.first_found)
        error = NonFiniteError(step, f"epoch {self.progress.epoch + 1}, {where}", *found)
        every = self.processes.gathered([(input.cpu(), target.cpu()) for input, target in batches])
        if self.first and self.settings.run_dir is not None:
            path = self.settings.run_dir / f"nonfinite-step-{step}.pt"
            batches = [batch for each in every for batch in each]
            content = {"report": str(error), "batches": batches, "model": weights, "random": states}
            try:
                torch.save(checkpoint.plain(content), path)
            except (OSError, RuntimeError) as failure:
                error.add_note(f"{path} could not be written: {failure}")
            else:
                error.path = path
                error.add_note(f"its batches, the weights before it and the random states are in {path}")
        return error

    def _recovered(self, error: NonFiniteError, log: TrainingLog, bar: "tqdm[Any]") -> bool:
        """Whether training goes on, with the next batches, after an update that was bad."""
        settings, progress = self.settings, self.progress
        progress.left_out += 1
        if (
            settings.on_nonfinite == "stop"
            or progress.left_out - progress.left_out_before > settings.nonfinite_limit
        ):
            return False
        self.optimizer.zero_grad()
        done = "left out"
        if settings.on_nonfinite == "back_up":
            assert settings.run_dir is not None
            if self._checkpoints is not None:
                self._checkpoints.wait()
            path, saved = self.processes.told(checkpoint.newest(settings.run_dir) if self.first else None)
            self._load(saved)
            bar.update(saved["progress"]["step"] - progress.step)
            progress.step = saved["progress"]["step"]
            log.purge(progress.step + 1)
            self._save(log)  # from here on this is what there is to resume
            done = f"back to {path.name}"
        if self.first:
            warn("; ".join([f"{error}: {done}", *getattr(error, "__notes__", ())]))
        return True

    def _warn_of_nothing(self) -> None:
        if self.first and not self._warned:
            where = f"epoch {self.progress.epoch + 1}, update {self.progress.drawn}"
            warn(f"{where}: nothing counts for the loss, as all targets are ignored; such updates are left out")
        self._warned = True

    def _of_all(self, mine: Averages) -> Averages:
        """The figures of all processes together; and whether one was asked to stop is told in the same message."""
        mine.totals["stop"] = float(self._signals.received)
        figures = mine.over_processes(self.processes.sum)
        self._stop = figures.totals.pop("stop") > 0
        return figures

    def _save_and_stop(self, log: TrainingLog, states: tuple[Any, ...] | None = None) -> NoReturn:
        """End as asked, with what the end of the epoch would need of the last update: its points and gradients."""
        self.progress.points = self._points
        self._save(log, states, stopped=True)
        if self._checkpoints is not None:
            self._checkpoints.wait()
        folder = self.settings.run_dir
        saved = "; nothing was saved, as there is no run_dir" if folder is None else f"; to go on: resume {folder}"
        raise Interrupted(self._signals.received or signal.SIGTERM, self.progress.step, saved)

    # What a checkpoint holds, and how it is taken up again.

    def _save(
        self,
        log: TrainingLog,
        states: tuple[Any, ...] | None = None,
        best: bool = False,
        stopped: bool = False,
    ) -> None:
        if self.settings.run_dir is None:
            return
        parts = self._states()
        random = self.processes.gathered(as_plain(random_states() if states is None else states))
        payload = {"run": self._identity(), "progress": asdict(self.progress), "random": random}
        if stopped:
            parts["gradients"] = {name: parameter.grad for name, parameter in self._bare().named_parameters()}
        payload |= self.processes.put_together(parts)
        if self._checkpoints is not None:
            log.flush()
            self._checkpoints.save(self.progress.step, payload, best)

    def _resume_or_refuse(self) -> None:
        folder = self.settings.run_dir
        assert folder is not None
        if not self.settings.resume:
            if self.processes.told(bool(checkpoint.all_in(folder))):
                raise CheckpointError(f"{folder} holds a run already: resume it or take another folder")
            return
        found = self.processes.told(self._found(folder) if self.first else None)
        if isinstance(found, CheckpointError):
            raise found
        if found is None:  # the command that began a run may be the one that resumes it
            return
        (path, saved), best = found
        checkpoint.check_same(path, "run", saved["run"], self._identity())
        checkpoint.check_same(path, "model", _tensors(saved["model"]), _tensors(self._bare().state_dict()))
        self._load(saved)
        self.progress, self._resumed = Progress.from_dict(saved["progress"]), True
        if self.progress.drawn:  # else the epoch to come is seeded anyway
            self._random_states = saved["random"]
        if self.progress.points is not None:
            self._points = self.progress.points
            for name, parameter in self._bare().named_parameters():
                if (gradient := saved["gradients"][name]) is not None:
                    parameter.grad = as_parted(gradient.to(parameter.device), parameter)
        if best is not None:
            self.best_weights = parted_model(best["model"], self._bare())
            if best["progress"]["best_epoch"] > self.progress.best_epoch:  # as the run, going on, will find again
                self.progress.best = best["progress"]["best"]
                self.progress.best_epoch = best["progress"]["best_epoch"]
        elif self.progress.best_epoch:
            self.progress.best, self.progress.best_epoch = {}, 0

    def _found(self, folder: Path) -> Any:
        """The newest whole checkpoint and the best one; None where there is no run, and an error to be told."""
        try:
            found = checkpoint.newest(folder)
        except CheckpointError as error:
            return error
        if found is None:
            return None
        try:
            return found, checkpoint.load(folder / BEST) if found[1]["progress"]["best_epoch"] else None
        except CheckpointError as error:
            warn(f"{error}: the best epoch is looked for anew")
            return found, None

    def _load(self, saved: Mapping[str, Any]) -> None:
        for name, part in self._stateful().items():
            state = saved[name]
            if part is self._bare():
                state = parted_model(state, part)
            elif part is self.optimizer:
                state = parted_optimizer(state, part)
            part.load_state_dict(state)

    def _stateful(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self._bare(), "optimizer": self.optimizer, "scaler": self.scaler}
        if isinstance(self.loss, nn.Module):
            parts["loss"] = self.loss
        if self.schedule is not None:
            parts["schedule"] = self.schedule
        return parts

    def _states(self) -> dict[str, Any]:
        """What a checkpoint holds of each.

        Raises:
            CheckpointError: in every process, where there is a checkpoint to write and none can hold it.
        """
        states = {name: part.state_dict() for name, part in self._stateful().items()}
        if self.settings.run_dir is not None:
            checkpoint.plain(states, copy=False)
        return states

    def _bare(self) -> nn.Module:
        """The model, without what torch.compile puts around it."""
        return getattr(self.model, "_orig_mod", self.model)

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

    def _recipe(self) -> str:
        """All that is needed to repeat the run, given the same data: the command, the settings, the versions."""
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "manualgrad": __version__,
        }
        settings = self.settings.model_dump(mode="json")
        return json.dumps({"command": sys.argv, "settings": settings, "versions": versions}, indent=2) + "\n"

    def _skip_seen(self, updates: Iterator[Any]) -> None:
        """Draw the batches seen before an interruption once more, then take up its random states.

        Raises:
            CheckpointError: where they are others.
        """
        progress = self.progress
        for _ in range(progress.drawn):
            if next(updates, None) is None:
                raise CheckpointError(f"{self._at_resuming()}, and fewer than it drew before")
        if progress.order != Drawn() and not same(progress.order, self._order.drawn()):
            raise CheckpointError(f"{self._at_resuming()}. {_EPOCHS_MUST_REPEAT}")
        self._take_up_random_states()

    def _compare_epoch_before(self) -> None:
        """Begin the epoch before once more, where a run was resumed between two, to see whether it repeats.

        Raises:
            CheckpointError: where it has other indices. (Of a stream, which another batch may begin for the noise
                in it alone, a warning.)
        """
        progress, resumed, self._resumed = self.progress, self._resumed, False
        if not resumed or progress.drawn or progress.order_before == Drawn():
            return
        seed, epoch = self.settings.seed, progress.epoch - 1
        seed_epoch(self.train_loader, seed, epoch)
        self._order.begin(seed, epoch)
        if begin_alike(progress.order_before, self._order.again()):
            return
        message = f"train_loader gives other batches than before for epoch {epoch + 1}, begun once more to compare"
        if self._order.by_indices:
            raise CheckpointError(f"{message}: the epochs to come would be others too. {_EPOCHS_MUST_REPEAT}")
        if self.first:
            warn(f"{message}: the epochs to come may not be those of an uninterrupted run. {_EPOCHS_MUST_REPEAT}")

    def _at_resuming(self) -> str:
        progress = self.progress
        where = f"epoch {progress.epoch + 1}, before update {progress.drawn + 1}"
        return f"{self.settings.run_dir} cannot be resumed ({where}): train_loader gives other batches than before"

    def _take_up_random_states(self) -> None:
        states, self._random_states = self._random_states, None
        if states is None:
            return
        if len(states) == self.processes.size:
            set_random_states(states[self.processes.rank])
        else:  # there were more processes, or fewer
            seed_all(self.settings.seed, self.progress.epoch, self.processes.rank, self.progress.drawn)


class _StoppedInValidation(Exception):
    pass


_EPOCHS_MUST_REPEAT = (
    "Its order may depend on the seed and the epoch only: let it draw from the global generators of torch, numpy "
    "or python, hold its own generator as an attribute, or have a method set_epoch(epoch)"
)


def _modes(model: nn.Module) -> dict[int, bool]:
    """Which modules are in training mode, by their ids."""
    return {id(module): module.training for module in model.modules()}


def _set_modes(model: nn.Module, modes: Mapping[int, bool]) -> None:
    """Put each module in its mode, by its own method, from the outermost on."""
    for module in model.modules():
        if module.training != modes.get(id(module), module.training):
            module.train(not module.training)


def _frozen(model: nn.Module) -> set[int]:
    """The modules that stay in eval mode: those that are in it now, unless all are."""
    modes = _modes(model)
    return {module for module, training in modes.items() if not training} if any(modes.values()) else set()


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """The tensors of a model's state; None for what its modules add to them, which may change as they train."""
    return {
        name: value if isinstance(value, Tensor) and not name.endswith("_extra_state") else None
        for name, value in state.items()
    }


def _floats(means: Mapping[str, Mean]) -> dict[str, tuple[float, float]]:
    """The figures and their counts, as numbers.

    Raises:
        ValueError: for a count that is negative, infinite or NaN.
    """

    def number(value: Tensor | float) -> float:
        return float(value.item() if isinstance(value, Tensor) else value)

    numbers = {name: (number(mean.value), number(mean.count)) for name, mean in means.items()}
    for name, (_, count) in numbers.items():
        if not 0 <= count < math.inf:
            raise ValueError(f"the count of {name!r} must not be negative, infinite or NaN, and is {count}")
    return numbers
