"""The points of a sweep: what varies between them, and the folder of each one's run.

A folder is named by the values that vary, so a point has the same one whenever it is asked for again, by a grid that
has grown or by a study that goes on. Names are such that Hydra takes them in a value: ``init_from=.../seed-1/model``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kimivl.config import METRICS_FILE, RUN_FILE
from kimivl.runtime.lock import is_alive

OVERRIDES_FILE = Path(".hydra") / "overrides.yaml"
"""In the folder of a run: what Hydra was told for it."""

_LONGEST = 120
MAY_DIFFER = {
    "callbacks",
    "logger",
    # What runs out of memory, or lacks a kernel on another machine, goes on with others: equal up to rounding.
    "activation_checkpointing",
    "module.activation_checkpointing",
    "kernels",
    "module.kernels",
    "test",
    "data.num_workers",
    "data.max_dropped",
    "data.cache",
    "data.cache_gb",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "strategy",  # the group, which sets trainer.strategy
    "trainer.log_every_n_steps",
    "trainer.check_val_every_n_epoch",
}
_SERVICES = {
    "rollout": "max_rows prefill_tokens kv_cache_gb enforce_eager sleep url in_flight timeout retries backoff sync_dir "
    "sync_timeout",
    "reward": "workers timeout memory_gb",
}
"""Where and with what means responses are drawn and judged, not which or how."""
MAY_DIFFER |= {
    f"{owner}{group}.{key}" for group, keys in _SERVICES.items() for key in keys.split() for owner in ("", "module.")
}
"""Keys, with what lies below them, that make no other run and no other point."""


def key_of(override: str) -> str:
    """``+reward.length.weight=0.2`` -> ``reward.length.weight``; ``~logger`` -> ``logger``."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def value_of(override: str) -> str:
    """``weight=0.2`` -> ``0.2``; ``1.0`` is the point ``1``."""
    return re.sub(r"^(-?\d+)\.0$", r"\1", _typed(override), flags=re.ASCII)


def _typed(override: str) -> str:
    return override.partition("=")[2]


def folder_of(sweep: Path, overrides: Sequence[str], fixed: Sequence[str] = ()) -> Path:
    """The folder of a point, there or not. One that was named by a number as it was typed keeps its name."""
    typed = sweep / folder_name(overrides, fixed, _typed)
    return typed if typed.is_dir() else sweep / folder_name(overrides, fixed)


def folder_name(overrides: Iterable[str], fixed: Iterable[str] = (), value: Callable[[str], str] = value_of) -> str:
    """The folder of a point: ``["stage=rl", "weight=0.2", "seed=1"]`` with ``stage`` fixed -> ``seed-1_weight-0.2``."""
    without = set(fixed)
    varied = sorted(f"{key_of(one)}-{value(one)}" for one in overrides if key_of(one) not in without)
    exact = "_".join(varied) or "0"
    name = re.sub(r"[^\w.+-]+", "-", exact, flags=re.ASCII).strip("-")[:_LONGEST]
    return name if name == exact else f"{name}-{hashlib.sha256(exact.encode()).hexdigest()[:6]}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, or one that was cut short."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_overrides(folder: Path) -> list[str] | None:
    """What the run in ``folder`` was told; None where no run has begun."""
    try:
        found = yaml.safe_load((folder / OVERRIDES_FILE).read_text())
    except (OSError, yaml.YAMLError):
        return None
    return [str(override) for override in found] if isinstance(found, list) else None


def finished_metric(folder: Path, overrides: Sequence[str]) -> tuple[bool, float | None]:
    """Whether the run in ``folder`` has finished, and the metric that it returned.

    Raises:
        ValueError: when it was told something else than ``overrides``.
    """
    run = read_json(folder / RUN_FILE)
    metrics = read_json(folder / METRICS_FILE)
    if run.get("status") != "finished" or not metrics:
        return False, None
    before, now = (by_key(found) for found in (read_overrides(folder) or overrides, overrides))
    if key := first_difference(before, now):
        raise ValueError(
            f"{folder} holds a finished run with {spell(before, key)}, and this sweep has {spell(now, key)}: "
            f"give it a folder of its own with hydra.sweep.dir=FOLDER, or remove {folder.parent}"
        )
    return True, metrics.get(run.get("config", {}).get("optimized_metric", ""))


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """The values of overrides; a later one holds."""
    return {key_of(override): value_of(override) for override in overrides}


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key in which two sets of overrides differ, apart from those that make no other point."""
    return next(
        (key for key in sorted(before.keys() | now.keys()) if matters(key) and before.get(key) != now.get(key)), None
    )


def matters(key: str) -> bool:
    """Whether another value of ``key`` is another point."""
    return not any(key == other or key.startswith(f"{other}.") for other in MAY_DIFFER)


def spell(overrides: Mapping[str, Any], key: str) -> str:
    return f"{key}={overrides[key]}" if key in overrides else f"no {key}"


def has_diverged(reason: str) -> bool:
    """Whether a run failed of its settings: of numbers that ceased to be finite, and not of the machine."""
    return re.search(r"\b(nan|inf|not finite|diverged)\b", reason, re.IGNORECASE) is not None


def note_failure(folder: Path, overrides: Sequence[str], reason: str) -> None:
    """Say in ``run.json`` why a run has no result, where the run itself could not: it was killed, or never began."""
    run = read_json(folder / RUN_FILE)
    status = run.get("status")
    if status in ("finished", "interrupted") or status == "failed" and run.get("error") or is_alive(folder):
        return
    if read_overrides(folder) is None:
        (folder / OVERRIDES_FILE).parent.mkdir(parents=True, exist_ok=True)
        (folder / OVERRIDES_FILE).write_text(yaml.safe_dump(list(overrides)))
    part = folder / f".{RUN_FILE}.{os.getpid()}"
    part.write_text(json.dumps({"config": {}} | run | {"status": "failed", "error": reason}, indent=2) + "\n")
    part.replace(folder / RUN_FILE)
