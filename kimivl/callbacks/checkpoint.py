"""Checkpoint files: whole or not there, and those of the way written while training goes on."""

from __future__ import annotations

import copy
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from kimivl.checkpoint import put_in_place
from kimivl.checkpoint_folder import read_whole
from kimivl.runtime.faults import reading, writing

log = logging.getLogger(__name__)


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints to the disk tensor by tensor, whole or not at all.

    Lightning's own puts the file together in memory first: 70 GB and more of the host's for Kimi-VL-A3B.

    A save returns when the file is complete and on the disk. Inside of ``in_background`` it returns when what is to be
    saved is copied; at most one copy exists at a time. A process that ends, even by an error, first completes its file.
    """

    def __init__(self) -> None:
        super().__init__()
        self._limit = 0.0
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    @contextmanager
    def in_background(self, limit: float) -> Iterator[None]:
        """Saves inside return early where their tensors are no more than ``limit`` bytes in all."""
        before, self._limit = self._limit, limit
        try:
            yield
        finally:
            self._limit = before

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self._wait()
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        if not self._limit or tensor_bytes(checkpoint) > self._limit:
            if self._failure is not None:
                log.warning("the checkpoint before this one could not be written: %s", self._failure)
                self._failure = None
            return _write(checkpoint, Path(path))
        self.raise_failure()
        self._writer = threading.Thread(
            target=self._attempt, args=(snapshot(checkpoint), Path(path)), name="checkpoint"
        )
        self._writer.start()
        return None

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """A file's content; that of a folder, which the ranks of a sharded model have written, as if it were one."""
        if Path(path).is_dir():
            return read_whole(Path(path))
        with reading(path):
            return super().load_checkpoint(path, *args, **options)

    def _attempt(self, copied: dict[str, Any], path: Path) -> None:
        try:
            _write(copied, path)
        except BaseException as error:
            self._failure = error

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def raise_failure(self) -> None:
        """Raise what went wrong with the file that was written in the background, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def teardown(self) -> None:
        """Complete the file that is being written; called at the end of a fit, also of one that failed."""
        self._wait()
        if self._failure is not None and sys.exc_info()[0] is not None:  # what ended the fit is the news
            log.error("the last checkpoint could not be written: %s", self._failure)
            self._failure = None
        self.raise_failure()


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        with writing(target, tensor_bytes(checkpoint)):
            torch.save(checkpoint, part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            put_in_place(target, part)
    finally:
        part.unlink(missing_ok=True)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def snapshot(value: Any, copies: dict[Any, Tensor] | None = None) -> Any:
    """A copy of nested dicts, lists and tuples that no later step changes, its tensors in the host's memory.

    A tensor that is there twice (tied weights) is copied once. Other objects are taken as they are.
    """
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in copies or not value.numel():
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same class, with what hangs on a state dict
        copied.update((name, snapshot(inner, copies)) for name, inner in value.items())
        return copied
    if type(value) in (list, tuple):
        return type(value)(snapshot(inner, copies) for inner in value)
    return value


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose saves between steps block training only while they are copied.

    What a write in the background could not do is raised before the next step. All other saves (at the end of a run, on
    a signal) return with the file on the disk.

    Args:
        background_gb: most that a checkpoint's tensors may take in the host's memory, in 10^9 bytes, beside what they
            take already; a larger checkpoint, or 0, is written before the next step begins.
        options: see ``lightning.pytorch.callbacks.ModelCheckpoint``.

    Raises:
        ValueError: for a negative ``background_gb``.
    """

    def __init__(self, background_gb: float = 4.0, **options: Any) -> None:
        if background_gb < 0:
            raise ValueError(f"callbacks.checkpoint.background_gb={background_gb}: give 0 (off) or more")
        super().__init__(**options)
        self.background_gb = background_gb

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if isinstance(files := trainer.strategy.checkpoint_io, CheckpointFiles):
            files.raise_failure()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.is_last_batch:
            self._save_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in the end hook of an epoch's last batch: going on from there, Lightning leaves out the validation that
        # follows, and begins an epoch that has more batches than that one in its middle.
        self._save_if_due(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def _save_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        no_batch = (None, None, 0)  # Lightning's own asks for it and does not use it
        if not isinstance(files := trainer.strategy.checkpoint_io, CheckpointFiles):  # of a model cut up over ranks
            super().on_train_batch_end(trainer, pl_module, *no_batch)
            return
        with files.in_background(self.background_gb * 1e9):
            super().on_train_batch_end(trainer, pl_module, *no_batch)
