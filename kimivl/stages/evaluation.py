"""Held-out evaluation: each problem answered once greedily and several times at temperature 1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kimivl.rl.rewards import Reward, Verdict
from kimivl.rl.rollout import RolloutEngine, response_seed
from kimivl.rl.types import Problem, Request, Response, Sampling
from kimivl.runtime import ranks


@dataclass(frozen=True, slots=True)
class Transcript:
    """One problem and what the model said to it, for reading."""

    problem: Problem
    response: Response
    correct: bool

    @property
    def place(self) -> tuple[int, int]:
        """Number and difficulty of the problem."""
        return self.problem.number, self.problem.difficulty


def varied(places: Sequence[tuple[int, int]], limit: int) -> list[int]:
    """Numbers of up to ``limit`` of the (number, difficulty): the first of each difficulty, then the first others.

    What it chooses of parts holds all that it chooses of the whole.
    """
    first = {difficulty: number for number, difficulty in sorted(places, reverse=True)}
    numbers = sorted(number for number, _ in places)
    return [*sorted(first.values()), *(number for number in numbers if number not in first.values())][:limit]


def _text_only(response: Response) -> Response:
    """Without what nobody reads of an example, which the ranks would send each other."""
    return replace(response, logp=None, experts=None)


def _right_and_all() -> list[int]:
    return [0, 0]


class Tally:
    """Sums of an evaluation; its figures are means over problems (greedy) and over responses (sampled)."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.by_difficulty: dict[int, list[int]] = defaultdict(_right_and_all)
        self.transcripts: list[Transcript] = []
        self.limit = 0

    def add(self, difficulty: int, greedy: Response, greedy_correct: bool, described: dict[str, float]) -> None:
        self.sums["problems"] += 1
        self.sums["correct"] += greedy_correct
        self.sums["length"] += len(greedy)
        self.sums["finished"] += greedy.finished
        right_and_all = self.by_difficulty[difficulty]
        right_and_all[0] += greedy_correct
        right_and_all[1] += 1
        for name, value in described.items():
            self.sums[f"described/{name}"] += value

    def add_sampled(self, response: Response, correct: bool) -> None:
        self.sums["responses"] += 1
        self.sums["sampled_correct"] += correct
        self.sums["sampled_length"] += len(response)

    def add_failures(self, verdicts: Sequence[Verdict]) -> None:
        """Count the responses that the verifier failed on; in the figures these are not right."""
        self.sums["verifier_failures"] += sum(verdict.failure is not None for verdict in verdicts)

    def keep(self, transcript: Transcript, limit: int) -> None:
        """Keep up to ``limit`` examples, of different difficulties where there are as many."""
        self.limit = limit
        kept = {one.problem.number: one for one in (*self.transcripts, transcript)}
        self.transcripts = [kept[number] for number in varied([one.place for one in kept.values()], limit)]

    @classmethod
    def merged(cls, tallies: Sequence[Tally]) -> Tally:
        """One tally of what several ranks have evaluated: the one that a single rank would have."""
        whole = cls()
        for tally in tallies:
            for name, value in tally.sums.items():
                whole.sums[name] += value
            for level, (right, count) in tally.by_difficulty.items():
                whole.by_difficulty[level][0] += right
                whole.by_difficulty[level][1] += count
        for transcript in (kept for tally in tallies for kept in tally.transcripts):
            whole.keep(transcript, max(tally.limit for tally in tallies))
        return whole

    def of_all_ranks(self) -> Tally:
        """What all ranks have evaluated, on all ranks; all must call it. Only the transcripts that are kept travel:
        they have pictures."""
        places = [place for places in ranks.gather([kept.place for kept in self.transcripts]) for place in places]
        shown = varied(places, max(ranks.gather(self.limit)))
        self.transcripts = [kept for kept in self.transcripts if kept.problem.number in shown]
        return Tally.merged(ranks.gather(self))

    def metrics(self) -> dict[str, float]:
        """Figures by name; lengths in tokens, ``finished`` the share that ended before the cap."""
        problems = max(self.sums["problems"], 1)
        responses = max(self.sums["responses"], 1)
        figures = {
            "accuracy": self.sums["correct"] / problems,
            "length": self.sums["length"] / problems,
            "finished": self.sums["finished"] / problems,
            "problems": self.sums["problems"],
            "verifier_failures": self.sums["verifier_failures"],
        }
        if self.sums["responses"]:
            figures["sampled_accuracy"] = self.sums["sampled_correct"] / responses
            figures["sampled_length"] = self.sums["sampled_length"] / responses
        for level, (right, count) in sorted(self.by_difficulty.items()):
            figures[f"accuracy_difficulty_{level}"] = right / count
        for name, total in self.sums.items():
            if name.startswith("described/"):
                figures[name.removeprefix("described/")] = total / problems
        return figures


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How held-out problems are answered.

    Args:
        max_new_tokens: hard cap of a response; one that reaches it counts as wrong.
        samples: responses per problem at temperature 1, besides the greedy one.
        transcripts: examples to keep, of different difficulties where there are as many.
        seed: of the sampled responses.
    """

    max_new_tokens: int = 256
    samples: int = 4
    transcripts: int = 5
    seed: int = 0

    def run(
        self,
        problems: Sequence[Problem],
        engine: RolloutEngine,
        reward: Reward,
        describe: Callable[[Response], dict[str, float]],
        tally: Tally,
    ) -> None:
        """Answer and judge ``problems``, and add them to ``tally``; a rank may have none."""
        if not problems:
            return
        greedy = engine.generate([Request(problem, seed=0) for problem in problems], Sampling(self.max_new_tokens, 0))
        verdicts = reward.judge(list(zip(problems, greedy, strict=True)))
        tally.add_failures(verdicts)
        for problem, response, verdict in zip(problems, greedy, verdicts, strict=True):
            correct = verdict.correct == 1
            tally.add(problem.difficulty, response, correct, describe(response))
            tally.keep(Transcript(problem, _text_only(response), correct), self.transcripts)
        if self.samples == 0:
            return
        requests = [Request(p, response_seed(self.seed, p.number, g)) for p in problems for g in range(self.samples)]
        sampled = engine.generate(requests, Sampling(self.max_new_tokens))
        pairs = [(request.problem, response) for request, response in zip(requests, sampled, strict=True)]
        verdicts = reward.judge(pairs)
        tally.add_failures(verdicts)
        for (_, response), verdict in zip(pairs, verdicts, strict=True):
            tally.add_sampled(response, verdict.correct == 1)
