"""What an index says, as tables for a terminal."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from kimivl.data.index import Index

PERCENTILES = (50, 90, 99, 100)


def print_index(index: Index, console: Console) -> None:
    """Totals, one line per source, the lengths, and what was left out."""
    table = Table(
        title=f"{len(index):,} samples in {len(index.shards):,} {'shard' if len(index.shards) == 1 else 'shards'}",
        title_justify="left",
    )
    table.add_column("source")
    for column in ("samples", "tokens", "supervised", "images", "patches"):
        table.add_column(column, justify="right")
    for code, source in enumerate(index.sources):
        table.add_row(source or "(none)", *_totals(index, index.source == code))
    if len(index.sources) > 1:
        table.add_section()
        table.add_row("all", *_totals(index, np.ones(len(index), bool)))
    console.print(table)
    lengths = np.percentile(index.tokens, PERCENTILES, method="nearest")
    said = [f"{length:,} ({percent}%)" for percent, length in zip(PERCENTILES, lengths, strict=True)]
    console.print("tokens of a sample, up to: " + ", ".join(said), highlight=False)
    for reason, count in index.dropped.items():
        console.print(f"dropped: {count:,} {reason}, listed in {index.dropped_file}", highlight=False, soft_wrap=True)
    console.print(f"index: {index.path}", highlight=False, soft_wrap=True)


def _totals(index: Index, chosen: np.ndarray) -> list[str]:
    columns = (index.tokens, index.targets, index.images, index.patches)
    return [f"{np.count_nonzero(chosen):,}", *(f"{int(column[chosen].sum(dtype=np.int64)):,}" for column in columns)]
