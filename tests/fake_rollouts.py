"""Problems, an engine and a reward that need no model: what a response will be is a function of its seed."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kimivl.data.pack import EncodedSample
from kimivl.data.sample import Sample
from kimivl.rl.experience import Experience
from kimivl.rl.rewards import Scores
from kimivl.rl.rollout import RolloutEngine, uniform
from kimivl.rl.types import Group, Problem, Request, Response, Sampling

STOP = 9
SET = {"difficulty": np.zeros(40, np.int64)}
"""Columns of forty problems."""


def problem(number: int) -> Problem:
    messages = [{"role": "user", "content": [{"type": "text", "text": f"question {number}"}]}]
    ids = torch.arange(3 + number % 4)
    pixels, grid = torch.zeros(4, 3, 14, 14, dtype=torch.uint8), torch.tensor([[2, 2]])
    return Problem(
        number, Sample(f"key-{number}", messages, (), str(number % 7)), EncodedSample(ids, ids, pixels, grid)
    )


def read(numbers: Sequence[int]) -> list[Problem]:
    return [problem(number) for number in numbers]


class FakeEngine(RolloutEngine):
    """Token t of a response is a digit drawn by (seed, t), and one in ``mean`` of them is the end.

    It answers in a shuffled order, and fails after ``fail_after`` responses where that is given.
    """

    concurrent = True

    def __init__(self, mean: int = 8, fail_after: int | None = None, logp: bool = True, shuffle: int = 0) -> None:
        self.mean, self.fail_after, self.logp, self.shuffle = mean, fail_after, logp, shuffle
        self.requests: list[Request] = []
        self.syncs = 0

    def sync(self) -> dict[str, float]:
        self.syncs += 1
        return {"perf/syncs": self.syncs}

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
        for given, number in enumerate(np.random.default_rng(self.shuffle).permutation(len(requests)).tolist()):
            if given == self.fail_after:
                raise RuntimeError("the engine is gone")
            self.requests.append(requests[number])
            yield number, self.answer(requests[number], sampling)

    def answer(self, request: Request, sampling: Sampling) -> Response:
        tokens = list(request.prefix)
        end = len(tokens) + (request.budget or sampling.max_new_tokens)
        while len(tokens) < min(end, sampling.max_new_tokens) and (not tokens or tokens[-1] != STOP):
            [draw] = uniform(np.array([request.seed]), len(tokens))
            tokens.append(STOP if draw < 1 / self.mean else int(draw * 1000) % 9)
        stop = "stop" if tokens[-1] == STOP else "length" if len(tokens) == sampling.max_new_tokens else "budget"
        logp = np.full(len(tokens), np.nan, np.float32)
        logp[len(request.prefix) :] = [-0.1 * token for token in tokens[len(request.prefix) :]]
        return Response(tuple(tokens), "".join(map(str, tokens)), stop, logp if self.logp else None)


def concurrent_engine(policy: object) -> FakeEngine:
    """For ``rollout._target_``: an engine that can generate while the model trains."""
    return FakeEngine()


class SumReward:
    """Right where the tokens sum to an even number; the verifier breaks on responses of ``broken`` tokens."""

    def __init__(self, broken: int = -1, always: float | None = None) -> None:
        self.broken, self.always = broken, always

    def score(self, groups: Sequence[Group], progress: float) -> list[Scores]:
        return [self._scores(group) for group in groups]

    def _scores(self, group: Group) -> Scores:
        correct = torch.tensor([self._correct(response) for response in group.responses])
        failures = {"timeout": int(correct.isnan().sum())} if correct.isnan().any() else {}
        length = torch.tensor([-0.001 * len(response) for response in group.responses])
        return Scores(correct, {"correct": correct, "length": length}, correct + length, failures)

    def _correct(self, response: Response) -> float:
        if len(response) == self.broken:
            return float("nan")
        if self.always is not None:
            return self.always
        return float(response.finished and sum(response.tokens) % 2 == 0)


def same(a: Experience, b: Experience) -> bool:
    """Whether two experiences are equal to the bit."""
    return all(
        left.equal(right) if torch.is_tensor(left) and not left.is_floating_point()
        else torch.equal(left.nan_to_num(9), right.nan_to_num(9)) if torch.is_tensor(left)
        else left == right
        for left, right in ((getattr(a, name), getattr(b, name)) for name in a.__slots__)
    )  # fmt: skip
