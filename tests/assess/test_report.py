"""What an assessment says in the terminal, and its picture."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from kimivl.assess.report import draw_assessment, pass_rate_bins, print_assessment

ABOUT = {"samples": 10, "temperature": 1.0, "guesses": 8}


def row(pass_rate, hack=False, kind="number", difficulty=1):
    return {"pass_rate": pass_rate, "easy_to_hack": hack, "answer_kind": kind, "difficulty": difficulty}


ROWS = [row(0.0), row(0.0, True), row(0.1), row(0.5, True), row(0.5), row(0.9), row(1.0, True), row(1.0), row(None)]


def test_only_never_and_always_fall_into_the_outer_bins():
    rows = [row(rate) for rate in (0.0, 0.01, 0.04, 0.05, 0.96, 0.99, 1.0)]
    assert pass_rate_bins(rows)[0].tolist() == [1, 3, 0, 0, 0, 0, 0, 0, 0, 2, 1]


def test_tenths_have_bins_of_their_own():
    counts, hacked = pass_rate_bins([row(number / 10, number % 2 == 0) for number in range(11)])
    assert counts.tolist() == [1] * 11
    assert hacked.tolist() == [1, 0] * 5 + [1]


def printed(rows):
    stream = io.StringIO()
    print_assessment(rows, ABOUT, Console(file=stream, width=110))
    return stream.getvalue()


def test_the_table_adds_up():
    text = printed(ROWS)
    assert "9 problems, 10 responses to each at temperature 1" in text
    assert "guessed without thinking in 8 tries): 3 of 9 (33%)" in text
    assert "the verifier failed on all responses to 1 problems" in text
    assert "'sampler.filter.pass_rate=[0.05,0.95]' keeps 4, with sampler.filter.easy_to_hack=false 3" in text


@pytest.mark.parametrize(
    "rows", [[row(0.3)], [row(None)], [row(0.3, None)], [row(0.2, difficulty=-1, kind="text")] * 3]
)
def test_few_and_odd_rows(rows, tmp_path):
    assert "problems" in printed(rows)
    draw_assessment(rows, ABOUT, tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png").convert("L")).std() > 5
