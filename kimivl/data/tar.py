"""Tar headers, read fast where they are plain, and by `tarfile` where they are not (long names, other kinds).

A shard has two or three members a sample, and `tarfile` costs more than everything else that is done to find one.
"""

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512  # bytes of a tar block; headers and member data start at multiples of it
END_MARK = bytes(BLOCK)
MAX_EXTENSION = 2**20  # bytes of a header that holds a long name or attributes; more is damage
PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
GNU = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: bytes `[start, end)`, its headers and padding included; `whole`: not cut off."""

    name: str
    start: int
    end: int
    whole: bool = True


def plain_header(header: bytes) -> tuple[str, int] | None:
    """Name and size (bytes) of a regular file, from a sound header of the common kind; None for any other one."""
    checksum, size = header[148:156], header[124:136].strip(b" \0")
    if len(header) != BLOCK or header[156] not in b"0\0" or not size.isdigit():
        return None
    try:
        written = header.translate(None, b"\0")  # a header is nearly all zeros, and adding them up is slow
        if int(checksum.strip(b" \0"), 8) != sum(written) - sum(checksum) + 8 * 0x20:
            return None
        length = int(size, 8)
    except ValueError:
        return None
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    if name.endswith(b"/"):
        return None
    path = prefix + b"/" + name if prefix else name
    return path.decode("utf-8", "surrogateescape"), length


def read_members(span: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of the regular files in a piece of a tar, from one header to the end of a member.

    Raises tarfile.TarError when the bytes are anything else.
    """
    found, position = [], 0
    while position < len(span):
        plain = plain_header(span[position : position + BLOCK])
        if plain is None:
            return _read_with_tarfile(span)
        name, size = plain
        data = span[position + BLOCK : position + BLOCK + size]
        if len(data) != size:
            raise tarfile.ReadError(f"the member {name!r} is cut off")
        found.append((name, data))
        position += BLOCK + _padded(size)
    return found


def _read_with_tarfile(span: bytes) -> list[tuple[str, bytes]]:
    found = []
    with tarfile.open(fileobj=io.BytesIO(span), mode="r:") as tar:
        for info in tar:
            stream = tar.extractfile(info) if info.isreg() else None
            if stream is not None:
                found.append((info.name, stream.read()))
        if tar.offset != len(span):  # tarfile takes a damaged header that is not the first one for the end
            raise tarfile.ReadError(f"no header at byte {tar.offset} of {len(span)}")
    return found


def walk(stream: BinaryIO, length: int, on_fault: Callable[[str, str, str], None]) -> Iterator[Member]:
    """All regular files of a tar of `length` bytes, over damaged headers, up to its end or where it was cut.

    `on_fault` is called with a reason (bad_shard, truncated_shard), the name of a member or "", and a detail.
    """
    position = 0
    while True:
        stream.seek(position)
        header = stream.read(BLOCK)
        if header == END_MARK:
            return
        if len(header) < BLOCK:
            detail = f"the shard ends at byte {length} without an end mark; later samples are lost"
            on_fault("truncated_shard", "", detail)
            return
        plain = plain_header(header)
        member, end = _plain_member(plain, position) if plain else _special_member(stream, header, position)
        if end < 0:
            on_fault("bad_shard", "", f"damaged tar header at byte {position}")
            position = _next_header(stream, position + BLOCK)
        elif end > length:
            name = member.name if member else ""
            detail = f"the shard ends at byte {length}, inside this sample; write or copy it again"
            on_fault("truncated_shard", name, detail)
            if member:
                yield Member(name, member.start, length, whole=False)
            return
        else:
            if member:
                yield member
            position = end


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _plain_member(plain: tuple[str, int], position: int) -> tuple[Member | None, int]:
    end = position + BLOCK + _padded(plain[1])
    return Member(plain[0], position, end), end


def _special_member(stream: BinaryIO, header: bytes, position: int) -> tuple[Member | None, int]:
    """The member that begins with an uncommon header, None if it is no regular file, and its end (-1: damaged)."""
    try:
        first = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if first.type in (*PAX, *GNU) and first.size > MAX_EXTENSION:
            return None, -1
        stream.seek(position)
        with tarfile.open(fileobj=stream, mode="r:") as tar:  # closing it leaves `stream` open
            info, end = tar.next(), tar.offset
    except (tarfile.TarError, ValueError, OverflowError):  # numbers in extended headers are parsed unguarded
        return None, -1
    if info is None or end <= position:
        return None, -1
    return (Member(info.name, info.offset, end) if info.isreg() else None), end


def _next_header(stream: BinaryIO, start: int) -> int:
    """Offset of the next sound header (its checksum is right), of the end mark or of the end of the file."""
    stream.seek(start)
    while len(block := stream.read(BLOCK)) == BLOCK:
        if block == END_MARK or _is_header(block):
            break
        start += BLOCK
    return start


def _is_header(block: bytes) -> bool:
    if not block[148:156].strip(b" \0").isdigit():  # quick, for megabytes of image data
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
