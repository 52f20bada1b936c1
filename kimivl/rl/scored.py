"""Groups of responses with their scores, and what is made of them: experience, figures, and a record to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimivl.rl.experience import Experience
from kimivl.rl.partial import Draft
from kimivl.rl.rewards import Scores
from kimivl.rl.types import Problem, Response

STOPS = ("stop", "length", "repetition")


@dataclass(frozen=True, slots=True)
class Statement:
    """What is written down of a problem: without its pictures, which the ranks need not send each other."""

    number: int
    key: str
    difficulty: int
    question: str
    answer: str

    @classmethod
    def of(cls, problem: Problem) -> Statement:
        return cls(problem.number, problem.key, problem.difficulty, problem.question, problem.answer)


@dataclass(slots=True)
class ScoredGroup:
    """The responses to one problem that the engine gave, with their scores (None where it gave none).

    ``errors`` counts those it failed to give; ``rejected`` is why the group is not trained on.
    """

    problem: Statement
    drafts: list[Draft]
    scores: Scores | None
    errors: int = 0
    rejected: str | None = None
    judged: Tensor = field(init=False)
    """(G,) which responses have a verdict: the verifier did not fail on them."""

    def __post_init__(self) -> None:
        self.judged = torch.zeros(0, dtype=torch.bool) if self.scores is None else ~self.scores.correct.isnan()

    @property
    def judged_scores(self) -> tuple[Tensor, Tensor]:
        """Right or wrong, and the reward, of the judged responses."""
        if self.scores is None:
            return torch.zeros(0), torch.zeros(0)
        return self.scores.correct[self.judged], self.scores.total[self.judged]

    @property
    def judged_drafts(self) -> list[Draft]:
        return [draft for draft, judged in zip(self.drafts, self.judged.tolist(), strict=True) if judged]

    @property
    def failures(self) -> Counter[str]:
        """Responses without a verdict, by reason."""
        failures = Counter(self.scores.failures if self.scores is not None else {})
        return failures + Counter({"engine": self.errors})


def experience_of(
    iteration: int, groups: Sequence[ScoredGroup], advantages: Callable[[Tensor, Tensor], Tensor]
) -> Experience:
    """The judged responses of ``groups``; reference log-probabilities and weights are to be filled in."""
    drafts = [draft for group in groups for draft in group.judged_drafts]
    number = torch.arange(len(groups)).repeat_interleave(torch.tensor([int(group.judged.sum()) for group in groups]))
    responses = [_written(draft) for draft in drafts]
    tokens = torch.tensor([token for response in responses for token in response.tokens], dtype=torch.int64)
    experts, expert_starts = _experts(responses)
    return Experience(
        iteration=iteration,
        problem=torch.tensor([group.problem.number for group in groups])[number],
        tokens=tokens,
        starts=torch.tensor([0, *np.cumsum([len(response) for response in responses])]),
        correct=torch.cat([group.judged_scores[0] for group in groups]),
        advantage=advantages(torch.cat([group.judged_scores[1] for group in groups]), number),
        ref_logp=torch.zeros(len(tokens)),
        rollout_logp=torch.cat([_logp(response) for response in responses]),
        version=torch.from_numpy(np.concatenate([draft.version for draft in drafts])),
        weight=torch.ones(len(tokens)),
        experts=experts,
        expert_starts=expert_starts,
    )


def _written(draft: Draft) -> Response:
    assert draft.response is not None
    return draft.response


def _logp(response: Response) -> Tensor:
    if response.logp is None:
        return torch.full((len(response),), float("nan"))
    return torch.from_numpy(np.asarray(response.logp, np.float32))


def _experts(responses: Sequence[Response]) -> tuple[Tensor | None, Tensor | None]:
    """Only where the engine gave them for all responses: half a replay would be none."""
    given = [response.experts for response in responses if response.experts is not None]
    if not given or len(given) < len(responses):
        return None, None
    starts = torch.tensor([0, *np.cumsum([len(experts) for experts in given])])
    # Signed: -1 stands beside them in a pack.
    return torch.from_numpy(np.concatenate(given).astype(np.int16)), starts


def figures_of(groups: Sequence[ScoredGroup], experience: Experience) -> dict[str, float]:
    """What is logged of the rollouts, over all groups that were scored, whether they are trained on or not."""
    responses = [_written(draft) for group in groups for draft in group.drafts]
    lengths = np.array([len(response) for response in responses] or [0])
    with_scores = [group for group in groups if group.judged.any()]
    correct = [group.judged_scores[0] for group in with_scores]
    age = experience.iteration - experience.version
    figures = {
        "rollout/accuracy": float(torch.cat(correct).mean()),
        "rollout/length": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/finished": _share(response.finished for response in responses),
        "rollout/mixed_groups": _share(float(scores.std(correction=0)) > 0 for scores in correct),
        "rollout/groups": len(groups),
        "rollout/trained_groups": len(experience.problem.unique()) if experience.weight.any() else 0,
        "rollout/off_policy": float((age > 0).float().mean()) if len(age) else 0.0,
        "rollout/age": float(age.float().mean()) if len(age) else 0.0,
        "reward/total": float(torch.cat([group.judged_scores[1] for group in with_scores]).mean()),
    }
    figures |= {f"rollout/stop_{stop}": _share(response.stop == stop for response in responses) for stop in STOPS}
    figures |= {f"reward/{name}": value for name, value in _parts(with_scores).items()}
    failures = sum((group.failures for group in groups), Counter[str]())
    figures |= {f"reward/failures/{reason}": count for reason, count in failures.items()}
    rejected = Counter(group.rejected for group in groups if group.rejected is not None)
    return figures | {f"sampler/rejected/{reason}": count for reason, count in rejected.items()}


def _parts(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Mean of each part of the reward over the judged responses."""
    parts: dict[str, list[Tensor]] = {}
    for group in groups:
        for name, values in (group.scores.parts if group.scores is not None else {}).items():
            parts.setdefault(name, []).append(values[group.judged])
    return {name: float(torch.cat(values).mean()) for name, values in parts.items()}


def _share(flags: Any) -> float:
    values = list(flags)
    return sum(values) / max(len(values), 1)


def over_ranks(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One set of figures of those of several ranks: tokens and rates (``_per_s``) are summed, seconds (``_s``) and
    steps are of the slowest, all others means."""
    merged = {}
    for name in dict.fromkeys(name for own in figures for name in own):
        values = [own[name] for own in figures if name in own]
        if name.endswith(("_tokens", "_per_s")):
            merged[name] = sum(values)
        elif name.endswith(("_s", "_steps")):
            merged[name] = max(values)
        else:
            merged[name] = sum(values) / len(values)
    return merged


def rows_of(iteration: int, groups: Sequence[ScoredGroup], experience: Experience) -> Iterator[dict[str, Any]]:
    """A line of the record for each group, with what was said, what it earned and why it ended."""
    advantages = iter(experience.advantage.tolist())
    in_experience = set(experience.problem.tolist())
    for group in groups:
        problem = group.problem
        trained = problem.number in in_experience
        yield {
            "iteration": iteration,
            "number": problem.number,
            "key": problem.key,
            "difficulty": problem.difficulty,
            "question": problem.question,
            "answer": problem.answer,
            "rejected": group.rejected,
            "engine_errors": group.errors,
            "responses": [
                _row(group, place, next(advantages) if trained and judged else None)
                for place, judged in enumerate(group.judged.tolist())
            ],
        }


def _row(group: ScoredGroup, place: int, advantage: float | None) -> dict[str, Any]:
    draft, scores = group.drafts[place], group.scores
    response = _written(draft)
    assert scores is not None
    judged = bool(group.judged[place])
    return {
        "text": response.text,
        "tokens": len(response),
        "stop": response.stop,
        "seed": draft.seed,
        "written_in": sorted(set(draft.version.tolist())),
        "correct": float(scores.correct[place]) if judged else None,
        "reward": float(scores.total[place]) if judged else None,
        "parts": {name: float(values[place]) for name, values in scores.parts.items()} if judged else None,
        "advantage": advantage,
    }
