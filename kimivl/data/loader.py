"""Loads the packs of a plan. A plain sized iterable whose only state is the number of the next pack."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from kimivl.data.chat import SampleEncoder
from kimivl.data.index import Index
from kimivl.data.pack import PackedBatch, pack_samples
from kimivl.data.plan import Plan
from kimivl.data.sample import SampleError


class _Packs(Dataset[PackedBatch]):
    """Map-style: the number of a pack in the plan -> the pack."""

    def __init__(self, plan: Plan, index: Index, encoder: SampleEncoder) -> None:
        self.plan, self.index, self.encoder = plan, index, encoder

    def __getitem__(self, number: int) -> PackedBatch:
        try:
            encoded = [
                self.encoder.encode(self.index.read(sample), str(self.index.shards[self.index.shard[sample]]))
                for sample in self.plan.pack(number)
            ]
        except SampleError as fault:  # an exception of several arguments does not survive the way out of a worker
            raise ValueError(str(fault)) from fault
        step = number // self.plan.packs_per_step
        return pack_samples(encoded, step_targets=int(self.plan.step_targets[step]))


class PackLoader:
    """The packs of one rank, in the order of the plan.

    Args:
        rank, world_size: the rank takes the packs ``rank::world_size`` of each step.
        start: packs of this rank to leave out, because an interrupted run has trained on them. ``len`` is still
            that of the whole epoch, since Lightning goes on counting from there.
        num_workers: processes that read and decode; 0 does it in this one.
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
    ) -> None:
        if plan.packs_per_step % world_size:
            raise ValueError(f"{plan.packs_per_step} packs per step cannot be dealt to {world_size} ranks equally")
        self._packs = _Packs(plan, index, encoder)
        self._numbers = range(rank, len(plan), world_size)
        self._start = start
        self._num_workers = num_workers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[PackedBatch]:
        numbers = list(self._numbers[self._start :])
        yield from DataLoader(self._packs, batch_size=None, sampler=numbers, num_workers=self._num_workers)
