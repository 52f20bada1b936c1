"""Image bytes to pixels, with the faults named and the memory bounded.

JPEGs go through simplejpeg, which is faster than Pillow, gives the same pixels and refuses files that Pillow would fill
up with grey. All else goes through Pillow. Pictures are not turned by their EXIF orientation, as the official processor
does not turn them.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

from kimivl.data.sample import SampleError

MAX_PIXELS = 64_000_000
"""Pictures above this are refused before they are decoded: a few kilobytes of PNG can ask for gigabytes."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What Pillow may open. It knows formats that start other programs or read other files."""

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG", b"IEND\xaeB`\x82"
_PLAIN_COLOURS = ("YCbCr", "Gray", "RGB")
"""Colour spaces of JPEGs that simplejpeg decodes to RGB as Pillow does."""


def image_size(data: bytes, key: str, shard: str | None = None) -> tuple[int, int]:
    """(width, height) in pixels, read from the header; nothing is decoded.

    Raises:
        SampleError: reason ``bad_image``, when the bytes are no picture of a known format, or the picture has more than
            ``MAX_PIXELS``.
    """
    try:
        return _header(data)[:2]
    except Exception as error:
        raise _named(error, key, shard) from error


def decode_image(data: bytes, key: str, shard: str | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB pixels of one picture.

    Raises:
        SampleError: reason ``bad_image``, when the bytes are no picture, are damaged or cut short, or the picture has
            more than ``MAX_PIXELS``.
    """
    try:
        _, _, colours = _header(data)
        if colours in _PLAIN_COLOURS:
            return simplejpeg.decode_jpeg(data, "RGB")
        return _by_pillow(data, colours)
    except Exception as error:
        raise _named(error, key, shard) from error


def _header(data: bytes) -> tuple[int, int, str]:
    """Width, height, and the colour space of a JPEG that simplejpeg can read (empty otherwise)."""
    colours = ""
    if data.startswith(_JPEG_START):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:  # an unusual subsampling, or damage: Pillow tells which
            width, height = _size_by_pillow(data)
    else:
        width, height = _size_by_pillow(data)
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it has {width}x{height} pixels; there must be 1 to {MAX_PIXELS}")
    return width, height, colours


def _size_by_pillow(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.size


def _by_pillow(data: bytes, colours: str) -> np.ndarray:
    if colours:
        simplejpeg.decode_jpeg(data, "CMYK")  # raises where Pillow would fill up with grey
    _check_end(data)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return np.array(image.convert("RGB"))  # a copy: torch wants arrays that may be written


def _check_end(data: bytes) -> None:
    """Pillow forgives a file that ends early, if only its last bytes are missing."""
    if data.startswith(_JPEG_START) and data.rfind(_JPEG_END) < 0:
        raise ValueError("it is a JPEG without its end mark (truncated)")
    if data.startswith(_PNG_START) and data.rfind(_PNG_END) < 0:
        raise ValueError("it is a PNG without its end mark (truncated)")
    if data.startswith(b"GIF8") and not data.rstrip(b"\0").endswith(b";"):
        raise ValueError("it is a GIF without its end mark (truncated)")
    if data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise ValueError("it is a WebP cut short")


def _named(error: Exception, key: str, shard: str | None) -> SampleError:
    """On damaged files the decoders raise nearly anything, struct.error and zlib.error too."""
    return SampleError("bad_image", key, shard, f"the image does not decode: {error}")
