"""The launchers of sweeps, on jobs that do nothing; real runs on a real SLURM are in tests/slurm."""

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobStatus

from hydra_plugins import kimivl_launchers
from hydra_plugins.kimivl_launchers import LocalLauncher, SlurmLauncher
from kimivl.config import register
from kimivl.runtime.interruption import NOT_BEGUN
from kimivl.runtime.signals import OF_SCHEDULERS


@pytest.fixture
def start(tmp_path):
    """Start ``patient.py -m`` in a group of its own; its account is in ``tmp_path/account``."""
    started = []

    def run(
        *words: str, patience: float, launcher: str = "local", cores: set[int] | None = None, **more: str
    ) -> subprocess.Popen:
        environment = {"ACCOUNT": f"{tmp_path}/account", "PATIENCE": str(patience), "PYTHONPATH": str(ROOT)}
        command = [
            sys.executable,
            "tests/patient.py",
            "-m",
            f"hydra/launcher={launcher}",
            f"hydra.sweep.dir={tmp_path}/sweep",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | environment | more
        own = {"preexec_fn": lambda: os.sched_setaffinity(0, cores)} if cores else {}
        started.append(subprocess.Popen([*command, *words], cwd=ROOT, env=env, start_new_session=True, **pipes, **own))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def account(folder) -> list[str]:
    file = folder / "account"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(folder, lines: int) -> None:
    end = time.monotonic() + 300
    while len(account(folder)) < lines:
        assert time.monotonic() < end, account(folder)
        time.sleep(0.05)


def stop(process: subprocess.Popen, number: int) -> str:
    """A terminal tells all of a group; others tell the process that they know. Returns what it has printed."""
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return process.communicate(timeout=300)[0]


def test_so_many_at_a_time_as_there_is_room_for(start, tmp_path):
    process = start("seed=1,2,3", "hydra.launcher.array_parallelism=1", patience=0.2)
    assert process.wait(300) == 0, process.communicate()
    assert account(tmp_path) == [f"{what} {seed}" for seed in (1, 2, 3) for what in ("begun", "ended")]


ASKED_TO_STOP = [signal.SIGINT, *OF_SCHEDULERS]


@pytest.mark.parametrize("number", ASKED_TO_STOP)
def test_a_sweep_that_is_stopped_lets_its_jobs_save_themselves(start, tmp_path, number):
    process = start("seed=1,2", "hydra.launcher.array_parallelism=1", patience=300)
    wait_for(tmp_path, 1)
    printed = stop(process, number)
    assert process.returncode == 130 and "Traceback" not in printed, printed
    assert account(tmp_path) == ["begun 1", "saved 1"]
    assert "the sweep goes on with: python patient.py -m seed=1,2 hydra/launcher=local " in printed


def test_one_process_may_be_told_alone(start, tmp_path):
    """As an editor's stop button and ``kill -INT`` do: no terminal has told the jobs."""
    process = start("seed=1", patience=300)
    wait_for(tmp_path, 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130 and account(tmp_path) == ["begun 1", "saved 1"]


IN_BATCHES = ["hydra.sweeper.max_batch_size=2", "seed=1,2,3"]
SEARCH = ["hydra/sweeper=search", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=3", "seed=range(1,1000)"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "sweeper"),
    [(signal.SIGINT, IN_BATCHES), (signal.SIGINT, SEARCH), (signal.SIGTERM, SEARCH)],
    ids=["Ctrl-C, a grid", "Ctrl-C, a search", "TERM, a search"],
)
def test_jobs_that_are_stopped_end_the_sweep_and_are_gone_on_with(start, tmp_path, number, sweeper):
    """Also when no job of their batch is left to be started."""
    typed = [*sweeper, "hydra.launcher.array_parallelism=2"]
    process = start(*typed, patience=300)
    wait_for(tmp_path, 2)
    printed = stop(process, number)
    assert process.returncode == 130 and "Traceback" not in printed, printed
    before = account(tmp_path)
    seeds = {line.split()[1] for line in before}
    assert sorted(before) == sorted(f"{what} {seed}" for seed in seeds for what in ("begun", "saved"))

    again = start(*typed, patience=0.1)
    assert again.wait(300) == 0, again.communicate()
    after = account(tmp_path)[len(before) :]
    begun = [line.split()[1] for line in after if line.startswith("begun")]
    assert set(begun[:2]) == seeds and len(set(begun)) == 3
    assert sorted(after) == sorted(f"{what} {seed}" for seed in begun for what in ("begun", "ended"))


def with_programs(folder: Path, **scripts: str) -> str:
    """A PATH with stand-ins for programs."""
    (folder / "bin").mkdir()
    for name, script in scripts.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    return os.pathsep.join([f"{folder}/bin", os.environ["PATH"]])


@pytest.mark.parametrize(("number", "told"), [(signal.SIGUSR2, "requeue 7\n"), (signal.SIGTERM, "")])
def test_jobs_are_told_what_the_sweep_was_told(start, tmp_path, number, told):
    """A run makes more of USR2, which SLURM sends before it takes the machine away, than of TERM."""
    path = with_programs(tmp_path, scontrol=f'case "$*" in *show*) ;; *) echo "$@" >> {tmp_path}/told ;; esac')
    (tmp_path / "told").touch()
    process = start("seed=1", patience=300, SLURM_JOB_ID="7", PATH=path)
    wait_for(tmp_path, 1)
    stop(process, number)
    assert process.returncode == 130 and account(tmp_path) == ["begun 1", "saved 1"]
    assert (tmp_path / "told").read_text() == told


@pytest.mark.parametrize("number", OF_SCHEDULERS)
def test_a_job_that_has_just_begun_keeps_a_signal_until_it_listens(tmp_path, number):
    from kimivl.sweep.local_jobs import Executor

    def job() -> str:
        import time
        from pathlib import Path

        from kimivl.config import Interrupted
        from kimivl.runtime.interruption import listening

        time.sleep(0.5)
        try:
            with listening(Path.cwd()):
                return "nobody said anything"
        except Interrupted as interrupted:
            return str(interrupted)

    executor = Executor(tmp_path / "%j")
    executor.signals = OF_SCHEDULERS
    executor.update_parameters(timeout_min=10, tasks_per_node=2)
    job = executor.submit(job)
    job._process.send_signal(number)  # when not even its interpreter runs
    assert job._process.wait(300) == 0
    assert job.results() == [NOT_BEGUN] * 2


def test_a_result_that_an_earlier_process_has_left_is_not_taken_for_the_jobs(tmp_path, monkeypatch):
    """Processes have the same numbers again in a container that is started anew."""
    from kimivl.sweep import local_jobs

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            left = tmp_path / str(self.pid) / f"{self.pid}_0_result.pkl"
            left.parent.mkdir(exist_ok=True)
            left.write_bytes(pickle.dumps(("success", "of another job")))

    def killed() -> None:
        import os

        os.kill(os.getpid(), 9)

    monkeypatch.setattr(local_jobs.subprocess, "Popen", Popen)
    executor = local_jobs.Executor(tmp_path / "%j")
    executor.update_parameters(timeout_min=10)
    job = executor.submit(killed)
    job._process.wait(300)
    assert launcher(LocalLauncher).outcome(job, ["seed=1"]).status == JobStatus.FAILED


@pytest.mark.parametrize("chosen", [None, "5"])
def test_jobs_share_the_cores_that_the_sweep_may_use(start, tmp_path, chosen):
    """One of them here, on a machine that may have more: two jobs run one after the other, with a thread each."""
    core = {min(os.sched_getaffinity(0))}
    given = {"OMP_NUM_THREADS": chosen} if chosen else {}
    process = start("test=true,false", "seed=${oc.env:OMP_NUM_THREADS}", patience=0.2, cores=core, **given)
    assert process.wait(300) == 0, process.communicate()
    assert account(tmp_path) == [f"begun {chosen or 1}", f"ended {chosen or 1}"] * 2


@pytest.mark.parametrize(
    ("cores", "settings", "jobs", "asked", "threads"),
    [
        (64, {}, 9, None, 3),  # two tasks each
        (64, {}, 1, None, 32),
        (64, {}, 1, 9, 3),  # as many as when the other eight were run
        (64, {}, 100, None, 1),
        (64, {"array_parallelism": 4}, 9, None, 8),
        (64, {"gpus_per_node": 2}, 9, None, 16),
        (1, {}, 1, None, 1),
    ],
)
def test_threads_are_dealt_to_what_runs_at_the_same_time(monkeypatch, cores, settings, jobs, asked, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(kimivl_launchers, "_cores", lambda: cores)
    started = []

    def begin(self, gpus, environment, arguments):
        started.append(environment["OMP_NUM_THREADS"])
        return SimpleNamespace(done=lambda: True)

    monkeypatch.setattr(LocalLauncher, "_start", begin)
    monkeypatch.setattr(LocalLauncher, "outcome", lambda self, job, overrides: overrides)
    monkeypatch.setattr(kimivl_launchers, "_listening", lambda answer: nullcontext())
    monkeypatch.setattr(kimivl_launchers.time, "sleep", lambda seconds: None)
    local = launcher(LocalLauncher, **settings)
    local.asked = asked
    local.submit([(["seed=1"], number, {}) for number in range(jobs)])
    assert started == [str(threads)] * jobs


@pytest.mark.parametrize("chosen", ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-1,MIG-2"])
def test_gpus_that_have_names_are_refused_in_a_sentence(start, tmp_path, chosen):
    process = start("seed=1,2", "hydra.launcher.gpus_per_node=1", patience=300, CUDA_VISIBLE_DEVICES=chosen)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "Traceback" not in printed and account(tmp_path) == []
    assert f"error: CUDA_VISIBLE_DEVICES={chosen}: hydra/launcher=local deals GPUs out by their numbers; " in printed


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2])
def test_a_sweep_that_waits_for_slurm_says_how_it_goes_on(start, tmp_path, number):
    """Its jobs are SLURM's, and go on."""
    path = with_programs(tmp_path, sbatch='echo "Submitted batch job 17"', squeue="echo 17_0 17_1")
    process = start("seed=1,2", launcher="slurm", patience=300, PATH=path)
    while "SLURM job 17" not in (line := process.stdout.readline()):
        assert line
    time.sleep(2)
    printed = stop(process, number)
    assert process.returncode == 130 and "Traceback" not in printed, printed
    assert "the jobs go on without this process; stop them with: scancel 17" in printed
    assert "the sweep goes on with: python patient.py -m seed=1,2 hydra/launcher=slurm " in printed


@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_a_signal_before_the_first_job(tmp_path, launcher):
    """It comes while Hydra is imported, and waits for somebody who can say how the sweep goes on."""
    code = (
        "import os, runpy, sys\n"
        "def told(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'hydra':\n"
        f"        os.kill(os.getpid(), {int(signal.SIGUSR2)})\n"
        "sys.addaudithook(told)\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    typed = ["-m", "seed=1,2", "debug=miniature", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}/sweep"]
    done = subprocess.run([sys.executable, "-c", code, *typed], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert "the sweep goes on with: python " in done.stderr and not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("number", OF_SCHEDULERS)
def test_a_signal_between_two_batches_waits_for_the_second(number):
    code = (
        "import os, sys\n"
        "from hydra_plugins.kimivl_launchers import _listening\n"
        "first, second = [], []\n"
        "with _listening(lambda number, frame: first.append(number)):\n"
        "    pass\n"
        "os.kill(os.getpid(), int(sys.argv[1]))\n"
        "with _listening(lambda number, frame: second.append(number)):\n"
        "    print(first, second)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(int(number))], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"[] [{int(number)}]\n", done.stderr


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
