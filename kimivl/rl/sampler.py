"""Which problems an iteration works on: from easy to hard, and more of what is not yet solved.

Source: Kimi k1.5 (arXiv 2501.12599) section 2.3.4, curriculum sampling and prioritised sampling.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch


class CurriculumSampler:
    """Draws distinct problems with probability proportional to ``1 - s``, ``s`` the tracked success rate.

    Open to the draw are problems up to a difficulty that rises linearly from ``start`` (a fraction of the range of
    difficulties) to the hardest at the fraction ``end`` of the run. A problem's success rate is a moving average over
    its own groups; before its first group it is the rate of its difficulty, and before any, ``prior``.

    Args:
        columns: (N,) each, what is known of the problems: ``difficulty`` and, where assessed, ``pass_rate``,
            ``easy_to_hack``, ``answer_kind``.
        seed: with the iteration it determines the draw.
        start, end: see above; ``end=0`` opens all problems at once.
        momentum: weight of the past in the moving average.
        floor: least probability weight, so that a solved problem can come back.
    """

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        seed: int = 0,
        start: float = 0.25,
        end: float = 0.5,
        momentum: float = 0.5,
        floor: float = 0.05,
        prior: float = 0.5,
    ) -> None:
        if not (0 <= start <= 1 and 0 <= end <= 1 and 0 <= momentum < 1 and 0 < floor <= 1):
            raise ValueError("sampler needs 0 <= start, end <= 1, 0 <= momentum < 1 and 0 < floor <= 1")
        self.difficulty = np.asarray(columns["difficulty"])
        self.seed, self.start, self.end = seed, start, end
        self.momentum, self.floor, self.prior = momentum, floor, prior
        self.rate = np.full(len(self.difficulty), np.nan)

    def ceiling(self, progress: float) -> float:
        """The highest difficulty that is open at a fraction ``progress`` of the run."""
        low, high = float(self.difficulty.min()), float(self.difficulty.max())
        opened = 1.0 if progress >= self.end else self.start + (1 - self.start) * progress / self.end
        return low + (high - low) * opened

    def success_rate(self) -> np.ndarray:
        """(N,) the estimate for every problem, seen or not."""
        rate = self.rate.copy()
        unseen = np.isnan(rate)
        for level in np.unique(self.difficulty[unseen]):
            known = self.rate[(self.difficulty == level) & ~unseen]
            rate[unseen & (self.difficulty == level)] = known.mean() if len(known) else self.prior
        return rate

    def sample(
        self, count: int, iteration: int, progress: float, leave_out: Collection[int] = (), attempt: int = 0
    ) -> np.ndarray:
        """(count,) numbers of distinct problems that are not in ``leave_out``; fewer open ones are topped up.

        ``attempt`` tells several draws of one iteration apart.
        """
        if count > len(self.difficulty):
            raise ValueError(f"an iteration asks for {count} problems, but the set has {len(self.difficulty)}")
        free = np.setdiff1d(np.arange(len(self.difficulty)), list(leave_out))
        opened = free[self.difficulty[free] <= self.ceiling(progress)]
        if len(opened) < count:
            opened = free[np.argsort(self.difficulty[free], kind="stable")[:count]]
        weight = np.maximum(1 - self.success_rate()[opened], self.floor)
        generator = np.random.default_rng([self.seed, iteration, 1, attempt])
        return generator.choice(opened, size=count, replace=False, p=weight / weight.sum())

    def update(self, problems: np.ndarray, success: np.ndarray, iteration: int) -> None:
        """Take in the success rates (B,) of the groups just scored."""
        past = self.rate[problems]
        mixed = self.momentum * past + (1 - self.momentum) * success
        self.rate[problems] = np.where(np.isnan(past), success, mixed)

    def admit(self, problem: int, correct: np.ndarray, total: np.ndarray) -> str | None:
        """Why the group of a problem is not trained on, or None: (G,) right or wrong, (G,) rewards."""
        return None

    def figures(self, progress: float) -> dict[str, float]:
        """What is logged under ``sampler/``."""
        return {"sampler/ceiling": self.ceiling(progress)}

    def state_dict(self) -> dict[str, Any]:
        return {"rate": torch.from_numpy(self.rate.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["rate"]) != len(self.rate):
            raise ValueError(
                f"the checkpoint tracks {len(state['rate'])} problems, but data.shards has {len(self.rate)}: "
                "resume with the problems that the run began with"
            )
        self.rate = state["rate"].numpy().copy()
