"""Tells the run's watch what it does, and how long that may take."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from kimivl.runtime.watch import Watch

STEP, GENERATION = "step_minutes", "generation_minutes"


class Watchdog(Callback):
    """Signs of progress for ``kimivl.runtime.watch``: batches, validation batches, responses. What comes before the
    index is there may take any time.

    Args:
        step_minutes: how long nothing may get on in training, on any rank, before the run is ended with the stacks of
            all ranks. null never ends it.
        generation_minutes: the same while responses are drawn, where one of them may be long, and in everything else:
            reading a model, checkpoints, export.
    """

    def __init__(self, step_minutes: float | None = 30.0, generation_minutes: float | None = 240.0) -> None:
        for key, value in ((STEP, step_minutes), (GENERATION, generation_minutes)):
            if value is not None and value <= 0:
                raise ValueError(f"callbacks.watchdog.{key}={value}: give minutes above 0, or null for no limit")
        self.minutes = {STEP: step_minutes, GENERATION: generation_minutes}
        self.watch: Watch | None = None

    def _mark(self, key: str, doing: str) -> None:
        if self.watch is not None:
            minutes = self.minutes[key]
            self.watch.mark(None if minutes is None else 60 * minutes, doing, key)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._mark(GENERATION, "setting up")  # the datamodule has its index by now

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._mark(STEP, f"training, step {trainer.global_step + 1}, on {describe(batch)}")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._mark(STEP, "waiting for data")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(GENERATION, "preparing an epoch")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(GENERATION, "ending")

    def on_save_checkpoint(self, *args: Any) -> None:
        self._mark(GENERATION, "saving a checkpoint")

    def on_rollouts_start(self) -> None:
        self._mark(GENERATION, "drawing responses")

    def rollouts(self, done: int, total: int) -> None:
        """Called by the RL datamodule, with the responses that are there and those that it has asked for."""
        self._mark(GENERATION, f"drawing responses ({done} of {total} are there)")

    def on_rollouts_end(self) -> None:
        self._mark(GENERATION, "preparing an epoch")

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._mark(GENERATION, "validating")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._mark(GENERATION, "validating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(GENERATION, "after a validation")

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._mark(GENERATION, "testing")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._mark(GENERATION, "testing")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(GENERATION, "ending")


def describe(batch: Any) -> str:
    """The size of a batch, in words."""
    pack = getattr(batch, "pack", batch)
    if not hasattr(pack, "num_tokens"):
        return f"a {type(batch).__name__}"
    images = f" and {len(pack.pixel_values):,} image patches" if len(pack.pixel_values) else ""
    return f"a pack of {pack.num_tokens:,} tokens{images}"
