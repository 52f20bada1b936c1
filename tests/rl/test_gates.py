"""Which problems are open, and which groups are trained on."""

import numpy as np
import pytest

from kimivl.rl.gates import Gates, open_problems

NAN = float("nan")


@pytest.mark.parametrize(
    ("gates", "correct", "reason"),
    [
        (Gates(), [1, 1, 1, 1], None),
        (Gates(), [0, 0, 0, 0], None),
        (Gates(zero_advantage=True), [1, 1, 1, 1], "zero_advantage"),
        (Gates(zero_advantage=True), [0, 0, 0, 0], "zero_advantage"),
        (Gates(zero_advantage=True), [1, 0, 0, 0], None),
        (Gates(zero_advantage=True), [1, NAN, 1, NAN], "zero_advantage"),  # of the judged, all are right
        (Gates(zero_advantage=True), [1, NAN, 0, NAN], None),
        (Gates(zero_advantage=True), [0.5, 0.5], "zero_advantage"),  # parts of a mark, all alike
        (Gates(zero_advantage=True), [1], "zero_advantage"),  # k = 1: a mean baseline leaves nothing
        (Gates(), [NAN, NAN], "unjudged"),
        (Gates(), [], "unjudged"),
        (Gates(pass_rate=(0.25, 0.75)), [0, 0, 0, 1], None),  # the ends belong to the window
        (Gates(pass_rate=(0.25, 0.75)), [0, 1, 1, 1], None),
        (Gates(pass_rate=(0.26, 0.75)), [0, 0, 0, 1], "too_hard"),
        (Gates(pass_rate=(0.25, 0.74)), [0, 1, 1, 1], "too_easy"),
        (Gates(pass_rate=(0.25, 0.75)), [0, NAN, 0, 1], None),  # one third of the judged
        (Gates(pass_rate=(0.1, 0.9), zero_advantage=True), [1, 1], "zero_advantage"),
        (Gates(pass_rate=(0.1, 0.9)), [1, 1], "too_easy"),
    ],
)
def test_admission(gates, correct, reason):
    assert gates.admit(np.array(correct, float)) == reason


def test_retirement():
    perfect = np.array([0, 1, 2, 3])
    assert Gates().retired(perfect).tolist() == [False] * 4
    assert Gates(retire_after=2).retired(perfect).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pass_rate": (0.5, 0.2)}, "sampler.gates.pass_rate"),
        ({"pass_rate": (0, 2)}, "from 0 to 1"),
        ({"pass_rate": 0.5}, "sampler.gates.pass_rate"),
        ({"retire_after": 0}, "sampler.gates.retire_after"),
    ],
)
def test_wrong_gates_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        Gates(**settings)


COLUMNS = {
    "difficulty": np.array([1, 2, 3, 4, 5, 6]),
    "pass_rate": np.array([0.0, 0.1, 0.5, 0.9, 1.0, NAN]),
    "easy_to_hack": np.array([0.0, 1.0, 0.0, 0.0, 0.0, NAN]),
    "answer_kind": np.array(["number", "number", "choice", "text", "number", ""]),
}


@pytest.mark.parametrize(
    ("wanted", "numbers", "closed"),
    [
        ({}, [0, 1, 2, 3, 4, 5], {}),
        ({"pass_rate": None}, [0, 1, 2, 3, 4, 5], {}),
        ({"pass_rate": [0.1, 0.9]}, [1, 2, 3], {"pass_rate unknown": 1, "pass_rate": 2}),
        ({"easy_to_hack": False}, [0, 2, 3, 4], {"easy_to_hack unknown": 1, "easy_to_hack": 1}),
        ({"easy_to_hack": True}, [1], {"easy_to_hack unknown": 1, "easy_to_hack": 4}),
        ({"answer_kind": ["number", "text"]}, [0, 1, 3, 4], {"answer_kind unknown": 1, "answer_kind": 1}),
        ({"answer_kind": "choice"}, [2], {"answer_kind unknown": 1, "answer_kind": 4}),
        ({"difficulty": [2, 4]}, [1, 2, 3], {"difficulty": 3}),
        ({"difficulty": 3}, [2], {"difficulty": 5}),
        # the first column that closes a problem counts it
        (
            {"pass_rate": [0.1, 1], "easy_to_hack": False},
            [2, 3, 4],
            {"pass_rate unknown": 1, "pass_rate": 1, "easy_to_hack": 1},
        ),
    ],
)
def test_filters(wanted, numbers, closed):
    is_open, reasons = open_problems(COLUMNS, wanted)
    assert np.flatnonzero(is_open).tolist() == numbers
    assert reasons == closed
    assert sum(reasons.values()) + is_open.sum() == len(is_open)


@pytest.mark.parametrize(
    ("columns", "wanted", "said"),
    [
        ({"difficulty": np.arange(3)}, {"pass_rate": [0, 1]}, "kimivl assess SHARDS"),
        (COLUMNS, {"pas_rate": [0, 1]}, "choose from answer_kind, difficulty, easy_to_hack, pass_rate"),
        (COLUMNS, {"pass_rate": [0.9, 0.1]}, r"sampler.filter.pass_rate=\[0.9, 0.1\]"),
        (COLUMNS, {"pass_rate": "high"}, "sampler.filter.pass_rate='high': give .low, high."),
        (COLUMNS, {"answer_kind": [1]}, "sampler.filter.answer_kind"),
        (COLUMNS, {"answer_kind": True}, "sampler.filter.answer_kind"),
    ],
)
def test_filters_that_do_not_fit(columns, wanted, said):
    with pytest.raises(ValueError, match=said):
        open_problems(columns, wanted)
