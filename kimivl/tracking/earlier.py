"""What earlier processes of a run have left in W&B's own files, so that its curve is whole and stands once.

W&B keeps a log of each process, online and offline (``wandb/run-*-ID``, ``wandb/offline-run-*-ID``). ``wandb sync`` of
several offline logs of one run appends one to the other, in the order of their beginning. What it does with an online
log that W&B has had in part is to send all of it again: those are not synced. What they lack is logged again, from the
run's own ``history.jsonl``, by the process that goes on or by ``kimivl sync``.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shlex
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wandb.util import get_core_path

from kimivl.config import HISTORY_FILE
from kimivl.history import read_history
from kimivl.tracking.axes import Axes
from kimivl.tracking.local import fresh
from kimivl.tracking.names import CARRIED, STEP
from kimivl.tracking.staged import Staged

log = logging.getLogger(__name__)

_FILE_HEAD, _BLOCK, _HEAD = 7, 32768, 7
_WHOLE, _LAST, _PIECES = 1, 4, {1, 2, 3, 4}


class Earlier:
    """The logs of the processes of a run that came before.

    Args:
        folder: of the run. run_id: of the run.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        logs = (folder / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb")
        self.history = folder / HISTORY_FILE
        paths = sorted(logs, key=_began)
        for path in paths:
            mend(path)
        self.logs = [(path, list(_rows(path))) for path in paths]

    def places(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of each axis that not all rows have."""
        rows = list(_by_step(self.history))
        return {axis: [(step, row[axis]) for step, row in rows if axis in row] for axis in CARRIED}

    def catch_up(self, run: Any, axes: Axes, online: bool) -> dict[str, int]:
        """Log what the run's earlier processes have logged and W&B lacks: they were killed, or could not reach it.

        Returns the last global step that each metric is now logged for.
        """
        # W&B numbers the rows of a run and says how many it has. What was written offline is still to be synced.
        known = run.starting_step if online else None
        last: dict[str, int] = {}
        before = 0
        for path, rows in self.logs:
            first = before if _is_offline(path) else 0  # an offline log numbers its own rows
            for row in rows:
                if STEP in row and (known is None or first + row["_step"] < known or _is_for_sync(path)):
                    last |= {name: max(int(row[STEP]), last.get(name, -1)) for name in row}
            before += len(rows)
        unsent = [(path, row) for path, rows in self.logs if not _is_for_sync(path) for row in rows if STEP in row]
        staged = Staged()
        for step, row in [*_by_step(self.history), *_media(unsent)]:
            if new := fresh(row, step, last):
                axes.log({name: staged.value(name, value) for name, value in new.items()}, step)
                last |= dict.fromkeys(new, step)
        return last

    def sync_offline(self) -> str:
        """``wandb sync`` of what was written offline and is not marked as sent; returns its folders."""
        offline = [path for path, _ in self.logs if _is_offline(path)]
        unsent = [str(path.parent) for path in offline if not _synced(path).exists()]
        if unsent:
            command = [sys.executable, "-m", "wandb", "sync", *unsent]
            where = os.environ | {"WANDB_MODE": "online", "WANDB_DIR": str(self.history.parent)}  # of its own log
            done = subprocess.run(command, env=where, capture_output=True, text=True)
            if done.returncode or "ERROR" in done.stderr:  # it says 0 whatever happens
                raise ValueError(f"wandb sync {shlex.join(unsent)} failed: {' '.join(done.stderr.split())[-300:]}")
        return " ".join(unsent)


def mend(log: Path) -> None:
    """Cut off the record that a killed process left half written: ``wandb sync`` takes nothing that comes after it.

    The file is a LevelDB log: blocks of 32 KiB, in them pieces of records, each after a head of 7 bytes (checksum,
    length, and whether the piece is a whole record, its first, a middle or its last).
    """
    content = log.read_bytes()
    place, whole = _FILE_HEAD, _FILE_HEAD
    while (left := _BLOCK - place % _BLOCK) and place + _HEAD <= len(content):
        if left < _HEAD:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        place += _HEAD + length
        if kind not in _PIECES or place > len(content):
            break
        if kind in (_WHOLE, _LAST):
            whole = place
    if whole < len(content) and any(content[whole:]):
        with log.open("r+b") as file:
            file.truncate(whole)


def _is_offline(path: Path) -> bool:
    return path.parent.name.startswith("offline")


def _is_for_sync(path: Path) -> bool:
    """Whether ``wandb sync`` sends all of a log or has done so: it never sends what is written after it."""
    synced = _synced(path)
    has_grown = synced.exists() and synced.stat().st_mtime_ns < path.stat().st_mtime_ns
    return _is_offline(path) and not has_grown


def _synced(path: Path) -> Path:
    """What ``wandb sync`` leaves beside a log."""
    return path.with_name(f"{path.name}.synced")


def _began(path: Path) -> str:
    """The time in the name of its folder: ``offline-run-20261122_104852-ID``."""
    return path.parent.name.removeprefix("offline-")


def _by_step(history: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of ``history.jsonl``, those of a step together."""
    rows = (row for row in read_history(history) if row["step"] is not None)
    for step, together in itertools.groupby(rows, key=lambda row: row["step"]):
        yield step, {name: value for row in together for name, value in row.items() if name != "step"}


def _media(rows: Iterable[tuple[Path, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """What no ``history.jsonl`` holds: histograms of rows, and tables as the files that they are in."""
    for path, row in rows:
        for name, value in row.items():
            if isinstance(value, dict):
                is_table = value.get("_type") == "table-file"
                yield int(row[STEP]), {name: path.parent / "files" / value["path"] if is_table else value}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one log, as far as it was written."""
    command = [get_core_path(), "leet", "inspect", "--json", "--run-file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        log.warning("%s cannot be read; rows of it may be logged twice: %s", path, done.stderr.strip()[-200:])
    for line in done.stdout.splitlines():
        if line.startswith('{"num"') and '"type":"history"' in line:
            yield _nested(json.loads(line)["history"]["item"])


def _nested(item: dict[str, Any]) -> dict[str, Any]:
    """``{"table._type": ..., "table.path": ...}`` -> ``{"table": {"_type": ..., "path": ...}}``."""
    row: dict[str, Any] = {}
    for name, value in item.items():
        outer, _, inner = name.partition(".")
        if inner:
            row.setdefault(outer, {})[inner] = value
        else:
            row[outer] = value
    return row
