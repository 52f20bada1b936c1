"""Runs at the level of the delivery log: stand-ins for an index and a plan, and ranks that train, die and resume."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch

from kimivl.data.audit.delivery import DeliveryLog, next_attempt
from kimivl.data.audit.epochs import write_epoch_audit
from kimivl.data.mixture import Uses
from kimivl.data.pack import Hole

MAX_LENGTH, MAX_PATCHES = 100, 400


class StandInIndex:
    """As much of an ``Index`` as the audit needs: samples of 1 to 2 x ``MAX_LENGTH`` / 5 tokens, three sources."""

    def __init__(self, count: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.tokens = random.integers(1, MAX_LENGTH * 2 // 5, count).astype(np.int32)
        self.patches = random.choice([0, 4, 16], count).astype(np.int32)
        self.targets = (self.tokens // 2).astype(np.int32)
        self.source = random.integers(0, 3, count).astype(np.int16)
        self.sources = ["pages", "charts", "text"]
        self.dropped = {"bad_json": 2}
        self.fingerprint = "f" * 16

    def __len__(self) -> int:
        return len(self.tokens)

    def key(self, number: int) -> str:
        return f"key-{number}"

    def keys(self) -> pa.Array:
        return pa.array([self.key(number) for number in range(len(self))], pa.large_string())


@dataclass
class StandInPlan:
    """Packs of ``per_pack`` uses each, in a shuffled order; the last packs are split to fill the last step."""

    packs: list[np.ndarray]
    packs_per_step: int
    fill: float = 0.9
    hash: str = "0123456789abcdef"

    def __len__(self) -> int:
        return len(self.packs)

    @property
    def num_steps(self) -> int:
        return len(self.packs) // self.packs_per_step

    def pack(self, number: int) -> np.ndarray:
        return self.packs[number]


def make_plan(uses: np.ndarray, packs_per_step: int, per_pack: int = 2, seed: int = 0) -> StandInPlan:
    samples = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(uses)), uses))
    steps = max(1, -(-len(samples) // (per_pack * packs_per_step)))
    return StandInPlan(np.array_split(samples, steps * packs_per_step), packs_per_step)


def make_pack(number: int, samples: np.ndarray, holes: Sequence[int] = ()) -> SimpleNamespace:
    """As much of a ``PackedBatch`` as the audit needs."""
    found = tuple(Hole(sample, "bad_image", f"key-{sample}", "a.tar", "torn") for sample in holes if sample in samples)
    return SimpleNamespace(number=number, samples=torch.from_numpy(samples.astype(np.int64)), holes=found)


@dataclass
class SimulatedRun:
    """A run of ``epochs`` over ``count`` samples in ``run_dir``, each used ``uses`` times an epoch."""

    run_dir: Path
    count: int = 60
    packs_per_step: int = 4
    epochs: int = 1
    uses: np.ndarray | None = None
    holes: Sequence[int] = ()
    index: StandInIndex = field(init=False)
    plans: list[StandInPlan] = field(init=False)

    def __post_init__(self) -> None:
        self.index = StandInIndex(self.count)
        self.uses = np.ones(self.count, np.uint8) if self.uses is None else self.uses
        self.plans = [make_plan(self.uses, self.packs_per_step, seed=epoch) for epoch in range(self.epochs)]

    @property
    def folder(self) -> Path:
        return self.run_dir / "audit"

    @property
    def steps(self) -> int:
        return sum(plan.num_steps for plan in self.plans)

    def train(self, ranks: int = 1, start: int = 0, stop: int | None = None, last_rank: int = 0, torn: int = 0) -> None:
        """One attempt: resumes at ``start`` and is killed after ``stop`` steps.

        The first ``last_rank`` ranks also log the step after that, of which the last ``torn`` bytes never arrive.
        """
        stop = self.steps if stop is None else stop
        attempt = next_attempt(self.folder)
        shape = {"world_size": ranks, "packs_per_step": self.packs_per_step, "resumed_at": start}
        for rank in range(ranks):
            log = DeliveryLog(self.folder, attempt=attempt, rank=rank, **shape)
            more = rank < last_rank and stop < self.steps
            for step in range(start + 1, stop + 1 + more):
                self._log_step(log, step, rank, ranks)
            log.close()
            if more and torn:
                whole = log.path.read_bytes()
                log.path.write_bytes(whole[: -min(torn, 300)])  # a batch is longer than that

    def _log_step(self, log: DeliveryLog, step: int, rank: int, ranks: int) -> None:
        epoch, first = 0, 1
        while step >= first + self.plans[epoch].num_steps:
            first += self.plans[epoch].num_steps
            epoch += 1
        numbers = range((step - first) * self.packs_per_step + rank, (step - first + 1) * self.packs_per_step, ranks)
        packs = [make_pack(number, self.plans[epoch].pack(number), self.holes) for number in numbers]
        log.write(step, epoch, packs, self.uses)

    def write_audits(self, epochs: int | None = None) -> None:
        for epoch in range(self.epochs if epochs is None else epochs):
            write_epoch_audit(
                self.folder,
                epoch,
                self.index,
                Uses(self.uses, np.zeros_like(self.uses)),
                self.plans[epoch],
                max_length=MAX_LENGTH,
                max_patches=MAX_PATCHES,
            )
