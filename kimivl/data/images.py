"""Image bytes to pictures, with the faults named and the memory bounded."""

from __future__ import annotations

import io

from PIL import Image

from kimivl.data.sample import SampleError

MAX_PIXELS = 64_000_000
"""Pictures above this are refused before they are decoded: a few kilobytes of PNG can ask for gigabytes."""


def decode_image(data: bytes, key: str, shard: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one picture to RGB.

    Raises:
        SampleError: reason ``bad_image``, when the bytes are no picture, are cut short, or the picture has more
            than ``max_pixels``.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise SampleError(
                    "bad_image", key, shard, f"the image has {width}x{height} pixels, more than {max_pixels}"
                )
            return image.convert("RGB")
    except SampleError:
        raise
    except Exception as error:  # on damaged files the decoders raise nearly anything, struct.error and zlib.error too
        raise SampleError("bad_image", key, shard, f"the image does not decode: {error}") from error
