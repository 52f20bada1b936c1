"""What signals ask of this process, and when it gives way to them.

SIGTERM and Ctrl-C ask a run to save itself and stop. SIGUSR1 and SIGUSR2, which schedulers send before they take the
machine away, ask it to go on later as well: under SLURM it then puts itself back into the queue.

Saving inside a signal handler would deadlock with uneven ranks. So a signal is only remembered while the run trains,
and all ranks agree on it between two steps; before the first step and in rollouts, where there is nothing to save that
is not saved already, it is answered at once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from kimivl.config import Interrupted
from kimivl.runtime import signals
from kimivl.runtime.launch import find_place

NOTHING, STOP, GO_ON_LATER = 0, 1, 2
SIGNALS = {signal.SIGINT: STOP, signal.SIGTERM: STOP, signal.SIGUSR1: GO_ON_LATER, signal.SIGUSR2: GO_ON_LATER}
NOT_BEGUN = "before the first step; the same command starts again"
REQUEUES_WITHOUT_A_STEP = 5
"""A job that would go back into the queue for the fifth time in a row without a step has too little time: it stops."""
REQUEUES = "requeues.json"
_WORD = "stop"
_IN_BETWEEN = "left in between"


@dataclass
class _Listener:
    """``at_once``: what an interruption at this moment says, or None where a signal is only remembered."""

    asked: int = NOTHING
    at_once: str | None = NOT_BEGUN
    advanced: bool = False
    previous: dict[int, Any] = field(default_factory=dict)

    def receive(self, number: int, frame: FrameType | None) -> None:
        again = self.asked != NOTHING and number == signal.SIGINT
        self.asked = self.asked or SIGNALS[signal.Signals(number)]
        if again:
            self.at_once = None
            raise Interrupted("at once, without saving; the same command goes on from the last checkpoint")
        if self.at_once is not None:
            message, self.at_once = self.at_once, None
            self.tell()
            raise Interrupted(message)
        if find_place().rank == 0:
            print("\nstopping when this step is done and saved; Ctrl-C stops at once", file=sys.stderr, flush=True)

    def tell(self) -> None:
        """Ranks that are in rollouts look for the word; one that cannot be told learns it from its own signal."""
        if "kimivl.runtime.ranks" in sys.modules:
            with suppress(RuntimeError):  # the rank that keeps the words has left
                sys.modules["kimivl.runtime.ranks"].post(_WORD, str(self.asked))


_listener = _Listener()
"""Signals come to a process, so there is one."""


@contextmanager
def listening(output_dir: Path) -> Iterator[None]:
    """Answer signals in this block; when it ends by one that asks to go on later, put the job back into the queue.

    Args:
        output_dir: the run's folder, where a job that never gets to its first step is remembered.
    """
    global _listener
    if threading.current_thread() is not threading.main_thread() or _listener.previous:
        yield
        return
    _listener = _Listener()
    _listener.previous = {number: signal.signal(number, _listener.receive) for number in SIGNALS}
    try:
        signals.release()
        yield
        (output_dir / REQUEUES).unlink(missing_ok=True)
    except Interrupted as interrupted:
        _listener.at_once = None
        _leave(interrupted, output_dir)
        raise
    finally:
        for number, handler in _listener.previous.items():
            if signal.getsignal(number) == _listener.receive:  # unless signals are on hold by now
                signal.signal(number, handler)
        _listener = _Listener()


# Where a run gives way.


def wait_for_a_step() -> None:
    """From here on a signal is only remembered."""
    _listener.at_once = None


def give_way(message: str) -> None:
    """From here on a signal interrupts at once, with ``message``; so does one that came before."""
    if _listener.asked:
        _listener.tell()
        raise Interrupted(message)
    _listener.at_once = message


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _listener.asked != NOTHING


def agreed() -> bool:
    """Whether any rank was asked to stop; all ranks must call it. Costs no synchronisation with a GPU."""
    from kimivl.runtime import ranks

    _listener.asked = ranks.largest(_listener.asked)
    return asked()


def advanced() -> None:
    """The run has come further than it was when this process began."""
    _listener.advanced = True


def until_asked(work: Callable[[], None]) -> None:
    """Do ``work``; a signal ends it, and the program goes on behind it to where all ranks end together."""
    before = _listener.at_once
    if asked():
        return
    try:
        _listener.at_once = _IN_BETWEEN
        work()
    except Interrupted as interrupted:
        if str(interrupted) != _IN_BETWEEN:
            raise
    finally:
        _listener.at_once = before


def hear_of_others() -> None:
    """What another rank was asked that left at once, this one was asked too: the first rank tells SLURM for all."""
    from kimivl.runtime import ranks

    with suppress(RuntimeError):  # the rank that keeps the words has left
        _listener.asked = _listener.asked or int(ranks.posted(_WORD) or NOTHING)


# What SLURM is told.


def _leave(interrupted: Interrupted, output_dir: Path) -> None:
    """Requeue once: the first rank does it, and the others leave without a word, so that nothing stops it."""
    job = slurm_job(os.environ)
    if find_place().rank != 0:
        interrupted.code = 0
    if job is None:
        return
    if _listener.asked == GO_ON_LATER or _is_preempted(job):
        interrupted.requeued = _requeue(job, output_dir) if find_place().rank == 0 else True


def slurm_job(environ: Any) -> str | None:
    """The job that this process belongs to, as ``scontrol`` takes it: 17, or 17_3 in an array."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def _is_preempted(job: str) -> bool:
    """Whether a SIGTERM came for a preemption, after which SLURM takes a job that ends by itself for finished.

    A job that is cancelled, or that SLURM requeues by itself, runs no more.
    """
    said = _scontrol("--oneliner", "show", "job", job).stdout
    return "JobState=RUNNING" in said and re.search(r"PreemptTime=\d", said) is not None


def _requeue(job: str, output_dir: Path) -> bool:
    file = output_dir / REQUEUES
    if (times := _times_without_a_step(file)) >= REQUEUES_WITHOUT_A_STEP:
        print(
            f"\nnot requeued: interrupted {times} times in a row without making a step; give the job more time "
            f"(hydra.launcher.timeout_min, or sbatch --time), and remove {file}",
            file=sys.stderr,
        )
        return False
    print(f"\nSLURM job {job} is put back into the queue", file=sys.stderr, flush=True)
    done = _scontrol("requeue", job)
    if done.returncode and "pending" not in done.stderr:
        print(f"SLURM did not requeue it: {done.stderr.strip()}; submit the same command again", file=sys.stderr)
    return not done.returncode or "pending" in done.stderr


def _times_without_a_step(file: Path) -> int:
    """How often in a row, this time included; kept in ``file`` for the process that comes next."""
    if _listener.advanced:
        file.unlink(missing_ok=True)
        return 0
    times = 1 + _counted(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"without_a_step": times}) + "\n")
    except OSError as error:  # a full disk is no reason to lose the place in the queue
        print(f"\n{file} cannot be written ({error.strerror}): this start is not counted", file=sys.stderr)
    return times


def _counted(file: Path) -> int:
    if not file.is_file():
        return 0
    try:
        return int(json.loads(file.read_text())["without_a_step"])
    except (OSError, ValueError, KeyError, TypeError):
        print(f"\n{file} cannot be read: starts without a step are counted anew", file=sys.stderr)
        return 0


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))
