"""What lies in the folder of a sweep: its runs, what was asked for, and what of that is missing."""

from __future__ import annotations

import math
import os
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from kimivl.config import HISTORY_FILE, METRICS_FILE, RUN_FILE
from kimivl.history import read_history
from kimivl.runtime.lock import LOCK_FILE, is_alive
from kimivl.sweep.command import MULTIRUN_FILE, command_of
from kimivl.sweep.points import OVERRIDES_FILE, by_key, folder_of, key_of, matters, read_json, read_overrides
from kimivl.sweep.study import begun_trials

Status = Literal["finished", "diverged", "failed", "killed", "interrupted", "running", "missing"]
"""``diverged``: the run came to its end, and its metric is no number."""

SEED = "seed"
_LESS_IS_BETTER = re.compile(
    "loss|error|perplexity|length|seconds|dropped|failures|nonfinite|memory|nll|(?<![a-z])kl(?![a-z])|(?<!per)_s$"
)
_SILENT = 1800.0
"""Seconds without a word after which a run that says it is running is reported with them."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run of the sweep.

    Attributes:
        values: what was typed for it. seed: typed, or else its configuration's.
        reason: why ``metric`` is None, where it should not be.
    """

    folder: Path
    values: dict[str, str]
    seed: str
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
        notes: sentences on what is left out, or not known.
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
    notes: list[str]

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
    configs = [_config(run) for run in runs]
    default = next((config["optimized_metric"] for config in configs if "optimized_metric" in config), None)
    own = default or asked.get("optimized_metric") or "val/accuracy"
    name = metric or own
    _check_metric(metric, runs)
    begun = [_job(run, name) for run in runs]
    settings = (asked.get("hydra") or {}).get("sweeper") or {}
    search = "n_trials" in settings
    overrides = _overrides(asked)
    points, notes = ([], []) if search else _points(overrides)
    swept = [key_of(one.get_key_element()) for one in overrides if one.is_sweep_override()]
    varied = _varied([*(job.values for job in begun), *points], swept)
    missing = [point for point in points if not any(_same(point, job.values, [*varied, SEED]) for job in begun)]
    varied = [key for key in varied if key != SEED]
    jobs, repeated = _once(folder, begun, varied)
    left, uncounted = _trials_left(folder, jobs, settings) if search else (0, [])
    return Sweep(
        folder=folder,
        metric=name,
        direction=direction or _direction(name, settings if name == own else {}),
        search=search,
        varied=varied,
        jobs=jobs,
        missing=missing,
        trials_left=left,
        command=_command(asked, folder),
        notes=[*notes, *uncounted, *repeated],
    )


def _runs(folder: Path) -> Iterator[Path]:
    """The folders of runs, at any depth: ``reward=a/b`` makes two levels where another sweeper has named them.

    Those of another sweep that lies in the folder are not among them.
    """
    for place, inner, files in os.walk(folder):
        if (Path(place) / OVERRIDES_FILE).is_file():
            inner.clear()
            yield Path(place)
        elif MULTIRUN_FILE in files and Path(place) != folder:
            inner.clear()
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
        again = f"type the sweep again with hydra.sweep.dir={folder.resolve()}"
        raise ValueError(f"{path} cannot be read; {again} to write it anew")
    return found


def _check(folder: Path, runs: Sequence[Path], asked: Mapping[str, Any]) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a sweep lies in outputs/NAME/sweeps")
    if runs == [folder]:
        above = next((path for path in folder.resolve().parents if (path / MULTIRUN_FILE).is_file()), None)
        remedy = f"give {above}" if above else f"try kimivl report {folder.resolve().parent}"
        raise ValueError(f"{folder} is a single run, not a sweep; {remedy}")
    inside = [] if asked else sorted(str(path.parent) for path in folder.rglob(MULTIRUN_FILE))
    if inside:
        raise ValueError(f"{folder} is no sweep, but holds some; give one of: {', '.join(inside)}")
    stages = [] if asked else [run for run in runs if run.name == _config(run).get("stage")]
    if stages:
        raise ValueError(f"{folder} holds the stages of a model, not a sweep; try kimivl report {stages[0].parent}")
    if not asked and not runs:
        raise ValueError(f"{folder}: no sweep there; python train.py -m names its folder when it ends")


def _check_metric(metric: str | None, runs: Sequence[Path]) -> None:
    measured = {name for run in runs for name in read_json(run / METRICS_FILE)}
    if metric is not None and measured and metric not in measured:
        raise ValueError(f"--metric {metric}: no run has measured it; there is: {_spelled(measured)}")


def _spelled(metrics: Iterable[str]) -> str:
    return ", ".join(sorted(name for name in metrics if "difficulty" not in name)) or "nothing"


def _config(run: Path) -> dict[str, Any]:
    """The configuration of a run; empty where it ended before it was known."""
    return read_json(run / RUN_FILE).get("config") or {}


def _job(folder: Path, metric: str) -> Job:
    values = by_key(read_overrides(folder) or [])
    seed = values.get(SEED) or str(_config(folder).get(SEED, ""))
    begun = (folder / OVERRIDES_FILE).stat().st_mtime
    return Job(folder, values, seed, *_outcome(folder, metric), begun)


def _outcome(folder: Path, metric: str) -> tuple[Status, float | None, str]:
    """Status, metric and reason of a run."""
    run, metrics = read_json(folder / RUN_FILE), read_json(folder / METRICS_FILE)
    status = run.get("status", "missing")
    if status == "finished" and metrics:
        if metric not in metrics:
            return "finished", None, f"{metric} was not measured; there is: {_spelled(metrics)}"
        value = metrics[metric]
        if not isinstance(value, int | float) or not math.isfinite(value):
            return "diverged", None, f"{metric} is {'null' if value is None else value}"
        return "finished", float(value), ""
    if status == "failed":
        return "failed", None, run.get("error") or "no reason is known"
    if status == "interrupted":
        return "interrupted", None, _progress(folder)
    if status == "missing":
        return "killed", None, "it ended before it began"
    alive = is_alive(folder)
    if alive is False:
        return "killed", None, f"its process is gone; {_progress(folder)}"
    doubt = "" if alive else f" (or gone: {folder / LOCK_FILE} cannot be read)"
    return "running", None, _progress(folder) + _silence(folder) + doubt


def _progress(folder: Path) -> str:
    try:
        return f"at step {read_history(folder / HISTORY_FILE)[-1]['step']}"
    except (OSError, ValueError, IndexError, KeyError):
        return "before its first step"


def _silence(folder: Path) -> str:
    spoken = max(path.stat().st_mtime for path in (folder / HISTORY_FILE, folder / RUN_FILE) if path.exists())
    silent = time.time() - spoken
    return f", silent for {silent / 60:,.0f} min" if silent > _SILENT else ""


def _overrides(asked: Mapping[str, Any]) -> list[Override]:
    """What the sweep was told of its jobs: by its file, and by what was typed."""
    hydra = asked.get("hydra") or {}
    params = [f"{key}={value}" for key, value in (hydra.get("sweeper", {}).get("params") or {}).items()]
    task = (hydra.get("overrides") or {}).get("task") or []
    return OverridesParser.create().parse_overrides([*params, *task])


def _points(overrides: list[Override]) -> tuple[list[dict[str, str]], list[str]]:
    """All points of a grid, each with all its overrides; without them a sentence on why they are not known."""
    if not overrides:
        return [], []
    try:
        batches = BasicSweeper.split_arguments(overrides, None)
    except HydraException:  # glob(...) stands for files of conf/, which may have changed since
        return [], ["what is missing is not known: a key was swept over glob(...)"]
    return [by_key(point) for batch in batches for point in batch], []


def _varied(points: Sequence[Mapping[str, str]], swept: Sequence[str]) -> list[str]:
    """The keys that tell the points apart: of those that make no other point only what the sweep itself varies."""
    keys = dict.fromkeys(key for point in points for key in point)
    differing = [key for key in keys if len({point.get(key) for point in points}) > 1]
    return [key for key in differing if matters(key) or key in swept]


def _same(one: Mapping[str, str], other: Mapping[str, str], keys: Sequence[str]) -> bool:
    return all(one.get(key) == other.get(key) for key in keys)


def _once(folder: Path, jobs: Sequence[Job], keys: Sequence[str]) -> tuple[list[Job], list[str]]:
    """One run for each point and seed, and a sentence on each that is left out: a copy, or typed without the seed.

    The run that the sweep itself asks for is kept: typed with its seed, and in a folder of its name.
    """

    def rank(job: Job) -> tuple[bool, bool, bool]:
        typed = [f"{key}={job.values[key]}" for key in [*keys, SEED] if key in job.values]
        return SEED not in job.values, job.folder != folder_of(folder, typed), job.status != "finished"

    kept: dict[tuple[str | None, ...], Job] = {}
    for job in sorted(jobs, key=rank):
        kept.setdefault((job.seed, *(job.values.get(key) for key in keys)), job)
    once, notes = [], []
    for job in jobs:
        first = kept[job.seed, *(job.values.get(key) for key in keys)]
        if job is first:
            once.append(job)
        else:
            notes.append(f"{job.folder} is left out: its point and seed are those of {first.folder.name}")
    return once, notes


def _trials_left(folder: Path, jobs: Sequence[Job], settings: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Trials of a search that are still to be begun: by its study where that lies in the folder, else by the runs.

    A trial that was only stopped has failed by the study, and its run is under way.
    """
    under_way = {job.folder.name for job in jobs if job.status in ("running", "interrupted", "killed")}
    begun = len(under_way) + sum(job.status in ("finished", "diverged", "failed") for job in jobs)
    notes = []
    database = folder / "study.db"
    if database.is_file():
        try:
            begun = begun_trials(database, settings.get("study_name"), under_way)
        except sqlite3.DatabaseError as error:
            notes = [f"{database} cannot be read ({error}): the trials that are missing are counted by the runs"]
    return max(0, settings["n_trials"] - begun), notes


def _direction(metric: str, settings: Mapping[str, Any]) -> Literal["max", "min"]:
    if "direction" in settings:
        return "min" if str(settings["direction"]).lower().startswith("min") else "max"
    return "min" if _LESS_IS_BETTER.search(metric) else "max"


def _command(asked: Mapping[str, Any], folder: Path) -> str | None:
    hydra = asked.get("hydra")
    if not hydra:
        return None
    place, typed_in = folder.resolve(), (hydra.get("runtime") or {}).get("cwd")
    if typed_in and place.is_relative_to(Path(typed_in).resolve()):
        place = place.relative_to(Path(typed_in).resolve())
    return command_of(hydra, place)
