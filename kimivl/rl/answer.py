"""What a rank does for an iteration: it has its share of the groups answered by the engine, and scored."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field

from kimivl.rl.partial import OpenGroup
from kimivl.rl.record import KeptResponses
from kimivl.rl.rewards import Reward
from kimivl.rl.rollout import RolloutEngine
from kimivl.rl.scored import ScoredGroup, Statement
from kimivl.rl.types import Group, Problem, Request, Response, Sampling


@dataclass(slots=True)
class Iteration:
    """What is known of an iteration while it is collected.

    ``version``: the iteration whose policy the engine has. ``kept``: what an interruption must not lose. ``poll``:
    called often, may end the work. ``seconds`` and ``tokens``: of this rank.
    """

    number: int
    progress: float
    version: int
    engine: RolloutEngine
    reward: Reward
    kept: KeptResponses
    report: Callable[[int, int], None]
    poll: Callable[[], None]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    """A group after a call of the engine; ``scored`` once all its responses have ended. What ranks send each other."""

    group: OpenGroup
    scored: ScoredGroup | None


def answer(
    this: Iteration,
    groups: Sequence[OpenGroup],
    problems: Mapping[int, Problem],
    sampling: Sampling,
    budget: int | None,
) -> dict[int, Answered]:
    """Go on with these groups: by number, each as it is then.

    Args:
        problems: of the groups, by number. budget: tokens that a response may grow by.

    Raises:
        ValueError: when the engine fails.
    """
    places = [(group, k) for group in groups for k, draft in enumerate(group.drafts) if not draft.complete]
    requests = [group.drafts[k].request(problems[group.number], budget) for group, k in places]
    scores: dict[int, Future[ScoredGroup]] = {}
    # The judge works beside the engine; it is asked by one thread at a time.
    with ThreadPoolExecutor(1, "judge") as judge, closing(_responses(this, requests, sampling)) as responses:
        started = time.perf_counter()
        try:
            for number, response in responses:
                group, k = places[number]
                group.drafts[k] = group.drafts[k].extended(response, this.version)
                if group.complete:
                    scores[group.number] = judge.submit(_score, this, group, problems[group.number])
            generated = time.perf_counter()
            scored = {number: _result(this, score) for number, score in scores.items()}
        except BaseException:
            judge.shutdown(wait=False, cancel_futures=True)  # else the error would wait for all that is queued
            raise
    this.seconds["perf/generate_s"] += generated - started
    this.seconds["perf/score_s"] += time.perf_counter() - generated
    return {group.number: Answered(group, scored.get(group.number)) for group in groups}


def _result(this: Iteration, score: Future[ScoredGroup]) -> ScoredGroup:
    while not wait([score], timeout=1).done:
        this.poll()
    return score.result()


def _score(this: Iteration, group: OpenGroup, problem: Problem) -> ScoredGroup:
    """Responses that the engine failed to give are left out, and counted."""
    drafts = [draft for draft in group.drafts if draft.response is not None and draft.response.stop != "error"]
    errors, statement = len(group.drafts) - len(drafts), Statement.of(problem)
    if not drafts:
        return ScoredGroup(statement, [], None, errors)
    responses = [draft.response for draft in drafts if draft.response is not None]
    [scores] = this.reward.score([Group(problem, responses)], this.progress)
    return ScoredGroup(statement, drafts, scores, errors)


def _responses(
    this: Iteration, requests: Sequence[Request], sampling: Sampling
) -> Generator[tuple[int, Response], None, None]:
    """(number of the request, response): those that an interrupted run has left, then the engine's."""
    there = {number: this.kept.get(request) for number, request in enumerate(requests)}
    missing = [number for number, response in there.items() if response is None]
    done = 0
    for number, response in there.items():
        if response is not None:
            done += 1
            yield number, response
    this.report(done, len(requests))
    this.engine.poll = this.poll
    try:
        for place, response in this.engine.stream([requests[number] for number in missing], sampling):
            number, done = missing[place], done + 1
            this.kept.add(requests[number], response)
            this.tokens += max(0, len(response) - len(requests[number].prefix))  # an error may come without them
            this.report(done, len(requests))
            this.poll()
            yield number, response
        if done < len(requests):
            raise RuntimeError(f"it gave {done} of {len(requests)} responses and no more")
    except Exception as error:
        raise ValueError(_failure(this, error, done, len(requests))) from error
    finally:
        del this.engine.poll  # an evaluation has none


def _failure(this: Iteration, error: Exception, done: int, total: int) -> str:
    said = f"the rollout engine failed in iteration {this.number} after {done} of {total} responses: "
    said += f"{str(error).strip() or type(error).__name__}; "
    if this.kept.folder is None:
        return said + "they are lost, because data.rollouts is null or they ran ahead of training"
    return said + f"they are kept in {this.kept.folder}, and the same command goes on with them"
