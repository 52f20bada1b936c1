"""What a run goes on from, and whether it can: asked before anything is built."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kimivl import tracking
from kimivl.checkpoint import LAST, remove, resume_path
from kimivl.checkpoint_folder import REST, read_rest
from kimivl.config import AUDIT, METRICS_FILE
from kimivl.sweep.points import MAY_DIFFER

log = logging.getLogger(__name__)

# The packs of a step may be dealt to other ranks; the datamodules check that they are the same packs.
_MAY_DIFFER = MAY_DIFFER | {"ckpt_path", "trainer.accumulate_grad_batches"}
"""Keys that a run may change when it goes on from its own checkpoint."""
_OF_A_FOLDER = ("paths.", "name", "module.", "init_from")
"""Of the settings in which a run differs from one in another folder: what is no news, or is said under another key."""


def done_before(output_dir: Path, config: dict[str, Any]) -> dict[str, float]:
    """The figures of a job of a sweep that has finished in this folder; empty where none has."""
    before, metrics = _read_run(output_dir), output_dir / METRICS_FILE
    if before.get("status") != "finished" or not metrics.is_file():
        return {}
    for key, how in _differing(before["config"], config):
        raise ValueError(
            f"{output_dir} holds a finished run with another {key} ({how}); give the sweep a folder of its own with "
            f"hydra.sweep.dir=FOLDER, or remove {output_dir}"
        )
    return json.loads(metrics.read_text())


def begin(output_dir: Path, ckpt_path: str | None, config: dict[str, Any]) -> Path | None:
    """What to go on from; the folder is made ready for it, and says that the run is running."""
    resume = _resume(output_dir, ckpt_path, config)
    own = resume is not None and _is_own(resume, output_dir)
    # Before run.json says that a run is unfinished here: should this one end at once, the next would take them for its.
    for file in (METRICS_FILE, *(() if own else (LAST,))):
        remove(output_dir / file)  # an earlier run's, which this one does not go on from
    tracking.begin_run(output_dir, config, own)
    if not own:
        shutil.rmtree(output_dir / AUDIT, ignore_errors=True)
        if resume is not None and (elsewhere := resume.parents[1] / AUDIT).is_dir():
            shutil.copytree(elsewhere, output_dir / AUDIT)  # the proof goes on where that run's steps end
    return resume


def _resume(output_dir: Path, ckpt_path: str | None, config: dict[str, Any]) -> Path | None:
    """What to go on from. A run of this folder goes on only with the settings that it began with; a checkpoint of
    another folder may begin a run with others, which are then said."""
    before = _read_run(output_dir)
    unfinished = before.get("status") in ("running", "interrupted", "failed")
    resume = resume_path(output_dir, ckpt_path, unfinished)
    if resume is None:
        return None
    here = _is_own(resume, output_dir)
    check_checkpoint(resume, here and unfinished, config["stage"])
    came_from = before if here else _read_run(resume.parents[1])
    differing = _differing(came_from.get("config", config), config)
    if here and differing:
        key, how = differing[0]
        anew = (
            f"remove {resume} to start anew"
            if unfinished
            else f"begin another run from its model, with init_from={output_dir / 'model'} name=NAME"
        )
        raise ValueError(
            f"{output_dir} holds {'an unfinished' if unfinished else 'a finished'} run with another {key} ({how}); "
            f"go on with its settings, or {anew}"
        )
    log.info("going on from %s", resume)
    others = [f"{key} ({how})" for key, how in differing if not key.startswith(_OF_A_FOLDER)]
    if others:
        log.warning("settings that this checkpoint was not made with: %s", "; ".join(others))
    return resume


def _read_run(output_dir: Path) -> dict[str, Any]:
    """What the run of a folder was, with its paths as they are now: a folder may be moved between two runs."""
    before = tracking.read_run(output_dir)
    was = (before.get("config") or {}).get("paths", {}).get("output_dir")
    if was in (None, str(output_dir)):
        return before
    return json.loads(json.dumps(before).replace(json.dumps(was)[1:-1], json.dumps(str(output_dir))[1:-1]))


def _is_own(resume: Path, output_dir: Path) -> bool:
    """Whether a checkpoint is the folder's own last one, whatever it was named by."""
    return resume.resolve() == (output_dir / LAST).resolve()


def _differing(before: Any, after: Any) -> list[tuple[str, str]]:
    """The keys in which two configs differ, and how. What `module` refers to differs there too: the shortest key, which
    is the one that a user types, comes first."""
    return sorted(_differences(before, after), key=lambda found: found[0].count("."))


def _differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The keys in which two configs differ, apart from those that may, and how."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        if before != after:
            yield path, f"{before!r}, now {after!r}"
        return
    for key in sorted(before.keys() | after.keys()):
        inner = f"{path}.{key}".strip(".")
        if inner not in _MAY_DIFFER:
            yield from _differences(before.get(key), after.get(key), inner)


def check_checkpoint(path: Path, own: bool, stage: str) -> None:
    """Refuse a file (or folder, of a sharded model) that no run of ``stage`` can go on from, before anything is built.

    Args:
        own: it is the unfinished run's own, found in its folder, and not named by the user.

    Raises:
        ValueError: says what it is, and what to type.
    """
    remedy = f"remove {path} to start anew" if own else "name another with ckpt_path, or leave ckpt_path out"
    found = _read_folder(path, remedy) if path.is_dir() else _read_file(path, remedy)
    missing = {"state_dict", "optimizer_states", "loops", "global_step"} - (
        found.keys() if isinstance(found, dict) else set()
    )
    if missing:
        raise ValueError(f"{path} is no checkpoint of a run ({', '.join(sorted(missing))} missing); {remedy}")
    of_stage = _stage_of(found)
    if of_stage is not None and of_stage != stage:
        raise ValueError(
            f"{path} is a checkpoint of stage={of_stage}, and this is stage={stage}: begin from that run's model with "
            f"init_from={path.parents[1] / 'model'}, or {remedy}"
        )


def _read_folder(path: Path, remedy: str) -> Any:
    try:
        return read_rest(path) | {"state_dict": {}}  # which is in the files beside, of the right sizes
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"{path / REST} cannot be read: it is cut short, or no file of torch; {remedy}") from error


def _read_file(path: Path, remedy: str) -> Any:
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path} is empty: no checkpoint; {remedy}")
    if not zipfile.is_zipfile(path):  # the directory of the file stands at its end
        raise ValueError(f"{path} ({size:,} bytes) is cut short, or no checkpoint at all; {remedy}")
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read by torch {torch.__version__} ({reason}); {remedy}") from error


_STAGES = {"SFTDataModule": "sft", "LongCoTDataModule": "long_cot", "RLDataModule": "rl"}


def _stage_of(checkpoint: dict[str, Any]) -> str | None:
    return next((stage for name, stage in _STAGES.items() if name in checkpoint), None)
