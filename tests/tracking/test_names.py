"""The table of metrics."""

import re

import pytest

from kimivl.tracking import names
from kimivl.tracking.workspace import as_markdown


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("val/accuracy", "share of problems"),
        ("test/accuracy_difficulty_3", "share of problems"),
        ("experts/dead/layer_01", "experts"),
        ("reward/failures/timeout", "responses"),
        ("reward/format", "reward"),
        ("perf/kv_cache_use", "as named"),
        ("lr-MuonAdamW/pg1", "1"),
    ],
)
def test_every_name_finds_its_unit(name, unit):
    assert names.describe(name).unit == unit


def test_what_is_not_in_the_table_is_found():
    assert names.unknown(["train/loss", "train/lost", "accuracy"]) == ["accuracy", "train/lost"]


def test_the_table_says_something_of_each():
    assert all(metric.unit and re.match(r"\w", metric.meaning) for metric in names.METRICS.values())
    assert as_markdown().count("\n") == len(names.METRICS) + 1
