"""Stage 3: online policy mirror descent (Kimi-VL, arXiv 2504.07491, section 2.4; Kimi k1.5, section 2.3).

One iteration is one Lightning epoch: the datamodule collects experience with the policy as it stands, which is the
reference of the iteration; the steps of the epoch are ordinary automatic optimisation on packs of trajectories.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from kimivl.optim import reset_state
from kimivl.rl.experience import TrajectoryBatch
from kimivl.rl.mismatch import Mismatch
from kimivl.rl.objectives import Loss, Trajectories
from kimivl.runtime import ranks
from kimivl.stages.long_cot.module import LongCoTModule

SHOWN = {"rollout/accuracy", "rollout/length", "perf/rollout_tokens_per_s"}
"""Figures of an iteration that the progress bar shows."""


class Objective(Protocol):
    """See ``kimivl.rl.objectives``."""

    def at(self, progress: float) -> Self: ...

    def advantages(self, rewards: Tensor, group: Tensor) -> Tensor: ...

    def __call__(self, logp: Tensor, tokens: Trajectories) -> Loss: ...


class StepFigures:
    """The figures of an optimiser step from those of its packs, on all ranks: means weighted by what each pack counts,
    ``_max``ima, and sums of what are counts (``_tokens``). A pack that runs twice counts once."""

    def __init__(self) -> None:
        self._packs: dict[int, tuple[Mapping[str, Tensor], Tensor]] = {}

    def add(self, pack: int, figures: Mapping[str, Tensor], weight: Tensor) -> None:
        self._packs[pack] = (figures, weight)

    def forget(self) -> None:
        self._packs = {}

    def take(self) -> dict[str, Tensor]:
        """The figures, and begin anew. All ranks take them together."""
        packs = list(self._packs.values())
        self.forget()
        weights = torch.stack([weight for _, weight in packs]).double()
        totals, maxima = {"weight": weights.sum()}, {}
        for name in packs[0][0]:
            values = torch.stack([figures[name] for figures, _ in packs]).double()
            if name.endswith("_max"):
                maxima[name] = values.max()
            else:
                totals[name] = values.sum() if _is_sum(name) else (values * weights).sum()
        totals, maxima = _over_ranks(totals, dist.ReduceOp.SUM), _over_ranks(maxima, dist.ReduceOp.MAX)
        weight = totals.pop("weight").clamp_min(1)
        merged = maxima | {name: total if _is_sum(name) else total / weight for name, total in totals.items()}
        return {name: value.float() for name, value in merged.items()}


def _is_sum(name: str) -> bool:
    return name.endswith(("_tokens", "/loss"))


def _over_ranks(values: dict[str, Tensor], how: Any) -> dict[str, Tensor]:
    if ranks.world_size() == 1 or not values:
        return values
    together = torch.stack(list(values.values()))
    dist.all_reduce(together, how)
    return dict(zip(values, together.unbind(), strict=True))


class RLModule(LongCoTModule):
    """Maximises the reward of sampled responses.

    Args:
        objective: see ``kimivl.rl.objectives``.
        reset_optimizer: forget the optimiser's momenta at the start of each iteration, as the paper does.
        mismatch: what becomes of the difference between engine and trainer (``kimivl.rl.mismatch``); None leaves it be.
        router_replay: reference and training pass go through the experts that the engine chose, where it returns them
            (``kimivl.model.replay``).
    """

    def __init__(
        self,
        objective: Objective,
        reset_optimizer: bool = True,
        mismatch: Mismatch | None = None,
        router_replay: bool = True,
        **stage: Any,
    ) -> None:
        super().__init__(**stage)
        self.objective = objective
        self.reset_optimizer = reset_optimizer
        self.mismatch = mismatch or Mismatch()
        self.router_replay = router_replay
        self._step_figures = StepFigures()
        self._training_since: float | None = None

    @property
    def progress(self) -> float:
        """The fraction of the run at which this iteration began."""
        return self.current_epoch / self.datamodule.max_epochs

    def on_train_batch_start(self, batch: TrajectoryBatch, batch_idx: int) -> None:
        if self._training_since is None:
            self._training_since = time.perf_counter()
        # Not on_train_epoch_start: Lightning leaves it out after a resume from a checkpoint at an epoch's last batch.
        if batch_idx == 0:
            if self.reset_optimizer:
                reset_state(self.trainer.optimizers[0])
            self._log_figures()

    def _log_figures(self) -> None:
        """The figures of the iteration's rollouts, once, whatever ``log_every_n_steps`` is."""
        figures = self.datamodule.figures
        self._log_once(figures, self.global_step)
        for name, value in figures.items():
            self.log(name, value, logger=False, prog_bar=name in SHOWN, batch_size=1)

    def _log_once(self, figures: Mapping[str, float], step: int) -> None:
        for logger in self.loggers:
            about = {"rollout/iteration": self.current_epoch, "epoch": self.current_epoch}
            logger.log_metrics({**figures, **about}, step=step)

    def log_probs(self, batch: TrajectoryBatch) -> Tensor:
        """(K,) log-probabilities of a pack's response tokens, as they were drawn: at the temperature, and through the
        experts, of the engine. Both the reference and the training pass are made by it."""
        experts = batch.experts if self.router_replay else None
        return self.target_log_probs(batch.pack, self.datamodule.sampling.temperature, experts)

    def training_step(self, batch: TrajectoryBatch, batch_idx: int) -> Tensor:  # type: ignore[override]
        with self.router.record(batch.pack.cu_seqlens):
            logp = self.log_probs(batch)
        loss, figures = self.objective.at(self.progress)(logp, batch.trajectories)
        counted = (batch.trajectories.weight > 0).sum()
        self._step_figures.add(batch_idx, figures | {"train/loss": loss.detach()}, counted)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self._log_step()
        return self.normalised(loss, 1) + self.auxiliary_loss()

    def _log_step(self) -> None:
        """What the whole optimiser step comes to, over its packs and ranks."""
        if not self.logs_this_step:
            self._step_figures.forget()
            return
        for name, value in self._step_figures.take().items():
            self.log(name, value, prog_bar=name == "train/loss", batch_size=1)

    def on_validation_epoch_start(self) -> None:
        self.datamodule.settle()
        super().on_validation_epoch_start()

    def on_train_batch_end(self, outputs: Any, batch: TrajectoryBatch, batch_idx: int) -> None:
        """Time the iteration's training phase; after a resume inside of it, what was left of it."""
        if self.trainer.is_last_batch and self._training_since is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            figures = {"perf/train_s": max(ranks.gather(time.perf_counter() - self._training_since))}
            self._log_once(figures, self.global_step - 1)  # the row of the step's loss
            self._training_since = None
