"""The parts of the sieve: marks, languages, repetition, duplicates, prompts."""

import numpy as np
import pytest

from kimivl.data.sample import Sample
from kimivl.synthesize.checks import Checks
from kimivl.synthesize.judge import Judge
from kimivl.synthesize.language import foreign_share
from kimivl.synthesize.prompts import Prompt, prompt_of, read_prompts
from kimivl.synthesize.select import Selection, jaccard, shingles
from kimivl.synthesize.traces import Trace, Unfit, read_trace


@pytest.mark.parametrize(
    "text",
    [
        "◁think▷a◁/think▷b",
        "<think>a</think>b",
        "<think>\na\n</think>\n\nb",
        "a</think>b",  # the opening tag stood in the prompt
        "◁think▷a</think>b",
    ],
)
def test_a_trace_is_read_from_any_marks(text):
    assert read_trace(text) == Trace("a", "b")
    assert read_trace(text).text == "◁think▷a◁/think▷b"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("b", "think_marks"),
        ("", "think_marks"),
        ("a◁/think▷b", "think_marks"),
        ("<think>a", "think_marks"),
        ("<think>a<think>b</think>c", "think_marks"),
        ("<think>a</think>b</think>c", "think_marks"),
        ("◁think▷<think>a</think>b", "think_marks"),
        ("So: <think>a</think>b", "think_marks"),
        ("</think>a<think>b", "think_marks"),
        ("<think> </think>b", "no_thinking"),
        ("<think>a</think> \n", "no_answer"),
    ],
)
def test_other_marks_are_refused(text, reason):
    with pytest.raises(Unfit) as unfit:
        read_trace(text)
    assert unfit.value.reason == reason


@pytest.mark.parametrize(
    ("text", "question", "low", "high"),
    [
        ("The sum is seven.", "What is the sum?", 0, 0),
        ("The sum 等于七 is seven.", "What is the sum?", 0.1, 0.3),
        ("和是七。", "What is the sum?", 1, 1),
        ("设 x=3，\\frac{x}{2} 等于 1.5，α 很小。", "求和", 0, 0),
        ("The sum is seven.", "3+4=?", 0, 0),
        ("So 七 it is.", "3+4=?", 0.05, 0.3),
        ("これは漢字です。", "これは？", 0, 0),
        ("答えは hello です。", "「こんにちは」を英語に：hello?", 0, 0),
        ("1 2 3", "What?", 0, 0),
    ],
)
def test_language_mixing_is_measured_against_the_question(text, question, low, high):
    assert low <= foreign_share(text, question) <= high


def test_exact_and_near_duplicates_leave_the_shortest():
    base = "first add three and four then carry on with the rest of the digits until the last one is added"
    texts = [base + " and then stop", base, base.upper() + " ", "count upwards from three by four and read the result"]
    assert Selection("all", near=0.7)(texts, [22, 20, 20, 12]) == ["near_duplicate", None, "duplicate", None]
    assert Selection("all", near=1.1)(texts, [22, 20, 20, 12]) == [None, None, "duplicate", None]


def test_the_shortest_or_the_most_diverse_are_kept():
    texts = ["a b c d e f", "a b c d e g", "u v w x y z", "a b c q r s t"]
    lengths = [6, 7, 9, 8]
    assert Selection("shortest", 2, near=1.1)(texts, lengths) == [None, None, "surplus", "surplus"]
    assert Selection("diverse", 2, near=1.1)(texts, lengths) == [None, "surplus", None, "surplus"]
    assert Selection("diverse", 9, near=1.1)(texts, lengths) == [None] * 4
    assert Selection()([], []) == []


def test_diverse_is_greedy_max_min():
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 4, 12))) for _ in range(12)]
    reasons = Selection("diverse", 4, near=1.1)(texts, list(range(12)))
    chosen = {number for number, reason in enumerate(reasons) if reason is None}
    sets = [shingles(text) for text in texts]
    expected = [0]
    while len(expected) < 4:
        rest = [n for n in range(12) if n not in expected]
        expected.append(max(rest, key=lambda n: min(1 - jaccard(sets[n], sets[m]) for m in expected)))
    assert chosen == set(expected)


QUESTION = Sample(
    "q",
    [
        {"role": "system", "content": [{"type": "text", "text": "Metric units."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How long?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "5"}]},
    ],
    (b"x",),
    "5",
)


def test_a_prompt_is_put_around_the_question_and_leaves_the_sample_alone():
    before = str(QUESTION)
    put = Prompt("p", system="Be careful.", prefix="Look.", suffix="Plan.").put(QUESTION)
    assert str(QUESTION) == before
    assert [turn["role"] for turn in put.messages] == ["system", "user"]
    texts = [[part.get("text", "image") for part in turn["content"]] for turn in put.messages]
    assert texts == [["Metric units.", "\n\nBe careful."], ["Look.\n\n", "image", "How long?", "\n\nPlan."]]
    assert Prompt("plain").put(QUESTION).messages == QUESTION.messages[:-1]


def test_every_prompt_has_its_turn_for_every_problem():
    prompts = [Prompt(name) for name in "abc"]
    for problem in range(5):
        assert {prompt_of(prompts, problem, sample).name for sample in range(3)} == set("abc")
    assert {prompt_of(prompts, problem, 0).name for problem in range(3)} == set("abc")


def test_a_quoted_prompt_is_found():
    prompt = Prompt("p", suffix="Begin your thinking with a short plan that lists the steps, then go on.")
    assert prompt.leaks_into("OK: begin your thinking with a short plan THAT lists the steps.")
    assert prompt.leaks_into("I begin with a short plan.") is None


@pytest.mark.parametrize("prompts", [{}, {"a": {"sytem": "x"}}, {"a": "x"}, {"a": {"suffix": 3}}])
def test_wrong_prompts_are_named(prompts):
    with pytest.raises(ValueError, match=r"synthesize\.prompts"):
        read_prompts(prompts)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"required": ["planing"]}, "planing"),
        ({"min_behaviours": 5}, "min_behaviours"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"max_foreign": 2}, "max_foreign"),
        ({"leaks": ["("]}, "leaks"),
    ],
)
def test_wrong_checks_are_named(settings, key):
    with pytest.raises(ValueError, match=key):
        Checks(**settings)


def test_a_judgement_must_speak_of_every_behaviour():
    names = ("planning", "reflection")
    assert Judge.read("planning: yes\n* Reflection: **No**", names) == {"planning": True, "reflection": False}
    thought = "planning: no\nreflection: no, but◁/think▷planning: yes\nreflection: yes"
    assert Judge.read("◁think▷" + thought, names) == {"planning": True, "reflection": True}
    assert Judge.read("planning: yes", names) is None
    with pytest.raises(ValueError, match="template"):
        Judge(lambda policy: None, template="hello {names}")
