"""The plan of an epoch: which samples lie in which pack, in which order.

A pure function of (index, seed, epoch, limits), so the number of steps is known before the first one, a resume is
exact, and every sample is used as often as it should be over any number of workers and ranks. Only integers decide:
sums and ties of floating point numbers differ between machines, and the ranks must agree.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kimivl.data.packing import CARRIED, pack_items

BLOCK_STEPS = 64
"""Optimiser steps whose packs are sorted by cost together: more balance better and mix windows more."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Packs of one epoch as CSR arrays: pack ``p`` holds ``samples[starts[p]:starts[p + 1]]``.

    ``step_targets`` has the supervised tokens of each optimiser step; step ``s`` takes the packs
    ``[s * packs_per_step, (s + 1) * packs_per_step)``. ``dropped`` counts in uses, by reason, what fits into no pack:
    ``too_long`` (tokens) and ``too_many_patches``. ``fill`` is the share of all token places that is used,
    ``pack_cost (packs,)`` what a pack costs (``sample_cost``). ``hash`` is the identity of the plan; a checkpoint
    carries it, and a resume on other data is refused.
    """

    samples: np.ndarray
    starts: np.ndarray
    step_targets: np.ndarray
    packs_per_step: int
    dropped: dict[str, int]
    fill: float
    pack_cost: np.ndarray
    hash: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(b"%d" % self.packs_per_step)
        for column in (self.samples, self.starts):
            digest.update(np.ascontiguousarray(column).data)
        object.__setattr__(self, "hash", digest.hexdigest()[:16])

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def num_steps(self) -> int:
        return len(self) // self.packs_per_step

    def pack(self, number: int) -> np.ndarray:
        return self.samples[self.starts[number] : self.starts[number + 1]]


def plan_epoch(
    tokens: np.ndarray,
    patches: np.ndarray,
    targets: np.ndarray,
    shard: np.ndarray,
    images: np.ndarray,
    *,
    max_length: int,
    max_patches: int,
    packs_per_step: int,
    seed: int,
    epoch: int,
    uses: np.ndarray | None = None,
    window: int = 262_144,
) -> Plan:
    """Shuffle the samples in windows, pack each window, and deal the packs into steps of about equal cost.

    The order of shards is drawn anew for each epoch; consecutive shards form windows of at least ``window`` uses, and
    samples are shuffled and packed inside a window, so that the shards being read at one time are few. A little of
    each window is carried into the next (``packing.pack_items``). A set smaller than a window is shuffled whole.

    The number of packs is made a multiple of ``packs_per_step`` by splitting the packs of the most samples, never by
    dropping or repeating a sample. Inside a pack the samples ascend in length: neighbours of one length share an
    attention call.

    Args:
        tokens, patches, targets, shard, images: (N,) columns of the index; image patches before merging; supervised
            tokens; number of the shard; images. Samples of a shard are neighbours.
        max_length: tokens of a pack. max_patches: image patches of a pack.
        uses: (N,) how often each sample is used in this epoch (``mixture.uses_of_epoch``); None means once.

    Raises:
        ValueError: when no sample fits, fewer than one step has packs, or a number is below one.
    """
    for name, value in (("packs_per_step", packs_per_step), ("window", window)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    columns = _Columns(tokens, patches, targets, images)
    counts, dropped = _fitting_uses(columns, uses, max_length, max_patches)
    windows = _windows(shard, counts, window, np.random.default_rng([seed, epoch, 1]))
    packs = _joined(list(_packed(windows, columns, [seed, epoch, 2], max_length, max_patches)))
    packs = _split_to_multiple(packs, packs_per_step, columns)
    order = _steps_of_equal_cost(packs.cost, packs_per_step, np.random.default_rng([seed, epoch, 3]))
    return Plan(
        samples=_samples_in_order(packs, order),
        starts=_starts(packs.sizes[order]),
        step_targets=packs.targets[order].reshape(-1, packs_per_step).sum(1),
        packs_per_step=packs_per_step,
        dropped=dropped,
        fill=int(packs.tokens.sum()) / (len(order) * max_length),
        pack_cost=packs.cost[order].astype(np.float32),
    )


def sample_cost(tokens: np.ndarray, patches: np.ndarray, images: np.ndarray) -> np.ndarray:
    """What training on a sample costs, in tokens of the language model, for Kimi-VL-A3B.

    ``tokens + tokens^2 / 37_300 + 0.16 patches + 2.41e-5 patches^2 / images``, from floating point operations of a
    forward and a backward pass, relative to the linear layers of one token (6 x 2.58e9 active parameters = 15.5e9):

    - causal attention: 27 layers x 16 heads x (192 + 128) channels x 3 x tokens^2 (half of the pairs are masked);
    - vision tower, linear layers: 9.9e9 per image token, which is four patches;
    - vision tower, attention inside an image: 27 layers x 1152 channels x 4 x 3 for each pair of patches. The images
      of a sample are taken as equal in size.

    Args:
        tokens, patches, images: (n,) per sample.

    Returns:
        (n,) int64, so that sums do not depend on their order.
    """
    length, area = tokens.astype(np.float64), patches.astype(np.float64)
    tower = 0.16 * area + 2.41e-5 * area * area / np.maximum(images, 1)
    return np.rint(length + length * length / 37_300 + tower).astype(np.int64)


class _Columns(NamedTuple):
    """Columns of the index, (N,) each."""

    tokens: np.ndarray
    patches: np.ndarray
    targets: np.ndarray
    images: np.ndarray


class _PackTable(NamedTuple):
    """Packs one after the other: ``samples (n,)``, and per pack the number of samples and sums over them."""

    samples: np.ndarray
    sizes: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    cost: np.ndarray


def _fitting_uses(
    columns: _Columns, uses: np.ndarray | None, max_length: int, max_patches: int
) -> tuple[np.ndarray, dict[str, int]]:
    """(N,) uses of the samples that fit into a pack, 0 for the others, and the uses lost by reason."""
    if uses is None:
        uses = np.ones(len(columns.tokens), np.uint8)
    short, light = columns.tokens <= max_length, columns.patches <= max_patches
    counts = uses * (short & light)
    if not counts.any():
        raise ValueError(
            f"none of {int((uses > 0).sum())} samples fits into a pack of {max_length} tokens and {max_patches} image "
            "patches; raise max_length or max_patches in data.phases"
        )
    too_long, too_many_patches = uses[~short].sum(dtype=np.int64), uses[short & ~light].sum(dtype=np.int64)
    return counts, {"too_long": int(too_long), "too_many_patches": int(too_many_patches)}


def _windows(
    shard: np.ndarray, counts: np.ndarray, window: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, bool]]:
    """Samples of each window, as often as they are used, and whether the window is the last.

    A shard larger than a window is cut into pieces that are shuffled like shards. A rest of less than a window joins
    the window before it.
    """
    cuts = np.concatenate([np.flatnonzero(shard[1:] != shard[:-1]) + 1, np.arange(0, len(shard), window)])
    starts = np.unique(cuts)
    stops = np.append(starts[1:], len(shard))
    order = generator.permutation(len(starts))
    ends = np.cumsum(np.add.reduceat(counts, starts, dtype=np.int64)[order])
    begin = done = 0
    while begin < len(order):
        end = int(np.searchsorted(ends, done + window)) + 1
        if end >= len(order) or ends[-1] - ends[end - 1] < window:
            end = len(order)
        numbers = np.concatenate([np.arange(starts[piece], stops[piece]) for piece in order[begin:end]])
        begin, done = end, int(ends[end - 1])
        yield np.repeat(numbers, counts[numbers]), end == len(order)


def _packed(
    windows: Iterable[tuple[np.ndarray, bool]], columns: _Columns, seed: list[int], max_length: int, max_patches: int
) -> Iterator[_PackTable]:
    """The packs of each window; what fills no pack goes on into the next window."""
    limits = {"max_length": max_length, "max_patches": max_patches}
    carried = np.zeros(0, np.int64)
    for number, (items, last) in enumerate(windows):
        items = np.sort(np.concatenate([carried, items]))
        generator = np.random.default_rng([*seed, number])
        order = _shuffled(items, generator)
        pack = pack_items(columns.tokens[items], columns.patches[items], order, generator, last=last, **limits)
        carried = items[pack == CARRIED]
        yield _laid_out(items[pack != CARRIED], pack[pack != CARRIED], columns, generator)


def _shuffled(items: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random order of ascending ``items``; the repeats of one are spread evenly over it, to meet in no pack."""
    first = np.append(True, items[1:] != items[:-1])
    if first.all():
        return generator.permutation(len(items))
    starts = np.flatnonzero(first)
    repeats = np.diff(np.append(starts, len(items)))
    repeat = np.arange(len(items)) - np.repeat(starts, repeats)
    phase = np.repeat(generator.random(len(starts)), repeats)
    return np.argsort((phase + repeat) / np.repeat(repeats, repeats), kind="stable")


def _laid_out(items: np.ndarray, pack: np.ndarray, columns: _Columns, generator: np.random.Generator) -> _PackTable:
    """Packs in random order, the samples of each ascending in length, then in number (``items`` ascend)."""
    place = generator.permutation(int(pack.max(initial=-1)) + 1)[pack]
    lengths = columns.tokens[items].astype(np.int64)
    order = np.argsort(place * (int(lengths.max(initial=0)) + 1) + lengths, kind="stable")
    return _measured(items[order], np.bincount(place), columns)


def _measured(samples: np.ndarray, sizes: np.ndarray, columns: _Columns) -> _PackTable:
    starts = _starts(sizes)[:-1]
    tokens, patches, targets, images = (column[samples] for column in columns)
    values = (tokens, targets, sample_cost(tokens, patches, images))
    kind = np.int32 if len(columns.tokens) < 2**31 else np.int64
    return _PackTable(
        samples.astype(kind), sizes, *(np.add.reduceat(value, starts, dtype=np.int64) for value in values)
    )


def _joined(parts: list[_PackTable]) -> _PackTable:
    return _PackTable(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def _samples_in_order(packs: _PackTable, order: np.ndarray) -> np.ndarray:
    sizes = packs.sizes[order]
    shifts = _starts(packs.sizes)[:-1][order] - _starts(sizes)[:-1]
    return packs.samples[np.arange(len(packs.samples)) + np.repeat(shifts, sizes)]


def _split_to_multiple(packs: _PackTable, multiple: int, columns: _Columns) -> _PackTable:
    """Halve the packs of the most samples until the number of packs is a multiple.

    The halves come last, so that they meet in the last steps: a step waits for its dearest pack.
    """
    missing = -len(packs.sizes) % multiple
    wanted = len(packs.sizes) + missing
    if len(packs.samples) < wanted:
        steps = "one optimiser step" if wanted == multiple else f"{wanted // multiple} optimiser steps"
        raise ValueError(
            f"{len(packs.samples)} samples cannot fill the {wanted} packs of {steps}; use more data, fewer devices, "
            "or a smaller trainer.accumulate_grad_batches"
        )
    if not missing:
        return packs
    # That many halvings cannot reach a pack beyond the ``missing`` largest.
    largest = np.argsort(-packs.sizes, kind="stable")[:missing]
    starts = _starts(packs.sizes)
    heap = [
        (-int(packs.sizes[pack]), pack, packs.samples[starts[pack] : starts[pack + 1]]) for pack in largest.tolist()
    ]
    heapq.heapify(heap)
    for number in range(missing):
        _, _, members = heapq.heappop(heap)
        for side in (0, 1):
            half = members[side::2]
            heapq.heappush(heap, (-len(half), len(packs.sizes) + 2 * number + side, half))
    kept = np.ones(len(packs.sizes), bool)
    kept[largest] = False
    rest = _PackTable(packs.samples[np.repeat(kept, packs.sizes)], *(column[kept] for column in packs[1:]))
    halves = [members for _, _, members in sorted(heap, key=lambda entry: entry[1])]
    return _joined([rest, _measured(np.concatenate(halves), np.array([len(half) for half in halves]), columns)])


def _steps_of_equal_cost(cost: np.ndarray, packs_per_step: int, generator: np.random.Generator) -> np.ndarray:
    """Order of the packs in which the packs of a step cost about the same and the steps are shuffled.

    Steps form blocks of ``BLOCK_STEPS`` to twice as many, so that the last is no small one; a block's packs are
    sorted by cost and cut into steps. A step keeps that order, forwards or backwards: rank ``r`` of ``R`` takes its
    packs ``r::R``, so the sums of two ranks differ by no more than the cheapest and the dearest pack do, whatever
    ``R``, and the packs that are computed at one time are neighbours in cost.
    """
    steps = len(cost) // packs_per_step
    blocks = max(1, steps // BLOCK_STEPS)
    parts = []
    for block in range(blocks):
        first, end = (steps * edge // blocks * packs_per_step for edge in (block, block + 1))
        groups = first + np.argsort(cost[first:end], kind="stable").reshape(-1, packs_per_step)
        backwards = generator.random(len(groups)) < 0.5
        groups[backwards] = groups[backwards, ::-1]
        parts.append(groups[generator.permutation(len(groups))].ravel())
    return np.concatenate(parts)
