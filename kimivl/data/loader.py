"""Loads the packs of a plan. A plain sized iterable whose only state is the number of the next pack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kimivl.data.chat import SampleEncoder
from kimivl.data.index import Index
from kimivl.data.pack import IGNORE, EncodedSample, Hole, PackedBatch
from kimivl.data.plan import Plan
from kimivl.data.sample import SampleError

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
        input_ids = torch.full((int(ends[-1]),), self.encoder.stop_id)
        targets = torch.full_like(input_ids, IGNORE)
        pixels = _empty_patches(int(self.index.patches[members].sum(dtype=np.int64)))
        grids, holes, filled = [torch.zeros(0, 2, dtype=torch.int64)], [], 0
        for sample, start, end in zip(members.tolist(), [0, *ends.tolist()], ends.tolist(), strict=False):
            patches = int(self.index.patches[sample])
            try:
                encoded = self._encode(sample, pixels[filled : filled + patches])
            except SampleError as fault:
                shard = self.index.shard_of(sample)
                holes.append(Hole(sample, fault.reason, self.index.key(sample), shard, fault.detail))
                continue
            input_ids[start:end] = encoded.input_ids
            targets[start : end - 1] = encoded.labels[1:]
            grids.append(encoded.image_grid_hws)
            filled += patches
        return PackedBatch(
            input_ids=input_ids,
            targets=targets,
            cu_seqlens=torch.from_numpy(np.concatenate([[0], ends])).int(),
            pixel_values=pixels[:filled],
            image_grid_hws=torch.cat(grids),
            step_targets=int(self.plan.step_targets[number // self.plan.packs_per_step]),
            number=number,
            samples=torch.from_numpy(members),
            holes=tuple(holes),
        )

    def _encode(self, sample: int, patches: torch.Tensor) -> EncodedSample:
        shard = self.index.shard_of(sample)
        encoded = self.encoder.encode(self.index.read(sample), shard, out=patches)
        found, indexed = (len(encoded), len(encoded.pixel_values)), (int(self.index.tokens[sample]), len(patches))
        if found != indexed:
            detail = f"{found} tokens and patches, but the index says {indexed}; remove {self.index.path}"
            raise SampleError("bad_shard", self.index.key(sample), shard, detail)
        return encoded


def _empty_patches(count: int) -> torch.Tensor:
    patches = torch.empty(count, 3, 14, 14, dtype=torch.uint8)
    # Written where the training process will read it: no second copy of the pack, not even for a moment.
    return patches if get_worker_info() is None else patches.share_memory_()


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
        )
        for pack in loader:
            if pack.holes:
                self._count(pack.holes)
            yield pack

    def _count(self, holes: tuple[Hole, ...]) -> None:
        self.dropped.update(hole.reason for hole in holes)
        if self.dropped.total() > self._allowed:
            last = SampleError(*holes[-1][1:])
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items())
            raise ValueError(
                f"{self.dropped.total()} samples of this epoch could not be read ({reasons}), more than "
                f"data.max_dropped allows ({self._allowed:.0f}); the last: {last}"
            )
