"""The folder `OUT/.partial` in which shards are made, and their way into OUT.

    plan.json             fingerprint of source and settings, and the rows of every shard
    NAME-000000.tar       a shard; it appears when it is complete
    NAME-000000.jsonl     its refused rows
    NAME-000000.json      its counts; written last: a shard with counts is done

A build that was killed goes on from here, also when it was killed between two renames into OUT.
"""

import fcntl
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST, REJECTED = "manifest.json", "rejected.jsonl"


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """What became of a shard's rows; `reasons` counts the refused ones."""

    rows: int
    samples: int
    bytes: int
    reasons: dict[str, int] = field(default_factory=dict)


@contextmanager
def claim(out: Path) -> Iterator[None]:
    """OUT as a folder that no other build writes into. Raises ValueError naming it where that cannot be."""
    created = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ValueError(f"OUT {out} cannot be a folder ({error.strerror}); choose another path") from error
    try:
        _lock(descriptor, out)
        yield
    finally:
        os.close(descriptor)  # which also gives the lock back
        if created and not any(out.iterdir()):
            out.rmdir()


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another build is writing into OUT {out}; wait for it or choose another folder") from error


def write_atomic(path: Path, value: Any) -> None:
    """`value` as JSON under `path`, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class PartialBuild:
    """The state on disk of one build of `OUT/NAME-*.tar`."""

    out: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.out / ".partial"

    def manifest(self) -> dict[str, Any] | None:
        """What a finished build has left in OUT."""
        path = self.out / MANIFEST
        return json.loads(path.read_bytes()) if path.is_file() else None

    def plan(self) -> dict[str, Any] | None:
        """The plan of a build that was begun."""
        path = self.folder / "plan.json"
        return json.loads(path.read_bytes()) if path.is_file() else None

    def begin(self) -> None:
        """An empty folder to work in."""
        self.discard()
        self.folder.mkdir()

    def discard(self) -> None:
        """Remove the folder, its plan first: without one, nothing goes on from what a kill may leave of it."""
        if self.folder.exists():
            (self.folder / "plan.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def clear_leftovers(self) -> None:
        """Remove what killed processes were writing."""
        for path in self.folder.glob(".*.partial"):
            path.unlink()

    def shard(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:06d}.tar"

    def ledger(self, number: int) -> Path:
        """Where the refused rows of a shard go."""
        return self.shard(number).with_suffix(".jsonl")

    def note_plan(self, settings: dict[str, Any], shards: list[Any]) -> None:
        """Note the settings and the rows of every shard: from here on the build can go on after a kill."""
        write_atomic(self.folder / "plan.json", {"settings": settings, "shards": shards})

    def finish(self, number: int, counts: ShardCounts) -> None:
        """Note that a shard is complete, once its files are on the disk."""
        for path in (self.shard(number), self.ledger(number)):
            if path.exists():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        write_atomic(self.shard(number).with_suffix(".json"), asdict(counts))

    def finished(self, number: int) -> ShardCounts | None:
        path = self.shard(number).with_suffix(".json")
        return ShardCounts(**json.loads(path.read_bytes())) if path.is_file() else None

    def published(self) -> list[str]:
        """Shards of this name that lie in OUT already."""
        pattern = re.compile(re.escape(self.name) + r"-\d{6}\.tar")
        return sorted(path.name for path in self.out.iterdir() if pattern.fullmatch(path.name))

    def write_rejected(self, ledgers: list[Path]) -> None:
        """Join ledgers of refused rows into `OUT/rejected.jsonl`."""
        joined = self.folder / REJECTED
        with joined.open("wb") as stream:
            for path in ledgers:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, stream)
        joined.replace(self.out / REJECTED)

    def publish(self, counts: list[ShardCounts], settings: dict[str, Any]) -> dict[str, Any]:
        """Move the shards into OUT under dense numbers, the manifest last, and return it. Can be repeated."""
        self._retire()
        names: list[dict[str, Any]] = []
        for number, shard in enumerate(counts):
            if shard.samples:
                path = self.shard(len(names)).name
                if self.shard(number).exists():  # otherwise moved before a kill
                    self.shard(number).replace(self.out / path)
                names.append({"name": path, "samples": shard.samples, "bytes": shard.bytes})
        for stale in set(self.published()) - {entry["name"] for entry in names}:
            (self.out / stale).unlink()
        self.write_rejected([self.ledger(number) for number in range(len(counts))])
        manifest = {**settings, **totals(counts), "shards": names}
        write_atomic(self.out / MANIFEST, manifest)
        self.discard()
        return manifest

    def _retire(self) -> None:
        """Take an earlier set out of OUT: its manifest first, because it names files that go."""
        path = self.out / MANIFEST
        retired = self.folder / "retired.json"
        if path.is_file():
            path.replace(retired)
        if retired.is_file():
            earlier = [entry["name"] for entry in json.loads(retired.read_bytes())["shards"]]
            for name in set(earlier) - set(self.published()):
                (self.out / Path(name).name).unlink(missing_ok=True)


def totals(counts: list[ShardCounts]) -> dict[str, Any]:
    """Rows, samples and refused rows by reason, over all shards."""
    reasons: Counter[str] = Counter()
    for shard in counts:
        reasons.update(shard.reasons)
    return {
        "rows": sum(shard.rows for shard in counts),
        "samples": sum(shard.samples for shard in counts),
        "rejected": dict(sorted(reasons.items())),
    }
