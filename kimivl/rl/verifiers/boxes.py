"""Bounding boxes by intersection over union."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kimivl.rl.verifiers.extract import final_answer

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 with x1 < x2 and y1 < y2."""

MAX_BOXES = 64
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?"
_CORNERS = ("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("left", "top", "right", "bottom")
_NAMED = re.compile(
    rf"[\"']?\b(x1|y1|x2|y2|[xy]_?min|[xy]_?max|left|top|right|bottom)\b[\"']?\s*[:=]\s*({_NUMBER})", re.I
)
_SEPARATOR = r"\s*(?:,|\s|\)\s*,?\s*\(|\]\s*,?\s*\[)\s*"
_FOUR = re.compile(
    rf"(?<![\w.])({_NUMBER}){_SEPARATOR}({_NUMBER}){_SEPARATOR}({_NUMBER}){_SEPARATOR}({_NUMBER})(?![\w.]*\d)"
)


@dataclass(frozen=True)
class Boxes:
    """The final answer is the expected box or boxes: ``[x1, y1, x2, y2]``, ``(x1, y1), (x2, y2)``, JSON with or without
    names of the corners. Of several, in any order, each must be found and no further one.

    Args:
        threshold: least intersection over union of a box with its counterpart. None gives the mean of the
            intersections over union as a mark, where a box too many or too few counts as 0.
        form: whether the last two numbers are the other corner (``xyxy``) or width and height (``xywh``).
    """

    threshold: float | None = 0.5
    form: Literal["xyxy", "xywh"] = "xyxy"

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"reward.verifier.threshold={self.threshold}: it is above 0 and up to 1, or null")

    def __call__(self, text: str, expected: str) -> float:
        """Raises ValueError where the expected answer has no box."""
        wanted = read_boxes(expected, self.form)
        if not wanted:
            raise ValueError(f"the expected answer {expected!r:.120} has no box: choose another reward.verifier")
        given = read_boxes(final_answer(text) or "", self.form)
        if not given or len(given) > MAX_BOXES:
            return 0.0
        overlaps = matched(given, wanted)
        if self.threshold is None:
            return sum(overlaps) / max(len(given), len(wanted))
        return float(len(given) == len(wanted) and min(overlaps) >= self.threshold)


def read_boxes(text: str, form: str = "xyxy") -> list[Box]:
    """All boxes that a text gives; one without an area is kept, and overlaps nothing."""
    named = [(name.lower().replace("_", ""), float(value)) for name, value in _NAMED.findall(text)]
    for names in _CORNERS:
        values = [value for name, value in named if name in names]
        if values and len(values) % 4 == 0 and [name for name, _ in named] == list(names) * (len(values) // 4):
            return [_box(values[place : place + 4], "xyxy") for place in range(0, len(values), 4)]
    return [_box([float(value) for value in match.groups()], form) for match in _FOUR.finditer(text)]


def _box(numbers: list[float], form: str) -> Box:
    x, y, right, bottom = numbers
    return (x, y, x + right, y + bottom) if form == "xywh" else (x, y, right, bottom)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union; 0 where one of them has no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (one, other)]
    if width <= 0 or height <= 0 or min(areas) <= 0:
        return 0.0
    return width * height / (sum(areas) - width * height)


def matched(given: list[Box], wanted: list[Box]) -> list[float]:
    """Overlaps of the pairs whose sum is largest, each box in one pair at most."""
    if len(given) == len(wanted) == 1:
        return [overlap(given[0], wanted[0])]
    from scipy.optimize import linear_sum_assignment

    table = [[overlap(one, other) for other in wanted] for one in given]
    return [table[row][column] for row, column in zip(*linear_sum_assignment(table, maximize=True), strict=True)]
