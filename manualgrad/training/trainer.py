"""The training loop: `fit`, `_train_epoch` and `_training_step`. The modules that they call do the rest."""

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .batches import Loader, LoaderWatchdog, checked, grouped
from .checkpoint_manager import CheckpointManager
from .checks import check_arguments, check_last_batch, noting_shapes
from .data_order import DataOrder
from .distributed import Distributed, Shard
from .gradients import clip_gradients, gradients
from .modules import ModuleModes, evaluating, unwrap_compiled
from .nonfinite import NonFiniteError, Snapshot, diagnose
from .objective import Objective, average
from .progress_bar import progress_bar, show_losses
from .random_state import get_random_states, seed_all, seed_generators
from .settings import TrainingSettings
from .signals import Interrupted, SignalHandler
from .state import FitResult, MetricAverages, Metrics, TrainerState, warn
from .tensorboard_logger import TensorBoardLogger
from .weighted_means import LossOrMetric, Mean


class StepResult(NamedTuple):
    """The result of one update."""

    averages: MetricAverages
    """Over all its batches, and all processes."""
    norm: float
    """The norm of the gradient before clipping."""
    overflowed: bool
    """float16 overflowed: the scale of the loss was lowered, and the weights did not change."""


class Trainer:
    """Trains a model.

    Args:
        model: any nn.Module; moved to the device of the settings.
        loss: callable(prediction, target) that returns the mean over a batch as a scalar tensor, or (mean, count).
            Means are weighted by their counts (see LossOrMetric), so an update of several batches or processes is
            that of one batch with all their examples. An update with count 0 (all targets ignored) is skipped.
        optimizer: from torch.optim, made from the model's parameters.
        train_loader: an iterable of (input, target) pairs of tensors that can be iterated once per epoch, such as
            a DataLoader. The first dimension of the target counts the examples.
        validation_loader: the same for validation, after every epoch.
        settings: how to train.
        lr_scheduler: from torch.optim.lr_scheduler. Steps after every update or epoch, as the settings say;
            ReduceLROnPlateau after every epoch, with the validation loss.
        metrics: by name, callables like the loss, averaged like the loss.
        on_epoch_end: callback(logger, step) after each epoch's validation, in eval mode and without gradients. It
            can log pictures, text or audio with ``logger.add(step, write)``.
        on_fit_end: callback(logger, step) at the end, with the best weights in the model. It returns final metrics
            by name, such as those of a test set.

    A module that is in eval mode when `fit` begins, such as a frozen batch norm, stays in eval mode; if the whole
    model is in eval mode, as `from_pretrained` returns it, all of it is trained. README.md in this folder says how
    runs are reproduced and resumed, what a checkpoint can hold, and how several processes train together.

    Attributes:
        state: epoch, global step and metrics.
        is_main_process: whether this process prints and writes for all.

    Raises:
        ValueError: for arguments that do not fit together, before anything is allocated or written.
        CheckpointError: if run_dir holds a run already and `resume_from_checkpoint` is off; or it is on and no
            checkpoint is intact, or the newest is of another run.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossOrMetric,
        optimizer: Optimizer,
        train_loader: Loader,
        validation_loader: Loader | None = None,
        *,
        settings: TrainingSettings | None = None,
        lr_scheduler: LRScheduler | None = None,
        metrics: Mapping[str, LossOrMetric] | None = None,
        on_epoch_end: Callable[[TensorBoardLogger, int], object] | None = None,
        on_fit_end: Callable[[TensorBoardLogger, int], Mapping[str, float]] | None = None,
    ) -> None:
        self.model, self.loss, self.optimizer, self.lr_scheduler = model, loss, optimizer, lr_scheduler
        self.settings, self.metrics = settings or TrainingSettings(), dict(metrics or {})
        self.on_epoch_end, self.on_fit_end = on_epoch_end, on_fit_end
        loaders = {"train_loader": train_loader, "validation_loader": validation_loader}
        check_arguments(model, optimizer, lr_scheduler, loaders, self.metrics, self.settings)
        self.device = self.settings.torch_device()

        self.model.to(self.device)
        if isinstance(loss, nn.Module):
            loss.to(self.device)
        precision = self.settings.precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        dtype = torch.float16 if precision == "float16" else torch.bfloat16
        autocast = partial(torch.autocast, self.device.type, dtype=dtype, enabled=precision != "float32")
        self._objective = Objective(loss, self.metrics, autocast)

        self.distributed = Distributed(self.device)
        self.is_main_process = self.distributed.is_main_process
        fingerprints = self.settings.run_dir is not None
        self._full_train_loader = train_loader
        self._order = DataOrder(self.distributed.shard_loader(train_loader), self.settings.seed, fingerprints)
        self.train_loader = self._order.loader
        self.validation_loader = validation_loader and self.distributed.shard_loader(validation_loader)
        self._network = self.distributed.wrap_model(model, optimizer, self.settings.strategy)
        self._compiled = torch.compile(self._network) if self.settings.compile else self._network

        self.checkpoints = CheckpointManager(
            model, optimizer, lr_scheduler, self.scaler, loss, self.train_loader, self.settings, self.distributed
        )
        self.state = self.checkpoints.resume()
        self._check_previous_epoch = self.checkpoints.resumed
        self._signals = SignalHandler()
        self._stop_requested = False  # a process received a signal, and all processes know
        self._checkpoint_due = False
        self._points: Metrics = {}  # logged for the last update
        self._fitted = self._warned = False

    def fit(self) -> FitResult:
        """Train to the last epoch, or until patience runs out. The model then has the best weights, in eval mode.

        Can be called once: after an interruption, make a new Trainer with `resume_from_checkpoint`.

        Raises:
            Interrupted: after SIGINT (Ctrl-C) or SIGTERM, when the update is complete and a checkpoint written.
            NonFiniteError: if the loss or the gradient is NaN or infinite. The weights are those before that
                update. (The setting `on_nonfinite` can skip the update or roll back instead.)
            CheckpointError: for state that a checkpoint cannot hold; if a resumed run draws other batches than
                before; with on_disk_error="stop", if a checkpoint cannot be written.
            ValueError: for batches that do not fit the model or the loss.
        """
        if self._fitted:
            raise RuntimeError(
                "fit() was called before: make a new Trainer with resume_from_checkpoint to continue"
            )
        self._fitted = True
        self._modes = ModuleModes(self.model)
        with self._run():
            while self.state.epoch < self.settings.max_epochs and not self._out_of_patience():
                self._bar.set_description(f"epoch {self.state.epoch + 1}/{self.settings.max_epochs}")
                if self.state.epoch_trained:  # the run was interrupted in validation
                    self.checkpoints.restore_random_states(self.state)
                else:
                    self._train_epoch()
                validation = self._validate_epoch()
                self._end_epoch(validation)
            return self._finish()

    def _train_epoch(self) -> None:
        settings, state = self.settings, self.state
        self._modes.train()
        for batches in self._draw_batches():
            state.updates_drawn, state.order = state.updates_drawn + 1, self._order.fingerprint()
            self._points = {}
            try:
                result = self._training_step(batches)
            except NonFiniteError as error:
                self._skip_or_roll_back(error)
                continue
            if result is None:
                self._warn_of_zero_count()
                continue
            state.epoch_averages.merge(result.averages)
            state.global_step += 1
            self._bar.update()
            if state.global_step % settings.log_every_n_steps == 0:
                self._log_step(result)
            if self.lr_scheduler is not None and not self._scheduler_steps_by_epoch() and not result.overflowed:
                self.lr_scheduler.step()
            if state.global_step == 1:  # the optimizer has more state now
                self.checkpoints.check_serializable()
            every = settings.checkpoint_every_n_steps
            self._checkpoint_due = every is not None and state.global_step % every == 0

    def _training_step(self, batches: list[Shard]) -> StepResult | None:
        """Make one update from several batches: forward, loss, backward, clip, optimizer step.

        The gradient is Σ countᵢ gᵢ / Σ countᵢ, as that of one batch with all the examples. Σ countᵢ is known after
        the last forward only. So the gradients are divided by an estimate, the count of the first batch times the
        number of batches, and corrected at the end.

        Returns:
            None if Σ countᵢ is 0. No step was made.
        """
        snapshot = Snapshot(self.model)
        batches = [batch.to(self.device) for batch in batches]
        single = len(batches) == self.distributed.world_size == 1
        estimate, outputs = 0.0, []
        self.optimizer.zero_grad()
        for number, batch in enumerate(batches, start=1):
            with self.distributed.gradient_sync(self._network, enabled=number == len(batches)):
                with noting_shapes(self.model, batch, "train_loader"):
                    means = self._objective.forward(self._compiled, batch, allow_nan=single)
                loss, count = means["loss"]
                if not single:
                    estimate = estimate or len(batches) * self.distributed.all_reduce_sum([float(count)])[0]
                    if estimate:  # times world_size, because gradients are averaged over the processes
                        loss = loss * (float(count) * self.distributed.world_size / estimate)
                self.scaler.scale(loss).backward()
            outputs.append(means)

        averages = self._averages(batches, outputs)  # the first wait for the device
        total = averages.counts["loss"]
        if not total:
            self.optimizer.zero_grad()
            return None
        if not single and total != estimate:
            for gradient in gradients(self.optimizer):
                gradient.mul_(estimate / total)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.optimizer, self.settings.max_grad_norm)
        overflow = not math.isfinite(norm)
        lower_scale_helps = self.scaler.get_scale() > 1  # float16 finds its scale by overflows
        if not math.isfinite(averages.totals["loss"]) or (overflow and not lower_scale_helps):
            self.scaler.update()
            with snapshot.rerun():
                error = self._diagnose(batches, self.state.global_step + 1, f"update {self.state.updates_drawn}")
            raise error
        self.scaler.step(self.optimizer)  # skipped by the scaler after an overflow
        self.scaler.update()
        return StepResult(averages, norm, overflow)

    def evaluate(self, loader: Loader) -> Metrics:
        """Return the mean "loss" and metrics over all batches of a loader, with the model in eval mode.

        Raises:
            NonFiniteError: if the loss is NaN or infinite.
            ValueError: for batches that do not fit the model or the loss; if the count of all batches is 0.
        """
        loader = self.distributed.shard_loader(loader)
        return self._evaluate(loader, checked(loader, "the loader"), "the loader")

    def _evaluate(
        self, loader: Loader, batches: Iterator[Any], name: str, stop_on_signal: bool = False
    ) -> Metrics:
        averages = MetricAverages()
        self.distributed.broadcast_buffers(self.model)
        try:
            with evaluating(self.model), torch.no_grad():
                for batch in self.distributed.shards(loader, batches):
                    batch = batch.to(self.device)
                    with noting_shapes(self.model, batch, name):
                        means = self._objective.forward(self.model, batch)
                    reduced = self._averages([batch], [means])
                    if not math.isfinite(reduced.totals["loss"]):
                        raise self._diagnose([batch], self.state.global_step, "evaluation")
                    averages.merge(reduced)
                    if stop_on_signal and self._stop_requested:
                        raise _StopValidation
        finally:
            self.distributed.reshard(self.model)
        if not averages.counts["loss"]:
            raise ValueError(f"the count of the loss is 0 in all batches of {name}: all targets are ignored")
        return averages.means()

    def _validate_epoch(self) -> Metrics:
        seed_generators(self.validation_loader, self.settings.seed, self.state.epoch)
        random_states = get_random_states()
        if self.validation_loader is None:
            return {}
        name = "validation_loader"
        batches = self._watchdog.watch(checked(self.validation_loader, name), name)
        try:
            return self._evaluate(self.validation_loader, batches, name, stop_on_signal=True)
        except Exception as error:
            if not (isinstance(error, _StopValidation) or self._workers_were_stopped()):
                raise
            self.state.epoch_trained = True
            self._save_and_stop(random_states)

    def _end_epoch(self, validation: Metrics) -> None:
        settings, state, logger = self.settings, self.state, self._logger
        state.start_next_epoch()
        self._points = {}
        logger.log_epoch("train", state.train_metrics, state.global_step)
        logger.log_epoch("validation", validation, state.global_step)
        every = settings.histograms_every_n_epochs if settings.run_dir is not None else None
        if every and state.epoch % every == 0:
            logger.log_histograms(self.model, state.global_step)
        if self.on_epoch_end is not None:
            self.model.eval()
            with torch.no_grad():
                self.on_epoch_end(logger, state.global_step)
        if isinstance(self.lr_scheduler, ReduceLROnPlateau):
            self.lr_scheduler.step(validation["loss"])
        elif self.lr_scheduler is not None and self._scheduler_steps_by_epoch():
            self.lr_scheduler.step()

        best = bool(validation) and validation["loss"] < state.best_metrics.get("loss", math.inf)
        if best:
            state.best_metrics, state.best_epoch = validation, state.epoch
            self.checkpoints.keep_best_weights()
        self._save(best=best)

    def _finish(self) -> FitResult:
        state = self.state
        self.checkpoints.load_best_weights()
        self.model.eval()
        with torch.no_grad():
            summary = dict(self.on_fit_end(self._logger, state.global_step + 1)) if self.on_fit_end else {}
        result = FitResult.from_state(state, self.settings.max_epochs, summary)
        self._logger.log_summary(self.settings, result.all_metrics(), state.global_step + 1)
        return result

    # What surrounds the loop

    @contextmanager
    def _run(self) -> Iterator[None]:
        """Handle signals, and open the checkpoint writer, the logger, the progress bar and the watchdog."""
        settings, state = self.settings, self.state
        self.checkpoints.start()
        new = state == TrainerState()
        # Purge the points of a run that was killed before its first checkpoint, and those of the last step of a
        # run that was interrupted.
        step = state.global_step + (not new and not state.interrupted_points)
        folder = settings.run_dir if self.is_main_process else None
        with (
            self._signals,
            TensorBoardLogger(folder, step, settings.on_disk_error == "continue") as self._logger,
            progress_bar(state, settings, self.train_loader, self.is_main_process) as self._bar,
            LoaderWatchdog(settings.loader_warning_seconds) as self._watchdog,
        ):
            try:
                self._logger.log_settings(settings, self.model, self.optimizer, self.device, step)
                self._logger.log_layout(["loss", *self.metrics], step)
                self._points, state.interrupted_points = state.interrupted_points or {}, None
                self._logger.log_scalars(self._points, state.global_step)
                if new:
                    self._save()  # from now on the run can be resumed
                yield
            finally:
                self.checkpoints.close()

    def _draw_batches(self) -> Iterator[list[Shard]]:
        """Yield the batches of each update of the epoch that is left to train.

        Before each update: stop if a signal was received, and write the checkpoint that is due. It has the random
        states before the draw, because a resumed run draws these batches again.
        """
        state, several_processes = self.state, self.distributed.world_size > 1
        if self._check_previous_epoch:
            self._order.check_previous_epoch(state, self.is_main_process)
        self._check_previous_epoch = self._checkpoint_due = False
        batches = self._watchdog.watch(self._order.begin_epoch(state.epoch), "train_loader")
        updates = grouped(
            self.distributed.shards(self.train_loader, batches), self.settings.accumulate_grad_batches
        )
        self._order.skip_drawn(updates, state, self.settings.run_dir)
        self.checkpoints.restore_random_states(state)
        self._logger.start_epoch(state.epoch_averages.examples)
        while True:
            if self._stop_requested:  # before the draw: the loader's workers may have been stopped too
                self._save_and_stop()
            random_states = get_random_states() if self._checkpoint_due else None
            try:
                update = next(updates, None)
            except Exception:
                if self._workers_were_stopped():
                    self._save_and_stop()
                if not several_processes:  # with several, the others may not be here
                    self._save()
                raise
            if update is None:  # the end of the epoch writes a checkpoint
                return
            if self._checkpoint_due:
                self._save(random_states)
            if state == TrainerState():
                self._check_first_batch(update[0].to(self.device))
            if state.updates_drawn == 0 and several_processes:  # the same order, but different dropout
                seed_all(self.settings.seed, state.epoch, self.distributed.rank)
            yield update

    def _check_first_batch(self, batch: Shard) -> None:
        """Check the size of the last batch, and log the bytes that the first one saves for backward."""
        model, world_size = unwrap_compiled(self.model), self.distributed.world_size
        check_last_batch(model, self._full_train_loader, batch, world_size)
        if self.settings.strategy == "ddp" or world_size == 1:  # FSDP cannot run the model in one process only
            with noting_shapes(self.model, batch, "train_loader"), self._objective.autocast():
                self._logger.log_saved_bytes(self.model, batch.input, self.state.global_step)

    def _log_step(self, result: StepResult) -> None:
        state, means = self.state, result.averages.means()
        examples = state.epoch_averages.examples
        self._points = self._logger.log_update(means, result.norm, self.optimizer, examples, state.global_step)
        show_losses(self._bar, state, means)

    def _averages(self, batches: list[Shard], means: list[dict[str, Mean]]) -> MetricAverages:
        """Return the averages over all processes. The same message tells them whether one received a signal."""
        averages = average(batches, means)
        averages.totals["stop"] = float(self._signals.received)
        averages = averages.reduced(self.distributed.all_reduce_sum)
        self._stop_requested = averages.totals.pop("stop") > 0
        return averages

    def _scheduler_steps_by_epoch(self) -> bool:
        return self.settings.lr_scheduler_interval == "epoch" or isinstance(self.lr_scheduler, ReduceLROnPlateau)

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.state.epoch - self.state.best_epoch >= patience

    # Errors and signals

    def _diagnose(self, batches: list[Shard], step: int, where: str) -> NonFiniteError:
        def run(input: Tensor, target: Tensor) -> Tensor:
            means = self._objective.forward(self.model, Shard(input, target, len(target)))
            return self.scaler.scale(means["loss"].value)

        where = f"epoch {self.state.epoch + 1}, {where}"
        return diagnose(self.model, batches, run, step, where, self.distributed, self.settings.run_dir)

    def _skip_or_roll_back(self, error: NonFiniteError) -> None:
        """Continue with the next batches as `on_nonfinite` says, or raise the error."""
        settings, state = self.settings, self.state
        state.skipped_updates += 1
        in_epoch = state.skipped_updates - state.skipped_before_epoch
        if settings.on_nonfinite == "stop" or in_epoch > settings.nonfinite_limit:
            raise error
        self.optimizer.zero_grad()
        action = "skipped this update"
        if settings.on_nonfinite == "rollback":
            path, step = self.checkpoints.roll_back()
            self._bar.update(step - state.global_step)
            state.global_step = step
            self._logger.purge(step + 1)
            self._save()  # a resumed run continues from here
            action = f"rolled back to {path.name}"
        if self.is_main_process:
            warn("; ".join([f"{error}: {action}", *getattr(error, "__notes__", ())]))

    def _warn_of_zero_count(self) -> None:
        if self.is_main_process and not self._warned:
            where = f"epoch {self.state.epoch + 1}, update {self.state.updates_drawn}"
            warn(f"{where}: the count of the loss is 0, because all targets are ignored; such updates are skipped")
        self._warned = True

    def _workers_were_stopped(self) -> bool:
        """Whether an error of a loader may come from workers that received the signal too."""
        return bool(self._signals.received) and self.distributed.world_size == 1

    def _save(self, random_states: tuple[Any, ...] | None = None, best: bool = False) -> None:
        self._logger.flush()
        self.checkpoints.save(self.state, random_states, best)

    def _save_and_stop(self, random_states: tuple[Any, ...] | None = None) -> NoReturn:
        """Save what the end of the epoch needs of the last update, its points and gradients, and raise."""
        self.state.interrupted_points = self._points
        self._logger.flush()
        self.checkpoints.save(self.state, random_states, with_gradients=True)
        self.checkpoints.wait()
        folder = self.settings.run_dir
        saved = "; nothing was saved: there is no run_dir" if folder is None else f"; to continue: resume {folder}"
        raise Interrupted(self._signals.received or signal.SIGTERM, self.state.global_step, saved)


class _StopValidation(Exception):
    pass
