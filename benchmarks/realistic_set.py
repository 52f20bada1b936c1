"""A shard set like those that Kimi-VL is trained on: photographs, long-tailed texts, a tokenizer. It needs no network.

Photographs are crops of scikit-learn's two sample pictures, laid out as an endless mirrored tiling so that a crop of
any size has the grain of a camera, and rescaled by up to a half. Texts are passages of the Python documentation and
of the standard library's sources. Everything follows from the number of samples.
"""

from __future__ import annotations

import base64
import io
import json
import pydoc_data.topics
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kimivl.data.sample import Sample
from kimivl.data.shards import write_shards
from kimivl.model.tokenizer import train_tokenizer

FORMAT = 2
RANKS = 32_768
TEXT_ONLY = 0.36
"""Share of samples without a picture; they are long, and hold about half of all tokens."""
MIN_SIDE, MAX_SIDE = 224, 2000


@dataclass(frozen=True, slots=True)
class RealisticSet:
    """Where the set lies: tars under ``shards``, the ranks of the tokenizer under ``tokenizer``."""

    folder: Path
    samples: int
    images: int
    image_bytes: int
    megapixels: float

    @property
    def shards(self) -> str:
        """The set as a glob."""
        return str(self.folder / "shards" / "set-*.tar")

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"


def realistic_set(folder: Path, samples: int, shards: int = 32) -> RealisticSet:
    """The set of so many samples under ``folder``, made at the first call (minutes for thousands of samples)."""
    folder = folder.resolve() / f"set-{FORMAT}-{samples}"
    card = folder / "set.json"
    if not card.is_file():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _write(partial, samples, shards)
        partial.replace(folder)
    return RealisticSet(folder=folder, **json.loads(card.read_text()))


def _write(folder: Path, samples: int, shards: int) -> None:
    corpus = _Corpus()
    _write_ranks(corpus.texts, folder / "tokenizer")
    photographs = _Photographs()
    write_shards(_samples(samples, corpus, photographs), folder / "shards" / "set", -(-samples // shards))
    (folder / "set.json").write_text(json.dumps({"samples": samples, **asdict(photographs.made)}, indent=1))


def _samples(count: int, corpus: _Corpus, photographs: _Photographs) -> Iterator[Sample]:
    for number in range(count):
        draw = np.random.default_rng([FORMAT, number])
        text_only = draw.random() < TEXT_ONLY
        pictures = 0 if text_only else min(8, 1 + draw.geometric(0.75) - (draw.random() < 0.2))
        words = int(np.clip(draw.lognormal(6.9 if text_only else 4.4, 0.9), 8, 9_000))
        question, answer = corpus.passage(draw, max(4, words // 5)), corpus.passage(draw, words)
        parts = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        yield Sample(
            key=f"sample-{number:06d}",
            messages=[
                {"role": "user", "content": parts},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            images=tuple(photographs.take(draw) for _ in range(pictures)),
            source="text" if text_only else "photographs",
        )


class _Corpus:
    """Prose and code that every Python has at hand."""

    def __init__(self) -> None:
        sources = sorted(Path(io.__file__).parent.glob("*.py"))
        self.texts = [*pydoc_data.topics.topics.values(), *(source.read_text("utf-8") for source in sources)]

    @cached_property
    def words(self) -> list[str]:
        """All texts cut into words, each with the white space behind it."""
        pieces = (text.replace("\n", " \n").split(" ") for text in self.texts)
        return [word for piece in pieces for word in piece if word]

    def passage(self, draw: np.random.Generator, words: int) -> str:
        """A run of words that begins anywhere."""
        start = int(draw.integers(len(self.words) - words))
        return " ".join(self.words[start : start + words]).strip() or "nothing"


@dataclass(slots=True)
class _Made:
    images: int = 0
    image_bytes: int = 0
    megapixels: float = 0.0


class _Photographs:
    """Crops of two photographs, encoded: JPEG for the most part, some WebP, some small PNG."""

    def __init__(self) -> None:
        self.canvases = [Image.fromarray(_mirrored(picture)) for picture in load_sample_images().images]
        self.made = _Made()

    def take(self, draw: np.random.Generator) -> bytes:
        """One encoded photograph."""
        width, height, scale = self._shape(draw)
        canvas = self.canvases[draw.integers(len(self.canvases))]
        x, y = (draw.uniform(0, room - side * scale) for room, side in zip(canvas.size, (width, height), strict=True))
        box = (x, y, x + width * scale, y + height * scale)
        picture = canvas.resize((width, height), Image.Resampling.BILINEAR, box)
        data = _encode(picture, draw)
        self.made.images += 1
        self.made.image_bytes += len(data)
        self.made.megapixels += width * height / 1e6
        return data

    def _shape(self, draw: np.random.Generator) -> tuple[int, int, float]:
        """Width, height, and how many pixels of the canvas one pixel takes."""
        longer = int(np.exp(draw.uniform(np.log(MIN_SIDE), np.log(MAX_SIDE))))
        shorter = max(MIN_SIDE, int(longer * draw.choice([9 / 16, 2 / 3, 3 / 4, 1.0], p=[0.2, 0.3, 0.35, 0.15])))
        width, height = (longer, shorter) if draw.random() < 0.7 else (shorter, longer)
        return width, height, float(draw.uniform(0.67, 1.2))


def _mirrored(picture: np.ndarray) -> np.ndarray:
    """The picture and its mirror images side by side until every crop has room."""
    tile = np.concatenate([picture, picture[:, ::-1]], axis=1)
    tile = np.concatenate([tile, tile[::-1]], axis=0)
    repeats = [-(-int(MAX_SIDE * 1.3) // side) for side in tile.shape[:2]]
    return np.tile(tile, (*repeats, 1))


def _encode(picture: Image.Image, draw: np.random.Generator) -> bytes:
    quality, kind = int(draw.integers(75, 96)), draw.random()
    if kind < 0.94:
        return bytes(simplejpeg.encode_jpeg(np.asarray(picture), quality=quality, colorsubsampling="420"))
    stream = io.BytesIO()
    if kind < 0.97:
        picture.save(stream, "WEBP", quality=quality, method=1)
    else:
        picture.thumbnail((512, 512))
        picture.save(stream, "PNG", compress_level=3)
    return stream.getvalue()


def _write_ranks(texts: list[str], folder: Path) -> None:
    """Train a BPE and write it as ``tiktoken.model``, the official format: base64 of a token, its rank."""
    trained = train_tokenizer(texts, RANKS)
    special = trained.get_added_vocab()
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ranked = sorted((rank, token) for token, rank in trained.get_vocab().items() if token not in special)
    lines = [b"%s %d" % (base64.b64encode(bytes(letters[letter] for letter in token)), rank) for rank, token in ranked]
    folder.mkdir(parents=True)
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
