"""Making an index: one scan of the shards, in parallel, that reads every byte and decodes no picture.

It is kept beside the shards (or in the cache folder, when they are remote or that place cannot be written) under a
fingerprint of all that it depends on: shards, tokenizer, chat format, image processor, the stage's check. A stale one
is so not found, and made anew. An interrupted scan goes on with the shards that it lacks.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kimivl.data.chat import Counts, SampleEncoder
from kimivl.data.index import SCHEMA, Index, write_index
from kimivl.data.sample import Sample, SampleError
from kimivl.data.shards import parse_span, scan_shard
from kimivl.data.storage import Storage
from kimivl.data.workers import end_with_parent

log = logging.getLogger(__name__)
FORMAT = 4
STAT_THREADS = 32
SHOWN = 5
"""Faults of one reason that are said one by one; all are listed in the file beside the index."""

Check = Callable[[Sample], None]
Track = Callable[[Iterable[None], int], Iterable[None]]
"""(what is being done, how many) -> the same, with a progress bar."""


def build_index(
    shards: list[str],
    encoder: SampleEncoder,
    storage: Storage,
    *,
    prompts: bool = False,
    check: Check | None = None,
    max_dropped: float = 0.01,
    folder: Path | None = None,
    workers: int | None = None,
    track: Track = lambda done, total: done,
) -> Index:
    """Index ``shards``, or open the index that an earlier run left.

    Args:
        prompts: the samples are problems to be answered: only the prompt is counted, and an ``answer`` is required.
        check: a further test of each sample; raises ``SampleError`` to drop it. It is part of the fingerprint.
        max_dropped: the share of samples above which the set is refused.
        folder: where the index goes when it cannot lie beside the shards.
        workers: processes that scan; by default one per CPU.
        track: shows the progress over the shards.

    Raises:
        ValueError: when more than ``max_dropped`` of the samples are unusable, or none is left.
    """
    job = _Job(shards, encoder, storage, prompts, check)
    name, state = _fingerprints(job)
    home = _home(shards, folder)
    path = home / f".index-{name}-{state}.arrow"
    if not path.exists():
        with _lock(home / f".index-{name}.lock"):  # of several runs that begin at once, one scans
            if not path.exists():
                _scan_all(job, path, workers or len(os.sched_getaffinity(0)), track)
                _remove_stale(home, name, path)
    index = Index(path, storage)
    _refuse_if_damaged(index.dropped, len(index), index, max_dropped)
    return index


@dataclass(frozen=True, slots=True)
class _Job:
    """What a scanning process needs to know."""

    shards: list[str]
    encoder: SampleEncoder
    storage: Storage
    prompts: bool
    check: Check | None

    def count(self, sample: Sample, shard: str) -> Counts:
        if self.prompts and not sample.answer:
            raise SampleError("empty_answer", sample.key, shard, "a problem needs an `answer` to be checked against")
        counts = self.encoder.measure(sample, shard, prompt=self.prompts)
        if self.check is not None:
            self.check(sample)
        return counts

    def scan(self, number: int) -> tuple[pa.Table, list[SampleError]]:
        """The rows of one shard, ``source`` still by name, and what is wrong in it."""
        shard = self.shards[number]
        rows: list[tuple[Any, ...]] = []
        faults: list[SampleError] = []
        for record in scan_shard(self.storage, shard, faults.append):
            try:
                span = self.storage.read(shard, record.offset, record.size)
                sample = parse_span(span, shard)
                counts = self.count(sample, shard)
            except SampleError as fault:
                faults.append(fault)
                continue
            except OSError as error:
                raise _unreadable(shard, str(error)) from error
            difficulty = -1 if sample.difficulty is None else sample.difficulty
            place = (record.key, number, record.offset, record.size, zlib.crc32(span))
            rows.append(
                (*place, counts.tokens, counts.patches, counts.targets, counts.images, sample.source, difficulty)
            )
        if faults and faults[-1].reason == "io_error":
            # Kept in the index, a bad minute of a server would be kept for good.
            raise _unreadable(shard, faults[-1].detail)
        columns = list(zip(*rows, strict=True)) or [()] * len(_PART)
        return pa.table(
            [pa.array(column, kind) for column, kind in zip(columns, _PART.types, strict=True)], _PART
        ), faults


def _unreadable(shard: str, why: str) -> ValueError:
    return ValueError(
        f"the shard {shard} cannot be read: {why}; type the command again, it goes on with the shards that are not yet "
        "indexed, or take the shard out of data.shards"
    )


_PART = SCHEMA.set(SCHEMA.get_field_index("source"), pa.field("source", pa.string()))
"""The schema of one shard's rows, before the names of the sources have numbers."""

_job: _Job | None = None


def _start(job: _Job, parent: int) -> None:
    """In a scanning process: keep the job, and leave parallelism to the processes."""
    global _job
    _job = job
    end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _scan_part(number: int, part: Path, job: _Job | None = None) -> None:
    """Scan one shard into a file, by the job that this process was started with where none is given."""
    job = job or _job
    assert job is not None
    table, faults = job.scan(number)
    listed = json.dumps([(fault.reason, fault.key, fault.shard, fault.detail) for fault in faults])
    table = table.replace_schema_metadata({"faults": listed})
    partial = part.with_suffix(".partial")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    partial.replace(part)


def _scan_all(job: _Job, path: Path, workers: int, track: Track) -> None:
    """Scan the shards that have no part yet, and join the parts."""
    folder = path.with_suffix(".parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts = [folder / f"{number:06d}.arrow" for number in range(len(job.shards))]
        wanted = [number for number, part in enumerate(parts) if not part.exists()]
        for _ in track(_scan_parts(job, wanted, parts, min(workers, len(wanted))), len(wanted)):
            pass
        _join(job.shards, parts, path)
        shutil.rmtree(folder)
    except OSError as error:
        raise ValueError(
            f"the index of {len(job.shards)} shards cannot be written to {path.parent}: {error}; make room there, or "
            "name another folder with data.cache"
        ) from error


def _scan_parts(job: _Job, wanted: list[int], parts: list[Path], workers: int) -> Iterator[None]:
    """Scan the ``wanted`` shards; what is returned yields when one is done."""
    if workers <= 1:
        return map(_scan_part, wanted, [parts[number] for number in wanted], [job] * len(wanted))
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start, (job, os.getpid()))
    # Begun here, before the thread of a progress bar is: a fork would copy the locks that it holds.
    done = pool.map(_scan_part, wanted, [parts[number] for number in wanted])
    return _until_done(pool, done)


def _until_done(pool: ProcessPoolExecutor, done: Iterator[None]) -> Iterator[None]:
    try:
        with pool:
            yield from done
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that indexes the shards was killed, most likely for want of memory; type the command "
            "again: it goes on with the shards that are left"
        ) from error


def _join(shards: list[str], parts: list[Path], path: Path) -> None:
    """One file of all parts: the sources get numbers, the faults a list of their own."""
    tables, faults = [], []
    for part in parts:
        with pa.memory_map(str(part)) as file:
            table = pa.ipc.open_file(file).read_all()
        faults += json.loads(table.schema.metadata[b"faults"])
        tables.append(table.replace_schema_metadata(None))
    table = pa.concat_tables(tables).combine_chunks()
    sources = table["source"].combine_chunks().dictionary_encode() if len(table) else None
    names = [] if sources is None else sources.dictionary.to_pylist()
    codes = pa.array([], pa.int32()) if sources is None else sources.indices
    table = table.set_column(SCHEMA.get_field_index("source"), "source", codes)
    [batch] = table.to_batches() or [pa.RecordBatch.from_pylist([], SCHEMA)]
    dropped = Counter(reason for reason, *_ in faults)
    if lost := _lost_in_cut_shards(tables, faults, shards):
        dropped["truncated_shard"] = lost
    _say_dropped(faults)
    if faults:
        _list_dropped(path.with_suffix(".dropped.jsonl"), faults)
    about = {"shards": shards, "sources": names, "dropped": dict(dropped), "fingerprint": path.stem}
    write_index(path, batch, about)


def _lost_in_cut_shards(tables: list[pa.Table], faults: list[list[str]], shards: list[str]) -> int:
    """About how many samples are gone with the ends of truncated shards: as many as a sound shard has more."""
    cut = {shard for reason, _, shard, _ in faults if reason == "truncated_shard"}
    sound = [len(table) for table, shard in zip(tables, shards, strict=True) if shard not in cut]
    found = [len(table) for table, shard in zip(tables, shards, strict=True) if shard in cut]
    whole = int(np.median(sound)) if sound else 0
    return sum(max(1, whole - count) for count in found)


def _say_dropped(faults: list[list[str]]) -> None:
    said: Counter[str] = Counter()
    for fault in faults:
        said[fault[0]] += 1
        if said[fault[0]] <= SHOWN:  # a damaged set would otherwise fill the screen
            log.warning("dropped: %s", SampleError(*fault))


def _list_dropped(path: Path, faults: list[list[str]]) -> None:
    with path.open("w") as lines:
        for fault in faults:
            lines.write(json.dumps(dict(zip(("reason", "key", "shard", "detail"), fault, strict=True))) + "\n")


def _refuse_if_damaged(dropped: Mapping[str, int], kept: int, index: Index, max_dropped: float) -> None:
    lost = sum(dropped.values())
    if kept == 0 or lost > max_dropped * (lost + kept):
        reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
        listed = f", listed in {index.dropped_file}" if lost else ""
        listed += f"; the first: {_first_dropped(index)}" if lost else ""
        raise ValueError(
            f"{lost} of {lost + kept} samples in {os.path.dirname(index.shards[0]) or '.'} cannot be used "  # noqa: PTH120
            f"({reasons or 'no samples'}){listed}; mend the shards, or raise data.max_dropped above {max_dropped} to "
            "train without them"
        )


def _first_dropped(index: Index) -> SampleError:
    with index.dropped_file.open() as lines:
        first = json.loads(next(lines))
    return SampleError(first["reason"], first["key"], first["shard"], first["detail"])


def _fingerprints(job: _Job) -> tuple[str, str]:
    """Of what is indexed and how; and of the state in which the shards are."""
    names = [shard if "://" in shard else str(Path(shard).resolve()) for shard in job.shards]
    with ThreadPoolExecutor(STAT_THREADS) as pool:  # a remote shard takes a round trip
        states = list(pool.map(_state, [job.storage] * len(names), job.shards))
    how = (FORMAT, names, job.encoder.fingerprint(), job.prompts, _spell(job.check))
    return _digest(how), _digest(states)


def _state(storage: Storage, shard: str) -> tuple[int, str]:
    try:
        return storage.stat(shard)
    except OSError as error:
        raise ValueError(f"the shard {shard} cannot be read: {error}; check data.shards") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def _spell(value: Any) -> str:
    """A name for a check: of functions where they are, of partials and objects their settings too."""
    if isinstance(value, functools.partial):
        settings = [_spell(argument) for argument in value.args]
        settings += [f"{name}={_spell(argument)}" for name, argument in sorted(value.keywords.items())]
        return f"{_spell(value.func)}({', '.join(settings)})"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__dict__"):
        settings = [f"{name}={_spell(setting)}" for name, setting in sorted(vars(value).items())]
        return f"{_spell(type(value))}({', '.join(settings)})"
    return repr(value)


def _home(shards: list[str], folder: Path | None) -> Path:
    """Beside the first shard where that is possible."""
    beside = None if "://" in shards[0] else Path(shards[0]).resolve().parent
    if beside is not None and os.access(beside, os.W_OK):
        return beside
    if folder is None:
        raise ValueError(f"no index can be written beside {shards[0]}; name a folder for it with data.cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks: the scan is then made twice, no more
            log.info("no lock on %s: %s", path, error)
        yield


def _remove_stale(home: Path, name: str, path: Path) -> None:
    """Indexes of the same shards in an earlier state."""
    for stale in home.glob(f".index-{name}-*"):
        if stale.name.split(".")[1] != path.name.split(".")[1]:
            log.info("the shards have changed; the index made before is removed: %s", stale)
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
