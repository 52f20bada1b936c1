"""``kimivl sync``: send to W&B what it does not have of a run, or of the runs of a sweep."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from kimivl.checkpoint import MODEL
from kimivl.config import RUN_FILE
from kimivl.runtime.lock import is_alive
from kimivl.sweep.command import MULTIRUN_FILE
from kimivl.tracking import join_sweep
from kimivl.tracking.artifacts import log_model, used_model
from kimivl.tracking.axes import Axes
from kimivl.tracking.earlier import Earlier
from kimivl.tracking.folder import read_run
from kimivl.tracking.staged import staged_in
from kimivl.tracking.wandb_run import end_service, give_up, has_key, sync_command, with_parent

SYNC_TIMEOUT = 900.0
"""Seconds that ``kimivl sync`` gives W&B for what it lacks of a run's rows, tables and the places of its models."""


def sync(folder: Path) -> int:
    """Send what W&B does not have of the run in a folder, or of each in the folders below; returns the exit code.

    Raises:
        ValueError: without a run or a key, or when the only run cannot be sent.
    """
    if (folder / RUN_FILE).is_file():
        runs = [folder]
    elif not (runs := sorted(path.parent for path in folder.glob(f"*/{RUN_FILE}"))):
        raise ValueError(
            f"{folder} is no run's folder and holds none: it has no run.json; give one such as outputs/digits/sft"
        )
    if not has_key():
        raise ValueError("there is no W&B key: set WANDB_API_KEY, or type: wandb login")
    failed = False
    for run in runs:
        try:
            print(f"{run}: {_sync(run)}")
        except ValueError as error:
            if runs == [folder]:
                raise
            failed = True
            print(f"error: {error}", file=sys.stderr)
    return int(failed)


def _sync(folder: Path) -> str:
    """Send one run; returns what was sent.

    Raises:
        ValueError: when the run is under way or never began, or W&B does not answer.
    """
    about = read_run(folder)
    if "id" not in about:
        raise ValueError(f"{folder} has nothing to send: its run failed before it began: {about.get('error')}")
    if is_alive(folder):
        raise ValueError(f"{folder} is in use by its run; when that has ended, type: {sync_command(folder)}")
    started = time.perf_counter()
    earlier = Earlier(folder, about["id"])
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, finish_timeout_raises=True)
    giving_up = threading.Timer(SYNC_TIMEOUT, end_service)  # W&B's client waits for ever for a server that has gone
    giving_up.start()
    config = about["config"]
    try:
        with staged_in(folder):
            run = wandb.init(
                id=about["id"],
                resume="allow",
                dir=folder,
                settings=settings,
                mode="online",
                name=folder.resolve().name,
                **_place(config, folder.resolve().parent),
            )
            run.config.update(with_parent(config), allow_val_change=True)
            earlier.catch_up(run, Axes(run, earlier.places()), online=True)
            _log_models(run, folder, config)
            rows = max(run.step - run.starting_step, 0)  # before its first row a run is at step 0
            run.finish(exit_code=0 if about["status"] == "finished" else 1)
    except Exception as error:
        give_up()
        raise ValueError(
            f"{folder}: W&B cannot be reached ({' '.join(str(error).split())[:300]}); try again later"
        ) from error
    finally:
        giving_up.cancel()
    offline = earlier.sync_offline()  # last: W&B has counted the rows of the others without them
    said = [f"{rows} rows that W&B did not have were sent in {time.perf_counter() - started:.0f} s"]
    return "; ".join(said * bool(rows or not offline) + [f"sent with wandb sync: {offline}"] * bool(offline))


def _place(config: Mapping[str, Any], above: Path) -> dict[str, Any]:
    """Project, group and job type of a run: those of its W&B logger, or what that would have had.

    Args:
        above: the folder that the run's is in, a sweep's or another.
    """
    place = {"project": "kimivl", "group": config.get("name"), "job_type": config.get("stage")}
    loggers = {"wandb": place}
    if (above / MULTIRUN_FILE).is_file():
        join_sweep(loggers, str(config.get("name")), above)
    logged_by = [logger for logger in (config.get("logger") or {}).values() if logger]
    own = next((logger for logger in logged_by if "project" in logger), place)
    return {key: own[key] for key in place}


def _log_models(run: Any, folder: Path, config: dict[str, Any]) -> None:
    """The models that the run began with and made; those that W&B has already stay what they are."""
    if config.get("init_from"):
        used_model(run, Path(config["init_from"]))
    if (folder / MODEL).is_dir():
        log_model(run, folder / MODEL, {"stage": config.get("stage")})
