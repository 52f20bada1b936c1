"""What `kimivl report` says of a folder: made up here, without training."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from kimivl.cli import main
from kimivl.report import _curves

TESTED = {"test/accuracy": 0.5, "test/length": 9.0, "test/problems": 8.0, "test/accuracy_difficulty_1": 0.5}


def stage(folder, name, figures):
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.json").write_text(json.dumps(figures | {"seconds": 60.0}))
    return folder / name


def test_a_history_that_is_being_written_is_drawn_as_far_as_it_goes(tmp_path, capsys):
    run = stage(tmp_path, "rl", TESTED)
    rows = [{"step": 0, "epoch": 0, "rollout/accuracy": 0.5, "rollout/length": 9}, {"step": 1, "rollout/accuracy": 0.6}]
    (run / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 2, "epo')
    assert main(["report", str(tmp_path)]) == 0
    assert _curves(tmp_path) == {
        "rollout/accuracy": ([1], [0.5]),
        "rollout/length": ([1], [9]),
    }  # a row without an epoch has no place
    assert Image.open(tmp_path / "summary.png").width > 500


def sweep(folder):
    stage(folder, "seed-1", TESTED)
    (folder / "multirun.yaml").write_text("hydra: {}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no finished stage there; run one with: python train.py stage=sft"),
        (lambda folder: stage(folder, "rl", {"val/accuracy": 0.5}), "rl finished without test figures; add "),
        (sweep, "is a sweep; try kimivl sweep "),
    ],
    ids=["nothing", "no test", "sweep"],
)
def test_a_folder_without_test_figures_is_one_sentence(tmp_path, capsys, make, message):
    make(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_report_does_not_wait_for_what_trains():
    script = "import sys, kimivl.report; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"lightning", "torch", "wandb"} & set(run.stdout.split())
