"""A callback that makes every part of a run last, and keeps account of them: a signal can be sent into each."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

import kimivl.run
import kimivl.tracking

PARTS = ("import", "set-up", "steps", "validation", "saving", "export", "test", "end")


class Parts(Callback):
    """Adds a line to ``file`` when a part begins: its name, the time, and the CPU seconds of this process so far.

    Each part lasts about ``seconds`` longer than by itself, but for the imports and what is set up after them, which
    need no help to last.
    """

    def __init__(self, file: str, seconds: float = 2.0) -> None:
        self.file, self.seconds = Path(file), seconds
        self._first = True

    def _enter(self, part: str, seconds: float) -> None:
        if self._first:
            with self.file.open("a") as file:
                file.write(f"{part} {time.time():.2f} {time.process_time():.2f}\n")
        time.sleep(seconds)  # a handler that does not raise does not end it

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._first = trainer.is_global_zero
        if stage == "fit":
            self._enter("set-up", 0)
            kimivl.run.hand_over = self._slowed("export", kimivl.run.hand_over)
            kimivl.tracking.close = self._slowed("end", kimivl.tracking.close)

    def _slowed(self, part: str, done: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            self._enter(part, self.seconds)
            return done(*arguments)

        return slow

    def on_train_batch_start(self, *args: Any) -> None:
        self._enter("steps", self.seconds / 4)

    def on_save_checkpoint(self, *args: Any) -> None:
        self._enter("saving", self.seconds)

    def on_validation_epoch_start(self, *args: Any) -> None:
        self._enter("validation", self.seconds / 2)

    def on_validation_epoch_end(self, *args: Any) -> None:
        self._enter("validation", self.seconds / 2)

    def on_test_epoch_start(self, *args: Any) -> None:
        self._enter("test", self.seconds)
