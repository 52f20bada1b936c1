"""Length control: golden cases of each rule, the schedule, and groups in which a verifier failed."""

import math

import pytest
import torch

from kimivl.rl.length import AdaptivePenalty, LengthReward, LinearPenalty, NoLength, SoftOverlong

NAN = math.nan
ALL = [LengthReward(), SoftOverlong(max_tokens=400), AdaptivePenalty(), LinearPenalty(), NoLength()]


def shaped(rule, lengths, correct):
    return rule(torch.tensor(lengths), torch.tensor(correct)).tolist()


@pytest.mark.parametrize(
    ("lengths", "correct", "expected"),
    [
        ([100, 200, 300], [1, 1, 0], [0.5, 0.0, -0.5]),  # the paper's formula, worked out
        ([100, 200, 300], [0, 0, 1], [0.0, 0.0, -0.5]),
        ([100, 200, 300], [0, 0, 0], [0.0, 0.0, -0.5]),
        ([100, 200, 300], [1, 1, 1], [0.5, 0.0, -0.5]),
        ([300, 100], [0, 1], [-0.5, 0.5]),
        ([50, 50, 50], [1, 0, 1], [0.0, 0.0, 0.0]),
        ([50], [1], [0.0]),
        ([0, 10], [0, 1], [0.0, -0.5]),
        ([100, 300], [0.5, 1.0], [0.25, -0.5]),  # half of the mark, half of the difference
    ],
)
def test_the_papers_reward(lengths, correct, expected):
    assert shaped(LengthReward(), lengths, correct) == expected


def test_a_failed_verifier_neither_earns_nor_counts():
    given = torch.tensor(shaped(LengthReward(), [100, 9000, 200, 300], [1.0, NAN, 1.0, 0.0]))
    torch.testing.assert_close(given, torch.tensor([0.5, NAN, 0.0, -0.5]), equal_nan=True)
    penalty = torch.tensor(shaped(AdaptivePenalty(max_tokens=100), [50, 10, 100], [1.0, NAN, 0.0]))
    torch.testing.assert_close(penalty, torch.tensor([-0.25, NAN, -0.5]), equal_nan=True)


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: type(rule).__name__)
def test_a_group_that_was_not_judged_at_all_is_all_nan(rule):
    assert all(map(math.isnan, shaped(rule, [1, 2], [NAN, NAN])))


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: type(rule).__name__)
def test_longer_is_never_better(rule):
    lengths = torch.arange(1, 401, 7)
    for mark in (0.0, 1.0):
        given = rule(lengths, torch.full(lengths.shape, mark))
        assert (given.diff() <= 1e-7).all()
        assert given.abs().max() <= 1


def test_floor_spares_small_differences():
    assert shaped(LengthReward(floor=12), [10, 13], [1, 1]) == [0.5, 0.25]
    assert shaped(LengthReward(floor=12), [10, 110], [1, 1]) == [0.5, -0.5]


def test_soft_overlong():
    rule = SoftOverlong(max_tokens=100, buffer=0.2)
    assert shaped(rule, [10, 80, 90, 100, 130], [1, 0, 1, 0, 0]) == [0, 0, -0.5, -1, -1]


def test_adaptive_penalty_follows_the_solve_rate_down_to_one_in_k():
    rule = AdaptivePenalty(max_tokens=100)
    assert shaped(rule, [100, 50], [1, 1]) == [-1.0, -0.5]
    assert shaped(rule, [50, 100], [1, 0]) == [-0.25, -0.5]
    assert shaped(rule, [100] * 4, [0] * 4) == [-0.25] * 4


def test_linear_penalty_spares_wrong_answers():
    assert shaped(LinearPenalty(max_tokens=100), [50, 100], [1, 0]) == [-0.5, 0.0]


def test_schedule():
    late = LengthReward(weight=0.4, start=0.3)
    assert [late.weight_at(progress) for progress in (0, 0.29, 0.3, 1)] == [0, 0, 0.4, 0.4]
    rising = LengthReward(weight=0.4, start=0.2, ramp=0.5)
    assert [rising.weight_at(p) for p in (0.1, 0.2, 0.45, 0.7, 1)] == pytest.approx([0, 0, 0.2, 0.4, 0.4])
    assert NoLength().weight_at(1) == 0


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (LengthReward, {"weight": -1}, "reward.length needs weight >= 0"),
        (LengthReward, {"start": 2}, "reward.length needs"),
        (LinearPenalty, {"ramp": -0.1}, "reward.length needs"),
        (LengthReward, {"floor": -1}, "reward.length.floor=-1"),
        (SoftOverlong, {"buffer": 0}, "reward.length.buffer=0"),
        (AdaptivePenalty, {"max_tokens": 0}, "reward.length.max_tokens=0"),
    ],
)
def test_bad_settings_name_the_key(rule, settings, message):
    with pytest.raises(ValueError, match=message):
        rule(**settings)
