"""Which problems an iteration works on: from easy to hard, more of what is not yet solved, and none that is done with.

Source: Kimi k1.5 (arXiv 2501.12599) section 2.3.4, curriculum sampling and prioritised sampling.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from kimivl.rl.gates import Gates, open_problems

log = logging.getLogger(__name__)

Priority = Literal["uniform", "failure", "variance"]
"""Weight of a problem with success rate ``s``: 1; ``1 - s``; ``4 s (1 - s)``, which is largest at one half."""

STATE = ("rate", "last", "visits", "solved", "perfect")


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Opens the problems from easy to hard as the run goes on.

    The ceiling rises from the fraction ``start`` of the range of difficulties to its top at the fraction ``end`` of the
    run. A problem whose difficulty is not known counts as one of the median difficulty.

    Args:
        by: the label of the shards (``difficulty``), or measured (``pass_rate``, of ``kimivl assess``): one minus it.
        start, end: see above; ``end=0`` opens all problems at once.
        schedule: how the ceiling rises: by equal steps, or fast at first, as the square root.
    """

    by: Literal["difficulty", "pass_rate"] = "difficulty"
    start: float = 0.25
    end: float = 0.5
    schedule: Literal["linear", "root"] = "linear"

    def __post_init__(self) -> None:
        if not (0 <= self.start <= 1 and 0 <= self.end <= 1):
            raise ValueError(f"sampler.curriculum needs 0 <= start, end <= 1, not {self.start} and {self.end}")

    def difficulty(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """(N,) float difficulty of each problem.

        Raises:
            ValueError: when it is to be the measured one and nothing has been measured.
        """
        if self.by not in columns:
            raise ValueError(
                f"sampler.curriculum.by={self.by}: the problems of data.shards have no {self.by} yet; make it with: "
                "kimivl assess SHARDS"
            )
        values = np.asarray(columns[self.by], float)
        hard = 1 - values if self.by == "pass_rate" else np.where(values < 0, np.nan, values)
        known = hard[~np.isnan(hard)]
        return np.where(np.isnan(hard), np.median(known) if len(known) else 0.0, hard)

    def opened(self, progress: float) -> float:
        """The fraction of the range of difficulties that is open at a fraction ``progress`` of the run."""
        if progress >= self.end:
            return 1.0
        done = progress / self.end
        return self.start + (1 - self.start) * (done if self.schedule == "linear" else done**0.5)


class ProblemSampler:
    """Draws distinct problems in proportion to a priority that follows the tracked success rates.

    The success rate ``s`` of a problem is a moving average over its own groups. Before its first group it is the
    assessed ``pass_rate``, else the mean of the visited problems of its difficulty label, else ``prior``; and to that
    it drifts back while the problem is not visited, for the policy has moved on.

    All is a pure function of the state and of the iteration: every rank draws the same.

    Args:
        columns: (N,) each, what is known of the problems: ``difficulty`` (-1 is not known) and, where assessed,
            ``pass_rate``, ``easy_to_hack``, ``answer_kind``; ``crc32`` of their bytes tells one set from another.
        seed: with the iteration and the attempt it determines the draw.
        priority: see ``Priority``.
        floor: least weight, where the largest is 1, so that a solved problem can come back.
        prior: success rate before anything is known.
        momentum: weight of the past in the moving average.
        half_life: iterations without a visit after which half of what the visits said is forgotten; None keeps it.
        max_never_solved: largest share of a draw that problems may take which ``never_solved_after`` visits or more
            have not once solved. It gives way where nothing else is left to draw.
        curriculum: None has all problems open from the start.
        filter: column -> what it must be (``open_problems``); other problems are never drawn.
        gates: see ``Gates``.
    """

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        seed: int = 0,
        priority: Priority = "uniform",
        floor: float = 0.05,
        prior: float = 0.5,
        momentum: float = 0.5,
        half_life: float | None = None,
        max_never_solved: float = 1.0,
        never_solved_after: int = 4,
        curriculum: Curriculum | None = None,
        filter: Mapping[str, Any] | None = None,  # noqa: A002  the word of the command line
        gates: Gates | None = None,
    ) -> None:
        shares = {"prior": prior, "max_never_solved": max_never_solved}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"sampler.{name}={share} must be a share from 0 to 1")
        if not (0 <= momentum < 1 and 0 < floor <= 1):
            raise ValueError(f"sampler needs 0 <= momentum < 1 and 0 < floor <= 1, not {momentum} and {floor}")
        if never_solved_after < 1 or (half_life is not None and half_life <= 0):
            raise ValueError("sampler.never_solved_after must be at least 1, and sampler.half_life above 0 or null")
        self.seed, self.priority = seed, priority
        self.floor, self.prior, self.momentum, self.half_life = floor, prior, momentum, half_life
        self.max_never_solved, self.never_solved_after = max_never_solved, never_solved_after
        self.curriculum, self.gates = curriculum, gates or Gates()
        self.label = np.asarray(columns["difficulty"])
        self.difficulty = self.label.astype(float) if curriculum is None else curriculum.difficulty(columns)
        self.assessed = np.asarray(columns.get("pass_rate", np.full(len(self.label), np.nan)), float)
        self.is_open, self.closed = open_problems(columns, filter or {})
        self._say_closed()
        identity = columns.get("crc32", self.label)
        self.digest = hashlib.sha256(np.ascontiguousarray(identity).tobytes()).hexdigest()[:16]
        _, self._level = np.unique(self.label, return_inverse=True)
        self.rate = np.full(len(self), np.nan)
        self.last = np.full(len(self), -1)
        self.visits = np.zeros(len(self), np.int64)
        self.solved = np.zeros(len(self), bool)
        self.perfect = np.zeros(len(self), np.int64)
        self.iteration = 0
        self._drawn = np.zeros(0, np.int64)
        self._said_short = False

    def __len__(self) -> int:
        return len(self.label)

    def _say_closed(self) -> None:
        if not self.closed:
            return
        reasons = ", ".join(f"{count:,} by {name}" for name, count in self.closed.items())
        said = f"sampler.filter leaves {int(self.is_open.sum()):,} of {len(self):,} problems: out are {reasons}"
        if not self.is_open.any():
            raise ValueError(f"{said}; widen sampler.filter")
        log.info("%s", said)

    def ceiling(self, progress: float) -> float:
        """The highest difficulty that is open at a fraction ``progress`` of the run."""
        kept = self.difficulty[self.is_open]
        low, high = float(kept.min()), float(kept.max())
        return low + (high - low) * (1.0 if self.curriculum is None else self.curriculum.opened(progress))

    def success_rate(self, iteration: int | None = None) -> np.ndarray:
        """(N,) the estimate for every problem, seen or not, at an iteration (the last drawn for)."""
        seen = ~np.isnan(self.rate)
        count = np.bincount(self._level[seen], minlength=self._level.max() + 1)
        total = np.bincount(self._level[seen], self.rate[seen], minlength=self._level.max() + 1)
        of_level = np.where(count > 0, total / np.maximum(count, 1), self.prior)
        expected = np.where(np.isnan(self.assessed), of_level[self._level], self.assessed)
        if self.half_life is None:
            return np.where(seen, self.rate, expected)
        age = (self.iteration if iteration is None else iteration) - self.last
        kept = 0.5 ** (np.maximum(age, 0) / self.half_life)
        return np.where(seen, expected + (self.rate - expected) * kept, expected)

    def weights(self, iteration: int | None = None) -> np.ndarray:
        """(N,) priority of every problem, from ``floor`` to 1; a draw is in proportion to it."""
        if self.priority == "uniform":
            return np.ones(len(self))
        s = self.success_rate(iteration)
        return np.maximum(1 - s if self.priority == "failure" else 4 * s * (1 - s), self.floor)

    def never_solved(self) -> np.ndarray:
        """(N,) visited at least ``never_solved_after`` times, and never solved."""
        return (self.visits >= self.never_solved_after) & ~self.solved

    def sample(
        self, count: int, iteration: int, progress: float, leave_out: Collection[int] = (), attempt: int = 0
    ) -> np.ndarray:
        """(count,) numbers of distinct problems that are not in ``leave_out``.

        Where the curriculum has fewer open ones, the easiest of the others fill up. Where the set itself has fewer
        left (the rest is retired or left out), all of them are returned, none included, and that is said once.

        Args:
            attempt: tells several draws of one iteration apart.

        Raises:
            ValueError: when the set could never give ``count`` problems.
        """
        if count > self.is_open.sum():
            kept = f" after sampler.filter, of {len(self)}" if self.closed else ""
            raise ValueError(
                f"an iteration asks for {count} problems, but the set has {self.is_open.sum()}{kept}; lower "
                "data.problems"
            )
        goes_on = attempt > 0 and iteration == self.iteration
        self.iteration = iteration
        allowed = self.is_open & ~self.gates.retired(self.perfect)
        allowed[np.fromiter(leave_out, np.int64, len(leave_out))] = False
        free = np.flatnonzero(allowed)
        if len(free) < count:
            self._say_short(count, len(free))
            count = len(free)
        opened = free[self.difficulty[free] <= self.ceiling(progress)]
        if len(opened) < count:
            opened = free[np.argsort(self.difficulty[free], kind="stable")[:count]]
        generator = np.random.default_rng([self.seed, iteration, 1, attempt])
        drawn = self._draw(opened, count, generator)
        self._drawn = np.concatenate([self._drawn, drawn]) if goes_on else drawn
        return drawn

    def _draw(self, opened: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        weight = self.weights()[opened]
        drawn = generator.choice(opened, size=count, replace=False, p=weight / weight.sum()) if count else opened[:0]
        most, hopeless = int(self.max_never_solved * count), self.never_solved()
        if hopeless[drawn].sum() <= most:
            return drawn
        # One after the other, as they were drawn: what the cap lets through, then others in place of the rest.
        through = drawn[~hopeless[drawn] | (np.cumsum(hopeless[drawn]) <= most)]
        others = np.setdiff1d(opened[~hopeless[opened]], through)
        size = min(count - len(through), len(others))
        if size:
            weight = self.weights()[others]
            others = generator.choice(others, size=size, replace=False, p=weight / weight.sum())
        left = drawn[~np.isin(drawn, through)]
        return np.concatenate([through, others[:size], left[: count - len(through) - size]])

    def _say_short(self, wanted: int, left: int) -> None:
        if not self._said_short:
            self._said_short = True
            retired = int((self.is_open & self.gates.retired(self.perfect)).sum())
            log.warning(
                "an iteration asks for %d problems, but only %d are left to draw (%d are retired by "
                "sampler.gates.retire_after, others are in use): it gets those; this is said once",
                wanted,
                left,
                retired,
            )

    def update(self, problems: np.ndarray, success: np.ndarray, iteration: int) -> None:
        """Take in the success rates (B,) of the groups just scored, admitted or not; NaN (no verdict) says nothing."""
        judged = ~np.isnan(success)
        problems, success = np.asarray(problems)[judged], np.asarray(success, float)[judged]
        # What has been forgotten since the last visit does not come back with this one.
        now = self.success_rate(iteration)[problems]
        past = np.where(np.isnan(self.rate[problems]), self.assessed[problems], now)
        mixed = self.momentum * past + (1 - self.momentum) * success
        self.rate[problems] = np.where(np.isnan(past), success, mixed)
        self.last[problems] = iteration
        self.visits[problems] += 1
        self.solved[problems] |= success > 0
        self.perfect[problems] = np.where(success == 1, self.perfect[problems] + 1, 0)

    def admit(self, problem: int, correct: np.ndarray, total: np.ndarray) -> str | None:
        """Why the group of a problem is not trained on, or None: (G,) right or wrong, (G,) rewards."""
        return self.gates.admit(correct)

    def figures(self, progress: float) -> dict[str, float]:
        """What is logged under ``sampler/``: of the open problems, and of the last draw."""
        drawn = self._drawn
        figures = {
            "sampler/ceiling": self.ceiling(progress),
            "sampler/solve_rate_mean": float(self.success_rate()[self.is_open].mean()),
            "sampler/seen": float((self.visits[self.is_open] > 0).mean()),
            "sampler/never_solved": float(self.never_solved()[self.is_open].sum()),
            "sampler/retired": float((self.is_open & self.gates.retired(self.perfect)).sum()),
        }
        if len(drawn):
            figures["sampler/difficulty"] = float(self.difficulty[drawn].mean())
        return figures

    def state_dict(self) -> dict[str, Any]:
        tensors = {name: torch.from_numpy(getattr(self, name).copy()) for name in STATE}
        return tensors | {"iteration": self.iteration, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["rate"]) != len(self) or state["digest"] != self.digest:
            raise ValueError(
                f"the checkpoint tracks {len(state['rate'])} problems, but data.shards has {len(self)}"
                f"{' others' if len(state['rate']) == len(self) else ''}: resume with the problems that the run began "
                "with"
            )
        for name in STATE:
            setattr(self, name, state[name].numpy().copy())
        self.iteration = int(state["iteration"])
