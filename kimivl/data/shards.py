"""WebDataset shards: plain tar files of `KEY.json`, `KEY.0.png`, ... with a sample's members side by side.

Shards are written with webdataset and can be read with it. They are indexed with one scan and read by byte
range, because a planned epoch asks for samples in any order.
"""

import glob
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from kimivl.data.sample import JPEG_START, Sample, SampleError, parse_sample
from kimivl.data.storage import Storage, is_remote, local_path
from kimivl.data.tar import Member, read_members, walk

MAX_SAMPLE_BYTES = 2**30  # a sample is read whole, and this is what it may cost
LOOKUPS = 16  # names that are looked up at a time
OWNER = "kimivl"
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # what is left of bytes in a name that are no UTF-8
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
            paths.append(_write_numbered(chunk, prefix, len(paths)))
            chunk = []
    if chunk:
        paths.append(_write_numbered(chunk, prefix, len(paths)))
    for stale in set(prefix.parent.glob(glob.escape(prefix.name) + "-" + "[0-9]" * 6 + ".tar")) - set(paths):
        stale.unlink()
    return paths


def _write_numbered(samples: list[Sample], prefix: Path, number: int) -> Path:
    path = prefix.with_name(f"{prefix.name}-{number:06d}.tar")
    write_shard(samples, path)
    return path


def write_shard(samples: Iterable[Sample], path: Path) -> None:
    """Write one shard; it appears under its name when it is complete, and its bytes depend on the samples alone.

    Raises ValueError for a key that is used twice or cannot name tar members, SampleError for an image of a format
    that shards do not hold.
    """
    import webdataset  # here, because it brings torch along, which readers of shards can do without

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    seen: set[str] = set()
    try:
        with (
            partial.open("wb") as stream,
            webdataset.TarWriter(stream, user=OWNER, group=OWNER, mode=0o644, mtime=0, encoder=False) as writer,
        ):
            for sample in samples:
                _check_key(sample.key, seen)
                writer.write({"__key__": sample.key, **_members(sample)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_key(key: str, seen: set[str]) -> None:
    if not key or "." in key or key.startswith("__") or key != key.strip("/"):
        raise ValueError(f"sample key {key!r} cannot name tar members: no dots, no outer slashes, no leading '__'")
    if key in seen:
        raise ValueError(f"sample key {key!r} is used twice; keys must be unique")
    seen.add(key)


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


def expand(shards: str | list[str], storage: Storage | None = None) -> list[str]:
    """The shards that paths and URLs stand for, sorted: braces (`rl-{000..063}.tar`), globs (`rl-*.tar`), folders.

    A folder means the `.tar` files in it; a path becomes absolute, and a file that is named twice is taken once. Raises
    ValueError naming the first pattern that matches no file or cannot be looked up.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    if not patterns:
        raise ValueError("no shards given; set data.shards to a path, a URL, a brace pattern or a glob")
    storage = storage or Storage()
    named = [(name, pattern) for pattern in patterns for name in _braces(pattern)]
    found: dict[str, str] = {}  # what it is -> its name
    with ThreadPoolExecutor(LOOKUPS) as pool:  # a set of a thousand URLs is a thousand questions to a server
        for (name, pattern), matches in zip(
            named, pool.map(lambda pair: _looked_up(storage, *pair), named), strict=True
        ):
            if not matches:
                raise ValueError(f"no shard matches '{name}' (from data.shards={pattern!r}); check the path")
            for match in matches:
                found.setdefault(match if is_remote(match) else str(Path(match).resolve()), match)
    return sorted(found.values())


def _looked_up(storage: Storage, name: str, pattern: str) -> list[str]:
    try:
        return _matches(name, storage)
    except OSError as error:
        raise ValueError(f"data.shards={pattern!r}: {error}; check the address, or try again later") from error


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"data.shards={pattern!r} has unbalanced braces; write '\\{{' for a literal one") from error


def _matches(name: str, storage: Storage) -> list[str]:
    """The files that a path or URL without braces stands for."""
    if is_remote(name):
        return storage.matches(name)
    path = local_path(name).absolute()
    if path.is_file():  # a literal file wins, so that a name with brackets in it needs no escaping
        return [str(path)]
    folder, pattern = (path, "*.tar") if path.is_dir() else (Path(path.anchor), str(path.relative_to(path.anchor)))
    return [str(match) for match in folder.glob(pattern) if match.is_file()]


def scan_shard(storage: Storage, shard: str, on_fault: Callable[[SampleError], None]) -> Iterator[Record]:
    """The samples of a shard in file order, without reading their contents.

    Faults are handed to `on_fault`, and the scan goes on as far as it can: a truncated or damaged tar (behind a
    damaged header it looks for the next sound one), a key that comes back later, a sample without `.json` or above
    `MAX_SAMPLE_BYTES`, a shard that cannot be read (any more).
    """
    try:
        with storage.open(shard) as stream:
            length = stream.seek(0, os.SEEK_END)

            def report(reason: str, name: str, detail: str) -> None:
                on_fault(SampleError(reason, (_split(name) or ("",))[0], shard, detail))

            yield from _records(_groups(walk(stream, length, report)), shard, on_fault)
    except OSError as error:
        on_fault(SampleError("io_error", "", shard, f"the rest of the shard cannot be read: {error}"))


def _records(
    groups: Iterator[tuple[str, list[tuple[str, Member]]]], shard: str, on_fault: Callable[[SampleError], None]
) -> Iterator[Record]:
    """The groups of members that can be a sample; the others are told."""
    seen: set[str] = set()
    for key, members in groups:
        extensions, start, end = [extension for extension, _ in members], members[0][1].start, members[-1][1].end
        if _SURROGATE.search(key):
            readable = key.encode("utf-8", "backslashreplace").decode()
            on_fault(SampleError("bad_shard", readable, shard, "the names of its members are not UTF-8"))
        elif key in seen:
            on_fault(SampleError("duplicate_key", key, shard, "the key comes twice; its second part is left out"))
        elif not all(member.whole for _, member in members):
            pass  # the walk has told of the member that is cut
        elif "json" not in extensions:
            on_fault(SampleError("missing_member", key, shard, f"no .json member, only {extensions}"))
        elif end - start > MAX_SAMPLE_BYTES:
            detail = f"{end - start} bytes, more than the {MAX_SAMPLE_BYTES} that a sample may have"
            on_fault(SampleError("too_large", key, shard, detail))
        else:
            yield Record(key, start, end - start)
        seen.add(key)


def _groups(members: Iterable[Member]) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
    """Neighbouring members of one key, with their extensions; members that belong to no sample are left out."""
    named = ((place, member) for member in members if (place := _split(member.name)))
    for key, group in itertools.groupby(named, key=lambda pair: pair[0][0]):
        yield key, [(extension, member) for (_, extension), member in group]


def _split(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, cut at the first dot of the base name as webdataset does; None: no sample's."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return None if not extension or stem.startswith("__") else (folder + slash + stem, extension.lower())


def parse_span(span: bytes, shard: str, *, check_images: bool = True) -> Sample:
    """The sample whose tar members are the bytes `span`, as `scan_shard` found it.

    Raises SampleError when the span is no sequence of tar members, or its sample is not sound.
    """
    key, members = "", dict[str, bytes]()
    try:
        for name, data in read_members(span):
            place = _split(name)
            if place is None:
                continue
            key, extension = place
            if extension in members:
                raise SampleError("duplicate_key", key, shard, f"two members are named .{extension}")
            members[extension] = data
    except tarfile.TarError as error:
        detail = f"these bytes are no tar members ({error}); index the shard again"
        raise SampleError("bad_shard", key, shard, detail) from error
    return parse_sample(key, members, shard, check_images=check_images)


def read_sample(
    storage: Storage, shard: str, offset: int, size: int, crc32: int | None = None, key: str = ""
) -> Sample:
    """The sample in bytes `[offset, offset + size)` of a shard; one read.

    With the `crc32` that the span had when it was indexed, its images are not looked at again. `key` names the
    sample in errors. Raises SampleError: io_error (the shard cannot be read), truncated_shard or bad_shard (it has
    changed since it was indexed), or what `parse_span` finds.
    """
    try:
        span = storage.read(shard, offset, size)
    except OSError as error:
        raise SampleError("io_error", key, shard, f"{error}") from error
    if len(span) != size:
        detail = f"{len(span)} of {size} bytes at offset {offset}; the shard has changed since it was indexed"
        raise SampleError("truncated_shard", key, shard, detail)
    if crc32 is not None and zlib.crc32(span) != crc32:
        detail = f"the {size} bytes at offset {offset} have changed since the shard was indexed; index it again"
        raise SampleError("bad_shard", key, shard, detail)
    return parse_span(span, shard, check_images=crc32 is None)
