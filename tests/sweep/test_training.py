"""Sweeps of real runs, in miniature."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from command import ROOT, train

from kimivl.sweep.folder import read_sweep
from kimivl.sweep.points import has_diverged

MINIATURE = ["debug=miniature", "logger=none", "test=false", "data.phases=[{max_length:2048,epochs:1,lr:[1e-3,1e-4]}]"]


@pytest.mark.slow
def test_a_search_that_was_killed_in_training_goes_on_from_the_checkpoint(tmp_path):
    pytest.importorskip("optuna")
    # With these, the first value is about 1, and the one after the resumption about 1e12: nothing is left but NaN.
    space = [
        "data.lr_scale=tag(log, interval(1e-16, 1e13))",
        "hydra.sweeper.sampler.seed=3",
        "hydra.sweeper.n_trials=2",
    ]
    typed = ["-m", "stage=sft", "sweep=search", *MINIATURE, *space, f"paths.root={tmp_path}"]
    folder = tmp_path / "miniature" / "sweeps" / "sft-search"
    environment = os.environ | {"WANDB_MODE": "offline"}
    command = [sys.executable, "train.py", *typed]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 900
    while not list(folder.glob("*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    [killed] = read_sweep(folder).jobs
    assert killed.status == "killed" and killed.reason.startswith("its process is gone; at step ")

    done = train(*typed)
    assert re.search(rf"going on from {re.escape(str(killed.folder))}/checkpoints/last.ckpt", done.stdout)
    [resumed, diverged] = sorted(read_sweep(folder).jobs, key=lambda job: job.begun)
    assert (resumed.folder, resumed.status) == (killed.folder, "finished")
    assert diverged.status == "failed" and has_diverged(diverged.reason)
    assert read_sweep(folder).trials_left == 0
    assert f"{diverged.folder.name} has diverged, and counts as the worst there is" in done.stdout
