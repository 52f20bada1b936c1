"""Parameters of one kind, laid end to end and cut into batches, so that a step has a workspace of bounded size."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Piece(NamedTuple):
    """A part of a parameter, and of its gradient and states: ``part`` of them read as ``view``."""

    parameter: Tensor
    view: Sequence[int]
    part: slice

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.view)[self.part]


def cut(counts: Sequence[int], limit: int) -> Iterator[list[tuple[int, slice]]]:
    """Cut stacks of so many items, laid end to end, into equal batches of at most ``limit`` items.

    Example: stacks of 5 and 1 items, at most 4 in a batch -> [(0, 0:3)], [(0, 3:5), (1, 0:1)].
    """
    total = sum(counts)
    if not total:
        return
    size = math.ceil(total / math.ceil(total / limit))
    batch: list[tuple[int, slice]] = []
    room = size
    for number, count in enumerate(counts):
        start = 0
        while start < count:
            stop = min(start + room, count)
            batch.append((number, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], size
    if batch:
        yield batch
