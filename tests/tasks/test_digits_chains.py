"""Chains: they reach the right answer, every step but a mended slip is right, and all four behaviours occur."""

import re
from pathlib import Path
from random import Random
from statistics import mean

import pytest

from kimivl.model.tokenizer import load_tokenizer
from kimivl.tasks.digits.chains import chain, running_sum
from kimivl.tasks.digits.questions import Problem

from .test_digits_questions import reply

STEP = re.compile(r"(?<!\d)(?=(\d+)\+(\d+)=(\d+)(?!\d))")
WORK = re.compile(r"◁think▷Plan: .*?\. Read: \d+\. (?:Wait, look again: \d+\. )?(.*)◁/think▷.*")
FORM = re.compile(r"◁think▷Plan: [^◁▷]+◁/think▷\\boxed\{\d+\}")


def wrong_steps(text: str) -> list[int]:
    """Where a written addition does not hold."""
    return [m.start() for m in STEP.finditer(text) if int(m[1]) + int(m[2]) != int(m[3])]


def problems(kind: str, count: int = 400) -> list[Problem]:
    rng = Random(kind)
    return [
        Problem(kind, tuple(rng.choices(range(10), k=i % 8 + 1)), rng.randrange(2, 8) if kind == "count" else -1)
        for i in range(count)
    ]


def test_a_running_sum_is_written_as_one_line():
    assert running_sum([3, 7, 8]) == "3+7=10+8=18"
    assert running_sum([4]) == "4"


@pytest.mark.parametrize("kind", ["sum", "text_sum", "count", "largest", "backwards"])
def test_chains_have_their_form_and_end_in_the_answer(kind: str):
    for i, problem in enumerate(problems(kind)):
        text = chain(problem, Random(i))
        assert FORM.fullmatch(text), text
        assert text.endswith(f"◁/think▷\\boxed{{{problem.answer}}}")


@pytest.mark.parametrize("kind", ["sum", "text_sum"])
def test_a_wrong_step_is_always_mended(kind: str):
    slips = 0
    for i, problem in enumerate(problems(kind, 1600)):
        text = chain(problem, Random(i))
        for place in (wrong := wrong_steps(text)):
            assert "Wait" in text[place:], text
        assert len(wrong) <= 1, text
        slips += bool(wrong)
        sums = re.findall(r"=(\d+)(?=[.,])", text)
        if len(problem.numbers) > 1:
            assert sums[-1] == problem.answer, text
    assert 0.04 < slips / 1600 < 0.14


def test_a_misreading_is_always_mended():
    found = 0
    for i, problem in enumerate(problems("sum", 1600)):
        text = chain(problem, Random(i))
        readings = re.findall(r"(?:Read|look again): (\d+)\.", text)
        right = "".join(map(str, problem.numbers))
        assert readings[-1] == right
        if len(readings) == 2:
            found += 1
            assert sum(a != b for a, b in zip(*readings, strict=True)) == 1
    assert 0.05 < found / 1600 < 0.15


def verdicts(digits: str, threshold: int) -> str:
    """The tally of a count, written anew."""
    steps = []
    for i, digit in enumerate(digits):
        above = sum(int(d) > threshold for d in digits[: i + 1])
        steps.append(f"{digit} yes {above}" if int(digit) > threshold else f"{digit} no")
    return ", ".join(steps)


def test_tallies_are_right_up_to_a_mended_slip():
    mended = 0
    for i, problem in enumerate(problems("count", 800)):
        text = chain(problem, Random(i))
        tally = verdicts("".join(map(str, problem.numbers)), problem.threshold)
        work = WORK.sub(r"\1", text)
        if tally not in text:
            mended += 1
            head, _, tail = work.partition(". Wait, ")
            kept = head.rpartition(", ")[0]
            assert tally == (f"{kept}, " if kept else "") + tail.split(".")[0], text
    assert 0.04 < mended / 800 < 0.15


def test_all_four_behaviours_occur_in_the_set(sets):
    chains = [reply(sample) for sample in sets["long_cot"]]
    share = {mark: mean(mark in text for text in chains) for mark in ("Plan:", "Check:", "Wait", "Another way:")}
    assert share["Plan:"] == 1.0
    assert share["Check:"] > 0.25
    assert share["Wait"] > 0.12
    assert share["Another way:"] > 0.1


def test_an_evaluation_sometimes_finds_a_mistake(sets):
    chains = [reply(sample) for sample in sets["long_cot"]]
    assert any(re.search(r"Check: \S+, not \d+\. Wait, again: ", text) for text in chains)


def test_lengths_grow_with_difficulty(sets, folder: Path):
    tokenizer = load_tokenizer(folder / "tokenizer")
    lengths: dict[int, list[int]] = {level: [] for level in range(1, 9)}
    for sample in sets["long_cot"]:
        lengths[sample.difficulty].append(len(tokenizer.encode(reply(sample))) + 1)
    average = [mean(values) for values in lengths.values()]
    assert average == sorted(average)
    assert average[0] < 36 and 85 < average[-1] < 115
    assert 55 < mean(average) < 75
    assert max(max(values) for values in lengths.values()) < 200


@pytest.mark.parametrize("kind", ["sum", "text_sum", "count", "largest", "backwards"])
def test_redundant_chains_make_no_mistakes_and_have_the_share_of_parts_that_was_asked_for(kind: str):
    for redundant, low, high in ((0.0, 0.0, 0.0), (0.5, 0.4, 0.6), (1.0, 1.0, 1.0)):
        texts = [chain(p, Random(i), redundant=redundant) for i, p in enumerate(problems(kind)) if len(p.numbers) > 2]
        assert not any(wrong_steps(text) or "Wait" in text for text in texts)
        for part in ("Check:", "So the ", *(("Another way:",) if kind != "backwards" else ())):
            assert low <= mean(part in text for text in texts) <= high, part


def test_hasty_chains_leave_out_the_work_and_nothing_else():
    for i, problem in enumerate(problems("sum")):
        digits = "".join(map(str, problem.numbers))
        hasty = chain(problem, Random(i), redundant=0.0, hasty=1.0)
        assert hasty == f"◁think▷Plan: read, add. Read: {digits}.◁/think▷\\boxed{{{problem.answer}}}"
    texts = [chain(problem, Random(i), hasty=0.3) for i, problem in enumerate(problems("text_sum"))]
    assert 0.2 < mean("=" not in text for text in texts if "add" in text) < 0.45
