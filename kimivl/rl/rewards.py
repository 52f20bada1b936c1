"""Rewards: the final answer alone decides, and the length of the response shapes it.

Source: Kimi k1.5 (arXiv 2501.12599) section 2.3; Kimi-VL (arXiv 2504.07491) section 2.4.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kimivl.data.chat import THINK_CLOSE, THINK_OPEN
from kimivl.data.sample import Sample
from kimivl.rl.length import LengthReward, LengthShaping
from kimivl.rl.types import Group, Problem, Response
from kimivl.rl.verifiers import ByTask, Verifier, boxed
from kimivl.rl.verifiers.worker import Case
from kimivl.rl.workers import Verdict, VerifierPool

__all__ = [
    "FormatPenalty",
    "LengthReward",
    "Part",
    "RepetitionPenalty",
    "Reward",
    "Scores",
    "Verdict",
    "Verifier",
    "answer_text",
    "boxed",
    "verifier_for",
]

log = logging.getLogger(__name__)

Part = Callable[[Group], Tensor]
"""A further part of the reward: a group -> (G,), weight included."""

OWN_PARTS = ("correct", "length", "total", "failures")
SHOWN = 5
"""Failures of one reason that are said one by one; all are counted."""


def answer_text(response: Response, thinking: bool) -> str | None:
    """The part of a response that is judged, or None where there is none.

    A response that did not close its turn (cut at the hard cap, stopped for repetition) has no answer. A thinking
    model answers after its closing mark; without the mark there is no answer, and what stands inside the thinking
    never counts.
    """
    if not response.finished:
        return None
    if not thinking:
        return response.text
    _, mark, answer = response.text.rpartition(THINK_CLOSE)
    return answer.partition(THINK_OPEN)[0] if mark else None


def verifier_for(verifier: Verifier, sample: Sample) -> Verifier:
    """The verifier itself, or the one that ``ByTask`` has for the sample."""
    return verifier.for_task(verifier.task_of(sample)) if isinstance(verifier, ByTask) else verifier


@dataclass(frozen=True)
class RepetitionPenalty:
    """Takes ``weight`` from a response that was stopped because it repeated itself, besides its 0 for the answer."""

    weight: float = 0.5

    def __call__(self, group: Group) -> Tensor:
        return torch.tensor([-self.weight * (response.stop == "repetition") for response in group.responses])


@dataclass(frozen=True)
class FormatPenalty:
    """Takes ``weight`` from a response that is not one ``◁think▷...◁/think▷`` block and then an answer."""

    weight: float = 0.1

    def __call__(self, group: Group) -> Tensor:
        return torch.tensor([-self.weight * (not self.is_kept(response.text)) for response in group.responses])

    @staticmethod
    def is_kept(text: str) -> bool:
        once = text.count(THINK_OPEN) == 1 and text.count(THINK_CLOSE) == 1
        return once and text.startswith(THINK_OPEN) and bool(text.partition(THINK_CLOSE)[2].strip())


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one group, (G,) each. ``parts`` are the weighted parts of the reward by name, ``total`` is their sum.

    Where the verifier failed, nothing is known of a response: its ``correct``, its ``length`` part and its ``total``
    are NaN, its length counts for no other response of the group, and it belongs into no loss, mean or solve rate.
    ``failures`` counts these by reason.
    """

    correct: Tensor
    parts: dict[str, Tensor]
    total: Tensor
    failures: dict[str, int]


class Reward:
    """Scores responses: ``r in {0, 1}`` from the final answer, plus the length reward, plus what else is configured.

    Args:
        verifier: judges the text of the final answer (``kimivl.rl.verifiers``, or a function of your own).
        length: see ``kimivl.rl.length``.
        thinking: the answer stands after ``◁/think▷``.
        parts: further parts by name, each logged as ``reward/<name>``.
        workers, timeout, memory_gb: processes that judge, seconds for an answer, memory of a process
            (``kimivl.rl.workers``). 0 workers judge here: for verifiers that cannot hang.
    """

    def __init__(
        self,
        verifier: Verifier = boxed,
        length: LengthShaping = LengthReward(),  # noqa: B008
        thinking: bool = True,
        parts: Mapping[str, Part] | None = None,
        workers: int = 0,
        timeout: float = 5.0,
        memory_gb: float | None = 4.0,
    ) -> None:
        self.verifier = verifier
        self.length = length
        self.thinking = thinking
        self.parts = dict(parts or {})
        for name in OWN_PARTS:
            if name in self.parts:
                raise ValueError(f"reward.parts.{name}: that name is taken; choose another than {', '.join(OWN_PARTS)}")
        self.pool = VerifierPool(verifier, workers, timeout, memory_gb)
        self._failures: Counter[str] = Counter()

    def judge(self, answers: Sequence[tuple[Problem, Response]]) -> list[Verdict]:
        """Right, wrong or failed, for each pair of a problem and a response to it."""
        cases = [self._case(problem, response) for problem, response in answers]
        verdicts = iter(self.pool.judge([case for case in cases if case is not None]))
        judged = [Verdict(0.0) if case is None else next(verdicts) for case in cases]
        for (problem, _), verdict in zip(answers, judged, strict=True):
            if verdict.failure is not None:
                self._report(problem, verdict)
        return judged

    def score(self, groups: Sequence[Group], progress: float) -> list[Scores]:
        """``progress``: the fraction of the run that is done, for the length reward's schedule."""
        verdicts = iter(self.judge([(group.problem, response) for group in groups for response in group.responses]))
        return [self._score(group, [next(verdicts) for _ in group.responses], progress) for group in groups]

    def _score(self, group: Group, verdicts: Sequence[Verdict], progress: float) -> Scores:
        correct = torch.tensor([verdict.correct for verdict in verdicts])
        lengths = torch.tensor([len(response) for response in group.responses])
        length = self.length.weight_at(progress) * self.length(lengths, correct)
        parts = {"correct": correct, "length": length}
        for name, part in self.parts.items():
            parts[name] = torch.as_tensor(part(group), dtype=torch.float32)
            if parts[name].shape != correct.shape:
                raise ValueError(
                    f"reward.parts.{name} gave {tuple(parts[name].shape)} for a group of {len(correct)} responses: it "
                    "must give one number for each"
                )
        failures = Counter(verdict.failure for verdict in verdicts if verdict.failure is not None)
        return Scores(correct, parts, torch.stack(list(parts.values())).sum(0), dict(failures))

    def _case(self, problem: Problem, response: Response) -> Case | None:
        text = answer_text(response, self.thinking)
        if text is None:
            return None
        task = self.verifier.task_of(problem.sample) if isinstance(self.verifier, ByTask) else ""
        return Case(text, problem.answer, task)

    def _report(self, problem: Problem, verdict: Verdict) -> None:
        assert verdict.failure is not None
        self._failures[verdict.failure] += 1
        if self._failures[verdict.failure] <= SHOWN:
            reason, detail = verdict.failure, verdict.detail
            log.warning("the verifier failed on a response to %s (%s): %s", problem.key, reason, detail)
