"""How much memory the ranks take."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from kimivl.callbacks.log_steps import ends_log_step, log_figures
from kimivl.runtime import ranks


class Memory(Callback):
    """Logs, at each log step, the memory of the rank that takes most, in 10^9 bytes.

    On CUDA, since the log step before: ``perf/memory_gb`` the most that tensors held at once, and
    ``perf/memory_reserved_gb`` the most that the allocator held for them; ``perf/memory_retries``: how often, since the
    process started, it had to give back its cache and try again (that costs time: the device is nearly full).
    Elsewhere ``perf/memory_gb`` is the most that the process has had in memory since it started.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if ends_log_step(trainer):
            everyone = ranks.gather(memory(pl_module.device))
            most = {name: max(figures[name] for figures in everyone) for name in everyone[0]}
            log_figures(trainer, most, trainer.global_step)


def memory(device: torch.device) -> dict[str, float]:
    """The figures of this process; on CUDA the next peaks start from here."""
    if device.type != "cuda":
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        return {"perf/memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    figures = {
        "perf/memory_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "perf/memory_reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
        "perf/memory_retries": float(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return figures
