"""Ranks that wait for each other hear signals, and say who is missing."""

import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from fork_server import SERVER

from kimivl.runtime import launch, meeting
from kimivl.runtime.interruption import listening
from kimivl.runtime.launch import find_place, joined

WITHIN = 1.5


def _rank(folder: Path, rank: int, port: int, environment: dict[str, str], lack: str | None) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"} | environment)
    meeting.WITHIN, meeting._HEARD = WITHIN if "patient" not in environment else 600.0, 0.5
    launch._lack_of_gpus = lambda accelerator, place: lack
    said = "met"
    try:
        with listening(folder):
            (folder / f"begun-{rank}").touch()
            with joined(find_place(), "cpu", timedelta(seconds=60)):
                dist.barrier()  # gloo connects the ranks by then: one that left before would break that off
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"said-{rank}").write_text(said)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(folder: Path, port: int, *ranks: int, lack: dict[int, str] | None = None, **environment: str) -> list:
    started = [
        SERVER.Process(target=_rank, args=(folder, rank, port, environment, (lack or {}).get(rank)), daemon=True)
        for rank in ranks
    ]
    for process in started:
        process.start()
    return started


def said(folder: Path, started: list) -> list[str]:
    for process in started:
        process.join(40)
        assert not process.is_alive()
    return [path.read_text() for path in sorted(folder.glob("said-*"))]


def test_ranks_that_come_one_after_the_other_meet(tmp_path, port):
    started = start(tmp_path, port, 1, patient="")
    time.sleep(WITHIN / 2)
    started += start(tmp_path, port, 0, 2, patient="")
    assert said(tmp_path, started) == ["met"] * 3


def test_a_rank_that_does_not_come_is_named_once(tmp_path, port):
    first, other = said(tmp_path, start(tmp_path, port, 0, 2))
    assert first.startswith("ValueError: of 3 ranks 1 did not come within ") and "look at their logs" in first
    assert other == "SystemExit: 0"


def test_the_rank_that_keeps_the_store_may_be_the_one(tmp_path, port):
    sentences = said(tmp_path, start(tmp_path, port, 1, 2))
    assert len(sentences) == 2
    for sentence in sentences:
        assert sentence.startswith(f"ValueError: rank 0 is not to be reached at 127.0.0.1:{port} (")


def test_what_one_rank_lacks_ends_all_at_once(tmp_path, port):
    since = time.monotonic()
    found = said(tmp_path, start(tmp_path, port, 0, 1, 2, lack={1: "rank 1 has no GPU"}, patient=""))
    assert found == ["ValueError: rank 1 has no GPU", "SystemExit: 0", "SystemExit: 0"]
    assert time.monotonic() - since < 20


@pytest.mark.parametrize("ranks", [(1, 2), (0, 1)], ids=["for the store", "for another rank"])
def test_ranks_that_wait_hear_signals(tmp_path, port, ranks):
    started = start(tmp_path, port, *ranks, patient="")
    while len(list(tmp_path.glob("begun-*"))) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    for process in started:
        os.kill(process.pid, signal.SIGTERM)
    found = said(tmp_path, started)
    assert len(found) == 2 and all(text.startswith("Interrupted: before the first step") for text in found), found


def test_a_first_rank_that_dies_is_missed_at_once(tmp_path, port):
    started = start(tmp_path, port, 0, 1, patient="")
    while len(list(tmp_path.glob("begun-*"))) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(started[0].pid, signal.SIGKILL)
    assert said(tmp_path, started)[0].startswith("ValueError: rank 0 has left before all ranks had come")


def test_a_port_that_another_program_has_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        taken = other.getsockname()[1]
        sentence = said(tmp_path, start(tmp_path, taken, 0))[0]
    assert sentence.startswith(f"ValueError: rank 0 cannot wait for the others at 127.0.0.1:{taken} (")
    assert sentence.endswith("give all ranks another one with MASTER_PORT=NUMBER in their environment")


def test_what_was_said_before_torchrun_started_the_ranks_again_counts_no_more(tmp_path, port, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = meeting._keep()
    store.set("met", "of 3 ranks 1 did not come")
    assert meeting.connected().check(["met"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not meeting.connected().check(["met"])
