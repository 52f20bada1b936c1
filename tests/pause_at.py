"""A callback that waits in the middle of a run until a signal has come, once."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from kimivl.runtime import interruption


class PauseAt(Callback):
    """Waits in ``hook`` once ``step`` steps are done, and leaves the file ``reached``; not where that file is already.

    ``hook``: ``train_batch`` (a step begins), ``validation_batch``, ``test_batch``, or ``rollouts``.
    """

    def __init__(self, reached: str, step: int = 1, hook: str = "train_batch", seconds: float = 60) -> None:
        self.reached, self.step, self.hook, self.seconds = Path(reached), step, hook, seconds
        self._trainer: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._trainer = trainer
        self._been = self.reached.exists()

    def _pause(self, hook: str) -> None:
        if hook != self.hook or self._been or self._trainer.global_step < self.step:
            return
        self._been = True
        self.reached.touch()
        end = time.monotonic() + self.seconds
        while not interruption.asked() and time.monotonic() < end:
            time.sleep(0.02)

    def on_train_batch_start(self, *args: Any) -> None:
        self._pause("train_batch")

    def on_validation_batch_start(self, *args: Any) -> None:
        self._pause("validation_batch")

    def on_test_batch_start(self, *args: Any) -> None:
        self._pause("test_batch")

    def on_rollouts_start(self) -> None:
        self._pause("rollouts")
