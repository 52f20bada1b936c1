"""How many answers a second the verifiers judge, by kind of answer and number of worker processes.

    python benchmarks/rewards.py                           about two minutes on two idle cores; tens on busy ones
    python benchmarks/rewards.py --kinds integer choice --repeats 9 --json rewards.json

Each row is judged as the reward does it (``kimivl.rl.rewards``): what can be settled literally or as a number is, in
the parent; the rest goes to the workers, or with 0 of them to the same process. All answers of a row are different, so
nothing is answered from memory but the expected answers, of which there are as many as problems, 8 answers to each.
Rates are medians over the repeats with the least and the largest; the workers are up before the clock starts, and the
numbers of workers take turns. ``CPU-ms`` is processor time of the parent and its workers for one answer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kimivl.rl.verifiers import Boxes, Choice, Exact, Items, Mathematics, Numeric, Pattern, boxed  # noqa: E402
from kimivl.rl.verifiers.worker import Case  # noqa: E402
from kimivl.rl.workers import VerifierPool  # noqa: E402

RESPONSES = 8


class Kind(NamedTuple):
    """``make`` gives (the answer's text, the expected answer) for numbers drawn per problem and per response."""

    verifier: Any
    answers: int
    right: float | None
    make: Callable[[int, int], tuple[str, str]]


def _prose(number: int, answer: str) -> str:
    """An answer in a sentence of its own, so that no two texts are equal."""
    return f"Adding up step {number} of the plan above, we find that the answer is \\boxed{{{answer}}}."


KINDS = {
    "integer, equal": Kind(Mathematics(), 8000, 1, lambda p, r: (_prose(r, f"{p}"), f"{p}")),
    "integer, unequal": Kind(Mathematics(), 8000, 0, lambda p, r: (_prose(r, f"{p + r % 7 + 1}"), f"{p}")),
    "decimal, equal": Kind(Mathematics(), 8000, 1, lambda p, r: (_prose(r, f"{p}.50"), f"{p}.5")),
    "fraction, equal": Kind(
        Mathematics(), 8000, 1, lambda p, r: (_prose(r, rf"\frac{{{2 * p}}}{{14}}"), rf"\frac{{{p}}}{{7}}")
    ),
    "LaTeX, the same": Kind(
        Mathematics(), 8000, 1, lambda p, r: (_prose(r, rf"\sqrt{{{p}}}+ {p}x"), rf"\sqrt{{{p}}} + {p}x")
    ),
    "LaTeX, equal": Kind(Mathematics(), 240, 1, lambda p, r: (_prose(r, rf"x(x+{p})+{r}-{r}"), rf"x^2+{p}x")),
    "LaTeX, unequal": Kind(Mathematics(), 240, 0, lambda p, r: (_prose(r, rf"x(x+{p})+{r + 1}"), rf"x^2+{p}x")),
    "boxed": Kind(boxed, 8000, 1, lambda p, r: (_prose(r, f"{p}"), f"{p}")),
    "exact": Kind(Exact(), 4000, 1, lambda p, r: (_prose(r, rf"\text{{word {p}}}"), f"Word {p}")),
    "quantity with unit": Kind(Numeric(), 4000, 1, lambda p, r: (_prose(r, rf"{p / 100}\text{{ m}}"), f"{p} cm")),
    "choice": Kind(Choice(), 4000, 1, lambda p, r: (_prose(r, f"({'ABCD'[p % 4]})"), "ABCD"[p % 4])),
    "set": Kind(Items(), 4000, 1, lambda p, r: (_prose(r, rf"\{{{p + 1}, {p}, {p}.5\}}"), f"{p}, {p}.5, {p + 1}")),
    "box": Kind(
        Boxes(), 4000, 1, lambda p, r: (f"{r}: [{p}, {p}, {p + 90}, {p + 91}]", f"[{p}, {p}, {p + 90}, {p + 90}]")
    ),
    "regular expression": Kind(Pattern(), 4000, 1, lambda p, r: (_prose(r, f"{p} apples"), f"{p}( apples?)?")),
}


def cases_of(kind: Kind, answers: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    problems = [draw.randrange(10, 90_000) for _ in range(max(1, answers // RESPONSES))]
    cases = [Case(*kind.make(problem, seed * answers * 2 + number)) for number in range(answers)
             for problem in [problems[number % len(problems)]]]  # fmt: skip
    draw.shuffle(cases)
    return cases


def processor_seconds(pool: VerifierPool) -> float:
    """User and system time so far of this process and of the pool's workers."""
    own = os.times()
    ticks = os.sysconf("SC_CLK_TCK")
    total = own.user + own.system
    for worker in pool._pool:
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


class Timing(NamedTuple):
    rate: float
    cpu_ms: float


def measure(pool: VerifierPool, kind: Kind, cases: list[Case]) -> Timing:
    before, started = processor_seconds(pool), time.perf_counter()
    verdicts = pool.judge(cases)
    seconds, cpu = time.perf_counter() - started, processor_seconds(pool) - before
    wrong = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict.correct != kind.right]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(cases)} verdicts are not {kind.right}, the first on {wrong[0]}")
    return Timing(len(cases) / seconds, 1000 * cpu / len(cases))


def run(name: str, workers: list[int], repeats: int, share: float) -> list[dict[str, Any]]:
    kind = KINDS[name]
    answers = max(16, int(kind.answers * share))
    pools = {count: VerifierPool(kind.verifier, count, timeout=60) for count in workers}
    timings: dict[int, list[Timing]] = {count: [] for count in workers}
    for pool in pools.values():  # workers start, algebra is imported, regular expressions are compiled
        pool.judge(cases_of(kind, 16, 10_000))
        pool.judge([Case(f"\\boxed{{z+{number}}}", f"{number} + z") for number in range(8)])
    for repeat in range(repeats):
        for place, pool in enumerate(pools.values()):  # other answers each time: caches hold none of them
            timing = measure(pool, kind, cases_of(kind, answers, repeat * len(pools) + place))
            timings[pool.workers].append(timing)
    for pool in pools.values():
        pool.close()
    return [
        {
            "kind": name,
            "workers": count,
            "answers": answers,
            "answers_per_s": statistics.median(rates := [timing.rate for timing in timings[count]]),
            "least": min(rates),
            "largest": max(rates),
            "cpu_ms": statistics.median(timing.cpu_ms for timing in timings[count]),
        }
        for count in workers
    ]


def show(rows: list[dict[str, Any]], workers: list[int], console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, title="answers per second: median (least - largest)", title_justify="left")
    table.add_column("answer")
    for count in workers:
        table.add_column(f"{count} worker{'s' * (count != 1)}", justify="right")
    table.add_column("CPU-ms, " + " / ".join(map(str, workers)), justify="right")
    for name in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == name]
        rates = [f"{row['answers_per_s']:,.0f} ({row['least']:,.0f} - {row['largest']:,.0f})" for row in of_kind]
        table.add_row(name, *rates, " / ".join(f"{row['cpu_ms']:.3f}" for row in of_kind))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the answers of each kind")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        for name in arguments.kinds:
            rows += run(name, arguments.workers, arguments.repeats, arguments.share)
            rates = ", ".join(
                f"{row['answers_per_s']:,.0f}/s with {row['workers']}" for row in rows if row["kind"] == name
            )
            print(f"{name}: {rates}", file=sys.stderr, flush=True)  # on a busy machine a row can take minutes
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
    finally:  # Ctrl-C shows what there is
        if rows:
            show(rows, arguments.workers, Console(width=110))


if __name__ == "__main__":
    main()
