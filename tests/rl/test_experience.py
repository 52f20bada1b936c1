"""Dealing responses to packs, and packs as the objective sees them."""

import pytest
import torch
from fake_rollouts import FakeEngine, SumReward, problem, read

from kimivl.data.pack import IGNORE
from kimivl.rl.advantages import advantages
from kimivl.rl.collect import Collector, Plan
from kimivl.rl.experience import Deal, deal, make_batch
from kimivl.rl.sampler import ProblemSampler
from kimivl.rl.types import Sampling


def random_responses(problems=24, responses=8, longest=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    problem = torch.randperm(problems, generator=generator).repeat_interleave(responses)
    return torch.randint(10, longest, (len(problem),), generator=generator), problem


def steps_of(dealt: Deal):
    per = dealt.packs_per_step
    return [dealt.packs[first : first + per] for first in range(0, len(dealt.packs), per)]


@pytest.mark.parametrize(("problems", "responses", "packs"), [(24, 8, 4), (64, 16, 4), (16, 16, 8), (12, 4, 1)])
def test_every_response_once_problems_whole_in_a_step_packs_balanced(problems, responses, packs):
    lengths, problem = random_responses(problems, responses)
    dealt = deal(lengths, problem, steps=3, packs_per_step=packs, seed=[1, 2])
    assert dealt.packs_per_step == packs and len(dealt.packs) == 3 * packs
    assert sorted(member for pack in dealt.packs for member in pack) == list(range(len(problem)))
    for step in steps_of(dealt):
        members = [member for pack in step for member in pack]
        assert all((problem[members] == number).sum() == responses for number in problem[members].unique())
        totals = [int(lengths[pack].sum()) for pack in step]
        assert max(totals) <= 1.1 * sum(totals) / len(totals)


def test_the_responses_to_a_problem_share_a_pack_where_the_packs_stay_balanced():
    lengths, problem = random_responses(64, 8)
    dealt = deal(lengths, problem, steps=2, packs_per_step=4, seed=[1, 2])
    assert 64 <= dealt.shown(problem) < 1.5 * 64
    one_by_one = Deal([torch.arange(n, 512, 8).tolist() for n in range(8)], 4)
    assert one_by_one.shown(problem) == 8 * 64


def test_deals_are_a_function_of_the_seed():
    problem, lengths = torch.arange(16).repeat_interleave(2), torch.ones(32, dtype=torch.int64)
    first = deal(lengths, problem, 2, 1, [0, 0])
    assert first == deal(lengths, problem, 2, 1, [0, 0]) != deal(lengths, problem, 2, 1, [0, 1])


@pytest.mark.parametrize("max_length", [200, 512, 3000])
def test_no_pack_passes_the_limit_and_steps_have_equally_many(max_length):
    lengths, problem = random_responses()
    dealt = deal(lengths, problem, 3, 2, [0], max_length)
    assert max(int(lengths[pack].sum()) for pack in dealt.packs) <= max_length
    assert len(dealt.packs) == 3 * dealt.packs_per_step
    needed = max(sum(int(lengths[pack].sum()) for pack in step) for step in steps_of(dealt)) / max_length
    assert max(2, needed) <= dealt.packs_per_step <= max(2, 1.35 * needed + 2)
    assert dealt.packs_per_step % 2 == 0  # for two ranks


def test_a_response_longer_than_a_pack_is_named():
    with pytest.raises(ValueError, match="data.max_length=100: a prompt with its response has 101 tokens"):
        deal(torch.tensor([50, 101]), torch.tensor([0, 0]), 1, 1, [0], 100)


@pytest.mark.parametrize(("problems", "steps", "packs"), [(1, 4, 1), (4, 2, 9), (1, 5, 3)])
def test_with_too_little_to_deal_packs_stay_empty(problems, steps, packs):
    problem = torch.arange(problems).repeat_interleave(2)
    dealt = deal(torch.ones(2 * problems, dtype=torch.int64), problem, steps, packs, [0])
    assert len(dealt.packs) == steps * packs
    assert sorted(member for pack in dealt.packs for member in pack) == list(range(2 * problems))


@pytest.fixture
def experience():
    plan = Plan(problems=6, responses=4, budget=9)
    sampler = ProblemSampler({"difficulty": torch.zeros(20, dtype=torch.int64).numpy()})
    maker = Collector(sampler, read, Sampling(30), advantages, plan)
    for iteration in range(3):
        found = maker.collect(FakeEngine(), SumReward(), iteration, 0.0).experience
    found.weight[found.version < 2] = 0.0
    found.ref_logp = torch.arange(len(found.tokens)).float()
    return found


def prompts():
    return {number: problem(number).prompt for number in range(20)}


def test_a_batch_has_the_tokens_and_what_belongs_to_each(experience):
    dealt = deal(experience.lengths, experience.problem, 2, 2, [0])
    counts = [make_batch(experience, dealt, number, prompts()).trajectories.counts for number in range(4)]
    assert counts[0] == counts[1] and counts[2] == counts[3]
    assert counts[0].responses + counts[2].responses == len(experience)
    assert counts[0].tokens + counts[2].tokens == int((experience.weight > 0).sum())
    for number, members in enumerate(dealt.packs):
        batch = make_batch(experience, dealt, number, prompts())
        pack, tokens = batch.pack, batch.trajectories
        places = experience.places(members)
        assert pack.targets[pack.targets != IGNORE].equal(experience.tokens[places])
        assert tokens.ref_logp.equal(experience.ref_logp[places]) and tokens.weight.equal(experience.weight[places])
        assert pack.target_segments.equal(tokens.segment)
        assert tokens.response_tokens.equal(tokens.sum_by_response((tokens.weight > 0).float()).long())
        for place, member in enumerate(members):
            of_group = experience.problem == experience.problem[member]
            assert tokens.group_responses[place] == of_group.sum()
            assert tokens.group_tokens[place] == experience.counted[of_group].sum()


def test_an_empty_pack_weighs_nothing(experience):
    dealt = Deal([list(range(len(experience))), []], 2)
    idle = make_batch(experience, dealt, 1, prompts())
    assert idle.pack.num_samples == 1 and not idle.trajectories.weight.any() and not idle.trajectories.advantage.any()
    assert idle.trajectories.counts == make_batch(experience, dealt, 0, prompts()).trajectories.counts
    nothing = make_batch(experience, Deal([[], [0]], 1), 0, prompts()).trajectories.counts
    assert (nothing.responses, nothing.tokens, nothing.prompts) == (1, 1, 1)  # what is divided by


def test_routed_experts_lie_beside_the_positions_of_the_pack(experience):
    """Each position (token of prompt or response) but a response's last has those that the engine gave it."""
    sizes = [len(prompts()[int(p)]) + int(n) - 1 for p, n in zip(experience.problem, experience.lengths, strict=True)]
    experience.expert_starts = torch.tensor([0, *sizes]).cumsum(0)
    experience.experts = torch.arange(sum(sizes))[:, None, None].expand(-1, 2, 3).contiguous()
    members = [3, 0, 7]
    batch = make_batch(experience, Deal([members], 1), 0, prompts())
    assert len(batch.experts) == batch.pack.num_tokens
    for segment, member in enumerate(members):
        rows = batch.experts[batch.pack.cu_seqlens[segment] : batch.pack.cu_seqlens[segment + 1], 0, 0]
        start = int(experience.expert_starts[member])
        assert rows.tolist() == [*range(start, start + sizes[member]), -1]
