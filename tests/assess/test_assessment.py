"""Pass rates, guesses, and an assessment that is interrupted, gone on with, or begun again."""

import json
import zlib

import numpy as np
import pytest

from kimivl.assess import Assessment
from kimivl.assess.ledger import Ledger
from kimivl.data.columns import assessed_file, read_assessed, read_columns
from kimivl.rl.gates import open_problems
from kimivl.rl.rewards import Reward

THOUGHT = "◁think▷hm◁/think▷"


def chance(key: str) -> int:
    """How many of ten responses to a problem are right, by its key."""
    return zlib.crc32(key.encode()) % 11


class Answers:
    """Right responses in the tenths of ``chance``; guesses are right for problems with an odd one."""

    def __init__(self):
        self.count = {}

    def __call__(self, request):
        key, guess = request.problem.key, bool(request.prefix)
        number = self.count[key, guess] = self.count.get((key, guess), -1) + 1
        right = number % 10 < chance(key) if not guess else number == 3 and chance(key) % 2 == 1
        answer = request.problem.answer if right else "wrong"
        return ("" if guess else THOUGHT) + rf"\boxed{{{answer}}}"


@pytest.fixture
def assess(index, read, inference_of):
    """(answers, settings) -> an assessment, whose file another may open when it is closed."""
    opened = []

    def make(answers=None, reward=None, **settings):
        inference = inference_of(answers or Answers())
        model = {"model": "m", "weights": "w"} | settings.pop("model", {})
        opened.append(Assessment(index, read, inference, reward or Reward(), model, **{"batch": 5} | settings))
        return opened[-1]

    yield make
    for assessment in opened:
        assessment.ledger.close()


def finish(assessment):
    counts = [(count, len(rows)) for count, rows in assessment.run()]
    assessment.ledger.close()
    return counts


def test_pass_rates_and_guesses_become_columns(assess, index):
    assessment = assess()
    assert finish(assessment) == [(5, 5)] * 4 + [(4, 4)]
    columns = read_columns(index)
    keys = index.keys().to_pylist()
    assert columns["pass_rate"].tolist() == pytest.approx([chance(key) / 10 for key in keys])
    assert columns["easy_to_hack"].tolist() == [chance(key) % 2 for key in keys]
    assert set(columns["answer_kind"]) == {"number"}
    engine = assessment.inference.engine
    assert len(engine.requests) == 24 * (10 + 8)
    assert len({request.seed for request in engine.requests}) == len(engine.requests)


def test_a_guess_begins_behind_an_empty_thought(assess, processor):
    assessment = assess(samples=1, guesses=2)
    finish(assessment)
    prefixes = {request.prefix for request in assessment.inference.engine.requests}
    assert {processor.tokenizer.decode(list(prefix)) for prefix in prefixes} == {"", "◁think▷◁/think▷"}


def test_a_model_that_does_not_think_guesses_at_once(assess, index):
    assessment = assess(lambda request: rf"\boxed{{{request.problem.answer}}}", Reward(thinking=False), thinking=False)
    finish(assessment)
    assert not any(request.prefix for request in assessment.inference.engine.requests)
    assert read_columns(index)["easy_to_hack"].tolist() == [1.0] * 24


def test_without_guesses_nothing_is_known_of_hacking(assess, index):
    finish(assess(guesses=0))
    assert np.isnan(read_columns(index)["easy_to_hack"]).all()


def test_an_interrupted_assessment_goes_on(assess, index):
    whole = assess()
    finish(whole)
    lines = assessed_file(index).read_text()
    again = assess(anew=True)
    running = again.run()
    for _ in range(2):
        next(running)
    again.ledger.close()
    with assessed_file(index).open("a") as file:
        file.write('{"key": "rl-0000')  # killed while it wrote
    third = assess()
    assert len(third.left) == 14
    assert finish(third) == [(5, 5), (5, 5), (4, 4)]
    assert assessed_file(index).read_text() == lines
    assert finish(assess()) == []


def test_half_an_assessment_knows_half_of_the_problems(assess, index):
    finish(assess(limit=10))
    columns = read_columns(index)
    assert np.isnan(columns["pass_rate"]).sum() == (columns["answer_kind"] == "").sum() == 14
    assert open_problems(columns, {"pass_rate": [0, 1]})[1] == {"pass_rate unknown": 14}
    assert finish(assess(limit=20)) == [(5, 5), (5, 5)]  # the ten are among the twenty


def test_seeds_do_not_depend_on_the_batch_or_the_set(assess):
    seeds = []
    for settings in ({"batch": 24}, {"batch": 1, "limit": 7}):
        assessment = assess(anew=True, **settings)
        finish(assessment)
        requests = assessment.inference.engine.requests
        seeds.append({(r.problem.key, r.seed) for r in requests})
    assert seeds[1] < seeds[0]


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"samples": 4}, "samples"), ({"temperature": 0.7}, "temperature"), ({"model": {"weights": "v"}}, "weights")],
)
def test_other_settings_do_not_mix(assess, settings, name):
    finish(assess(limit=5))
    with pytest.raises(ValueError, match=rf"holds an assessment with another {name} .*assess.anew=true"):
        assess(**settings)
    assert len(assess(anew=True, **settings).left) == 24


def test_the_same_weights_elsewhere_go_on(assess):
    finish(assess(limit=5))
    assert len(assess(model={"model": "moved"}).left) == 19


def test_two_at_once_are_refused(assess):
    assess()
    with pytest.raises(ValueError, match="is being written by another kimivl assess"):
        assess()


def test_a_changed_problem_is_not_assessed(assess, index):
    finish(assess())
    path = assessed_file(index)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["crc32"] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert np.flatnonzero(np.isnan(read_columns(index)["pass_rate"])).tolist() == [2]
    assert assess().left == [2]


def test_what_the_engine_fails_to_answer_is_left_for_the_next_call(assess, index):
    broken = set(index.keys().to_pylist()[:3])
    answers = Answers()
    assert sum(rows for _, rows in finish(assess(lambda r: None if r.problem.key in broken else answers(r)))) == 21
    assert len(assess().left) == 3


def test_single_errors_and_failed_verdicts_do_not_count(assess, index):
    class Failing(Reward):
        def judge(self, answers):
            verdicts = super().judge(answers)
            return [type(v)(float("nan"), "timeout") if n % 2 else v for n, v in enumerate(verdicts)]

    answers = Answers()
    drawn = iter(range(10**6))
    finish(assess(lambda r: None if next(drawn) % 5 == 0 else answers(r), Failing(), limit=1))
    [row] = [json.loads(line) for line in assessed_file(index).read_text().splitlines()[1:]]
    assert row["judged"] == 4  # of 10: two errors; of the others every other verdict failed


def test_an_engine_that_ignores_the_prefix_is_found_out(assess, monkeypatch):
    assessment = assess(limit=1)
    engine = assessment.inference.engine
    stream = engine.stream

    def deaf(requests, sampling):
        for number, response in stream(requests, sampling):
            yield number, type(response)(response.tokens[-2:], response.text, "stop")

    monkeypatch.setattr(engine, "stream", deaf)
    with pytest.raises(ValueError, match="does not go on from given tokens"):
        finish(assessment)


def test_a_file_of_another_kind_is_named(index):
    assessed_file(index).write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"assessed.jsonl is not what kimivl assess writes"):
        read_columns(index)
    assessed_file(index).write_text("what?\n")
    with pytest.raises(ValueError, match=r"assessed.jsonl, line 1, is not JSON"):
        read_columns(index)


def test_nothing_assessed_gives_no_columns(index):
    assert read_columns(index) == {}
    assessed_file(index).write_text("")
    assert read_columns(index) == {}


@pytest.mark.parametrize("settings", [{"samples": 0}, {"limit": 0}, {"temperature": 0.0}, {"batch": 0}])
def test_wrong_settings_are_named(assess, settings):
    with pytest.raises(ValueError, match=f"assess.{next(iter(settings))}="):
        assess(**settings)


def test_two_problems_of_one_key_are_known_by_their_bytes(tmp_path):
    path = tmp_path / "assessed.jsonl"
    ledger = Ledger(path, {"model": "m"})
    ledger.write([{"key": "a", "crc32": 1, "pass_rate": 0.25}, {"key": "a", "crc32": 2, "pass_rate": 0.5}])
    ledger.write([{"key": "a", "crc32": 1, "pass_rate": 0.75}])
    rows = dict(ledger.rows)
    ledger.close()
    assert {where: row["pass_rate"] for where, row in rows.items()} == {("a", 1): 0.75, ("a", 2): 0.5}
    assert read_assessed(path)[1] == rows
