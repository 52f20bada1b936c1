"""Pixels are Pillow's, and no damage goes unnoticed, unnamed or unbounded."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from kimivl.data.images import MAX_PIXELS, decode_image, image_size
from kimivl.data.sample import SampleError


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).resize((321, 215))


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def jpegs(image: Image.Image) -> dict[str, bytes]:
    return {
        "ordinary": saved(image, "JPEG", quality=90),
        "4:4:4": saved(image, "JPEG", subsampling=0),
        "4:2:2": saved(image, "JPEG", subsampling=1),
        "progressive": saved(image, "JPEG", progressive=True),
        "greyscale": saved(image.convert("L"), "JPEG"),
        "rgb": saved(image, "JPEG", keep_rgb=True),
        "restarts": saved(image, "JPEG", restart_marker_rows=1),
        "cmyk": saved(image.convert("CMYK"), "JPEG"),
        "rotated": saved(image, "JPEG", exif=rotated_exif()),
    }


def rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    return exif


def others(image: Image.Image) -> dict[str, bytes]:
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return {
        "png": saved(image, "PNG"),
        "rgba": saved(image.convert("RGBA"), "PNG"),
        "palette": saved(palette, "PNG", transparency=3),
        "16 bits": saved(deep, "PNG"),
        "1 bit": saved(image.convert("1"), "PNG"),
        "webp": saved(image, "WEBP"),
        "webp lossless": saved(image, "WEBP", lossless=True),
        "gif": saved(image, "GIF"),
    }


def every(image: Image.Image) -> dict[str, bytes]:
    return jpegs(image) | others(image)


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"\x00\x00\x00\x00IEND\xaeB`\x82"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + end


def fault_of(data: bytes) -> SampleError:
    with pytest.raises(SampleError, match="key-7.*some.tar") as caught:
        decode_image(data, "key-7", "some.tar")
    assert caught.value.reason == "bad_image"
    return caught.value


def test_pixels_are_those_of_pillow(photograph):
    for name, data in every(photograph).items():
        pixels = decode_image(data, "key")
        assert pixels.dtype == np.uint8 and pixels.flags.writeable, name
        assert np.array_equal(pixels, by_pillow(data)), name


def test_the_size_is_that_of_the_pixels(photograph):
    for name, data in every(photograph).items():
        assert image_size(data, "key") == (321, 215) == decode_image(data, "key").shape[1::-1], name


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (16, 16), (33, 17)])
def test_odd_sizes(photograph, size):
    for name, data in jpegs(photograph.resize(size)).items():
        assert np.array_equal(decode_image(data, "key"), by_pillow(data)), name


def test_a_file_cut_anywhere_is_refused(photograph):
    small = photograph.resize((61, 47))
    for data in every(small).values():
        ends = {*range(0, len(data), max(1, len(data) // 40)), len(data) - 1, len(data) - 2}
        for end in sorted(ends):
            fault_of(data[:end])


def test_flipped_bytes_never_raise_anything_else(photograph):
    rng = np.random.default_rng(0)
    for name, data in every(photograph.resize((40, 30))).items():
        for place in rng.integers(0, min(len(data), 700), 150):
            damaged = bytearray(data)
            damaged[place] ^= int(rng.integers(1, 256))
            try:
                pixels = decode_image(bytes(damaged), "key")
            except SampleError as fault:
                assert fault.reason == "bad_image", name
            else:
                assert pixels.ndim == 3 and pixels.shape[2] == 3, name


def test_a_jpeg_that_pillow_would_fill_up_with_grey_is_refused(photograph):
    for file in (saved(photograph, "JPEG", quality=90), jpegs(photograph)["progressive"], jpegs(photograph)["cmyk"]):
        middle = len(file) // 2
        damaged = file[:middle] + bytes(40) + file[middle + 500 :]
        assert by_pillow(damaged).shape == (215, 321, 3)
        fault_of(damaged)


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP", b"<svg/>", bytes(1000)],
)
def test_what_is_no_picture_is_refused(data):
    fault_of(data)
    with pytest.raises(SampleError, match="key-7"):
        image_size(data, "key-7")


def test_formats_that_start_other_programs_are_not_opened(photograph):
    for file_format in ("EPS", "TIFF", "PPM"):
        fault_of(saved(photograph, file_format))


@pytest.mark.parametrize("size", [(0, 10), (10, 0)])
def test_no_pixels(size):
    fault_of(png_header(*size))


@pytest.mark.parametrize("size", [(9_000, 9_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (MAX_PIXELS + 1, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(size):
    fault_of(png_header(*size))
    with pytest.raises(SampleError, match="pixels"):
        image_size(png_header(*size), "key")


def test_a_jpeg_bomb_is_refused_by_its_header(photograph):
    data = saved(photograph, "JPEG")
    frame = data.index(b"\xff\xc0") + 5
    fault = fault_of(data[:frame] + struct.pack(">HH", 65_000, 65_000) + data[frame + 4 :])
    assert "65000x65000" in str(fault)


def test_trailing_bytes_are_no_damage(photograph):
    for file_format in ("JPEG", "PNG"):
        data = saved(photograph, file_format)
        assert np.array_equal(decode_image(data + bytes(100), "key"), by_pillow(data))
