"""One RL iteration's rollouts: sampler -> requests -> engine -> reward -> gates -> experience."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimivl.rl.experience import Experience
from kimivl.rl.partial import Draft, OpenGroup, PartialRollouts
from kimivl.rl.record import KeptResponses, RolloutRecord
from kimivl.rl.rewards import Reward
from kimivl.rl.rollout import RolloutEngine, response_seed
from kimivl.rl.sampler import ProblemSampler
from kimivl.rl.scored import ScoredGroup, experience_of, figures_of, rows_of
from kimivl.rl.types import Group, Problem, Request, Response, Sampling

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
    """What an iteration has brought: ``experience`` (its reference log-probabilities still zero) with the problems it
    answers, figures to log, and the collector's state as it was afterwards."""

    experience: Experience
    problems: dict[int, Problem]
    figures: dict[str, float]
    state: dict[str, Any]


@dataclass(slots=True)
class _Iteration:
    """What is known of the iteration while it is collected. ``version``: the iteration whose policy the engine has."""

    number: int
    progress: float
    version: int
    engine: RolloutEngine
    reward: Reward
    kept: KeptResponses
    report: Callable[[int, int], None]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: int = 0


class Collector:
    """Collects the experience of an iteration, and keeps what goes on into the next one.

    Args:
        sampler: says which problems. read: numbers -> those problems that can be read.
        advantages: (R,) rewards, (R,) group numbers -> (R,) advantages.
        rollouts: folder of the record of all rollouts; None keeps none.
    """

    def __init__(
        self,
        sampler: ProblemSampler,
        read: Callable[[Sequence[int]], list[Problem]],
        sampling: Sampling,
        advantages: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        plan: Plan,
        rollouts: Path | None = None,
    ) -> None:
        self.sampler = sampler
        self.read = read
        self.sampling = sampling
        self.advantages = advantages
        self.plan = plan
        self.record = RolloutRecord(rollouts)
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
            ValueError: when the engine fails, when no problem is left to draw or no response can be judged, or after
                ``max_empty`` iterations in a row without an admitted group. Whatever is raised, what the engine gave
                is kept.
        """
        self.record.begin(iteration)
        version = iteration if version is None else version
        # What runs ahead of training is drawn again by a run that goes on: its policy is no more.
        kept = self.record.kept(iteration, policy) if version == iteration else KeptResponses(None, policy)
        this = _Iteration(iteration, progress, version, engine, reward, kept, report)
        try:
            return self._collect(this)
        except BaseException:  # of the engine, the reward or the disk, or Ctrl-C
            kept.save()
            raise

    def _collect(self, this: _Iteration) -> Collected:
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

    def _open(self, this: _Iteration, count: int, attempt: int, used: Sequence[int]) -> list[OpenGroup]:
        """New groups of ``count`` problems that are not in use in this iteration."""
        if count < 1:
            return []
        leave_out = [*used, *_numbers(self.waiting.groups.values())]
        numbers = self.sampler.sample(count, this.number, this.progress, leave_out, attempt).tolist()
        self._problems |= {problem.number: problem for problem in self.read(numbers)}
        return [
            OpenGroup(number, this.number, [Draft(self._seed(this, number, k)) for k in range(self.plan.responses)])
            for number in numbers
            if number in self._problems
        ]

    def _seed(self, this: _Iteration, problem: int, sample: int) -> int:
        return response_seed(self.plan.seed, this.number, problem, sample)

    def _problem(self, number: int) -> Problem:
        """The problem of a group that waits; after a resume it has to be read again."""
        if number not in self._problems:
            self._problems |= self.read_again([number])
        return self._problems[number]

    def read_again(self, numbers: Sequence[int]) -> dict[int, Problem]:
        """Problems that a checkpoint has responses to, by number."""
        found = {problem.number: problem for problem in self.read(numbers)}
        if len(found) < len(numbers):
            raise ValueError(
                "problems that the checkpoint has responses to can no longer be read (see the warnings above): bring "
                "back their shards, or start anew without ckpt_path"
            )
        return found

    # Their responses, and what they are worth.

    def _answer(self, this: _Iteration, groups: Sequence[OpenGroup]) -> list[ScoredGroup]:
        """Go on with these groups: those that come to be complete, scored; the others wait."""
        places = [(group, k) for group in groups for k, draft in enumerate(group.drafts) if not draft.complete]
        requests = [group.drafts[k].request(self._problem(group.number), self.plan.budget) for group, k in places]
        scores: dict[int, Future[Any]] = {}
        # The judge works beside the engine; it is asked by one thread at a time.
        with ThreadPoolExecutor(1, "judge") as judge:
            started = time.perf_counter()
            try:
                for number, response in self._responses(this, requests):
                    group, k = places[number]
                    group.drafts[k] = group.drafts[k].extended(response, this.version)
                    if group.complete:
                        scores[group.number] = judge.submit(self._score, this, group)
                generated = time.perf_counter()
                found = [scores[group.number].result() for group in groups if group.complete]
            except BaseException:
                judge.shutdown(wait=False, cancel_futures=True)  # else the error would wait for all that is queued
                raise
        this.seconds["perf/generate_s"] += generated - started
        this.seconds["perf/score_s"] += time.perf_counter() - generated
        self.waiting.put([group for group in groups if not group.complete])
        return [self._admit(group) for group in found]

    def _score(self, this: _Iteration, group: OpenGroup) -> ScoredGroup:
        """Responses that the engine failed to give are left out, and counted."""
        drafts = [draft for draft in group.drafts if draft.response is not None and draft.response.stop != "error"]
        problem, errors = self._problem(group.number), len(group.drafts) - len(drafts)
        if not drafts:
            return ScoredGroup(problem, [], None, errors)
        responses = [draft.response for draft in drafts if draft.response is not None]
        [scores] = this.reward.score([Group(problem, responses)], this.progress)
        return ScoredGroup(problem, drafts, scores, errors)

    def _responses(self, this: _Iteration, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        """(number of the request, response): those that an interrupted run has left, then the engine's."""
        there = {number: this.kept.get(request) for number, request in enumerate(requests)}
        missing = [number for number, response in there.items() if response is None]
        done = 0
        for number, response in there.items():
            if response is not None:
                done += 1
                yield number, response
        this.report(done, len(requests))
        try:
            for place, response in this.engine.stream([requests[number] for number in missing], self.sampling):
                number, done = missing[place], done + 1
                this.kept.add(requests[number], response)
                this.tokens += max(0, len(response) - len(requests[number].prefix))  # an error may come without them
                this.report(done, len(requests))
                yield number, response
            if done < len(requests):
                raise RuntimeError(f"it gave {done} of {len(requests)} responses and no more")
        except Exception as error:
            raise ValueError(self._failure(this, error, done, len(requests))) from error

    def _failure(self, this: _Iteration, error: Exception, done: int, total: int) -> str:
        said = f"the rollout engine failed in iteration {this.number} after {done} of {total} responses: "
        said += f"{str(error).strip() or type(error).__name__}; "
        if this.kept.folder is None:
            return said + "they are lost, because data.rollouts is null or they ran ahead of training"
        return said + f"they are kept in {this.kept.folder}, and the same command goes on with them"

    def _admit(self, group: ScoredGroup) -> ScoredGroup:
        """Ask the gates; they look at what is right, not at the shaped reward."""
        if group.judged.sum() < min(2, self.plan.responses):
            group.rejected = "unjudged"
        else:
            scores = group.judged_scores
            group.rejected = self.sampler.admit(group.problem.number, *(tensor.numpy() for tensor in scores))
        return group

    # What comes of it.

    def _finish(self, this: _Iteration, scored: list[ScoredGroup], rounds: int) -> Collected:
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
        figures = figures_of(scored, experience) | self.sampler.figures(this.progress) | this.engine.figures()
        figures |= {
            **this.seconds,
            "rollout/waiting": self.waiting.unfinished,
            "sampler/rounds": rounds,
            "perf/rollout_tokens_per_s": this.tokens / max(this.seconds["perf/generate_s"], 1e-9),
        }
        self.record.write(this.number, rows_of(this.number, scored, experience))
        this.kept.save()
        needed = {group.problem.number for group in used}
        problems = {number: self._problems[number] for number in needed}
        self._problems = {number: self._problems[number] for number in self.waiting.groups if number in self._problems}
        return Collected(experience, problems, figures, self.state_dict())

    def _check(
        self, this: _Iteration, scored: list[ScoredGroup], judged: list[ScoredGroup], admitted: list[ScoredGroup]
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
