"""The command line of a sweep: kept with it, and told again for what is missing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

MULTIRUN_FILE = "multirun.yaml"
"""In the folder of a sweep: Hydra's configuration of it."""

_SET_AGAIN = ("hydra.sweep.dir=", "hydra.mode=")


def begin(config: DictConfig) -> Path:
    """Make the folder of a sweep, and write down there what is swept."""
    folder = Path(str(config.hydra.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / MULTIRUN_FILE)
    return folder


def command_of(script: str, task: Sequence[str], hydra: Sequence[str], folder: Path) -> str:
    """What to type for the points of a sweep that have not finished; those that have are left out.

    Args:
        script: ``train`` of ``train.py``. task, hydra: the overrides that the sweep was typed with.
    """
    kept = [override for override in hydra if not override.startswith(_SET_AGAIN)]
    words = ["-m", *task, *kept, f"hydra.sweep.dir={_quoted(str(folder))}"]
    return f"python {script}.py {' '.join(shlex.quote(word) for word in words)}"


def _quoted(value: str) -> str:
    """As Hydra reads a value that may hold a comma, a space or an equals sign."""
    if re.fullmatch(r"[\w/.+@-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
