"""Who a run is and what it tells: to its folder, to W&B, to CSV and TensorBoard. The only room that knows wandb."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from kimivl.tracking.folder import History, begin_run, parent_of, read_run, run_id, write_metrics, write_run
from kimivl.tracking.media import Picture, Shows, log_histogram, log_table, shows_media

__all__ = [
    "History",
    "Picture",
    "Shows",
    "begin_run",
    "close",
    "log_config",
    "log_histogram",
    "log_model",
    "log_table",
    "parent_of",
    "read_run",
    "run_id",
    "shows_media",
    "write_metrics",
    "write_run",
]


def log_config(loggers: Sequence[Logger], config: dict[str, Any]) -> None:
    """Give the resolved config to every logger that keeps one."""
    for logger in loggers:
        logger.log_hyperparams(config)


def log_model(loggers: Sequence[Logger], folder: Path, metadata: dict[str, Any]) -> None:
    """Tell every logger that keeps models where the run's is; none copies it."""
    for logger in loggers:
        if (tell := getattr(logger, "log_model", None)) is not None:
            tell(folder, metadata)


def close(loggers: Sequence[Logger], outcome: str) -> None:
    """End every logger, whatever becomes of the others.

    Args:
        outcome: ``success``, ``interrupted`` or ``failed``.
    """
    for logger in loggers:
        logger.finalize(outcome)
        if (end := getattr(logger, "close", None)) is not None:
            end(outcome)
