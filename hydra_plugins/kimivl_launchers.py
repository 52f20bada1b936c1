"""Hydra's launchers whose jobs have processes of their own, one for each device: on this machine or on SLURM.

Both stand on submitit, whose own plugin for Hydra raises at the first job that fails and waits for ever for one that
was cancelled where SLURM keeps no accounts. Here each job has an outcome, and all others run to their end.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from kimivl.runtime import signals

log = logging.getLogger(__name__)

_FIXED = ("trainer.devices", "trainer.num_nodes")


class _SubmititLauncher(Launcher):
    """Gives the jobs of a sweep to submitit, and waits for them.

    Args:
        submitit_folder: for the logs and pickles of the jobs, ``%j`` being the job's number.
        array_parallelism: jobs that run at the same time at most; None: as many as there is room for.
        gpus_per_node: None: one for each task where ``trainer.accelerator`` is gpu, else none.
        settings: submitit's own.
    """

    cluster: str

    def __init__(
        self,
        submitit_folder: str,
        array_parallelism: int | None = None,
        gpus_per_node: int | None = None,
        **settings: Any,
    ) -> None:
        self.folder = submitit_folder
        self.array_parallelism = array_parallelism
        self.gpus_per_node = gpus_per_node
        self.settings = {key: _plain(value) for key, value in settings.items() if value is not None}
        self.config: DictConfig
        self.hydra_context: HydraContext
        self.task_function: TaskFunction

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        if self.gpus_per_node is None and config.trainer.accelerator in ("gpu", "cuda"):
            self.gpus_per_node = self.settings["tasks_per_node"]

    # In the process that was typed.

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; each has its outcome, that of a failed one being ``JobStatus.FAILED``."""
        import submitit

        setup_globals()
        _check_fixed(self.config, job_overrides)
        self.check_machine()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        numbered = list(enumerate(job_overrides, initial_job_idx))
        for number, overrides in numbered:
            log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
        try:
            running = self.submit([(list(o), n, Singleton.get_state()) for n, o in numbered])
        except submitit.core.utils.FailedJobError as error:
            raise CompactHydraException(f"error: {self.refused(_last_line(str(error)))}") from error
        return running

    def check_machine(self) -> None:
        """Raise where jobs cannot be started."""

    def refused(self, why: str) -> str:
        """What to do about jobs that were not taken."""
        return f"hydra/launcher={self.cluster}: {why}"

    def submit(self, jobs: list[tuple[Any, ...]]) -> list[JobReturn]:
        raise NotImplementedError

    def executor(self, kind: Any, **settings: Any) -> Any:
        """submitit's executor of a ``kind``, with the settings of this launcher."""
        executor = kind(self.folder, max_num_timeout=3)  # of signals that come before a job listens to them itself
        if self.gpus_per_node is not None:
            settings["gpus_per_node"] = self.gpus_per_node
        given = self.settings | settings | {"stderr_to_stdout": True}
        try:
            executor.update_parameters(**executor._convert_parameters(given))
        except (TypeError, ValueError) as error:
            known = ", ".join(re.findall(r"- (\w+) \(", str(error)))
            what = str(error).splitlines()[0].rstrip(".")
            raise CompactHydraException(
                f"hydra.launcher: {what}" + (f"; submitit takes {known}" if known else "")
            ) from error
        return executor

    def outcome(self, job: Any, overrides: list[str]) -> JobReturn:
        """What the first task of a job that is over has returned, or why it has not."""
        task = job.task(0)
        try:
            if task.paths.result_pickle.exists():
                return task.result()
            why = f"it ended without a result ({_last_line(task.stdout() or '')}); its log is {task.paths.stdout}"
        except Exception as error:  # whatever stands in a file that another process wrote
            why = _last_line(str(error))
        failure = CompactHydraException(f"job {job.job_id} ({' '.join(overrides)}): {why}")
        log.warning("%s", failure)
        return JobReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=failure)

    # In the processes of the jobs.

    def __call__(self, overrides: list[str], number: int, singletons: dict[type, Singleton]) -> JobReturn:
        import submitit

        Singleton.set_state(singletons)
        setup_globals()
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config.hydra.job):
            config.hydra.job.id = submitit.JobEnvironment().job_id
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def checkpoint(self, *args: Any) -> Any:
        """What submitit puts back into the queue when a signal comes before the job listens itself."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *args)


class LocalLauncher(_SubmititLauncher):
    """Jobs on this machine, as many at a time as it has GPUs or cores for: conf/hydra/launcher/local.yaml.

    Attributes:
        asked: the jobs that were asked for at once, with those that have finished before and are not run again.
    """

    cluster = "local"
    asked: int | None = None

    def submit(self, jobs: list[tuple[Any, ...]]) -> list[JobReturn]:
        places = self._places()
        environment = self._environment(min(len(places), self.asked or len(jobs)))
        waiting, running = list(enumerate(jobs)), dict[int, tuple[Any, list[int]]]()
        returns: dict[int, JobReturn] = {}
        came: list[int] = []
        stopped = False
        # What comes is only remembered at first: a job that is being started at that moment is to be told as well.
        with _listening(lambda number, frame: came.append(number)):
            while running or waiting and not stopped:
                while waiting and places and not came and not stopped:
                    (number, arguments), place = waiting.pop(0), places.pop(0)
                    running[number] = self._start(place, environment, arguments), place
                while came:
                    stopped = _tell([job for job, _ in running.values()], came.pop(0), first=not stopped)
                for number in [number for number, (job, _) in running.items() if job.done()]:
                    job, place = running.pop(number)
                    places.append(place)
                    returns[number] = self.outcome(job, jobs[number][0])
                time.sleep(0.2)
        if stopped or came:
            # Not returned, though there may be an outcome of every job: a search would take it for the trials', and go
            # on with the next.
            log.warning("stopped; the same command into the same folder goes on")
            raise SystemExit(130)
        return [returns[number] for number in range(len(jobs))]

    def _start(self, gpus: list[int], environment: dict[str, str], arguments: tuple[Any, ...]) -> Any:
        from kimivl.sweep.local_jobs import Executor

        executor = self.executor(Executor, visible_gpus=gpus)
        executor.signals, executor.environment = signals.OF_SCHEDULERS, environment
        return executor.submit(self, *arguments)

    def _places(self) -> list[list[int]]:
        """The GPUs of each job that runs at the same time; empty lists where none are used."""
        devices = self.settings["tasks_per_node"]
        if not self.gpus_per_node:
            return [[] for _ in range(self.array_parallelism or max(1, _cores() // devices))]
        gpus = _gpus()
        if devices > len(gpus):
            raise CompactHydraException(f"trainer.devices={devices}, but this machine has {len(gpus)} GPUs")
        places = [gpus[first : first + devices] for first in range(0, len(gpus) - devices + 1, devices)]
        return places[: self.array_parallelism]

    def _environment(self, at_a_time: int) -> dict[str, str]:
        """Without it each task would take all cores.

        The number depends on what was asked for, and not on what of that is left: other threads round in another order,
        and a sweep that goes on is to go on as it would have.
        """
        if "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, _cores() // (at_a_time * self.settings["tasks_per_node"])))}


def _tell(jobs: Sequence[Any], number: int, first: bool) -> bool:
    """Pass a signal on to jobs; True, since they stop then."""
    if number == signal.SIGINT:
        # The terminal has told those that listen to it already; a job that has just begun does not yet.
        number = signal.SIGTERM
        if first:
            print("\nwaiting until the running jobs are saved; Ctrl-C stops them at once", flush=True)
    for job in jobs:
        job._process.send_signal(number)
    return True


class SlurmLauncher(_SubmititLauncher):
    """Jobs as an array of SLURM: conf/hydra/launcher/slurm.yaml."""

    cluster = "slurm"

    def check_machine(self) -> None:
        if shutil.which("sbatch") is None:
            raise CompactHydraException(
                "error: hydra/launcher=slurm: this machine has no sbatch; type it on a login node of the cluster, or "
                "use hydra/launcher=local"
            )

    def refused(self, why: str) -> str:
        if re.search(r"configuration source|contact|connect|communication", why, re.IGNORECASE):
            remedy = "no SLURM answers here; type it on a login node of the cluster, or use hydra/launcher=local"
        else:
            remedy = "set hydra.launcher.partition, account, timeout_min and the like as the cluster wants them"
        return f"hydra/launcher=slurm: {why}: {remedy}"

    def submit(self, jobs: list[tuple[Any, ...]]) -> list[JobReturn]:
        import submitit

        executor = self.executor(submitit.SlurmExecutor, array_parallelism=self.array_parallelism or len(jobs))
        submitted = executor.map_array(self, *zip(*jobs, strict=True))
        first = submitted[0].job_id.split("_")[0]
        log.info("SLURM job %s; stop it with: scancel %s", first, first)
        try:
            with _listening(signal.default_int_handler):
                _wait(submitted)
        except KeyboardInterrupt:
            log.warning("the jobs go on without this process; stop them with: scancel %s", first)
            raise SystemExit(130) from None
        return [self.outcome(job, arguments[0]) for job, arguments in zip(submitted, jobs, strict=True)]


def _wait(jobs: Sequence[Any], every: float = 5.0, grace: float = 5.0) -> None:
    """Until each job has left its result, or SLURM knows it no more and ``grace`` seconds have passed (for the disk).

    A job that is requeued stays in the queue under its number.
    """
    left = list(jobs)
    gone: dict[str, float] = {}
    while left:
        left = [job for job in left if not job.task(0).paths.result_pickle.exists()]
        left = [job for job in left if time.monotonic() - gone.get(job.job_id, time.monotonic()) <= grace]
        queue = _queue() if left else None
        for name in [job.job_id for job in left]:
            if queue is None or name in queue:
                gone.pop(name, None)
            else:
                gone.setdefault(name, time.monotonic())
        if left:
            time.sleep(min(every, 1.0) if gone else every)


def _queue() -> set[str] | None:
    """The jobs of this user that wait or run; None while the controller does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        log.warning("squeue: %s", _last_line(asked.stderr))
        return None
    return set(asked.stdout.split())


def _check_fixed(config: DictConfig, job_overrides: Sequence[Sequence[str]]) -> None:
    for overrides in job_overrides:
        for override in overrides:
            key, _, value = override.lstrip("+").partition("=")
            if key in _FIXED and value != str(OmegaConf.select(config, key)):
                raise CompactHydraException(
                    f"error: a sweep over {key}: all jobs of a sweep have the same tasks; type one sweep for each "
                    f"value, the first with {key}={value}"
                )


@contextmanager
def _listening(answer: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Answer Ctrl-C and what schedulers send, also what has come before.

    Behind this block they wait again, for the next jobs of the sweep; a sweep that has none left needs no answer.
    """
    before = {number: signal.signal(number, answer) for number in (signal.SIGINT, *signals.OF_SCHEDULERS)}
    try:
        signals.release()
        yield
    finally:
        signals.hold()
        signal.signal(signal.SIGINT, before[signal.SIGINT])


def _cores() -> int:
    """Those that this process may use, which are fewer than the machine's in the job of a scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[int]:
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        try:
            return [int(number) for number in chosen.split(",")]
        except ValueError:
            raise CompactHydraException(
                f"error: CUDA_VISIBLE_DEVICES={chosen}: hydra/launcher=local deals GPUs out by their numbers; give "
                "those, as nvidia-smi -L lists them (CUDA_VISIBLE_DEVICES=0,1 python train.py -m ...), or leave "
                "hydra/launcher=local out, and the jobs run one after the other"
            ) from None
    import torch

    return list(range(torch.cuda.device_count()))


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _last_line(text: str) -> str:
    return ([line for line in text.strip().splitlines() if line.strip()] or ["no reason given"])[-1].strip()
