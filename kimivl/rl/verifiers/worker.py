"""What runs in a worker process: it judges one answer after another until its parent closes the line or is gone.

Imports next to nothing, so that a worker is there at once; what the verifier needs, its ``prepare`` imports.
"""

from __future__ import annotations

import math
import os
import pickle
import resource
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

GRACE_S = 5.0
"""How long after its timeout a worker that nobody ended ends itself."""


class Case(NamedTuple):
    """An answer to be judged. ``task`` chooses the verifier where there are several (``ByTask``)."""

    text: str
    expected: str
    task: str = ""


class Terms(NamedTuple):
    """What a worker is told before all else."""

    verifier: bytes
    parent: int
    timeout: float
    memory_gb: float | None


def verifier_of(verifier: Any, task: str) -> Any:
    """The verifier itself, or the one that ``ByTask`` has for the task."""
    return verifier.for_task(task) if hasattr(verifier, "for_task") else verifier


def run_verifier(verifier: Any, case: Case) -> float:
    """The mark, 0 to 1, that a verifier gives.

    Raises:
        ValueError: when it gives something else. And what the verifier raises.
    """
    given = verifier_of(verifier, case.task)(case.text, case.expected)
    mark = float(given)
    if math.isnan(mark) or not 0 <= mark <= 1:
        raise ValueError(f"a verifier gives true, false or a mark from 0 to 1, not {given!r}")
    return mark


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def reason_of(error: BaseException) -> str:
    return "memory" if isinstance(error, MemoryError) else "error"


def main(handle: int) -> None:
    """Entry of the process; ``handle`` is its end of the line to the parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they are for the parent, which may want to finish what it does
    line = Connection(handle)
    terms = Terms(*pickle.loads(line.recv_bytes()))
    threading.Thread(target=_end_with, args=(terms.parent,), daemon=True).start()
    try:
        if terms.memory_gb is not None:
            limit = int(terms.memory_gb * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        verifier = pickle.loads(terms.verifier)
        if hasattr(verifier, "prepare"):
            verifier.prepare()
    except Exception as error:
        line.send(("failed", describe(error)))
        return
    line.send(("ready", None))
    _serve(line, verifier, terms.timeout)


def _serve(line: Connection, verifier: Any, timeout: float) -> None:
    while True:
        try:
            case = Case(*line.recv())
        except (EOFError, OSError):
            return  # the parent is done
        # The parent ends a worker that takes too long. Where it cannot any more, the kernel does: no handler, because
        # one would wait for the interpreter, which a hanging C function holds.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, timeout + GRACE_S)
        try:
            answer: tuple[str, Any] = ("mark", run_verifier(verifier, case))
        except Exception as error:
            answer = (reason_of(error), describe(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            line.send(answer)
        except OSError:
            return


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
