"""Questions and direct answers: right by recomputation from what the sample shows and asks."""

import re
from collections import Counter

import pytest

from kimivl.data.sample import Sample
from kimivl.model.tokenizer import SPECIAL_TOKENS
from kimivl.tasks.digits.build import SPLITS
from kimivl.tasks.digits.scans import draw_splits

from .conftest import SEED
from .test_digits_scans import cut

MARKS = re.compile("|".join(re.escape(name) for name in SPECIAL_TOKENS))


@pytest.fixture(scope="module")
def label_of() -> dict[bytes, int]:
    """Pixels of a cell -> the digit."""
    return {
        cell.tobytes(): int(label)
        for part in draw_splits(SEED).values()
        for cell, label in zip(part.pixels, part.labels, strict=True)
    }


def shown(sample: Sample, label_of: dict[bytes, int]) -> list[int]:
    return [label_of[cell.tobytes()] for cell in cut(sample) if cell.any()]


def question(sample: Sample) -> str:
    return sample.messages[0]["content"][-1]["text"]


def reply(sample: Sample) -> str:
    return sample.messages[1]["content"][0]["text"]


def expected(text: str, digits: list[int]) -> str:
    """The answer to a question, read from its words alone."""
    low = text.lower()
    if not digits:  # text only: every number in it is added
        return str(sum(map(int, re.findall(r"\d+", text))))
    if "sentence" in low:
        names = ", ".join(map(str, digits[:-1])) + f" and {digits[-1]}"
        return f"The digits are {names}." if len(digits) > 1 else f"The digit is {digits[0]}."
    if threshold := re.search(r"\d", text):
        return str(len([digit for digit in digits if digit > int(threshold.group())]))
    if "largest" in low:
        return str(sorted(digits)[-1])
    if re.search(r"\badd\b|\bsum\b", low):
        return str(sum(digits))
    word = "".join(map(str, digits))
    return word[::-1] if re.search("backward|reverse|last to first", low) else word


@pytest.mark.parametrize("name", SPLITS)
def test_answers_are_right(name, sets, label_of):
    for sample in sets[name]:
        digits = shown(sample, label_of)
        assert sample.answer == expected(question(sample), digits), sample.key
        if sample.images:
            assert sample.difficulty == len(digits)


def test_direct_replies_are_the_boxed_answer_or_the_sentence(sets):
    for sample in sets["sft"]:
        wanted = sample.answer if sample.task == "sentence" else f"\\boxed{{{sample.answer}}}"
        assert reply(sample) == wanted


def test_the_mixture_of_stage_1_has_its_shares(sets):
    share = Counter(sample.task for sample in sets["sft"])
    share["read"] += share.pop("sentence")
    wanted = {"read": 35, "backwards": 10, "sum": 17, "count": 9, "largest": 6, "text_sum": 8, "addition": 15}
    for kind, percent in wanted.items():
        assert share[kind] / len(sets["sft"]) == pytest.approx(percent / 100, abs=0.01), kind


@pytest.mark.parametrize("name", ["long_cot", "rl", "val", "test"])
def test_later_sets_are_mostly_sums_balanced_over_difficulty_and_partly_text(name, sets):
    samples = sets[name]
    kinds, levels = Counter(s.task for s in samples), Counter(s.difficulty for s in samples)
    assert kinds["sum"] / len(samples) > 0.55
    assert set(kinds) == {"sum", "count", "largest", "backwards", "text_sum"}
    assert 0.05 < sum(not sample.images for sample in samples) / len(samples) < 0.15
    assert set(levels) == set(range(1, 9)) and max(levels.values()) - min(levels.values()) <= 2


def test_every_difficulty_has_every_share_of_sums(sets):
    for level in range(1, 9):
        samples = [sample for sample in sets["test"] if sample.difficulty == level]
        share = sum(sample.task in ("sum", "text_sum") for sample in samples) / len(samples)
        assert share == pytest.approx(0.74, abs=0.08)


@pytest.mark.parametrize("name", SPLITS)
def test_problems_are_distinct(name, sets):
    problems = [(question(sample), sample.images) for sample in sets[name]]
    assert len(set(problems)) == len(problems)
    assert len({sample.key for sample in sets[name]}) == len(problems)


def test_held_out_text_sums_are_never_trained_on_in_any_phrasing(sets):
    def operands(names: tuple[str, ...]) -> set[tuple[str, ...]]:
        samples = [sample for name in names for sample in sets[name] if not sample.images]
        return {tuple(re.findall(r"\d+", question(sample))) for sample in samples}

    train, val, test = operands(("sft", "long_cot", "rl")), operands(("val",)), operands(("test",))
    assert val and test
    assert not train & val and not train & test and not val & test


def test_problems_have_no_answer_turn_and_lessons_have_one(sets):
    for name, samples in sets.items():
        roles = ["user", "assistant"] if name in ("sft", "long_cot") else ["user"]
        assert all([message["role"] for message in sample.messages] == roles for sample in samples)
        assert all(sample.source == "digits" for sample in samples)


def test_questions_are_put_in_several_ways(sets):
    ways: dict[str, set[str]] = {}
    for sample in sets["sft"]:
        ways.setdefault(sample.task, set()).add(re.sub(r"\d+(, \d+)*( and \d+)?|\d+(\+\d+)+", "N", question(sample)))
    assert all(len(phrasings) >= 3 for phrasings in ways.values()), ways


def test_no_special_token_is_spelled_in_any_text(sets):
    for samples in sets.values():
        for sample in samples:
            assert not any(MARKS.search(part.get("text", "")) for m in sample.messages for part in m["content"])
