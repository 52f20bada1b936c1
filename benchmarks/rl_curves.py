"""What runs of the RL comparisons have left on the disk, as curves over sampled tokens; their means and intervals.

The x axis of every curve is the number of tokens that the run has sampled so far, those of rejected groups included:
what generation costs, however long an arm's responses are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

POINTS = 60
"""Of a mean curve."""


@dataclass(frozen=True)
class Run:
    """The folder of a finished run."""

    folder: Path

    @property
    def ended(self) -> bool:
        return (self.folder / "metrics.json").is_file()

    @cached_property
    def iterations(self) -> list[list[dict[str, Any]]]:
        """The groups of each iteration, as the run has recorded them."""
        files = sorted((self.folder / "rollouts").glob("[0-9]*.jsonl"))
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    @cached_property
    def tokens(self) -> np.ndarray:
        """(iterations + 1,) tokens sampled before each iteration, and at the end."""
        sampled = [sum(r["tokens"] for group in groups for r in group["responses"]) for groups in self.iterations]
        return np.concatenate([[0], np.cumsum(sampled)])

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Of the end of the run, the test problems included."""
        return json.loads((self.folder / "metrics.json").read_text())

    def validation(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens sampled so far, and the metric ``val/NAME`` there."""
        rows = [json.loads(line) for line in (self.folder / "history.jsonl").read_text().splitlines()]
        steps = max(row["step"] for row in rows) / len(self.iterations)
        found = [(row["step"] / steps, row[f"val/{name}"]) for row in rows if f"val/{name}" in row]
        if not found:
            raise ValueError(f"{self.folder} has no val/{name}: run it with trainer.check_val_every_n_epoch set")
        done, values = np.array(found).T
        return self.tokens[np.rint(done).astype(int)], values

    def sampled(self, name: str, together: int) -> tuple[np.ndarray, np.ndarray]:
        """``length`` or ``accuracy`` of the responses trained on, the mean of ``together`` iterations a point.

        A point stands at the mean of the tokens that its iterations were drawn after.
        """
        key = {"length": "tokens", "accuracy": "correct"}[name]
        values = [
            np.mean([r[key] for group in groups for r in group["responses"] if r[key] is not None])
            for groups in self.iterations
        ]
        starts = range(0, len(values) - together + 1, together)
        x = [self.tokens[start : start + together].mean() for start in starts]
        return np.array(x), np.array([np.mean(values[start : start + together]) for start in starts])


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half width of its 95% interval (Student's t); nan for a single seed."""

    mean: float
    half: float
    values: tuple[float, ...]

    def text(self, form: str = "{:.1f}", scale: float = 1.0) -> str:
        """``61.3 ± 1.2``"""
        mean = form.format(self.mean * scale)
        return mean if math.isnan(self.half) else f"{mean} ± {form.replace('+', '').format(self.half * scale)}"


def estimate(values: Sequence[float]) -> Estimate:
    """(seeds,) -> mean and 95% interval."""
    numbers = np.asarray(values, float)
    half = math.nan
    if len(numbers) > 1:
        half = float(student.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
    return Estimate(float(numbers.mean()), half, tuple(numbers.tolist()))


@dataclass(frozen=True)
class Curve:
    """Mean and half width of the 95% interval over the seeds of an arm, at ``tokens``: where all seeds have values."""

    tokens: np.ndarray
    mean: np.ndarray
    half: np.ndarray


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> Curve:
    """The seeds' curves, each interpolated between its points, at common numbers of tokens."""
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(start, end, POINTS)
    at_grid = np.stack([np.interp(grid, x, y) for x, y in curves])
    estimates = [estimate(column) for column in at_grid.T]
    return Curve(grid, np.array([e.mean for e in estimates]), np.array([e.half for e in estimates]))


def tokens_to_reach(curve: tuple[np.ndarray, np.ndarray], goal: float) -> float:
    """Tokens at which a curve first comes to ``goal``, interpolated; inf where it never does."""
    x, y = curve
    above = np.flatnonzero(y >= goal)
    if not len(above):
        return math.inf
    first = int(above[0])
    if first == 0:
        return float(x[0])
    share = (goal - y[first - 1]) / (y[first] - y[first - 1])
    return float(x[first - 1] + share * (x[first] - x[first - 1]))
