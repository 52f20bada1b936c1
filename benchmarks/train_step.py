"""Speed and memory of a training step, beside plain transformers on the same packs with the same weights.

    python benchmarks/train_step.py                                       tiny on a CPU; some minutes
    python benchmarks/train_step.py model=small --warmup 0                100M parameters, on a CPU; about an hour

Full size, on one GPU of 141 GB, with 4 packs a step; tokens/s, model TFLOP/s, MFU, peak memory and Muon's share at 8K,
32K and 128K, of text and with images, from packs in memory and through the real data path:

    python benchmarks/train_step.py model=kimi_vl_a3b trainer=gpu trainer.precision=bf16-true \\
        activation_checkpointing=full --sides ours --packs 4 --data ready,real --json a3b.json

Anything that ``train.py`` takes as key=value is taken here: model, init_from, kernels, optimizer, trainer.precision,
activation_checkpointing. Without init_from the weights are random; the router then spreads tokens nearly evenly.

**The sides**: ``ours``, and ``padded``, ``sorted`` and ``masked`` of ``benchmarks/plain.py``, where it says what plain
means. Each repeat gives all sides the same packs; on a CPU they take turns, on a GPU they run one after the other. The
learning rate is zero, so that all steps of all sides have the same weights: their losses and gradient norms are
compared, and the command fails where they differ.

**The figures**: tokens are real tokens, never padding; on a CPU the clock is CPU time. Model FLOPs are those of
``kimivl.model.flops``, without Muon's. A side for which memory does not suffice says so in its row. ``--data real``
goes through shards, index, plan and loader (``benchmarks/realistic_set.py``); its clock is the wall, with all waiting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.plain import LAYOUTS, Plain  # noqa: E402
from benchmarks.sides import Ours, Settings, Side, Window  # noqa: E402
from benchmarks.step_rows import (  # noqa: E402
    OURS,
    TOLERANCE,
    Row,
    disagreements,
    header,
    name_of,
    real_table,
    report,
    table,
    targets,
)
from benchmarks.turns import OutOfMemory, Remote  # noqa: E402

KINDS: dict[str, type[Side]] = {OURS: Ours, **dict.fromkeys(LAYOUTS, Plain)}


def make_side(kind: str, overrides: Sequence[str], data: tuple[str, int] | None) -> Side:
    """A side, in the process that calls this."""
    return KINDS[kind](Settings(overrides, data))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, show it, and write it down; 1 where sides disagree, 2 for a wrong setting."""
    options = _options(arguments)
    console = Console(width=110) if not sys.stdout.isatty() else Console()
    try:
        about, rows = _measure(options, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cpu = "parameters" in about and not about["cuda"]
    console.print(table(rows, about, cpu))
    if any(row.data == "real" for row in rows):
        console.print(real_table(rows))
    for line in targets(rows) if cpu else ():
        console.print(line)
    if options.json:
        options.json.write_text(json.dumps(report(about, rows), indent=1))
    wrong = list(disagreements(rows, TOLERANCE[about["precision"]]))
    for line in wrong:
        console.print(f"[red]{line}[/]")
    return 1 if wrong else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a training step beside plain transformers.")
    lengths = "8192,32768,131072" if torch.cuda.is_available() else "4096,8192,16384"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py; model=tiny, for example")
    parser.add_argument("--lengths", type=_numbers, default=_numbers(lengths), help=f"tokens of a pack ({lengths})")
    parser.add_argument("--content", type=_words("text", "images"), default=["text", "images"], help="text,images")
    parser.add_argument("--data", type=_words("ready", "real"), default=["ready"], help="ready,real (ready)")
    parser.add_argument("--sides", type=_words(*KINDS), default=list(KINDS), help=",".join(KINDS))
    parser.add_argument("--packs", type=_positive, default=1, help="packs of one optimiser step (%(default)s)")
    parser.add_argument("--repeats", type=_positive, default=3, help="measured steps of each side (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (%(default)s)")
    parser.add_argument("--samples", type=_positive, default=400, help="samples of the real set (%(default)s)")
    parser.add_argument("--workers", type=_positive, default=1, help="processes that load real data (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks", help="where the real set lies")
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    return parser.parse_intermixed_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _words(*known: str) -> Any:
    def read(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [word for word in chosen if word not in known]:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}, only {', '.join(known)}")
        return chosen

    return read


# Measuring


def _measure(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], list[Row]]:
    """What was measured, on what, and the rows."""
    overrides = options.overrides or ["model=kimi_vl_a3b", "trainer=gpu"] * torch.cuda.is_available()
    data = (str(options.out), options.samples) if "real" in options.data else None
    settings = Settings(overrides, data)  # wrong settings are named before processes start
    together = settings.device.type == "cpu"
    about: dict[str, Any] = {"precision": settings.precision, "cuda": not together}
    windows = [
        Window(length, content == "images", options.packs) for length in options.lengths for content in options.content
    ]
    kinds = list(dict.fromkeys(KINDS[side] for side in options.sides))
    rows: list[Row] = []
    for group in [kinds] if together else [[kind] for kind in kinds]:
        sides = [side for side in options.sides if KINDS[side] in group]
        with ExitStack() as stack:
            crew = Crew(sides, overrides, data, stack)
            if OURS in sides and not crew.failures.get(Ours):
                about |= crew.call(OURS, "about")
                console.print(header(about, overrides), highlight=False, soft_wrap=True)
            for window in windows:
                if "ready" in options.data:
                    rows += _ready_rows(crew, sides, window, options, console)
                if "real" in options.data and OURS in sides:
                    rows.append(_real_row(crew, window, options, console))
    return about, sorted(rows, key=lambda row: windows.index(row.window))


class Crew:
    """The processes of some sides. Layouts of the plain side share one; one that has died is made anew."""

    def __init__(self, sides: Sequence[str], overrides: Sequence[str], data: Any, stack: ExitStack) -> None:
        self.overrides, self.data, self.stack = overrides, data, stack
        self.processes: dict[type[Side], Remote] = {}
        self.failures: dict[type[Side], str] = {}
        for side in sides:
            self._start(side)

    def _start(self, side: str) -> None:
        kind = KINDS[side]
        if kind in self.failures or (kind in self.processes and self.processes[kind].alive):
            return
        try:
            self.processes[kind] = Remote(make_side, side, self.overrides, self.data)
        except OutOfMemory as error:
            self.failures[kind] = str(error)
        else:
            self.stack.callback(self.processes[kind].close)

    def call(self, side: str, method: str, *arguments: Any) -> Any:
        """What a method of the side returns; OutOfMemory too where the side could not even be built."""
        self._start(side)
        if reason := self.failures.get(KINDS[side]):
            raise OutOfMemory(f"model and optimiser: {reason}")
        return self.processes[KINDS[side]].call(method, *arguments)


def _ready_rows(
    crew: Crew, sides: Sequence[str], window: Window, options: argparse.Namespace, console: Console
) -> list[Row]:
    """All sides in turn, so that what else the machine does falls on all of them."""
    rows = [Row(window, side) for side in sides]
    for turn in range(-options.warmup, options.repeats):
        for row in rows:
            if row.failed:
                continue
            layout = row.side
            try:
                step = crew.call(row.side, "measure", window, layout, max(turn, 0))
            except OutOfMemory as error:
                row.failed = f"out of memory: {error}"
                console.print(f"{name_of(window)}, {row.side}: {row.failed}", soft_wrap=True)
                continue
            if turn >= 0:
                row.steps.append(step)
                console.print(f"{name_of(window)}, {row.side}: {row.rates[-1]:.0f} tokens/s, loss {step.loss:.5f}")
    return rows


def _real_row(crew: Crew, window: Window, options: argparse.Namespace, console: Console) -> Row:
    row = Row(window, OURS, "real")
    try:
        steps = crew.call(OURS, "measure_real", window, options.warmup + options.repeats, options.workers)
        row.steps = steps[options.warmup :]
        console.print(f"{name_of(window)}, real data: {statistics.median(row.rates):.0f} tokens/s")
    except OutOfMemory as error:
        row.failed = f"out of memory: {error}"
    return row


if __name__ == "__main__":
    sys.exit(main())
