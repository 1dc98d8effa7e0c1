"""What a checkpoint of the trainer holds: saving it, resuming from it, rolling back to it."""

import json
import platform
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import __version__
from .batches import Loader, num_batches
from .checkpoint import BEST_CHECKPOINT, CheckpointWriter, check_compatible, list_checkpoints, load, load_newest
from .distributed import Distributed, distribute_like, distribute_model_state, distribute_optimizer_state
from .modules import unwrap_compiled
from .random_state import get_random_states, seed_all, set_random_states, to_plain
from .serialization import CheckpointError, to_serializable
from .settings import TrainingSettings
from .state import TrainerState, warn
from .weighted_means import LossOrMetric


class CheckpointManager:
    """Saves and restores everything that a run needs to continue exactly. Without a run folder it does nothing.

    Args:
        model, optimizer, lr_scheduler, scaler: their state_dict is saved.
        loss: its state_dict is saved if it is a module.
        train_loader: its number of batches must stay the same on resuming.

    Attributes:
        resumed: whether `resume` found a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        scaler: torch.amp.GradScaler,
        loss: LossOrMetric,
        train_loader: Loader,
        settings: TrainingSettings,
        distributed: Distributed,
    ) -> None:
        self.model, self.optimizer = unwrap_compiled(model), optimizer
        self.lr_scheduler, self.loss = lr_scheduler, loss
        self.settings, self.distributed = settings, distributed
        self.stateful: dict[str, Any] = {"model": self.model, "optimizer": optimizer, "scaler": scaler}
        if isinstance(loss, nn.Module):
            self.stateful["loss"] = loss
        if lr_scheduler is not None:
            self.stateful["lr_scheduler"] = lr_scheduler
        self.resumed = False
        self._batches = num_batches(train_loader)
        self._best_weights: dict[str, Any] = {}
        self._random_states: list[dict[str, Any]] | None = None  # of each process, in the middle of an epoch
        self._writer: CheckpointWriter | None = None

    # Saving

    def start(self) -> None:
        """Start the writer, and write settings.json."""
        if self.settings.run_dir is not None and self.distributed.is_main_process:
            ignore_disk_errors = self.settings.on_disk_error == "continue"
            self._writer = CheckpointWriter(self.settings.run_dir, self.settings.keep_last, ignore_disk_errors)
            self._writer.write_text("settings.json", self._run_description())

    def wait(self) -> None:
        """Wait until everything is on the disk."""
        if self._writer is not None:
            self._writer.wait()

    def close(self) -> None:
        """Wait, and end the writer."""
        if self._writer is not None:
            self._writer.close()

    def save(
        self,
        state: TrainerState,
        random_states: tuple[Any, ...] | None = None,
        best: bool = False,
        with_gradients: bool = False,
    ) -> None:
        """Write a checkpoint. All processes must call this.

        Args:
            state: of the trainer.
            random_states: of this process, by default the current ones.
            best: whether these are the best weights so far.
            with_gradients: save the gradients too, which the end of the epoch may draw as histograms.
        """
        if self.settings.run_dir is None:
            return
        parts = self._state_dicts()
        random = self.distributed.all_gather(to_plain(random_states or get_random_states()))
        payload = {"run": self._identity(), "trainer_state": asdict(state), "random": random}
        if with_gradients:
            parts["gradients"] = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        payload |= self.distributed.gather(parts)
        if self._writer is not None:
            self._writer.save(state.global_step, payload, best)

    def check_serializable(self) -> None:
        """Check that a checkpoint can hold the current state.

        Raises:
            CheckpointError: in every process, names the entry that cannot be saved.
        """
        self._state_dicts()

    def keep_best_weights(self) -> None:
        """Copy the current weights."""
        self._best_weights = deepcopy(self.model.state_dict())

    def load_best_weights(self) -> None:
        """Load the weights of the best epoch into the model, if there is one."""
        if self._best_weights:
            self.model.load_state_dict(self._best_weights)

    # Loading

    def resume(self) -> TrainerState:
        """Load the newest intact checkpoint of the run folder, if the settings say so and there is one.

        Raises:
            CheckpointError: if the folder holds a run and `resume_from_checkpoint` is off; if no checkpoint is
                intact; if the newest one is of a different run or model.
        """
        folder = self.settings.run_dir
        if folder is None:
            return TrainerState()
        if not self.settings.resume_from_checkpoint:
            if self.distributed.broadcast(bool(list_checkpoints(folder))):
                raise CheckpointError(f"{folder} holds a run already: resume it or take another folder")
            return TrainerState()
        found = self.distributed.broadcast(_read_run(folder) if self.distributed.is_main_process else None)
        if isinstance(found, CheckpointError):
            raise found
        if found is None:  # the same command may begin and resume a run
            return TrainerState()
        (path, saved), best = found
        check_compatible(path, "run", saved["run"], self._identity())
        check_compatible(path, "model", _tensors(saved["model"]), _tensors(self.model.state_dict()))
        self._load(saved)
        self.resumed, state = True, TrainerState.from_dict(saved["trainer_state"])
        if state.updates_drawn:  # otherwise the next epoch is seeded anyway
            self._random_states = saved["random"]
        if state.interrupted_points is not None:
            for name, parameter in self.model.named_parameters():
                if (gradient := saved["gradients"][name]) is not None:
                    parameter.grad = distribute_like(gradient.to(parameter.device), parameter)
        if best is not None:
            self._best_weights = distribute_model_state(best["model"], self.model)
            if best["trainer_state"]["best_epoch"] > state.best_epoch:  # the resumed run will find it again
                state.best_metrics = best["trainer_state"]["best_metrics"]
                state.best_epoch = best["trainer_state"]["best_epoch"]
        elif state.best_epoch:
            state.best_metrics, state.best_epoch = {}, 0
        return state

    def roll_back(self) -> tuple[Path, int]:
        """Load weights, optimizer, scheduler and loss of the newest intact checkpoint.

        Returns:
            The file, and its optimizer steps.
        """
        assert self.settings.run_dir is not None
        self.wait()
        newest = load_newest(self.settings.run_dir) if self.distributed.is_main_process else None
        path, saved = self.distributed.broadcast(newest)
        self._load(saved)
        return path, saved["trainer_state"]["global_step"]

    def restore_random_states(self, state: TrainerState) -> None:
        """Continue with the random states of the checkpoint that the run was resumed from, once."""
        states, self._random_states = self._random_states, None
        if states is None:
            return
        if len(states) == self.distributed.world_size:
            set_random_states(states[self.distributed.rank])
        else:  # the number of processes has changed
            seed_all(self.settings.seed, state.epoch, self.distributed.rank, state.updates_drawn)

    def _load(self, saved: Mapping[str, Any]) -> None:
        for name, part in self.stateful.items():
            state = saved[name]
            if part is self.model:
                state = distribute_model_state(state, part)
            elif part is self.optimizer:
                state = distribute_optimizer_state(state, part)
            part.load_state_dict(state)

    def _state_dicts(self) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in self.stateful.items()}
        if self.settings.run_dir is not None:
            to_serializable(states, copy=False)
        return states

    def _identity(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the original run."""
        settings = self.settings.model_dump(mode="json", exclude=set(self.settings.changeable_on_resume))
        return settings | {
            "loss": type(self.loss).__name__,
            "optimizer": type(self.optimizer).__name__,
            "parameters per group": [len(group["params"]) for group in self.optimizer.param_groups],
            "lr_scheduler": type(self.lr_scheduler).__name__,
            "batches per epoch": self._batches,
        }

    def _run_description(self) -> str:
        """Return everything that is needed to repeat the run on the same data: command, settings, versions."""
        versions = {"python": platform.python_version(), "torch": torch.__version__, "manualgrad": __version__}
        settings = self.settings.model_dump(mode="json")
        return json.dumps({"command": sys.argv, "settings": settings, "versions": versions}, indent=2) + "\n"


def _read_run(folder: Path) -> Any:
    """Return the newest intact checkpoint and the best one; None without a run; an error to raise in all
    processes."""
    try:
        newest = load_newest(folder)
    except CheckpointError as error:
        return error
    if newest is None:
        return None
    try:
        has_best = newest[1]["trainer_state"]["best_epoch"]
        return newest, load(folder / BEST_CHECKPOINT) if has_best else None
    except CheckpointError as error:
        warn(f"{error}: the search for the best epoch starts again")
        return newest, None


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """Return the tensors of a model's state_dict, and None for its extra state, which may change in training."""
    return {
        name: value if isinstance(value, Tensor) and not name.endswith("_extra_state") else None
        for name, value in state.items()
    }
