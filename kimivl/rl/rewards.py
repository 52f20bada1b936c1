"""Rewards: the final answer alone decides, and the length of the response shapes it.

Source: Kimi k1.5 (arXiv 2501.12599) section 2.3.3 for the length reward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kimivl.data.chat import THINK_CLOSE
from kimivl.rl.types import Group, Problem, Response

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")

Verifier = Callable[[str, str], bool]
"""(text of the answer, expected answer) -> right or wrong."""


def boxed(text: str, answer: str) -> bool:
    r"""Whether the last ``\boxed{...}`` of the text is the expected answer, but for surrounding spaces."""
    found = _BOXED.findall(text)
    return bool(found) and found[-1].strip() == answer.strip()


def answer_text(response: Response, thinking: bool) -> str | None:
    """The part of a response that is judged, or None where there is none.

    A response that was cut at the hard cap has no answer. A thinking model answers after its closing mark; without
    the mark there is no answer, and what stands inside the thinking never counts.
    """
    if not response.finished:
        return None
    if not thinking:
        return response.text
    _, mark, answer = response.text.rpartition(THINK_CLOSE)
    return answer if mark else None


@dataclass(frozen=True, slots=True)
class LengthReward:
    """Shorter right answers earn more, long wrong ones less.

    ``lam_j = 0.5 - (len_j - min) / (max - min)`` over ALL responses of the problem, in tokens; a right response
    gets ``lam_j``, a wrong one ``min(0, lam_j)``; all get 0 where the lengths are equal.
    Worked example: lengths [100, 200, 300], right [1, 1, 0] -> [0.5, 0.0, -0.5].

    Args:
        weight: factor of the length reward in the total reward.
        start: it is off until this fraction of the run (k1.5: length penalty first off, then constant).
        floor: least value of ``max - min`` in tokens, so that answers that are all short are not told apart by
            differences that mean nothing. 0 is the paper's formula.
    """

    weight: float = 0.2
    start: float = 0.0
    floor: int = 0

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 <= self.start <= 1 or self.floor < 0:
            raise ValueError(f"reward.length needs weight >= 0, 0 <= start <= 1, floor >= 0, not {self}")

    def weight_at(self, progress: float) -> float:
        """The factor at a fraction ``progress`` of the run."""
        return self.weight if progress >= self.start else 0.0

    def __call__(self, lengths: Tensor, correct: Tensor) -> Tensor:
        """(G,) token counts and (G,) right or wrong -> (G,) unweighted length reward."""
        lengths = lengths.float()
        shortest, longest = lengths.min(), lengths.max()
        if shortest == longest:
            return torch.zeros_like(lengths)
        lam = 0.5 - (lengths - shortest) / (longest - shortest).clamp_min(self.floor)
        return torch.where(correct.bool(), lam, lam.clamp_max(0))


@dataclass(frozen=True, slots=True)
class Verdict:
    """``correct`` 0 or 1 (or between, where a verifier gives parts of a mark); NaN where the verifier failed, and
    then ``failure`` is the reason it is counted under."""

    correct: float
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one group, (G,) each. ``correct`` is NaN where the verifier failed; ``parts`` are the weighted parts of the
    reward by name, and ``total`` is their sum; ``failures`` counts verifier failures by reason."""

    correct: Tensor
    parts: dict[str, Tensor]
    total: Tensor
    failures: dict[str, int]


class Reward:
    """Scores responses: ``r in {0, 1}`` from the final answer, plus the length reward.

    Args:
        verifier: judges the text of the final answer. thinking: the answer stands after ``◁/think▷``.
    """

    def __init__(
        self,
        verifier: Verifier = boxed,
        length: LengthReward = LengthReward(),
        thinking: bool = True,  # noqa: B008
    ) -> None:
        self.verifier = verifier
        self.length = length
        self.thinking = thinking

    def judge(self, answers: Sequence[tuple[Problem, Response]]) -> list[Verdict]:
        """Right or wrong, for each pair of a problem and a response to it."""
        verdicts = []
        for problem, response in answers:
            text = answer_text(response, self.thinking)
            verdicts.append(Verdict(float(text is not None and self.verifier(text, problem.answer))))
        return verdicts

    def score(self, groups: Sequence[Group], progress: float) -> list[Scores]:
        """``progress``: the fraction of the run that is done, for the length reward's schedule."""
        verdicts = iter(self.judge([(group.problem, response) for group in groups for response in group.responses]))
        scores = []
        for group in groups:
            correct = torch.tensor([next(verdicts).correct for _ in group.responses])
            lengths = torch.tensor([len(response) for response in group.responses])
            parts = {
                "correct": correct,
                "length": self.length.weight_at(progress) * self.length(lengths, correct),
            }
            scores.append(Scores(correct, parts, torch.stack(list(parts.values())).sum(0), {}))
        return scores
