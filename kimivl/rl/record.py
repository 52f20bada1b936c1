"""What an iteration leaves on the disk: its responses to read (jsonl), and those that an interruption must not lose."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kimivl.rl.partial import response_of, response_state
from kimivl.rl.types import Request, Response
from kimivl.runtime import ranks

log = logging.getLogger(__name__)
SAVE_EVERY = 60.0
"""Seconds of generation that a run which is killed while it collects loses at most."""


class RolloutRecord:
    """The folder ``data.rollouts``: ``000012.jsonl`` with a line per group of iteration 12, once it is collected, and
    ``000012.partial/`` with its responses from the time they are drawn until a checkpoint has them, in files of each
    rank. All ranks have the same folder; the first writes the lines and removes what is to be removed.

    Files are written whole or not at all. The responses of an interrupted iteration are used again by the policy that
    drew them, and only by it: after a resume from an earlier step that came out differently they are drawn anew.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def begin(self, iteration: int) -> None:
        """Remove the lines of later iterations: a run that was gone back in, or started anew, takes their place."""
        for number, path in self._files("jsonl"):
            if number >= iteration and ranks.is_first():
                path.unlink()

    def saved(self, iteration: int) -> None:
        """A checkpoint has the experience of this iteration: the responses up to it are needed no more."""
        for number, path in self._files("partial"):
            if number <= iteration and ranks.is_first():
                shutil.rmtree(path, ignore_errors=True)

    def _files(self, kind: str) -> list[tuple[int, Path]]:
        found = [] if self.folder is None else self.folder.glob(f"[0-9]*.{kind}")
        return [(int(path.stem), path) for path in found if path.stem.isdigit()]

    def kept(self, iteration: int, policy: Callable[[], str]) -> KeptResponses:
        """The responses that an interrupted collection of this iteration has left."""
        return KeptResponses(None if self.folder is None else self.folder / f"{iteration:06d}.partial", policy)

    def write(self, iteration: int, rows: Iterable[Mapping[str, Any]]) -> None:
        if self.folder is None or not ranks.is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._jsonl(iteration)
        part = path.with_name(f".{path.name}.part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        part.replace(path)

    def _jsonl(self, iteration: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{iteration:06d}.jsonl"


class KeptResponses:
    """Responses of one iteration by request, on the disk at least every minute, in files that hold what is new.

    Each rank finds those of all, and writes its own: a run may go on with other ranks.

    Args:
        folder: of the files; None keeps nothing.
        policy: tells one policy from another.
    """

    def __init__(self, folder: Path | None, policy: Callable[[], str]) -> None:
        self.folder, self.policy = folder, policy
        self.found: dict[tuple[int, int], Response] = {}
        self._unsaved: list[tuple[int, int, dict[str, Any]]] = []
        self._saved_at = time.monotonic()
        files = [] if folder is None else sorted(folder.glob("[0-9]*.pt"))
        self._files = len(files)
        if any(ranks.attempt(lambda: self._read(files))):
            log.warning("%s holds responses of another policy: they are drawn anew", self.folder)
            ranks.share(self.remove)  # nobody writes before they are gone
            self.found, self._files = {}, 0

    def _read(self, files: Sequence[Path]) -> bool:
        """Whether they are of another policy."""
        states = [torch.load(path, weights_only=True) for path in files]
        if any(state["policy"] != self.policy() for state in states):
            return True
        self.found = {(seed, start): response_of(kept) for state in states for seed, start, kept in state["responses"]}
        if self.found:
            log.info("%d responses of the interrupted iteration are used again", len(self.found))
        return False

    def get(self, request: Request) -> Response | None:
        return self.found.get(_key(request))

    def add(self, request: Request, response: Response) -> None:
        if self.folder is not None and response.stop != "error":  # that is asked for again
            self._unsaved.append((*_key(request), response_state(response)))
            if time.monotonic() > self._saved_at + SAVE_EVERY:
                self.save()

    def save(self) -> None:
        """Write what is new to a file of its own."""
        if self.folder is None or not self._unsaved:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._files:04d}-{ranks.rank()}.pt"
        part = path.with_name(f".{path.name}.part")
        torch.save({"policy": self.policy(), "responses": self._unsaved}, part)
        part.replace(path)
        self._files, self._unsaved, self._saved_at = self._files + 1, [], time.monotonic()

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _key(request: Request) -> tuple[int, int]:
    """A seed is one response's own; its calls differ in where they go on from."""
    return request.seed, len(request.prefix)
