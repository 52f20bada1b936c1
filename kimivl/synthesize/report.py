"""What became of every response: figures, and a table in the terminal."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from kimivl.synthesize.sift import Outcome

BINS = 24


def summarise(
    outcomes: Sequence[Outcome], behaviours: Sequence[str], wanted: int, failed: Counter[str]
) -> dict[str, Any]:
    """The report as JSON takes it. Shares of behaviours are those among right traces, kept or not."""
    kept = [outcome for outcome in outcomes if outcome.reason is None]
    right = [outcome for outcome in outcomes if outcome.correct == 1]
    reasons = Counter(outcome.reason for outcome in outcomes if outcome.reason is not None)
    rates = _pass_rates(outcomes)
    return {
        "wanted": wanted,
        "answered": len(outcomes),
        "failed": dict(failed),
        "right": len(right),
        "kept": len(kept),
        "retention": len(kept) / len(outcomes),
        "rejected": dict(reasons.most_common()),
        "problems": len(rates),
        "problems_kept": len({outcome.place[0] for outcome in kept}),
        "pass_rate": {
            "mean": float(np.mean([right / count for right, count, _ in rates.values()])),
            "never": sum(right == 0 for right, _, _ in rates.values()),
            "always": sum(right == count for right, count, _ in rates.values()),
        },
        "tokens": {"kept": _lengths(kept), "right": _lengths(right), "histogram": _histogram(right)},
        "by_prompt": _by(outcomes, lambda outcome: outcome.prompt, behaviours),
        "by_source": _by(outcomes, lambda outcome: outcome.source or "(none)", behaviours),
        "pass_rate_by_problem": {
            key: {"right": right, "answered": count, "kept": chosen} for key, (right, count, chosen) in rates.items()
        },
    }


def _pass_rates(outcomes: Iterable[Outcome]) -> dict[str, tuple[int, int, int]]:
    """Problem -> right, answered and kept responses."""
    counts: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for outcome in outcomes:
        row = counts[outcome.place[0], outcome.key]
        row[0] += outcome.correct == 1
        row[1] += 1
        row[2] += outcome.reason is None
    twice = Counter(key for _, key in counts)
    return {
        f"{key}~{number}" if twice[key] > 1 else key: (row[0], row[1], row[2]) for (number, key), row in counts.items()
    }


def _lengths(outcomes: Sequence[Outcome]) -> dict[str, float]:
    if not outcomes:
        return {}
    tokens = np.array([outcome.tokens for outcome in outcomes])
    return {
        "mean": float(tokens.mean()),
        "p50": float(np.median(tokens)),
        "p95": float(np.percentile(tokens, 95)),
        "max": int(tokens.max()),
        "thinking_mean": float(np.mean([outcome.thinking for outcome in outcomes])),
        "answer_mean": float(np.mean([outcome.answer for outcome in outcomes])),
    }


def _histogram(right: Sequence[Outcome]) -> dict[str, list[float]]:
    """Right traces, and the kept ones among them, by length; the steps grow with it where lengths differ widely."""
    if not right:
        return {}
    tokens = np.array([outcome.tokens for outcome in right])
    chosen = np.array([outcome.reason is None for outcome in right])
    low, high = float(tokens.min()), float(tokens.max()) + 1
    wide = high > 20 * max(low, 1.0)
    edges = np.geomspace(max(low, 1.0), high, BINS + 1) if wide else np.linspace(low, high, BINS + 1)
    return {
        "edges": edges.tolist(),
        "right": np.histogram(tokens, edges)[0].tolist(),
        "kept": np.histogram(tokens[chosen], edges)[0].tolist(),
    }


def _by(
    outcomes: Iterable[Outcome], group: Callable[[Outcome], str], behaviours: Sequence[str]
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[group(outcome)].append(outcome)
    rows: dict[str, dict[str, Any]] = {}
    for name, members in sorted(groups.items()):
        right = [outcome for outcome in members if outcome.correct == 1]
        rows[name] = {
            "answered": len(members),
            "right": len(right),
            "kept": sum(outcome.reason is None for outcome in members),
            "tokens": float(np.mean([outcome.tokens for outcome in right])) if right else None,
            "behaviours": {
                behaviour: sum(outcome.shown.get(behaviour, False) for outcome in right) / len(right) if right else None
                for behaviour in behaviours
            },
        }
    return rows


def print_report(report: dict[str, Any], out: Path, console: Console) -> None:
    """The table of prompts and sources, and where everything went."""
    for title, group in (("prompt", report["by_prompt"]), ("source", report["by_source"])):
        if title == "prompt" or len(group) > 1:
            console.print(_table(title, group))
    reasons = "  ".join(f"{reason} {count:,}" for reason, count in report["rejected"].items())
    say = [
        f"kept {report['kept']:,} of {report['answered']:,} responses ({report['retention']:.1%}), "
        f"{report['right']:,} right, for {report['problems_kept']:,} of {report['problems']:,} problems",
        f"left out: {reasons or 'none'}",
    ]
    if missing := report["wanted"] - report["answered"]:
        failed = ", ".join(f"{reason} {count:,}" for reason, count in report["failed"].items())
        why = f" (failed now: {failed}; see failed.jsonl)" if failed else ""
        say.append(f"not answered: {missing:,}{why}; type the command again to ask for them")
    if report["kept"]:
        say.append(f"samples: {out}/long_cot-*.tar   train on them: python train.py stage=long_cot data.shards={out}")
    else:
        say.append("no trace was kept, so there are no shards; rejected.jsonl has each with its reason")
    say.append(f"picture: {out / 'report.png'}   figures: {out / 'report.json'}")
    for line in say:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _table(title: str, group: dict[str, dict[str, Any]]) -> Table:
    caption = f"Responses by {title}; tokens and behaviours of the right ones"
    table = Table(title=caption, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column(title)
    names = list(next(iter(group.values()))["behaviours"])
    for heading in ("asked", "right", "kept", "tokens", *names):
        table.add_column(heading, justify="right")
    for name, row in group.items():
        tokens = "-" if row["tokens"] is None else f"{row['tokens']:,.0f}"
        shares = (
            "-" if (share := row["behaviours"][b]) is None or math.isnan(share) else f"{share:.0%}" for b in names
        )
        table.add_row(name, f"{row['answered']:,}", f"{row['right']:,}", f"{row['kept']:,}", tokens, *shares)
    return table
