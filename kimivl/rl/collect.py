"""One RL iteration's rollouts: sampler -> requests -> engine -> reward -> gates -> experience.

Of several ranks each draws the same problems, answers its share of them, and is sent what the others have of theirs:
from there on all know the whole iteration, and decide alike what comes of it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimivl.rl.answer import Answered, Iteration, answer
from kimivl.rl.exchange import Exchange, shares
from kimivl.rl.experience import Experience
from kimivl.rl.partial import Draft, OpenGroup, PartialRollouts
from kimivl.rl.record import KeptResponses, RolloutRecord
from kimivl.rl.rewards import Reward
from kimivl.rl.rollout import RolloutEngine, response_seed
from kimivl.rl.sampler import ProblemSampler
from kimivl.rl.scored import ScoredGroup, experience_of, figures_of, over_ranks, rows_of
from kimivl.rl.types import Problem, Sampling
from kimivl.runtime import ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much an iteration collects.

    Args:
        problems: groups of an iteration. responses: to each problem, k in the paper; a single one has nothing to be
            compared with, which only ``objective.baseline=none`` can do without.
        rounds: an iteration that has fewer admitted groups than ``problems`` draws the missing number again, so often
            at most (dynamic sampling); 1 draws once.
        budget: tokens that a response may grow by in an iteration; a longer one goes on in the next. None has none.
        max_empty: iterations in a row without an admitted group after which the run is stopped.
        seed: of the run.
    """

    problems: int
    responses: int
    rounds: int = 1
    budget: int | None = None
    max_empty: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("problems", "responses", "rounds", "budget", "max_empty"):
            value = getattr(self, name)
            if not (value is None and name == "budget") and value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")


@dataclass(frozen=True, slots=True)
class Collected:
    """What an iteration has brought: ``experience`` (its reference log-probabilities still zero) with those of its
    problems that this rank has read, figures to log, and the collector's state as it was afterwards."""

    experience: Experience
    problems: dict[int, Problem]
    figures: dict[str, float]
    state: dict[str, Any]


class Collector:
    """Collects the experience of an iteration, and keeps what goes on into the next one.

    Args:
        sampler: says which problems. read: numbers -> those problems that can be read; a rank asks for its own.
        advantages: (R,) rewards, (R,) group numbers -> (R,) advantages.
        rollouts: folder of the record of all rollouts; None keeps none.
        exchange: how the ranks keep together.
    """

    def __init__(
        self,
        sampler: ProblemSampler,
        read: Callable[[Sequence[int]], list[Problem]],
        sampling: Sampling,
        advantages: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        plan: Plan,
        rollouts: Path | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self.sampler = sampler
        self.read = read
        self.sampling = sampling
        self.advantages = advantages
        self.plan = plan
        self.record = RolloutRecord(rollouts)
        self.exchange = exchange or Exchange()
        self.waiting = PartialRollouts()
        self.empty = 0
        self._problems: dict[int, Problem] = {}

    def collect(
        self,
        engine: RolloutEngine,
        reward: Reward,
        iteration: int,
        progress: float,
        *,
        version: int | None = None,
        policy: Callable[[], str] = str,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> Collected:
        """The experience of ``iteration``, at the fraction ``progress`` of the run.

        First the groups that wait are gone on with, and new ones fill up to ``problems``; scored groups pass the
        sampler's gates; for those that did not, further rounds draw others. While nothing is admitted and groups wait,
        these go on for another budget.

        Args:
            version: the iteration whose policy the engine has; this one's by default.
            policy: tells one policy from another; asked for when responses are saved or used again.
            report: called with the number of responses that are there, and of those asked for.

        Raises:
            ValueError: when the engine fails, here or on another rank, when no problem is left to draw or no response
                can be judged, or after ``max_empty`` iterations in a row without an admitted group. Whatever is raised,
                what the engine gave is kept.
        """
        ranks.share(lambda: self.record.begin(iteration))
        version = iteration if version is None else version
        # What runs ahead of training is drawn again by a run that goes on: its policy is no more.
        kept = self.record.kept(iteration, policy) if version == iteration else KeptResponses(None, policy)
        this = Iteration(iteration, progress, version, engine, reward, kept, report, self.exchange.poll)
        try:
            return self._collect(this)
        except BaseException:  # of the engine, the reward or the disk, or Ctrl-C
            kept.save()
            raise

    def _collect(self, this: Iteration) -> Collected:
        scored: list[ScoredGroup] = []
        rounds = 0
        for attempt in range(self.plan.rounds):
            going_on = self.waiting.take() if attempt == 0 else []
            missing = self.plan.problems - len(going_on) - len(self.waiting) - _admitted(scored)
            opened = self._open(this, missing, attempt, [group.problem.number for group in scored] + _numbers(going_on))
            if not going_on and not opened:
                break
            scored += self._answer(this, going_on + opened)
            rounds += 1
        while not _admitted(scored) and len(self.waiting):
            scored += self._answer(this, self.waiting.take())
        return self._finish(this, scored, rounds)

    # Which problems.

    def _open(self, this: Iteration, count: int, attempt: int, used: Sequence[int]) -> list[OpenGroup]:
        """New groups of ``count`` problems that are not in use in this iteration."""
        if count < 1:
            return []
        leave_out = [*used, *_numbers(self.waiting.groups.values())]
        numbers = self.sampler.sample(count, this.number, this.progress, leave_out, attempt).tolist()
        return [
            OpenGroup(number, this.number, [Draft(self._seed(this, number, k)) for k in range(self.plan.responses)])
            for number in numbers
        ]

    def _seed(self, this: Iteration, problem: int, sample: int) -> int:
        return response_seed(self.plan.seed, this.number, problem, sample)

    def read_again(self, numbers: Sequence[int]) -> dict[int, Problem]:
        """Problems that there are responses to, by number; all must be there."""
        found = {problem.number: problem for problem in self.read(numbers)}
        if len(found) < len(numbers):
            raise ValueError(
                "problems that there are responses to can no longer be read (see the warnings above): bring back their "
                "shards, or start anew without ckpt_path"
            )
        return found

    # Their responses, and what they are worth.

    def _answer(self, this: Iteration, groups: Sequence[OpenGroup]) -> list[ScoredGroup]:
        """Go on with these groups: those that come to be complete, scored; the others wait. New ones whose problem
        cannot be read are left out."""
        difficulty = self.sampler.difficulty[_numbers(groups)].tolist()
        dealt = shares(groups, difficulty, ranks.world_size())[ranks.rank()]
        found: dict[int, Answered] = {}
        for part in self.exchange.run(lambda: self._answer_own(this, [groups[place] for place in dealt])):
            found |= part
        answered = [found[group.number] for group in groups if group.number in found]
        self.waiting.put([one.group for one in answered if not one.group.complete])
        return [self._admit(one.scored) for one in answered if one.scored is not None]

    def _answer_own(self, this: Iteration, groups: Sequence[OpenGroup]) -> dict[int, Answered]:
        """This rank's share of the groups."""
        unread = [group for group in groups if group.number not in self._problems]
        going_on = [group.number for group in unread if group.begun]
        self._problems |= self.read_again(going_on)  # after a resume, or by another rank's hands
        new = self.read([group.number for group in unread if not group.begun])
        self._problems |= {problem.number: problem for problem in new}
        readable = [group for group in groups if group.number in self._problems]
        return answer(this, readable, self._problems, self.sampling, self.plan.budget)

    def _admit(self, group: ScoredGroup) -> ScoredGroup:
        """Ask the gates; they look at what is right, not at the shaped reward."""
        if group.judged.sum() < min(2, self.plan.responses):
            group.rejected = "unjudged"
        else:
            scores = group.judged_scores
            group.rejected = self.sampler.admit(group.problem.number, *(tensor.numpy() for tensor in scores))
        return group

    # What comes of it.

    def _finish(self, this: Iteration, scored: list[ScoredGroup], rounds: int) -> Collected:
        judged = [group for group in scored if group.judged.any()]
        admitted = [group for group in scored if group.rejected is None]
        self._check(this, scored, judged, admitted)
        # Without one admitted group the steps of the iteration go by with a group that weighs nothing.
        used = admitted or judged[:1]
        experience = experience_of(this.number, used, self.advantages)
        if not admitted:
            experience.advantage.zero_()
            experience.weight.zero_()
        self.sampler.update(
            np.array([group.problem.number for group in judged]),
            np.array([float(group.judged_scores[0].mean()) for group in judged]),
            this.number,
        )
        figures = figures_of(scored, experience) | self.sampler.figures(this.progress)
        figures |= {"rollout/waiting": self.waiting.unfinished, "sampler/rounds": rounds}
        figures |= self._keep(this, scored, experience)
        needed = {group.problem.number for group in used}
        problems = {number: problem for number, problem in self._problems.items() if number in needed}
        self._problems = {number: self._problems[number] for number in self.waiting.groups if number in self._problems}
        return Collected(experience, problems, figures, self.state_dict())

    def _keep(self, this: Iteration, scored: list[ScoredGroup], experience: Experience) -> dict[str, float]:
        """Write what the iteration has been; returns the figures of the work of all ranks."""

        def own() -> tuple[int, dict[str, float], dict[str, float]]:
            self.record.write(this.number, rows_of(this.number, scored, experience))
            this.kept.save()
            return this.tokens, this.seconds, this.engine.figures()

        tokens, seconds, of_engine = zip(*ranks.attempt(own), strict=True)
        figures = over_ranks(of_engine) | over_ranks(seconds)
        generate = [own["perf/generate_s"] for own in seconds]
        slowest = max(*generate, 1e-9)
        balance = {"perf/rollout_balance": sum(generate) / len(generate) / slowest} if len(generate) > 1 else {}
        return figures | {"perf/rollout_tokens_per_s": sum(tokens) / slowest} | balance

    def _check(
        self, this: Iteration, scored: list[ScoredGroup], judged: list[ScoredGroup], admitted: list[ScoredGroup]
    ) -> None:
        if not scored:
            raise ValueError(
                f"no problem is left to draw in iteration {this.number}: all are left out or retired; widen "
                "sampler.filter or sampler.gates.retire_after"
            )
        if not judged:
            reasons = Counter(reason for group in scored for reason in group.failures.elements())
            raise ValueError(
                f"none of the {sum(len(group.drafts) for group in scored)} responses of iteration {this.number} could "
                f"be judged ({', '.join(f'{count} {reason}' for reason, count in reasons.items()) or 'engine errors'})"
            )
        self.empty = 0 if admitted else self.empty + 1
        if self.empty:
            reasons = Counter(str(group.rejected) for group in scored)
            said = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            if self.empty >= self.plan.max_empty:
                raise ValueError(
                    f"no group was admitted in the last {self.empty} iterations (data.max_empty); of the last: {said}; "
                    "loosen sampler.gates, raise data.rounds, or choose problems that the model sometimes solves"
                )
            log.warning("iteration %d trains on nothing: no group was admitted (%s)", this.number, said)

    def state_dict(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict(), "waiting": self.waiting.state_dict(), "empty": self.empty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.waiting.load_state_dict(state["waiting"])
        self.empty = state["empty"]


def _admitted(scored: Sequence[ScoredGroup]) -> int:
    return sum(group.rejected is None for group in scored)


def _numbers(groups: Any) -> list[int]:
    return [group.number for group in groups]
