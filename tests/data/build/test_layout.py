"""Cutting rows into shards: nothing lost, nothing too large, few spans."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kimivl.data.build.layout import END_MARK, RECORD, Run, Span, capacity, cut
from kimivl.data.build.sources import RowFile

FILES = [RowFile(Path(name), name, name, "lines") for name in "abc"]


def test_the_example() -> None:
    sizes = [4, 5, 3, 12, 1]
    runs = [Run(Span(FILES[0], place, place + 1, 10 * place), size, 1, 0) for place, size in enumerate(sizes)]
    shards = list(cut(iter(runs), 10))
    assert [[(span.first, span.stop, span.offset) for span in spans] for spans in shards] == [
        [(0, 2, 0)],
        [(2, 3, 20)],
        [(3, 4, 30)],
        [(4, 5, 40)],
    ]


@settings(max_examples=60)
@given(sizes=st.lists(st.lists(st.integers(0, 12), max_size=20), min_size=3, max_size=3), room=st.integers(1, 30))
def test_every_row_is_in_one_shard_that_is_not_too_large(sizes: list[list[int]], room: int) -> None:
    weights = {(file.name, row): size for file, rows in zip(FILES, sizes, strict=True) for row, size in enumerate(rows)}
    runs = [
        Run(Span(file, row, row + 1, 7 * row), size, 1, 0)
        for file, rows in zip(FILES, sizes, strict=True)
        for row, size in enumerate(rows)
    ]
    shards = list(cut(iter(runs), room))
    rows = [[(s.file.name, row) for s in spans for row in range(s.first, s.stop)] for spans in shards]
    assert [row for shard in rows for row in shard] == list(weights)
    assert all(span.offset == 7 * span.first for spans in shards for span in spans)
    for spans, shard in zip(shards, rows, strict=True):
        assert sum(weights[row] for row in shard) <= room or len(shard) == 1
        assert len({span.file.name for span in spans}) == len(spans), "neighbouring spans of a file are one"
    for shard, following in zip(rows, rows[1:], strict=False):
        assert sum(weights[row] for row in shard) + weights[following[0]] > room, "a shard ended early"


def test_capacity_leaves_room_for_the_end_of_a_tar() -> None:
    for size in (2 * RECORD, 100_000, 512 * 10**6):
        padded = -(-(capacity(size) + END_MARK) // RECORD) * RECORD
        assert size - RECORD < padded <= size
