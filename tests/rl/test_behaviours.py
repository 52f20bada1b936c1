"""The four behaviours: markers alone are not believed, and the chains of the embedded task are known."""

import re
import time
from random import Random

import pytest

from kimivl.rl.behaviours import BEHAVIOURS, Behaviours
from kimivl.tasks.digits.chains import chain
from kimivl.tasks.digits.questions import Problem

ALL = "Plan: add. 3+4=8. Wait, 3+4=7. Check: 4+3=7, the same. Another way: 2+2+3=7."
SHOWN = {
    "planning": [
        "Plan: read, add. 3+4=7.",
        "First, I need to find the area. Then the height. 3 * 4 = 12.",
        "Let me break this down. 3+4=7",
        "Step 1: read the chart.\nStep 2: add 3 + 4 = 7",
        "首先计算面积。3×4=12。",
    ],
    "evaluation": [
        "3+4=7. Check: 4+3=7.",
        "The height is 12 cm. The width is 4 cm. Let me verify this with the scale: it agrees.",
        "x = 4. Plugging it back in gives 12.",
        "3×4=12。验算：12÷4=3。",
    ],
    "reflection": [
        "3+4=8. Wait, 3+4=7.",
        "7+8=25. Check: 8+7=15, not 25. Wait, again: 7+8=15.",
        "The bar is blue. Hmm, looking closer the bar is green.",
        "So x = 5. That's wrong, since x must be even: x = 6.",
        "3+4=8。不对，3+4=7。",
    ],
    "exploration": [
        "3+4=7. Another way: 4+3=7.",
        "x = 4. Alternatively, count the squares: 4.",
        "The first row has 3. The second has 4. Let me try a different method and count the columns instead.",
        "3+4=7。另一种方法：4+3=7。",
    ],
}
NOT_SHOWN = {
    "planning": ["3+4=7, which was the plan.", "3+4=7 is the first result.", ""],
    "evaluation": ["Plan: compute, then check.", "Check.", "3+4=7. Check", "I will check the picture. 3+4=7."],
    "reflection": ["Wait.", "3+4=7. Wait, 3+4=7 is right.", "Wait, 3+4=7.", "3+4=7. Wait, yes, that is the same."],
    "exploration": ["Another way: 3+4=7.", "3+4=7. Another way", "There is no other way than to add. 3+4=7."],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in SHOWN.items() for text in texts])
def test_a_behaviour_is_found(name, text):
    assert Behaviours()(text)[name]


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in NOT_SHOWN.items() for text in texts])
def test_a_marker_without_the_structure_is_not_believed(name, text):
    assert not Behaviours()(text)[name]


def test_the_worked_example_shows_all_four():
    assert Behaviours()(ALL) == dict.fromkeys(BEHAVIOURS, True)


def test_without_structure_markers_decide():
    assert Behaviours(structure=False)("Plan: compute, then check.")["evaluation"]


def test_the_chains_of_the_embedded_task_are_known():
    rng, find = Random(0), Behaviours()
    written = {"planning": "Plan", "evaluation": "Check", "reflection": "Wait", "exploration": "Another way"}
    wrong = dict.fromkeys(written, 0)
    for number in range(600):
        kind = ("sum", "text_sum", "count", "largest", "backwards")[number % 5]
        digits = tuple(rng.choices(range(10), k=rng.randint(2, 8)))
        text = chain(Problem(kind, digits, rng.randint(2, 7)), rng).removeprefix("◁think▷").partition("◁/think▷")[0]
        shown = find(text)
        for name, word in written.items():
            wrong[name] += bool(re.search(word, text)) != shown[name]
    assert {name: count for name, count in wrong.items() if name != "reflection"} == dict.fromkeys(
        ["planning", "evaluation", "exploration"], 0
    )
    assert wrong["reflection"] <= 6  # a slip that is mended with numbers that stood there before


def test_markers_can_be_replaced_and_added():
    find = Behaviours({"planning": [r"\broadmap\b"], "doubt": [r"\bperhaps\b"]})
    shown = find("Plan: a roadmap, perhaps. 3+4=7.")
    assert shown["planning"] and shown["doubt"]
    assert not find("Plan: 3+4=7.")["planning"]


@pytest.mark.parametrize("markers", [{"planning": ["("]}, {"planning": "plan"}, {"planning": []}])
def test_a_wrong_marker_is_named(markers):
    with pytest.raises(ValueError, match=r"behaviours\.markers\.planning"):
        Behaviours(markers)


def test_the_time_grows_with_the_length_and_not_with_its_square():
    def seconds(times: int) -> float:
        started = time.process_time()
        find("wait, 3+4=7 is right, and first so it is. " * times)
        return time.process_time() - started

    find = Behaviours()
    find("warm up")
    assert seconds(400) < 40 * max(seconds(50), 1e-3)  # eight times the text
