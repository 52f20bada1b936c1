"""What a run looks at before it starts on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kimivl.memory.devices import GB, Device
from kimivl.memory.estimate import estimate
from kimivl.memory.setup import Setup, is_sharded

log = logging.getLogger(__name__)


def check_memory(cfg: Mapping[str, Any], overrides: Sequence[str], device: Device | None = None) -> None:
    """Refuse what cannot fit on this machine's GPU, and warn of what may not.

    Certain are weights, gradients and optimiser states; activations and workspace are an estimate. Nothing is said of
    a run on a CPU, under a strategy that the estimate does not know, and of models whose vocabulary the data decides.

    Args:
        cfg: the resolved config.
        overrides: as they were typed, for the command that shows more.
        device: None: the one that is found.

    Raises:
        ValueError: when the certain part is larger than the device.
    """
    on_cpu = cfg["trainer"]["accelerator"] == "cpu"
    if on_cpu or is_sharded(cfg["trainer"]) is None or cfg["model"].get("vocab_size") is None:
        return
    device = device or Device.found()
    if device is None:
        return
    found = estimate(Setup.of(cfg))
    have, certain = device.capacity / GB, found.parameters.certain / GB
    command = " ".join(["kimivl memory", *overrides])
    if certain > have:
        raise ValueError(
            f"weights, gradients and optimiser states take {certain:.1f} GB, and {device.name} has {have:.1f}; "
            f"what would fit says: {command}"
        )
    if found.peak > device.capacity:
        log.warning("memory may run out: about %.1f GB of %.1f; see: %s", found.peak / GB, have, command)
