"""The packs of one RL iteration, as Lightning reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kimivl.rl.experience import TrajectoryBatch


class ExperienceLoader:
    """The packs of one iteration from ``start`` on; sized as the whole iteration, like ``PackLoader``."""

    def __init__(self, make: Callable[[int], TrajectoryBatch], length: int, start: int) -> None:
        self._make, self._length, self._start = make, length, start

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        return map(self._make, range(self._start, self._length))

    def again(self, number: int) -> TrajectoryBatch:
        """The ``number``-th pack of this rank in the iteration, made once more."""
        return self._make(number)
