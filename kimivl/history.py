"""``history.jsonl``: every logged figure of a run, a row for each time that it was logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows that are there in full: a run that was killed may have left half of one."""
    whole, _, _ = path.read_text().rpartition("\n") if path.is_file() else ("", "", "")
    return [json.loads(line) for line in whole.splitlines()]
