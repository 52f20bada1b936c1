"""Lists and sets: (answer text, expected answer, verdict)."""

import pytest

from kimivl.rl.verifiers import Items

RIGHT = [
    ("{1, 2, 3}", "{1, 2, 3}"),
    ("3, 1, 2", "{1, 2, 3}"),
    ("1, 2 and 3", "1, 2, 3"),
    ("1, 2, and 3", "1, 2, 3"),
    (r"\boxed{\{3, 2, 1\}}", "1, 2, 3"),
    (r"\boxed{\left\{1, 2\right\}}", "{2, 1}"),
    (r"$1$", "1"),
    ("[red, blue]", "blue, red"),
    ('["red", "Blue"]', "blue; red"),
    ("red\nblue", "red, blue"),
    ("0.5, 1/3", r"\frac{1}{2}, \frac{1}{3}"),
    ("(1, 2), (3, 4)", "(3,4), (1,2)"),
    ("1,234, 5", "1234, 5"),
    (r"1 \text{ and } 2", "1, 2"),
    ("The answers are 1 and 2.", "2, 1"),
    ("1, 1, 2", "1, 2"),
    ("{}", "{}"),
]
WRONG = [
    ("1, 2", "1, 2, 3"),
    ("1, 2, 3, 4", "1, 2, 3"),
    ("", "1"),
    ("red", "red, blue"),
    ("(1, 2), (4, 3)", "(3, 4), (1, 2)"),
    ("all of them", "red, blue"),
    ("red, blue, green, yellow, black, white", "red, blue"),
]


@pytest.mark.parametrize(("text", "expected"), RIGHT)
def test_right(text, expected):
    assert Items()(text, expected) is True


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_wrong(text, expected):
    assert Items()(text, expected) is False


def test_kinds():
    assert Items("sequence")("1, 2", "1, 2") and not Items("sequence")("2, 1", "1, 2")
    assert Items("multiset")("2, 1, 1", "1, 2, 1") and not Items("multiset")("1, 2", "1, 2, 1")
