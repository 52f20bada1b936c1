"""Ends a run that cannot go on: a rank that died or failed while the others wait for it, and a step that hangs.

A rank waits for the others in collectives, inside of libraries that neither return nor say why. A thread in each
process looks in its place. Every rank leaves its state in the store that the process group was made with (a few
hundred bytes, every ``BEAT`` seconds); rank 0 reads them all and leaves its verdict, the others read rank 0's. So a run
of N ranks costs N small messages a beat, and the ranks agree on what happened.

- A rank fails: the others end with its sentence. Where the collective raises by itself (gloo), the sentence takes the
  place of "connection reset by peer"; where it does not (NCCL), the process is ended.
- A rank is gone without a word (kill -9, out of host memory, a lost node): its beats stop. When that is rank 0, the
  store may not answer either, and who asks it waits for ever: a second thread looks when rank 0 was last heard of.
- Nothing gets on: no rank made a sign of progress for longer than what it does may take (``mark``). The stacks of all
  threads of all ranks are written to ``<folder>/stacks/rank-N.txt``, and the run ends.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from kimivl.config import Interrupted
from kimivl.runtime import ranks
from kimivl.runtime.heartbeats import LOST_AFTER, Board, Peer, State, Verdict, verdict_on

log = logging.getLogger(__name__)

BEAT = 3.0
"""Seconds between two looks."""
GRACE = 12.0
"""Seconds that this process has to end by itself, and say why in its own way, once another has failed."""
STACKS = Path("stacks")


class Watch:
    """Looks after one run from its beginning to its end; one per process, as a context manager.

    Args:
        folder: of the run, for the stacks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.on_end: Callable[[str], None] = lambda text: None
        """Called with the sentence on rank 0 before its process is ended from outside."""
        self._rank, self._world = ranks.rank(), ranks.world_size()
        self._state = State(host=socket.gethostname(), pid=os.getpid())
        self._board: Board | None = None
        self._peers: dict[int, Peer] = {}
        self._verdict: Verdict | None = None
        self._got_on = time.monotonic()
        self._left, self._judged, self._closed = threading.Event(), threading.Event(), threading.Event()
        looks = (self._look, self._look_at_first) if self._world > 1 and self._rank else (self._look,)
        self._threads = [threading.Thread(target=look, name="watch", daemon=True) for look in looks]

    # What the run says.

    def mark(self, limit: float | None, doing: str | None = None, key: str | None = None) -> None:
        """A sign of progress. The next one comes within ``limit`` seconds, or the run hangs; None: whenever.

        Args:
            doing: what the rank does from here on, for the sentence of a failure.
            key: what sets the limit, under ``callbacks.watchdog``.
        """
        self._state.limit = limit
        self._state.doing = doing or self._state.doing
        self._state.key = key or self._state.key
        self._state.progress += 1

    @property
    def doing(self) -> str:
        return self._state.doing

    def leave(self, error: BaseException | None) -> BaseException | None:
        """Say how this rank ends: its process is not ended from outside any more. Returns the error to raise: that of
        the rank that began it, where ``error`` is only what the others see of it; Interrupted, where that one left on a
        signal."""
        if self._left.is_set():
            return error
        if error is not None and self._board is not None and (is_echo(error) or is_echo(error.__cause__)):
            stopped = self._wait_for_verdict()
            if self._verdict is not None and self._verdict.rank != self._rank:
                error = ranks.PeerFailed(self._verdict.text).with_traceback(error.__traceback__)
            elif stopped:
                error = Interrupted("with the other ranks; the same command goes on")
        self._state.stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        self._state.ended = "done" if error is None else str(error) or type(error).__name__
        if self._board is not None:
            self._try(self._beat)
        self._left.set()  # not before: a store that does not answer keeps this thread
        return error

    def _wait_for_verdict(self) -> bool:
        """Until it is known which rank it was, or that one was asked to stop, and all with it: whether it was that."""
        deadline = time.monotonic() + LOST_AFTER + 4 * BEAT
        while time.monotonic() < deadline and not self._judged.wait(0.1):
            if any(peer.state.stopped for peer in self._peers.values()):
                return True
        return False

    def __enter__(self) -> Self:
        if self._world > 1:
            self._board = Board(self._rank)
            self._peers = {rank: Peer(rank, time.monotonic()) for rank in range(self._world) if rank != self._rank}
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = self.leave(error)
        if self._rank == 0 and self._board is not None:
            # The store may live in this process: the others must have read how it ended.
            deadline = time.monotonic() + (60 if error is None else 5 * BEAT)
            while time.monotonic() < deadline and any(
                peer.state.ended is None and not peer.gone(time.monotonic()) for peer in self._peers.values()
            ):
                time.sleep(0.05)
                self._try(self._read_peers)
        self._closed.set()
        for thread in self._threads:
            thread.join(2 * BEAT)
        if found is not error and found is not None:
            raise found from error

    # What the threads do.

    def _look(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(BEAT if self._state.beat else 0.0):
            now = time.monotonic()
            if now - before > 5 * BEAT:  # this process was stopped, and the others too: a suspended job
                self._forgive(now)
            before = now
            if self._board is not None and not self._try(self._beat):
                self._verdict = self._verdict or Verdict(0, "rank 0 is gone, and the store of the run with it")
            elif self._rank == 0 and self._verdict is None and not self._left.is_set():
                self._judge(now)
            if self._verdict is not None:
                self._end(self._verdict)
                return

    def _look_at_first(self) -> None:
        """Without the store."""
        before = time.monotonic()
        while not self._closed.wait(BEAT):
            now = time.monotonic()
            if now - before > 5 * BEAT:
                self._forgive(now)
            before = now
            if self._verdict is None and self._peers[0].gone(now):
                self._verdict = verdict_on(self._peers[0])
                self._end(self._verdict)

    def _try(self, act: Callable[[], None]) -> bool:
        """Talk to the store; whether it is still there."""
        try:
            act()
        except (dist.DistError, RuntimeError) as error:
            log.debug("the store does not answer: %s", error)
            return False
        return True

    def _forgive(self, now: float) -> None:
        self._got_on = now
        for peer in self._peers.values():
            peer.forgive(now)

    def _beat(self) -> None:
        assert self._board is not None
        self._state.beat += 1
        self._board.post(self._state)
        self._read_peers()
        if self._rank:
            self._verdict = self._verdict or self._board.verdict()
            if self._verdict is None and self._peers[0].failed(time.monotonic()):
                self._verdict = verdict_on(self._peers[0])
        elif self._state.ended not in (None, "done") and not self._state.stopped and self._verdict is None:
            self._board.post_verdict(Verdict(0, f"rank 0: {self._state.ended}"))

    def _read_peers(self) -> None:
        assert self._board is not None
        now = time.monotonic()
        for rank, state in self._board.read([0] if self._rank else list(self._peers)).items():
            if rank in self._peers and self._peers[rank].update(state, now):
                self._got_on = now

    def _judge(self, now: float) -> None:
        """Rank 0 decides for all."""
        if self._board is None:
            self._state.beat += 1
        if self._state.progress != getattr(self, "_counted", None):
            self._counted, self._got_on = self._state.progress, now
        failed = [peer for peer in self._peers.values() if peer.failed(now)]
        lost = failed or [peer for peer in self._peers.values() if peer.gone(now)]
        limits = [(state.limit, state.key) for state in (self._state, *(peer.state for peer in self._peers.values()))]
        known = [(limit, key) for limit, key in limits if limit is not None]
        if lost:
            self._verdict = verdict_on(lost[0])
        elif len(known) == len(limits) and (silent := now - self._got_on) > max(known)[0]:
            text = f"nothing got on for {_span(silent)}, longer than callbacks.watchdog.{max(known)[1]} allows"
            self._verdict = Verdict(None, text)
        if self._verdict is not None and self._board is not None:
            self._board.post_verdict(self._verdict)

    def _end(self, verdict: Verdict) -> None:
        """End this process, unless it ends by itself."""
        if verdict.rank is None:
            self._state.where = self._write_stacks()
            text = self._hung(verdict)
        else:
            self._judged.set()
            text = verdict.text
            if self._left.wait(GRACE):
                return
        if self._left.is_set():
            return
        if self._rank == min({*range(self._world)} - {verdict.rank}, default=0):
            print(f"\nerror: {text}", file=sys.stderr, flush=True)
            if self._rank == 0:
                self._say_end(text)
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(60)  # a checkpoint that is being written, as at any other end of a process
        os._exit(1)

    def _say_end(self, text: str) -> None:
        try:
            self.on_end(text)
        except OSError as error:  # a full disk must not keep the process
            print(f"error: {error}", file=sys.stderr, flush=True)

    def _write_stacks(self) -> str:
        path = self.folder / STACKS / f"rank-{self._rank}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(f"rank {self._rank}, {self._state.host}, pid {self._state.pid}: {self._state.doing}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return f"{_standing()} ({self._state.doing})"

    def _hung(self, verdict: Verdict) -> str:
        """Exchange where the ranks stand; the sentence."""
        places = {self._rank: self._state.where}
        if self._board is not None:
            end = time.monotonic() + 4 * BEAT
            while self._try(self._beat) and time.monotonic() < end:
                if self._rank:  # rank 0 says it, and the store may go with it
                    time.sleep(5 * BEAT)
                    break
                time.sleep(BEAT / 3)
                if all(peer.state.where for peer in self._peers.values()):
                    break
            places |= {rank: peer.state.where or "does not answer" for rank, peer in self._peers.items()}
        stands = "; ".join(f"rank {rank}: {where}" for rank, where in sorted(places.items())[:8])
        return (
            f"{verdict.text}: {stands}. The stacks of all threads are in {self.folder / STACKS}; the same command goes "
            "on from the last checkpoint"
        )


def is_echo(error: BaseException | None) -> bool:
    """Whether an error only says that another rank is not there any more."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset")
    )


def _standing() -> str:
    """The innermost line of the main thread, and the innermost of this program."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its main thread has ended"
    stack: Any = traceback.extract_stack(frame)
    own = [line for line in stack if "site-packages" not in line.filename and "/lib/python" not in line.filename]
    last = stack[-1]
    called = f" from {Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own and own[-1] != last else ""
    return f"in {Path(last.filename).name}:{last.lineno} {last.name}{called}"


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
