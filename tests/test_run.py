"""One run from config to metric, as a user types it."""

import json
from pathlib import Path

import pytest
from command import history
from forked import train
from slurm_cluster import short

STOP = "+callbacks.stop._target_=stop_at.StopInTest"


def ends(run: Path) -> dict[str, float]:
    figures = json.loads((run / "metrics.json").read_text())
    return {name: value for name, value in figures.items() if name.startswith(("val/", "test/"))}


@pytest.mark.slow
def test_stopped_behind_its_training_it_has_the_same_rows(tmp_path):
    words = [*short(tmp_path), "test=true"]
    train(*words, f"paths.output_dir={tmp_path}/whole")
    stopped = train(*words, STOP, f"paths.output_dir={tmp_path}/run", check=False)
    assert stopped.returncode == 130 and "the training is done and saved" in stopped.stderr, stopped.stderr
    train(*words, f"paths.output_dir={tmp_path}/run")
    run, whole = tmp_path / "run", tmp_path / "whole"
    for name in ("train/loss", "val/accuracy"):
        assert history(run, name) == history(whole, name) != {}
    assert ends(run) == ends(whole) != {}
