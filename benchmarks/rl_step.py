"""Whole iterations of reinforcement learning beside TRL's GRPOTrainer: sampled tokens/s, iterations an hour, phases.

    pip install trl==1.16.0 -c constraints.txt          TRL and what it needs; without it, our side is measured alone
    python benchmarks/rl_step.py                        tiny model, 32 x 8 responses; about 10 minutes on two cores
    python benchmarks/rl_step.py --median 32 --longest 512 --json rl_step.json

**The sides** (``benchmarks/iterations.py``, ``benchmarks/peers/trl_grpo.py``): a run of ``train.py stage=rl`` as it is,
and TRL's GRPOTrainer with its defaults and generation by transformers, without KL term and gradient checkpointing. Both
have the same weights (ours keeps its vision tower, which texts do not use), the same text problems, the same number of
responses of the same lengths, reward and number of optimiser steps, and AdamW; ``optimizer=muon_rl`` and any other key
of ``train.py stage=rl`` changes our side. Lengths are lognormal, with a long tail up to ``--longest``.

**The clock** is CPU time, for others may use the machine too; the sides take turns iteration by iteration, each in a
process of its own. The phases are seconds on the wall. Figures are medians over iterations with (min..max).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.iterations import PHASES, Iteration, Ours, Side, Workload  # noqa: E402
from benchmarks.turns import Remote  # noqa: E402

Measured = dict[str, list[Iteration]]
TARGET = 2.0
"""Times TRL's sampled tokens/s, and its iterations an hour."""


def make_side(name: str, workload: Workload, overrides: Sequence[str]) -> Side:
    """A side, in the process that calls this."""
    if name == "kimivl":
        return Ours(workload, overrides)
    from benchmarks.peers.trl_grpo import TRL

    return TRL(workload, overrides)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, write down; 1 where the sides did not do the same work, 2 for a wrong setting."""
    options = _options(arguments)
    console = Console(width=110) if not sys.stdout.isatty() else Console()
    names = ["kimivl"]
    if find_spec("trl") is None:
        console.print("TRL is not installed, our side is measured alone; pip install trl==1.16.0 -c constraints.txt")
    else:
        names.append("TRL")
    try:
        with tempfile.TemporaryDirectory() as folder:
            measured = _measure(names, _workload(Path(folder), options), options, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(table(measured))
    for line in targets(measured):
        console.print(line)
    if options.json:
        options.json.write_text(json.dumps(report(measured, options), indent=1))
    lengths = {tuple(iteration.lengths for iteration in of_side) for of_side in measured.values()}
    if len(lengths) > 1:
        console.print("[red]the sides sampled responses of other lengths[/]")
    return int(len(lengths) > 1)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure whole RL iterations beside TRL's GRPOTrainer.")
    parser.add_argument("overrides", nargs="*", help="key=value, of train.py stage=rl, for our side")
    parser.add_argument("--model", default="tiny", help="of conf/model")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--responses", type=int, default=8, help="to each problem")
    parser.add_argument("--updates", type=int, default=4, help="optimiser steps of an iteration")
    parser.add_argument("--median", type=int, default=48, help="of the lengths of responses, in tokens")
    parser.add_argument("--longest", type=int, default=256, help="response, in tokens")
    parser.add_argument("--iterations", type=int, default=7, help="that are measured")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def _workload(folder: Path, options: argparse.Namespace) -> Workload:
    for name in ("problems", "responses", "updates", "median", "longest", "iterations"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if options.responses < 2 or options.problems * options.responses % options.updates:
        raise ValueError("--responses must be at least 2, and --updates must divide problems x responses")
    return Workload(
        folder, options.model, options.problems, options.responses, options.updates, options.median, options.longest
    )


def _measure(names: Sequence[str], workload: Workload, options: argparse.Namespace, console: Console) -> Measured:
    workload.prepare()
    overrides = ["optimizer=adamw", *options.overrides]
    with ExitStack() as stack:
        sides = {}
        for name in names:
            sides[name] = Remote(make_side, name, workload, overrides)
            stack.callback(sides[name].close)
            console.print(sides[name].call("describe"))
        measured: Measured = {name: [] for name in names}
        for turn in range(-options.warmup, options.iterations):
            for name, side in sides.items():
                iteration = side.call("iterate")
                if turn >= 0:
                    measured[name].append(iteration)
                    console.print(f"{name}: {iteration.tokens} tokens, {iteration.cpu_s:.1f} s of CPU time")
    return measured


FIGURES: dict[str, Callable[[Iteration], float]] = {
    "sampled tokens/s": lambda i: i.tokens / _generate_cpu(i),
    "iterations an hour": lambda i: 3600 / i.cpu_s,
}


def _generate_cpu(iteration: Iteration) -> float:
    """CPU seconds of generation: its share of the wall time, of the CPU seconds of the iteration."""
    return iteration.cpu_s * iteration.phases["generate"] / iteration.wall_s


def spread(values: Sequence[float]) -> str:
    """``612 (598..640)``"""
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}..{max(values):,.0f})"


def table(measured: Measured) -> Table:
    """Figures and phases, a column for each side."""
    first = next(iter(measured.values()))[0]
    title = f"{len(first.lengths)} responses an iteration, {min(first.lengths)} to {max(first.lengths)} tokens"
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for name in measured:
        shown.add_column(name, justify="right")
    if len(measured) > 1:
        shown.add_column("ratio", justify="right")
    for figure, of in FIGURES.items():
        values = {name: [of(iteration) for iteration in of_side] for name, of_side in measured.items()}
        shown.add_row(figure, *(spread(of_side) for of_side in values.values()), *_ratio_cell(measured, of))
    for phase in PHASES:
        seconds = [statistics.median(i.phases[phase] for i in of_side) for of_side in measured.values()]
        shown.add_row(f"{phase}, s", *(f"{value:.2f}" for value in seconds))
    return shown


def ratios(measured: Measured, of: Callable[[Iteration], float]) -> list[float]:
    """Of our side to TRL, turn by turn."""
    return [of(ours) / of(theirs) for ours, theirs in zip(measured["kimivl"], measured["TRL"], strict=True)]


def _ratio_cell(measured: Measured, of: Callable[[Iteration], float]) -> list[str]:
    if len(measured) < 2:
        return []
    found = ratios(measured, of)
    return [f"{statistics.median(found):.2f} ({min(found):.2f}..{max(found):.2f})"]


def targets(measured: Measured) -> list[str]:
    """Whether our side is fast enough; nothing where TRL was not measured."""
    if len(measured) < 2:
        return []
    lines = []
    for figure, of in FIGURES.items():
        ratio = statistics.median(ratios(measured, of))
        lines.append(f"{'met' if ratio >= TARGET else 'MISSED'}: {figure} {ratio:.2f} x TRL (target {TARGET:.0f} x)")
    return lines


def report(measured: Measured, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured, as numbers."""
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    return {"settings": settings, "iterations": {n: [asdict(i) for i in of_side] for n, of_side in measured.items()}}


if __name__ == "__main__":
    sys.exit(main())
