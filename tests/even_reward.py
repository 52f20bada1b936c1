"""A reward that tells the responses of a model apart that has learned nothing."""

from kimivl.rl.rewards import Reward
from kimivl.rl.types import Response


class EvenReward(Reward):
    """About half of all responses are right: those whose token ids sum to an even number."""

    def correct(self, response: Response, answer: str) -> bool:
        return sum(response.tokens) % 2 == 0
