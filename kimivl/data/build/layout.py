"""Which rows go into which shard: a walk over the rows that sums up what each will take in a tar, then cuts."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from kimivl.data.build.convert import Converter
from kimivl.data.build.sources import Row, RowFile, read_rows
from kimivl.data.sample import SampleError

RECORD = 10_240  # a tar is padded to a multiple of it
END_MARK = 1_024  # the two empty blocks behind the last member
GRAINS = 64  # a shard is cut from about that many runs of rows: the plan stays small, and a shard nearly full


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `first` to `stop` (not included) of a file; row `first` starts at byte `offset` of a text file."""

    file: RowFile
    first: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class Run:
    """A short span: the bytes of its samples in a tar, its rows, and how many of them are refused already."""

    span: Span
    bytes: int
    rows: int
    refused: int


def capacity(shard_bytes: int) -> int:
    """Bytes of members that fit into a tar of at most `shard_bytes`."""
    return shard_bytes // RECORD * RECORD - END_MARK


def measure(file: RowFile, ledger: Path, converter: Converter, grain: int) -> Iterator[Run]:
    """The runs of a file: of at most `grain` bytes, or of one sample. Refused rows go to `ledger`."""
    first = stop = offset = total = rows = refused = 0
    with ledger.open("w", encoding="utf-8") as stream:
        for row in read_rows(file):
            size = 0
            try:
                size = converter.size(row, file)
            except SampleError as error:
                note_rejected(stream, row, file, error)
                refused += 1
            if rows and total + size > grain:
                yield Run(Span(file, first, stop, offset), total, rows, refused)
                first, offset, total, rows, refused = row.number, row.offset, 0, 0, 0
            stop, total, rows = row.number + 1, total + size, rows + 1
    if rows:
        yield Run(Span(file, first, stop, offset), total, rows, refused)


def note_rejected(ledger: TextIO, row: Row, file: RowFile, error: SampleError) -> None:
    """One line of `rejected.jsonl`."""
    entry = {"row": row.number, "key": error.key, "file": file.name, "reason": error.reason, "detail": error.detail}
    ledger.write(json.dumps(entry) + "\n")  # in ASCII, because a broken text may be what is told


def count_reasons(ledgers: list[Path]) -> dict[str, int]:
    """How many rows the ledgers have of each reason."""
    reasons: Counter[str] = Counter()
    for path in ledgers:
        with path.open(encoding="utf-8") as stream:
            reasons.update(json.loads(line)["reason"] for line in stream)
    return dict(reasons)


def cut(runs: Iterator[Run], room: int) -> Iterator[list[Span]]:
    """Neighbouring runs joined into shards of at most `room` bytes of members.

    With room for 10, runs of 4, 5, 3, 12 and 1 bytes become shards of 9, 3, 12 and 1 bytes.
    """
    spans: list[Span] = []
    total = 0
    for run in runs:
        if spans and total + run.bytes > room:
            yield spans
            spans, total = [], 0
        if spans and spans[-1].file == run.span.file:
            last = spans.pop()
            spans.append(Span(last.file, last.first, run.span.stop, last.offset))
        else:
            spans.append(run.span)
        total += run.bytes
    if spans:
        yield spans
