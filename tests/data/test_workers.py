"""Worker processes: results by place, the first error, a worker that is killed."""

import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from kimivl.data.workers import run_parallel


def square(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number * number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def slow(number: int) -> int:
    time.sleep(0.1)
    return square(number)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_carry_their_place(workers: int) -> None:
    assert dict(run_parallel(square, [5, 4, 1, 2], workers)) == {0: 25, 1: 16, 2: 1, 3: 4}


def test_an_error_ends_the_work() -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="three"):
        list(run_parallel(slow, [3] + [1] * 400, 2))
    assert time.monotonic() - started < 20, "what was not begun must be left"


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(BrokenProcessPool):
        list(run_parallel(die, [1, 2], 2))
