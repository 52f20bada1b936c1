"""Responses as they arrive, one JSON object a line: what was paid for is kept, whatever happens next."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)
SYNC_SECONDS = 5.0
"""What a power cut may cost; a killed process loses nothing."""


class Place(NamedTuple):
    """The bytes of a line."""

    offset: int
    size: int


class Journal:
    """An append-only file of records with a ``problem`` (number) and a ``sample`` (number).

    Attributes:
        places: (problem, sample) -> where its record lies; the last one counts.
        torn: lines that could not be read when the file was opened; their responses count as missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[tuple[int, int], Place] = {}
        self.torn = 0
        self._file = path.open("a+b")
        self._end = self._scan()
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _scan(self) -> int:
        """Find the records; a last line that a kill has cut is taken off."""
        self._file.seek(0)
        offset = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                log.warning("%s: its last line was cut off while it was written; asked for again", self.path)
                self._file.truncate(offset)
                break
            try:
                record = json.loads(line)
                self.places[record["problem"], record["sample"]] = Place(offset, len(line))
            except (ValueError, KeyError, TypeError):
                self.torn += 1
            offset += len(line)
        if self.torn:
            log.warning("%s: %d lines cannot be read; their responses are asked for again", self.path, self.torn)
        return offset

    def append(self, record: dict[str, Any]) -> None:
        """Write a record so that a kill of this process cannot take it, and to the disk every few seconds."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self._file.write(line)
        self._file.flush()
        self.places[record["problem"], record["sample"]] = Place(self._end, len(line))
        self._end += len(line)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def read(self, place: Place) -> dict[str, Any]:
        return json.loads(os.pread(self._file.fileno(), place.size, place.offset))

    def close(self) -> None:
        self._file.flush()
        self.sync()
        self._file.close()
