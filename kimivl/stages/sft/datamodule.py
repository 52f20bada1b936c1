"""Packs for supervised stages: epochs of short packs, then epochs of long ones, each sample once per epoch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kimivl.data.loader import PackLoader
from kimivl.data.mixture import Limits, Uses, uses_of_epoch
from kimivl.data.plan import Plan, plan_epoch
from kimivl.runtime import ranks
from kimivl.stages.datamodule import Phase, StageDataModule

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Planned:
    """What a run has to know of an epoch whose packs it does not hold."""

    steps: int
    dropped: dict[str, int]


class SFTDataModule(StageDataModule):
    """One Lightning epoch is one epoch of the data; its pack length comes from ``phases``.

    A phase has ``max_length``, the tokens of a pack, and may have ``max_patches``, its image patches before merging
    (four per token where it is not given: a pack may be all images).
    An optimiser step takes ``trainer.accumulate_grad_batches`` packs on every rank.

    Args:
        num_workers: processes that read and decode while the model trains.
        mixture: source -> how often each of its samples is used in an epoch (1 for a source that is not named). A
            fraction takes that share of its samples, others in each epoch.
        too_long: what becomes of a sample that the packs of a phase cannot hold, by tokens or patches. ``drop``: it is
            left out of the epoch and counted. ``move``: it is used once more in the first later phase that can.
        window: samples that are shuffled together. Shards are shuffled whole; a smaller window reads more nearly in
            sequence.
    """

    def __init__(
        self,
        num_workers: int = 0,
        mixture: Mapping[str, float] | None = None,
        too_long: Literal["drop", "move"] = "drop",
        window: int = 262_144,
        **stage: Any,
    ) -> None:
        super().__init__(**stage)
        if num_workers < 0 or window < 1:
            raise ValueError(f"data needs num_workers >= 0 and data.window >= 1, not {num_workers} and {window}")
        if any(phase.max_length is None for phase in self.phases):
            raise ValueError("data.phases: a supervised stage needs max_length, the tokens of a pack")
        self.num_workers = num_workers
        self.mixture = mixture
        self.too_long: Literal["drop", "move"] = too_long
        self.window = window
        # Of the epoch in progress, on this rank and on all when they last told each other; and of the epochs before.
        self.holes: Counter[str] = Counter()
        self.all_holes: Counter[str] = Counter()
        self.earlier_holes: Counter[str] = Counter()
        self._plans: dict[int, Plan] = {}
        self._planned: dict[int, _Planned] = {}
        self._resumed: dict[str, Any] | None = None

    @property
    def packs_per_step(self) -> int:
        """Packs of an optimiser step, over all ranks."""
        assert self.trainer is not None
        return self.trainer.accumulate_grad_batches * self.trainer.world_size

    def limits_of(self, phase: Phase) -> Limits:
        """The budgets of a pack of a phase."""
        assert phase.max_length is not None
        return Limits(phase.max_length, phase.max_patches or 4 * phase.max_length, phase.epochs)

    def uses(self, epoch: int) -> Uses:
        """How often each sample is to be used in an epoch."""
        return uses_of_epoch(
            self.index.tokens,
            self.index.patches,
            self.index.source,
            sources=self.index.sources,
            phases=[self.limits_of(phase) for phase in self.phases],
            epoch=epoch,
            seed=self.seed,
            mixture=self.mixture,
            too_long=self.too_long,
        )

    def plan(self, epoch: int) -> Plan:
        """The packs of an epoch, the same on every rank. Only the two plans made last are kept: they can be large."""
        if epoch not in self._plans:
            limits = self.limits_of(self.phase_of(epoch))
            index, uses = self.index, self.uses(epoch)
            plan = plan_epoch(
                index.tokens,
                index.patches,
                index.targets,
                index.shard,
                index.images,
                max_length=limits.max_length,
                max_patches=limits.max_patches,
                packs_per_step=self.packs_per_step,
                seed=self.seed,
                epoch=epoch,
                uses=uses.count,
                window=self.window,
            )
            for oldest in list(self._plans)[:-1]:
                del self._plans[oldest]
            self._plans[epoch] = plan
            self._note(epoch, plan, uses)
        return self._plans[epoch]

    def _note(self, epoch: int, plan: Plan, uses: Uses) -> None:
        if epoch in self._planned:
            return
        dropped = {reason: count for reason, count in plan.dropped.items() if count}
        self._planned[epoch] = _Planned(plan.num_steps, dropped)
        if not ranks.is_first():  # all ranks plan alike
            return
        for reason, count in dropped.items():
            log.warning("epoch %d leaves out %d samples: %s", epoch, count, reason)
        if uses.moved.any():
            log.info(
                "epoch %d moves %d uses of %d samples to a later phase: its packs cannot hold them",
                epoch,
                uses.moved.sum(),
                np.count_nonzero(uses.moved),
            )

    def planned(self, epoch: int) -> _Planned:
        if epoch not in self._planned:
            self.plan(epoch)
        return self._planned[epoch]

    @property
    def dropped(self) -> dict[str, int]:
        """Those of the index, what fits into no pack (counted once for each epoch that leaves it out), and holes."""
        holes = self.holes if ranks.world_size() == 1 else self.all_holes
        counts = Counter(super().dropped) + holes + self.earlier_holes
        for epoch in range(self.max_epochs):
            counts.update(self.planned(epoch).dropped)
        return dict(counts)

    def count_holes(self) -> bool:
        """Tell the other ranks of this one's holes (all must call it); whether there are more than before."""
        before, self.all_holes = self.all_holes, sum(ranks.gather(self.holes), Counter())
        return self.all_holes != before

    def schedule_phases(self) -> list[dict[str, Any]]:
        def steps(first: int, phase: Phase) -> int:
            return sum(self.planned(epoch).steps for epoch in range(first, first + phase.epochs))

        firsts = [sum(phase.epochs for phase in self.phases[:number]) for number in range(len(self.phases))]
        return [
            {"steps": steps(first, phase), "lr": list(phase.lr)}
            for first, phase in zip(firsts, self.phases, strict=True)
        ]

    def train_dataloader(self) -> PackLoader:
        assert self.trainer is not None
        epoch, start = self.trainer.current_epoch, 0
        self.count_holes()
        self.earlier_holes.update(self.all_holes)
        self.holes, self.all_holes = Counter(), Counter()
        if epoch >= self.max_epochs:  # a finished run is gone on from: Lightning asks, and trains nothing
            epoch, start = self.max_epochs - 1, len(self.plan(self.max_epochs - 1))
        elif self._resumed is not None and self._resumed["epoch"] == epoch:
            if "plan" not in self._resumed:
                raise ValueError(
                    f"the run of this checkpoint ended after {epoch} epochs, and data.phases has {self.max_epochs}: "
                    "begin from its model instead, with init_from=FOLDER/model and without ckpt_path"
                )
            if self._resumed["plan"] != self._identity(epoch):
                raise ValueError(
                    "the checkpoint was made on other data, or with another data.seed, data.phases, number of packs "
                    "per step (devices x trainer.accumulate_grad_batches) or tokenizer; resume with the settings of "
                    "the run, or start anew without ckpt_path"
                )
            start = self._resumed["step"] * self.trainer.accumulate_grad_batches
            self.all_holes = Counter(self._resumed["holes"])
            self.holes = _share(self.all_holes)
        self._resumed = None
        return PackLoader(
            self.plan(epoch),
            self.index,
            self.encoder,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start=start,
            num_workers=self.num_workers,
            max_dropped=self.max_dropped,
            dropped=self.holes,
        )

    def _identity(self, epoch: int) -> str:
        """Of the packs of an epoch, and of what is in them."""
        return f"{self.plan(epoch).hash}-{self.index.digest}"

    def state_dict(self) -> dict[str, Any]:
        """The position in the data: epoch, its plan, the optimiser steps completed in it, and its holes on all ranks.

        All ranks must call it, as Lightning does: they get the same.
        """
        assert self.trainer is not None
        epoch = self.trainer.current_epoch
        self.count_holes()
        holes = {"holes": dict(self.all_holes), "earlier_holes": dict(self.earlier_holes)}
        if epoch >= self.max_epochs:  # the run has ended, there is no next pack
            return {"epoch": epoch} | holes
        before = sum(self.planned(earlier).steps for earlier in range(epoch))
        step = self.trainer.global_step - before
        return {"epoch": epoch, "plan": self._identity(epoch), "step": step} | holes

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict
        self.earlier_holes = Counter(state_dict["earlier_holes"])


def _share(holes: Counter[str]) -> Counter[str]:
    """This rank's part of the holes that an interrupted run had, so that those of all ranks add up to them."""
    world, rank = ranks.world_size(), ranks.rank()
    return +Counter({reason: count // world + (rank < count % world) for reason, count in holes.items()})
