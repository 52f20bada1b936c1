"""Signals that nobody listens to are kept for the run that will, rather than ending the process without a word.

A scheduler may take the machine away again in the second in which a process starts, or in which it ends. Unhandled, its
signal would end the process, and SLURM takes a job that ends by itself for finished or failed: nobody would run it
again. Only the standard library is used: this is imported before anything that takes time.
"""

from __future__ import annotations

import atexit
import signal
from types import FrameType

OF_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_came: list[int] = []


def hold() -> None:
    """From here on they wait; when the process ends first, they are not answered at all.

    Blocked signals wait in this thread, in threads that it starts and in programs that it starts or becomes. A thread
    that is older, such as W&B's or torch's, still takes them: then they are remembered.
    """
    for number in OF_SCHEDULERS:
        signal.signal(number, _remember)
    signal.pthread_sigmask(signal.SIG_BLOCK, OF_SCHEDULERS)
    atexit.register(_ignore)


def release() -> None:
    """What has come in the meantime is answered at once, by the handlers there are now."""
    for number in OF_SCHEDULERS:
        if signal.getsignal(number) is _remember:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_SCHEDULERS)
    while _came:
        signal.raise_signal(_came.pop())


def _remember(number: int, frame: FrameType | None) -> None:
    _came.append(number)


def _ignore() -> None:
    """At the end Python itself would take handlers of ours away before the threads of libraries have ended."""
    for number in OF_SCHEDULERS:
        signal.signal(number, signal.SIG_IGN)
