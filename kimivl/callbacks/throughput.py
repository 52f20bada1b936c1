"""How fast training goes, and what the device and the data make of it."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from kimivl.callbacks.log_steps import is_log_step, log_figures
from kimivl.data.pack import IGNORE, PackedBatch
from kimivl.model.flops import pack_flops, peak_flops
from kimivl.runtime import ranks

NEXT = "[_TrainingEpochLoop].train_dataloader_next"
"""What Lightning's profilers call the wait for the loader."""


@dataclass(slots=True)
class _Work:
    """What one rank did since the last figures. ``room``: tokens that its packs could have held."""

    tokens: int = 0
    image_tokens: int = 0
    samples: int = 0
    room: int = 0
    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0


class Throughput(Callback):
    """Logs, at each log step, the figures of the steps since the one before, all ranks together.

    ``perf/tokens_per_s``, ``perf/image_tokens_per_s`` (what the vision tower makes: a picture that the responses of a
    pack share counts once), ``perf/samples_per_s``: sums over the ranks, by the time of the slowest. ``perf/step_s``
    seconds of an optimiser step; ``perf/data_wait`` share of them that the loop stood still for its data, of the rank
    that waited most (on CUDA an upper bound: the device may have had work meanwhile; left out under a profiler).
    ``perf/tflops`` model TFLOP/s of a device, ``perf/mfu`` its share of the peak (``kimivl.model.flops``).
    ``data/packing_efficiency``: tokens of what the packs could hold. ``data/tokens_seen``: tokens since the run's first
    step, whatever it was interrupted into; an axis for curves. Validation, saving and rollouts take no time here.

    Nothing waits for the device, and no rank for another, between log steps.

    Args:
        peak_tflops: of one device, dense, in the training dtype; None takes NVIDIA's bf16 figure for the device, and
            logs no ``perf/mfu`` for one that is not in the table.

    Raises:
        ValueError: for a peak that is not positive.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"callbacks.throughput.peak_tflops={peak_tflops}: give a positive number, or null")
        self.peak_tflops = peak_tflops
        self._seen = self._uncounted = 0  # tokens: of all ranks; of this one since the ranks last agreed
        self._since: float | None = None  # None: the clock stands
        self._waiting: _WaitClock | None = None
        self._begin()

    def _begin(self) -> None:
        self._work = _Work()
        self._shapes: list[tuple[Tensor, Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        watched: Any = trainer
        if stage == "fit" and type(watched.profiler) is PassThroughProfiler:
            watched.profiler = self._waiting = _WaitClock()

    # A pack counts when it begins: a checkpoint that another callback saves after the step then has it.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        waited = 0.0 if self._waiting is None else self._waiting.take()
        if self._since is None:
            self._since = time.perf_counter()
        else:
            self._work.waited += waited
        pack: PackedBatch = getattr(batch, "pack", batch)
        work, config = self._work, pl_module.model.config.vision_config  # type: ignore[union-attr]
        height, width = config.merge_kernel_size  # type: ignore[union-attr,misc]
        work.tokens += pack.num_tokens
        work.image_tokens += len(pack.pixel_values) // (height * width)
        work.samples += pack.num_samples
        work.room += _max_length(trainer) or 0
        self._uncounted += pack.num_tokens
        if not trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return  # no step will take what is kept
        # Copies: a view would keep the whole pack in memory until the figures are made.
        targets = (pack.targets != IGNORE).sum()
        self._shapes.append((pack.cu_seqlens.clone(), pack.image_grid_hws.clone(), targets))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self._work.steps += 1
        if not is_log_step(trainer, trainer.global_step):
            return
        self._pause(pl_module)
        self._since = time.perf_counter()
        self._work.flops = self._flops(pl_module)
        figures = self._figures(ranks.gather(astuple(self._work)), pl_module.device)
        self._begin()
        log_figures(trainer, figures, trainer.global_step)
        shown = "perf/tokens_per_s"
        pl_module.log(shown, figures[shown], prog_bar=True, logger=False, batch_size=1)

    def _pause(self, pl_module: LightningModule) -> None:
        """Stop the clock when the device has done what it was given."""
        if self._since is not None:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self._work.seconds += time.perf_counter() - self._since
            self._since = None

    def _flops(self, module: Any) -> float:
        """Of forward and backward passes since the last figures, on this rank."""
        cu_seqlens, grids, targets = zip(*self._shapes, strict=True)
        lengths = torch.cat([ends.diff() for ends in cu_seqlens]).tolist()
        supervised = int(torch.stack(targets).sum())
        forward = pack_flops(module.model.config, lengths, supervised, torch.cat(grids).tolist())
        return forward.training(module.freeze_parts, adapters=module.lora is not None).total

    def _figures(self, rows: list[tuple[float, ...]], device: torch.device) -> dict[str, float]:
        """From what each rank did."""
        works = [_Work(*row) for row in rows]  # type: ignore[arg-type]
        seconds, steps = max(work.seconds for work in works), works[0].steps

        def total(name: str) -> float:
            return sum(getattr(work, name) for work in works)

        self._seen += int(total("tokens"))
        self._uncounted = 0
        tflops = total("flops") / seconds / len(works) / 1e12
        figures = {
            "perf/tokens_per_s": total("tokens") / seconds,
            "perf/image_tokens_per_s": total("image_tokens") / seconds,
            "perf/samples_per_s": total("samples") / seconds,
            "perf/step_s": seconds / steps,
            "perf/tflops": tflops,
            "data/tokens_seen": self._seen,
        }
        if (peak := self._peak(device)) is not None:
            figures["perf/mfu"] = tflops / peak
        if self._waiting is not None:
            figures["perf/data_wait"] = max(work.waited / work.seconds for work in works)
        if total("room"):
            figures["data/packing_efficiency"] = total("tokens") / total("room")
        return figures

    def _peak(self, device: torch.device) -> float | None:
        """TFLOP/s."""
        if self.peak_tflops is not None or device.type != "cuda":
            return self.peak_tflops
        known = peak_flops(torch.cuda.get_device_name(device))
        return None if known is None else known / 1e12

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Tokens of all ranks, which all ask for it together."""
        return {"tokens_seen": self._seen + sum(ranks.gather(self._uncounted))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seen, self._uncounted = state_dict["tokens_seen"], 0


def _max_length(trainer: Trainer) -> int | None:
    """Tokens that a pack may have."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule.phase_of(trainer.current_epoch).max_length or getattr(datamodule, "max_length", None)


class _WaitClock(PassThroughProfiler):
    """Lightning's own profiler of nothing, but for the wait for the loader."""

    def __init__(self) -> None:
        super().__init__()
        self._started = self._waited = 0.0

    def start(self, action_name: str) -> None:
        if action_name == NEXT:
            self._started = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name == NEXT:
            self._waited += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds since it was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited
