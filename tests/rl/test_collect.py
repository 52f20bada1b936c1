"""Collecting an iteration: what is asked, what is kept, and what happens when something goes wrong."""

import json
import time

import pytest
import torch
from fake_rollouts import SET, FakeEngine, SumReward, read, same

from kimivl.rl.advantages import advantages
from kimivl.rl.collect import Collector, Plan
from kimivl.rl.gates import Gates
from kimivl.rl.record import KeptResponses
from kimivl.rl.sampler import ProblemSampler
from kimivl.rl.types import Request, Response, Sampling


def collector(*, gates=None, rollouts=None, cap=40, problems=8, responses=4, read_problems=read, **plan):
    return Collector(
        ProblemSampler(SET, seed=3, gates=gates),
        read_problems,
        Sampling(cap),
        advantages,
        Plan(problems, responses, seed=5, **plan),
        rollouts,
    )


def collect(maker, iteration=0, engine=None, reward=None, **more):
    return maker.collect(engine or FakeEngine(), reward or SumReward(), iteration, iteration / 10, **more)


def test_experience_holds_each_response_with_its_score_and_advantage():
    found = collect(collector())
    experience = found.experience
    assert len(experience) == 32 and (experience.problem.bincount().unique().tolist()) == [0, 4]
    for number in range(32):
        tokens = experience.response(number)
        assert experience.correct[number] == float(int(tokens[-1]) == 9 and int(tokens.sum()) % 2 == 0)
        logp = experience.rollout_logp[experience.starts[number] : experience.starts[number + 1]]
        torch.testing.assert_close(logp, -0.1 * tokens.float())
    for number in experience.problem.unique():
        of_group = experience.problem == number
        rewards = experience.correct[of_group] - 0.001 * experience.lengths[of_group]
        torch.testing.assert_close(experience.advantage[of_group], rewards - rewards.mean())
    assert set(found.problems) == set(experience.problem.tolist())
    assert found.figures["rollout/accuracy"] == pytest.approx(float(experience.correct.mean()))
    assert found.figures["rollout/trained_groups"] == 8 and found.figures["rollout/off_policy"] == 0


def test_a_problem_that_comes_again_is_answered_anew():
    maker, engine = collector(problems=40, responses=2), FakeEngine()
    for iteration in range(2):
        collect(maker, iteration, engine)
    assert len({request.seed for request in engine.requests}) == len(engine.requests) == 2 * 40 * 2


def test_the_order_of_the_answers_does_not_matter():
    assert same(collect(collector()).experience, collect(collector(), engine=FakeEngine(shuffle=1)).experience)


def test_rounds_draw_others_until_the_batch_is_full():
    gates = Gates(zero_advantage=True)
    once = collect(collector(gates=gates, responses=2))
    more = collect(collector(gates=gates, responses=2, rounds=6))
    assert once.figures["rollout/trained_groups"] < 8 == more.figures["rollout/trained_groups"]
    assert once.figures["sampler/rejected/zero_advantage"] == 8 - once.figures["rollout/trained_groups"]
    assert more.figures["sampler/rounds"] > 1
    assert len(more.experience.problem.unique()) == 8  # all different
    for number in more.experience.problem.unique():
        assert more.experience.correct[more.experience.problem == number].tolist().count(1) == 1
    twice = collect(collector(gates=gates, responses=2, rounds=2))
    assert twice.figures["sampler/rounds"] == 2  # bounded
    full = collect(collector(rounds=5))
    assert full.figures["sampler/rounds"] == 1  # not more than it takes


def test_the_sampler_learns_from_rejected_groups_too():
    maker = collector(gates=Gates(zero_advantage=True), responses=2)
    collect(maker)
    assert (maker.sampler.visits > 0).sum() == 8


def test_a_failed_verifier_leaves_its_response_out_and_is_counted():
    whole = collect(collector()).experience
    length = int(whole.lengths[0])
    found = collect(collector(), reward=SumReward(broken=length))
    broken = int((whole.lengths == length).sum())
    assert found.figures["reward/failures/timeout"] == broken
    kept = found.experience
    assert not kept.correct.isnan().any() and not kept.advantage.isnan().any()
    assert (kept.lengths != length).all() and len(kept) <= len(whole) - broken
    sizes = kept.problem.bincount()
    assert sizes[sizes > 0].min() >= 2  # a single one has nothing to be compared with


def test_a_group_with_less_than_two_verdicts_is_left_out():
    engine = FakeEngine()
    engine.answer = lambda request, sampling: Response((1, 9), "", "stop") if request.seed % 2 else Response((9,), "", "stop")  # noqa: E501  # fmt: skip
    found = collect(collector(responses=2), engine=engine, reward=SumReward(broken=2))
    rejected = found.figures["sampler/rejected/unjudged"]
    assert rejected and found.figures["rollout/trained_groups"] == 8 - rejected


def test_responses_that_the_engine_could_not_give_are_left_out():
    engine, answer = FakeEngine(), FakeEngine().answer
    engine.answer = lambda request, sampling: Response((), "", "error") if request.seed % 5 == 0 else answer(request, sampling)  # noqa: E501  # fmt: skip
    found = collect(collector(), engine=engine)
    lost = found.figures["reward/failures/engine"]
    assert lost and len(found.experience) <= 32 - lost


@pytest.mark.parametrize("always", [0.0, 1.0])
def test_all_right_or_all_wrong(always):
    experience = collect(collector(), reward=SumReward(always=always)).experience
    assert len(experience) == 32 and experience.advantage.abs().max() < 0.1  # of the lengths alone
    maker = collector(gates=Gates(zero_advantage=True), max_empty=2)
    found = collect(maker, reward=SumReward(always=always))
    assert not found.experience.weight.any() and not found.experience.advantage.any()
    assert found.figures["rollout/trained_groups"] == 0
    with pytest.raises(ValueError, match="no group was admitted in the last 2 iterations .* 8 zero_advantage"):
        collect(maker, 1, reward=SumReward(always=always))


def test_one_admitted_iteration_forgives_the_empty_ones():
    maker = collector(gates=Gates(zero_advantage=True), max_empty=2)
    for iteration, always in enumerate((1.0, None, 1.0)):
        collect(maker, iteration, reward=SumReward(always=always))
    assert maker.empty == 1


def test_empty_responses_count_but_teach_nothing():
    engine = FakeEngine()
    engine.answer = lambda request, sampling: Response((), "", "stop") if request.seed % 2 else Response((2, 9), "", "stop")  # noqa: E501  # fmt: skip
    experience = collect(collector(), engine=engine).experience
    assert len(experience) == 32 and (experience.lengths == 0).any()
    assert experience.counted.equal(experience.lengths)


def test_a_verifier_that_always_fails_is_an_error():
    engine = FakeEngine()
    engine.answer = lambda request, sampling: Response((9,), "", "stop")
    with pytest.raises(ValueError, match="none of the 32 responses of iteration 0 could be judged .32 timeout."):
        collect(collector(), engine=engine, reward=SumReward(broken=1))


def test_no_problem_left():
    maker = collector(gates=Gates(retire_after=1))
    maker.sampler.perfect[:] = 1
    with pytest.raises(ValueError, match="no problem is left to draw in iteration 0"):
        collect(maker)
    few = collector(gates=Gates(retire_after=1))
    few.sampler.perfect[3:] = 1
    assert sorted(collect(few).problems) == [0, 1, 2]


@pytest.mark.parametrize("key", ["problems", "responses", "rounds", "budget", "max_empty"])
def test_a_plan_of_nothing_is_refused(key):
    with pytest.raises(ValueError, match=f"data.{key}=0"):
        Plan(**({"problems": 1, "responses": 2} | {key: 0}))


def test_a_crashed_iteration_is_replayed_with_what_was_there(tmp_path):
    """The engine dies, twice; nothing that it gave is asked for again, and the outcome is that of no crash."""
    whole_engine = FakeEngine()
    whole = collect(collector(), engine=whole_engine)
    asked = []
    for fail_after, given in ((5, 5), (7, 12)):
        engine = FakeEngine(fail_after=fail_after)
        message = f"failed in iteration 0 after {given} of 32 responses: the engine is gone; they are kept in"
        with pytest.raises(ValueError, match=message):
            collect(collector(rollouts=tmp_path), engine=engine, policy=lambda: "a")
        asked += engine.requests
    engine = FakeEngine()
    found = collect(collector(rollouts=tmp_path), engine=engine, policy=lambda: "a")
    asked += engine.requests
    assert len({request.seed for request in asked}) == len(asked) == 32
    assert same(found.experience, whole.experience)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["000000.jsonl"]


def test_a_crash_while_responses_are_gone_on_with(tmp_path):
    """With a small budget nothing is complete at first, so a response has several calls in one iteration."""
    whole_engine, engine, calls = FakeEngine(mean=30), FakeEngine(mean=30), []
    whole = collect(collector(budget=2), engine=whole_engine)
    stream = engine.stream

    def dying(requests, sampling):
        calls.append(len(requests))
        yield from stream(requests, sampling)
        if len(calls) == 3:
            raise RuntimeError("the engine is gone")

    engine.stream = dying
    with pytest.raises(ValueError, match="the engine is gone"):
        collect(collector(budget=2, rollouts=tmp_path), engine=engine, policy=lambda: "a")
    again = FakeEngine(mean=30)
    found = collect(collector(budget=2, rollouts=tmp_path), engine=again, policy=lambda: "a")
    assert same(found.experience, whole.experience)
    assert len(engine.requests) + len(again.requests) == len(whole_engine.requests)


def test_a_killed_run_has_saved_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr("kimivl.rl.record.SAVE_EVERY", -1.0)
    kept = KeptResponses(tmp_path / "000000.partial", lambda: "a")
    request = Request(read([1])[0], 5)
    kept.add(request, Response((1, 9), "1", "stop"))
    assert KeptResponses(tmp_path / "000000.partial", lambda: "a").get(request).tokens == (1, 9)


def test_another_policy_draws_anew(tmp_path, caplog):
    with pytest.raises(ValueError, match="the engine is gone"):
        collect(collector(rollouts=tmp_path), engine=FakeEngine(fail_after=5), policy=lambda: "a")
    engine = FakeEngine()
    collect(collector(rollouts=tmp_path), engine=engine, policy=lambda: "b")
    assert len(engine.requests) == 32 and "responses of another policy" in caplog.text


def test_what_runs_ahead_of_training_is_not_kept(tmp_path):
    engine = FakeEngine(fail_after=5)
    with pytest.raises(ValueError, match="they are lost, because data.rollouts is null or they ran ahead of training"):
        collect(collector(rollouts=tmp_path), 3, engine=engine, version=2, policy=lambda: "a")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_there_is(tmp_path):
    engine = FakeEngine()

    def stop(done, total):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(collector(rollouts=tmp_path), engine=engine, policy=lambda: "a", report=stop)
    again = FakeEngine()
    collect(collector(rollouts=tmp_path), engine=again, policy=lambda: "a")
    assert len(again.requests) == 32 - 9


def test_a_verifier_that_cannot_start_loses_no_response(tmp_path):
    reward = SumReward()
    reward.score = lambda groups, progress: 1 / 0
    with pytest.raises(ZeroDivisionError):
        collect(collector(rollouts=tmp_path), reward=reward, policy=lambda: "a")
    again = FakeEngine()
    collect(collector(rollouts=tmp_path), engine=again, policy=lambda: "a")
    assert not again.requests


def test_an_error_does_not_wait_for_the_groups_to_be_judged():
    """In the order asked, 7 of 8 groups are complete when the engine dies."""
    reward, engine, begun = SumReward(), FakeEngine(), []
    score = reward.score
    reward.score = lambda groups, progress: begun.append(time.sleep(0.1)) or score(groups, progress)

    def in_order(requests, sampling):
        yield from ((number, engine.answer(request, sampling)) for number, request in enumerate(requests[:-1]))
        raise RuntimeError("the engine is gone")

    engine.stream = in_order
    with pytest.raises(ValueError, match="the engine is gone"):
        collect(collector(), engine=engine, reward=reward)
    assert len(begun) < 7


def test_what_the_engine_failed_to_give_is_asked_for_again(tmp_path):
    def engine(fail_after, lost):
        made, answer = FakeEngine(fail_after=fail_after), FakeEngine().answer
        made.answer = lambda request, sampling: Response((), "", "error") if lost else answer(request, sampling)
        return made

    with pytest.raises(ValueError, match="the engine is gone"):
        collect(collector(rollouts=tmp_path), engine=engine(5, lost=True), policy=lambda: "a")
    again = engine(None, lost=False)
    collect(collector(rollouts=tmp_path), engine=again, policy=lambda: "a")
    assert len(again.requests) == 32


def test_an_engine_that_gives_too_few_is_an_error():
    engine = FakeEngine()
    engine.stream = lambda requests, sampling: iter([(0, engine.answer(requests[0], sampling))])
    with pytest.raises(ValueError, match="gave 1 of 32 responses and no more; they are lost, because data.rollouts"):
        collect(collector(), engine=engine)


def test_the_record_has_a_line_for_each_group(tmp_path):
    found = collect(collector(rollouts=tmp_path, gates=Gates(zero_advantage=True), responses=2), 3)
    rows = [json.loads(line) for line in (tmp_path / "000003.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["iteration"] for row in rows} == {3}
    advantages = [r["advantage"] for row in rows if row["rejected"] is None for r in row["responses"]]
    torch.testing.assert_close(torch.tensor(advantages), found.experience.advantage)
    for row in rows:
        assert row["question"] == f"question {row['number']}" and row["key"] == f"key-{row['number']}"
        for response in row["responses"]:
            assert len(response["text"]) == response["tokens"] and response["written_in"] == [3]
            assert response["reward"] == pytest.approx(sum(response["parts"].values()))
            assert (response["advantage"] is None) == (row["rejected"] is not None)


def test_gone_back_in_the_record_begins_again_there(tmp_path):
    maker = collector(rollouts=tmp_path)
    for iteration in range(4):
        collect(maker, iteration)
    lines = (tmp_path / "000002.jsonl").read_text()
    back = collector(rollouts=tmp_path)
    back.load_state_dict(maker.state_dict())
    collect(back, 2, engine=FakeEngine())
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["000000.jsonl", "000001.jsonl", "000002.jsonl"]
    assert len((tmp_path / "000002.jsonl").read_text().splitlines()) == len(lines.splitlines())


def test_responses_are_kept_until_a_checkpoint_has_them(tmp_path):
    maker = collector(rollouts=tmp_path)
    for iteration in range(3):
        collect(maker, iteration)
    engine = FakeEngine()
    again = collector(rollouts=tmp_path)  # killed before its first checkpoint: every iteration is there still
    for iteration in range(3):
        collect(again, iteration, engine=engine)
    assert engine.requests == []
    maker.record.saved(1)
    assert [path.name for path in tmp_path.glob("*.partial")] == ["000002.partial"]


def test_the_report_counts_the_responses():
    seen = []
    collect(collector(), report=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 32) for done in range(33)]
