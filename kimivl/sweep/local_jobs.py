"""The processes of a job on this machine: submitit's, whose tasks are told every signal that a scheduler sends.

submitit's own controller, which starts the tasks of a job, hands SIGTERM on and dies of the others, while its tasks run
on. Run as a program (``python -m kimivl.sweep.local_jobs FOLDER SIGNAL ...``) this is a controller that does not.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import JobPaths
from submitit.local.local import Controller, LocalExecutor, LocalJob

_A_YEAR = 365 * 24 * 60


class Executor(LocalExecutor):
    """submitit's, which starts jobs by the controller of this file.

    Attributes:
        signals: that schedulers send. environment: variables of the jobs, besides those of this process.
    """

    signals: Sequence[int] = ()
    environment: Mapping[str, str] = {}

    def _submit_command(self, command: str) -> LocalJob[Any]:
        given = self.parameters
        tasks = given.get("tasks_per_node", 1)
        gpus = given.get("visible_gpus", ())[: given.get("gpus_per_node", 0)]
        own = {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_NTASKS": tasks,
            "SUBMITIT_LOCAL_NODEID": 0,
            "SUBMITIT_LOCAL_JOB_NUM_NODES": 1,
            "SUBMITIT_LOCAL_TIMEOUT_S": int(60 * given.get("timeout_min", _A_YEAR)),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": int(given.get("signal_delay_s", 30)),
            "SUBMITIT_LOCAL_WITH_SHELL": "",  # a shell gives way to the controller, which has its number then
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
        }
        words = [sys.executable, "-m", "kimivl.sweep.local_jobs", str(self.folder), *map(str, map(int, self.signals))]
        program = " && ".join([*given.get("setup", ()), f"exec {shlex.join(words)}"])
        environment = os.environ | self.environment | {name: str(value) for name, value in own.items()}
        # What comes in the meantime waits until the controller listens.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, *self.signals])
        try:
            process = subprocess.Popen(program, shell=True, env=environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for task in range(tasks):  # of a process that had the same number in an earlier life of the machine
            JobPaths(self.folder, str(process.pid), task).result_pickle.unlink(missing_ok=True)
        return LocalJob(self.folder, str(process.pid), tasks=list(range(tasks)), process=process)


class _Controller(Controller):
    def __init__(self, folder: Path, signals: Sequence[int]) -> None:
        super().__init__(folder)
        self.signals = signals
        for number in signals:
            signal.signal(number, lambda number, frame: self._forward_signal(signal.Signals(number)))

    def start_tasks(self) -> None:
        """The tasks begin as this process did, with the signals on hold: a run releases them when it listens."""
        super().start_tasks()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)


def main(folder: str, *signals: str) -> None:
    # A Ctrl-C of the terminal reaches the tasks by itself, and again: it must neither end this process nor, before they
    # listen to it, them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    _Controller(Path(folder), [int(number) for number in signals]).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
