"""A sweep as a picture: what the metric does along what was varied."""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, on machines without a screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from kimivl.sweep.folder import Sweep
from kimivl.sweep.summary import Point, best_of, number, order, shown

BLUE, ORANGE, RED = "#3b82c4", "#d9622b", "#c0392b"
_COLOURS = [BLUE, ORANGE, "#2a9d6f", "#8e5bb5", "#b58900", "#5c6b7a"]
_LINES = [(style, colour) for style in ("o-", "s--", "^:") for colour in _COLOURS]
_LOG_SPAN = 8.0
"""Positive values that reach over this factor are drawn along a logarithmic axis."""
_MOST = 30
"""Points of a list at most; the best are drawn."""
_LONGEST = 30
"""Characters of a value at most."""


def draw_sweep(sweep: Sweep, points: Sequence[Point], path: Path) -> bool:
    """Draw the points that have a value; False where there are none.

    A search: the metric over its trials, and over each number that was searched. A grid: a line along a number, with a
    line for each value of a second parameter; bars for one that is no number; else a list, the best first.
    """
    measured = [point for point in points if point.mean is not None]
    if not measured:
        path.unlink(missing_ok=True)
        return False
    panels = 1 + min(len(_numeric(sweep, points)), 3) if sweep.search else 1
    size = (4.4 * panels if panels > 1 else 6.4, 4.0)
    if not _is_drawn_along(sweep, measured):
        size = (4.4 + 0.08 * max(map(len, _names(measured))), max(4.0, 1.2 + 0.3 * min(len(measured), _MOST)))
    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False)
    if sweep.search:
        _draw_search(list(axes[0]), sweep, points)
    else:
        _draw_grid(axes[0, 0], sweep, measured)
    for panel in axes[0]:
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _numeric(sweep: Sweep, points: Sequence[Point]) -> list[str]:
    """The varied keys whose values are all numbers."""
    return [key for key in sweep.varied if all(number(point.values[key]) is not None for point in points)]


def _is_drawn_along(sweep: Sweep, points: Sequence[Point]) -> bool:
    return sweep.search or len(sweep.varied) < 2 or len(sweep.varied) == 2 and bool(_numeric(sweep, points))


def _names(points: Sequence[Point], keys: Sequence[str] | None = None) -> list[str]:
    """Points as they are drawn, each by its values of ``keys`` (all), with the last word of each key."""
    keys = list(points[0].values) if keys is None else keys
    columns = [
        [f"{key.rpartition('.')[2]} {value}" for value in _short([shown(point.values[key]) for point in points])]
        for key in keys
    ]
    return [", ".join(row) for row in zip(*columns, strict=True)] if keys else [""] * len(points)


def _short(values: Sequence[str]) -> list[str]:
    """Long values without the parts that all begin and end with; what is still long loses its middle."""
    if max(map(len, values)) <= _LONGEST:
        return list(values)
    first = len(re.sub(r"[^/_ ]*$", "", os.path.commonprefix(values)))
    last = len(re.sub(r"[^/_ ]*$", "", os.path.commonprefix([value[first:][::-1] for value in values])))
    parts = [value[first : len(value) - last] for value in values]
    half = _LONGEST // 2
    return [part if len(part) <= _LONGEST else f"{part[: half - 1]}…{part[-half:]}" for part in parts]


def _draw_grid(axes: Axes, sweep: Sweep, points: Sequence[Point]) -> None:
    numeric = _numeric(sweep, points)
    if not _is_drawn_along(sweep, points):
        _draw_list(axes, sweep, points)
    elif numeric:
        along = max(numeric, key=lambda key: len({point.values[key] for point in points}))
        _draw_lines(axes, sweep, points, along, [key for key in sweep.varied if key != along])
    else:
        _draw_bars(axes, sweep, points)


def _draw_lines(axes: Axes, sweep: Sweep, points: Sequence[Point], along: str, others: Sequence[str]) -> None:
    in_order = sorted(points, key=lambda point: [order(point.values[key]) for key in [*others, along]])
    lines: dict[tuple[str, ...], list[Point]] = {}
    for point in in_order:
        lines.setdefault(tuple(point.values[key] for key in others), []).append(point)
    names = _names([own[0] for own in lines.values()], others)
    for place, (name, own) in enumerate(zip(names, lines.values(), strict=True)):
        drawn = _draw_line(axes, own, along, *_LINES[place % len(_LINES)], name or "mean and its 95% interval")
        # A little beside one another: a line would hide the one that it equals.
        shift = ScaledTranslation((place - (len(lines) - 1) / 2) / 24, 0, axes.figure.dpi_scale_trans)
        for artist in drawn:
            artist.set_transform(axes.transData + shift)
    _scale(axes, [point.values[along] for point in points])
    axes.set(xlabel=along, ylabel=sweep.metric)
    axes.grid(axis="y", alpha=0.25)
    if len(lines) > 1 or any(point.interval is not None for point in points):
        _legend(axes)


def _draw_line(axes: Axes, points: Sequence[Point], along: str, style: str, colour: str, label: str) -> list[Artist]:
    x = [number(point.values[along]) or 0.0 for point in points]
    mean = [point.mean or 0.0 for point in points]
    half = [point.interval or 0.0 for point in points]
    drawn = axes.errorbar(x, mean, half, fmt=style, color=colour, capsize=4, label=label).get_children()
    seeds = [
        (place, value) for place, point in zip(x, points, strict=True) if point.interval for value in point.metrics
    ]
    if seeds:
        drawn += axes.plot(*zip(*seeds, strict=True), "_", color="black", alpha=0.6, markersize=9, zorder=3)
    return drawn


def _scale(axes: Axes, values: Sequence[str], ticks: bool = True) -> None:
    """A logarithmic axis for what was varied over orders, apart from 0; the values of a grid are its ticks, where they
    are few and not too near to one another."""
    sizes = sorted({number(value) or 0.0 for value in values})
    positive = [size for size in sizes if size > 0]
    if sizes[0] >= 0 and positive and positive[-1] / positive[0] >= _LOG_SPAN:
        if sizes[0] > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=positive[0])
    if ticks and len(sizes) <= 8:
        places = axes.xaxis.get_transform().transform(np.array(sizes))
        named = [0]
        for one in range(1, len(sizes)):
            if places[one] - places[named[-1]] > 0.06 * (places[-1] - places[0]):
                named.append(one)
        axes.set_xticks(sizes, [f"{size:g}" if one in named else "" for one, size in enumerate(sizes)])
        axes.set_xticks([], minor=True)


def _draw_bars(axes: Axes, sweep: Sweep, points: Sequence[Point]) -> None:
    names = _short([" ".join(shown(value) for value in point.values.values()) or "all" for point in points])
    places = np.arange(len(points))
    half = [point.interval or 0.0 for point in points]
    axes.bar(places, [point.mean or 0.0 for point in points], 0.6, color=BLUE, alpha=0.75, yerr=half, capsize=4)
    for place, point in zip(places, points, strict=True):
        if point.interval is not None:
            axes.plot([place] * len(point.metrics), point.metrics, "_", color="black", alpha=0.6, markersize=9)
    axes.set_xlim(min(-0.6, -2.0 + len(points) / 2), max(len(points) - 0.4, 1 + len(points) / 2))
    axes.set_xticks(places, names, rotation=30 if max(map(len, names)) * len(names) > 60 else 0)
    axes.set(xlabel=sweep.varied[0] if sweep.varied else "", ylabel=sweep.metric)
    axes.grid(axis="y", alpha=0.25)


def _draw_list(axes: Axes, sweep: Sweep, points: Sequence[Point]) -> None:
    best = sorted(points, key=lambda point: point.mean or 0.0, reverse=sweep.direction == "max")[:_MOST][::-1]
    half = [point.interval or 0.0 for point in best]
    axes.errorbar([point.mean or 0.0 for point in best], range(len(best)), xerr=half, fmt="o", color=BLUE, capsize=3)
    axes.set_yticks(range(len(best)), _names(best))
    left_out = f" (the best {_MOST} of {len(points)} points)" if len(points) > _MOST else ""
    axes.set(xlabel=sweep.metric + left_out)
    axes.grid(axis="x", alpha=0.25)


def _draw_search(axes: Sequence[Axes], sweep: Sweep, points: Sequence[Point]) -> None:
    by_time = sorted(points, key=lambda point: min((job.begun for job in point.jobs), default=0.0))
    values = np.array([np.nan if point.mean is None else point.mean for point in by_time])
    trials = np.arange(1, len(values) + 1)
    so_far = (np.fmax if sweep.direction == "max" else np.fmin).accumulate(values)
    axes[0].plot(trials, so_far, drawstyle="steps-post", color=ORANGE, label="best so far")
    axes[0].plot(trials, values, "o", color=BLUE, label="trial")
    failed = np.isnan(values)
    if failed.any():
        floor = np.nanmin(values)
        axes[0].plot(trials[failed], [floor] * failed.sum(), "x", color=RED, label="no value")
    axes[0].set(xlabel="trial", ylabel=sweep.metric)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes[0])
    best = best_of(by_time, sweep.direction)
    for panel, key in zip(axes[1:], _numeric(sweep, points), strict=False):
        x = np.array([number(point.values[key]) or 0.0 for point in by_time])
        panel.plot(x, values, "o", color=BLUE)
        if failed.any():
            panel.plot(x[failed], [np.nanmin(values)] * failed.sum(), "x", color=RED)
        if best is not None:
            at = by_time.index(best)
            panel.plot(x[at], values[at], "o", color=ORANGE, label=f"best: {x[at]:.4g}")
        _scale(panel, [point.values[key] for point in by_time], ticks=False)
        panel.set(xlabel=key)
        _legend(panel)
    for panel in axes:
        panel.grid(axis="y", alpha=0.25)


def _legend(axes: Axes) -> None:
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="best", fontsize=9)
