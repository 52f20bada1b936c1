"""From a row to a sample: keys, images found under their root, checks. What it refuses carries a reason.

Reasons beside those of `parse_sample`: unknown_shape, remote_image, outside_root, missing_member, io_error, too_large.
"""

import errno
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from kimivl.data.build.shapes import Draft, Reference, Refusal, draft
from kimivl.data.build.sources import Row, RowFile
from kimivl.data.sample import Sample, SampleError, parse_sample
from kimivl.data.shards import MAGIC_SUFFIXES, MAX_SAMPLE_BYTES
from kimivl.data.tar import BLOCK

NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


@dataclass(frozen=True, slots=True)
class Converter:
    """Turns rows into samples. Picklable, so that worker processes can carry it.

    Args:
        images: the resolved folder below which every image path must lie.
        source_name: the `source` of samples whose row names none.
    """

    images: Path
    source_name: str = ""

    def size(self, row: Row, file: RowFile) -> int:
        """Bytes of the row's members in a tar, headers included, without reading its images. Raises SampleError."""
        try:
            return self._drafted(row)[2]
        except Refusal as refusal:
            raise SampleError(refusal.reason, sample_key(row, file), file.name, refusal.detail) from refusal

    def sample(self, row: Row, file: RowFile) -> Sample:
        """The row's sample with its images, checked by `parse_sample`. Raises SampleError."""
        key = sample_key(row, file)
        try:
            images, text, _ = self._drafted(row)
            members = {"json": text}
            for number, image in enumerate(images):
                data = self._read(image)
                members[f"{number}.{_suffix(data, number)}"] = data
        except Refusal as refusal:
            raise SampleError(refusal.reason, key, file.name, refusal.detail) from refusal
        return parse_sample(key, members, file.name)

    def _drafted(self, row: Row) -> tuple[list[Reference], bytes, int]:
        """The row's images and JSON member, and the bytes of all members in a tar."""
        if row.fields is None:
            raise Refusal("bad_json", row.fault)
        chat = draft(row.fields, self.source_name)
        text = _json_member(chat)
        total = _member_bytes(len(text))
        for image in chat.images:
            total += _member_bytes(len(image) if isinstance(image, bytes) else self._find(image)[1])
        if total > MAX_SAMPLE_BYTES:
            raise Refusal("too_large", f"the sample has {total} bytes, more than {MAX_SAMPLE_BYTES}; make it smaller")
        return chat.images, text, total

    def _find(self, reference: str) -> tuple[str, int]:
        """Real path and size in bytes of an image, which must be a file below the root, links followed."""
        root = os.fspath(self.images)
        if "\0" in reference:
            raise Refusal("missing_member", f"the image path {reference!r:.120} has a zero byte")
        path = os.path.realpath(os.path.join(root, reference))  # noqa: PTH118 (an absolute reference stays itself)
        if not path.startswith(root.rstrip(os.sep) + os.sep):
            raise Refusal("outside_root", f"the image {reference:.200} lies outside of {root}; set --images or move it")
        try:
            status = os.stat(path)  # noqa: PTH116 (once per image: Path objects would double the time)
        except OSError as error:
            raise _unread(reference, root, error) from error
        if not stat.S_ISREG(status.st_mode):
            raise Refusal("missing_member", f"the image {reference:.200} is not a file below {root}")
        return path, status.st_size

    def _read(self, image: Reference) -> bytes:
        if isinstance(image, bytes):
            return image
        try:
            return Path(self._find(image)[0]).read_bytes()
        except OSError as error:
            raise _unread(image, os.fspath(self.images), error) from error


def sample_key(row: Row, file: RowFile) -> str:
    """The key of a row's sample: the same in every build, different for every row."""
    return f"{file.slug}-{row.number:09d}"


def _unread(reference: str, root: str, error: OSError) -> Refusal:
    reason = "missing_member" if error.errno in NO_FILE else "io_error"
    return Refusal(reason, f"the image {reference:.200} cannot be read below {root}: {error.strerror}")


def _json_member(chat: Draft) -> bytes:
    """The JSON member; `shards` writes the same number of bytes, so that sizes are known before."""
    try:
        return json.dumps(chat.fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        detail = "the text has a lone surrogate (half of a character) or bytes that are not UTF-8"
        raise Refusal("bad_json", detail) from error
    except TypeError as error:
        raise Refusal("bad_json", f"a field is no JSON value: {error}") from error


def _member_bytes(size: int) -> int:
    """A member of a tar: its header and its data, padded to blocks."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def _suffix(data: bytes, number: int) -> str:
    for magic, suffix in MAGIC_SUFFIXES:
        if data.startswith(magic):
            return suffix
    raise Refusal("bad_image", f"image {number} ({len(data)} bytes) is neither PNG, JPEG nor WebP; convert it")
