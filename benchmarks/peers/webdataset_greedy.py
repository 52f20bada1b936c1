"""Plain webdataset with a packer that looks ahead: what a careful user writes in an afternoon."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import partial

import webdataset

from benchmarks.workload import Workload
from kimivl.data.pack import EncodedSample, PackedBatch, pack_samples
from kimivl.data.sample import parse_sample
from kimivl.data.shards import expand

SHUFFLE = 500
"""Encoded samples that wait to be shuffled; the packer looks at as many again."""


def packs(workload: Workload) -> Iterator[PackedBatch]:
    """One epoch. Nothing is resumable, and the number of packs is not known before the end."""
    shards = expand(workload.data.shards)
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(SHUFFLE, rng=random.Random(0))
    dataset = dataset.map(partial(encode, workload)).compose(partial(look_ahead, max_length=workload.max_length))
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=workload.workers)


def encode(workload: Workload, raw: dict[str, bytes]) -> EncodedSample:
    """A sample of webdataset's (extension -> bytes) as tensors."""
    members = {name: data for name, data in raw.items() if not name.startswith("__")}
    return workload.encoder.encode(parse_sample(str(raw["__key__"]), members, check_images=False))


def look_ahead(samples: Iterable[EncodedSample], max_length: int) -> Iterator[PackedBatch]:
    """Fill one pack after the other from a buffer of samples, the longest that fits first."""
    buffer: list[EncodedSample] = []
    for sample in samples:
        buffer.append(sample)
        if len(buffer) == SHUFFLE:
            yield pack_samples(take_greedily(buffer, max_length))
    while buffer:
        yield pack_samples(take_greedily(buffer, max_length))


def take_greedily(buffer: list[EncodedSample], max_length: int) -> list[EncodedSample]:
    """Take out of ``buffer`` the samples of one pack; the buffer is left sorted by length."""
    buffer.sort(key=len)
    chosen: list[EncodedSample] = []
    room = max_length
    while place := bisect_right(buffer, room, key=len):
        sample = buffer.pop(place - 1)
        room -= len(sample)
        chosen.append(sample)
    if not chosen:
        raise ValueError(f"a sample of {len(buffer[0])} tokens is longer than a pack of {max_length}")
    return chosen
