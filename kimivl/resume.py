"""Whether a run can go on from a checkpoint: asked before anything is built."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from kimivl.checkpoint_folder import REST, read_rest


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
