"""WebDataset shards: plain tar files of `KEY.json`, `KEY.0.png`, ... with a sample's members side by side.

Shards are written with webdataset and can be read with it. They are indexed with one scan and read by byte
range, because a planned epoch asks for samples in any order.
"""

import glob
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset
from braceexpand import braceexpand

from kimivl.data.sample import JPEG_START, Sample, SampleError, parse_sample

BLOCK = 512  # bytes of a tar block; headers and member data start at multiples of it
OWNER = "kimivl"
MAGIC_SUFFIXES = ((b"\x89PNG", "png"), (JPEG_START, "jpg"), (b"RIFF", "webp"))


@dataclass(frozen=True, slots=True)
class Record:
    """Where a sample lies in its shard: the byte span of its members, headers included."""

    key: str
    offset: int
    size: int


def write_shards(samples: Iterable[Sample], prefix: Path, samples_per_shard: int = 2000) -> list[Path]:
    """Write `PREFIX-000000.tar`, ... and return their paths.

    Each shard appears under its name only when it is complete, and its bytes depend on the samples alone.
    Shards of an earlier, longer set under the same prefix are removed, so that no stale sample is read with
    new ones. Raises ValueError for a key that is used twice or cannot name tar members.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    chunk: list[Sample] = []
    seen: set[str] = set()
    for sample in samples:
        _check_key(sample.key, seen)
        chunk.append(sample)
        if len(chunk) == samples_per_shard:
            paths.append(_write_shard(chunk, prefix, len(paths)))
            chunk = []
    if chunk:
        paths.append(_write_shard(chunk, prefix, len(paths)))
    for stale in set(prefix.parent.glob(glob.escape(prefix.name) + "-" + "[0-9]" * 6 + ".tar")) - set(paths):
        stale.unlink()
    return paths


def _check_key(key: str, seen: set[str]) -> None:
    if not key or "." in key or key.startswith("__") or key != key.strip("/"):
        raise ValueError(f"sample key {key!r} cannot name tar members: no dots, no outer slashes, no leading '__'")
    if key in seen:
        raise ValueError(f"sample key {key!r} is used twice; keys must be unique")
    seen.add(key)


def _write_shard(samples: list[Sample], prefix: Path, number: int) -> Path:
    path = prefix.with_name(f"{prefix.name}-{number:06d}.tar")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with (
            partial.open("wb") as stream,
            webdataset.TarWriter(stream, user=OWNER, group=OWNER, mode=0o644, mtime=0, encoder=False) as writer,
        ):
            for sample in samples:
                writer.write({"__key__": sample.key, **_members(sample)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _members(sample: Sample) -> dict[str, bytes]:
    """Extension -> bytes, the inverse of `parse_sample`."""
    fields: dict[str, Any] = {"messages": sample.messages}
    for name in ("answer", "difficulty", "source", "task"):
        if getattr(sample, name) not in (None, ""):
            fields[name] = getattr(sample, name)
    members = {"json": json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()}
    for number, data in enumerate(sample.images):
        suffix = next((suffix for magic, suffix in MAGIC_SUFFIXES if data.startswith(magic)), None)
        if suffix is None:
            raise SampleError("bad_image", sample.key, None, f"image {number} is neither PNG, JPEG nor WebP")
        members[f"{number}.{suffix}"] = data
    return members


def expand(shards: str | list[str]) -> list[Path]:
    """The shard files that paths with braces (`rl-{000..063}.tar`) and globs (`rl-*.tar`) stand for, sorted.

    Raises ValueError naming the first pattern that matches no file.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    if not patterns:
        raise ValueError("no shards given; set data.shards to a path, a brace pattern or a glob")
    found: set[Path] = set()
    for pattern in patterns:
        for name in braceexpand(pattern):
            path = Path(name).expanduser()
            # A literal file wins, so that a name with brackets in it needs no escaping.
            matches = [path] if path.is_file() else _matches(path)
            if not matches:
                raise ValueError(f"no shard matches '{path}' (from data.shards={pattern!r}); check the path")
            found.update(matches)
    return sorted(found)


def _matches(pattern: Path) -> list[Path]:
    """The files a glob stands for, in whichever part of the path the wildcards are."""
    relative = pattern.relative_to(pattern.anchor)
    return [path for path in Path(pattern.anchor).glob(str(relative)) if path.is_file()]


def scan_shard(path: Path, on_fault: Callable[[SampleError], None]) -> Iterator[Record]:
    """The samples of a shard in file order, without reading their contents.

    Faults (a truncated or damaged tar, a key that comes back later, a sample without `.json`) are handed to
    `on_fault`, and the scan goes on as far as it can: behind a damaged header it looks for the next sound
    one.
    """
    path = Path(path)
    seen: set[str] = set()
    for key, members in _groups(_walk(path, on_fault)):
        if key in seen:
            detail = "the key comes twice; its second part is left out"
            on_fault(SampleError("duplicate_key", key, str(path), detail))
        elif not any(extension == "json" for extension, _, _ in members):
            names = [extension for extension, _, _ in members]
            on_fault(SampleError("missing_member", key, str(path), f"no .json member, only {names}"))
        elif all(end >= 0 for _, _, end in members):  # a truncated member has been reported by the walk
            start, end = members[0][1], members[-1][2]
            yield Record(key, start, end - start)
        seen.add(key)


def read_sample(path: Path, offset: int, size: int) -> Sample:
    """The sample whose members lie in bytes `[offset, offset + size)` of a shard; one read.

    Raises SampleError when the span is cut short, is no sequence of tar members, or its sample is not sound.
    """
    with Path(path).open("rb") as stream:
        stream.seek(offset)
        span = stream.read(size)
    if len(span) != size:
        detail = f"{len(span)} of {size} bytes at offset {offset}; the shard has changed since it was indexed"
        raise SampleError("truncated_shard", "", str(path), detail)
    key, members = "", {}
    try:
        with tarfile.open(fileobj=io.BytesIO(span), mode="r:") as tar:
            for info in tar:
                key, extension = _split(info.name)
                stream_in = tar.extractfile(info)
                if stream_in is not None:
                    members[extension] = stream_in.read()
    except tarfile.TarError as error:
        detail = f"no tar members at offset {offset} ({error}); index the shard again"
        raise SampleError("bad_shard", key, str(path), detail) from error
    return parse_sample(key, members, str(path))


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member, cut at the first dot of the base name, as webdataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


Member = tuple[str, int, int]  # extension, offset of the header, end of the padded data (-1: beyond the file)


def _groups(members: Iterator[tuple[str, Member]]) -> Iterator[tuple[str, list[Member]]]:
    """Neighbouring members of one key, together."""
    current, group = "", list[Member]()
    for key, member in members:
        if group and key != current:
            yield current, group
            group = []
        current = key
        group.append(member)
    if group:
        yield current, group


def _walk(path: Path, on_fault: Callable[[SampleError], None]) -> Iterator[tuple[str, Member]]:
    """All regular members of a shard, over damaged headers, up to its end or the point where it was cut."""
    length, start = path.stat().st_size, 0
    with path.open("rb") as stream:
        while True:
            end = start
            for info in _sound_members(stream, start):
                end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                key, extension = _split(info.name)
                if info.offset_data + info.size > length:
                    detail = f"the shard ends at byte {length}, inside this sample; write or copy it again"
                    on_fault(SampleError("truncated_shard", key, str(path), detail))
                    yield key, (extension, info.offset, -1)
                    return
                if info.isfile() and extension and not key.rpartition("/")[2].startswith("__"):
                    yield key, (extension, info.offset, end)
            stream.seek(end)
            block = stream.read(BLOCK)
            if block == bytes(BLOCK):
                return
            if len(block) < BLOCK:
                detail = f"the shard ends at byte {length} without an end mark; later samples are lost"
                on_fault(SampleError("truncated_shard", "", str(path), detail))
                return
            on_fault(SampleError("bad_shard", "", str(path), f"damaged tar header at byte {end}"))
            start = _next_header(stream, end + BLOCK)


def _sound_members(stream: io.BufferedReader, start: int) -> Iterator[tarfile.TarInfo]:
    """Members from `start` on, up to the first thing that is no header."""
    stream.seek(start)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:  # closing it leaves `stream` open
            yield from tar
    except tarfile.ReadError:
        return  # the caller looks at the bytes behind the last member and says what is wrong there


def _next_header(stream: io.BufferedReader, start: int) -> int:
    """Offset of the next sound header (its checksum is right), of the end mark or of the end of the file."""
    stream.seek(start)
    while len(block := stream.read(BLOCK)) == BLOCK:
        if block == bytes(BLOCK):
            break
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            start += BLOCK
        else:
            break
    return start
