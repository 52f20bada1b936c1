"""Files of artifacts that W&B's client has not sent: they wait in the run's folder, with the pictures of its tables.

Its own place for them is in the home directory, which another machine that syncs the run may not have.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import wandb
from PIL import Image
from wandb.sdk.artifacts.staging import get_staging_dir

log = logging.getLogger(__name__)

_VARIABLE = "WANDB_DATA_DIR"
_PICTURE = "Image"
"""What stands for a picture in the copy of a table that is no artifact."""
_LARGEST = 50_000_000
"""Bytes of a file that may belong to a table; a place that the user named holds others."""


@contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """Keep unsent files in the folder of the run, unless the user has named a place for them."""
    before = os.environ.get(_VARIABLE)
    os.environ.setdefault(_VARIABLE, str(folder.resolve() / "wandb" / "data"))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)


class Staged:
    """What of a run's tables is on the disk and not in W&B. It is found by its content: names say nothing there."""

    @cached_property
    def _files(self) -> dict[str, Path]:
        paths = [path for path in Path(get_staging_dir()).iterdir() if path.stat().st_size < _LARGEST]
        return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in paths}

    @cached_property
    def _tables(self) -> list[dict[str, Any]]:
        found = [_table(path) for path in self._files.values()]
        return [table for table in found if table is not None]

    def value(self, name: str, value: Any) -> Any:
        """A value of a row as it was logged; a table's is its file, in which a word stands for each picture."""
        if not isinstance(value, Path):
            return value
        plain = json.loads(value.read_text())
        columns, data = plain["columns"], plain["data"]
        whole = next((table["data"] for table in self._tables if _same(table, columns, data)), data)
        rows = [[self._cell(cell) for cell in row] for row in whole]
        if lost := sum(cell == _PICTURE for row in rows for cell in row):
            log.warning("%d pictures of a table %s are not on the disk any more; it is sent without them", lost, name)
        return wandb.Table(columns=columns, data=rows)

    def _cell(self, cell: Any) -> Any:
        if not isinstance(cell, dict):
            return cell
        path = self._files.get(cell.get("sha256", ""))
        return _PICTURE if path is None else wandb.Image(Image.open(path), file_type="jpg")


def _table(path: Path) -> dict[str, Any] | None:
    content = path.read_bytes()
    if not content.startswith(b'{"_type": "table"'):
        return None
    return json.loads(content)


def _same(table: dict[str, Any], columns: list[str], data: list[list[Any]]) -> bool:
    plain = [[_PICTURE if isinstance(cell, dict) else cell for cell in row] for row in table["data"]]
    return table["columns"] == columns and plain == data
