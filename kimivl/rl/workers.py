"""Verifiers in worker processes with a hard timeout, so that no answer can stop or end a run.

Workers are fresh interpreters, not forks: they hold nothing of the parent (no CUDA context, no locks of its threads),
never run its main file, and import only what the verifier needs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing.connection import Connection, wait
from typing import Any

from kimivl.rl.verifiers.worker import Case, Terms, describe, reason_of, run_verifier, verifier_of

log = logging.getLogger(__name__)

START_S = 120.0
"""Time that a worker has to import what it needs; a file system may be slow at the start of a job."""
ATTEMPTS = 3
LOOK_S = 1.0
"""How often a worker is looked after whose end of the line some other process might hold open."""

_COMMAND = "import sys; sys.path[:] = {path!r}; from kimivl.rl.verifiers.worker import main; main({handle})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """``correct`` 0 or 1 (or between, where a verifier gives parts of a mark); NaN where the verifier failed, and
    then ``failure`` is the reason it is counted under: ``timeout``, ``crash`` (the process died), ``memory`` or
    ``error`` (it raised), and ``detail`` says more."""

    correct: float
    failure: str | None = None
    detail: str = ""


def failed(reason: str, detail: str) -> Verdict:
    return Verdict(math.nan, reason, detail)


class Worker:
    """The parent's handle on one process. ``case`` is what it works on; ``deadline`` is on ``time.monotonic``."""

    def __init__(self, terms: Terms) -> None:
        line, other = multiprocessing.Pipe()
        command = _COMMAND.format(path=sys.path, handle=other.fileno())
        try:
            # A process group of its own: Ctrl-C in a terminal is for the parent, which ends its workers itself.
            self.process = subprocess.Popen(
                [sys.executable, "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                process_group=0,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        finally:
            other.close()
        self.line: Connection = line
        self.ready = False
        self.case: Case | None = None
        self.deadline = time.monotonic() + START_S
        self.tell(pickle.dumps(tuple(terms)))

    def tell(self, message: bytes) -> bool:
        """Whether the worker could be told; one that died while it waited cannot."""
        try:
            self.line.send_bytes(message)
        except OSError:
            return False
        return True

    def ask(self, case: Case, timeout: float) -> bool:
        self.case, self.deadline = case, time.monotonic() + timeout
        return self.tell(pickle.dumps(tuple(case)))

    def hear(self) -> tuple[str, Any] | None:
        """What it says; None when it is dead. To be called when there is something to hear."""
        try:
            return self.line.recv()
        except (EOFError, OSError):
            return None

    def end(self, leaves_within: float = 0.05) -> str:
        """Kill it unless it leaves by itself in so many seconds; say how it ended if it did."""
        self.line.close()
        code = self.process.poll()
        if code is None:
            try:
                code = self.process.wait(leaves_within)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):  # with what the verifier has started
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        if code is None:
            return "it was killed"
        return f"it was ended by signal {-code}" if code < 0 else f"it left with exit code {code}"


class VerifierPool:
    """Judges answers with a verifier, in this process or in ``workers`` others.

    Where the verifier has ``settle(text, expected) -> bool | None``, that is asked first, here: what it can say at
    once needs no worker. An answer that occurs twice is judged once, and one on which the verifier failed is not
    tried again. Workers start when they are first needed and go with the pool, the interpreter, or their parent.

    Args:
        verifier: callable (text, expected) -> bool or a mark from 0 to 1; with workers, it must pickle.
        workers: processes on this machine, shared out to the ranks of a run there, one for each at least; 0 judges
            here, where a verifier can neither be timed out nor survived.
        timeout: seconds for one answer.
        memory_gb: address space of a worker; None is without limit.
    """

    def __init__(self, verifier: Any, workers: int = 0, timeout: float = 5.0, memory_gb: float | None = 4.0) -> None:
        if workers < 0 or timeout <= 0 or (memory_gb is not None and memory_gb <= 0):
            raise ValueError(
                f"reward needs workers >= 0, timeout > 0 and memory_gb > 0 or null, not {workers}, {timeout} and "
                f"{memory_gb}"
            )
        self._asked_for, own = workers, -(-workers // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.verifier, self.workers, self.timeout, self.memory_gb = verifier, own, timeout, memory_gb
        self._known: dict[bytes, Verdict] = {}
        self._pool: list[Worker] = []
        self._lock = threading.Lock()
        self._has_started = False
        weakref.finalize(self, _end_all, self._pool, os.getpid())

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process has workers of its own."""
        return type(self), (self.verifier, self._asked_for, self.timeout, self.memory_gb)

    def judge(self, cases: Sequence[Case]) -> list[Verdict]:
        """A verdict on each case, in order.

        Raises:
            ValueError: when no worker can be started with this verifier, with the reason.
        """
        with self._lock:
            verdicts = {case: self._at_once(case) for case in dict.fromkeys(cases)}
            open_cases = [case for case, verdict in verdicts.items() if verdict is None]
            for case, verdict in self._ask(open_cases):
                verdicts[case] = verdict
            judged = {case: verdict for case, verdict in verdicts.items() if verdict is not None}
            return [judged[case] for case in cases]

    def close(self) -> None:
        """End the workers, when what they are asked now is answered; the next answers start others."""
        with self._lock:
            _end_all(self._pool, os.getpid())

    def _at_once(self, case: Case) -> Verdict | None:
        if self._known and (known := self._known.get(_digest(case))):
            return known
        if self.workers == 0:
            return _guarded(lambda: run_verifier(self.verifier, case))
        return _guarded(lambda: _settle(self.verifier, case))

    def _ask(self, cases: Iterable[Case]) -> Iterable[tuple[Case, Verdict]]:
        """Verdicts of the workers, as they come."""
        queue = deque(cases)
        failed_starts = 0
        try:
            while queue or any(worker.case for worker in self._pool):
                may_start = failed_starts < ATTEMPTS
                if not may_start and not any(worker.ready for worker in self._pool):
                    # Workers have started before: else `_start_failed` raised.
                    yield from ((case, failed("crash", "no worker starts any more")) for case in queue)
                    queue.clear()
                failed_starts += self._hand_out(queue, may_start)
                for worker in self._due():
                    case, verdict = worker.case, self._hear(worker)
                    if case is None:
                        failed_starts = 0 if worker.ready else failed_starts + 1
                    elif verdict is not None:
                        if verdict.failure is not None:
                            self._known[_digest(case)] = verdict
                        yield case, verdict
        finally:
            # Left in the middle (Ctrl-C): what these work on nobody will ask for.
            for worker in [worker for worker in self._pool if worker.case]:
                self._drop(worker)

    def _hand_out(self, queue: deque[Case], may_start: bool) -> int:
        """Give cases to idle workers, and start others where there are too few; how often that has failed (0 or 1)."""
        for worker in [worker for worker in self._pool if worker.ready and worker.case is None]:
            if not queue:
                return 0
            if worker.ask(queue[0], self.timeout):
                queue.popleft()
            else:  # it died while it waited: no fault of the case
                self._drop(worker)
        starting = sum(not worker.ready for worker in self._pool)
        for _ in range(min(self.workers - len(self._pool), len(queue) - starting) if may_start else 0):
            terms = self._terms()
            try:
                self._pool.append(Worker(terms))
            except OSError as error:  # no memory, or no more processes or files
                self._start_failed(describe(error))
                return 1
        return 0

    def _due(self) -> list[Worker]:
        """Workers that have something to say, are dead, or are past their deadline."""
        waiting = [worker for worker in self._pool if worker.case or not worker.ready]
        soonest = min((worker.deadline for worker in waiting), default=0.0)
        patience = min(LOOK_S, max(0.0, soonest - time.monotonic()))
        heard = wait([worker.line for worker in waiting], patience)
        now = time.monotonic()
        return [
            worker
            for worker in waiting
            if worker.line in heard or now >= worker.deadline or worker.process.poll() is not None
        ]

    def _hear(self, worker: Worker) -> Verdict | None:
        """The verdict on the worker's case; None where it has had none."""
        said = worker.hear() if worker.line.poll() else None
        if said is None:
            return self._lost(worker)
        kind, value = said
        if kind == "failed":
            self._drop(worker)
            self._start_failed(value)
            return None
        worker.ready, worker.case = True, None
        self._has_started = True
        if kind == "ready":
            return None
        return Verdict(value) if kind == "mark" else failed(kind, value)

    def _lost(self, worker: Worker) -> Verdict | None:
        """A worker that is dead or past its deadline is ended, and replaced when there is more to do."""
        late = worker.process.poll() is None and time.monotonic() >= worker.deadline
        asked = worker.case is not None
        how = self._drop(worker, 0.05 if late else 2.0)  # its line breaks just before it is gone
        if not asked:
            self._start_failed(f"it said nothing for {START_S:.0f} s" if late else how)
            return None
        return failed("timeout", f"longer than {self.timeout:g} s") if late else failed("crash", how)

    def _start_failed(self, how: str) -> None:
        if not self._has_started:
            raise ValueError(
                f"reward.verifier {self.verifier!r} cannot be started in a worker process: {how}; it must be "
                "importable there (not defined in the main file), or set reward.workers=0"
            )
        log.warning("a verifier's worker did not start: %s", how)

    def _drop(self, worker: Worker, leaves_within: float = 0.05) -> str:
        # In this order: an interpreter that ends in between still finds the worker, and ends it.
        how = worker.end(leaves_within)
        with contextlib.suppress(ValueError):  # which has been so
            self._pool.remove(worker)
        return how

    def _terms(self) -> Terms:
        try:
            verifier = pickle.dumps(self.verifier)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"reward.verifier {self.verifier!r} cannot be sent to a worker process ({error}): define it at the top "
                "of a module, or set reward.workers=0"
            ) from error
        return Terms(verifier, os.getpid(), self.timeout, self.memory_gb)


def _guarded(judge: Callable[[], float | bool | None]) -> Verdict | None:
    try:
        mark = judge()
    except Exception as error:
        return failed(reason_of(error), describe(error))
    return None if mark is None else Verdict(float(mark))


def _settle(verifier: Any, case: Case) -> bool | None:
    settle = getattr(verifier_of(verifier, case.task), "settle", None)
    return None if settle is None else settle(case.text, case.expected)


def _digest(case: Case) -> bytes:
    return blake2b(repr(tuple(case)).encode(errors="surrogatepass"), digest_size=16).digest()


def _end_all(pool: list[Worker], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the parent has no workers
    while pool:
        pool.pop().end()
