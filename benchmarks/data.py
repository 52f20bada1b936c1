"""The figures of the data layer, beside other loaders on the same shards and the same machine.

    python benchmarks/data.py                                everything; some 40 minutes on two cores
    python benchmarks/data.py --only fill,balance,plan       single parts, in seconds
    python benchmarks/data.py --only speed --samples 1000 --repeats 1 --json speed.json

Parts: ``speed`` (samples per CPU-second against the peers), ``fill`` and ``balance`` of packs, ``plan`` (of ten million
samples), ``resume``, ``memory`` (of workers). Every measurement runs in a process of its own, one at a time.

**The set** (``benchmarks/realistic_set.py``) is made once, under ``--out``: by default 4,000 samples, 5,600 photographs
of 224 to 2,000 pixels, lognormal texts of which the text-only samples hold about half of all tokens, 32 plain
WebDataset shards, and a tokenizer of 32,768 ranks in the official format.

**The sides of** ``speed`` (``benchmarks/throughput.py``, ``benchmarks/peers``): kimivl's loader, megatron-energon,
plain webdataset with a look-ahead packer, and Hugging Face datasets with TRL's packing (texts alone: TRL refuses to
pack images); all make packs of 32K tokens by one worker. A peer that is not installed is left out with a line; try

    pip install megatron-energon webdataset datasets trl

energon and webdataset are given kimivl's own encoder of chats and images (simplejpeg, uint8 patches), with the
tokenizer of transformers, as their users have it, and once more with kimivl's way to tiktoken: then the ratio is that
of the loaders and no more. "PIL / float32" is kimivl's index and plan with the images of transformers' processors.
What each library must prepare once (our index, energon's metadata, the Arrow copy) is not counted. Sides take turns;
the table has medians and (min..max).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.realistic_set import realistic_set  # noqa: E402
from benchmarks.throughput import SIDES  # noqa: E402

MODES = {False: "no decoding", True: "decoding"}
MEGABYTE, GIGABYTE = 10**6, 10**9
Runs = dict[str, dict[str, list[dict[str, Any]]]]
"""Side -> mode -> its runs."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table; ``met`` is None where no target is set."""

    name: str
    value: str
    target: str
    met: bool | None
    how: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, show it, and write it down."""
    options = _options(arguments)
    console = Console(width=110) if not sys.stdout.isatty() else Console()
    data = realistic_set(options.out, options.samples)
    console.print(
        f"set: {data.samples} samples, {data.images} photographs, {data.image_bytes / GIGABYTE:.2f} GB, "
        f"{data.megapixels:.0f} megapixels, in {data.folder}"
    )
    runs: Runs = {}
    figures: list[Figure] = []
    for part in options.only:
        if part == "speed":
            runs = _speed(options, console)
            console.print(_speed_table(runs))
            figures += _ratios(runs)
        else:
            figures += PARTS[part](options)
    console.print(_figure_table(figures))
    if options.json:
        report = {"set": asdict(data), "speed": runs, "figures": [asdict(figure) for figure in figures]}
        options.json.write_text(json.dumps(report, indent=1, default=str))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the data layer beside other loaders.")
    parser.add_argument("--samples", type=int, default=4000, help="samples of the set (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (%(default)s)")
    parser.add_argument("--plan-samples", type=int, default=10_000_000, help="samples that are planned (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks", help="where the set lies")
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    names = ["speed", *PARTS]
    parser.add_argument("--only", default=",".join(names), help="parts out of %(default)s")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(names):
        parser.error(f"--only: there is no part {sorted(unknown)[0]!r}, only {', '.join(names)}")
    return options


def _process(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module in a fresh process on one thread, and read the JSON of its last line."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _figure(name: str, **arguments: Any) -> dict[str, Any]:
    return _process("benchmarks.figures", name, json.dumps(arguments))


# Speed


def _speed(options: argparse.Namespace, console: Console) -> Runs:
    """All sides in turn, so that what else the machine does falls on all of them."""
    sides = {name: side for name, side in SIDES.items() if _installed(name, side.needs, console)}
    runs: Runs = {name: {MODES[mode]: [] for mode in side.modes} for name, side in sides.items()}
    for repeat in range(options.repeats):
        for name, side in sides.items():
            for mode in side.modes:
                arguments = (name, str(options.out), str(options.samples), "decode" if mode else "headers")
                run = _process("benchmarks.throughput", *arguments)
                runs[name][MODES[mode]].append(run)
                rate = run["samples"] / run["cpu_s"]
                console.print(f"run {repeat + 1}: {name}, {MODES[mode]}: {rate:.1f} samples per CPU-second")
    return runs


def _installed(name: str, needs: tuple[str, ...], console: Console) -> bool:
    installed = {distribution.name.lower() for distribution in distributions()}
    missing = [package for package in needs if package not in installed]
    if missing:
        console.print(f"{name} is left out: {', '.join(missing)} is not installed")
    return not missing


def _rates(runs: Runs, side: str, mode: str, unit: str = "samples") -> list[float]:
    return [run[unit] / run["cpu_s"] for run in runs.get(side, {}).get(mode, [])]


def _spread(values: list[float], digits: int = 0) -> str:
    """Median (min..max)."""
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def _speed_table(runs: Runs) -> Table:
    table = Table(title="Packs of 32K tokens by one worker, per CPU-second: median (min..max)")
    table.add_column("loader", no_wrap=True)
    for mode in MODES.values():
        table.add_column(f"samples,\n{mode}", justify="right")
        table.add_column(f"1000 tokens,\n{mode}", justify="right")
    table.add_column("fill of\npacks", justify="right")
    for name, modes in runs.items():
        cells = []
        for mode in MODES.values():
            cells.append(_spread(_rates(runs, name, mode), 1 if mode == "decoding" else 0))
            cells.append(_spread([rate / 1000 for rate in _rates(runs, name, mode, "tokens")]))
        last = next(runs[-1] for runs in modes.values())
        cells.append(f"{last['tokens'] / last['packs'] / 32_768:.1%}")
        table.add_row(name, *cells)
    return table


def _ratios(runs: Runs) -> Iterator[Figure]:
    """How many times as fast as the peers we are."""
    for peer, mode, target in (
        ("energon", "no decoding", 2.0),
        ("energon, tiktoken", "no decoding", 2.0),
        ("webdataset", "no decoding", 1.8),
        ("webdataset, tiktoken", "no decoding", 1.8),
        ("datasets + TRL", "no decoding", None),
        ("energon", "decoding", 1.1),
        ("energon, tiktoken", "decoding", 1.1),
        ("webdataset", "decoding", None),
        ("webdataset, tiktoken", "decoding", None),
        ("PIL / float32", "decoding", 2.5),
    ):
        ours, theirs = _rates(runs, "kimivl", mode), _rates(runs, peer, mode)
        if theirs:
            ratio = statistics.median(ours) / statistics.median(theirs)
            pairs = [mine / other for mine, other in zip(ours, theirs, strict=True)]
            yield Figure(
                f"{mode}, against {peer}",
                f"{ratio:.2f}x ({min(pairs):.2f}..{max(pairs):.2f})",
                f">= {target}x" if target else "-",
                ratio >= target if target else None,
                f"{len(pairs)} runs in turn",
            )


# The other figures


def _fill(options: argparse.Namespace) -> Iterator[Figure]:
    for length in (32_768, 131_072):
        found = _figure("fill", max_length=length, samples=1_000_000)
        yield Figure(
            f"fill of packs at {length // 1024}K",
            f"{found['fill']:.3%}",
            ">= 99.9%",
            found["fill"] >= 0.999 and found["packs"] >= 1000,
            f"{found['packs']} packs, 8 a step, of 1,000,000 synthetic samples",
        )


def _balance(options: argparse.Namespace) -> Iterator[Figure]:
    for ranks, target in ((8, 0.99), (64, 0.98)):
        found = _figure("balance", ranks=ranks, samples=1_000_000)
        yield Figure(
            f"cost balance at 128K, {ranks} ranks",
            f"{found['mean']:.4f}",
            f">= {target}",
            found["mean"] >= target,
            f"FLOPs, mean / max over ranks, {found['steps']} steps; worst {found['worst']:.3f}",
        )


def _plan(options: argparse.Namespace) -> Iterator[Figure]:
    found = _figure("plan", samples=options.plan_samples)
    how = f"{options.plan_samples:,} samples, {found['packs']:,} packs of 32K"
    yield Figure("plan: CPU", f"{found['cpu_s']:.1f} s", "<= 12 s", found["cpu_s"] <= 12, how)
    memory = found["bytes"] / GIGABYTE
    yield Figure("plan: memory", f"{memory:.2f} GB", "<= 1 GB", memory <= 1, "peak beyond the index's columns")


def _resume(options: argparse.Namespace) -> Iterator[Figure]:
    runs = [_figure("resume", folder=str(options.out), samples=options.samples) for _ in range(options.repeats)]
    seconds = [run["seconds"] for run in runs]
    how = (
        f"beyond the pack's own {statistics.median(run['pack_s'] for run in runs):.2f} s; one worker, half an epoch in"
    )
    yield Figure("resume to the first pack", f"{_spread(seconds, 2)} s", "<= 1 s", max(seconds) <= 1, how)
    whole = [run["from_files_s"] for run in runs]
    yield Figure("  with index and plan", f"{_spread(whole, 2)} s", "-", None, "opened and made anew")
    state = runs[0]["state_bytes"]
    yield Figure("resume: state", f"{state} bytes", "< 1 KB", state < 1000, "plan's hash, epoch, step; pickled")


def _memory(options: argparse.Namespace) -> Iterator[Figure]:
    for times in (1, 4):
        found = _figure("memory", folder=str(options.out), samples=options.samples, times=times)
        limit = 3 * found["pack_bytes"] + 300 * MEGABYTE
        yield Figure(
            f"memory of a worker, set x{times}",
            f"{found['bytes'] / MEGABYTE:.0f} MB",
            f"<= {limit / MEGABYTE:.0f} MB",
            found["bytes"] <= limit,
            f"private, {found['packs']} packs of 128K; 3 x {found['pack_bytes'] / MEGABYTE:.0f} MB in uint8 + 300 MB",
        )


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Figure]]] = {
    "fill": _fill,
    "balance": _balance,
    "plan": _plan,
    "resume": _resume,
    "memory": _memory,
}


def _figure_table(figures: list[Figure]) -> Table:
    table = Table(title="Figures and targets")
    for column in ("figure", "measured", "target", "met", "how"):
        table.add_column(column)
    marks = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}
    for figure in figures:
        table.add_row(figure.name, figure.value, figure.target, marks[figure.met], figure.how)
    return table


if __name__ == "__main__":
    main()
