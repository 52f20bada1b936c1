"""Bounding boxes: (answer text, expected answer, verdict)."""

import pytest

from kimivl.rl.verifiers import Boxes
from kimivl.rl.verifiers.boxes import matched, overlap, read_boxes

RIGHT = [
    ("[10, 20, 110, 220]", "[10, 20, 110, 220]"),
    ("[12, 22, 108, 218]", "[10, 20, 110, 220]"),
    (r"\boxed{[10, 20, 110, 220]}", "[10,20,110,220]"),
    ("(10, 20, 110, 220)", "[10, 20, 110, 220]"),
    ("(10, 20), (110, 220)", "[10, 20, 110, 220]"),
    ("<box>(10,20),(110,220)</box>", "[10, 20, 110, 220]"),
    ("[[10, 20], [110, 220]]", "[10, 20, 110, 220]"),
    ("10 20 110 220", "[10, 20, 110, 220]"),
    ('```json\n{"bbox_2d": [10, 20, 110, 220], "label": "cat"}\n```', "[10, 20, 110, 220]"),
    ('{"x1": 10, "y1": 20, "x2": 110, "y2": 220}', "[10, 20, 110, 220]"),
    ("x_min=10, y_min=20, x_max=110, y_max=220", "[10, 20, 110, 220]"),
    ("[0.1, 0.2, 0.5, 0.75]", "[0.1, 0.2, 0.5, 0.75]"),
    ("The answer is [10, 20, 110, 220].", "[10, 20, 110, 220]"),
    ("[[50, 50, 60, 60], [0, 0, 10, 10]]", "[[0, 0, 10, 10], [50, 50, 60, 60]]"),
]
WRONG = [
    ("[200, 200, 300, 300]", "[10, 20, 110, 220]"),
    ("[10, 20, 110]", "[10, 20, 110, 220]"),
    ("[110, 220, 10, 20]", "[10, 20, 110, 220]"),
    ("[10, 20, 10, 220]", "[10, 20, 110, 220]"),
    ("", "[10, 20, 110, 220]"),
    ("in the middle", "[10, 20, 110, 220]"),
    ("[0, 0, 1000, 1000]", "[10, 20, 110, 220]"),
    ("[0, 0, 10, 10]", "[[0, 0, 10, 10], [50, 50, 60, 60]]"),
    ("[[0, 0, 10, 10], [0, 0, 10, 10]]", "[[0, 0, 10, 10], [50, 50, 60, 60]]"),
    ("[0, 0, 10, 10] " * 1000, "[0, 0, 10, 10]"),
    ("[nan, 0, 10, 10]", "[0, 0, 10, 10]"),
]


@pytest.mark.parametrize(("text", "expected"), RIGHT)
def test_right(text, expected):
    assert Boxes()(text, expected) == 1


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_wrong(text, expected):
    assert Boxes()(text, expected) == 0


def test_overlap_by_hand():
    assert overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert overlap((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert overlap((0, 0, 2, 2), (2, 2, 3, 3)) == 0
    assert overlap((2, 2, 0, 0), (0, 0, 2, 2)) == 0


def test_the_mark_is_the_mean_overlap_and_a_missing_box_counts_as_none():
    mark = Boxes(threshold=None)
    assert mark("[0, 0, 2, 2]", "[1, 1, 3, 3]") == pytest.approx(1 / 7)
    assert mark("[0, 0, 2, 2]", "[[0, 0, 2, 2], [5, 5, 6, 6]]") == 0.5
    assert mark("[[0, 0, 2, 2], [5, 5, 6, 6], [8, 8, 9, 9], [9, 9, 10, 10]]", "[0, 0, 2, 2]") == 0.25


def test_pairs_are_those_with_the_largest_sum():
    wanted = [(0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 6.0)]
    # the first fits both; greedily it would take the larger and leave the second nothing
    given = [(0.0, 0.0, 10.0, 7.0), (0.0, 0.0, 10.0, 9.0)]
    assert sorted(matched(given, wanted)) == pytest.approx([6 / 7, 0.9])


def test_width_and_height():
    assert read_boxes("[10, 20, 5, 6]", "xywh") == [(10, 20, 15, 26)]
    assert Boxes(form="xywh")("[10, 20, 5, 6]", "[10, 20, 5, 6]") == 1


def test_bad_settings_and_expected_answers():
    with pytest.raises(ValueError, match="threshold"):
        Boxes(threshold=0)
    with pytest.raises(ValueError, match="has no box"):
        Boxes()("[0, 0, 1, 1]", "left")
