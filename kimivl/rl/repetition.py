"""Responses that go round in circles: found while they are written, so that they can be stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

EVERY = 8
"""A response is looked at whenever its length is a multiple of this: often enough to save tokens, at next to no cost.
The rule depends on the tokens alone, so a response that is written in several calls is stopped where it would be in
one."""


@dataclass(frozen=True, slots=True)
class Repetition:
    """A response repeats itself when its end is one period over and over, or an n-gram comes too often.

    Worked example, with ``times=3, max_period=4, min_tokens=6``: ``7 1 2 1 2 1 2`` ends in the period ``1 2``, three
    times and six tokens of it; ``7 1 2 3 1 2 3`` does not, since ``1 2 3`` comes twice.

    Args:
        times: periods in a row that it takes. max_period: tokens of the longest period looked for; 0 looks for none.
        min_tokens: tokens that the periods make up at least: ``!!!!`` or a row of zeros is no circle yet.
        ngram: tokens of the pieces that are counted, in a circle with small changes none of which is a period; 0
            counts none. ngram_times: times that one piece comes, without overlap. window: tokens back that are looked
            at.

    Raises:
        ValueError: for settings that cannot be met, or that would stop anything.
    """

    times: int = 4
    max_period: int = 64
    min_tokens: int = 32
    ngram: int = 20
    ngram_times: int = 8
    window: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("times", 2), ("max_period", 0), ("min_tokens", 2), ("ngram", 0), ("ngram_times", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"repetition.{name}={getattr(self, name)}: give a whole number of {least} or more")
        if self.ngram and self.window < self.ngram * self.ngram_times:
            raise ValueError(
                f"repetition.window={self.window} has no room for {self.ngram_times} pieces of {self.ngram} tokens "
                f"(ngram_times, ngram): give at least {self.ngram * self.ngram_times}, or ngram=0 to count none"
            )

    def __call__(self, tokens: Sequence[int] | np.ndarray) -> bool:
        """Whether a response is stopped here: its length is one that is looked at, and its end repeats itself."""
        if len(tokens) % EVERY or not len(tokens):
            return False
        tail = np.asarray(tokens[-self.reach :])
        return self._has_period(tail) or (len(tokens) % (4 * EVERY) == 0 and self._has_ngram(tail))

    def first(self, tokens: Sequence[int] | np.ndarray) -> int | None:
        """The length at which these tokens would have been stopped while they were written; None where nowhere."""
        tokens = np.asarray(tokens)
        lengths = range(EVERY, len(tokens) + 1, EVERY)
        return next((length for length in lengths if self(tokens[:length])), None)

    @property
    def reach(self) -> int:
        """Tokens back that decide."""
        return max(self.window if self.ngram else 0, self.max_period * self.times, self.min_tokens)

    def _has_period(self, tokens: np.ndarray) -> bool:
        # A period that comes at least twice repeats the last token: most candidates fall at once.
        candidates = np.flatnonzero(tokens[-2 : -2 - self.max_period : -1] == tokens[-1]) + 1
        for period in candidates.tolist():
            span = max(period * self.times, self.min_tokens)
            if span <= len(tokens) and np.array_equal(tokens[-span:-period], tokens[len(tokens) - span + period :]):
                return True
        return False

    def _has_ngram(self, tokens: np.ndarray) -> bool:
        tokens = tokens[-self.window :]
        if not self.ngram or len(tokens) < self.ngram * self.ngram_times:
            return False
        pieces = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), self.ngram)
        keys = (pieces * _factors(self.ngram)).sum(1)  # equal pieces have equal keys, different ones practically never
        values, counts = np.unique(keys, return_counts=True)
        return any(self._apart(np.flatnonzero(keys == key)) for key in values[counts >= self.ngram_times])

    def _apart(self, places: np.ndarray) -> bool:
        """Whether pieces at ``places`` come ``ngram_times`` without overlap."""
        found, end = 0, 0
        for place in places.tolist():
            if place >= end:
                found, end = found + 1, place + self.ngram
        return found >= self.ngram_times


@cache
def _factors(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 2**63, count, dtype=np.uint64)
