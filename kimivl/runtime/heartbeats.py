"""What the ranks of a run know of each other while they work: a state of each, in the store of the process group."""

from __future__ import annotations

import json
import math
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from kimivl.runtime.meeting import connected

GONE_AFTER = 9.0
"""Seconds without a beat after which a rank of this machine is gone, if its process is."""
LOST_AFTER = 40.0
"""Seconds without a beat after which a rank of another machine is gone."""
FROZEN_AFTER = 1800.0
"""Seconds without a beat after which a process that is there, but lets no thread run, counts as gone too."""
STOPPED_AFTER = 60.0
"""Seconds after which one that was stopped counts as failed: the others should have stopped with it."""


@dataclass
class State:
    """What a rank says of itself: ``limit`` seconds may pass between two signs of progress (None: any time)."""

    beat: int = 0
    host: str = ""
    pid: int = 0
    progress: int = 0
    limit: float | None = None
    key: str = ""
    """What sets that limit, under ``callbacks.watchdog``."""
    doing: str = "starting"
    ended: str | None = None
    """None while it runs, "done", or the sentence of what ended it."""
    stopped: bool = False
    """It was asked to end, by a signal; all ranks then do so together, each by itself."""
    where: str | None = None
    """Where its main thread stands, once the run hangs."""

    def alive_here(self) -> bool:
        """Whether it is a process of this machine that can be seen to exist."""
        if self.host != socket.gethostname():
            return False
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False


@dataclass
class Verdict:
    """Why the run ends: ``rank`` failed, is gone, or (None) nothing gets on."""

    rank: int | None
    text: str


class Peer:
    """Another rank as it is seen from here."""

    def __init__(self, rank: int, now: float) -> None:
        self.rank, self.state = rank, State()
        self.seen = now
        self.stopped = math.inf  # when that was first seen

    def forgive(self, now: float) -> None:
        """Count anew: this process could not look."""
        self.seen, self.stopped = now, max(self.stopped, now)

    def update(self, state: State, now: float) -> bool:
        """Take in what it says; whether it has got on since."""
        got_on = (state.progress, state.limit) != (self.state.progress, self.state.limit)
        if state.beat != self.state.beat:
            self.seen = now
        if state.stopped:
            self.stopped = min(self.stopped, now)
        self.state = state
        return got_on

    def failed(self, now: float) -> bool:
        if self.state.stopped:
            return now - self.stopped > STOPPED_AFTER
        return self.state.ended not in (None, "done")

    def gone(self, now: float) -> bool:
        """Whether it stopped without a word. One that never spoke is waited for: it may be starting."""
        silent = now - self.seen
        if self.state.beat == 0 or self.state.ended is not None or silent < GONE_AFTER:
            return False
        if self.state.alive_here():
            return silent > FROZEN_AFTER
        return silent > LOST_AFTER or self.state.host == socket.gethostname()


class Board:
    """The states of all ranks and the verdict, in the store of the process group; over a connection of its own, since
    a rank that waits in the store keeps the group's."""

    def __init__(self, rank: int) -> None:
        self._store = connected()
        self._rank = rank
        self._known: set[str] = set()

    def post(self, state: State) -> None:
        self._store.set(f"watch/{self._rank}", json.dumps(asdict(state)))

    def read(self, wanted: list[int]) -> dict[int, State]:
        """The states of those ranks that have left one."""
        found = self._found([f"watch/{rank}" for rank in wanted])
        return {int(key.rpartition("/")[2]): State(**json.loads(value)) for key, value in found.items()}

    def post_verdict(self, verdict: Verdict) -> None:
        self._store.set("watch/verdict", json.dumps(asdict(verdict)))

    def verdict(self) -> Verdict | None:
        found = self._found(["watch/verdict"])
        return Verdict(**json.loads(*found.values())) if found else None

    def _found(self, keys: list[str]) -> dict[str, str]:
        self._known |= {key for key in keys if key not in self._known and self._store.check([key])}
        there = [key for key in keys if key in self._known]
        return (
            dict(zip(there, (value.decode() for value in self._store.multi_get(there)), strict=True)) if there else {}
        )


def verdict_on(peer: Peer) -> Verdict:
    """That of a rank which failed or is gone."""
    state = peer.state
    if state.ended is not None:
        return Verdict(peer.rank, f"rank {peer.rank}{' has stopped' * state.stopped}: {state.ended}")
    silent = "" if state.host == socket.gethostname() else ", or its machine does not answer"
    return Verdict(
        peer.rank,
        f"rank {peer.rank} (pid {state.pid} on {state.host}) is gone without a word (last heard of {state.doing}): "
        f"killed from outside, or by the system for want of host memory (dmesg says it){silent}; the same command goes "
        "on from the last checkpoint",
    )
