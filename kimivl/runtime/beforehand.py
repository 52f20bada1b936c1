"""What is looked at before Hydra makes folders and starts jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from kimivl.runtime import signals
from kimivl.runtime.launch import check_multirun, find_place

_ANSWER_SIGNALS = ("hydra_plugins.kimivl_launchers.", "hydra._internal.core_plugins.basic_launcher.")
"""Launchers for which signals may wait: ours listen while jobs run, and a job of Hydra's own listens in this process.
Both then answer what has come, so that no signal ends a sweep that could not say how it goes on."""


class Beforehand(Callback):
    """Refuses in one sentence what Hydra would answer with a traceback of its inside, or a multirun job by job."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _make(Path(config.hydra.run.dir), "paths.output_dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            check_multirun()
        except ValueError as error:
            _refuse(str(error))
        _make(Path(config.hydra.sweep.dir), "paths.root")
        if not str(config.hydra.launcher._target_).startswith(_ANSWER_SIGNALS):
            signals.release()  # its jobs would begin deaf, and it would not hear what it is told


def _make(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _refuse(f"{folder} cannot be made ({error.strerror}: {error.filename}); name another with {key}=FOLDER")


def _refuse(why: str) -> None:
    # An exit, since Hydra turns what a callback raises into a warning, and goes on.
    if find_place().rank == 0:
        print(f"\nerror: {why}", file=sys.stderr)
    sys.exit(2)
