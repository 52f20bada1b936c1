"""What the stages of a run folder have reached: a table, ``summary.json`` and one picture."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, on machines without a screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from kimivl.config import HISTORY_FILE, METRICS_FILE
from kimivl.history import read_history
from kimivl.sweep.command import MULTIRUN_FILE

STAGES = {"sft": "Joint SFT", "long_cot": "Long-CoT SFT", "rl": "RL"}
COLOURS = {"sft": "#9aa5b1", "long_cot": "#3b82c4", "rl": "#d9622b"}
DRAWN = {
    "rollout/accuracy": "training problems (curriculum)",
    "val/sampled_accuracy": "validation",
    "rollout/length": "training problems (curriculum)",
    "val/sampled_length": "validation",
}
"""Figures of RL's history that are drawn, with their labels."""
_PREFIX = "test/accuracy_difficulty_"

Curves = dict[str, tuple[list[int], list[float]]]
"""Metric -> (RL iterations done, values)."""


def write_report(folder: Path) -> None:
    """Print the table of the finished stages in ``folder``, and write ``summary.json`` and ``summary.png`` there.

    Raises:
        ValueError: when no stage in the folder has finished with test figures.
    """
    stages = {stage: figures for stage in STAGES if (figures := _stage_figures(folder / stage))}
    untested = [stage for stage in STAGES if stage not in stages and (folder / stage / METRICS_FILE).is_file()]
    if not stages and untested:
        remedy = "add them with: test=true ckpt_path=last"
        raise ValueError(f"{folder}: {', '.join(untested)} finished without test figures; {remedy}")
    if not stages and (folder / MULTIRUN_FILE).is_file():
        raise ValueError(f"{folder} is a sweep; try kimivl sweep {folder}")
    if not stages:
        raise ValueError(f"{folder}: no finished stage there; run one with: python train.py stage=sft")
    (folder / "summary.json").write_text(json.dumps({"stages": stages}, indent=2) + "\n")
    _draw(stages, _curves(folder), folder / "summary.png")
    _print_table(stages)
    print(f"picture: {folder / 'summary.png'}   figures: {folder / 'summary.json'}")


def _stage_figures(folder: Path) -> dict[str, Any] | None:
    path = folder / METRICS_FILE
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    if "test/accuracy" not in metrics:
        return None
    names = ("accuracy", "sampled_accuracy", "length", "sampled_length")
    figures: dict[str, Any] = {name: metrics[f"test/{name}"] for name in names if f"test/{name}" in metrics}
    figures["problems"] = int(metrics["test/problems"])
    figures["seconds"] = metrics["seconds"]
    figures["by_difficulty"] = {
        name.removeprefix(_PREFIX): value for name, value in metrics.items() if name.startswith(_PREFIX)
    }
    return figures


def _print_table(stages: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"{next(iter(stages.values()))['problems']} held-out problems")
    table.add_column("stage")
    for heading in ("accuracy\ngreedy", "accuracy\nsampled", "tokens\ngreedy", "tokens\nsampled", "training\ntime"):
        table.add_column(heading, justify="right")
    for stage, figures in stages.items():
        minutes, seconds = divmod(round(figures["seconds"]), 60)
        table.add_row(
            STAGES[stage],
            f"{figures['accuracy']:.3f}",
            _optional(figures.get("sampled_accuracy"), ".3f"),
            f"{figures['length']:.1f}",
            _optional(figures.get("sampled_length"), ".1f"),
            f"{minutes}:{seconds:02d}",
        )
    Console().print(table)


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _draw(stages: dict[str, dict[str, Any]], curves: Curves, path: Path) -> None:
    figure, axes = plt.subplots(1, 3 if curves else 1, figsize=(13 if curves else 5.5, 3.8), squeeze=False)
    _draw_difficulty(axes[0, 0], stages)
    if curves:
        names = ("rollout/accuracy", "val/sampled_accuracy")
        _draw_curves(axes[0, 1], curves, names, "Accuracy, sampled", "share of responses right", 1.04)
        names = ("rollout/length", "val/sampled_length")
        _draw_curves(axes[0, 2], curves, names, "Response length, sampled", "tokens", None)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_difficulty(axes: Axes, stages: dict[str, dict[str, Any]]) -> None:
    for stage, figures in stages.items():
        levels = sorted(figures["by_difficulty"], key=int)
        accuracy = [figures["by_difficulty"][level] for level in levels]
        axes.plot([int(level) for level in levels], accuracy, "o-", color=COLOURS[stage], label=STAGES[stage])
    axes.set(title="Accuracy by difficulty, greedy", xlabel="digits in the problem", ylabel="share right")
    axes.set_ylim(0, 1.04)
    _finish(axes)


def _curves(folder: Path) -> Curves:
    """What is drawn of RL's history, over the iterations done; validation begins with the model of the stage before."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    history, before = folder / "rl" / HISTORY_FILE, folder / "long_cot" / METRICS_FILE
    for row in read_history(history):
        for name in DRAWN.keys() & row.keys() if "epoch" in row else ():
            values[name][int(row["epoch"]) + 1] = row[name]
    start = json.loads(before.read_text()) if values and before.is_file() else {}
    for name in values.keys() & start.keys():
        values[name][0] = start[name]
    return {name: (sorted(points), [points[x] for x in sorted(points)]) for name, points in values.items()}


def _draw_curves(
    axes: Axes, curves: Curves, names: tuple[str, str], title: str, ylabel: str, top: float | None
) -> None:
    for name, style, alpha in zip(names, ("-", "o-"), (0.4, 1.0), strict=True):
        if name in curves:
            axes.plot(*curves[name], style, color=COLOURS["rl"], label=DRAWN[name], alpha=alpha)
    axes.set(title=title, xlabel="RL iteration", ylabel=ylabel)
    axes.margins(y=0.1)
    axes.set_ylim(0, top)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="lower left")
