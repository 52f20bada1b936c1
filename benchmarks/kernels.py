"""Attention, experts, loss and Muon: time, memory and exactness of each kernel beside the plain version.

    python benchmarks/kernels.py                             small, on a CPU, float32; about two minutes
    python benchmarks/kernels.py --only loss --repeats 5     one part

Full size, on a GPU, in bfloat16: one layer of Kimi-VL-A3B at 32K tokens (16K supervised positions in the loss), every
kernel that runs there; milliseconds forward and backward, peak memory beyond the inputs, and the difference:

    python benchmarks/kernels.py --full --json kernels.json

Versions take turns, and the plain one comes first (``benchmarks/kernel_cases.py``). A difference is the largest of all
elements of the result and all gradients, each relative to the largest element of the plain version's; the command fails
where one is beyond the limit. What the memory does not suffice for, and what breaks (which fails the command too), says
so in its row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.device import Clock, PeakMemory, describe, is_out_of_memory, release  # noqa: E402
from benchmarks.kernel_cases import CASES, Case, Version  # noqa: E402

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Differences that rounding explains; bfloat16 has 8 bits."""
MUON_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Newton-Schulz in bfloat16 magnifies the rounding of small singular values."""

OUT_OF_MEMORY = "out of memory"


@dataclass
class Row:
    """One version of one case. ``bytes`` is the peak beyond what was there before."""

    case: str
    size: str
    version: str
    seconds: list[float] = field(default_factory=list)
    bytes: int = 0
    difference: float | None = None
    failed: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, show it, and write it down; 1 where a difference is too large."""
    options = _options(arguments)
    console = Console(width=110) if not sys.stdout.isatty() else Console()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    about = describe(device) | {"dtype": str(dtype)}
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False, soft_wrap=True)
    rows: list[Row] = []
    for part in options.only:
        for case in _cases(part, device, dtype, options.full):
            console.print(f"{case.name}: {case.size}", highlight=False)
            for kernel, reason in case.missing.items():
                console.print(f"  without {kernel}: {reason.partition('; use')[0]}", highlight=False, soft_wrap=True)
            rows += _measure(case, device, options.repeats)
            del case
    console.print(_table(rows, device))
    if options.json:
        options.json.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1))
    wrong = [row for row in rows if row.difference is not None and not row.difference <= _limit(row, dtype)]
    for row in wrong:
        console.print(f"[red]{row.case}, {row.version}: {row.difference:.1e} is more than rounding explains[/]")
    broken = any(row.failed not in (None, OUT_OF_MEMORY) for row in rows)
    return 1 if wrong or broken else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the kernels beside their plain versions.")
    parser.add_argument("--full", action="store_true", help="the sizes of Kimi-VL-A3B; for a GPU")
    parser.add_argument("--cpu", action="store_true", help="on the CPU even where there is a GPU")
    parser.add_argument("--only", default=",".join(CASES), help="parts out of %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="measured calls of each version (%(default)s)")
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := [part for part in options.only if part not in CASES]:
        parser.error(f"--only: there is no part {unknown[0]!r}, only {', '.join(CASES)}")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def _cases(part: str, device: torch.device, dtype: torch.dtype, full: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    yield from CASES[part](device, dtype, full)


def _limit(row: Row, dtype: torch.dtype) -> float:
    return (MUON_LIMITS if row.case == "muon" else LIMITS)[dtype]


def _measure(case: Case, device: torch.device, repeats: int) -> list[Row]:
    """Each version once for its result and its memory, then all in turn for their time."""
    rows = {name: Row(case.name, case.size, name) for name in case.versions}
    expected: list[Tensor] | None = None
    for name, version in case.versions.items():
        found = _first(rows[name], version, device)
        if found is not None and expected is not None:
            rows[name].difference = max(map(_difference, found, expected))
        if name == next(iter(case.versions)):
            expected = found
        del found
    del expected
    clock = Clock(device)
    for _ in range(repeats):
        for name, version in case.versions.items():
            if rows[name].failed is None:
                clock.lap()
                version()
                rows[name].seconds.append(clock.lap())
    return list(rows.values())


def _first(row: Row, version: Version, device: torch.device) -> list[Tensor] | None:
    """The result of the first call, whose memory is measured; None where it failed: the others run nevertheless."""
    memory = PeakMemory(device)
    try:
        found = version()
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        row.failed = OUT_OF_MEMORY if is_out_of_memory(error) else f"{type(error).__name__}: {first_line}"
        found = None
    read = memory.read()
    row.bytes = read["peak"] - read["before"]
    release()
    return found


def _difference(found: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().float().clamp(min=1e-30)
    return float((found.float() - expected.float()).abs().max() / scale)


def _table(rows: list[Row], device: torch.device) -> Table:
    clock = "CPU time" if device.type == "cpu" else "time"
    table = Table(title=f"Forward and backward, {clock}: median (min..max)", box=SIMPLE_HEAD)
    for column in ("part", "version"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "faster than plain", "peak MB", "of plain", "differs by"):
        table.add_column(column, justify="right")
    plain: Row | None = None
    for row in rows:
        first = plain is None or plain.case != row.case
        plain = row if first or plain is None else plain
        table.add_row(row.case if first else "", row.version, *_cells(row, plain))
    return table


def _cells(row: Row, plain: Row) -> list[Any]:
    if row.failed:
        return [row.failed]
    cells = [_spread([1000 * seconds for seconds in row.seconds], 1)]
    if plain is row or plain.failed:
        return [*cells, "", f"{row.bytes / 1e6:,.0f}"]
    ratios = [theirs / mine for mine, theirs in zip(row.seconds, plain.seconds, strict=True)]
    share = f"1/{plain.bytes / row.bytes:.1f}" if row.bytes else "-"
    return [*cells, _spread(ratios, 2), f"{row.bytes / 1e6:,.0f}", share, f"{row.difference:.0e}"]


def _spread(values: Sequence[float], digits: int) -> str:
    """Median (min..max)."""
    middle = statistics.median(values)
    return f"{middle:,.{digits}f} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
