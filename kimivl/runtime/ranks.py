"""What the processes of one run say to each other, beyond gradients: decisions, results, failures.

A rank is one process with one device. Without a process group there is one rank, and everything here is then free.
What is exchanged are Python objects on the CPU; ``kimivl.runtime.launch`` makes the group.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")
_POLL = 0.1
_turns = itertools.count()
"""Numbers the calls of `first`, which all ranks make alike."""

_of_thread = threading.local()


class PeerFailed(ValueError):
    """Another rank could not do its part; the message says which, and why."""


def world_size() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process writes the files and says what is to be said."""
    return rank() == 0


def gather(value: T) -> list[T]:
    """The ``value`` of every rank, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=getattr(_of_thread, "group", None))
    return cast("list[T]", values)


def attempt(make: Callable[[], T]) -> list[T]:
    """What ``make`` gives on every rank, in the order of ranks. All ranks must call it.

    Raises:
        PeerFailed: on the ranks where ``make`` worked while it failed on another; that one raises its own error.
        BaseException: of the kind that ended ``make`` on another rank, where it is no Exception: a rank that was told
            to stop stops all.
    """
    value, error = None, None
    try:
        value = make()
    except BaseException as caught:
        error = caught
    failure = None if error is None else str(error) or type(error).__name__
    stop = None if error is None or isinstance(error, Exception) else type(error)
    outcomes = gather((value, failure, stop))
    if error is not None:
        raise error
    for number, (_, failed, stopped) in enumerate(outcomes):
        if failed is not None:
            raise PeerFailed(f"rank {number}: {failed}") if stopped is None else stopped(failed)
    return [cast("T", made) for made, _, _ in outcomes]


def share(make: Callable[[], T]) -> T:
    """What ``make`` gives on rank 0, on every rank; it runs there only.

    Raises:
        PeerFailed: on the other ranks when it fails there.
    """
    return cast("T", attempt(lambda: make() if is_first() else None)[0])


@contextmanager
def first() -> Iterator[None]:
    """The block runs on rank 0, and when that is done on the others: what one makes on the disk, the others find.

    Raises:
        PeerFailed: on the other ranks when it fails on rank 0; they do not enter it.
    """
    turn = f"turn/{next(_turns)}"
    if not is_first():
        while posted(turn) is None:  # it may take hours, and no timeout of a collective holds for that
            time.sleep(_POLL)
        attempt(lambda: None)
        yield
        return
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught

    def outcome() -> None:
        if error is not None:
            raise error

    post(turn, "over")
    attempt(outcome)


def largest(number: int) -> int:
    """The largest ``number`` of all ranks, on every rank: one small exchange between the CPUs, no wait for a GPU."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=getattr(_of_thread, "group", None))
    return int(tensor)


# A thread beside the main one must not exchange among its collectives: the ranks would answer each other's.


def group_apart() -> Any:
    """A group for a thread of its own on each rank. All ranks must make it together."""
    return dist.new_group(backend="gloo") if world_size() > 1 else None


@contextmanager
def within(group: Any) -> Iterator[None]:
    """This thread exchanges in ``group``, a `group_apart`."""
    _of_thread.group = group
    try:
        yield
    finally:
        _of_thread.group = None


# Words that are there to be found, not waited for: through the store that the group was made with.


def post(key: str, text: str) -> None:
    """Leave ``text`` under ``key`` for all ranks; later texts take its place."""
    if dist.is_initialized():
        _store().set(f"kimivl/{key}", text)


def posted(key: str) -> str | None:
    """What was left under ``key``, or None; never waits."""
    if not dist.is_initialized() or not _store().check([f"kimivl/{key}"]):
        return None
    return cast("str", _store().get(f"kimivl/{key}").decode())


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


PATIENCE = 5.0
"""Seconds that a rank which fails waits for the first one to fail of the same."""


def said_elsewhere(text: str) -> bool:
    """Whether another rank tells the user that the run ends with ``text``; all ranks that fail ask this once.

    What several ranks have to say is said by rank 0. A rank that fails alone says it itself, and rank 0, which learns
    of it later, does not say it again.
    """
    try:
        post(f"ended/{rank()}", text)
        if is_first():
            others = range(1, world_size())
            said = any(_related(text, posted(f"said/{other}")) for other in others)
            _wait_until(lambda: all(posted(f"heard/{other}") is not None for other in others))
            return said
        _wait_until(lambda: posted("ended/0") is not None)
        said = _related(text, posted("ended/0"))
        if not said:
            post(f"said/{rank()}", text)
        post(f"heard/{rank()}", "")
    except RuntimeError:  # the rank that keeps the words has left
        return False
    return said


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < deadline:
        time.sleep(_POLL / 2)


def _related(text: str, other: str | None) -> bool:
    """Whether one quotes the other, as `PeerFailed` does."""
    return other is not None and (text in other or other in text)
