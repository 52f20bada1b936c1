"""The W&B logger: one run per folder, with one curve however often it was interrupted."""

from __future__ import annotations

import logging
import os
import shlex
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from kimivl.tracking.artifacts import log_model, used_model
from kimivl.tracking.axes import Axes
from kimivl.tracking.earlier import Earlier
from kimivl.tracking.folder import new_id, parent_of, read_run
from kimivl.tracking.local import fresh
from kimivl.tracking.media import Picture, Shows
from kimivl.tracking.staged import staged_in

log = logging.getLogger(__name__)

Outcome = Literal["success", "interrupted", "failed"]
GRACE = 3.0
"""Seconds beyond ``finish_timeout`` that W&B's client has to give up by itself."""
MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
EXIT_CODES: dict[str, int] = {"success": 0, "failed": 1, "interrupted": 130}


def has_key() -> bool:
    """Whether W&B can be reached under an account: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, ValueError):
        return wandb.Settings().base_url.split("//")[-1] in Path("~/.netrc").expanduser().read_text()
    return False


def sync_command(folder: Path) -> str:
    """What to type to send a run later."""
    return f"kimivl sync {shlex.quote(str(folder))}"


class WandbRun(WandbLogger, Shows):
    """The run in W&B; offline without a key, where ``WANDB_MODE`` says so, and where W&B does not answer.

    The run's folder says which one it is (``run.json``): a job that is started again there continues its curve. What
    earlier processes have logged is not logged again, and what a killed one has not sent is sent.

    Args:
        output_dir: folder of the run. group: the sweep, or the name that the stages of one model share.
        job_type: the stage. tags: for finding it.
        init_timeout: seconds that W&B has to answer at the start. finish_timeout: and to take the rest at the end.
    """

    def __init__(
        self,
        output_dir: str,
        project: str,
        group: str,
        job_type: str,
        tags: Sequence[str] = (),
        init_timeout: float = 20.0,
        finish_timeout: float = 120.0,
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # figures on itself that W&B cannot send
        if (mode := os.environ.get("WANDB_MODE")) not in (None, *MODES):
            raise ValueError(f"WANDB_MODE={mode}: set it to one of {', '.join(MODES)}, or unset it")
        folder = Path(output_dir)
        super().__init__(
            name=folder.name,
            save_dir=output_dir,
            id=read_run(folder).get("id") or new_id(),
            project=project,
            group=group,
            job_type=job_type,
            tags=list(tags),
            settings=wandb.Settings(
                console="off",
                init_timeout=init_timeout,
                finish_timeout=finish_timeout,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=1,  # what a killed process may lose of its last seconds
            ),
        )
        self._wandb_init.pop("anonymous", None)  # Lightning still passes it, and wandb warns of it
        self.folder = folder
        self.finish_timeout = finish_timeout
        self._logged: Mapping[str, int] = {}
        self._mode = "offline"
        self._step: int | None = None
        self._row: dict[str, Any] = {}
        self._held = ExitStack()

    # Its life.

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._begin()
        return self._experiment

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(staged_in(self.folder))
        earlier = Earlier(self.folder, str(self._id))
        self._mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        self._experiment = self._init()
        self._axes = Axes(self._experiment, earlier.places())
        if self._mode == "online":
            _never_wait(self._experiment)
        if self._mode in ("online", "offline"):
            self._logged = earlier.catch_up(self._experiment, self._axes, self._mode == "online")
        if self._mode == "offline":
            log.info("W&B writes to %s/wandb; send it with: %s", self.folder, sync_command(self.folder))

    def _init(self) -> Any:
        """Begin in the mode that is wanted, or else offline: a run that has waited for its machine is not given up."""
        try:
            return wandb.init(**self._wandb_init, mode=cast("Any", self._mode))
        except Exception as error:
            if self._mode != "online":
                raise
            reason = " ".join(str(error).split())[:300]
            log.warning(
                "W&B cannot be used (%s); this run is written to the disk, send it later with: %s",
                reason,
                sync_command(self.folder),
            )
            wandb.teardown()
            self._mode = "offline"
            return wandb.init(**self._wandb_init, mode="offline")

    @rank_zero_only
    def close(self, outcome: Outcome) -> None:
        """End the run; W&B shows it as finished, failed or preempted.

        A second job of the same process would otherwise write into this one's run.
        """
        if self._experiment is None:
            return
        giving_up = threading.Timer(self.finish_timeout + GRACE, end_service)
        if self._mode == "online":
            giving_up.start()
        try:
            self.save()
            if outcome == "interrupted":
                self._experiment.mark_preempting()
            self._experiment.finish(exit_code=EXIT_CODES[outcome])
        except Exception:
            give_up()
            if self._mode != "online":
                raise
            log.warning(
                "W&B has not taken all of this run; it is in %s/wandb: send the rest with: %s",
                self.folder,
                sync_command(self.folder),
            )
        finally:
            giving_up.cancel()
            self._experiment = None
            self._held.close()

    # What it logs.

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """The resolved config, the run whose model this one begins with, and that model as an input."""
        init_from = params.get("init_from")
        super().log_hyperparams(with_parent(params))
        if init_from:
            used_model(self.experiment, Path(init_from))

    @rank_zero_only
    def log_model(self, folder: Path, metadata: dict[str, Any]) -> None:
        """The model that the run has made, by reference."""
        log_model(self.experiment, folder, metadata)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Figures of one step are one row, so that any of them can be another's axis."""
        _ = self.experiment  # which finds what is logged already
        if not (new := fresh(metrics, step, self._logged)):
            return
        if step != self._step or any(self._row.get(name, value) is not value for name, value in new.items()):
            self.save()
        self._step = step
        self._row |= new

    @rank_zero_only
    def save(self) -> None:
        """Lightning calls it after its own figures, which are the last of a step."""
        if self._row and self._experiment is not None:
            self._axes.log(self._row, self._step)
        self._row = {}

    def show_table(self, name: str, rows: Sequence[dict[str, Any]], step: int | None) -> None:
        if fresh({name: rows}, step, self._logged):
            cells = [[_cell(value) for value in row.values()] for row in rows]
            self.log_metrics({name: wandb.Table(columns=list(rows[0]), data=cells)}, step)

    def show_histogram(self, name: str, values: np.ndarray, span: tuple[float, float], step: int | None) -> None:
        self.log_metrics({name: wandb.Histogram(np_histogram=np.histogram(values, 20, span))}, step)


def _cell(value: Any) -> Any:
    if not isinstance(value, Picture):
        return value
    image = value.small()
    return None if image is None else wandb.Image(image, file_type="jpg")


def end_service() -> None:
    """End the process through which W&B's client sends. Its own limit does not hold while an artifact is under way,
    which it tries to send for an hour; all of the run is on the disk."""
    connection: Any = wandb.setup()._connection
    if connection is not None and connection._proc is not None:
        connection._proc._process.kill()


def give_up() -> None:
    end_service()
    with suppress(Exception, SystemExit):  # it would exit with the code of its ended service
        wandb.teardown()


class _Unasked:
    """In the place of W&B's public API, which a run uses for one thing: to be able to wait for an artifact."""

    def _set_artifact_save_handle(self, artifact: Any, handle: Any) -> None:
        pass


def _never_wait(run: Any) -> None:
    """Before each table and artifact W&B's client asks the server about its type, and the first time about the key: a
    server that has gone would hold training up by 20 s each, or end the run. It is asked nothing."""
    run._assert_can_log_artifact = lambda artifact: None
    run._public_api = _Unasked


def with_parent(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config with the id of the run whose model it begins with, where there is one."""
    parent = parent_of(config.get("init_from")).get("id")
    return config if parent is None else {**config, "parent_run": parent}
