"""A search with Optuna whose study lies in a database: typed again, it goes on with the trials that are missing."""

from __future__ import annotations

import logging
import math
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import CompactHydraException
from hydra.utils import instantiate
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from kimivl.config import METRICS_FILE, RUN_FILE
from kimivl.runtime.lock import only_run_in
from kimivl.sweep.command import begin
from kimivl.sweep.grid import fixed_keys, last_of_each_key, stopped_by_hand, table_of
from kimivl.sweep.launching import PointLauncher, check_ranks
from kimivl.sweep.points import by_key, first_difference, folder_of, read_json, spell

log = logging.getLogger(__name__)

_REPEATED = "repeated"
"""Attribute of a study: the numbers of the trials that were stopped, and are run again under another number."""


def run_search(sweeper: Any, arguments: list[str]) -> None:
    """Run the trials that are missing of the study's ``n_trials``.

    Args:
        sweeper: hydra-optuna-sweeper's, set up.

    Raises:
        CompactHydraException: when the folder holds a study of other parameters, another process searches there, or no
            trial has a value.
    """
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parsed = last_of_each_key(OverridesParser.create().parse_overrides([*params, *arguments]))
    space = sorted(one.get_key_element() for one in parsed if one.is_sweep_override())
    if not space and not sweeper.custom_search_space_extender:
        raise CompactHydraException("error: nothing to search; name a key, as in 'data.lr_scale=interval(0.1,10)'")
    for one in parsed:
        if isinstance(one.value(), Glob):
            key = one.get_key_element()
            raise CompactHydraException(f"error: {one.input_line}: a search takes choices by name, as in {key}=A,B")
    check_ranks(sweeper.launcher, sweeper.config, space)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it speaks of each table that it makes
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = sweeper._get_directions()
    if directions not in (["maximize"], ["minimize"]):
        raise CompactHydraException(
            f"error: hydra.sweeper.direction={','.join(directions)}: a run returns one metric; give maximize or "
            "minimize"
        )
    worst = float("-inf" if directions == ["maximize"] else "inf")
    folder = Path(str(sweeper.config.hydra.sweep.dir))
    with _alone_in(folder), _told(sweeper.storage):  # the database lies there
        if study := _study(sweeper):
            _check_same(study, space, parsed, folder)
            _go_on(study, sweeper, folder)
        begin(sweeper.config)
        sweeper.launcher = PointLauncher(sweeper.launcher, sweeper.config, fixed_keys(parsed), worst)
        with stopped_by_hand(sweeper.config, folder):
            _search(sweeper, arguments, folder)
    print(f"\n{table_of(folder)}")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """A second search there would take the trials under way for trials that were stopped, and run them again."""
    remedy = (
        "give this search a folder of its own with hydra.sweep.dir=FOLDER; one search runs several trials at a time "
        "with hydra.sweeper.n_jobs=2 hydra/launcher=local"
    )
    with ExitStack() as held:
        try:
            held.enter_context(only_run_in(folder, remedy=remedy))
        except ValueError as error:
            raise CompactHydraException(f"error: {error}") from error
        yield


@contextmanager
def _told(storage: str | None) -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # the database's own words, which both wrap in theirs
            reason = reason.__cause__
        raise CompactHydraException(
            f"error: {make_url(storage).database} cannot be read or written ({reason}): end the process that holds it, "
            "or move it away to begin anew"
        ) from error


def _search(sweeper: Any, arguments: list[str], folder: Path) -> None:
    try:
        sweeper.sweep(arguments)
    except ValueError as error:
        # When all trials have ended, and none with a value, it is Optuna's, which looks for the best one.
        if _has_value(sweeper) or _is_under_way(sweeper):
            raise CompactHydraException(f"error: {error}") from error
    if not _has_value(sweeper):
        raise CompactHydraException(f"\nerror: no trial has a value; why: kimivl sweep {shlex.quote(str(folder))}")


def _has_value(sweeper: Any) -> bool:
    """Whether any trial has ended with a number; a study that is kept nowhere is taken to have one."""
    study = _study(sweeper)
    return not study or any(math.isfinite(trial.value) for trial in study.trials if trial.value is not None)


def _is_under_way(sweeper: Any) -> bool:
    """Whether a trial was begun and has not ended."""
    study = _study(sweeper)
    return study is not None and any(trial.state == TrialState.RUNNING for trial in study.trials)


def _study(sweeper: Any) -> optuna.study.Study | None:
    """The study as it was left, if it was begun."""
    if sweeper.storage is None:
        return None
    names = [summary.study_name for summary in optuna.get_all_study_summaries(sweeper.storage)]
    return optuna.load_study(sweeper.study_name, sweeper.storage) if sweeper.study_name in names else None


def _check_same(study: optuna.study.Study, space: Sequence[str], overrides: Sequence[Override], folder: Path) -> None:
    """Values that were found under other settings would mislead the search."""
    remedy = "give this search a name of its own with hydra.sweeper.study_name=NAME"
    fixed = [one for one in overrides if not one.is_sweep_override()]
    now = by_key(f"{one.get_key_element()}={one.get_value_element_as_str()}" for one in fixed)
    for trial in study.trials:
        if trial.params and space and sorted(trial.params) != list(space):
            raise CompactHydraException(
                f"error: {folder} holds a search of {', '.join(sorted(trial.params))}, not of {', '.join(space)}: "
                f"{remedy}"
            )
        before = by_key(f"{key}={value}" for key, value in trial.user_attrs.items())
        if before and (key := first_difference(before, now)):
            told = f"{spell(before, key)}, and this one has {spell(now, key)}"
            raise CompactHydraException(f"error: {folder} holds a search with {told}: {remedy}")


def _go_on(study: optuna.study.Study, sweeper: Any, folder: Path) -> None:
    """Put the trials that were stopped into the queue, and leave the sweeper those that are missing.

    A trial that was under way when the sweep died is taken up under its number, with its values: its run goes on from
    its checkpoint. One that was told to have failed, but was only stopped, gets another number.
    """
    repeated = set(study.user_attrs.get(_REPEATED, []))
    ended = 0
    for trial in study.trials:
        if trial.state == TrialState.RUNNING:
            study._storage.set_trial_state(trial._trial_id, TrialState.WAITING)
        elif trial.state == TrialState.FAIL and trial.number not in repeated and _has_gone_on(trial, folder):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                study.enqueue_trial(trial.params)
            repeated.add(trial.number)
        elif trial.state.is_finished() and trial.number not in repeated:
            ended += 1
    study.set_user_attr(_REPEATED, sorted(repeated))
    log.info("%d of %d trials have ended before, in %s", ended, sweeper.n_trials, folder)
    sweeper.n_trials = max(0, sweeper.n_trials - ended)
    sweeper.job_idx = ended
    settings = sweeper.config.hydra.sweeper.sampler
    if study.trials and settings.get("seed") is not None:
        # With the same seed it would propose the first trials' values a second time.
        sweeper.sampler = instantiate(settings, seed=settings.seed + len(study.trials))


def _has_gone_on(trial: FrozenTrial, folder: Path) -> bool:
    """Whether a trial that was told to have failed was only stopped, or has been run to its end by somebody else."""
    place = folder_of(folder, [f"{key}={value}" for key, value in trial.params.items()])
    run = read_json(place / RUN_FILE)
    metric = read_json(place / METRICS_FILE).get(run.get("config", {}).get("optimized_metric", ""), math.nan)
    return run.get("status") in ("interrupted", "running") or run.get("status") == "finished" and math.isfinite(metric)
