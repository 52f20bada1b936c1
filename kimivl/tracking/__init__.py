"""Who a run is and what it tells: to its folder, to W&B, to CSV and TensorBoard. The only room that knows wandb."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from kimivl.tracking.folder import History, begin_run, parent_of, read_run, write_metrics, write_run
from kimivl.tracking.media import Picture, Shows, log_histogram, log_table, shows_media

__all__ = [
    "History",
    "Picture",
    "Shows",
    "begin_run",
    "close",
    "join_sweep",
    "log_config",
    "log_histogram",
    "log_model",
    "log_table",
    "parent_of",
    "read_run",
    "shows_media",
    "write_metrics",
    "write_run",
]

log = logging.getLogger(__name__)


def log_config(loggers: Sequence[Logger], config: dict[str, Any]) -> None:
    """Give the resolved config to every logger that keeps one."""
    for logger in loggers:
        logger.log_hyperparams(config)


def log_model(loggers: Sequence[Logger], folder: Path, metadata: dict[str, Any]) -> None:
    """Tell every logger that keeps models where the run's is; none copies it."""
    for logger in loggers:
        if (tell := getattr(logger, "log_model", None)) is not None:
            tell(folder, metadata)


def join_sweep(loggers: Any, name: str, folder: Path) -> None:
    """Put a run into the W&B group of the sweep in ``folder``; a group that the user has chosen stays.

    Sweeps of other names have folders of the same name. They are set apart by a hyphen: a group has an address in W&B,
    in which a slash would end it.

    Args:
        loggers: the config's; without W&B there is nothing to do.
    """
    wandb = (loggers or {}).get("wandb")
    if wandb and wandb.get("group") == name:
        wandb["group"] = f"{name}-{folder.name}"


def close(loggers: Sequence[Logger], outcome: str) -> None:
    """End every logger, whatever becomes of the others.

    What fails is a warning: ``history.jsonl`` has the figures, and an error that the run ends with must not be hidden.

    Args:
        outcome: ``success``, ``interrupted`` or ``failed``.
    """
    for logger in loggers:
        for end in (logger.finalize, getattr(logger, "close", None)):
            try:
                if end is not None:
                    end(outcome)
            except Exception as error:
                log.warning("%s could not be closed, and may lack its last figures: %s", type(logger).__name__, error)
