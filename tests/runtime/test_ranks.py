"""What ranks say to each other, on real processes."""

import signal
import time
from pathlib import Path

import pytest
from in_ranks import in_ranks

from kimivl.config import Interrupted
from kimivl.run import _one_voice
from kimivl.runtime import interruption, ranks
from kimivl.runtime.interruption import listening
from kimivl.runtime.launch import find_place


def _exchange() -> dict:
    me = ranks.rank()
    found = {"gathered": ranks.gather(me * 10), "shared": ranks.share(lambda: f"by {ranks.rank()}")}
    assert ranks.attempt(lambda: me) == [0, 1]
    with ranks.first():
        if me == 0:
            time.sleep(0.3)
            ranks.post("made", "it is there")
        assert ranks.posted("made") == "it is there"
    assert ranks.posted("nothing") is None
    return found


def _failures() -> list[str]:
    me, found = ranks.rank(), []

    def fail(where: int) -> str:
        if me == where:
            raise OSError(f"no disk on {where}")
        return "fine"

    for where in (0, 1):
        with pytest.raises((OSError, ranks.PeerFailed)) as caught:
            ranks.attempt(lambda where=where: fail(where))
        found.append(str(caught.value))
    with pytest.raises((OSError, ranks.PeerFailed)) as caught, ranks.first():
        fail(0)
    return [*found, str(caught.value)]


def _same_error() -> bool:
    ranks.PATIENCE = 60
    return ranks.said_elsewhere("the config is wrong")


def _own_error() -> bool:
    """Rank 1 fails, and rank 0 learns of it when it has said so."""
    if ranks.rank() == 0:
        time.sleep(0.5)
        while ranks.posted("said/1") is None:
            time.sleep(0.05)
        return ranks.said_elsewhere("rank 1: no disk")
    ranks.PATIENCE = 0.5
    return ranks.said_elsewhere("no disk")


def _two_errors() -> bool:
    ranks.PATIENCE = 1.0
    return ranks.said_elsewhere("no disk" if ranks.rank() else "no network")


def _all() -> list:
    return [_exchange(), _failures()]


def test_ranks_exchange_and_fail_together():
    (first, failed), (second, also) = in_ranks(_all)
    assert first == second == {"gathered": [0, 10], "shared": "by 0"}
    assert failed == ["no disk on 0", "rank 1: no disk on 1", "no disk on 0"]
    assert also == ["rank 0: no disk on 0", "no disk on 1", "rank 0: no disk on 0"]


@pytest.mark.parametrize(
    ("run", "elsewhere"), [(_same_error, [False, True]), (_own_error, [True, False]), (_two_errors, [False, False])]
)
def test_what_all_have_to_say_is_said_by_one(run, elsewhere):
    assert in_ranks(run) == elsewhere


def _signalled(folder: Path, where: int) -> list[bool]:
    with listening(folder):
        interruption.wait_for_a_step()
        before = interruption.agreed()
        if ranks.rank() == where:
            signal.raise_signal(signal.SIGUSR2)
        alone = interruption.asked()
        return [before, alone, interruption.agreed(), interruption.asked()]


@pytest.mark.parametrize("where", [0, 1])
def test_a_signal_to_one_rank_is_one_to_all_at_the_next_step(tmp_path, where):
    found = in_ranks(_signalled, tmp_path, where)
    assert found[where] == [False, True, True, True] and found[1 - where] == [False, False, True, True]


def _stopped_while_the_first_closes_slowly(folder: Path) -> tuple[str, int]:
    """W&B takes its time on rank 0, which alone puts the job back into the queue."""
    ranks.PATIENCE = 0.2
    try:
        with listening(folder), _one_voice(find_place()):
            interruption.wait_for_a_step()
            signal.raise_signal(signal.SIGUSR2)
            if ranks.is_first():
                time.sleep(1.0)
            raise Interrupted("saved after step 3")
    except (Interrupted, SystemExit) as error:
        return type(error).__name__, error.code


def test_ranks_that_stop_on_a_signal_leave_the_word_to_the_first(tmp_path):
    found = in_ranks(_stopped_while_the_first_closes_slowly, tmp_path)
    assert found == [("Interrupted", 130), ("SystemExit", 0)]


def test_one_process_is_all_ranks():
    assert (ranks.gather(3), ranks.share(lambda: 4), ranks.world_size(), ranks.is_first()) == ([3], 4, 1, True)
    with ranks.first():
        pass
    with pytest.raises(ZeroDivisionError), ranks.first():
        raise ZeroDivisionError
