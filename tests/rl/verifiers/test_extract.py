"""Where the final answer stands: nested braces, several boxes, statements, and texts made to take for ever."""

import time

import pytest

from kimivl.rl.verifiers import Boxes, Choice, Exact, Items, Mathematics, Numeric, boxed
from kimivl.rl.verifiers.extract import boxed_contents, final_answer, last_boxed, stated


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{\sqrt{2}}{2}} is it", r"\frac{\sqrt{2}}{2}"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\fbox{3}", "3"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{x = \boxed{2}, y}", r"x = \boxed{2}, y"),
        (r"\boxed{5", None),
        (r"\boxed{1} but \boxed{2", "1"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        (r"}}} \boxed{6} {{{", "6"),
        ("no box", None),
        ("", None),
    ],
)
def test_last_box(text, content):
    assert last_boxed(text) == content


def test_all_outermost_boxes_are_found_in_order():
    assert boxed_contents(r"\boxed{1} \boxed{a \boxed{2}} \boxed{3}") == ["1", r"a \boxed{2}", "3"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 5.", "5"),
        ("the final answer is: **42**", "42"),
        ("**Answer:** $12$", "12"),
        ("Final Answer:\n\n3.14", "3.14"),
        ("The answer to the question is (B).", "(B)"),
        ("#### 72", "72"),
        ("The answer is 1. No, the answer is 2.", "2"),
        ("Answer = 7", "7"),
        ("I answer the question later", None),
        ("The answers are 1 and 2.", "1 and 2"),
        ("", None),
    ],
)
def test_stated(text, answer):
    assert stated(text) == answer


def test_a_box_wins_over_a_statement_and_a_statement_over_the_rest():
    assert final_answer(r"The answer is 3. \boxed{4} Bye.") == "4"
    assert final_answer("Hello. The answer is 3.") == "3"
    assert final_answer(" $3$. ") == "3"
    assert final_answer("The answer is 3", place="boxed") is None
    assert final_answer("3", place="stated") is None
    assert final_answer(" \n ") is None
    assert final_answer(r"The answer is 3, so \boxed{}") is None, "an empty box is an empty answer"


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 50_000,
        r"\boxed{" * 20_000 + "}" * 20_000,
        "{" * 100_000 + "}" * 100_000,
        "answer " * 50_000,
        "the answer is " * 30_000,
        "answer" + " " * 100_000,
        "$" * 100_000,
        "*" * 100_000 + "5" + "*" * 100_000,
        "\\" * 100_001,
    ],
    ids=lambda text: text[:12],
)
def test_time_grows_no_faster_than_the_text(text):
    started = time.process_time()
    final_answer(text)
    assert time.process_time() - started < 2


def test_runs_of_spaces_count_as_one():
    assert final_answer("a  \t b \n \n  c") == "a b\nc"
    assert final_answer("\\boxed{5\u00a0 \u2009cm}") == "5 cm"


@pytest.mark.parametrize(
    "text",
    [
        "a" + " " * 20_000 + "b",
        "A" + "\n \t" * 10_000 + "!",
        "^" + " " * 20_000 + "b",
        "1" * 60_000 + "a1",
        "A " * 9_000,
    ],
    ids=["spaces", "lines", "caret", "digits", "letters"],
)
@pytest.mark.parametrize(
    ("verifier", "expected"),
    [(Mathematics().settle, "5"), (Exact(), "5"), (Choice(), "B"), (Numeric(), "5"), (Items(), "5, 6")]
    + [(Boxes(), "[1, 2, 3, 4]"), (boxed, "5")],
    ids=["mathematics", "exact", "choice", "numeric", "items", "boxes", "boxed"],
)
def test_what_runs_in_the_training_process_cannot_be_kept_busy(verifier, expected, text):
    started = time.process_time()
    assert not verifier(text, expected)
    assert time.process_time() - started < 1
