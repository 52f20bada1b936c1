"""Rollouts beside training: never further behind than allowed, and never two at a time."""

import threading
import time

import pytest

from kimivl.rl.ahead import RolloutsAhead


def train(max_behind: int, iterations: int, slow: frozenset[int] = frozenset()) -> dict[int, int]:
    """Iteration -> the version that it was collected with; ``slow`` collections last until the trainer waits."""
    used: dict[int, int] = {}
    release = threading.Event()
    at_work = threading.Lock()

    def collect(iteration: int, version: int) -> int:
        assert at_work.acquire(blocking=False)
        if iteration in slow:
            release.wait(5)
        at_work.release()
        return version

    ahead = RolloutsAhead(collect, max_behind, iterations - 1)
    for iteration in range(iterations):
        if iteration in slow:
            release.set()
        version = ahead.take(iteration)
        used[iteration] = iteration if version is None else version
        release.clear()
        if iteration == 0 or ahead.idle:
            ahead.go_on(iteration)
        if not slow:
            ahead.settle()
    assert ahead.in_flight == 0  # none beyond the last iteration
    ahead.close()
    return used


def test_one_behind():
    assert train(1, 5) == {0: 0, 1: 0, 2: 1, 3: 2, 4: 3}


@pytest.mark.parametrize(("max_behind", "slow"), [(2, {2}), (2, {1, 3}), (3, {2, 5}), (3, {1, 2, 3, 4, 5, 6})])
def test_never_further_behind(max_behind, slow):
    used = train(max_behind, 8, frozenset(slow))
    assert all(0 <= iteration - version <= max_behind for iteration, version in used.items())


def test_closed_it_is_idle_and_begins_nothing_more():
    begun, ended = threading.Event(), []

    def collect(iteration: int, version: int) -> int:
        begun.set()
        time.sleep(1.0)
        ended.append(iteration)
        return version

    ahead = RolloutsAhead(collect, 2, 5)
    ahead.go_on(0)
    begun.wait(5)
    ahead.close()
    assert ended == [1]


def test_a_failure_is_raised_where_its_iteration_is_taken():
    def collect(iteration: int, version: int) -> int:
        if iteration == 2:
            raise ValueError("the engine is gone")
        return version

    ahead = RolloutsAhead(collect, 2, 5)
    ahead.go_on(0)
    ahead.settle()
    assert ahead.idle and ahead.take(1) == 0
    with pytest.raises(ValueError, match="the engine is gone"):
        ahead.take(2)
    assert ahead.take(3) is None
    ahead.close()
