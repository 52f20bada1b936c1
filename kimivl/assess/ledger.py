"""The file of an assessment while it is written: a line as soon as a problem is assessed, and who may write it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kimivl.data.columns import FORMAT, read_assessed

_MAY_DIFFER = {"format", "model"}  # the weights tell models apart, wherever their folder lies


class Ledger:
    """Appends to ``path``, and knows what it holds already.

    Args:
        about: who assesses and how; an assessment goes on only with the same.
        anew: forget what the file holds.

    Raises:
        ValueError: when the file holds an assessment made otherwise, or another process is writing it.
    """

    def __init__(self, path: Path, about: dict[str, Any], anew: bool = False) -> None:
        self.path = path
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"{path} is being written by another kimivl assess; wait for it") from error
        try:
            if anew:
                self._file.truncate(0)
            self._cut_torn_line()
            self.about, self.rows = read_assessed(path)
            if self.about:
                self._check(about)
            else:
                self.about = {"format": FORMAT} | about
                self._append([self.about])
        except BaseException:
            self.close()
            raise

    def _cut_torn_line(self) -> None:
        """What a killed process had not written to its end goes away; that problem is assessed again."""
        whole = self.path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(whole)

    def _check(self, about: dict[str, Any]) -> None:
        for name, value in about.items():
            before = self.about.get(name)
            if name not in _MAY_DIFFER and before != value:
                raise ValueError(
                    f"{self.path} holds an assessment with another {name} ({before!r}, now {value!r}); go on with its "
                    "settings, or begin again with assess.anew=true"
                )

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append lines, down to the disk."""
        self._append(rows)
        self.rows |= {(row["key"], row["crc32"]): row for row in rows}

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let another process write the file."""
        self._file.close()
