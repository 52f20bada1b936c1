"""Partial rollouts: written in pieces, the same as in one; what earlier policies wrote stays out of the loss."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from fake_rollouts import FakeEngine, SumReward, problem, read

from kimivl.rl.advantages import advantages
from kimivl.rl.collect import Collector, Plan
from kimivl.rl.gates import Gates
from kimivl.rl.mismatch import Mismatch
from kimivl.rl.partial import Draft, OpenGroup, PartialRollouts, weigh
from kimivl.rl.sampler import ProblemSampler
from kimivl.rl.types import Response, Sampling

SET = {"difficulty": np.zeros(60, np.int64)}


def collector(budget=None, cap=24, rounds=1):
    plan = Plan(problems=6, responses=3, seed=5, budget=budget, rounds=rounds)
    return Collector(ProblemSampler(SET, seed=3), read, Sampling(cap), advantages, plan)


def run(maker, iterations, engine=None, start=0):
    engine = engine or FakeEngine(mean=10)
    return [maker.collect(engine, SumReward(), iteration, 0.0) for iteration in range(start, start + iterations)]


def responses_of(collected):
    """(problem, tokens) of all responses that came to be trained on."""
    return [
        (int(found.experience.problem[n]), tuple(found.experience.response(n).tolist()))
        for found in collected
        for n in range(len(found.experience))
    ]


def test_in_pieces_is_in_one():
    """Groups are complete in another iteration, with the same responses as without a budget."""
    [whole] = run(collector(), 1)
    pieces = run(collector(budget=5), 8)
    first = {number for number, _ in responses_of([whole])}
    assert sorted(pair for pair in responses_of(pieces) if pair[0] in first) == sorted(responses_of([whole]))
    assert len({found.experience.iteration for found in pieces if first & set(found.problems)}) > 1


@pytest.mark.parametrize("budget", [1, 7])
def test_every_token_has_its_version_and_the_logp_of_its_own_call(budget):
    for found in run(collector(budget=budget), 9):
        experience = found.experience
        torch.testing.assert_close(experience.rollout_logp, -0.1 * experience.tokens.float())
        for n in range(len(experience)):
            version = experience.version[experience.starts[n] : experience.starts[n + 1]]
            assert (version.diff() >= 0).all() and version.max() <= experience.iteration
            calls = version.unique(return_counts=True)[1]
            assert (calls[:-1] % budget == 0).all()  # each call but the last was used up


def test_the_buffer_is_bounded_and_its_problems_are_not_drawn_again():
    maker, engine = collector(budget=4, cap=24, rounds=3), FakeEngine(mean=20)
    for iteration in range(12):
        waiting = dict(maker.waiting.groups)
        before = len(engine.requests)
        run(maker, 1, engine, iteration)
        asked = [request.problem.number for request in engine.requests[before:] if not request.prefix]
        assert not set(asked) & set(waiting)
        assert len(maker.waiting) <= 6 and set(maker._problems) == set(maker.waiting.groups)  # no other is held
        assert all(iteration - group.born < 24 / 4 for group in maker.waiting.groups.values())


def test_while_no_group_is_complete_the_iteration_goes_on():
    [found] = run(collector(budget=2, cap=24), 1, FakeEngine(mean=30))
    assert len(found.experience) and found.figures["rollout/off_policy"] == 0  # all by the same policy
    assert found.experience.lengths.max() > 2


def test_a_resumed_buffer_goes_on_as_an_uninterrupted_one():
    whole = run(maker := collector(budget=4), 6)
    half = collector(budget=4)
    run(half, 3)
    state = torch.load(_saved(half.state_dict()), weights_only=True)
    resumed = collector(budget=4)
    resumed.load_state_dict(state)
    assert responses_of(run(resumed, 3, start=3)) == responses_of(whole[3:])
    assert _flat(resumed.state_dict()["waiting"]) == _flat(maker.state_dict()["waiting"])


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def _flat(state):
    return [
        (group["number"], group["born"], draft["seed"], draft["version"].tolist())
        + ((draft["response"]["tokens"].tolist(), draft["response"]["logp"].tolist(), draft["response"]["stop"]))
        for group in state["groups"]
        for draft in group["drafts"]
    ]


def test_the_buffer_round_trips_to_the_bit():
    draft = Draft(2**62 + 1).extended(Response((1, 2), "ab", "budget", np.array([-0.3, -1e-9], np.float32)), 4)
    experts = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    done = Draft(7).extended(Response((3, 9), "c", "stop", None, experts), 5)
    buffer, back = PartialRollouts(), PartialRollouts()
    buffer.put([OpenGroup(17, 4, [draft, done, Draft(8)])])
    back.load_state_dict(torch.load(_saved(buffer.state_dict()), weights_only=True))
    [group] = back.take()
    assert (group.number, group.born, group.unfinished, len(back)) == (17, 4, 2, 0)
    assert group.drafts[0].seed == 2**62 + 1 and group.drafts[0].response.tokens == (1, 2)
    assert group.drafts[0].response.logp.tobytes() == draft.response.logp.tobytes()
    assert group.drafts[1].response.logp is None and (group.drafts[1].response.experts == experts).all()
    assert group.drafts[2].response is None


def test_a_draft_takes_what_the_engine_adds_and_only_that():
    draft = Draft(1).extended(Response((4, 5), "", "budget", np.array([-1, -2], np.float32)), 3)
    request = draft.request(problem(0), 8)
    assert request.prefix == (4, 5) and request.budget == 8 and not draft.complete
    longer = draft.extended(Response((4, 5, 9), "", "stop", np.array([np.nan, np.nan, -3], np.float32)), 6)
    assert longer.complete and longer.version.tolist() == [3, 3, 6] and longer.response.logp.tolist() == [-1, -2, -3]
    with pytest.raises(ValueError, match="did not go on from the 2 tokens"):
        draft.extended(Response((5, 9), "", "stop"), 6)
    with pytest.raises(ValueError, match="it has written nothing"):  # and would for ever
        draft.extended(Response((4, 5), "", "budget"), 6)


def test_a_draft_has_experts_when_it_is_complete():
    experts = np.zeros((3, 1, 1), np.uint8)
    assert Draft(1).extended(Response((4, 5), "", "budget", None, experts), 3).response.experts is None
    assert Draft(1).extended(Response((4, 5), "", "length", None, experts), 3).response.experts is experts


def test_a_response_lost_while_it_waited_counts_no_tokens_and_is_left_out():
    maker, answer = collector(budget=4), FakeEngine(mean=10).answer
    run(maker, 1, FakeEngine(mean=10))
    engine = FakeEngine(mean=10)
    given = []
    engine.answer = lambda asked, how: (
        Response((), "", "error") if asked.prefix else given.append(answer(asked, how)) or given[-1]
    )
    [found] = run(maker, 1, engine, start=1)
    figures, lost = found.figures, sum(bool(request.prefix) for request in engine.requests)
    assert lost and figures["reward/failures/engine"] == lost
    drawn = figures["perf/rollout_tokens_per_s"] * figures["perf/generate_s"]
    assert drawn == pytest.approx(sum(map(len, given)))


def weighed(off_policy, mismatch=Mismatch(), logp=True):  # noqa: B008
    found = run(collector(budget=4), 3, FakeEngine(mean=10, logp=logp))[-1].experience
    found.ref_logp = torch.where(found.rollout_logp.isnan(), -1.0, found.rollout_logp + 0.5)
    assert ((old := found.version < found.iteration) & True).any() and (~old).any()
    return found, old, weigh(found, off_policy, mismatch)


def test_what_an_earlier_policy_wrote_is_out_of_the_loss():
    experience, old, _ = weighed("drop")
    assert not experience.weight[old].any() and (experience.weight[~old] == 1).all()
    assert int(experience.counted.sum()) == int((~old).sum())


def test_or_in_with_truncated_importance_weights():
    experience, old, figures = weighed("importance")
    torch.testing.assert_close(experience.weight[old], torch.full((int(old.sum()),), float(np.exp(0.5))))
    assert (experience.weight[~old] == 1).all() and figures["policy/off_policy_weight"] == pytest.approx(np.exp(0.5))
    capped, old, _ = weighed("importance", Mismatch(cap=1.2))
    torch.testing.assert_close(capped.weight[old], torch.full((int(old.sum()),), 1.2))


def test_importance_needs_the_engine_to_give_log_probabilities():
    with pytest.raises(ValueError, match="data.off_policy=importance: the rollout engine gave no log-probabilities"):
        weighed("importance", logp=False)
    weighed("drop", logp=False)


def test_the_mismatch_of_engine_and_trainer_is_that_of_the_current_policy():
    experience, old, figures = weighed("drop")
    assert figures["policy/mismatch_max"] == pytest.approx(0.5)
    experience.weight[:] = 1
    experience.ref_logp = torch.where(old, experience.ref_logp + 3, experience.rollout_logp)
    assert weigh(experience, "drop", Mismatch())["policy/mismatch_max"] == 0


def test_rounds_do_not_draw_what_waits():
    sampler = ProblemSampler({"difficulty": np.zeros(12, np.int64)}, seed=3, gates=Gates(zero_advantage=True))
    plan, engine = Plan(problems=6, responses=2, seed=5, budget=4, rounds=3), FakeEngine(mean=6)
    maker = Collector(sampler, read, Sampling(24), advantages, plan)
    maker.collect(engine, SumReward(always=1.0), 0, 0.0)
    asked = Counter(request.problem.number for request in engine.requests if not request.prefix)
    assert len(asked) > 6 and set(asked.values()) == {2}


def test_an_iteration_that_trains_on_nothing_stays_without_weight():
    experience, _, _ = weighed("importance")
    experience.weight.zero_()
    assert weigh(experience, "importance", Mismatch()) == {} and not experience.weight.any()


def test_rounds_do_not_draw_for_groups_that_wait():
    maker, engine = collector(budget=4, rounds=4), FakeEngine(mean=12)
    [found] = run(maker, 1, engine)
    assert len(maker.waiting) and found.figures["sampler/rounds"] == 1
