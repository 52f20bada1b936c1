"""Packs for supervised stages: epochs of short packs, then epochs of long ones, each sample once per epoch."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from kimivl.data.loader import PackLoader
from kimivl.data.plan import Plan, plan_epoch
from kimivl.stages.datamodule import Phase, StageDataModule

log = logging.getLogger(__name__)


class SFTDataModule(StageDataModule):
    """One Lightning epoch is one epoch of the data; its pack length comes from ``phases``.

    A phase has ``max_length``, the tokens of a pack, and may have ``max_patches``, its image patches before merging
    (four per token where it is not given: a pack may be all images). A sample over either limit is dropped from the
    epoch under ``too_long`` or ``too_many_patches``, and counted.
    An optimiser step takes ``trainer.accumulate_grad_batches`` packs on every rank.

    Args:
        num_workers: processes that read and decode while the model trains.
    """

    def __init__(self, num_workers: int = 0, **stage: Any) -> None:
        super().__init__(**stage)
        self.num_workers = num_workers
        self._plans: dict[int, Plan] = {}
        self._resumed: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for phase in self.phases:
            if phase.max_length is None:
                raise ValueError("data.phases: a supervised stage needs max_length, the tokens of a pack")

    def plan(self, epoch: int) -> Plan:
        """The packs of an epoch, the same on every rank."""
        assert self.trainer is not None
        if epoch not in self._plans:
            phase = self.phase_of(epoch)
            max_length = phase.max_length
            assert max_length is not None
            plan = plan_epoch(
                self.index.tokens,
                self.index.patches,
                self.index.targets,
                max_length=max_length,
                max_patches=phase.max_patches or 4 * max_length,
                packs_per_step=self.trainer.accumulate_grad_batches * self.trainer.world_size,
                seed=self.seed,
                epoch=epoch,
            )
            for reason, count in plan.dropped.items():
                if count:
                    log.warning("epoch %d leaves out %d samples: %s", epoch, count, reason)
            self._plans[epoch] = plan
        return self._plans[epoch]

    @property
    def dropped(self) -> dict[str, int]:
        """Those of the index, and what fits into no pack: counted once for each epoch that leaves it out."""
        counts = Counter(super().dropped)
        for epoch in range(self.max_epochs):
            counts.update(self.plan(epoch).dropped)
        return {reason: count for reason, count in counts.items() if count}

    def schedule_phases(self) -> list[dict[str, Any]]:
        def steps(first: int, phase: Phase) -> int:
            return sum(self.plan(epoch).num_steps for epoch in range(first, first + phase.epochs))

        firsts = [sum(phase.epochs for phase in self.phases[:number]) for number in range(len(self.phases))]
        return [
            {"steps": steps(first, phase), "lr": list(phase.lr)}
            for first, phase in zip(firsts, self.phases, strict=True)
        ]

    def train_dataloader(self) -> PackLoader:
        assert self.trainer is not None
        epoch = self.trainer.current_epoch
        plan = self.plan(epoch)
        start = 0
        if self._resumed is not None and self._resumed["epoch"] == epoch:
            if self._resumed["plan"] != plan.hash:
                raise ValueError(
                    "the checkpoint was made on other data, or with another data.seed, data.phases, number of packs "
                    "per step or tokenizer; resume with the settings of the run, or start anew without ckpt_path"
                )
            start = self._resumed["step"] * self.trainer.accumulate_grad_batches
        self._resumed = None
        return PackLoader(
            plan,
            self.index,
            self.encoder,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start=start,
            num_workers=self.num_workers,
        )

    def state_dict(self) -> dict[str, Any]:
        """The position in the data: epoch, its plan, and the optimiser steps completed in it."""
        assert self.trainer is not None
        epoch = self.trainer.current_epoch
        before = sum(self.plan(earlier).num_steps for earlier in range(epoch))
        return {"epoch": epoch, "plan": self.plan(epoch).hash, "step": self.trainer.global_step - before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict
