"""Who starts the ranks of a run: one process for now, and never Lightning inside a multirun.

Lightning's own launcher re-runs the command line in child processes. In a multirun those children would run the
whole sweep again, with other values in the same process group, and end with exit code 0.
"""

from __future__ import annotations

import os
from typing import Any


def check_launch(devices: Any, num_nodes: Any, accelerator: Any = "auto") -> None:
    """Refuse what would start, or is part of, a group of several ranks, and a device that is not there.

    Raises:
        ValueError: with what works instead.
    """
    if accelerator in ("gpu", "cuda"):
        import torch  # the launcher of a sweep imports this file, and needs no torch

        if not torch.cuda.is_available():
            raise ValueError(f"trainer.accelerator={accelerator}: torch finds no CUDA device here; use trainer=cpu")
    if (devices, num_nodes) != (1, 1) or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={num_nodes}: a run trains on one device for now; set both to "
            "1 and start train.py by itself (a sweep takes more devices, a job each, with hydra/launcher=local)"
        )
