"""Stopping in good order: on a signal the run saves itself at the next optimiser step and says how to go on."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from kimivl.config import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preemption(Callback):
    """Turns Ctrl-C and the signals of schedulers into a checkpoint at a batch boundary.

    Saving inside a signal handler would deadlock with uneven ranks: the handler only sets a flag, and all ranks agree
    on it after a step. RL's rollouts, which can take an hour, are left at once: what is there of them is kept, and the
    run saves itself as it was before them (also when the rollout engine fails). A second Ctrl-C stops at once.

    Args:
        path: where the checkpoint goes.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.received: int | None = None
        self._saved_step: int | None = None
        self._previous: dict[int, Any] = {}
        self._in_rollouts = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install()

    # The first rollouts come before `on_train_start`: the datamodule calls these two.

    def on_rollouts_start(self) -> None:
        self._install()
        self._in_rollouts = True

    def on_rollouts_end(self) -> None:
        self._in_rollouts = False

    def _install(self) -> None:
        if not self._previous:
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            self._in_rollouts = False
            raise Interrupted("stopped at once, without saving; the same command goes on from the last checkpoint")
        if self.received is None:
            self.received = number
            if self._in_rollouts:
                raise Interrupted("the rollouts so far are kept; the same command goes on with them")
            print("\nstopping when this step is done and saved; Ctrl-C stops at once", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        between_steps = trainer.fit_loop._should_accumulate()
        if not between_steps and self._any_rank(trainer):
            self._save(trainer)

    # The run leaves after the step's figures are logged and, at the end of an epoch, after its validation: an epoch
    # that was saved before it would not be validated by the run that goes on.

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._leave_if_saved()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._any_rank(trainer):
            self._save(trainer)
            self._leave_if_saved()

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_step = trainer.global_step

    def _leave_if_saved(self) -> None:
        if self._saved_step is not None:
            raise Interrupted(f"saved after step {self._saved_step}; the same command goes on")

    def _any_rank(self, trainer: Trainer) -> bool:
        flag = torch.tensor(float(self.received is not None), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(flag, reduce_op="max"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._any_rank(trainer):  # it came during the last validation
            self._save(trainer)
            self._leave_if_saved()
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Before the first step there is nothing to save that a fresh start would not have.
        if self._in_rollouts and isinstance(exception, Interrupted | ValueError) and trainer.global_step:
            self._save(trainer)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
