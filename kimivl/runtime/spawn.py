"""Starts the ranks of a run on this machine; passes on the signals that it gets, and how they ended.

``python kimivl/runtime/spawn.py 2 train.py stage=sft ...``: what ``launch`` turns a single run on several devices into.
The ranks have torchrun's variables. Unlike torchrun this needs no torch, hands every signal on as it is, once, gives
the ranks all the time they take to save, and ends with their exit code and without a traceback of its own. Only the
standard library is used: this file is run by its path.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
GRACE = 180.0
"""Seconds in which the other ranks may end by themselves after one has failed: W&B may take two minutes of them."""

_POLL = 0.05
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """``DEVICES SCRIPT [ARGUMENT ...]`` -> the exit code of the rank that failed first, or 0."""
    devices, command = int(arguments[0]), [sys.executable, *arguments[1:]]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ranks = Ranks([_start(command, rank, devices, listener) for rank in range(devices)])
    for number in SIGNALS:
        signal.signal(number, ranks.pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the ranks hold theirs back until they listen, too
    code = ranks.wait()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # there is nobody left to pass it on to
    return code


class Ranks:
    """The processes of a run."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self.processes = processes
        self.passed_on: set[int] = set()

    def pass_on(self, number: int, frame: FrameType | None = None) -> None:
        """Give every rank a signal. They lead sessions of their own: a Ctrl-C of the terminal does not reach them."""
        self.passed_on.add(number)
        for process in self.processes:
            process.send_signal(number)

    def wait(self) -> int:
        """The code of the first that failed; the others then have ``GRACE`` seconds to end too."""
        failure, deadline = 0, float("inf")
        running = dict(enumerate(self.processes))
        while running:
            for rank, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[rank]
                if code and not failure:
                    failure, deadline = self._failure(rank, code), time.monotonic() + GRACE
            if time.monotonic() > deadline:
                self._kill(running)
            time.sleep(_POLL)
        return failure

    def _failure(self, rank: int, code: int) -> int:
        if code > 0:
            return code
        if -code not in self.passed_on:
            why = " (the system does that when memory runs out)" if -code == signal.SIGKILL else ""
            name = signal.Signals(-code).name
            _say(f"error: rank {rank} was ended by {name}{why}; the same command goes on from the last checkpoint")
        return 128 - code

    def _kill(self, running: dict[int, subprocess.Popen[bytes]]) -> None:
        for rank, process in running.items():
            _say(f"error: rank {rank} did not end within {GRACE:.0f} s of another's failure, and is ended")
            os.killpg(process.pid, signal.SIGKILL)  # with its loader workers
            process.wait()


def _start(command: list[str], rank: int, devices: int, listener: socket.socket) -> subprocess.Popen[bytes]:
    """Rank 0 is handed the socket that the others connect to: no other run can take its port in between."""
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": devices,
        "LOCAL_WORLD_SIZE": devices,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": listener.getsockname()[1],
        "KIMIVL_STORE": listener.fileno() if rank == 0 else "",
    }
    environment = os.environ | {name: str(value) for name, value in own.items()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // devices)))  # without it each rank takes all cores
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=[listener.fileno()] if rank == 0 else [],
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
    """A rank whose parent is killed outright is told to save and stop, rather than left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
