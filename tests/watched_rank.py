"""One rank of a run that does nothing but wait for the others, under a watch whose clock is fast.

Rank 1 does ``what``: ``kill``, ``raise``, ``hang``, ``quiet`` (something long that may be), ``freeze`` (as a machine
without its network: it does not answer, nor do connections end), ``leave`` on a signal of its own; or all ``stop``,
when asked to. ``first-kill`` and the like: rank 0 does it. The others wait for it in a collective, or (``-deaf``) in
something that never says that a rank is gone, as NCCL does.
"""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kimivl.config import Interrupted
from kimivl.runtime import heartbeats, watch


def main(folder: str, rank: int, ranks: int, port: int, what: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}-{rank}", os.O_WRONLY | os.O_CREAT), number)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    watch.BEAT, watch.GRACE, heartbeats.GONE_AFTER, heartbeats.LOST_AFTER = 0.5, 3.0, 1.5, 6.0
    heartbeats.STOPPED_AFTER = 6.0
    if "freeze" in what:
        heartbeats.FROZEN_AFTER = 6.0
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    with watch.Watch(Path(folder)) as watched:
        watched.on_end = lambda text: print("END", text, flush=True)
        for step in range(3):
            watched.mark(30.0, f"step {step}")
            dist.all_reduce(torch.ones(1))
            time.sleep(0.3)
        doer = 0 if what.startswith("first-") else 1
        deaf = what.endswith("-deaf")
        act(watched, what.removeprefix("first-").removesuffix("-deaf"), rank == doer, deaf)
    dist.destroy_process_group()
    print("done", flush=True)


def act(watched: watch.Watch, what: str, mine: bool, deaf: bool) -> None:
    watched.mark(5.0 if what in ("hang", "quiet") else 60.0, "the last step", "step_minutes")
    if what == "stop" or (what == "leave" and mine):
        raise Interrupted("saved after step 3")
    if mine:
        if what in ("kill", "freeze"):
            said = watched._state.beat + 2  # with the second, the first is in the store
            while watched._state.beat < said:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        if what == "raise":
            raise RuntimeError("the camera is broken")
        if what == "hang":
            time.sleep(100)
        if what == "quiet":
            watched.mark(None, "indexing")
            time.sleep(8)
            watched.mark(30.0)
    if deaf and not mine:
        time.sleep(100)
    dist.all_reduce(torch.ones(1))
