"""Who a run is, for W&B and on disk. The only room that knows wandb."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image

from kimivl.config import HISTORY_FILE, METRICS_FILE, RUN_FILE

log = logging.getLogger(__name__)


def run_id(output_dir: str | Path) -> str:
    """The W&B id of the run in a folder: a job that is started again there continues its curve."""
    return hashlib.sha256(str(Path(output_dir).resolve()).encode()).hexdigest()[:12]


def has_key() -> bool:
    """Whether W&B can be reached under an account: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, ValueError):
        return wandb.Settings().base_url.split("//")[-1] in Path("~/.netrc").expanduser().read_text()
    return False


def wandb_logger(output_dir: str, project: str, group: str, job_type: str) -> WandbLogger:
    """The W&B logger of a run; offline without a key, or where ``WANDB_MODE`` says so."""
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(
        name=Path(output_dir).name,
        save_dir=output_dir,
        id=run_id(output_dir),
        resume="allow",
        project=project,
        group=group,
        job_type=job_type,
        mode=mode,
        settings=wandb.Settings(console="off", x_disable_stats=mode != "online"),
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning still passes it, and wandb warns of it
    if mode == "offline":
        log.info("W&B writes to %s/wandb; send it with: wandb sync %s/wandb/offline-run-*", output_dir, output_dir)
    return logger


class History(Logger):
    """Every logged figure as a line of ``history.jsonl``, in every run.

    It is only ever appended to, so an interrupted run keeps its past; where a step was run twice the later line holds.
    """

    def __init__(self, output_dir: Path) -> None:
        super().__init__()
        self.path = output_dir / HISTORY_FILE

    @property
    def name(self) -> str:
        return "history"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in ``run.json``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def log_config(loggers: Sequence[Logger], config: dict[str, Any]) -> None:
    """Give the resolved config to every logger that keeps one."""
    for logger in loggers:
        logger.log_hyperparams(config)


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded image (PNG, JPEG, WebP) as a cell of a table."""

    data: bytes


def shows_media(loggers: Sequence[Logger]) -> bool:
    """Whether any logger can show tables, histograms and pictures; without one there is no need to make them."""
    return any(isinstance(logger, WandbLogger) for logger in loggers)


@rank_zero_only
def log_transcripts(
    loggers: Sequence[Logger], name: str, rows: Sequence[dict[str, Any]], step: int | None = None
) -> None:
    """A table of examples, to the loggers that have tables; a ``Picture`` is shown as one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and rows:
            cells = [[_cell(value) for value in row.values()] for row in rows]
            logger.log_table(name, columns=list(rows[0]), data=cells, step=step)


def _cell(value: Any) -> Any:
    return wandb.Image(Image.open(io.BytesIO(value.data))) if isinstance(value, Picture) else value


@rank_zero_only
def log_histogram(
    loggers: Sequence[Logger], name: str, values: np.ndarray, span: tuple[float, float], step: int | None = None
) -> None:
    """(n,) values between the ends of ``span`` as a histogram of 20 bins, to the loggers that have histograms."""
    counted = np.histogram(values, 20, span)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_metrics({name: wandb.Histogram(np_histogram=counted)}, step)  # type: ignore[dict-item]


def close(loggers: Sequence[Logger], status: str) -> None:
    """End every logger. A second job of the same process would otherwise write into the first one's run."""
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger):
            wandb.finish(exit_code=0 if status == "success" else 1)


def read_run(output_dir: Path) -> dict[str, Any]:
    """What an earlier run in this folder has left about itself; empty where there was none."""
    path = output_dir / RUN_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


@rank_zero_only
def write_run(output_dir: Path, status: str, config: dict[str, Any]) -> None:
    """Write ``run.json``: what the run is, and whether it is running, finished, interrupted or failed."""
    _write(output_dir / RUN_FILE, {"status": status, "config": config})


@rank_zero_only
def write_metrics(output_dir: Path, metrics: dict[str, float]) -> None:
    """Write ``metrics.json``, the last thing that a finished run does."""
    _write(output_dir / METRICS_FILE, metrics)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    temporary.replace(path)
