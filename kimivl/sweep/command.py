"""The command line of a sweep: kept with it, and told again for what is missing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

MULTIRUN_FILE = "multirun.yaml"
"""In the folder of a sweep: Hydra's configuration of it."""

_CONFIG = "train"
"""The configuration of conf/ that a script takes where ``--config-name`` names no other."""
_SET_AGAIN = ("hydra.sweep.dir=", "hydra.mode=")


def begin(config: DictConfig) -> Path:
    """Make the folder of a sweep, and write down there what is swept."""
    folder = Path(str(config.hydra.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / MULTIRUN_FILE)
    return folder


def command_of(hydra: Mapping[str, Any], folder: Path) -> str:
    """What to type for the points of a sweep that have not finished; those that have are left out.

    Args:
        hydra: Hydra's configuration of the sweep, as it stands in ``MULTIRUN_FILE``.
    """
    job, typed = hydra["job"], hydra["overrides"]
    name = job.get("config_name", _CONFIG)
    sources = (hydra.get("runtime") or {}).get("config_sources", [])
    words = [
        "-m",
        *(f"--config-dir={source['path']}" for source in sources if source["provider"] == "command-line"),
        *([f"--config-name={name}"] if name != _CONFIG else []),
        *typed["task"],
        *(override for override in typed["hydra"] if not override.startswith(_SET_AGAIN)),
        f"hydra.sweep.dir={quoted(str(folder))}",
    ]
    return f"python {job['name']}.py {' '.join(shlex.quote(word) for word in words)}"


def quoted(value: str) -> str:
    """As Hydra reads a value that may hold a comma, a space or an equals sign."""
    if re.fullmatch(r"[\w/.+@-]+", value, re.ASCII):
        return value
    return QuotedString(value, Quote.single).with_quotes()
