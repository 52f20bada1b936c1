"""Stopping in good order: on a signal the run saves itself at the next optimiser step and says how to go on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from kimivl.config import Interrupted
from kimivl.runtime import interruption

TRAINED = "the training is done and saved; the same command goes on with what follows it"
ROLLOUTS_KEPT = "the rollouts so far are kept; the same command goes on with them"


class Preemption(Callback):
    """Turns Ctrl-C and the signals of schedulers into a checkpoint between two steps.

    All ranks agree on it after a step. RL's rollouts, which can take an hour, are left at once: what is there of them
    is kept, and the run saves itself as it was before them (also when the rollout engine fails). An evaluation is left
    at once, too, and done anew by the run that goes on. A second Ctrl-C stops at once.

    Args:
        path: where the checkpoint goes.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._saved_step: int | None = None
        self._rollouts_since: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning's own answer to SIGTERM speaks to the other ranks from inside the handler, and to be heard there it
        # asks all ranks before every batch, which waits for the GPU.
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    # The first rollouts come before `on_train_start`: the datamodule calls these four, on all ranks. What is raised
    # between the first two is raised on all of them; and so that this holds, a signal interrupts only while responses
    # are drawn, for then the others notice. One that comes in between waits for the next draw, or for a step.

    def on_rollouts_start(self) -> None:
        self._rollouts_since = time.time()
        interruption.wait_for_a_step()

    def on_answers_start(self) -> None:
        interruption.give_way(ROLLOUTS_KEPT)

    def on_answers_end(self) -> None:
        interruption.wait_for_a_step()

    def on_rollouts_end(self) -> None:
        interruption.wait_for_a_step()
        self._rollouts_since = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        interruption.wait_for_a_step()
        if interruption.agreed():
            raise Interrupted(interruption.NOT_BEGUN)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        # After the step's figures are logged.
        self._leave_if_saved()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        interruption.advanced()
        # The last step of an epoch is followed by its validation, which a run that goes on from here would leave out.
        if not trainer.is_last_batch and interruption.agreed():
            self._save(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not interruption.agreed():
            return
        pl_module.leave_evaluation()  # type: ignore[operator]
        if trainer.state.fn == TrainerFn.FITTING:
            _validate_again(trainer)
            self._save(trainer)
        self._leave()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if interruption.agreed():
            pl_module.leave_evaluation()  # type: ignore[operator]
            self._leave()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if interruption.agreed():
            self._save(trainer)
            self._leave_if_saved()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        interruption.wait_for_a_step()  # a run that goes on from its last step has made none

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._rollouts_since is None:
            return
        if _written_since(self._rollouts_since, getattr(trainer.datamodule, "rollouts", None)):  # type: ignore[attr-defined]
            interruption.advanced()
        interruption.wait_for_a_step()
        # Before the first step there is nothing to save that a fresh start would not have.
        if isinstance(exception, Interrupted | ValueError) and trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_step = trainer.global_step

    def _leave_if_saved(self) -> None:
        if self._saved_step is not None:
            raise Interrupted(f"saved after step {self._saved_step}; the same command goes on")

    def _leave(self) -> None:
        self._leave_if_saved()
        raise Interrupted(TRAINED)


def _nothing() -> None:
    pass


def _validate_again(trainer: Trainer) -> None:
    """Put the validation loop to where it was in its first batch: a run that goes on from there begins it again."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    for counts in (progress.total, progress.current):
        counts.ready = counts.started = 1  # type: ignore[attr-defined]
        counts.processed = counts.completed = 0  # type: ignore[attr-defined]
    progress.is_last_batch = False


def _written_since(start: float, folder: Path | None) -> bool:
    return folder is not None and any(file.stat().st_mtime >= start for file in folder.rglob("*") if file.is_file())
