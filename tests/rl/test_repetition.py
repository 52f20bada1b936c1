"""What counts as going round in circles, and where it is found."""

from __future__ import annotations

import numpy as np
import pytest

from kimivl.rl.repetition import EVERY, Repetition

PERIODS = Repetition(times=3, max_period=8, min_tokens=12, ngram=0)
NGRAMS = Repetition(max_period=0, ngram=5, ngram_times=3, window=64)
VARIED = list(np.random.default_rng(0).integers(1000, 9000, 400))


def padded(tokens):
    """Varied tokens before, so that the length is one that is looked at."""
    return VARIED[: -len(tokens) % EVERY + EVERY] + tokens


@pytest.mark.parametrize(
    ("tokens", "repeats"),
    [
        ([1, 2, 3, 4] * 3, True),
        ([1, 2, 3, 4] * 2, False),
        ([1, 2, 3, 4] * 3 + [9], False),
        ([2, 3, 4] + [1, 2, 3, 4] * 2 + [1], True),  # any phase
        ([7] * 12, True),
        ([7] * 11, False),  # fewer than min_tokens
        ([1, 2] * 6, True),
        (list(range(8)) * 3, True),
        (list(range(9)) * 3, False),  # longer than max_period
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 4], False),
        (VARIED[100:], False),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_periods(tokens, repeats, kind):
    assert PERIODS(kind(padded(tokens))) is repeats


PIECE = [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("tokens", "repeats"),
    [
        (PIECE + VARIED[:7] + PIECE + VARIED[10:14] + PIECE + VARIED[20:22], True),
        (PIECE + VARIED[:7] + PIECE + VARIED[10:14] + [1, 2, 3, 4], False),
        (PIECE + VARIED[:80] + PIECE + VARIED[100:104] + PIECE, False),  # the first is out of the window
        ([7] * 14, False),  # three pieces would overlap
        ([7] * 15, True),
    ],
)
def test_ngrams(tokens, repeats):
    whole = VARIED[200 : 200 + -len(tokens) % (4 * EVERY)] + tokens
    assert NGRAMS(whole) is repeats


def test_it_counts_ngrams_at_every_fourth_of_them():
    whole = VARIED[:17] + PIECE + VARIED[20:40] + PIECE + VARIED[50:60] + PIECE + VARIED[70:200]
    assert [n for n in range(1, 100) if NGRAMS(whole[:n])] == [64]  # at 96 the first is out of the window


def test_it_looks_at_some_lengths_only():
    loop = [1, 2, 3, 4] * 30
    assert [length for length in range(1, 60) if PERIODS(loop[:length])] == [16, 24, 32, 40, 48, 56]
    assert not PERIODS([])


def test_the_first_place_is_where_writing_would_have_stopped():
    tokens = VARIED[:21] + [1, 2, 3, 4] * 5 + VARIED[30:100]
    place = PERIODS.first(tokens)
    assert place == 40 and PERIODS(tokens[:40]) and not any(PERIODS(tokens[:n]) for n in range(40))
    assert PERIODS.first(VARIED) is None and not PERIODS(tokens)


def test_off_is_off():
    nothing = Repetition(max_period=0, ngram=0)
    assert not nothing([7] * 800) and nothing.first([7] * 800) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": 1}, "repetition.times=1"),
        ({"max_period": -1}, "repetition.max_period=-1"),
        ({"min_tokens": 0}, "repetition.min_tokens=0"),
        ({"ngram": -1}, "repetition.ngram=-1"),
        ({"ngram_times": 1}, "repetition.ngram_times=1"),
        ({"ngram": 20, "ngram_times": 8, "window": 100}, "at least 160"),
    ],
)
def test_settings_that_cannot_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        Repetition(**settings)
