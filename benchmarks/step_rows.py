"""The rows of the benchmark of a training step: what they say beside each other, and how they are shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.sides import Step, Window

GIGABYTE = 10**9
OURS = "ours"
TARGETS = {"padded": 2.0, "masked": 1.5}
"""How many times as fast we want to be, on a CPU with text."""
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 2e-2, "bf16-true": 2e-2}
"""Relative difference of losses between sides; that of gradient norms may be ten times as large."""


@dataclass
class Row:
    """The steps of one side on windows of one kind, and why there are no more."""

    window: Window
    side: str
    data: str = "ready"
    steps: list[Step] = field(default_factory=list)
    failed: str | None = None

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each step."""
        return [step.tokens / (step.wall_s if self.data == "real" else step.seconds) for step in self.steps]

    def ratios(self, other: Row) -> list[float]:
        """How many times as fast the other row is, step by step."""
        return [theirs / mine for mine, theirs in zip(self.rates, other.rates, strict=False)]

    def difference(self, other: Row, name: str) -> float:
        """The largest relative difference of a result from that of the other row's step on the same packs."""
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(self.steps, other.steps, strict=False)]
        return max((abs(a - b) / abs(b) for a, b in pairs), default=0.0)


def name_of(window: Window) -> str:
    length = f"{window.length // 1024}K" if window.length % 1024 == 0 else str(window.length)
    return f"{length} {'images' if window.pictures else 'text'}" + (f" x{window.packs}" if window.packs > 1 else "")


def header(about: dict[str, Any], overrides: Sequence[str]) -> str:
    return (
        f"{' '.join(overrides) or 'model=tiny'}: {about['parameters'] / 1e6:,.0f}M parameters, {about['precision']}, "
        f"{about['kernels']}, activation_checkpointing={about['activation_checkpointing']}, "
        f"Newton-Schulz {about['newton_schulz_flops'] / 1e12:.3g} TFLOP a step\n"
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, transformers {about['transformers']}, "
        f"Python {about['python']}; utilisation of {about['peak_flops'] / 1e12:.3g} TFLOP/s: {about['peak_source']}"
    )


def _spread(values: Sequence[float], digits: int = 0) -> str:
    """Median (min..max)."""
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"


def table(rows: list[Row], about: dict[str, Any], cpu: bool) -> Table:
    clock = "per CPU-second" if cpu else "per second"
    shown = Table(title=f"One step, {clock}, packs in memory: median (min..max)", box=SIMPLE_HEAD)
    for column in ("pack", "side"):
        shown.add_column(column, no_wrap=True)
    for column in ("tokens", "TFLOP", "MFU", "Muon", "peak GB", "ours / this", "differ by"):
        shown.add_column(column, justify="right")
    for row in rows:
        if row.data != "ready":
            continue
        ours = _ours(rows, row.window)
        if row.failed or not row.steps:
            shown.add_row(name_of(row.window), row.side, "out of memory", *["-"] * 6)
            continue
        compared = ours if ours is not None and ours.steps and row.side != OURS else None
        shown.add_row(
            name_of(row.window),
            row.side,
            _spread(row.rates),
            f"{_flop_rate(row) / 1e12:.3g}",
            f"{_flop_rate(row) / about['peak_flops']:.1%}" if "peak_flops" in about else "-",
            f"{statistics.median(step.muon_s / step.seconds for step in row.steps):.1%}",
            f"{max(step.memory['peak'] for step in row.steps) / GIGABYTE:.2f}",
            f"{_spread(row.ratios(compared), 2)}" if compared else "",
            f"{max(row.difference(compared, name) for name in ('loss', 'grad_norm')):.0e}" if compared else "",
        )
    return shown


def _flop_rate(row: Row) -> float:
    return statistics.median(step.flops / (step.wall_s if row.data == "real" else step.seconds) for step in row.steps)


def real_table(rows: list[Row]) -> Table:
    shown = Table(
        title="One step of ours through the real data path, on the wall clock: median (min..max)", box=SIMPLE_HEAD
    )
    for column in ("pack", "tokens per second", "TFLOP", "waiting for data", "peak GB"):
        shown.add_column(column, justify="right")
    for row in rows:
        if row.data != "real":
            continue
        if row.failed:
            shown.add_row(name_of(row.window), "out of memory", "-", "-", "-")
            continue
        shown.add_row(
            name_of(row.window),
            _spread(row.rates),
            f"{_flop_rate(row) / 1e12:.3g}",
            f"{statistics.median(step.wait_s / step.wall_s for step in row.steps):.1%}",
            f"{max(step.memory['peak'] for step in row.steps) / GIGABYTE:.2f}",
        )
    return shown


def _ours(rows: list[Row], window: Window) -> Row | None:
    return next((row for row in rows if (row.window, row.side, row.data) == (window, OURS, "ready")), None)


def targets(rows: list[Row]) -> Iterator[str]:
    """Whether we are as much faster than the plain side as we want to be."""
    for side, target in TARGETS.items():
        found = []
        for row in rows:
            ours = _ours(rows, row.window)
            if row.side == side and not row.window.pictures and row.steps and ours is not None and ours.steps:
                ratio = statistics.median(row.ratios(ours))
                found.append(f"{name_of(row.window)} {ratio:.2f}x {'met' if ratio >= target else '[red]missed[/]'}")
        if found:
            yield f"at least {target}x {side}: {', '.join(found)}"


def disagreements(rows: list[Row], tolerance: float) -> Iterator[str]:
    for row in rows:
        ours = _ours(rows, row.window)
        if row.data != "ready" or ours is None:
            continue
        for name, limit in (("loss", tolerance), ("grad_norm", 10 * tolerance)):
            if not row.difference(ours, name) <= limit:
                yield f"{name_of(row.window)}: {name} of {row.side} and ours differ by {row.difference(ours, name):.1e}"


def report(about: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """Everything, with the ratios of each step."""
    written = []
    for row in rows:
        ours = _ours(rows, row.window) if row.data == "ready" else None
        ratios = row.ratios(ours) if ours is not None else []
        written.append(asdict(row) | {"tokens_per_second": row.rates, "ours_is_faster": ratios})
    return {"about": about, "rows": written}
