"""What ``kimivl assess`` has found out about problems: a file beside the shards, joined to an index as columns.

``assessed.jsonl`` has a line that says who assessed and how, then one line per problem. A problem is known by its key
and by the checksum of its bytes, so the file serves any set of shards in its folder, and a changed problem counts as
not assessed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kimivl.data.index import Index

log = logging.getLogger(__name__)
FORMAT = 1
NOT_NUMBER = float("nan")


def assessed_file(index: Index) -> Path:
    """Where the assessment of an index lies: beside it, and so beside the shards where that place can be written."""
    return index.path.parent / "assessed.jsonl"


def read_assessed(path: Path) -> tuple[dict[str, Any], dict[tuple[str, int], dict[str, Any]]]:
    """What a file says about the assessment, and its lines by key and checksum; of two such lines the later holds.

    A last line that was cut off while it was written is left out; a file without a whole line says nothing.

    Raises:
        ValueError: when the file is not of this kind.
    """
    lines = list(_objects(path))
    if not lines:
        return {}, {}
    if lines[0].get("format") != FORMAT:
        raise ValueError(f"{path} is not what kimivl assess writes; remove it, and assess the problems again")
    return lines[0], {(row["key"], row["crc32"]): row for row in lines[1:]}


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON ({error}); remove that line") from error


def read_columns(index: Index) -> dict[str, np.ndarray]:
    """(N,) each: ``pass_rate`` and ``easy_to_hack`` (float, NaN where not assessed), ``answer_kind`` (text, or empty).

    Empty where nothing has been assessed.
    """
    path = assessed_file(index)
    if not path.is_file():
        return {}
    about, rows = read_assessed(path)
    rate, hack = np.full(len(index), np.nan), np.full(len(index), np.nan)
    kind = np.full(len(index), "", "U16")
    for number, key in enumerate(index.keys().to_pylist()):
        row = rows.get((key, int(index.crc32[number])))
        if row is not None:
            rate[number] = NOT_NUMBER if row["pass_rate"] is None else row["pass_rate"]
            hack[number] = NOT_NUMBER if row["easy_to_hack"] is None else row["easy_to_hack"]
            kind[number] = row["answer_kind"]
    known = int((kind != "").sum())
    if not known:
        return {}
    log.info("%s: %d of %d problems were assessed with %s", path, known, len(index), about["model"])
    return {"pass_rate": rate, "easy_to_hack": hack, "answer_kind": kind}
