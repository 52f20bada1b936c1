"""The launchers of sweeps, on jobs that do nothing; real runs on a real SLURM are in tests/slurm."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from command import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobStatus

from hydra_plugins import kimivl_launchers
from hydra_plugins.kimivl_launchers import LocalLauncher, SlurmLauncher
from kimivl.config import register


@pytest.fixture
def start(tmp_path):
    """Start ``patient.py -m`` in a group of its own; its account is in ``tmp_path/account``."""
    started = []

    def run(*words: str, patience: float) -> subprocess.Popen:
        environment = {"ACCOUNT": f"{tmp_path}/account", "PATIENCE": str(patience), "PYTHONPATH": str(ROOT)}
        command = [
            sys.executable,
            "tests/patient.py",
            "-m",
            "hydra/launcher=local",
            f"hydra.sweep.dir={tmp_path}/sweep",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = os.environ | environment
        started.append(subprocess.Popen([*command, *words], cwd=ROOT, env=env, start_new_session=True, **pipes))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def account(folder) -> list[str]:
    file = folder / "account"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(folder, line: str) -> None:
    end = time.monotonic() + 60
    while line not in account(folder):
        assert time.monotonic() < end, account(folder)
        time.sleep(0.05)


def test_so_many_at_a_time_as_there_is_room_for(start, tmp_path):
    process = start("seed=1,2,3", "hydra.launcher.array_parallelism=1", patience=0.2)
    assert process.wait(120) == 0, process.communicate()
    assert account(tmp_path) == [f"{what} {seed}" for seed in (1, 2, 3) for what in ("begun", "ended")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_lets_its_jobs_save_themselves(start, tmp_path, number):
    process = start("seed=1,2", "hydra.launcher.array_parallelism=1", patience=60)
    wait_for(tmp_path, "begun 1")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to all of the group
    else:
        process.send_signal(number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in printed, printed
    assert account(tmp_path) == ["begun 1", "saved 1"]


def launcher(kind, **settings):
    return kind(submitit_folder="nowhere/%j", tasks_per_node=2, **settings)


def test_gpus_are_dealt_to_the_jobs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,4,5,7")
    local = launcher(LocalLauncher, gpus_per_node=2)
    assert local._places() == [[1, 2], [4, 5]]
    assert launcher(LocalLauncher, gpus_per_node=2, array_parallelism=1)._places() == [[1, 2]]


def test_what_a_cluster_always_wants_is_said_once(tmp_path):
    """In conf/local/slurm.yaml, which only hydra/launcher=slurm reads, and the command line has the last word."""
    (tmp_path / "local").mkdir()
    (tmp_path / "local/slurm.yaml").write_text("partition: gpu\naccount: vision\n")
    words = ["stage=sft", f"hydra.searchpath=[file://{tmp_path}]", "hydra.launcher.account=mine"]
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        slurm = compose("train", ["hydra/launcher=slurm", *words], return_hydra_config=True).hydra.launcher
        local = compose("train", ["hydra/launcher=local", *words[:2]], return_hydra_config=True).hydra.launcher
    assert (slurm.partition, slurm.account, slurm.timeout_min) == ("gpu", "mine", 1440)
    assert "partition" not in local


@pytest.mark.parametrize(("kind", "gpus"), [("gpu", 2), ("cpu", None)])
def test_gpus_only_where_the_trainer_has_them(kind, gpus):
    slurm = launcher(SlurmLauncher)
    config = SimpleNamespace(trainer=SimpleNamespace(accelerator=kind))
    slurm.setup(hydra_context=None, task_function=None, config=config)
    assert slurm.gpus_per_node == gpus


def test_jobs_that_slurm_has_forgotten_are_over(monkeypatch, tmp_path):
    """A job that was killed leaves no result; one that is requeued stays in the queue."""

    def job(name: str):
        result, log = tmp_path / f"{name}.pkl", tmp_path / f"{name}.out"
        log.write_text("...\nslurmstepd: error: *** JOB 1 CANCELLED ***\n")
        paths = SimpleNamespace(result_pickle=result, stdout=log)
        task = SimpleNamespace(paths=paths, result=lambda: "its result", stdout=log.read_text)
        return SimpleNamespace(job_id=name, task=lambda number: task)

    jobs = [job("1_0"), job("1_1"), job("1_2")]
    answers = iter([{"1_0", "1_1", "1_2"}, None, {"1_1"}, {"1_1"}, {"1_1"}])

    def queue():
        found = next(answers, set())
        if found == set():
            (tmp_path / "1_1.pkl").touch()
        return found

    (tmp_path / "1_2.pkl").touch()
    monkeypatch.setattr(kimivl_launchers, "_queue", queue)
    kimivl_launchers._wait(jobs, every=0.02, grace=0.05)
    lost, *kept = [launcher(SlurmLauncher).outcome(one, ["seed=1"]) for one in jobs]
    assert kept == ["its result"] * 2 and lost.status == JobStatus.FAILED
    with pytest.raises(Exception, match=r"job 1_0 \(seed=1\): it ended without a result \(slurmstepd.*CANCELLED"):
        _ = lost.return_value
