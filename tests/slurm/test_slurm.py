"""Runs on a real SLURM: arrays, tasks, preemption, time-outs, and a cancelled job."""

import json
from pathlib import Path

import pytest
from command import history, train
from slurm_cluster import WAIT_S, Cluster, short, wait_for

FIRST = "+callbacks.pause._target_=pause_at.PauseAt"


def pause(folder: Path, step: int = 3, hook: str = "train_batch") -> list[str]:
    return [FIRST, f"+callbacks.pause={{reached: {folder}/reached, step: {step}, hook: {hook}, seconds: 300}}"]


def status(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["status"]


def same_curve(run: Path, whole: Path) -> None:
    """Every figure of training and validation, and the model, to the bit."""
    for name in ("train/loss", "train/grad_norm", "val/accuracy"):
        assert history(run, name) == history(whole, name) and history(run, name)
    files = sorted((whole / "model").glob("*.safetensors"))
    assert files
    for file in files:
        assert (run / "model" / file.name).read_bytes() == file.read_bytes()


def reached(nodes: Cluster, job: str, folder: Path) -> None:
    """Wait for the pause of a job."""

    def there_or_over() -> bool:
        return (folder / "reached").exists() or nodes.job(job)["JobState"] not in ("PENDING", "RUNNING")

    wait_for(there_or_over, lambda: f"the step: {_log(folder)}")
    assert (folder / "reached").exists(), _log(folder)


def _log(folder: Path) -> str:
    return (folder / "log").read_text() if (folder / "log").exists() else ""


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--signal=USR2@30", "--time=30"), ()], ids=["told with USR2", "told with TERM"])
def test_preempted_two_tasks_go_on_where_they_were(nodes, sbatch, whole, tmp_path, options):
    job = sbatch(*pause(tmp_path), options=options)
    reached(nodes, job, tmp_path)
    nodes.preempt(node=nodes.job(job)["NodeList"])
    nodes.start_again(job)
    assert status(tmp_path / "run") == "interrupted" and not (tmp_path / "run/model").exists()
    nodes.wait_for_state(job, "COMPLETED", "FAILED")
    assert nodes.job(job)["ExitCode"] == "0:0" and nodes.job(job)["Restarts"] == "1"
    assert _log(tmp_path).count("is put back into the queue") == 1  # by one of the ranks, once
    same_curve(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_job_on_two_nodes(nodes, sbatch, whole, tmp_path):
    # The names of the nodes mean nothing here: a cluster's own do, and need no MASTER_ADDR.
    words = [*pause(tmp_path), "trainer.num_nodes=2"]
    job = sbatch(*words, options=("--nodes=2", "--export=ALL,MASTER_ADDR=127.0.0.1"), tasks=1)
    reached(nodes, job, tmp_path)
    nodes.run("scancel", "--signal=USR2", job)
    nodes.start_again(job)
    nodes.wait_for_state(job, "COMPLETED", "FAILED")
    assert nodes.job(job)["ExitCode"] == "0:0" and nodes.job(job)["NumNodes"] == "2", _log(tmp_path)
    assert _log(tmp_path).count("is put back into the queue") == 1
    same_curve(tmp_path / "run", whole)


def test_a_cancelled_job_is_saved_and_not_requeued(nodes, sbatch, tmp_path):
    job = sbatch(*pause(tmp_path), tasks=1)
    reached(nodes, job, tmp_path)
    nodes.run("scancel", job)
    nodes.wait_for_state(job, "CANCELLED")
    wait_for(lambda: status(tmp_path / "run") == "interrupted", lambda: _log(tmp_path))
    wait_for(lambda: "saved after step 4" in _log(tmp_path), lambda: _log(tmp_path))
    assert nodes.job(job)["Restarts"] == "0" and "put back" not in _log(tmp_path)


@pytest.mark.slow
def test_a_time_out_is_told_before_it_comes(nodes, sbatch, uninterrupted, tmp_path):
    # SLURM looks at times twice a minute, and may tell a job a minute early.
    job = sbatch(*pause(tmp_path), options=("--time=30", "--signal=USR2@45"), tasks=1)
    reached(nodes, job, tmp_path)
    minutes = int(nodes.job(job)["RunTime"].split(":")[1])
    nodes.run("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes + 2}")
    nodes.start_again(job, "TimeLimit=30")
    assert status(tmp_path / "run") == "interrupted"
    nodes.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT")
    assert nodes.job(job)["ExitCode"] == "0:0" and status(tmp_path / "run") == "finished"
    same_curve(tmp_path / "run", uninterrupted(1))


def test_a_job_that_asks_for_other_tasks_than_it_has(nodes, sbatch, tmp_path):
    job = sbatch("trainer.devices=3", tasks=2)
    nodes.wait_for_state(job, "COMPLETED", "FAILED")
    assert nodes.job(job)["JobState"] == "FAILED" and "Traceback" not in _log(tmp_path), _log(tmp_path)
    sentence = "trainer.devices=3 trainer.num_nodes=1, but srun started 2 on each of 1 nodes: set trainer.devices=2"
    assert _log(tmp_path).count(sentence) == 1, _log(tmp_path)


@pytest.mark.slow
def test_an_array_with_jobs_that_fail_and_jobs_that_are_requeued(nodes, sweep, uninterrupted, tmp_path):
    own = [FIRST, "+callbacks.pause={reached: '${paths.output_dir}/reached', step: 3, seconds: 300}"]
    typed = sweep("seed=1,2", "init_from=null,/nowhere", "hydra.launcher.array_parallelism=2", *own)
    folder = tmp_path / "sweep"

    def both_reached() -> bool:
        assert typed.poll() is None, typed.communicate()[0] + _logs(folder)
        return len(list(folder.rglob("reached"))) == 2

    wait_for(both_reached, lambda: _logs(folder))
    first = min(int(job.split("_")[0]) for job in nodes.queue())
    assert nodes.job(f"{first}_3")["JobState"] == "PENDING"  # two at a time; the second has failed
    for task in (0, 2):
        nodes.run("scancel", "--signal=USR2", f"{first}_{task}")
    for task in (0, 2):
        nodes.start_again(f"{first}_{task}")
    printed = typed.communicate(timeout=WAIT_S)[0]
    assert typed.returncode == 1 and "2 of 4 jobs" in printed and "Traceback" not in printed, printed
    finished = finished_by_seed(folder)
    assert sorted(finished) == [1, 2]
    for seed, run in finished.items():
        same_curve(run, uninterrupted(1, seed))


@pytest.mark.slow
def test_an_array_of_jobs_with_two_tasks(nodes, sweep, uninterrupted, tmp_path):
    """One of the two jobs is told to make room in mid-run; the other trains undisturbed."""
    wholes = {seed: uninterrupted(2, seed) for seed in (1, 2)}
    (tmp_path / "reached-2").touch()  # the second does not pause
    own = [FIRST, f"+callbacks.pause={{reached: '{tmp_path}/reached-${{seed}}', step: 3, seconds: 300}}"]
    typed = sweep("seed=1,2", "trainer.devices=2", *own)
    folder = tmp_path / "sweep"

    def first_reached() -> bool:
        assert typed.poll() is None, typed.communicate()[0] + _logs(folder)
        return (tmp_path / "reached-1").exists()

    wait_for(first_reached, lambda: _logs(folder))
    array = nodes.queue()[0].split("_")[0]
    assert nodes.job(f"{array}_0")["NumTasks"] == "2"
    nodes.run("scancel", "--signal=USR2", f"{array}_0")
    nodes.start_again(f"{array}_0")
    printed = typed.communicate(timeout=WAIT_S)[0]
    assert typed.returncode == 0, printed + _logs(folder)
    assert _logs(folder).count("is put back into the queue") == 1, _logs(folder)  # by one of the tasks, once
    finished = finished_by_seed(folder)
    assert sorted(finished) == [1, 2], printed + _logs(folder)
    for seed, run in finished.items():
        same_curve(run, wholes[seed])


@pytest.mark.slow
def test_a_job_with_two_tasks_on_this_machine(root, whole, tmp_path):
    words = ["-m", "hydra/launcher=local", f"hydra.sweep.dir={tmp_path}", *short(root), "trainer.devices=2", "seed=1"]
    train(*words, OMP_NUM_THREADS="1")
    finished = finished_by_seed(tmp_path)
    assert list(finished) == [1]
    same_curve(finished[1], whole)


def finished_by_seed(sweep: Path) -> dict[int, Path]:
    """The folders of the runs of a sweep that have finished."""
    runs = {file.parent: json.loads(file.read_text()) for file in sorted(sweep.rglob("run.json"))}
    return {run["config"]["seed"]: folder for folder, run in runs.items() if run["status"] == "finished"}


def _logs(folder: Path) -> str:
    return "".join(f"{log}:\n{log.read_text()}" for log in sorted(folder.rglob("*.out")))


@pytest.mark.parametrize("key", ["trainer.devices", "trainer.num_nodes"])
def test_a_sweep_over_what_is_fixed_for_all_jobs(root, tmp_path, key):
    words = ["-m", "hydra/launcher=local", f"hydra.sweep.dir={tmp_path}", *short(root), f"{key}=1,2"]
    done = train(*words, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"a sweep over {key}: all jobs of a sweep have the same tasks; type one sweep for each value" in done.stderr


def test_missing_slurm(root, tmp_path):
    done = train("-m", "hydra/launcher=slurm", f"hydra.sweep.dir={tmp_path}", "seed=1,2", check=False, PATH="/nowhere")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "this machine has no sbatch; type it on a login node of the cluster, or use hydra/launcher=local" in done.stderr
    )
