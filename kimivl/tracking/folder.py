"""What a run leaves about itself in its folder: who it is, its status, its figures."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from kimivl.config import HISTORY_FILE, METRICS_FILE, RUN_FILE

CSV_FILE, TENSORBOARD_FOLDER = "metrics.csv", "tensorboard"


def new_id() -> str:
    """The id of a run that begins. It is not made of the folder: that may be moved, or removed and filled again, and
    the next run there is another one."""
    return secrets.token_hex(6)


def read_run(output_dir: Path) -> dict[str, Any]:
    """What an earlier run in this folder has left about itself; empty where there was none."""
    path = output_dir / RUN_FILE
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); remove {output_dir}, or bring the file back") from error


@rank_zero_only
def write_run(
    output_dir: Path, status: str, config: dict[str, Any], error: str | None = None, *, anew: bool = False
) -> None:
    """Write ``run.json``: what the run is, whether it is running, finished, interrupted or failed, and by what error.

    Args:
        anew: this run is none of those that were here before, and gets an id of its own.
    """
    before = read_run(output_dir)
    kept = None if anew else before.get("id")
    about = {"status": status, "id": kept or new_id()}
    said = {} if error is None else {"error": error}
    _write(output_dir / RUN_FILE, about | said | {"config": config})


@rank_zero_only
def begin_run(output_dir: Path, config: dict[str, Any], goes_on: bool) -> None:
    """Say in ``run.json`` that a run begins; the figures of one that it does not go on from are removed.

    Args:
        goes_on: from the folder's own last checkpoint. Without one the run is still the one that was here before, where
            that ended too early to leave a checkpoint.
    """
    before = read_run(output_dir)
    same = before.get("status") != "finished" and before.get("config") == config
    write_run(output_dir, "running", config, anew=not (goes_on or same))
    if not goes_on:
        for file in (HISTORY_FILE, CSV_FILE):
            (output_dir / file).unlink(missing_ok=True)
        shutil.rmtree(output_dir / TENSORBOARD_FOLDER, ignore_errors=True)


def parent_of(init_from: str | None) -> dict[str, Any]:
    """What the run whose model ``init_from`` is has left about itself; empty for a model of another origin."""
    return read_run(Path(init_from).parent) if init_from else {}


@rank_zero_only
def write_metrics(output_dir: Path, metrics: dict[str, float]) -> None:
    """Write ``metrics.json``, the last thing that a finished run does."""
    _write(output_dir / METRICS_FILE, metrics)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file of which nobody ever sees a part; where it cannot be written the one that was there stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())  # or a machine that loses its power may leave an empty file of this name
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cut_half_a_row(path: Path) -> None:
    """Take away the last line of a file, which may not be there, where a killed process left it half written."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def append(path: Path, text: str) -> None:
    """Write at the end of a file all of a text or nothing.

    Raises:
        OSError: on a full disk among others.
    """
    with path.open("ab", buffering=0) as file:
        whole = file.tell()
        content = text.encode()
        if file.write(content) < len(content):  # a full disk takes a part of it, and refuses the rest
            file.truncate(whole)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class History(Logger):
    """Every logged figure as a line of ``history.jsonl``, in every run.

    It is only ever appended to, so an interrupted run keeps its past; where a step was run twice the later line holds.
    """

    def __init__(self, output_dir: Path) -> None:
        super().__init__()
        self.path = output_dir / HISTORY_FILE
        rank_zero_only(cut_half_a_row)(self.path)

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
        append(self.path, json.dumps({"step": step, **metrics}) + "\n")
