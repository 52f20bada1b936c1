"""The audit of an epoch: one row for each use of each sample, and what became of it.

``write_epoch_audit`` joins the delivery log with the index and the planned uses; it never reads the plan's packs, so
that a loader that strays from its plan is found. ``kimivl.data.audit.verify`` checks the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kimivl.data.audit.delivery import Deliveries, History

if TYPE_CHECKING:
    from kimivl.data.index import Index
    from kimivl.data.mixture import Uses
    from kimivl.data.plan import Plan

TRAINED, MISSING = "trained", "missing"
LEFT_OUT = ("too_long", "too_many_patches", "moved", "not_drawn")
"""Why an epoch does not use a sample: its limits (``moved``: a later phase takes it), or the mixture."""
STATUSES = (TRAINED, MISSING, *LEFT_OUT)
"""Statuses by code; reasons of holes follow."""
ROWS = 1 << 20
"""Rows of a row group."""

_NAMED = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    {
        "sample": pa.int64(),
        "key": pa.large_string(),
        "source": _NAMED,
        "tokens": pa.int32(),
        "patches": pa.int32(),
        "targets": pa.int32(),
        "uses": pa.int32(),
        "status": _NAMED,
        "pack": pa.int32(),
        "rank": pa.int32(),
        "step": pa.int32(),
    }
)
"""A sample has as many rows as uses (planned or made, whichever is more), and one where there is none. ``uses`` is the
planned number; ``pack``, ``rank`` and ``step`` are -1 where the row was not delivered; ``status`` is one of
``STATUSES`` or the reason of a hole."""


def epoch_file(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:03d}.parquet"


def write_epoch_audit(
    folder: Path,
    epoch: int,
    index: Index,
    uses: Uses,
    plan: Plan,
    *,
    max_length: int,
    max_patches: int,
) -> Path:
    """Write ``epoch-000.parquet`` of a finished epoch from the surviving delivery log; whole, or not at all.

    Args:
        uses: how often the epoch was to use each sample, apart from the limits of its packs.
        plan: for its figures only.
        max_length, max_patches: limits of a pack.
    """
    history = History(folder)
    delivered = history.epoch(epoch)
    left_out = _left_out(index, uses, max_length, max_patches)
    planned = np.where(left_out == 0, uses.count, 0).astype(np.int32)
    rows = _rows(delivered, planned, left_out)
    about = {
        "epoch": epoch,
        "samples": len(index),
        "max_length": max_length,
        "max_patches": max_patches,
        "packs": len(plan),
        "steps": plan.num_steps,
        "packs_per_step": plan.packs_per_step,
        "world_sizes": history.settings(epoch, "world_size"),
        "fill": plan.fill,
        "plan": plan.hash,
        "index": index.fingerprint,
        "index_dropped": index.dropped,
    }
    names = pa.array([*STATUSES, *delivered.reasons], pa.string())
    path = epoch_file(folder, epoch)
    partial = path.with_suffix(".partial")
    try:
        with pq.ParquetWriter(partial, SCHEMA.with_metadata({"kimivl": json.dumps(about)})) as writer:
            for table in _tables(index, rows, names):
                writer.write_table(table)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _left_out(index: Index, uses: Uses, max_length: int, max_patches: int) -> np.ndarray:
    """(N,) the code of the status that keeps each sample out of the epoch, 0 where none does."""
    conditions = {
        "moved": uses.moved > 0,
        "not_drawn": uses.count == 0,
        "too_long": index.tokens > max_length,
        "too_many_patches": index.patches > max_patches,
    }
    codes = [STATUSES.index(status) for status in conditions]
    return np.select(list(conditions.values()), codes, 0).astype(np.int32)


def _rows(delivered: Deliveries, planned: np.ndarray, left_out: np.ndarray) -> dict[str, np.ndarray]:
    """The columns that the index does not have, one entry a row, in the order of the samples.

    Worked example, two samples planned once each, of which the first was delivered twice::

        sample  0        0        1
        uses    1        1        1
        status  trained  trained  missing
    """
    # A number that is not in the index has no row; the log still has it, and the verification finds it there.
    known = (delivered.sample >= 0) & (delivered.sample < len(planned))
    sample = delivered.sample[known]
    count = np.bincount(sample, minlength=len(planned))
    rows = np.maximum(np.maximum(planned, count), 1)
    owner = np.repeat(np.arange(len(planned)), rows)
    first_row, first_delivery = np.cumsum(rows) - rows, np.cumsum(count) - count
    place = first_row[sample] + np.arange(len(sample)) - first_delivery[sample]
    columns = {"sample": owner, "uses": planned[owner]}
    status = np.where(planned > 0, STATUSES.index(MISSING), left_out)[owner]
    hole = delivered.hole[known]
    status[place] = np.where(hole >= 0, len(STATUSES) + hole, STATUSES.index(TRAINED))
    columns["status"] = status
    for name in ("pack", "rank", "step"):
        columns[name] = np.full(len(owner), -1, np.int32)
        columns[name][place] = getattr(delivered, name)[known]
    return columns


def _tables(index: Index, rows: dict[str, np.ndarray], statuses: pa.Array) -> Iterator[pa.Table]:
    """The audit in row groups; keys and columns of the index are looked up for one at a time."""
    keys, sources = index.keys(), pa.array(index.sources, pa.string())
    for start in range(0, len(rows["sample"]), ROWS):
        part = {name: values[start : start + ROWS] for name, values in rows.items()}
        sample = part["sample"]
        part |= {name: getattr(index, name)[sample] for name in ("tokens", "patches", "targets")}
        named: dict[str, Any] = {
            "key": keys.take(pa.array(sample)),
            "source": _by_name(index.source[sample], sources),
            "status": _by_name(part["status"], statuses),
        }
        yield pa.Table.from_pydict(part | named, SCHEMA)


def _by_name(codes: np.ndarray, names: pa.Array) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), names)
