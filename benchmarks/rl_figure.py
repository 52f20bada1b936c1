"""The curves of the RL comparisons as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.rl_report import COMPARISONS, Reached, Runs, Shown, curve, reached, seeds

COLOURS = ("#6b7280", "#d1495b")
"""Of the arm that others are compared with, and of the other one: apart in grey too."""
NAMES = {"length": "tokens of a response", "accuracy": "accuracy, sampled", "sampled_accuracy": "accuracy, sampled"}
LEGEND = {"sampled": "training problems", "val": "held-out problems"}


def draw(runs: Runs, path: Path) -> None:
    """A column for each comparison; where it has two curves, one above the other. Bands are 95% intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    ):
        figure = plt.figure(figsize=(4.2 * len(runs), 3.9), layout="constrained")
        columns = figure.add_gridspec(1, len(runs))
        for column, (comparison, arms) in enumerate(runs.items()):
            curves = COMPARISONS[comparison].curves
            rows = columns[column].subgridspec(len(curves), 1)
            axes = [figure.add_subplot(rows[row]) for row in range(len(curves))]
            for axis, shown in zip(axes, curves, strict=True):
                _panel(axis, arms, shown)
            axes[0].set_title(COMPARISONS[comparison].title, loc="left", fontweight="bold")
            axes[0].legend(loc="best", title=LEGEND[curves[0].kind], title_fontsize=8, alignment="left")
            axes[-1].set_xlabel("sampled tokens (thousands)")
            for axis in axes[:-1]:
                axis.tick_params(labelbottom=False)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _panel(axis: Any, arms: dict[str, Any], shown: Shown) -> None:
    for colour, (arm, of_seeds) in zip(COLOURS, arms.items(), strict=True):
        mean = curve(of_seeds, shown)
        thousands = mean.tokens / 1000
        axis.plot(thousands, mean.mean, color=colour, linewidth=1.8, label=f"{arm} ({seeds(of_seeds)})")
        axis.fill_between(
            thousands, mean.mean - mean.half, mean.mean + mean.half, color=colour, alpha=0.18, linewidth=0
        )
    axis.set_ylabel(NAMES[shown.name])
    axis.grid(axis="y", alpha=0.25)
    if shown.name == "length":
        axis.set_ylim(bottom=0)
    else:
        axis.set_ylim(top=min(axis.get_ylim()[1], 1.0))
    if shown.kind == "val":
        _mark(axis, reached(arms, shown))


def _mark(axis: Any, found: Reached) -> None:
    """The first arm's last accuracy, and where the other one has reached it."""
    first, other = found.tokens
    axis.axhline(found.goal, color=COLOURS[0], linewidth=0.8, linestyle=":")
    if found.tokens[other] < found.tokens[first]:
        axis.plot(found.tokens[other] / 1000, found.goal, "o", color=COLOURS[1], markersize=5)
