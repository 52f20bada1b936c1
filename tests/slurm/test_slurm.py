"""Runs on a real SLURM: arrays, tasks, preemption, time-outs, and a cancelled job."""

import json
from pathlib import Path

import pytest
from command import history, train
from slurm_cluster import Cluster, short, wait_for

FIRST = "+callbacks.pause._target_=pause_at.PauseAt"


def pause(folder: Path, step: int = 3, hook: str = "train_batch") -> list[str]:
    return [FIRST, f"+callbacks.pause={{reached: {folder}/reached, step: {step}, hook: {hook}, seconds: 300}}"]


def status(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["status"]


def same_curve(run: Path, whole: Path) -> None:
    """Every figure of training and validation, and the model, to the bit."""
    for name in ("train/loss", "train/grad_norm", "val/accuracy"):
        assert history(run, name) == history(whole, name) and history(run, name)
    for file in sorted((whole / "model").glob("*.safetensors")):
        assert (run / "model" / file.name).read_bytes() == file.read_bytes()


def reached(nodes: Cluster, job: str, folder: Path) -> None:
    """Wait for the pause of a job."""

    def there_or_over() -> bool:
        return (folder / "reached").exists() or nodes.job(job)["JobState"] not in ("PENDING", "RUNNING")

    wait_for(there_or_over, lambda: f"the step: {_log(folder)}", 300)
    assert (folder / "reached").exists(), _log(folder)


def _log(folder: Path) -> str:
    return (folder / "log").read_text() if (folder / "log").exists() else ""


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--signal=USR2@30", "--time=10"), ()], ids=["told with USR2", "told with TERM"])
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
    wait_for(lambda: status(tmp_path / "run") == "interrupted", lambda: _log(tmp_path), 20)
    wait_for(lambda: "saved after step 4" in _log(tmp_path), lambda: _log(tmp_path), 20)
    assert nodes.job(job)["Restarts"] == "0" and "put back" not in _log(tmp_path)


@pytest.mark.slow
def test_a_time_out_is_told_before_it_comes(nodes, sbatch, tmp_path):
    # SLURM looks at times twice a minute, and may tell a job a minute early.
    job = sbatch(*pause(tmp_path), options=("--time=2", "--signal=USR2@45"), tasks=1)
    reached(nodes, job, tmp_path)
    nodes.start_again(job)
    assert status(tmp_path / "run") == "interrupted"
    nodes.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT")
    assert nodes.job(job)["ExitCode"] == "0:0" and status(tmp_path / "run") == "finished"


@pytest.mark.slow
def test_an_array_with_jobs_that_fail_and_jobs_that_are_requeued(nodes, sweep, tmp_path):
    own = [FIRST, "+callbacks.pause={reached: '${paths.output_dir}/reached', step: 3, seconds: 300}"]
    typed = sweep("seed=1,2", "init_from=null,/nowhere", "hydra.launcher.array_parallelism=2", *own)
    folder = tmp_path / "sweep"

    def both_reached() -> bool:
        assert typed.poll() is None, typed.communicate()[0] + _logs(folder)
        return len(list(folder.rglob("reached"))) == 2

    wait_for(both_reached, lambda: _logs(folder), 400)
    first = min(int(job.split("_")[0]) for job in nodes.queue())
    assert nodes.job(f"{first}_3")["JobState"] == "PENDING"  # two at a time; the second has failed
    for task in (0, 2):
        nodes.run("scancel", "--signal=USR2", f"{first}_{task}")
    for task in (0, 2):
        nodes.start_again(f"{first}_{task}")
    printed = typed.communicate(timeout=400)[0]
    assert typed.returncode == 1 and "2 of 4 jobs" in printed and "Traceback" not in printed, printed
    runs = [json.loads(file.read_text()) for file in folder.rglob("run.json")]
    assert sorted(run["config"]["seed"] for run in runs if run["status"] == "finished") == [1, 2]


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
