"""The index of a shard set: where each sample lies, and exactly how many tokens and patches it has.

Columns in one Arrow file beside the shards, memory-mapped, so that 50 million samples cost no Python object and all
ranks and workers of a machine share one copy. ``kimivl.data.scan`` makes it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kimivl.data.sample import Sample
from kimivl.data.shards import read_sample
from kimivl.data.storage import Storage

SCHEMA = pa.schema(
    {
        "key": pa.large_string(),
        "shard": pa.int32(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "crc32": pa.uint32(),
        "tokens": pa.int32(),
        "patches": pa.int32(),
        "targets": pa.int32(),
        "images": pa.int32(),
        "source": pa.int32(),
        "difficulty": pa.int16(),
    }
)
"""``offset`` and ``size`` are the bytes of the sample's members in its tar, ``crc32`` their checksum; ``targets`` the
supervised tokens; ``patches`` before merging; ``source`` a code; ``difficulty`` -1 where there is none."""


class Index:
    """Columns over ``N`` samples in the order of the shards; a sample's number here is its name in a run.

    Attributes:
        shards: names that ``shard`` numbers. sources: names that ``source`` numbers.
        dropped: samples that were left out, counted by reason; ``dropped_file`` lists them.
        fingerprint: of all that the index depends on.
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    targets: np.ndarray
    images: np.ndarray
    source: np.ndarray
    difficulty: np.ndarray

    def __init__(self, path: Path, storage: Storage) -> None:
        self.path, self.storage = path, storage
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
            batch = reader.get_batch(0)
        about = json.loads(batch.schema.metadata[b"kimivl"])
        self.shards: list[str] = about["shards"]
        self.sources: list[str] = about["sources"]
        self.dropped: dict[str, int] = about["dropped"]
        self.fingerprint: str = about["fingerprint"]
        self._keys = batch.column("key")
        for name in SCHEMA.names[1:]:
            setattr(self, name, batch.column(name).to_numpy(zero_copy_only=True))

    def __len__(self) -> int:
        return len(self._keys)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file for itself."""
        return Index, (self.path, self.storage)

    @property
    def dropped_file(self) -> Path:
        """What was left out, one JSON object a line; there only when something was."""
        return self.path.with_suffix(".dropped.jsonl")

    def key(self, number: int) -> str:
        return self._keys[number].as_py()

    @cached_property
    def digest(self) -> str:
        """Of the bytes of all samples, in their order, whatever the shards are called."""
        return hashlib.sha256(self.crc32.tobytes()).hexdigest()[:16]

    def keys(self) -> pa.Array:
        """All keys, as an Arrow array."""
        return self._keys

    def shard_of(self, number: int) -> str:
        return self.shards[self.shard[number]]

    def read(self, number: int) -> Sample:
        """Read sample ``number`` by one byte range.

        Raises:
            SampleError: ``io_error`` when the shard cannot be read, ``bad_shard`` when it is not what was indexed.
        """
        return read_sample(
            self.storage,
            self.shard_of(number),
            int(self.offset[number]),
            int(self.size[number]),
            int(self.crc32[number]),
            self.key(number),
        )

    def advise(self, numbers: np.ndarray) -> None:
        """Say that these samples will be read soon."""
        for shard in np.unique(self.shard[numbers]).tolist():
            chosen = numbers[self.shard[numbers] == shard]
            spans = zip(self.offset[chosen].tolist(), self.size[chosen].tolist(), strict=True)
            self.storage.advise(self.shards[shard], spans)


def write_index(path: Path, batch: pa.RecordBatch, about: dict[str, Any]) -> None:
    """Write ``batch`` (of ``SCHEMA``) under its name when it is whole; ``about`` is the rest of an ``Index``."""
    batch = batch.replace_schema_metadata({"kimivl": json.dumps(about)})
    partial = path.with_suffix(".partial")
    try:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
