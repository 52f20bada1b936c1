"""No rank waits for one that is dead, failed or stuck; none is ended that only takes its time."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import watched_rank
from fork_server import SERVER

from kimivl.runtime.heartbeats import FROZEN_AFTER, GONE_AFTER, LOST_AFTER, STOPPED_AFTER, Peer, State


@dataclass
class Ended:
    code: int | None
    out: str
    err: str


def start(folder: Path, what: str, ranks: int = 3) -> list[Any]:
    """Ranks that nobody looks after: no agent ends the others when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(str(folder), rank, ranks, port, what) for rank in range(ranks)]
    processes = [SERVER.Process(target=watched_rank.main, args=one, daemon=True) for one in arguments]
    for process in processes:
        process.start()
    return processes


def ended(folder: Path, processes: list[Any]) -> list[Ended]:
    for process in processes:
        process.join(300)
    texts = [[(folder / f"{name}-{rank}").read_text() for name in ("out", "err")] for rank in range(len(processes))]
    return [Ended(process.exitcode, *said) for process, said in zip(processes, texts, strict=True)]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("raise", "rank 1: the camera is broken"),
        ("raise-deaf", "rank 1: the camera is broken"),
        ("kill", "is gone without a word (last heard of the last step)"),
        ("kill-deaf", "is gone without a word (last heard of the last step)"),
        ("leave-deaf", "rank 1 has stopped: saved after step 3"),
    ],
)
def test_the_others_end_with_the_error_of_the_rank_that_began_it(tmp_path, what, sentence):
    first, second, third = ended(tmp_path, start(tmp_path, what))
    assert first.code and second.code and third.code
    assert second.code == -signal.SIGKILL if what.startswith("kill") else sentence.partition(": ")[2] in second.err
    assert sentence in first.err and "rank 1" in first.err
    if what.endswith("-deaf"):  # ended from outside, which rank 0 says and writes down, once
        assert sentence in first.out and "Traceback" not in first.err and sentence not in third.err


@pytest.mark.parametrize("what", ["first-kill", "first-kill-deaf", "first-raise", "first-raise-deaf"])
def test_the_rank_that_keeps_the_store_may_be_the_one(tmp_path, what):
    first, second, third = ended(tmp_path, start(tmp_path, what))
    assert first.code and second.code and third.code
    assert "rank 0" in second.err and ("the camera is broken" in second.err) == ("raise" in what)


@pytest.mark.parametrize("what", ["first-freeze", "first-freeze-deaf"])
def test_a_store_that_does_not_answer_keeps_nobody(tmp_path, what):
    first, *others = start(tmp_path, what)
    try:
        for process in others:
            process.join(300)
        assert [process.exitcode for process in others] == [1, 1]
    finally:
        first.kill()
    assert "error: rank 0 (pid " in (tmp_path / "err-1").read_text()


def test_a_run_that_hangs_ends_with_the_stacks_of_all_ranks(tmp_path):
    found = ended(tmp_path, start(tmp_path, "hang"))
    assert [one.code for one in found] == [1, 1, 1]
    assert found[0].err.startswith("\nerror: nothing got on for") and found[0].out.startswith("END nothing got on")
    assert "longer than callbacks.watchdog.step_minutes allows: rank 0" in found[0].err
    assert "rank 1: in watched_rank.py" in found[0].err and "act (the last step)" in found[0].err
    for rank in range(3):
        stack = (tmp_path / f"stacks/rank-{rank}.txt").read_text()
        assert "the last step" in stack and "watched_rank.py" in stack and " in act" in stack
    assert "all_reduce" in (tmp_path / "stacks/rank-2.txt").read_text()


def test_what_may_take_long_is_waited_for(tmp_path):
    assert [(one.code, one.out) for one in ended(tmp_path, start(tmp_path, "quiet"))] == [(0, "done\n")] * 3


def test_ranks_that_stop_together_say_what_they_have_to_say(tmp_path):
    for one in ended(tmp_path, start(tmp_path, "stop")):
        assert one.code == 1 and "Interrupted: saved after step 3" in one.err and "PeerFailed" not in one.err


def test_ranks_that_one_leaves_on_a_signal_were_stopped_too(tmp_path):
    first, second, third = ended(tmp_path, start(tmp_path, "leave"))
    assert "Interrupted: saved after step 3" in second.err
    for other in (first, third):
        assert "Interrupted: with the other ranks; the same command goes on" in other.err


def test_a_run_that_is_suspended_and_goes_on_is_not_ended(tmp_path):
    processes = start(tmp_path, "quiet", ranks=2)
    time.sleep(2)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            os.kill(process.pid, number)
        time.sleep(6 if number == signal.SIGSTOP else 0)
    assert [one.code for one in ended(tmp_path, processes)] == [0, 0]


def test_who_counts_as_gone():
    here = socket.gethostname()

    def peer(**state) -> Peer:
        one = Peer(1, 0.0)
        one.update(State(**{"beat": 1, "host": here, "pid": os.getpid()} | state), 0.0)
        return one

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert not peer(pid=dead.pid).gone(GONE_AFTER - 0.1) and peer(pid=dead.pid).gone(GONE_AFTER + 0.1)
    assert not peer().gone(FROZEN_AFTER - 1) and peer().gone(FROZEN_AFTER + 1)  # the process is there
    assert not peer(host="n7").gone(LOST_AFTER - 1) and peer(host="n7").gone(LOST_AFTER + 1)
    assert not peer(ended="done", host="n7").gone(1e6)
    assert not Peer(1, 0.0).gone(1e6)  # it may be importing
    stopped = peer(ended="saved after step 3", stopped=True)
    assert not stopped.failed(STOPPED_AFTER - 1) and stopped.failed(STOPPED_AFTER + 1)
    stopped.forgive(100.0)
    assert not stopped.failed(100.0 + STOPPED_AFTER - 1) and stopped.failed(100.0 + STOPPED_AFTER + 1)
