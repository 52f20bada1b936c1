"""The seeds of a point folded into one: mean, and the interval that the mean lies in."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from kimivl.sweep.folder import SEED, Job, Sweep


@dataclass(frozen=True, slots=True)
class Point:
    """The runs that differ by their seed only.

    Attributes:
        values: the varied keys. jobs: begun. missing: seeds that were asked for, and that no run has.
    """

    values: dict[str, str]
    jobs: list[Job]
    missing: list[str]

    @property
    def metrics(self) -> list[float]:
        return [job.metric for job in self.jobs if job.metric is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.metrics) if self.metrics else None

    @property
    def interval(self) -> float | None:
        """Half the width of the 95% interval of the mean; None with fewer than two seeds."""
        return half_interval(self.metrics)

    @property
    def counts(self) -> Counter[str]:
        found = Counter[str](job.status for job in self.jobs)
        return found + Counter({"missing": len(self.missing)})


def half_interval(values: Sequence[float]) -> float | None:
    """Student's t with n - 1 degrees of freedom: [0.5, 0.6, 0.7] -> 4.303 * 0.1 / sqrt(3) = 0.248."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def fold(sweep: Sweep) -> list[Point]:
    """The points of a sweep: a grid's in the order of their values, a search's with the best first."""
    points: dict[tuple[str, ...], Point] = {}

    def at(values: dict[str, str]) -> Point:
        own = {key: values.get(key, "") for key in sweep.varied}
        return points.setdefault(tuple(own.values()), Point(own, [], []))

    for job in sweep.jobs:
        at(job.values).jobs.append(job)
    for missing in sweep.missing:
        at(missing).missing.append(missing.get(SEED, ""))
    if not sweep.search:
        return sorted(points.values(), key=lambda point: [order(value) for value in point.values.values()])
    sign = -1 if sweep.direction == "max" else 1
    return sorted(points.values(), key=lambda point: math.inf if point.mean is None else sign * point.mean)


def best_of(points: Sequence[Point], direction: str) -> Point | None:
    """The point with the best mean."""
    measured = [point for point in points if point.mean is not None]
    choose = max if direction == "max" else min
    return choose(measured, key=lambda point: point.mean or 0.0, default=None)


def number(value: str) -> float | None:
    """A swept value as a number, where it is one."""
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def order(value: str) -> tuple[bool, float, str]:
    """Numbers by size, then words."""
    size = number(value)
    return (size is None, size or 0.0, value)


def shown(value: str) -> str:
    """A value as it is printed: ``0.6824078427098833`` -> ``0.6824``."""
    size = number(value)
    return value if size is None or len(value) < 8 else f"{size:.4g}"


def as_json(sweep: Sweep, points: Sequence[Point]) -> dict[str, Any]:
    """What ``summary.json`` holds."""
    return {
        "metric": sweep.metric,
        "direction": sweep.direction,
        "points": [
            {
                "values": point.values,
                "mean": point.mean,
                "interval": point.interval,
                "seeds": {job.seed: job.metric for job in point.jobs if job.metric is not None},
                "status": dict(point.counts),
            }
            for point in points
        ],
        "not_finished": [
            {"folder": job.folder.name, "status": job.status, "reason": job.reason}
            for job in sweep.jobs
            if job.status != "finished" or job.reason
        ],
        "missing": sweep.missing,
        "trials_left": sweep.trials_left,
        "command": sweep.command,
        "notes": sweep.notes,
    }
