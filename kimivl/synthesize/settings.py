"""Which settings the responses in OUT were asked for with: a journal of two kinds of responses is worth nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kimivl.data.build.partial import write_atomic

SETTINGS = "settings.json"


def check_settings(out: Path, settings: dict[str, Any], journal: Path, asks: bool = True) -> None:
    """Note the settings of OUT, or compare them with those that it was begun with.

    Where nothing is asked for, ``settings`` are without those of the teacher, and nothing is noted.

    Raises:
        ValueError: naming the first key that differs.
    """
    path = out / SETTINGS
    answered = journal.is_file() and journal.stat().st_size > 0
    if path.is_file() and answered:
        try:
            before = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); choose another OUT") from error
        for key in sorted(before.keys() | settings.keys() if asks else settings.keys()):
            was, now = before.get(key), settings.get(key)
            if was != now:
                raise ValueError(
                    f"OUT {out} holds responses asked for with another {key} ({_short(was)}, now {_short(now)}): go on "
                    "with its settings, or choose another OUT"
                )
    elif answered:
        raise ValueError(f"{journal} is there without {path.name}, so nobody knows what it answers; choose another OUT")
    if asks:
        write_atomic(path, settings)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
