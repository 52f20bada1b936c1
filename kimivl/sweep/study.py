"""The database of a search, as Optuna leaves it: read without Optuna, and while a search writes it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import closing
from pathlib import Path

from kimivl.sweep.points import folder_of


def begun_trials(database: Path, name: str | None, under_way: AbstractSet[str]) -> int:
    """Trials of a study that have ended or are under way; of one that is run again under another number only that.

    Raises:
        sqlite3.DatabaseError: when the file is no study, or another process writes it.
    """
    of_study = "JOIN studies USING (study_id) WHERE study_name = ?"
    with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as study:
        trials = study.execute(f"SELECT trial_id, number, state FROM trials {of_study}", [name]).fetchall()
        attributes = study.execute(
            f"SELECT value_json FROM study_user_attributes {of_study} AND key = 'repeated'", [name]
        ).fetchall()
        drawn = {
            number: folder_of(database.parent, list(_drawn(study, trial))).name
            for trial, number, state in trials
            if state in ("FAIL", "RUNNING")
        }
    repeated = {number for (value,) in attributes for number in json.loads(value)}
    ended = sum(state in ("COMPLETE", "PRUNED") for _, _, state in trials)
    failed = sum(
        state == "FAIL" and number not in repeated and drawn[number] not in under_way for _, number, state in trials
    )
    return ended + failed + len(under_way & set(drawn.values()))


def _drawn(study: sqlite3.Connection, trial: int) -> Iterator[str]:
    """The overrides of a trial, as Optuna keeps them in its database: a choice by its place among all of them."""
    query = "SELECT param_name, param_value, distribution_json FROM trial_params WHERE trial_id = ?"
    for name, value, kind in study.execute(query, [trial]):
        distribution = json.loads(kind)
        if "choices" in distribution["attributes"]:
            value = distribution["attributes"]["choices"][int(value)]
        elif distribution["name"].startswith("Int"):
            value = int(value)
        yield f"{name}={value}"
