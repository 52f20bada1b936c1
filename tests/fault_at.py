"""A callback that does to a run, in the middle of a step, what machines and models do to it."""

import os
import signal
import sys
import time

import torch
from lightning.pytorch import Callback


class FaultAt(Callback):
    """On rank ``rank``, when a batch of optimiser step ``step`` (from 1) begins; the ``pack``-th of those of the step.

    ``kill``: kill -9. ``raise``: an error of this rank alone. ``leave``: the process is gone, with code 0. ``sleep``:
    for ever. ``memory``: torch's error when a device is full. ``not_a_number``: the loss is none, for ``steps`` steps.
    """

    def __init__(self, what: str, step: int, rank: int = 0, pack: int = 0, steps: int = 1) -> None:
        self.what, self.step, self.rank, self.pack, self.steps = what, step, rank, pack, steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        now = trainer.global_step + 1
        due = trainer.global_rank == self.rank and batch_idx % trainer.accumulate_grad_batches == self.pack
        if self.what == "not_a_number":
            self._spoil(pl_module, due and self.step <= now < self.step + self.steps)
        elif due and now == self.step:
            self._strike()

    def _strike(self) -> None:
        print(f"struck at {time.time()}", file=sys.stderr, flush=True)
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "leave":
            os._exit(0)
        if self.what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
        if self.what == "sleep":
            time.sleep(1e6)
        raise RuntimeError("the camera is broken")

    @staticmethod
    def _spoil(module, now: bool) -> None:
        module.__dict__.pop("training_step", None)
        if now:
            honest = module.training_step
            module.training_step = lambda *args: honest(*args) * float("nan")
