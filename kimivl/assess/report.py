"""What an assessment says: bars in the terminal, and one picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import matplotlib

matplotlib.use("Agg")  # draws to files, on machines without a screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kimivl.assess.kinds import AnswerKind

BINS = 11
BLUE, ORANGE, GREY = "#3b82c4", "#d9622b", "#9aa5b1"
KEPT = (0.05, 0.95)
"""The pass rates of the filter that the report proposes: neither always nor never solved."""
_BAR = 36


def print_assessment(rows: Sequence[dict[str, Any]], about: dict[str, Any], console: Console) -> None:
    """The pass rates as bars, the kinds of answers, and how many problems a usual filter keeps.

    Args:
        rows: at least one line of the file. about: its first line.
    """
    counts, hacked = pass_rate_bins(rows)
    table = Table(
        title=f"{len(rows):,} problems, {about['samples']} responses to each at temperature {about['temperature']:g}",
        title_justify="left",
    )
    table.add_column("pass rate", justify="right")
    table.add_column("problems", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", min_width=_BAR)
    for place, (count, easy) in enumerate(zip(counts, hacked, strict=True)):
        whole, part = (-(-_BAR * int(number) // max(int(counts.max()), 1)) for number in (count, easy))
        bar = Text("▓" * part, ORANGE) + Text("█" * (whole - part), BLUE)
        table.add_row(_name(place), f"{count:,}", f"{count / len(rows):.1%}", bar)
    console.print(table)
    easy = [row["easy_to_hack"] for row in rows if row["easy_to_hack"] is not None]
    if easy:
        said = f"{sum(easy):,} of {len(easy):,} ({sum(easy) / len(easy):.0%})"
        console.print(
            Text("▓", ORANGE) + f" easy to hack (guessed without thinking in {about['guesses']} tries): {said}"
        )
    kinds = Counter(row["answer_kind"] for row in rows).most_common()
    console.print("answers: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds), highlight=False)
    unjudged = sum(row["pass_rate"] is None for row in rows)
    if unjudged:
        console.print(f"the verifier failed on all responses to {unjudged:,} problems", highlight=False)
    _print_filter(rows, console)


def _print_filter(rows: Sequence[dict[str, Any]], console: Console) -> None:
    low, high = KEPT
    inside = [row for row in rows if row["pass_rate"] is not None and low <= row["pass_rate"] <= high]
    said = f"'sampler.filter.pass_rate=[{low},{high}]' keeps {len(inside):,}"
    if any(row["easy_to_hack"] is not None for row in rows):
        kept = sum(row["easy_to_hack"] is False for row in inside)
        said += f", with sampler.filter.easy_to_hack=false {kept:,}"
    console.print(f"stage=rl with {said}", highlight=False, soft_wrap=True, markup=False)


def pass_rate_bins(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(11,) problems by tenths of the pass rate, and (11,) those of them that are easy to hack.

    The first and last bin hold exactly 0 and exactly 1: what is solved never, and what is solved always.
    """
    counts, hacked = np.zeros(BINS, int), np.zeros(BINS, int)
    for row in rows:
        rate = row["pass_rate"]
        if rate is not None:
            place = round(rate) * (BINS - 1) if rate in (0, 1) else min(max(round(rate * 10), 1), BINS - 2)
            counts[place] += 1
            hacked[place] += row["easy_to_hack"] is True
    return counts, hacked


def _name(place: int) -> str:
    return {0: "never", BINS - 1: "always"}.get(place, f"about {place / 10:.1f}")


def draw_assessment(rows: Sequence[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """The pass rates, against the label where there is one, and the kinds of answers."""
    labelled = sorted({row["difficulty"] for row in rows if row["difficulty"] >= 0})
    panels = 3 if labelled else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.4 * panels, 3.8), squeeze=False)
    _draw_rates(axes[0, 0], rows, about)
    if labelled:
        _draw_labels(axes[0, 1], rows, labelled)
    _draw_kinds(axes[0, -1], rows)
    for panel in axes[0]:
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_rates(axes: Axes, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    counts, hacked = pass_rate_bins(rows)
    places = np.arange(BINS) / 10
    axes.bar(places, hacked, 0.08, color=ORANGE, label=f"guessed in {about['guesses']} tries")
    axes.bar(places, counts - hacked, 0.08, bottom=hacked, color=BLUE, label="not guessed")
    axes.set(title=f"{len(rows):,} problems", xlabel=f"pass rate of {about['samples']} responses", ylabel="problems")
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_ylim(0, max(int(counts.max()), 1) * 1.25)
    if about["guesses"]:
        axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=9)


def _draw_labels(axes: Axes, rows: Sequence[dict[str, Any]], labelled: Sequence[int]) -> None:
    by_label: dict[int, list[float]] = {label: [] for label in labelled}
    for row in rows:
        if row["difficulty"] in by_label and row["pass_rate"] is not None:
            by_label[row["difficulty"]].append(row["pass_rate"])
    known = {label: np.array(rates) for label, rates in by_label.items() if rates}
    middle = [np.mean(rates) for rates in known.values()]
    axes.plot(list(known), middle, "o-", color=BLUE, label="mean")
    low, high = ([np.percentile(rates, q) for rates in known.values()] for q in (25, 75))
    axes.fill_between(list(known), low, high, color=BLUE, alpha=0.18, linewidth=0, label="middle half")
    axes.set(title="Measured against the label", xlabel="difficulty label", ylabel="pass rate")
    axes.set_ylim(0, 1.04)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="lower left")


def _draw_kinds(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    found = Counter(row["answer_kind"] for row in rows)
    kinds = sorted(get_args(AnswerKind), key=lambda kind: found[kind])
    bars = axes.barh([kind.replace("_", "/") for kind in kinds], [found[kind] for kind in kinds], 0.6, color=GREY)
    axes.bar_label(bars, [f"{found[kind]:,}" for kind in kinds], padding=3)
    axes.set(title="Kinds of answers", xlabel="problems")
    axes.set_xlim(0, max(found.values()) * 1.18)
