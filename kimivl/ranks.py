"""What the processes of one run say to each other, beyond gradients: decisions, results, failures.

A rank is one process with one device. Without a process group there is one rank, and everything here is then free.
What is exchanged are Python objects on the CPU; ``kimivl.launch`` makes the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


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
    dist.all_gather_object(values, value)
    return cast("list[T]", values)


def attempt(make: Callable[[], T]) -> list[T]:
    """What ``make`` gives on every rank, in the order of ranks. All ranks must call it.

    Raises:
        PeerFailed: on the ranks where ``make`` worked while it failed on another; that one raises its own error.
    """
    value, error = None, None
    try:
        value = make()
    except BaseException as caught:
        error = caught
    outcomes = gather((value, None if error is None else str(error) or type(error).__name__))
    if error is not None:
        raise error
    for number, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise PeerFailed(f"rank {number}: {failure}")
    return [cast("T", made) for made, _ in outcomes]


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
    if not is_first():
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

    attempt(outcome)


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
