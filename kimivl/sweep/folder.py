"""What lies in the folder of a sweep: its runs, what was asked for, and what of that is missing."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from kimivl.config import HISTORY_FILE, METRICS_FILE, RUN_FILE
from kimivl.runtime.lock import LOCK_FILE
from kimivl.sweep.command import MULTIRUN_FILE, command_of
from kimivl.sweep.points import OVERRIDES_FILE, by_key, folder_name, is_alive, matters, read_json, read_overrides

Status = Literal["finished", "diverged", "failed", "killed", "interrupted", "running", "missing"]
"""``diverged``: the run came to its end, and its metric is no number."""

SEED = "seed"
_LESS_IS_BETTER = ("loss", "error", "perplexity", "length", "seconds", "dropped", "_s")
_SILENT = 1800.0
"""Seconds without a word after which a run that says it is running is reported with them."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run of the sweep. ``reason`` says why ``metric`` is None, where it should not be."""

    folder: Path
    values: dict[str, str]
    status: Status
    metric: float | None = None
    reason: str = ""
    begun: float = 0.0


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep as it stands.

    Attributes:
        varied: the keys in which the points differ, without the seed.
        missing: the points of a grid that no run has begun; of a search their number is known, ``trials_left``.
        command: runs what has not finished, in the same folder.
    """

    folder: Path
    metric: str
    direction: Literal["max", "min"]
    search: bool
    varied: list[str]
    jobs: list[Job]
    missing: list[dict[str, str]]
    trials_left: int
    command: str | None

    @property
    def counts(self) -> Counter[str]:
        """Jobs by status, with the points that are missing."""
        return Counter([job.status for job in self.jobs] + ["missing"] * (len(self.missing) + self.trials_left))


def read_sweep(folder: Path, metric: str | None = None, direction: Literal["max", "min"] | None = None) -> Sweep:
    """Read the runs of a sweep that has ended, was cut short, or is under way.

    Args:
        metric: instead of the one that the runs return. direction: whether more of it is better, or less.

    Raises:
        ValueError: when there is no sweep in the folder.
    """
    runs = list(_runs(folder))
    asked = _multirun(folder)
    _check(folder, runs, asked)
    configs = [read_json(run / RUN_FILE).get("config") or {} for run in runs]
    default = next((config["optimized_metric"] for config in configs if "optimized_metric" in config), None)
    name = metric or default or asked.get("optimized_metric") or "val/accuracy"
    _check_metric(metric, runs)
    jobs = [_job(run, name) for run in runs]
    settings = (asked.get("hydra") or {}).get("sweeper") or {}
    search = "n_trials" in settings
    points = [] if search else _points(asked)
    varied = _varied([job.values for job in jobs] + points)
    missing = [point for point in points if not any(_same(point, job.values, [*varied, SEED]) for job in jobs)]
    under_way = {job.folder.name for job in jobs if job.status in ("running", "interrupted", "killed")}
    left = max(0, settings["n_trials"] - _ended(folder, jobs, under_way) - len(under_way)) if search else 0
    return Sweep(
        folder=folder,
        metric=name,
        direction=direction or _direction(name, settings),
        search=search,
        varied=[key for key in varied if key != SEED],
        jobs=jobs,
        missing=missing,
        trials_left=left,
        command=_command(asked, folder),
    )


def _runs(folder: Path) -> Iterator[Path]:
    """The folders of runs, at any depth: ``reward=a/b`` makes two levels where another sweeper has named them."""
    for place, inner, _ in os.walk(folder):
        if (Path(place) / OVERRIDES_FILE).is_file():
            inner.clear()
            yield Path(place)
        else:
            inner[:] = sorted(name for name in inner if not name.startswith("."))


def _multirun(folder: Path) -> dict[str, Any]:
    path = folder / MULTIRUN_FILE
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} cannot be read; type the sweep again with hydra.sweep.dir={folder} to write it anew")
    return found


def _check(folder: Path, runs: Sequence[Path], asked: Mapping[str, Any]) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a sweep lies in outputs/NAME/sweeps")
    if runs == [folder]:
        raise ValueError(f"{folder} is a single run, not a sweep; give the folder above it, or try kimivl report")
    inside = [] if asked else sorted(str(path.parent) for path in folder.rglob(MULTIRUN_FILE))
    if inside:
        raise ValueError(f"{folder} is no sweep, but holds some; give one of: {', '.join(inside)}")
    if not asked and not runs:
        raise ValueError(f"{folder}: no sweep there; python train.py -m names its folder when it ends")


def _check_metric(metric: str | None, runs: Sequence[Path]) -> None:
    measured = {name for run in runs for name in read_json(run / METRICS_FILE)}
    if metric is not None and measured and metric not in measured:
        raise ValueError(f"--metric {metric}: no run has measured it; there is: {_spelled(measured)}")


def _spelled(metrics: Iterable[str]) -> str:
    return ", ".join(sorted(name for name in metrics if "difficulty" not in name)) or "nothing"


def _job(folder: Path, metric: str) -> Job:
    values = by_key(read_overrides(folder) or [])
    run, metrics = read_json(folder / RUN_FILE), read_json(folder / METRICS_FILE)
    begun = (folder / OVERRIDES_FILE).stat().st_mtime
    status = run.get("status", "missing")
    if status == "finished" and metrics:
        value = metrics.get(metric)
        if value is None:
            why = f"{metric} was not measured; there is: {_spelled(metrics)}"
            return Job(folder, values, "finished", None, why, begun)
        if not math.isfinite(value):
            return Job(folder, values, "diverged", None, f"{metric} is {value}", begun)
        return Job(folder, values, "finished", float(value), "", begun)
    if status == "failed":
        return Job(folder, values, "failed", None, run.get("error") or "no reason is known", begun)
    if status == "interrupted":
        return Job(folder, values, "interrupted", None, _progress(folder), begun)
    if status == "missing":
        return Job(folder, values, "killed", None, "it ended before it began", begun)
    alive = is_alive(folder)
    if alive is False:
        return Job(folder, values, "killed", None, f"its process is gone; {_progress(folder)}", begun)
    doubt = "" if alive else f" (or gone: {folder / LOCK_FILE} cannot be read)"
    return Job(folder, values, "running", None, _progress(folder) + _silence(folder) + doubt, begun)


def _progress(folder: Path) -> str:
    try:
        last = (folder / HISTORY_FILE).read_text().splitlines()[-1]
        return f"at step {json.loads(last)['step']}"
    except (OSError, ValueError, IndexError, KeyError):
        return "before its first step"


def _silence(folder: Path) -> str:
    spoken = max(path.stat().st_mtime for path in (folder / HISTORY_FILE, folder / RUN_FILE) if path.exists())
    silent = time.time() - spoken
    return f", silent for {silent / 60:,.0f} min" if silent > _SILENT else ""


def _points(asked: Mapping[str, Any]) -> list[dict[str, str]]:
    """All points of a grid, each with all its overrides."""
    hydra = asked.get("hydra") or {}
    params = [f"{key}={value}" for key, value in (hydra.get("sweeper", {}).get("params") or {}).items()]
    task = (hydra.get("overrides") or {}).get("task") or []
    if not [*params, *task]:
        return []
    parsed = OverridesParser.create().parse_overrides([*params, *task])
    return [by_key(point) for batch in BasicSweeper.split_arguments(parsed, None) for point in batch]


def _varied(points: Sequence[Mapping[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for point in points for key in point if matters(key))
    return [key for key in keys if len({point.get(key) for point in points}) > 1]


def _same(one: Mapping[str, str], other: Mapping[str, str], keys: Sequence[str]) -> bool:
    return all(one.get(key) == other.get(key) for key in keys)


def _ended(folder: Path, jobs: Sequence[Job], under_way: Container[str]) -> int:
    """Trials that are not run again: by the study where it lies in the folder, else by the runs.

    A trial that was only stopped has failed by the study, and its run is among those ``under_way``.
    """
    database = folder / "study.db"
    if not database.is_file():
        return sum(job.status in ("finished", "diverged", "failed") for job in jobs)
    with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as study:
        [[ended]] = study.execute("SELECT COUNT(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED')")
        failed = study.execute("SELECT trial_id, number FROM trials WHERE state = 'FAIL'").fetchall()
        attributes = study.execute("SELECT value_json FROM study_user_attributes WHERE key = 'repeated'").fetchall()
        names = {number: folder_name(_drawn(study, trial)) for trial, number in failed}
    repeated = {number for (value,) in attributes for number in json.loads(value)}
    return int(ended) + sum(number not in repeated and name not in under_way for number, name in names.items())


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


def _direction(metric: str, settings: Mapping[str, Any]) -> Literal["max", "min"]:
    if "direction" in settings:
        return "min" if str(settings["direction"]).lower().startswith("min") else "max"
    return "min" if any(word in metric for word in _LESS_IS_BETTER) else "max"


def _command(asked: Mapping[str, Any], folder: Path) -> str | None:
    hydra = asked.get("hydra")
    if not hydra:
        return None
    return command_of(hydra["job"]["name"], hydra["overrides"]["task"], hydra["overrides"]["hydra"], folder)
