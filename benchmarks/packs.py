"""Packs for the benchmarks of a training step: ready-made ones in memory, and those of the real data path.

Ready-made packs look like SFT data and cost nothing to load: lognormal lengths with a median of 200 tokens, two thirds
of a sample supervised, and on request pictures whose sizes are those of photographs while their pixels are noise (no
kernel is faster for a prettier picture). Every pack is full to the last token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks.realistic_set import MAX_SIDE, MIN_SIDE, RealisticSet
from benchmarks.workload import Workload
from kimivl.data.loader import PackLoader
from kimivl.data.pack import IGNORE, EncodedSample, PackedBatch, pack_samples
from kimivl.data.plan import plan_epoch
from kimivl.data.scan import build_index
from kimivl.data.shards import expand
from kimivl.data.storage import Storage
from kimivl.model import KimiVLConfig, KimiVLImageProcessor

MEDIAN, SIGMA, SHORTEST = 200, 1.0, 16
"""Of the lengths of texts, in tokens."""
PICTURED = 0.64
"""Share of samples with a picture, where packs have pictures at all."""


def ready_packs(config: KimiVLConfig, length: int, pictures: bool, count: int, seed: int = 0) -> list[PackedBatch]:
    """``count`` packs of ``length`` tokens, the packs of one optimiser step; the same for the same arguments."""
    drawn = [_samples(config, length, pictures, np.random.default_rng([seed, number])) for number in range(count)]
    targets = sum(sample.num_targets for samples in drawn for sample in samples)
    return [pack_samples(samples, targets) for samples in drawn]


def _samples(config: KimiVLConfig, length: int, pictures: bool, draw: np.random.Generator) -> list[EncodedSample]:
    """Samples of ``length`` tokens in all, in ascending length as the planner lays them."""
    samples = []
    while length:
        text = int(np.clip(draw.lognormal(np.log(MEDIAN), SIGMA), SHORTEST, length))
        if length - text < SHORTEST:
            text = length
        grid = _grid(draw) if pictures and draw.random() < PICTURED else None
        if grid is not None and text + grid[0] * grid[1] // 4 > length - SHORTEST:
            grid = None
        samples.append(_sample(config, text, grid, draw))
        length -= len(samples[-1])
    return sorted(samples, key=len)


def _grid(draw: np.random.Generator) -> tuple[int, int]:
    """Patches (h, w) of a photograph of any size that the realistic set has."""
    longer = np.exp(draw.uniform(np.log(MIN_SIDE), np.log(MAX_SIDE)))
    shorter = max(MIN_SIDE, longer * draw.choice([9 / 16, 2 / 3, 3 / 4, 1.0]))
    return KimiVLImageProcessor().grid(int(longer), int(shorter))


def _sample(config: KimiVLConfig, text: int, grid: tuple[int, int] | None, draw: np.random.Generator) -> EncodedSample:
    media = config.media_placeholder_token_id
    assert media is not None and config.vocab_size is not None
    pixels = np.zeros((0, 3, 14, 14), np.uint8)
    ids = draw.integers(0, min(media, config.vocab_size), text)
    if grid is not None:
        ids = np.concatenate([np.full(grid[0] * grid[1] // 4, media), ids])
        pixels = draw.integers(0, 256, (grid[0] * grid[1], 3, 14, 14), dtype=np.uint8)
    labels = np.where(np.arange(len(ids)) < len(ids) - 2 * text // 3, IGNORE, ids)
    grids = torch.tensor([grid] if grid else [], dtype=torch.int64).view(-1, 2)
    return EncodedSample(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(pixels), grids)


def real_packs(
    data: RealisticSet, length: int, pictures: bool, packs_per_step: int, workers: int
) -> Iterator[PackedBatch]:
    """Packs of the realistic set, epoch after epoch, through index, plan and loader.

    With ``pictures`` all samples of the set, of which two thirds have photographs; without, its texts only.
    """
    workload = Workload(data, decode=True, max_length=length)
    storage = Storage()
    index = build_index(expand(data.shards, storage), workload.indexer, storage)
    chosen = np.flatnonzero((index.images == 0) | pictures)
    for epoch in range(1_000_000):
        plan = plan_epoch(
            *(column[chosen] for column in (index.tokens, index.patches, index.targets, index.shard, index.images)),
            max_length=length,
            max_patches=4 * length,
            packs_per_step=packs_per_step,
            seed=0,
            epoch=epoch,
        )
        plan = replace(plan, samples=chosen[plan.samples])
        yield from PackLoader(plan, index, workload.encoder, num_workers=workers)


def config_for(config: KimiVLConfig, data: RealisticSet) -> KimiVLConfig:
    """The configuration with the special ids of the set's tokenizer, and room for all of its ids."""
    wanted = config.with_tokenizer(Workload(data, decode=True).tokenizer)
    size = max(config.vocab_size or 0, wanted.vocab_size or 0)
    wanted.vocab_size = wanted.text_config.vocab_size = size
    return wanted
