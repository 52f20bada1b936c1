"""The report of a synthesis as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files, on machines without a screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

KEPT, RIGHT, REFUSED = "#d9622b", "#3b82c4", "#9aa5b1"
CHOSEN_AWAY = ("duplicate", "near_duplicate", "surplus")
"""Right and good, but not needed."""


def draw_report(report: dict[str, Any], path: Path) -> None:
    """Four panels: what became of the responses, behaviours by prompt, lengths, pass rates."""
    figure, axes = plt.subplots(2, 2, figsize=(12.5, 8.2))
    _draw_fates(axes[0, 0], report)
    _draw_behaviours(axes[0, 1], report["by_prompt"])
    _draw_lengths(axes[1, 0], report["tokens"]["histogram"])
    _draw_pass_rates(axes[1, 1], report["pass_rate_by_problem"])
    figure.suptitle(
        f"{report['kept']:,} traces kept of {report['answered']:,} responses to {report['problems']:,} problems"
    )
    figure.tight_layout()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)
    partial.replace(path)


def _draw_fates(axes: Axes, report: dict[str, Any]) -> None:
    fates = [("kept", report["kept"]), *report["rejected"].items()]
    names = [name.replace("_", " ") for name, _ in fates]
    counts = [count for _, count in fates]
    colours = [KEPT if n == "kept" else RIGHT if n in CHOSEN_AWAY else REFUSED for n, _ in fates]
    bars = axes.barh(names, counts, color=colours)
    axes.bar_label(bars, [f"{count:,}  ({count / report['answered']:.0%})" for count in counts], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * max(counts))
    axes.set(title="What became of the responses", xlabel="responses")
    _finish(axes)


def _draw_behaviours(axes: Axes, by_prompt: dict[str, Any]) -> None:
    prompts = list(by_prompt)
    names = list(next(iter(by_prompt.values()))["behaviours"])
    shares = np.array([[by_prompt[prompt]["behaviours"][name] for name in names] for prompt in prompts], float)
    axes.imshow(np.nan_to_num(shares), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*shares.shape):
        share = shares[row, column]
        text = "-" if np.isnan(share) else f"{share:.0%}"
        axes.text(column, row, text, ha="center", va="center", color="white" if share > 0.55 else "black")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(prompts)), [f"{prompt}\n{by_prompt[prompt]['right']:,} right" for prompt in prompts])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Share of right traces that show a behaviour, by prompt")


def _draw_lengths(axes: Axes, histogram: dict[str, list[float]]) -> None:
    axes.set(title="Length of the traces", xlabel="tokens, thinking and answer", ylabel="traces")
    if histogram:
        edges = np.array(histogram["edges"])
        axes.stairs(histogram["right"], edges, fill=True, color=RIGHT, alpha=0.45, label="right")
        axes.stairs(histogram["kept"], edges, fill=True, color=KEPT, alpha=0.9, label="kept")
        if not np.allclose(np.diff(edges), np.diff(edges)[0]):
            axes.set_xscale("log")
        axes.legend(frameon=False)
    _finish(axes)


def _draw_pass_rates(axes: Axes, problems: dict[str, dict[str, int]]) -> None:
    rates = np.array([row["right"] / row["answered"] for row in problems.values()])
    kept = np.array([row["kept"] > 0 for row in problems.values()])
    most = max(row["answered"] for row in problems.values())
    edges = np.linspace(-0.5 / most, 1 + 0.5 / most, most + 2) if most <= 20 else np.linspace(0, 1, 21)
    axes.hist([rates[kept], rates[~kept]], edges.tolist(), stacked=True, color=[KEPT, REFUSED], rwidth=0.85)
    axes.legend(["a trace kept", "none kept"], frameon=False)
    axes.set(
        title="Pass rate of the problems", xlabel="share of a problem's responses that are right", ylabel="problems"
    )
    axes.set_xlim(edges[0] - 0.02, edges[-1] + 0.02)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if axes.get_title().startswith("What") else "y", alpha=0.25)
    axes.set_axisbelow(True)
