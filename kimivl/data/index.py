"""The index of a shard set: where each sample lies, and how many tokens and patches it has.

Made by one scan, and kept beside the shards under a fingerprint of everything that it depends on; a stale one is
not found and made anew. The scan reads and decodes every sample once, so that what is wrong with the data is said
before the first step.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from kimivl.data.chat import SampleEncoder
from kimivl.data.pack import EncodedSample
from kimivl.data.sample import Sample, SampleError
from kimivl.data.shards import read_sample, scan_shard

log = logging.getLogger(__name__)
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Index:
    """Columns over ``N`` samples, in the order of the shards.

    ``key`` (str), ``shard`` (which of ``shards``), ``offset`` and ``size`` (bytes of the sample's span in its tar),
    ``tokens``, ``patches``, ``targets`` (supervised tokens), ``difficulty`` (-1 where there is none).
    ``dropped_reason`` and ``dropped_count`` say what was left out, and why.
    """

    shards: list[Path]
    key: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    targets: np.ndarray
    difficulty: np.ndarray
    dropped_reason: np.ndarray
    dropped_count: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    @property
    def dropped(self) -> dict[str, int]:
        return dict(zip(self.dropped_reason.tolist(), self.dropped_count.tolist(), strict=True))

    def read(self, number: int) -> Sample:
        """Read sample ``number`` by one byte range."""
        shard = self.shards[self.shard[number]]
        sample = read_sample(shard, int(self.offset[number]), int(self.size[number]))
        if sample.key != self.key[number]:
            raise SampleError("bad_shard", str(self.key[number]), str(shard), "the shard changed since it was indexed")
        return sample


class _Columns:
    """Collects rows and faults while shards are scanned."""

    def __init__(self) -> None:
        self.rows: list[tuple] = []
        self.dropped: Counter[str] = Counter()

    def drop(self, fault: SampleError) -> None:
        self.dropped[fault.reason] += 1
        if self.dropped[fault.reason] <= 5:  # a damaged set would otherwise fill the screen; the count goes on
            log.warning("dropped: %s", fault)

    def index(self, shards: list[Path]) -> Index:
        key, shard, offset, size, tokens, patches, targets, difficulty = zip(*self.rows, strict=True)
        return Index(
            shards=shards,
            key=np.array(key),
            shard=np.array(shard, np.int32),
            offset=np.array(offset, np.int64),
            size=np.array(size, np.int64),
            tokens=np.array(tokens, np.int32),
            patches=np.array(patches, np.int32),
            targets=np.array(targets, np.int32),
            difficulty=np.array(difficulty, np.int16),
            dropped_reason=np.array(list(self.dropped), dtype=str),
            dropped_count=np.array(list(self.dropped.values()), np.int64),
        )


def build_index(
    shards: list[Path],
    encoder: SampleEncoder,
    *,
    prompts: bool = False,
    check: Callable[[Sample], None] | None = None,
    max_dropped: float = 0.01,
    track: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> Index:
    """Index ``shards``, or load the index that an earlier run left beside them.

    Args:
        prompts: the samples are problems to be answered: only the prompt is counted, and an ``answer`` is required.
        check: a further test of each sample; raises ``SampleError`` to drop it.
        max_dropped: the share of samples above which the set is refused.
        track: wraps the list of shards, for a progress bar.

    Raises:
        ValueError: when more than ``max_dropped`` of the samples are unusable, or none is left.
    """
    check_name = "" if check is None else check.__qualname__
    path = shards[0].parent / f".index-{_fingerprint(shards, encoder, prompts, check_name)}.npz"
    if path.exists():
        index = _load(path, shards)
        _refuse_if_damaged(index.dropped, len(index), shards, max_dropped)
        return index
    columns = _Columns()
    for number, shard in enumerate(track(shards)):
        for record in scan_shard(shard, columns.drop):
            try:
                sample = read_sample(shard, record.offset, record.size)
                encoded = _encode(sample, encoder, prompts, shard)
                if check is not None:
                    check(sample)
            except SampleError as fault:
                columns.drop(fault)
                continue
            place = (sample.key, number, record.offset, record.size)
            counts = (len(encoded), len(encoded.pixel_values), encoded.num_targets)
            columns.rows.append((*place, *counts, -1 if sample.difficulty is None else sample.difficulty))
    _refuse_if_damaged(columns.dropped, len(columns.rows), shards, max_dropped)
    index = columns.index(shards)
    _save(path, index)
    return index


def _encode(sample: Sample, encoder: SampleEncoder, prompts: bool, shard: Path) -> EncodedSample:
    if not prompts:
        return encoder.encode(sample, str(shard))
    if not sample.answer:
        raise SampleError("empty_answer", sample.key, str(shard), "a problem needs an `answer` to be checked against")
    return encoder.encode_prompt(sample, str(shard))


def _refuse_if_damaged(faults: Mapping[str, int], kept: int, shards: list[Path], max_dropped: float) -> None:
    dropped = sum(faults.values())
    if kept == 0 or dropped > max_dropped * (dropped + kept):
        reasons = ", ".join(f"{reason} {count}" for reason, count in faults.items())
        raise ValueError(
            f"{dropped} of {dropped + kept} samples in {shards[0].parent} cannot be used ({reasons or 'no samples'}); "
            f"mend the shards, or raise data.max_dropped above {max_dropped} to train without them"
        )


def _fingerprint(shards: list[Path], encoder: SampleEncoder, prompts: bool, check_name: str) -> str:
    tokenizer = encoder.tokenizer.backend_tokenizer.to_str()
    processor = str(sorted(vars(encoder.image_processor).items(), key=str))
    files = [(str(shard.resolve()), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    text = repr((FORMAT, files, tokenizer, processor, prompts, check_name))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _save(path: Path, index: Index) -> None:
    columns = {field.name: getattr(index, field.name) for field in fields(Index) if field.name != "shards"}
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.npz")
    try:
        np.savez(temporary, **columns)
        temporary.replace(path)
    except OSError as error:
        log.warning("the index is not kept, and the next run will make it again: %s", error)


def _load(path: Path, shards: list[Path]) -> Index:
    with np.load(path) as columns:
        return Index(shards=shards, **{name: columns[name] for name in columns.files})
