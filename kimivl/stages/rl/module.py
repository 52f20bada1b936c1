"""Stage 3: online policy mirror descent (Kimi-VL, arXiv 2504.07491, section 2.4; Kimi k1.5, section 2.3).

One iteration is one Lightning epoch: the datamodule collects experience with the policy as it stands, which is the
reference of the iteration; the steps of the epoch are ordinary automatic optimisation on packs of trajectories.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from kimivl.optim import reset_state
from kimivl.rl.experience import TrajectoryBatch
from kimivl.rl.objectives import Loss, Trajectories
from kimivl.stages.long_cot.module import LongCoTModule

SHOWN = {"rollout/accuracy", "rollout/length", "perf/rollout_tokens_per_s"}
"""Figures of an iteration that the progress bar shows."""


class Objective(Protocol):
    """See ``kimivl.rl.objectives``."""

    def advantages(self, rewards: Tensor, group: Tensor) -> Tensor: ...

    def __call__(self, logp: Tensor, tokens: Trajectories) -> Loss: ...


class RLModule(LongCoTModule):
    """Maximises the reward of sampled responses.

    Args:
        objective: see ``kimivl.rl.objectives``.
        reset_optimizer: forget the optimiser's momenta at the start of each iteration, as the paper does.
    """

    def __init__(self, objective: Objective, reset_optimizer: bool = True, **stage: Any) -> None:
        super().__init__(**stage)
        self.objective = objective
        self.reset_optimizer = reset_optimizer

    def on_train_batch_start(self, batch: TrajectoryBatch, batch_idx: int) -> None:
        # Not on_train_epoch_start: Lightning leaves it out after a resume from a checkpoint at an epoch's last batch.
        if batch_idx == 0:
            if self.reset_optimizer:
                reset_state(self.trainer.optimizers[0])
            self._log_figures()

    def _log_figures(self) -> None:
        """The figures of the iteration's rollouts, once, whatever ``log_every_n_steps`` is."""
        figures = self.datamodule.figures
        for logger in self.loggers:
            logger.log_metrics(figures | {"epoch": self.current_epoch}, step=self.global_step)
        for name, value in figures.items():
            self.log(name, value, logger=False, prog_bar=name in SHOWN, batch_size=1)

    def training_step(self, batch: TrajectoryBatch, batch_idx: int) -> Tensor:  # type: ignore[override]
        with self.router.record(batch.pack.cu_seqlens):
            logp = self.target_log_probs(batch.pack, self.datamodule.sampling.temperature)
        loss, figures = self.objective(logp, batch.trajectories)
        counts = batch.trajectories.counts
        share = batch.pack.num_samples / counts.responses
        self.log("train/loss", loss.detach() / share, prog_bar=True, batch_size=1)
        self.log("policy/nll_per_token", -logp.detach().mean(), batch_size=1)
        for name, value in figures.items():
            self.log(name, value, batch_size=1)
        return self.normalised(loss, 1) + self.auxiliary_loss()
