"""From responses to traces: each is read, verified and checked, and has an outcome with a reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kimivl.data.chat import SampleEncoder
from kimivl.data.index import Index
from kimivl.data.sample import Sample, SampleError
from kimivl.rl.rewards import Reward
from kimivl.rl.types import Problem, Response, Stop
from kimivl.synthesize.ask import NO_PROMPT, Place
from kimivl.synthesize.checks import Checks
from kimivl.synthesize.journal import Journal
from kimivl.synthesize.prompts import Prompt, question_turns
from kimivl.synthesize.traces import Trace, Unfit, read_trace

CHUNK = 256
"""Responses in memory, and judged together."""


@dataclass(slots=True)
class Outcome:
    """What became of a response; ``reason`` None: it is kept (so far).

    ``correct`` is the verifier's mark, NaN where it failed; ``thinking`` and ``answer`` are tokens; ``content`` tells
    problems of the same words and pictures.
    """

    place: Place
    key: str
    prompt: str
    source: str = ""
    content: str = ""
    reason: str | None = None
    detail: str = ""
    correct: float = 0.0
    thinking: int = 0
    answer: int = 0
    shown: dict[str, bool] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.thinking + self.answer

    def refuse(self, unfit: Unfit) -> None:
        self.reason, self.detail = unfit.reason, unfit.detail


@dataclass(slots=True)
class Sifter:
    """Reads, verifies and checks the responses of a journal.

    Args:
        index: of the problems. encoder, count: the student's, for whole chats and for texts.
        reward: its verifier judges. prompts: by name. name: a problem -> how its samples' keys begin.
        judged: a judge decides on the behaviours.
    """

    index: Index
    encoder: SampleEncoder
    count: Callable[[str], np.ndarray]
    reward: Reward
    checks: Checks
    prompts: Mapping[str, Prompt]
    name: Callable[[int], str]
    judged: bool

    def sift(self, journal: Journal, places: Sequence[Place]) -> Iterator[Outcome]:
        """The outcomes of ``places``, in their order."""
        last: tuple[int, Sample | SampleError] | None = None
        for first in range(0, len(places), CHUNK):
            chunk = places[first : first + CHUNK]
            problems: list[Sample | SampleError] = []
            for number, _ in chunk:
                if last is None or last[0] != number:
                    last = number, self._problem(number)
                problems.append(last[1])
            yield from self._sift(list(chunk), problems, [journal.read(journal.places[place]) for place in chunk])

    def _problem(self, number: int) -> Sample | SampleError:
        try:
            return self.index.read(number)
        except SampleError as error:
            return error

    def _sift(
        self, places: list[Place], problems: list[Sample | SampleError], records: list[dict[str, Any]]
    ) -> Iterator[Outcome]:
        outcomes: list[Outcome] = []
        traces: list[Trace | None] = []
        to_judge: list[tuple[int, tuple[Problem, Response]]] = []
        for place, problem, record in zip(places, problems, records, strict=True):
            outcome = Outcome(place, record["key"], record["prompt"])
            trace = None
            if isinstance(problem, SampleError):
                outcome.refuse(Unfit(problem.reason, str(problem)))
            else:
                outcome.source, outcome.content = problem.source, content_digest(problem)
                trace = self._read(outcome, record)
            if trace is not None and isinstance(problem, Sample):
                response = Response(tuple(range(outcome.tokens)), trace.text, "stop")
                pair = Problem(place[0], problem, NO_PROMPT), response
                to_judge.append((len(outcomes), pair))
            outcomes.append(outcome)
            traces.append(trace)
        verdicts = self.reward.judge([pair for _, pair in to_judge])
        for (number, (asked, _)), verdict in zip(to_judge, verdicts, strict=True):
            outcome, trace = outcomes[number], traces[number]
            assert trace is not None
            outcome.correct = verdict.correct
            if verdict.failure is not None:
                outcome.refuse(Unfit("verifier_failed", verdict.failure))
            elif verdict.correct != 1:
                outcome.refuse(Unfit("wrong_answer", f"it answers {trace.answer[:200]!r}, not {asked.answer!r}"))
            else:
                self._check(outcome, asked.sample, trace)
        yield from outcomes

    def _read(self, outcome: Outcome, record: dict[str, Any]) -> Trace | None:
        """The trace of a whole response, or None with the reason in its outcome."""
        stop: Stop = record["stop"]
        try:
            if stop == "repetition":
                raise Unfit("repetition", "the engine stopped it: it repeats itself")
            if stop != "stop":
                raise Unfit("cut", f"it was cut at {record['tokens']} tokens ({stop})")
            trace = read_trace(record["text"])
        except Unfit as unfit:
            outcome.refuse(unfit)
            return None
        outcome.thinking, outcome.answer = len(self.count(trace.thinking)), len(self.count(trace.answer))
        return trace

    def _check(self, outcome: Outcome, problem: Sample, trace: Trace) -> None:
        """All that a right trace must be, and which behaviours it shows."""
        outcome.shown = self.checks.behaviours(trace.thinking)
        question = " ".join(
            part["text"] for turn in question_turns(problem) for part in turn["content"] if part["type"] == "text"
        )
        try:
            self.checks(
                trace, question, self.prompts[outcome.prompt], self.count(trace.thinking), self.count(trace.answer)
            )
            self.encoder.measure(self.sample(outcome, problem, trace))
            if not self.judged:
                self.checks.check_behaviours(outcome.shown)
        except Unfit as unfit:
            outcome.refuse(unfit)
        except SampleError as fault:  # what training would refuse: special tokens in the text
            outcome.refuse(Unfit(fault.reason, fault.detail))

    def sample(self, outcome: Outcome, problem: Sample, trace: Trace) -> Sample:
        """The problem as it was, with the trace as its answer: nothing of the prompt."""
        said = {"role": "assistant", "content": [{"type": "text", "text": trace.text}]}
        return Sample(
            key=f"{self.name(outcome.place[0])}-{outcome.place[1]:02d}",
            messages=[*question_turns(problem), said],
            images=problem.images,
            answer=problem.answer,
            difficulty=problem.difficulty,
            source=problem.source,
            task=problem.task,
        )


def content_digest(problem: Sample) -> str:
    """Of the words and pictures of a problem."""
    digest = hashlib.sha256(json.dumps(question_turns(problem), sort_keys=True).encode("utf-8", "replace"))
    for image in problem.images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:16]
