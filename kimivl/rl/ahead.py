"""Rollouts beside training: the responses of the next iterations are drawn while this one trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread

from kimivl.rl.collect import Collected
from kimivl.runtime import ranks


class RolloutsAhead:
    """Collects up to ``max_behind`` iterations ahead, one after the other, in a thread of its own.

    The engine answers by the weights of its last sync, and a sync needs it idle. So experience of iteration i was
    drawn by the policy of an iteration from ``i - max_behind`` to i. Example, ``max_behind=1``::

        iteration       0              1                   2
        trainer         collect 0 (0)  train 0 | sync 1    train 1 | sync 2
        engine                         collect 1 (0)       collect 2 (1)

    Ranks agree in it through a group of its own, beside the collectives of training.

    Args:
        collect: (iteration, iteration whose policy the engine has) -> what was collected.
        last: the run's last iteration.
    """

    def __init__(self, collect: Callable[[int, int], Collected], max_behind: int, last: int) -> None:
        self._collect, self.max_behind, self._last = collect, max_behind, last
        self._jobs: dict[int, Future[Collected]] = {}
        self._queue: SimpleQueue[tuple[int, int, Future[Collected]] | None] = SimpleQueue()
        self._group = ranks.group_apart()
        # A daemon: a run that is stopped does not wait for responses that nobody will train on.
        self._thread = Thread(target=self._work, name="rollouts", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with ranks.within(self._group):
            while (asked := self._queue.get()) is not None:
                self._do(*asked)

    def _do(self, iteration: int, version: int, job: Future[Collected]) -> None:
        if job.set_running_or_notify_cancel():
            try:
                job.set_result(self._collect(iteration, version))
            except BaseException as error:  # noqa: BLE001  raised where it is taken
                job.set_exception(error)

    @property
    def idle(self) -> bool:
        """Whether the engine has nothing to do: only then may it be synced, or asked by others."""
        return all(job.done() for job in self._jobs.values())

    @property
    def in_flight(self) -> int:
        """Iterations that are collected, or being collected, and not yet taken."""
        return len(self._jobs)

    def take(self, iteration: int) -> Collected | None:
        """What was collected for ``iteration``, waited for; None when that was never begun."""
        job = self._jobs.pop(iteration, None)
        return None if job is None else job.result()

    def go_on(self, iteration: int) -> None:
        """Begin what may be begun while ``iteration`` trains, with its policy, which the engine has just been given."""
        for ahead in range(iteration + 1, min(iteration + self.max_behind, self._last) + 1):
            if ahead not in self._jobs:
                self._jobs[ahead] = Future()
                self._queue.put((ahead, iteration, self._jobs[ahead]))

    def settle(self) -> None:
        """Wait until the engine has nothing to do. A failure is raised by `take`."""
        for job in list(self._jobs.values()):
            job.exception()

    def close(self) -> None:
        """Begin no other collection, and wait for the one under way, which is nobody's: the engine is idle then."""
        for job in self._jobs.values():
            job.cancel()
        self._queue.put(None)
        self._thread.join()
        self._jobs = {}
