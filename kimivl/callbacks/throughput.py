"""Tokens per second, over steps alone: evaluation, saving and rollouts in between do not count."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs ``perf/tokens_per_s`` (all ranks), a moving average over about ``window`` steps, and ``perf/step_s``."""

    def __init__(self, window: int = 20) -> None:
        self.decay = 1 - 1 / window
        self.tokens = self.seconds = 0.0
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pack = getattr(batch, "pack", batch)
        elapsed = time.perf_counter() - self._started
        self.tokens = self.decay * self.tokens + pack.num_tokens * trainer.world_size
        self.seconds = self.decay * self.seconds + elapsed
        pl_module.log("perf/tokens_per_s", self.tokens / self.seconds, prog_bar=True, batch_size=1)
        pl_module.log("perf/step_s", elapsed, batch_size=1)
