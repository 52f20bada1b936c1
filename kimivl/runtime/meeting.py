"""Where the ranks of a run find each other, before they form a process group.

torch by itself waits for them inside of C++, for as long as a collective may take: it hears no signal meanwhile, and
does not say who is missing. So the ranks meet here first, in the store that the group is then made with.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from kimivl.runtime.ranks import PeerFailed

WITHIN = 600.0
"""Seconds in which all ranks have to come: the nodes of a cluster start at different times."""
_POLL = 0.1
_HEARD = 2.0
"""Seconds in which what one rank says or is told by its launcher comes to the others, too."""
_AGAIN = "the same command starts again"


def meet(rank: int, world: int, wrong: str | None = None) -> dist.Store:
    """The store of the run, when all its ranks have come. Rank 0 decides for all whether they have.

    Args:
        wrong: why this rank cannot take part; the run ends with it on all ranks.

    Raises:
        ValueError: with what is wrong, or who has not come.
        PeerFailed: the same, where rank 0 says it.
    """
    deadline = time.monotonic() + WITHIN
    try:
        store = _keep() if rank == 0 and not _kept_by_torchrun() else _reach(deadline)
        store.set(f"wrong/{rank}" if wrong else f"came/{rank}", wrong or "")
        try:
            if rank == 0:
                store.set("met", _decide(store, world, deadline))
            while not store.check(["met"]):
                if time.monotonic() > deadline + WITHIN:
                    raise ValueError(f"rank 0 has not come within {2 * WITHIN / 60:.0f} min: look at its log; {_AGAIN}")
                time.sleep(_POLL)
        except BaseException:  # a signal: the others must not go on without this rank
            with suppress(dist.DistError):
                store.delete_key(f"came/{rank}")
            raise
        decided = store.get("met").decode()
    except dist.DistError:
        time.sleep(_HEARD)  # if it was a signal, it comes to this rank, too
        raise ValueError(f"rank 0 has left before all ranks had come: look at its log; {_AGAIN}") from None
    if not decided:
        return store
    if rank == 0:
        time.sleep(_HEARD)  # the store goes with this process
        raise ValueError(decided)
    raise PeerFailed(decided)


def connected() -> dist.Store:
    """A connection of its own to the store of the run."""
    store = dist.TCPStore(*_address(), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))
    return _of_this_start(store)


def _decide(store: dist.Store, world: int, deadline: float) -> str:
    """What keeps the ranks from meeting; empty when all have come."""
    came = [f"came/{rank}" for rank in range(world)]
    while not store.check(came):
        missing = [rank for rank in range(world) if not store.check([came[rank]])]
        for rank in missing:
            if store.check([f"wrong/{rank}"]):
                return store.get(f"wrong/{rank}").decode()
        if time.monotonic() > deadline:
            who = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            return f"of {world} ranks {who} did not come within {WITHIN / 60:.0f} min: look at their logs; {_AGAIN}"
        time.sleep(_POLL)
    return ""


def _keep() -> dist.Store:
    """The store, in this process: at the socket that ``spawn`` holds for it, or where torch's variables say."""
    host, port = _address()
    held: dict[str, Any] = {"master_listen_fd": int(os.environ["KIMIVL_STORE"])} if "KIMIVL_STORE" in os.environ else {}
    try:
        return _of_this_start(dist.TCPStore(host, port, is_master=True, wait_for_workers=False, **held))
    except dist.DistError as error:
        raise ValueError(
            f"rank 0 cannot wait for the others at {host}:{port} ({str(error).partition('. ')[0]}): mostly another "
            "program has this port; give all ranks another one with MASTER_PORT=NUMBER in their environment"
        ) from None


def _reach(deadline: float) -> dist.Store:
    """The store of another process, when it is there."""
    host, port = _address()
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return connected()
        except OSError as error:
            # A socket that `spawn` has made is there from the beginning.
            if time.monotonic() > deadline or "KIMIVL_STORE" in os.environ:
                raise ValueError(
                    f"rank 0 is not to be reached at {host}:{port} ({error}): look at its log, and whether this "
                    f"machine finds it under that name; {_AGAIN}"
                ) from None
        time.sleep(_POLL)


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _kept_by_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _of_this_start(store: dist.Store) -> dist.Store:
    """torchrun keeps one store, and what was said in it, for all its restarts of a run."""
    return dist.PrefixStore(f"kimivl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
