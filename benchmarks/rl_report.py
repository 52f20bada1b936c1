"""What the RL comparisons come to: the curves and figures of each, their tables and their JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.rl_curves import Curve, Estimate, Run, estimate, mean_curve, tokens_to_reach

Runs = dict[str, dict[str, dict[int, Run]]]
"""Comparison -> arm, the one that others are compared with first -> seed -> run."""


@dataclass(frozen=True)
class Shown:
    """A curve: a metric of held-out problems (``val``), or of the responses trained on (``sampled``), then the mean of
    ``together`` iterations a point."""

    kind: str
    name: str
    together: int = 1


@dataclass(frozen=True)
class Comparison:
    """What is compared, the curves that show it, and the one that says how soon an arm reaches the first one's end."""

    title: str
    curves: tuple[Shown, ...]
    reaches: Shown | None = None


HELD_OUT, TRAINED_ON = Shown("val", "sampled_accuracy"), Shown("sampled", "accuracy", 2)
COMPARISONS = {
    "length": Comparison("Length reward", (Shown("sampled", "length", 5), Shown("sampled", "accuracy", 5))),
    "sampler": Comparison("Sampling of problems", (HELD_OUT,), HELD_OUT),
    "objective": Comparison("Objective", (TRAINED_ON,), TRAINED_ON),
}

FIGURES = {
    "test/sampled_accuracy": ("accuracy, sampled", 100.0, "%"),
    "test/accuracy": ("accuracy, greedy", 100.0, "%"),
    "test/sampled_length": ("length, sampled", 1.0, "tokens"),
}
"""Figure of the test problems -> its name, the factor it is shown with, its unit."""


def seeds(of_arm: Mapping[int, Run]) -> str:
    """``3 seeds``"""
    return f"{len(of_arm)} seed{'s' if len(of_arm) > 1 else ''}"


def points(run: Run, shown: Shown) -> tuple[np.ndarray, np.ndarray]:
    """A curve of one run."""
    return run.validation(shown.name) if shown.kind == "val" else run.sampled(shown.name, shown.together)


def curve(runs: Mapping[int, Run], shown: Shown) -> Curve:
    """The mean of the seeds."""
    return mean_curve([points(run, shown) for run in runs.values()])


@dataclass(frozen=True)
class Reached:
    """Tokens until the last accuracy of the first arm is reached: of the arms' mean curves, and of each seed's own.

    ``goal`` is the last value of the first arm's mean curve; inf where an arm never comes to it.
    """

    goal: float
    tokens: dict[str, float]
    of_seeds: dict[str, list[float]]


def reached(arms: Mapping[str, Mapping[int, Run]], shown: Shown) -> Reached:
    """See ``Reached``; the first arm is measured too: it may come to its last value before its end."""
    means = {arm: curve(runs, shown) for arm, runs in arms.items()}
    goal = float(next(iter(means.values())).mean[-1])
    tokens = {arm: tokens_to_reach((mean.tokens, mean.mean), goal) for arm, mean in means.items()}
    seeds = {arm: [tokens_to_reach(points(run, shown), goal) for run in runs.values()] for arm, runs in arms.items()}
    return Reached(goal, tokens, seeds)


def difference(arms: Mapping[str, Mapping[int, Run]], arm: str, figure: str, relative: bool = False) -> Estimate:
    """Of an arm to the first one, over the seeds that both have; ``relative``: as a share of the first one's figure."""
    first = next(iter(arms.values()))
    pairs = [(first[seed].metrics[figure], arms[arm][seed].metrics[figure]) for seed in arms[arm] if seed in first]
    return estimate([(b - a) / a if relative else b - a for a, b in pairs])


def tables(runs: Runs) -> Iterator[Table]:
    """A table of each comparison."""
    for comparison, arms in runs.items():
        yield _table(comparison, arms)


def _table(comparison: str, arms: dict[str, dict[int, Run]]) -> Table:
    about = COMPARISONS[comparison]
    table = Table(title=f"{about.title}: {', '.join(arms)}", title_justify="left")
    table.add_column("test problems")
    for arm, of_seeds in arms.items():
        table.add_column(f"{arm}\n{seeds(of_seeds)}", justify="right")
    others = list(arms)[1:]
    for arm in others:
        table.add_column(f"{arm}\n- {next(iter(arms))}", justify="right")
    for figure, (name, factor, unit) in FIGURES.items():
        values = [estimate([run.metrics[figure] for run in of_seeds.values()]) for of_seeds in arms.values()]
        differences = [difference(arms, arm, figure).text("{:+.1f}", factor) for arm in others]
        table.add_row(f"{name}, {unit}", *(value.text("{:.1f}", factor) for value in values), *differences)
    shares = [difference(arms, arm, "test/sampled_length", relative=True).text("{:+.0f}%", 100) for arm in others]
    table.add_row("length, relative", *("" for _ in arms), *shares)
    sampled = [estimate([run.tokens[-1] for run in of_seeds.values()]) for of_seeds in arms.values()]
    table.add_row("sampled, 1000 tokens", *(value.text("{:.0f}", 1e-3) for value in sampled))
    if about.reaches:
        found = reached(arms, about.reaches)
        tokens = (f"{value / 1000:.0f}" if value < math.inf else "not reached" for value in found.tokens.values())
        table.add_row(f"1000 tokens to {found.goal:.1%} ({about.reaches.kind})", *tokens)
    return table


def figures(runs: Runs) -> dict[str, Any]:
    """Everything that the tables and the picture show, as numbers."""
    return {comparison: _figures(comparison, arms) for comparison, arms in runs.items()}


def _figures(comparison: str, arms: dict[str, dict[int, Run]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for arm, of_seeds in arms.items():
        found[arm] = {
            "seeds": list(of_seeds),
            "tokens": [int(run.tokens[-1]) for run in of_seeds.values()],
            "test": {figure: [run.metrics[figure] for run in of_seeds.values()] for figure in FIGURES},
        }
        for shown in COMPARISONS[comparison].curves:
            mean = curve(of_seeds, shown)
            found[arm][f"{shown.kind}/{shown.name}"] = {
                "tokens": mean.tokens.round().tolist(),
                "mean": mean.mean.tolist(),
                "interval_95": mean.half.tolist(),
            }
    if reaches := COMPARISONS[comparison].reaches:
        goal = reached(arms, reaches)
        found["reached"] = {"goal": goal.goal, "tokens": _numbers(goal.tokens), "seeds": _numbers(goal.of_seeds)}
    return found


def _numbers(found: Any) -> Any:
    """Infinity, which JSON has not, as None."""
    if isinstance(found, dict):
        return {name: _numbers(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_numbers(value) for value in found]
    return found if math.isfinite(found) else None
