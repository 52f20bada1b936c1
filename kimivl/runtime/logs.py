"""Where log lines go when a run has several ranks: rank 0 writes them all, the others say what is wrong with them."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from kimivl.runtime.launch import find_place


class Console(logging.StreamHandler[TextIO]):
    """The terminal: of another rank than 0, warnings and errors with its number in front."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self.rank = find_place().rank
        if self.rank:
            self.setLevel(logging.WARNING)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"[rank {self.rank}] {text}" if self.rank else text


class RunFile(logging.FileHandler):
    """The log in the run's folder, written by rank 0; the other ranks do not even open it."""

    def __init__(self, filename: str) -> None:
        self.rank = find_place().rank
        self._complained = False
        super().__init__(filename, delay=self.rank != 0)

    def emit(self, record: logging.LogRecord) -> None:
        if not self.rank:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """On a full disk: one sentence, rather than a traceback for each line. The terminal has all of them."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._complained:
            self._complained = True
            print(f"\n{self.baseFilename} lacks lines from here on: {error.strerror}", file=sys.stderr, flush=True)
