"""Signals that come before a run listens to them are kept for it, rather than ending it without a word.

A scheduler may take the machine away again in the second in which a process starts. Unhandled, its signal would end
the process, and SLURM takes a job that ends by itself for finished: nobody would run it again. Only the standard
library is used: this is imported before anything that takes time.
"""

from __future__ import annotations

import signal

OF_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def hold() -> None:
    """From here on they wait; processes that are started meanwhile begin like that, too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, OF_SCHEDULERS)


def release() -> None:
    """There are handlers now: what has come in the meantime is answered at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_SCHEDULERS)
