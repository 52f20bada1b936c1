"""Grids through the command line: what fails is said at the end, and what is missing runs when it is typed again."""

import json
import shlex

import pytest
from swept import launched, sweep

from kimivl.sweep.folder import read_sweep

GRID = ["sweep=lr_grid", "data.lr_scale=1,3", "seed=1,2"]


def test_a_grid_with_failures_runs_to_its_end_and_is_filled_by_the_same_command(tmp_path):
    folder = tmp_path / "digits" / "sweeps" / "sft-lr_grid"
    done = sweep(tmp_path, *GRID, lr_1__1="refuse", lr_1__2="nan", lr_3__1="fail")
    assert done.returncode == 1
    assert len(launched(tmp_path)) == 4
    assert "error: 3 of 4 jobs have not finished, the others have:" in done.stderr
    assert "data.lr_scale-1_seed-1: data.phases: a phase needs lr\n" in done.stderr
    assert "data.lr_scale-1_seed-2: the metric is nan\n" in done.stderr
    assert "data.lr_scale-3_seed-1: RuntimeError: the disk is full\n" in done.stderr
    assert 'raise RuntimeError("the disk is full")' in done.stdout  # a traceback of what nobody foresaw
    assert "Traceback" not in done.stderr
    statuses = {job.folder.name: (job.status, job.reason) for job in read_sweep(folder).jobs}
    assert statuses == {
        "data.lr_scale-1_seed-1": ("failed", "data.phases: a phase needs lr"),
        "data.lr_scale-1_seed-2": ("diverged", "val/accuracy is nan"),
        "data.lr_scale-3_seed-1": ("failed", "the disk is full"),
        "data.lr_scale-3_seed-2": ("finished", ""),
    }

    (tmp_path / "own" / "logger").mkdir(parents=True)
    (tmp_path / "own" / "logger" / "mine.yaml").write_text("csv: null")
    own = [f"--config-dir={tmp_path}/own", "logger=mine"]
    again = sweep(tmp_path, *own, *GRID, "seed=1,2,3", lr_3__3="stop")
    assert again.returncode == 130
    assert launched(tmp_path) == [
        "data.lr_scale-1_seed-1",
        "data.lr_scale-1_seed-3",
        "data.lr_scale-3_seed-1",
        "data.lr_scale-3_seed-3",
    ]
    assert "stopped: saved after step 3" in again.stderr
    [told] = [line for line in again.stderr.splitlines() if line.startswith("the sweep goes on with: ")]
    typed = shlex.split(told.removeprefix("the sweep goes on with: python quadratic.py -m "))
    added = [word for word in typed if not word.startswith(("stage=", "paths.root="))]
    assert sweep(tmp_path, *added).returncode == 1  # what diverged stays as it is
    assert launched(tmp_path) == ["data.lr_scale-3_seed-3"]
    assert read_sweep(folder).counts == {"finished": 5, "diverged": 1}


def test_all_jobs_lie_in_the_folder_of_their_sweep_whatever_varies(tmp_path):
    root = tmp_path / "my models"
    root.mkdir()
    typed = ["sweep=lr_grid", "data.lr_scale=1", "seed=1", "stage=sft,long_cot", "name=a,b"]
    done = sweep(root, *typed, "hydra.sweeper.max_batch_size=2")
    assert done.returncode == 0, done.stderr
    folder = root / "digits" / "sweeps" / "sft-lr_grid"
    assert {run.parent.parent for run in root.rglob("run.json")} == {folder} and len(launched(root)) == 4
    assert shlex.split(done.stdout.splitlines()[-1])[-1] == str(folder)
    assert sweep(root, *typed).returncode == 0 and launched(root) == []


def test_a_grid_over_all_files_of_a_group(tmp_path):
    assert sweep(tmp_path, "strategy=glob(*)").returncode == 0
    assert launched(tmp_path) == ["strategy-auto", "strategy-fsdp"]


def test_a_folder_of_another_sweep_is_left_as_it_is(tmp_path):
    sweep(tmp_path, "seed=1,2", f"hydra.sweep.dir={tmp_path}/own", "optimizer.weight_decay=0.2")
    before = (tmp_path / "own" / "multirun.yaml").read_text()
    done = sweep(tmp_path, "seed=1,2", f"hydra.sweep.dir={tmp_path}/own")
    assert done.returncode == 1 and launched(tmp_path) == []
    assert "holds a finished run with optimizer.weight_decay=0.2, and this sweep has no optimizer" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "own" / "multirun.yaml").read_text() == before


@pytest.mark.slow
def test_a_job_that_is_killed_in_a_process_of_its_own_is_one_failure(tmp_path):
    pytest.importorskip("submitit")
    done = sweep(tmp_path, "seed=1,2", f"hydra.sweep.dir={tmp_path}/own", "hydra/launcher=local", **{"seed-1": "kill"})
    assert done.returncode == 1
    assert "1 of 2 jobs have not finished" in done.stderr
    run = json.loads((tmp_path / "own" / "seed-1" / "run.json").read_text())
    assert run["status"] == "failed" and run["error"] and run["config"]["seed"] == 1
    assert read_sweep(tmp_path / "own").counts == {"finished": 1, "failed": 1}


RANKS = {
    "swept": (["trainer.devices=1,2"], "a sweep over trainer.devices: all jobs of a sweep have the same tasks"),
    "swept elsewhere": (["trainer.num_nodes=1,2", "hydra/launcher=local"], "a sweep over trainer.num_nodes"),
    "in this process": (["trainer.devices=2", "seed=1,2"], "add hydra/launcher=local"),
    "in this process, searched": (["trainer.devices=2", "sweep=lr"], "add hydra/launcher=local"),
}


@pytest.mark.parametrize(("overrides", "said"), RANKS.values(), ids=RANKS)
def test_jobs_that_could_not_start_their_ranks_are_refused_before_the_first(tmp_path, overrides, said):
    done = sweep(tmp_path, *overrides)
    assert done.returncode == 1 and launched(tmp_path) == []
    assert done.stderr.count(said) == 1 and done.stderr.strip().startswith("error: ")
