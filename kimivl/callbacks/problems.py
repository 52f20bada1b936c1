"""Which problems RL works on, for reading in W&B: how often they are solved, and the hardest with their pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer

from kimivl import tracking
from kimivl.runtime import ranks


class Problems(Callback):
    """Logs a histogram of the solve rates and a table of the hardest problems, where a logger can show them.

    Stages without a sampler leave nothing, and nothing is read where W&B is off.

    Args:
        every_n_iterations: how often; the last iteration always counts. hardest: problems in the table.
    """

    def __init__(self, every_n_iterations: int = 10, hardest: int = 8) -> None:
        if every_n_iterations < 1 or hardest < 0:
            raise ValueError("callbacks.problems needs every_n_iterations of at least 1 and hardest of at least 0")
        self.every_n_iterations = every_n_iterations
        self.hardest = hardest

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        done = trainer.current_epoch + 1
        due = done % self.every_n_iterations == 0 or done == trainer.max_epochs
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        sampler = getattr(datamodule, "sampler", None)
        if due and sampler is not None:
            ranks.share(lambda: self._show(trainer, datamodule, sampler))  # when it fails, it fails on all ranks

    def _show(self, trainer: Trainer, datamodule: Any, sampler: Any) -> None:
        if not tracking.shows_media(trainer.loggers):
            return
        seen = np.flatnonzero(sampler.visits > 0)
        step = trainer.global_step
        tracking.log_histogram(trainer.loggers, "sampler/solve_rate", sampler.rate[seen], (0.0, 1.0), step)
        hardest = hardest_problems(sampler.rate, sampler.visits, self.hardest)
        rows = [_row(problem, sampler) for problem in datamodule.read_problems(datamodule.index, hardest.tolist())]
        tracking.log_table(trainer.loggers, "sampler/hardest", rows, step)


def hardest_problems(rate: np.ndarray, visits: np.ndarray, count: int) -> np.ndarray:
    """(count,) numbers of the visited problems of the lowest solve rate; of equal ones, the most visited.

    Args:
        rate: (N,) solve rate, NaN for a problem not visited. visits: (N,).
    """
    seen = np.flatnonzero(visits > 0)
    return seen[np.lexsort((seen, -visits[seen], rate[seen]))][:count]


def _row(problem: Any, sampler: Any) -> dict[str, Any]:
    images = problem.sample.images
    number = problem.number
    return {
        "key": problem.key,
        "image": tracking.Picture(images[0]) if images else None,
        "question": problem.question,
        "expected": problem.answer,
        "difficulty": float(sampler.difficulty[number]),
        "solve_rate": round(float(sampler.rate[number]), 3),
        "visits": int(sampler.visits[number]),
        "ever_solved": bool(sampler.solved[number]),
    }
