"""How the points of a sweep are run, whoever starts them: each in its folder, none twice, and failures written down."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from kimivl.config import RUN_FILE
from kimivl.runtime.launch import check_launch
from kimivl.runtime.lock import is_alive
from kimivl.sweep.command import quoted
from kimivl.sweep.points import finished_metric, folder_of, has_diverged, note_failure, read_json

log = logging.getLogger(__name__)


class PointLauncher:
    """A launcher of Hydra's that leaves out the points that have finished, and says what became of the others.

    Args:
        launcher: that starts the jobs: in this process, in others, or on a cluster.
        config: Hydra's, of the sweep.
        fixed: the keys that all points share.
        worst: what a run that diverged counts as in a search, which then leaves its neighbourhood; what failed
            otherwise is no value. None: both have failed.
    """

    def __init__(self, launcher: Any, config: DictConfig, fixed: Sequence[str], worst: float | None = None) -> None:
        self.launcher, self.fixed, self.worst = launcher, fixed, worst
        self.folder = Path(str(config.hydra.sweep.dir))
        if any(str(one).startswith("hydra.sweep.subdir=") for one in config.hydra.overrides.hydra):
            raise CompactHydraException(
                "error: hydra.sweep.subdir: a job's folder is named by the values that vary; leave it out, or choose "
                "hydra/sweeper=basic"
            )

    def folder_of(self, overrides: Sequence[str]) -> Path:
        return folder_of(self.folder, overrides, self.fixed)

    def check(self, job_overrides: Sequence[Sequence[str]]) -> None:
        """Refuse a folder that holds another sweep.

        Raises:
            ValueError: naming the run that differs, and in what.
        """
        for overrides in job_overrides:
            finished_metric(self.folder_of(overrides), overrides)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Hydra's interface: the results, in the order of the points.

        Raises:
            ValueError: as ``check``.
        """
        known = [finished_metric(self.folder_of(overrides), overrides) for overrides in job_overrides]
        results = [_returned(overrides, metric) for overrides, (_, metric) in zip(job_overrides, known, strict=True)]
        missing = [number for number, (finished, _) in enumerate(known) if not finished]
        if len(missing) < len(known):
            log.info("%d of %d jobs have finished before, in %s", len(known) - len(missing), len(known), self.folder)
        for number in [number for number in missing if is_alive(self.folder_of(job_overrides[number]))]:
            missing.remove(number)
            results[number].status = JobStatus.FAILED
            results[number].return_value = CompactHydraException("it is running already, and is left to that")
        # One after the other in this process: each failure is said, and its memory freed, before the next job begins.
        size = 1 if isinstance(self.launcher, BasicLauncher) else max(len(missing), 1)
        self.launcher.asked = len(job_overrides)  # for those that share this machine out
        place = f"hydra.sweep.dir={quoted(str(self.folder))}"  # by its own stage or name a job would find another
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            todo = [
                [*job_overrides[one], place, f"hydra.sweep.subdir={self.folder_of(job_overrides[one]).name}"]
                for one in batch
            ]
            for number, result in zip(batch, self.launcher.launch(todo, initial_job_idx + start), strict=True):
                results[number] = result
                self._note(result, job_overrides[number])
        return [self._judged(result, overrides) for result, overrides in zip(results, job_overrides, strict=True)]

    def _note(self, result: JobReturn, overrides: Sequence[str]) -> None:
        """Say a failure, and write it down where the job could not; a traceback is for errors that nobody foresaw."""
        if result.status != JobStatus.FAILED:
            return
        folder, error = self.folder_of(overrides), result._return_value
        try:
            note_failure(folder, overrides, reason_of(result))
        except OSError as why:  # a full disk, or a folder of somebody else's: no reason to leave the other jobs out
            log.warning("%s: what became of it cannot be written down: %s", folder.name, why)
        foreseen = isinstance(error, CompactHydraException | ValueError)
        log.error("%s: %s", folder.name, reason_of(result), exc_info=None if foreseen else error)
        while error is not None:  # its frames hold the model, and the memory of the device
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__

    def _judged(self, result: JobReturn, overrides: Sequence[str]) -> JobReturn:
        """A metric that is no number is a failure; in a search, diverging is the worst there is."""
        folder = self.folder_of(overrides)
        if result.status == JobStatus.FAILED:
            reason = str(read_json(folder / RUN_FILE).get("error", ""))
        elif isinstance(value := result.return_value, float) and not math.isfinite(value):
            reason = f"the metric is {value}"
            result.status, result.return_value = JobStatus.FAILED, CompactHydraException(reason)
        else:
            return result
        if self.worst is None or not has_diverged(reason):
            return result
        log.info("%s has diverged, and counts as the worst there is: %s", folder.name, reason)
        return _returned(overrides, self.worst)


def check_ranks(launcher: Any, config: DictConfig, swept: Sequence[str]) -> None:
    """Refuse jobs that could not start their ranks, before the first one begins.

    Args:
        swept: the keys that vary.

    Raises:
        CompactHydraException: with what works instead.
    """
    for key in ("trainer.devices", "trainer.num_nodes"):
        if key in swept:
            raise CompactHydraException(
                f"error: a sweep over {key}: all jobs of a sweep have the same tasks; type one sweep for each value, "
                f"with {key}=2 hydra/launcher=local for example"
            )
    if isinstance(launcher, BasicLauncher):
        try:
            check_launch(config.trainer, multirun=True)
        except ValueError as error:
            raise CompactHydraException(f"error: {error}") from error


def _returned(overrides: Sequence[str], value: float | None) -> JobReturn:
    result = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
    result.return_value = value
    return result


def reason_of(result: JobReturn) -> str:
    """Why a job failed, in a line."""
    error = result._return_value
    lines = str(error).strip().splitlines()
    said = lines[0] if lines else ""
    known = isinstance(error, CompactHydraException | ValueError) and said
    return said if known else f"{type(error).__name__}: {said}".removesuffix(": ")
