"""Ranks that draw responses each for itself, for a second or for an hour, and then go on together."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kimivl.rl.partial import OpenGroup
from kimivl.runtime import ranks

T = TypeVar("T")

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often a rank at work looks whether another has left."""
SILENT_S = 600.0
"""Seconds without a sign of life after which a rank is no longer waited for. An engine at work gives one each second;
what takes longer is the start of one, or a batch of long prompts."""


class _OtherLeft(BaseException):
    """Another rank has failed, or was told to stop: it says so itself when all meet."""


def _nothing() -> None:
    pass


@dataclass(slots=True)
class Exchange:
    """Stretches of work that end for all ranks together, whatever happens on one of them.

    A rank that is done waits in Python, where a signal is heard and no collective runs out of time; one that fails or
    is told to stop leaves word, and the others leave their work within a second. All ranks must make it, and `run` it,
    in the same order.

    Attributes:
        on_start, on_end: called around the work and the waiting: in between, the rank may be interrupted.
    """

    on_start: Callable[[], None] = _nothing
    on_end: Callable[[], None] = _nothing
    _name: str = field(default_factory=lambda: ranks.share(lambda: uuid.uuid4().hex[:8]))
    _round: int = 0
    _looked: float = 0.0

    def run(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` gives on every rank, in their order.

        Raises:
            BaseException: the rank's own; or what `ranks.attempt` raises where another has one.
        """
        self._round += 1
        return ranks.attempt(lambda: self._own(work))

    def _own(self, work: Callable[[], T]) -> T:
        try:
            self.on_start()
            done = work()
            self._wait()
            self.on_end()
        except _OtherLeft:
            return None  # type: ignore[return-value]  # nobody sees it: `attempt` raises
        except BaseException as error:
            ranks.post(self._key("left"), str(self._round))
            if isinstance(error, ValueError) or not isinstance(error, Exception) or ranks.world_size() == 1:
                raise
            # The other ranks get a ValueError, after which a run saves itself: this one must not leave them alone.
            log.exception("rank %d failed while responses were drawn", ranks.rank())
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return done

    def poll(self) -> None:
        """To be called often during the work: ends it when another rank has left."""
        if ranks.world_size() > 1 and time.monotonic() > self._looked + LOOK_S:
            self._looked = time.monotonic()
            ranks.post(self._key(f"alive/{ranks.rank()}"), f"{self._round} {self._looked}")
            if ranks.posted(self._key("left")) == str(self._round):
                raise _OtherLeft

    def _wait(self) -> None:
        """Until all others are done, too."""
        ranks.post(self._key(f"done/{ranks.rank()}"), str(self._round))
        for other in set(range(ranks.world_size())) - {ranks.rank()}:
            pause, said, since = 0.005, None, time.monotonic()
            while ranks.posted(self._key(f"done/{other}")) != str(self._round):
                self.poll()
                time.sleep(pause)
                pause = min(1.5 * pause, LOOK_S)
                said, before = ranks.posted(self._key(f"alive/{other}")), said
                since = since if said == before else time.monotonic()
                if time.monotonic() > since + SILENT_S:
                    raise ValueError(
                        f"rank {other} has given no sign of life for {SILENT_S:.0f} s while responses were drawn: look "
                        "at its log; the same command goes on"
                    )

    def _key(self, name: str) -> str:
        return f"rollouts/{self._name}/{name}"


def shares(groups: Sequence[OpenGroup], difficulty: Sequence[float], world: int) -> list[list[int]]:
    """The groups (their places) that each of ``world`` ranks answers, about equally much work for each.

    How long responses will be nobody knows, but harder problems have longer ones, and a group that waits was long
    already: in the order of open responses and of difficulty, each group goes to the rank with the fewest responses. A
    group stays whole: its prompt is read once, and its length reward compares all its responses. Nothing is dealt out
    while ranks are at work: what a response is then could depend on the time of day, by the rounding of its batch.

    Args:
        difficulty: of each group's problem.
    """
    order = sorted(range(len(groups)), key=lambda place: (-groups[place].unfinished, -difficulty[place], place))
    dealt: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for place in order:
        rank = load.index(min(load))
        dealt[rank].append(place)
        load[rank] += groups[place].unfinished
    return [sorted(own) for own in dealt]
