"""Loads the packs of a plan. A plain sized iterable whose only state is the number of the next pack."""

from __future__ import annotations

import logging
import math
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kimivl.data.chat import SampleEncoder
from kimivl.data.index import Index
from kimivl.data.pack import IGNORE, EncodedSample, Hole, PackedBatch
from kimivl.data.plan import Plan
from kimivl.data.sample import SampleError

log = logging.getLogger(__name__)
SHOWN = 5
"""Holes of one reason that are said one by one; all are in the run's quarantine.jsonl."""
PREFETCH = 2
"""Packs that a worker has ready: with the one in the making, three in memory."""


class PackMaker(Dataset[PackedBatch]):
    """Map-style: the number of a pack in the plan -> the pack.

    The sizes of all samples are known from the index, so ids and patches are written straight into the pack.
    """

    def __init__(self, plan: Plan, index: Index, encoder: SampleEncoder) -> None:
        self.plan, self.index, self.encoder = plan, index, encoder

    def __getitem__(self, number: int) -> PackedBatch:
        members = np.asarray(self.plan.pack(number), np.int64)
        self.index.advise(members)
        ends = np.cumsum(self.index.tokens[members], dtype=np.int64)
        patches, images = (
            int(column[members].sum(dtype=np.int64)) for column in (self.index.patches, self.index.images)
        )
        pack = _empty_pack(members, int(ends[-1]), patches, images)
        pack.step_targets = int(self.plan.step_targets[number // self.plan.packs_per_step])
        pack.number = number
        pack.cu_seqlens[1:] = torch.from_numpy(ends)
        self._fill(pack)
        return pack

    def _fill(self, pack: PackedBatch) -> None:
        """Write the samples of a pack; those that cannot be read are its holes."""
        ids, targets, grids = pack.input_ids.numpy(), pack.targets.numpy(), pack.image_grid_hws.numpy()
        ids.fill(self.encoder.stop_id)
        targets.fill(IGNORE)
        holes, shown, filled = list[Hole](), 0, 0
        for sample, (start, end) in zip(pack.samples.tolist(), pairwise(pack.cu_seqlens.tolist()), strict=True):
            patches = int(self.index.patches[sample])
            try:
                encoded = self._encode(sample, pack.pixel_values[filled : filled + patches])
            except SampleError as fault:
                shard = self.index.shard_of(sample)
                holes.append(Hole(sample, fault.reason, self.index.key(sample), shard, fault.detail))
                continue
            ids[start:end] = encoded.input_ids.numpy()
            targets[start : end - 1] = encoded.labels.numpy()[1:]
            images = len(encoded.image_grid_hws)
            grids[shown : shown + images] = encoded.image_grid_hws.numpy()
            shown, filled = shown + images, filled + patches
        pack.holes = tuple(holes)
        pack.image_grid_hws, pack.pixel_values = pack.image_grid_hws[:shown], pack.pixel_values[:filled]

    def _encode(self, sample: int, patches: torch.Tensor) -> EncodedSample:
        shard = self.index.shard_of(sample)
        encoded = self.encoder.encode(self.index.read(sample), shard, out=patches)
        found = (len(encoded), len(encoded.pixel_values), len(encoded.image_grid_hws))
        indexed = (int(self.index.tokens[sample]), len(patches), int(self.index.images[sample]))
        if found != indexed:
            detail = f"{found} tokens, patches and images, but the index says {indexed}; remove {self.index.path}"
            raise SampleError("bad_shard", self.index.key(sample), shard, detail)
        return encoded


def _empty_pack(samples: np.ndarray, tokens: int, patches: int, images: int) -> PackedBatch:
    """A pack to be filled, whose tensors lie in one block of memory.

    In a worker the block is shared memory, written where the training process will read it: no second copy of the
    pack is made. Each block crosses to that process by a connection of its own, so one costs less than
    five. The numbers of the samples lie apart: who keeps them (the audit does) must not keep the whole pack.
    """
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((tokens,), torch.int64),
        ((tokens,), torch.int64),
        ((images, 2), torch.int64),
        ((len(samples) + 1,), torch.int32),
        ((patches, 3, 14, 14), torch.uint8),
    ]
    lengths = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]  # bytes
    new = torch.UntypedStorage if get_worker_info() is None else torch.UntypedStorage._new_shared
    block = torch.empty(0, dtype=torch.uint8).set_(new(sum(lengths)))
    parts = zip(block.split(lengths), shapes, strict=True)
    input_ids, targets, grids, cu_seqlens, pixels = (part.view(dtype).view(shape) for part, (shape, dtype) in parts)
    cu_seqlens[0] = 0
    return PackedBatch(input_ids, targets, cu_seqlens, pixels, grids, step_targets=0, samples=torch.from_numpy(samples))


def _leave_signals_to_the_run(worker: int) -> None:
    """A scheduler signals all processes of a job; a worker that died of it would take the run's last save with it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class PackLoader:
    """The packs of one rank, in the order of the plan.

    Args:
        rank, world_size: the rank takes the packs ``rank::world_size`` of each step.
        start: packs of this rank to leave out, because an interrupted run has trained on them. ``len`` is still
            that of the whole epoch, since Lightning goes on counting from there.
        num_workers: processes that read and decode; 0 does it in this one.
        max_dropped: share of this rank's samples that may turn out unreadable; ``dropped`` counts them by reason,
            and may be given the counts of the run that was interrupted.

    Raises:
        ValueError: while iterating, when more than ``max_dropped`` of the samples cannot be read.
    """

    def __init__(
        self,
        plan: Plan,
        index: Index,
        encoder: SampleEncoder,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        num_workers: int = 0,
        max_dropped: float = 0.01,
        dropped: Counter[str] | None = None,
    ) -> None:
        if plan.packs_per_step % world_size:
            raise ValueError(
                f"{plan.packs_per_step} packs per step cannot be dealt to {world_size} ranks equally; take a number "
                "of ranks that divides it, or another trainer.accumulate_grad_batches"
            )
        self._packs = PackMaker(plan, index, encoder)
        self._numbers = range(rank, len(plan), world_size)
        self._start = start
        self._num_workers = num_workers
        self._allowed = max_dropped * len(plan.samples) / world_size
        self.dropped = Counter() if dropped is None else dropped

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[PackedBatch]:
        loader = DataLoader(
            self._packs,
            batch_size=None,
            sampler=self._numbers[self._start :],
            num_workers=self._num_workers,
            prefetch_factor=PREFETCH if self._num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_run,
        )
        for pack in loader:
            if pack.holes:
                self._count(pack.holes)
            yield pack

    def again(self, number: int) -> PackedBatch:
        """The ``number``-th pack of this rank in the epoch, made once more."""
        return self._packs[self._numbers[number]]

    def _count(self, holes: tuple[Hole, ...]) -> None:
        for hole in holes:
            self.dropped[hole.reason] += 1
            if self.dropped[hole.reason] <= SHOWN:
                log.warning("left out of its pack: %s", SampleError(*hole[1:]))
        if self.dropped.total() > self._allowed:
            last = SampleError(*holes[-1][1:])
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items())
            raise ValueError(
                f"{self.dropped.total()} samples of this epoch could not be read ({reasons}), more than "
                f"data.max_dropped allows ({self._allowed:.0f}); the last: {last}. Mend the shards or raise "
                "data.max_dropped, and type the command again: it goes on"
            )
