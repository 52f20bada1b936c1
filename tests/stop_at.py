"""A callback that sends the process a signal in the middle of a step, as a scheduler or a user would."""

import os
import signal

from lightning.pytorch import Callback


class StopAt(Callback):
    """Sends ``signal_name`` when batch number ``step`` (counted over the run from 0) begins."""

    def __init__(self, step: int, signal_name: str) -> None:
        self.step, self.number = step, getattr(signal, signal_name)

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)
