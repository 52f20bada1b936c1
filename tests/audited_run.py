"""A small run of two epochs under a real trainer with the audit; as a script, one rank of it.

``python audited_run.py RUN_DIR ACCUMULATE [RANK STEP]``: that rank kills itself after that step, where they are given.
A checkpoint is saved every second step, and is gone on from.
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from simulated_run import MAX_LENGTH, MAX_PATCHES, StandInIndex, make_pack, make_plan

from kimivl.callbacks.audit import Audit
from kimivl.data.mixture import Uses

SAMPLES = 32


class Module(LightningModule):
    """One weight, one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Loader:
    """Sized, as the real one; starts after the packs that were trained."""

    def __init__(self, packs: list, start: int) -> None:
        self.packs, self.start = packs, start

    def __len__(self) -> int:
        return len(self.packs)

    def __iter__(self):
        return iter(self.packs[self.start :])


class Data(LightningDataModule):
    """What the audit asks of a supervised stage's datamodule."""

    max_epochs, too_long = 2, "drop"
    phases = [SimpleNamespace(epochs=2)]

    def __init__(self) -> None:
        super().__init__()
        self.index = StandInIndex(SAMPLES)

    def uses(self, epoch):
        return Uses(np.ones(SAMPLES, np.uint8), np.zeros(SAMPLES, np.uint8))

    @property
    def packs_per_step(self) -> int:
        return self.trainer.world_size * self.trainer.accumulate_grad_batches

    def plan(self, epoch):
        return make_plan(self.uses(epoch).count, self.packs_per_step, per_pack=2, seed=epoch)

    def planned(self, epoch):
        return SimpleNamespace(steps=self.plan(epoch).num_steps)

    def phase_of(self, epoch):
        return self.phases[0]

    def limits_of(self, phase):
        return SimpleNamespace(max_length=MAX_LENGTH, max_patches=MAX_PATCHES)

    def train_dataloader(self):
        epoch, rank, world = self.trainer.current_epoch, self.trainer.global_rank, self.trainer.world_size
        plan = self.plan(epoch)
        packs = [make_pack(number, plan.pack(number), [3]) for number in range(rank, len(plan), world)]
        done = self.trainer.global_step - sum(self.planned(before).steps for before in range(epoch))
        return Loader(packs, done * self.trainer.accumulate_grad_batches)


def make_trainer(run_dir: Path, accumulate: int, before=(), after=(), **options) -> Trainer:
    """A trainer with the audit, and other callbacks before and after it."""
    callbacks = [*before, Audit(str(run_dir / "audit")), *after]
    return Trainer(
        max_epochs=Data.max_epochs,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        reload_dataloaders_every_n_epochs=1,
        default_root_dir=run_dir,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


class Kill(Callback):
    """``kill -9`` of one rank when a step is done, before its log has it."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run_dir, accumulate = Path(sys.argv[1]), int(sys.argv[2])
    saved = run_dir / "last.ckpt"
    trainer = make_trainer(
        run_dir,
        accumulate,
        before=[Kill(int(sys.argv[3]), int(sys.argv[4]))] if sys.argv[3:] else [],
        after=[ModelCheckpoint(run_dir, "last", every_n_train_steps=2)],
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy="ddp" if "WORLD_SIZE" in os.environ else "auto",
    )
    trainer.fit(Module(), Data(), ckpt_path=saved if saved.exists() else None)
