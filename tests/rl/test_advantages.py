"""Advantages: the worked example, closed forms, limits, and groups that say nothing."""

import logging
import math

import pytest
import torch

from kimivl.rl.advantages import advantages

REWARDS = torch.tensor([1.0, 0, 0, 0])
ONE = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"baseline": "mean"}, [0.75, -0.25, -0.25, -0.25]),
        ({"baseline": "leave_one_out"}, [1, -1 / 3, -1 / 3, -1 / 3]),
        (
            {"baseline": "log_partition", "tau": 1.0},
            [1 - math.log((math.e + 3) / 4), *[-math.log((math.e + 3) / 4)] * 3],
        ),
        ({"baseline": "none"}, [1, 0, 0, 0]),
        ({"baseline": "mean", "std": "group"}, [1.5, -0.5, -0.5, -0.5]),
        ({"baseline": "none", "std": "batch"}, [2, 0, 0, 0]),
    ],
)
def test_worked_example(choice, expected):
    assert advantages(REWARDS, ONE, **choice).tolist() == pytest.approx(expected, rel=1e-5)


def random_groups(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 5, (30,), generator=generator)
    return torch.randn(30, generator=generator, dtype=torch.float64), group


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "log_partition", "none"])
@pytest.mark.parametrize("std", ["none", "group"])
@pytest.mark.parametrize("seed", range(3))
def test_a_group_knows_nothing_of_the_others(baseline, std, seed):
    """Unequal groups, in any order: the same as each group alone."""
    rewards, group = random_groups(seed)
    together = advantages(rewards, group, baseline, std, tau=0.3)
    for number in group.unique():
        own = group == number
        alone = advantages(rewards[own], torch.zeros(int(own.sum()), dtype=torch.int64), baseline, std, tau=0.3)
        torch.testing.assert_close(together[own], alone)


def test_leave_one_out_is_the_mean_of_the_others():
    rewards, group = random_groups(4)
    found = advantages(rewards, group, "leave_one_out")
    for j in range(len(rewards)):
        others = (group == group[j]) & (torch.arange(len(rewards)) != j)
        assert float(found[j]) == pytest.approx(float(rewards[j] - rewards[others].mean()))


def test_log_partition_goes_from_the_maximum_to_the_mean():
    rewards, group = random_groups(5)
    mean, at = advantages(rewards, group), lambda tau: advantages(rewards, group, "log_partition", tau=tau)
    highest = torch.stack([rewards[group == number].max() for number in group])
    torch.testing.assert_close(at(0.0), rewards - highest)
    torch.testing.assert_close(at(1e-6), rewards - highest, atol=1e-5, rtol=0)
    torch.testing.assert_close(at(1e6), mean, atol=1e-5, rtol=0)


def test_a_tiny_tau_does_not_overflow():
    assert advantages(torch.tensor([1e4, 0.0]), ONE[:2], "log_partition", tau=1e-8).isfinite().all()


@pytest.mark.parametrize("std", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "log_partition"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1.2])
def test_equal_rewards_say_exactly_nothing(baseline, std, reward):
    """All right or all wrong, also where the mean of equal float32 numbers is not the number."""
    rewards = torch.cat([torch.full((7,), reward), torch.tensor([1.0, 0.0])])
    group = torch.tensor([0] * 7 + [1, 1])
    found = advantages(rewards, group, baseline, std, tau=0.1)
    assert found[:7].tolist() == [0.0] * 7
    assert found[7] != found[8]


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "log_partition"])
@pytest.mark.parametrize("std", ["none", "group", "batch"])
def test_a_single_response_says_nothing_and_is_named(baseline, std, caplog):
    with caplog.at_level(logging.WARNING):
        found = advantages(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 1, 1]), baseline, std, tau=0.1)
    assert found[0] == 0 and found[1] != found[2]
    assert "1 of 2 problems have a single response" in caplog.text


def test_a_single_response_without_baseline_keeps_its_reward(caplog):
    assert advantages(torch.tensor([1.0]), torch.tensor([0]), "none").tolist() == [1.0]
    assert not caplog.text


def test_no_responses():
    assert advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_float32_rewards_give_float32():
    assert advantages(REWARDS, ONE).dtype == torch.float32
