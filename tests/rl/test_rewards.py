"""The reward reads the final answer only, adds its parts, and keeps failures of the verifier apart."""

import math
import types

import pytest
import torch

from kimivl.data.sample import Sample
from kimivl.rl.length import LengthReward, NoLength
from kimivl.rl.rewards import FormatPenalty, RepetitionPenalty, Reward, Verdict, answer_text, verifier_for
from kimivl.rl.types import Group, Problem, Response
from kimivl.rl.verifiers import Boxes, ByTask, Choice, Mathematics, boxed


def response(text: str, length: int = 10, stop: str = "stop") -> Response:
    return Response(tuple(range(length)), text, stop)


def problem(answer: str = "1", task: str = "") -> Problem:
    sample = Sample(
        f"key-{answer}", [{"role": "user", "content": [{"type": "text", "text": "?"}]}], answer=answer, task=task
    )
    return Problem(0, sample, types.SimpleNamespace())


def picky(text: str, expected: str) -> bool:
    if "fail" in text:
        raise RuntimeError("cannot judge")
    return boxed(text, expected)


def test_only_the_text_after_the_closing_mark_counts():
    assert answer_text(response("◁think▷\\boxed{1}◁/think▷\\boxed{2}"), thinking=True) == "\\boxed{2}"
    assert answer_text(response("\\boxed{2}"), thinking=True) is None
    assert answer_text(response("◁think▷◁/think▷x◁/think▷y"), thinking=True) == "y"
    assert answer_text(response("◁think▷◁/think▷x◁think▷y"), thinking=True) == "x", "thinking that goes on"
    assert answer_text(response("\\boxed{2}"), thinking=False) == "\\boxed{2}"
    assert answer_text(response("", 0), thinking=True) is None


@pytest.mark.parametrize("stop", ["length", "repetition", "budget", "error"])
def test_a_response_that_did_not_close_its_turn_has_no_answer(stop):
    assert answer_text(response("◁think▷◁/think▷\\boxed{2}", stop=stop), thinking=True) is None
    reward = Reward(thinking=True)
    assert reward.judge([(problem("2"), response("◁/think▷\\boxed{2}", stop=stop))]) == [Verdict(0.0)]


@pytest.mark.parametrize("verifier", [boxed, Mathematics(), Choice(), Boxes()])
def test_a_truth_inside_the_thinking_only_is_wrong(verifier):
    answer = "[0, 0, 1, 1]" if isinstance(verifier, Boxes) else "A"
    text = f"◁think▷The answer is \\boxed{{{answer}}}.◁/think▷I do not know."
    [verdict] = Reward(verifier).judge([(problem(answer), response(text))])
    assert verdict.correct == 0


def test_scores_are_the_sum_of_the_parts_and_the_length_reward_starts_late():
    reward = Reward(length=LengthReward(weight=0.4, start=0.3))
    texts = [("◁/think▷\\boxed{1}", 10), ("◁/think▷\\boxed{1}", 30), ("no", 20)]
    group = Group(problem("1"), [response(*each) for each in texts])
    [early] = reward.score([group], progress=0.29)
    [late] = reward.score([group], progress=0.3)
    assert early.total.tolist() == [1, 1, 0]
    assert late.total.tolist() == pytest.approx([1.2, 0.8, 0.0])
    assert late.correct.tolist() == [1, 1, 0]
    assert torch.equal(torch.stack(list(late.parts.values())).sum(0), late.total)


def test_groups_may_have_any_sizes():
    groups = [Group(problem("1"), [response("◁/think▷\\boxed{1}")] * k) for k in (1, 3, 2)]
    scores = Reward().score(groups, 1.0)
    assert [score.total.tolist() for score in scores] == [[1], [1, 1, 1], [1, 1]]


def test_a_failed_verifier_is_counted_and_poisons_nobody():
    reward = Reward(picky, length=LengthReward(weight=1.0))
    answers = [("◁/think▷\\boxed{1}", 100), ("◁/think▷fail", 5000), ("◁/think▷\\boxed{1}", 200), ("◁/think▷", 300)]
    others = [answers[0], *answers[2:]]
    [score] = reward.score([Group(problem("1"), [response(*each) for each in answers])], 1.0)
    [without] = reward.score([Group(problem("1"), [response(*each) for each in others])], 1.0)
    assert score.failures == {"error": 1}
    assert math.isnan(score.total[1]) and math.isnan(score.correct[1])
    assert score.total[[0, 2, 3]].tolist() == without.total.tolist() == [1.5, 1.0, -0.5]
    assert without.failures == {}


def test_failures_are_said_a_few_times_with_the_sample(caplog):
    reward = Reward(picky)
    reward.judge([(problem("1"), response(f"◁/think▷fail {number}")) for number in range(20)])
    assert len(caplog.records) == 5
    assert "key-1 (error): RuntimeError: cannot judge" in caplog.text


def test_further_parts_are_added_and_named():
    reward = Reward(length=NoLength(), parts={"repetition": RepetitionPenalty(0.5), "format": FormatPenalty(0.1)})
    texts = [
        ("◁think▷so◁/think▷\\boxed{1}", 10, "stop"),
        ("◁think▷so so so so", 10, "repetition"),
        ("◁think▷◁think▷so◁/think▷\\boxed{1}", 10, "stop"),
    ]
    [score] = reward.score([Group(problem("1"), [response(*each) for each in texts])], 1.0)
    assert set(score.parts) == {"correct", "length", "repetition", "format"}
    assert score.parts["repetition"].tolist() == [0, -0.5, 0]
    assert score.total.tolist() == pytest.approx([1, -0.6, 0.9])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("◁think▷a◁/think▷b", True),
        ("◁think▷a◁/think▷ ", False),
        ("a◁think▷b◁/think▷c", False),
        ("◁think▷a", False),
        ("a◁/think▷b", False),
        ("◁think▷a◁/think▷b◁/think▷c", False),
        ("", False),
    ],
)
def test_format(text, kept):
    assert FormatPenalty.is_kept(text) is kept


def test_parts_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="reward.parts.total: that name is taken"):
        Reward(parts={"total": RepetitionPenalty()})
    with pytest.raises(ValueError, match=r"reward.parts.mine gave \(1,\) for a group of 2"):
        Reward(parts={"mine": lambda group: torch.zeros(1)}).score([Group(problem(), [response("")] * 2)], 0)


def test_the_task_of_a_sample_chooses_its_verifier():
    verifier = ByTask({"choice": Choice(), "count": boxed})
    reward = Reward(verifier, thinking=False)
    pairs = [(problem("B", "choice"), response("Option B")), (problem("2", "count"), response("Option 2"))]
    assert [verdict.correct for verdict in reward.judge(pairs)] == [1, 0]
    assert verifier_for(verifier, pairs[0][0].sample) == Choice()
    assert verifier_for(boxed, pairs[0][0].sample) is boxed
    [unknown] = reward.judge([(problem("2", "guess"), response("2"))])
    assert unknown.failure == "error" and "'guess'" in unknown.detail
    assert Reward(verifier, thinking=False, workers=1).judge([(problem("2", "guess"), response("2"))]) == [unknown]


def test_worker_processes_give_the_same_verdicts():
    answers = ["◁/think▷\\boxed{x+1}", "◁/think▷\\boxed{1+x}", "◁/think▷\\boxed{x}", "◁/think▷", "no"]
    pairs = [(problem("x+1"), response(text)) for text in answers]
    reward = Reward(Mathematics(), workers=1, timeout=30)
    assert [verdict.correct for verdict in reward.judge(pairs)] == [1, 1, 0, 0, 0]
    assert Reward(Mathematics()).judge(pairs) == reward.judge(pairs)
    reward.pool.close()
