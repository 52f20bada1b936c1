"""The literal verifiers, regular expressions, and the choice among verifiers."""

import re
from types import SimpleNamespace

import pytest

from kimivl.rl.verifiers import ByTask, Choice, Exact, Mathematics, Pattern, boxed


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"\boxed{18}", True),
        (r"The sum is \boxed{ 18 }.", True),
        (r"\boxed{17} no, \boxed{18}", True),
        (r"\boxed{18} no, \boxed{17}", False),
        (r"\boxed{018}", False),
        (r"\boxed{18.0}", False),
        ("18", False),
        (r"\boxed{}", False),
        (r"\boxed{18", False),
    ],
)
def test_boxed(text, right):
    assert boxed(text, "18") is right


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("Paris", "paris", True),
        ("Paris.", "Paris", True),
        (r"\boxed{\text{Paris}}", "Paris", True),
        ("The answer is  New   York.", "New York", True),
        ("**yes**", "yes", True),
        ('"yes"', "yes", True),
        ("Paris or Rome", "Paris", False),
        ("", "Paris", False),
        ("yes no", "yes", False),
    ],
)
def test_exact(text, expected, right):
    assert Exact()(text, expected) is right


def test_exact_settings():
    assert not Exact(ignore_case=False)("paris", "Paris")
    assert not Exact(place="boxed")("Paris", "Paris")


def test_pattern():
    assert Pattern()("Twenty apples.", r"(twenty|20)( apples)?")
    assert Pattern()(r"\boxed{20}", r"(twenty|20)( apples)?")
    assert not Pattern()("120", "20")
    assert not Pattern(ignore_case=False)("TWENTY", "twenty")
    assert not Pattern()("", ".+")
    with pytest.raises(re.error):
        Pattern()("x", "(")


def test_by_task_chooses_and_names_what_it_lacks():
    verifier = ByTask({"choice": Choice()}, by="source")
    sample = SimpleNamespace(task="x", source="choice")
    assert verifier.for_task(verifier.task_of(sample))("B.", "B")
    with pytest.raises(ValueError, match="source is 'count', only for 'choice': add it"):
        verifier.for_task("count")
    assert ByTask({}, default=Mathematics()).for_task("anything") == Mathematics()
