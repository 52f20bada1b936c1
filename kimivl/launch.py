"""Who starts the ranks of a run: one process for now, and never Lightning inside a multirun.

Lightning's own launcher re-runs the command line in child processes. In a multirun those children would run the
whole sweep again, with other values in the same process group, and end with exit code 0.
"""

from __future__ import annotations

import os
from typing import Any


def check_launch(devices: Any, num_nodes: Any) -> None:
    """Refuse what would start, or is part of, a group of several ranks.

    Raises:
        ValueError: with what works instead.
    """
    if (devices, num_nodes) != (1, 1) or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={num_nodes}: a run trains on one device for now; set both to "
            "1 and start train.py by itself (a sweep takes more devices, a job each, with hydra/launcher=local)"
        )
