"""Dealing responses to packs."""

import pytest
import torch

from kimivl.rl.experience import deal


def test_every_response_once_problems_whole_in_a_step_packs_balanced():
    generator = torch.Generator().manual_seed(0)
    problem = torch.randperm(24, generator=generator).repeat_interleave(8)
    lengths = torch.randint(10, 200, (192,), generator=generator)
    packs = deal(lengths, problem, steps=3, packs_per_step=4, seed=[1, 2])
    assert len(packs) == 12
    assert sorted(member for pack in packs for member in pack) == list(range(192))
    for step in range(3):
        members = [member for pack in packs[4 * step : 4 * step + 4] for member in pack]
        for number in problem[members].unique():
            assert (problem[members] == number).sum() == 8
        totals = [int(lengths[pack].sum()) for pack in packs[4 * step : 4 * step + 4]]
        assert min(totals) > 0.95 * max(totals)


def test_deals_are_a_function_of_the_seed():
    problem, lengths = torch.arange(16).repeat_interleave(2), torch.ones(32, dtype=torch.int64)
    first = deal(lengths, problem, 2, 1, [0, 0])
    assert first == deal(lengths, problem, 2, 1, [0, 0]) != deal(lengths, problem, 2, 1, [0, 1])


@pytest.mark.parametrize(("steps", "packs", "key"), [(5, 1, "data.updates"), (4, 9, "accumulate_grad_batches")])
def test_more_steps_or_packs_than_there_is_to_deal(steps, packs, key):
    with pytest.raises(ValueError, match=key):
        deal(torch.ones(8, dtype=torch.int64), torch.arange(4).repeat_interleave(2), steps, packs, [0])
