"""``kimivl sweep``: one table of a sweep, what of it is missing, and a picture."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kimivl.sweep.folder import SEED, Job, Status, Sweep, read_sweep
from kimivl.sweep.summary import Point, as_json, best_of, fold, shown

SUMMARY_FILE, PICTURE_FILE = "summary.json", "sweep.png"
_COLOURS = {"finished": "green", "running": "cyan", "interrupted": "yellow", "missing": "yellow"}


def run_sweep(folder: Path, metric: str | None, direction: Literal["max", "min"] | None, console: Console) -> int:
    """Print the table of the sweep in ``folder``; write ``summary.json`` and ``sweep.png`` there.

    Returns:
        0 when all that was asked for has finished, else 1.

    Raises:
        ValueError: when there is no sweep in the folder.
    """
    sweep = read_sweep(folder, metric, direction)
    points = fold(sweep)
    console.print(_table(sweep, points))
    best = best_of(points, sweep.direction)
    if best is not None and best.values:
        console.print(Text(f"best: {_name(sweep, best.values)}: {_measured(best)}", "bold"), soft_wrap=True)
    for job in sweep.jobs:
        if job.status != "finished" or job.reason:
            console.print(_line(sweep, job), soft_wrap=True)
    for point in sweep.missing:
        console.print(Text("missing", "yellow") + f"  {_name(sweep, point)}", soft_wrap=True)
    for note in sweep.notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    _print_rest(sweep, console)
    _write(sweep, points, console)
    done = sweep.counts.keys() <= {"finished"} and not any(job.reason for job in sweep.jobs)
    return 0 if done else 1


def _table(sweep: Sweep, points: Sequence[Point]) -> Table:
    seeds = any(point.counts.total() > 1 for point in points)
    better = "more is better" if sweep.direction == "max" else "less is better"
    table = Table(title=f"{sweep.metric} ({better})", title_justify="left")
    short = _headings(sweep.varied)
    for key in sweep.varied:
        table.add_column(Text(short[key]), justify="right")
    table.add_column("mean ± 95%" if seeds else "value", justify="right", no_wrap=True)
    if seeds:
        table.add_column("seeds", justify="right")
    table.add_column("runs")
    best = best_of(points, sweep.direction)
    for point in points:
        cells = [Text(shown(value) if value else "-") for value in point.values.values()]
        cells.append(Text(_measured(point)))
        if seeds:
            cells.append(Text(str(len(point.metrics))))
        table.add_row(*cells, _spelled(point.counts), style="bold" if point is best else None)
    return table


def _headings(keys: Sequence[str]) -> dict[str, str]:
    """The last word of a key, or as many as tell it from the others."""
    found = {}
    for key in keys:
        parts = key.split(".")
        size = next(
            (n for n in range(1, len(parts)) if sum(other.endswith(".".join(parts[-n:])) for other in keys) == 1),
            len(parts),
        )
        found[key] = ".".join(parts[-size:])
    return found


def _measured(point: Point) -> str:
    if point.mean is None:
        return "-"
    if not point.interval:
        return f"{point.mean:.4g}" if point.interval is None else f"{point.mean:.4g} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(point.interval)))
    return f"{point.mean:.{decimals}f} ± {point.interval:.{decimals}f}"


def _colour(status: Status) -> str:
    return _COLOURS.get(status, "red")


def _spelled(counts: Counter[str]) -> Text:
    parts = [Text(f"{counts[status]} {status}", _colour(status)) for status in get_args(Status) if counts[status]]
    return Text(", ").join(parts)


def _name(sweep: Sweep, values: dict[str, str]) -> str:
    keys = [*sweep.varied, SEED] if SEED in values else sweep.varied
    return " ".join(f"{key}={shown(values[key])}" for key in keys if values.get(key))


def _line(sweep: Sweep, job: Job) -> Text:
    name = _name(sweep, job.values) or job.folder.name
    return Text(job.status, _colour(job.status)) + f"  {name}: {job.reason}"


def _print_rest(sweep: Sweep, console: Console) -> None:
    counts = sweep.counts
    console.print(Text(f"{counts.total()} {'trials' if sweep.search else 'runs'}: ") + _spelled(counts))
    again = counts["interrupted"] + counts["killed"] + counts["missing"]
    if not sweep.search:  # what a trial has ended with stays in the study
        again += counts["failed"]
    if again and sweep.command is None:
        console.print("the command is not known: there is no multirun.yaml; type the sweep again with hydra.sweep.dir=")
    elif again:
        console.print(f"\nwhat has not finished: {sweep.command}", soft_wrap=True, highlight=False, markup=False)


def _write(sweep: Sweep, points: Sequence[Point], console: Console) -> None:
    from kimivl.sweep.picture import draw_sweep

    try:
        text = json.dumps(as_json(sweep, points), indent=2) + "\n"
        (sweep.folder / SUMMARY_FILE).write_text(text)
        drawn = draw_sweep(sweep, points, sweep.folder / PICTURE_FILE)
    except OSError as error:
        console.print(
            f"summary.json and sweep.png are not written: {error}", soft_wrap=True, highlight=False, markup=False
        )
        return
    figures = f"figures: {sweep.folder / SUMMARY_FILE}"
    picture = f"picture: {sweep.folder / PICTURE_FILE}   " if drawn else ""
    console.print(f"{picture}{figures}", soft_wrap=True, highlight=False, markup=False)
