"""Responses that go round in circles: found while they are written, so that they can be stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Repetition:
    """A response repeats itself when its end is one period written ``times`` times over.

    Args:
        times: how often. max_period: tokens of the longest period that is looked for. min_tokens: repeated tokens
            that it takes at least.
    """

    times: int = 4
    max_period: int = 64
    min_tokens: int = 32

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether these tokens end in a repetition."""
        for period in range(1, self.max_period + 1):
            span = max(period * self.times, self.min_tokens)
            if span <= len(tokens) and tokens[-span:-period] == tokens[-span + period :]:
                return True
        return False
