"""Which samples a run leaves out, and why: a table with their pictures."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from kimivl import tracking
from kimivl.data.audit.delivery import QUARANTINE_FILE

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


class Rejected(Callback):
    """Logs ``data/rejected``: when training starts, what the index left out; at its end, what could not be read since.

    The files that list all of it are the index's ``.dropped.jsonl`` and ``audit/quarantine.jsonl``.

    Args:
        path: folder of the audit. rows: of a table at most.
    """

    def __init__(self, path: str, rows: int = 64) -> None:
        if rows < 0:
            raise ValueError(f"callbacks.rejected.rows={rows} must be at least 0")
        self.folder = Path(path)
        self.rows = rows

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if index := getattr(trainer.datamodule, "index", None):  # type: ignore[attr-defined]
            self._log(trainer, index.dropped_file, 0)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._log(trainer, self.folder / QUARANTINE_FILE, trainer.global_step)

    def _log(self, trainer: Trainer, listed: Path, step: int) -> None:
        if not (trainer.is_global_zero and tracking.shows_media(trainer.loggers) and listed.is_file()):
            return
        with listed.open() as lines:
            faults = [json.loads(line) for line in itertools.islice(lines, self.rows)]
        tracking.log_table(trainer.loggers, "data/rejected", [_row(fault) for fault in faults], step)


def _row(fault: dict[str, Any]) -> dict[str, Any]:
    picture = next(_pictures(fault["shard"], fault["key"]), None)
    return {
        "key": fault["key"],
        "image": None if picture is None else tracking.Picture(picture),
        "reason": fault["reason"],
        "detail": fault["detail"],
        "shard": fault["shard"],
        "step": fault.get("step"),
    }


def _pictures(shard: str, key: str) -> Iterator[bytes]:
    """The images of a sample of a local shard, as far as it can be read."""
    path = Path(shard)
    if not key or not path.is_file():
        return
    try:
        with tarfile.open(path, "r:") as members:
            for member in members:
                if member.name.startswith(f"{key}.") and member.name.lower().endswith(IMAGES):
                    file = members.extractfile(member)
                    if file is not None:
                        yield file.read()
    except (tarfile.TarError, OSError):  # the table still says why the sample is left out
        return
