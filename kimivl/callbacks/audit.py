"""The record of what each optimiser step took, so that ``kimivl audit`` can prove what was trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from kimivl.data.audit.delivery import DeliveryLog, History, TakenPack, next_attempt
from kimivl.data.audit.epochs import epoch_file, write_epoch_audit
from kimivl.data.pack import PackedBatch


class Audit(Callback):
    """Logs the samples of each completed step on every rank, and writes a file for each finished epoch.

    A stage whose datamodule plans no epochs (RL) leaves nothing. Packs are noted when their step begins, so that a
    checkpoint saved by any other callback finds the step logged, whatever the order of the callbacks.

    Args:
        path: folder of the logs, shared by all ranks and by all resumes of a run.
    """

    def __init__(self, path: str) -> None:
        self.folder = Path(path)
        self._log: DeliveryLog | None = None
        self._taken: list[TakenPack] = []
        self._logged_step = 0
        self._uses: tuple[int, np.ndarray] = (-1, np.zeros(0, np.uint8))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _plans_epochs(trainer):
            return
        attempt = 0
        if trainer.is_global_zero:
            self._write_epochs(trainer)
            attempt = next_attempt(self.folder)
        self._logged_step = trainer.global_step
        self._log = DeliveryLog(
            self.folder,
            attempt=trainer.strategy.broadcast(attempt),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            packs_per_step=_datamodule(trainer).packs_per_step,
            resumed_at=trainer.global_step,
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        if self._log is not None:
            self._taken.append(TakenPack(batch.number, batch.samples, batch.holes))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._log_step(trainer)

    def on_save_checkpoint(self, trainer: Trainer, *args: Any) -> None:
        """No checkpoint holds a step that a rank has yet to log: a resume from it would never log it."""
        if self._log is not None:
            self._log_step(trainer)
            self._agree(trainer, self._log)

    def _agree(self, trainer: Trainer, log: DeliveryLog) -> None:
        """Wait until all ranks have their steps on disk."""
        log.sync()
        trainer.strategy.barrier("delivery log")

    def _log_step(self, trainer: Trainer) -> None:
        if self._log is None or trainer.global_step == self._logged_step:
            return
        epoch = trainer.current_epoch
        self._log.write(trainer.global_step, epoch, self._taken, self._uses_of(trainer, epoch))
        self._logged_step, self._taken = trainer.global_step, []

    def _uses_of(self, trainer: Trainer, epoch: int) -> np.ndarray:
        if self._uses[0] != epoch:
            self._uses = epoch, _datamodule(trainer).uses(epoch).count
        return self._uses[1]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._log is not None:
            self._agree(trainer, self._log)
            if trainer.is_global_zero:
                self._write_epochs(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that was killed between its last checkpoint and its last file comes here without training a step.
        if trainer.is_global_zero and _plans_epochs(trainer):
            self._write_epochs(trainer)

    def _write_epochs(self, trainer: Trainer) -> None:
        """Write the files of finished epochs that have none; remove those of epochs that a resume goes back into."""
        history = History(self.folder)
        for epoch, end in enumerate(_ends(trainer)):
            path = epoch_file(self.folder, epoch)
            if end > trainer.global_step:
                path.unlink(missing_ok=True)
            elif history.attempts and end > history.begins_at and not path.exists():
                self._write_epoch(_datamodule(trainer), epoch)

    def _write_epoch(self, datamodule: Any, epoch: int) -> None:
        limits = datamodule.limits_of(datamodule.phase_of(epoch))
        write_epoch_audit(
            self.folder,
            epoch,
            datamodule.index,
            datamodule.uses(epoch),
            datamodule.plan(epoch),
            max_length=limits.max_length,
            max_patches=limits.max_patches,
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None


def _datamodule(trainer: Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]


def _plans_epochs(trainer: Trainer) -> bool:
    return hasattr(_datamodule(trainer), "uses")


def _ends(trainer: Trainer) -> Iterator[int]:
    """The global step that each epoch of the run ends with."""
    datamodule, step = _datamodule(trainer), 0
    for epoch in range(datamodule.max_epochs):
        step += datamodule.planned(epoch).steps
        yield step
