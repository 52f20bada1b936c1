"""``kimivl audit RUN_DIR``: the verification of a run as tables, one picture, and an exit code."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.table import Table

from kimivl.data.audit.verify import AUDIT_FOLDER, LENGTH_EDGES, AuditReport, EpochFigures, EpochReport, verify

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_FILE = "audit.png"
COLOURS = {"text": "#9aa5b1", "with images": "#3b82c4"}
BAR = 10
"""Characters of the longest bar of the histogram in the terminal."""
SOURCES = 12
"""Sources that a table and the picture name; the others are summed up."""


def run_audit(arguments: argparse.Namespace) -> int:
    """Verify, print, draw; 0 when everything is as planned, 1 when it is not.

    Raises:
        ValueError: when the folder holds no audit.
    """
    report = verify(arguments.folder)
    print_report(report, Console())
    finished = [epoch.figures for epoch in report.epochs if epoch.figures is not None]
    if finished:
        path = arguments.folder / AUDIT_FOLDER / PICTURE_FILE
        draw(finished, path)
        print(f"picture: {path}")
    return 0 if report.verified else 1


def print_report(report: AuditReport, console: Console) -> None:
    """One block per epoch, then the verdict."""
    for epoch in report.epochs:
        _print_epoch(epoch, console)
    for problem in report.all_problems:
        console.print(f"[red]not as planned[/] {problem}", highlight=False, soft_wrap=True)
    attempts, epochs = _counted(report.attempts, "process start"), _counted(len(report.epochs), "epoch")
    verdict = "[bold green]verified[/]" if report.verified else "[bold red]NOT VERIFIED[/]"
    console.print(f"{verdict}  {report.run_dir}: {epochs}, {attempts}", highlight=False, soft_wrap=True)


def _print_epoch(epoch: EpochReport, console: Console) -> None:
    mark = "[red]not verified[/]" if epoch.problems else "[green]verified[/]"
    if epoch.figures is None:
        mark = "[red]not verified[/]" if epoch.problems else "[yellow]in progress[/]"
    elif holes := sum(epoch.figures.quarantined.values()):
        mark += f", [yellow]{_counted(holes, 'hole')}[/]"
    steps = f"{_counted(epoch.steps, 'step')} of {_counted(epoch.packs_per_step, 'pack')}"
    span = f", {epoch.first_step:,} to {epoch.last_step:,}" if epoch.steps else ""
    ranks = " and ".join(map(str, epoch.world_sizes)) or "no"
    console.rule(f"[bold]epoch {epoch.epoch}[/]  {mark}", align="left", style="dim")
    console.print(f"{steps}{span}; {ranks} rank{'s' if epoch.world_sizes != [1] else ''}", highlight=False)
    if epoch.figures is None:
        console.print(f"{epoch.delivered:,} samples delivered so far\n", highlight=False)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_row(_uses_table(epoch.figures), Group(_sources_table(epoch.figures), _lengths_table(epoch.figures)))
    console.print(grid)
    console.print()


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _uses_table(figures: EpochFigures) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("uses of samples")
    table.add_column("", justify="right")
    table.add_row("planned", f"{figures.planned:,}")
    table.add_row("trained", f"{figures.trained:,}")
    for reason, count in sorted(figures.quarantined.items()):
        table.add_row(f"quarantined: {reason}", f"{count:,}")
    table.add_section()
    table.add_row("samples in the index", f"{figures.samples:,}")
    for reason, count in sorted(figures.left_out.items()):
        table.add_row(f"left out: {reason}", f"{count:,}")
    for reason, count in sorted(figures.index_dropped.items()):
        table.add_row(f"not in the index: {reason}", f"{count:,}")
    table.add_section()
    table.add_row("tokens trained", f"{figures.tokens:,}")
    table.add_row(f"fill of {len(figures.fills):,} packs of {figures.max_length:,}", f"{figures.efficiency:.2%}")
    return table


def _sources_table(figures: EpochFigures) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("source", overflow="ellipsis", max_width=24)
    for heading in ("samples", "tokens", "share"):
        table.add_column(heading, justify="right")
    for share in figures.sources[:SOURCES]:
        table.add_row(share.name or "(none)", f"{share.samples:,}", f"{share.tokens:,}", f"{share.share:.1%}")
    if others := figures.sources[SOURCES:]:
        samples, tokens = sum(share.samples for share in others), sum(share.tokens for share in others)
        table.add_row(f"{len(others)} others", f"{samples:,}", f"{tokens:,}", f"{sum(o.share for o in others):.1%}")
    return table


def _lengths_table(figures: EpochFigures) -> Table:
    """Uses by length, an octave a row."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("length", justify="right", no_wrap=True)
    table.add_column("uses", justify="right")
    table.add_column("")
    counts = np.sum(list(figures.lengths.values()), axis=0).reshape(-1, 2).sum(1)
    for octave in range(*_span(counts)):
        low, high = 2**octave, 2 ** (octave + 1) - 1
        bar = "█" * max(round(BAR * counts[octave] / counts.max()), int(counts[octave] > 0))
        table.add_row(f"{low:,} to {high:,}", f"{counts[octave]:,.0f}", f"[cyan]{bar}[/]")
    return table


def _span(counts: np.ndarray) -> tuple[int, int]:
    """The bins from the first to the last that holds something."""
    held = np.flatnonzero(counts)
    return (int(held[0]), int(held[-1]) + 1) if len(held) else (0, 0)


def draw(epochs: list[EpochFigures], path: Path) -> None:
    """One picture of all finished epochs: lengths of samples, tokens by source, fill of packs."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, on machines without a screen
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 3.9), width_ratios=(1.25, 1, 1))
    _draw_lengths(axes[0], epochs)
    _draw_sources(axes[1], epochs)
    _draw_fills(axes[2], epochs)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    figure.tight_layout(w_pad=2.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_lengths(axes: Axes, epochs: list[EpochFigures]) -> None:
    counts = {kind: np.sum([epoch.lengths[kind] for epoch in epochs], axis=0) for kind in COLOURS}
    below = np.zeros(len(LENGTH_EDGES) - 1)
    for kind, count in counts.items():
        if count.any():
            axes.bar(
                LENGTH_EDGES[:-1],
                count,
                np.diff(LENGTH_EDGES),
                bottom=below,
                align="edge",
                color=COLOURS[kind],
                label=kind,
                edgecolor="white",
                linewidth=0.6,
            )
            below += count
    used = np.flatnonzero(below)
    axes.set_xscale("log", base=2)
    if len(used):
        axes.set_xlim(LENGTH_EDGES[used[0]], LENGTH_EDGES[used[-1] + 1])
    exponents = [e for e in range(21) if axes.get_xlim()[0] <= 2**e <= axes.get_xlim()[1]]
    exponents = exponents[:: math.ceil(len(exponents) / 7) or 1]
    axes.set_xticks([2**e for e in exponents], [f"{2 ** (e - 10)}K" if e >= 10 else str(2**e) for e in exponents])
    axes.set(title="Length of trained samples", xlabel="tokens", ylabel="uses")
    axes.yaxis.set_major_formatter(_short)
    axes.grid(axis="y", alpha=0.3)
    axes.set_ylim(0, 1.25 * below.max(initial=1))  # room for the legend
    axes.legend(frameon=False, ncols=2, loc="upper left")


def _draw_sources(axes: Axes, epochs: list[EpochFigures]) -> None:
    totals: dict[str, int] = {}
    for share in (share for epoch in epochs for share in epoch.sources):
        totals[share.name] = totals.get(share.name, 0) + share.tokens
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    shown = ranked[:SOURCES]
    if len(ranked) > SOURCES:
        shown.append((f"{len(ranked) - SOURCES} others", sum(tokens for _, tokens in ranked[SOURCES:])))
    names = [name if len(name) <= 20 else name[:19] + "…" for name, _ in shown]
    bars = axes.barh(range(len(shown)), [tokens for _, tokens in shown], color="#d9622b", height=0.7)
    whole = max(1, sum(totals.values()))
    axes.bar_label(bars, [f"{tokens / whole:.1%}" for _, tokens in shown], padding=3, fontsize=8)
    axes.set_yticks(range(len(shown)), [name or "(none)" for name in names])
    axes.set_ylim(max(len(shown), 4) - 0.4, -0.6)
    axes.margins(x=0.18)
    axes.set(title="Tokens trained, by source", xlabel="tokens")
    axes.xaxis.set_major_formatter(_short)
    axes.grid(axis="x", alpha=0.3)


def _draw_fills(axes: Axes, epochs: list[EpochFigures]) -> None:
    """Packs by fill; the axis begins near the fullest of the emptiest 2%, since nearly all are nearly full."""
    fills = np.concatenate([epoch.fills for epoch in epochs])
    low = min(0.95, max(0.0, math.floor(float(np.quantile(fills, 0.02)) * 20 - 1e-9) / 20))
    axes.hist(np.clip(fills, low, 1), 40, range=(low, 1), color="#5b8c5a", edgecolor="white", linewidth=0.4)
    rooms = [len(epoch.fills) * epoch.max_length for epoch in epochs]
    mean = float(np.average([epoch.efficiency for epoch in epochs], weights=rooms))
    below = f" (the first bar: below {low:.0%})" if fills.min() < low else ""
    axes.set(title=f"Fill of {len(fills):,} packs: {mean:.2%}", xlabel=f"tokens / max_length{below}", ylabel="packs")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if (1 - low) > 0.2 else f"{value:.1%}")
    axes.yaxis.set_major_formatter(_short)
    axes.grid(axis="y", alpha=0.3)


def _short(value: float, _: object) -> str:
    """12000 -> 12K, for the ticks of an axis."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
