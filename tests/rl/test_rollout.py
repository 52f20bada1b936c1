"""The randomness of responses, and the draw of a token from logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kimivl.rl.rollout import draw, response_seed, uniform

NEVER = torch.zeros(0, dtype=torch.int64)


def drawn(logits, temperature, draws, never=NEVER):
    return draw(logits, temperature, torch.as_tensor(draws, dtype=torch.float64), never)


@pytest.mark.parametrize(("temperature", "shares"), [(1.0, [0.5, 0.2, 0.0, 0.3]), (0.5, [25 / 38, 4 / 38, 0, 9 / 38])])
def test_draws_follow_the_distribution(temperature, shares):
    logits = torch.log(torch.tensor([0.5, 0.2, 0.0, 0.3])).repeat(20_000, 1)
    tokens, logp = drawn(logits, temperature, uniform(np.arange(20_000, dtype=np.uint64), position=3))
    expected = torch.tensor(shares)
    torch.testing.assert_close(torch.bincount(tokens, minlength=4) / 20_000, expected, atol=0.012, rtol=0)
    torch.testing.assert_close(logp, expected[tokens].log(), atol=1e-5, rtol=0)


def test_draws_differ_between_positions_and_seeds():
    seeds = np.arange(100, dtype=np.uint64)
    numbers = np.concatenate([uniform(seeds, position) for position in range(100)])
    assert len(np.unique(numbers)) == 10_000
    assert abs(numbers.mean() - 0.5) < 0.01 and numbers.min() >= 0 and numbers.max() < 1
    rows = uniform(seeds, np.arange(100))
    assert rows.tolist() == [uniform(seeds[n : n + 1], n)[0] for n in range(100)]


def test_a_seed_depends_on_each_of_its_parts():
    seeds = {
        response_seed(run, iteration, problem) for run in range(5) for iteration in range(5) for problem in range(5)
    }
    assert len(seeds) == 125 and all(0 <= seed < 2**63 for seed in seeds)


def test_what_is_never_drawn_still_counts_in_the_log_probability():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3]])).repeat(1000, 1)
    tokens, logp = drawn(logits, 1.0, np.linspace(0, 1, 1000, endpoint=False), never=torch.tensor([0]))
    assert set(tokens.tolist()) == {1, 2}
    torch.testing.assert_close(logp.exp(), torch.tensor([0.5, 0.2, 0.3])[tokens])
    assert drawn(logits[:1], 0, [0.5], never=torch.tensor([0]))[0].tolist() == [2]


def test_greedy_gives_the_log_probability_at_temperature_one():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    token, logp = drawn(logits, 0, [0.99])
    assert token.tolist() == [1]
    torch.testing.assert_close(logp, logits.log_softmax(-1)[:, 1])


@pytest.mark.parametrize("last", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_have_a_share(last):
    logits = torch.full((1, 50), -30.0)
    logits[0, 10:40] = 0.0
    never = torch.tensor([*range(10), *range(40, 50)])
    assert int(drawn(logits, 1.0, [last], never)[0]) == (10 if last == 0 else 39)
