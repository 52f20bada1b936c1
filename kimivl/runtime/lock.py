"""One run at a time in a folder: two would tear each other's checkpoints apart."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
PATIENCE = 3.0
"""Seconds for the run before this one to end: a user types the command again while it is still closing."""
_REMEDY = "give this run a folder of its own with paths.output_dir=FOLDER"


@contextmanager
def only_run_in(folder: Path, patience: float = PATIENCE, remedy: str = _REMEDY) -> Iterator[None]:
    """Hold the lock of a run's folder, or of a search's. It goes with the process, however that ends, and not with its
    children.

    POSIX locks hold between machines on NFS. Where the file system has none, the run goes on without, and says so.

    Args:
        remedy: what to type for another folder.

    Raises:
        ValueError: when another process holds it; the sentence says which. Or when nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be written ({error.strerror}): {remedy}") from error
    with file:
        if _locked(file.fileno(), time.monotonic() + patience):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        else:
            holder = (folder / LOCK_FILE).read_text().strip() or "another run"
            raise ValueError(f"{folder} is in use by {holder}: wait for it, stop it, or {remedy}")
        yield


def is_alive(folder: Path) -> bool | None:
    """Whether a process holds the run; None where that cannot be told: there is no lock, or none that may be read."""
    try:
        file = (folder / LOCK_FILE).open()
    except OSError:
        return None
    with file:
        try:  # a shared one takes no more than the permission to read: the run may be another user's
            fcntl.lockf(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            return None
    return False


def _locked(file: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        except OSError as error:
            log.warning("no lock can be held here (%s): see to it yourself that no second run uses the folder", error)
            return True
