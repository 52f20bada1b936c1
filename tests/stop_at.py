"""A callback that sends the process a signal in the middle of a step, as a scheduler or a user would."""

import os
import signal

from lightning.pytorch import Callback


class StopAt(Callback):
    """Sends ``signal_name`` when batch number ``step`` (counted over the run from 0) begins.

    With ``group`` all processes of the run get it, loader workers too; with ``rank`` only that one.
    """

    def __init__(self, step: int, signal_name: str, group: bool = False, rank: int | None = None) -> None:
        self.rank = rank
        self.step, self.number = step, getattr(signal, signal_name)
        self.send = os.killpg if group else os.kill

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            self.send(os.getpid(), self.number)  # the run leads its group


class StopInTest(Callback):
    """Sends the process a SIGTERM when it begins to answer the test problems."""

    def on_test_batch_start(self, *args) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
