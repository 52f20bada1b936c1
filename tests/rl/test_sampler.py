"""Curriculum and prioritised sampling."""

import numpy as np
import pytest

from kimivl.rl.sampler import CurriculumSampler

DIFFICULTY = np.repeat(np.arange(1, 9), 50)


def test_problems_are_distinct_and_follow_the_seed():
    sampler = CurriculumSampler(DIFFICULTY, seed=4)
    drawn = sampler.sample(32, 3, 0.9)
    assert len(set(drawn.tolist())) == 32
    assert drawn.tolist() == CurriculumSampler(DIFFICULTY, seed=4).sample(32, 3, 0.9).tolist()
    assert drawn.tolist() != sampler.sample(32, 4, 0.9).tolist()


def test_the_curriculum_rises_from_easy_to_hard():
    sampler = CurriculumSampler(DIFFICULTY, start=0.25, end=0.5)
    assert [sampler.ceiling(progress) for progress in (0, 0.25, 0.5, 1)] == pytest.approx([2.75, 5.375, 8, 8])
    assert DIFFICULTY[sampler.sample(32, 0, 0.0)].max() == 2
    assert DIFFICULTY[sampler.sample(200, 0, 1.0)].max() == 8


def test_few_open_problems_are_topped_up_with_the_next_harder():
    sampler = CurriculumSampler(DIFFICULTY, start=0.0, end=1.0)
    drawn = DIFFICULTY[sampler.sample(60, 0, 0.0)]
    assert sorted(np.unique(drawn, return_counts=True)[1]) == [10, 50]


def test_problems_are_drawn_in_proportion_to_failure():
    sampler = CurriculumSampler(np.ones(1000, int), end=0.0, momentum=0.0)
    rates = np.repeat([0.0, 0.5], 500)
    sampler.update(np.arange(1000), rates)
    drawn = np.concatenate([sampler.sample(20, iteration, 1.0) for iteration in range(500)])
    hard, easy = (drawn < 500).sum(), (drawn >= 500).sum()
    assert hard / easy == pytest.approx(2.0, rel=0.08)  # weights 1 - s: 1.0 against 0.5


def test_unseen_problems_take_the_rate_of_their_difficulty():
    sampler = CurriculumSampler(np.array([1, 1, 2]), prior=0.4)
    sampler.update(np.array([0]), np.array([0.9]))
    assert sampler.success_rate().tolist() == [0.9, 0.9, 0.4]


def test_state_round_trip_and_mismatch():
    sampler = CurriculumSampler(DIFFICULTY)
    sampler.update(np.array([3, 5]), np.array([0.25, 1.0]))
    again = CurriculumSampler(DIFFICULTY)
    again.load_state_dict(sampler.state_dict())
    assert again.sample(32, 7, 1.0).tolist() == sampler.sample(32, 7, 1.0).tolist()
    with pytest.raises(ValueError, match="data.shards"):
        CurriculumSampler(DIFFICULTY[:10]).load_state_dict(sampler.state_dict())


def test_asking_for_more_problems_than_there_are():
    with pytest.raises(ValueError, match="asks for 500 problems"):
        CurriculumSampler(DIFFICULTY).sample(500, 0, 1.0)
