"""The delivery log: which samples each completed optimiser step took, on disk before the step's checkpoint can be.

Each process start of each rank appends to a file of its own, ``deliveries-<attempt>-rank<rank>.arrows``, an Arrow IPC
stream with one record batch per step. A batch reaches the operating system in one write, so a kill leaves at most a
torn tail, which is read up to the last whole batch.

A resume takes back what came after its checkpoint: those updates died with their process. Worked example: attempt 0
logs steps 1 to 7 and is killed, attempt 1 resumes from step 5 and logs 6 to 9. What counts: 1 to 5 of attempt 0, 6 to
9 of attempt 1. The line of steps that counts is the surviving line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor

from kimivl.data.pack import Hole, PackedBatch

QUARANTINE_FILE = "quarantine.jsonl"
SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "epoch": pa.int32(),
        "pack": pa.int32(),
        "sample": pa.int64(),
        "uses": pa.uint16(),
        "hole": pa.string(),
    }
)
"""``step`` counts completed optimiser steps from 1 over the whole run, ``pack`` is a number in the epoch's plan,
``sample`` one in the index, ``uses`` how often the epoch is to use that sample, ``hole`` why it could not be read (null
where it was)."""

_BROKEN = (pa.ArrowInvalid, OSError)
"""What Arrow raises where a stream breaks off."""


def _file_name(attempt: int, rank: int) -> str:
    return f"deliveries-{attempt:04d}-rank{rank:04d}.arrows"


def next_attempt(folder: Path) -> int:
    """The number of the process start that begins now: one more than any in ``folder``."""
    return 1 + max((int(path.name.split("-")[1]) for path in folder.glob("deliveries-*.arrows")), default=-1)


class TakenPack(NamedTuple):
    """What the log needs of a ``PackedBatch``: to keep one until its step is done would keep its images, too."""

    number: int
    samples: Tensor
    holes: tuple[Hole, ...]


class DeliveryLog:
    """The file of one rank in one attempt, open for appending.

    Args:
        folder: where all ranks and attempts of the run have theirs; made if need be.
        resumed_at: the global step that this attempt goes on from.

    Raises:
        ValueError: when the file exists or cannot be written.
    """

    def __init__(
        self, folder: Path, *, attempt: int, rank: int, world_size: int, packs_per_step: int, resumed_at: int
    ) -> None:
        self.path, self.rank = folder / _file_name(attempt, rank), rank
        self._quarantine = folder / QUARANTINE_FILE
        about = {
            "rank": rank,
            "world_size": world_size,
            "packs_per_step": packs_per_step,
            "resumed_at": resumed_at,
        }
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._file = self.path.open("xb", buffering=0)
        except FileExistsError:
            raise ValueError(f"{self.path} exists: another process is writing this run; stop one of the two") from None
        self._append(SCHEMA.with_metadata({name: str(value) for name, value in about.items()}).serialize())

    def write(self, step: int, epoch: int, packs: Iterable[PackedBatch | TakenPack], uses: np.ndarray) -> None:
        """Append a completed step: this rank's ``packs`` of it, and ``uses (N,)``, the planned uses of all samples."""
        taken = list(packs)
        numbers = np.repeat([pack.number for pack in taken], [len(pack.samples) for pack in taken])
        samples = np.concatenate([pack.samples.numpy() for pack in taken])
        columns = {
            "step": np.full(len(samples), step, np.int32),
            "epoch": np.full(len(samples), epoch, np.int32),
            "pack": numbers.astype(np.int32),
            "sample": samples,
            "uses": uses[samples].astype(np.uint16),
            "hole": pa.array(_reasons(taken, len(samples)), pa.string()),
        }
        self._quarantine_holes(taken, step, epoch)
        self._append(pa.RecordBatch.from_pydict(columns, SCHEMA).serialize())

    def _append(self, message: pa.Buffer) -> None:
        try:
            written = self._file.write(message)
        except OSError as error:
            raise self._unwritable(error) from error
        if written != message.size:
            raise self._unwritable(f"{written} of {message.size} bytes were written")

    def _unwritable(self, cause: OSError | str) -> ValueError:
        return ValueError(f"{self.path} cannot be written ({cause}); make room there, and resume the run")

    def _quarantine_holes(self, packs: list[PackedBatch | TakenPack], step: int, epoch: int) -> None:
        """What people read of the holes; the log itself knows their reasons."""
        where = {"epoch": epoch, "step": step, "rank": self.rank}
        lines = "".join(json.dumps(hole._asdict() | where) + "\n" for pack in packs for hole in pack.holes)
        if lines:
            with self._quarantine.open("a", encoding="utf-8") as file:
                file.write(lines)

    def sync(self) -> None:
        """Have the file system keep what was written, and show it to other machines."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _reasons(packs: list[PackedBatch | TakenPack], count: int) -> list[str | None]:
    """Per delivered sample, why it is a hole."""
    reasons: list[str | None] = [None] * count
    start = 0
    for pack in packs:
        if pack.holes:
            reason = {hole.sample: hole.reason for hole in pack.holes}
            reasons[start : start + len(pack.samples)] = map(reason.get, pack.samples.tolist())
        start += len(pack.samples)
    return reasons


@dataclass(frozen=True, slots=True)
class Deliveries:
    """What an epoch's surviving steps took, ``(D,)`` columns sorted by (sample, pack).

    ``hole`` indexes ``reasons``; -1 is a sample that was read.
    """

    step: np.ndarray
    pack: np.ndarray
    sample: np.ndarray
    uses: np.ndarray
    rank: np.ndarray
    hole: np.ndarray
    reasons: list[str]

    def __len__(self) -> int:
        return len(self.sample)


@dataclass(slots=True)
class _LogFile:
    """One file: what its header says, and which of its batches belong to which epoch."""

    path: Path
    attempt: int
    rank: int
    world_size: int
    packs_per_step: int
    resumed_at: int
    steps: list[tuple[int, int]] = field(default_factory=list)

    def batches(self, chosen: set[int]) -> list[pa.RecordBatch]:
        return [batch for number, batch in enumerate(_read(self.path)) if number in chosen]


def _read(path: Path) -> Iterator[pa.RecordBatch]:
    """The whole batches of a file; what a kill has torn at its end is left out."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        while True:
            try:
                yield reader.read_next_batch()
            except (StopIteration, *_BROKEN):
                return


def _open(path: Path) -> _LogFile | None:
    """Scan a file; None for one whose process was killed before it had written the header."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            about = {name.decode(): int(value) for name, value in reader.schema.metadata.items()}
    except _BROKEN:
        return None
    steps = [(batch["epoch"][0].as_py(), batch["step"][0].as_py()) for batch in _read(path)]
    return _LogFile(path, int(path.name.split("-")[1]), steps=steps, **about)


class History:
    """All delivery logs of a run, and the line of steps in them that counts.

    Attributes:
        attempts: process starts seen.
        begins_at: the step that the first attempt started from; 0 unless the run began from another's checkpoint.
        problems: logs that are missing, or contradict each other.
    """

    def __init__(self, folder: Path) -> None:
        found = [_open(path) for path in sorted(folder.glob("deliveries-*.arrows"))]
        self._files = [file for file in found if file is not None]
        resumed = {file.attempt: file.resumed_at for file in self._files}
        self.attempts = len(resumed)
        self.begins_at = resumed[min(resumed)] if resumed else 0
        # A step counts unless a later attempt went on from before it.
        self._counts_to = {
            attempt: min((step for later, step in resumed.items() if later > attempt), default=np.iinfo(np.int64).max)
            for attempt in resumed
        }
        self.problems = [problem for attempt in resumed for problem in self._contradictions(attempt)]

    def _contradictions(self, attempt: int) -> Iterator[str]:
        files = [file for file in self._files if file.attempt == attempt]
        headers = {(file.world_size, file.packs_per_step, file.resumed_at) for file in files}
        if len(headers) > 1:
            yield f"the delivery logs of attempt {attempt} disagree about world size, packs per step or first step"
        absent = sorted(set(range(files[0].world_size)) - {file.rank for file in files})
        if absent and any(self._counts(file, step) for file in files for _, step in file.steps):
            yield f"{_file_name(attempt, absent[0])} is missing"

    def _counts(self, file: _LogFile, step: int) -> bool:
        return step <= self._counts_to[file.attempt]

    def _chosen(self, file: _LogFile, epoch: int) -> set[int]:
        return {
            number
            for number, (of, step) in enumerate(file.steps)
            if of == epoch and file.resumed_at < step and self._counts(file, step)
        }

    @property
    def epochs(self) -> list[int]:
        """Epochs that surviving steps belong to."""
        seen = {epoch for file in self._files for epoch, _ in file.steps}
        return sorted(epoch for epoch in seen if any(self._chosen(file, epoch) for file in self._files))

    def settings(self, epoch: int, name: str) -> list[int]:
        """The different values of a header's field among the files that have surviving steps of an epoch."""
        return sorted({getattr(file, name) for file in self._files if self._chosen(file, epoch)})

    def epoch(self, number: int) -> Deliveries:
        """What the surviving steps of an epoch took."""
        empty = pa.RecordBatch.from_pylist([], SCHEMA)
        batches, ranks = [empty], [np.zeros(0, np.int32)]
        for file in self._files:
            found = file.batches(self._chosen(file, number))
            batches += [batch.replace_schema_metadata() for batch in found]
            ranks.append(np.full(sum(map(len, found)), file.rank, np.int32))
        table = pa.Table.from_batches(batches).combine_chunks()
        hole = table["hole"].combine_chunks().dictionary_encode()
        columns = {name: table[name].to_numpy() for name in ("step", "pack", "sample", "uses")}
        columns |= {"rank": np.concatenate(ranks), "hole": hole.indices.fill_null(-1).to_numpy()}
        order = np.argsort(columns["sample"] << 32 | columns["pack"], kind="stable")
        return Deliveries(
            **{name: values[order] for name, values in columns.items()}, reasons=hole.dictionary.to_pylist()
        )
