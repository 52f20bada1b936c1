"""Published chats on disk for the tests of `kimivl build`, and what is read back of the shards."""

import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kimivl.data.sample import Sample
from kimivl.data.shards import read_sample, scan_shard
from kimivl.data.storage import Storage

SHARD = 40_960  # bytes: a few of the samples below


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """A small noise image, encoded."""
    stream = io.BytesIO()
    noise = random.Random(seed).randbytes(32 * 32 * 3)
    Image.frombytes("RGB", (32, 32), noise).save(stream, kind)
    return stream.getvalue()


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def llava_row(number: int, image: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": f"é {number}"}]
    return {"id": str(number), "image": image, "conversations": turns}


def write_llava(folder: Path) -> Path:
    """60 sound rows, every third with a PNG or WebP image, in `llava.jsonl` beside `pictures`."""
    (folder / "pictures").mkdir()
    rows = []
    for number in range(60):
        kind = ("JPEG", "PNG", "WEBP")[number % 3]
        name = f"pictures/{number}.{kind.lower()}"
        (folder / name).write_bytes(picture(number, kind))
        rows.append(llava_row(number, name))
    return write_lines(folder / "llava.jsonl", rows)


def contents(folder: Path) -> dict[str, bytes]:
    """All that a build publishes; the manifest without what names the source."""
    assert not list(folder.glob(".*")), "something half-written is left"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"}


def read_all(folder: Path) -> list[Sample]:
    storage = Storage()
    samples = []
    for path in sorted(folder.glob("*.tar")):
        for record in scan_shard(storage, str(path), pytest.fail):
            samples.append(read_sample(storage, str(path), record.offset, record.size, key=record.key))
    return samples


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
