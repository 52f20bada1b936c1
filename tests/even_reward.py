"""A reward that tells the responses of a model apart that has learned nothing."""

from collections.abc import Sequence

from kimivl.rl.rewards import Reward, Verdict
from kimivl.rl.types import Problem, Response


class EvenReward(Reward):
    """About half of all responses are right: those whose token ids sum to an even number."""

    def judge(self, answers: Sequence[tuple[Problem, Response]]) -> list[Verdict]:
        return [Verdict(float(sum(response.tokens) % 2 == 0)) for _, response in answers]
