"""Who starts the ranks: torchrun, submitit or SLURM, never Lightning inside a multirun.

Lightning's own launcher re-runs the command line in child processes. In a multirun those children would run the
whole sweep again, with other values in the same process group; so more than one device needs a launcher of its own.
"""

from __future__ import annotations

import os
from typing import Any


def check_launch(stage: str, devices: Any, num_nodes: int, multirun: bool) -> None:
    """Refuse combinations that would corrupt a run.

    Raises:
        ValueError: with the command that works.
    """
    started = "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ
    ranks = devices * num_nodes if isinstance(devices, int) else None
    if isinstance(devices, str) and not devices.isdigit():
        raise ValueError(f"trainer.devices={devices}: give the number of devices")
    if ranks == 1:
        return
    if stage == "rl":
        raise ValueError("stage=rl runs on one device for now; use trainer.devices=1")
    if not started:
        how = "hydra/launcher=local" if multirun else f"torchrun --nproc_per_node={devices} train.py stage={stage} ..."
        raise ValueError(f"trainer.devices={devices} needs a launcher that starts the ranks; use {how}")
