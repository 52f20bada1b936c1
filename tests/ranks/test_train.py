"""``train.py`` on two ranks: the run of one process, said once, and gone on with on any number of ranks."""

import json
import re
import sys
from pathlib import Path
from subprocess import run

import pytest
from command import ROOT, history, train

from kimivl.cli import main as kimivl

RUN = ["stage=sft", "debug=miniature", "logger=none", "test=false"]
ONE = ["trainer.devices=1", "trainer.accumulate_grad_batches=2"]
TWO = ["trainer.devices=2"]
STOP = ["+callbacks.stop._target_=stop_at.StopAt", "+callbacks.stop.step=1", "+callbacks.stop.signal_name=SIGTERM"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of one process, two packs a step."""
    root = tmp_path_factory.mktemp("ranks")
    train(*RUN, *ONE, f"paths.root={root}", f"paths.output_dir={root / 'one'}")
    return root


def assert_same_curve(run: Path, reference: Path) -> None:
    for name in ("train/loss", "val/sampled_length", "val/accuracy", "experts/max_over_mean"):
        expected = history(reference, name)
        assert expected and history(run, name) == pytest.approx(expected, rel=1e-3), name
    assert kimivl(["audit", str(run)]) == 0
    metrics = [json.loads((folder / "metrics.json").read_text()).keys() for folder in (run, reference)]
    assert metrics[0] == metrics[1]
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_two_ranks_make_the_run_of_one_and_say_it_once(root, tmp_path):
    done = train(*RUN, *TWO, f"paths.root={root}", f"paths.output_dir={tmp_path}")
    assert_same_curve(tmp_path, root / "one")
    said = done.stdout + done.stderr
    assert said.count("parameters train") == said.count("sft: model in") == 1
    assert not re.search("Warning|Traceback|rank 1", said), said
    assert "experts" not in said
    assert len(set((tmp_path / "train.log").read_text().splitlines())) == len(
        (tmp_path / "train.log").read_text().splitlines()
    )
    assert (tmp_path / ".hydra/config.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(TWO, ONE), (ONE, TWO)], ids=["2 to 1", "1 to 2"])
def test_a_stopped_run_goes_on_with_another_number_of_ranks(root, tmp_path, before, after):
    where = [f"paths.root={root}", f"paths.output_dir={tmp_path}"]
    stopped = train(*RUN, *before, *STOP, *where, check=False)
    assert stopped.returncode == 130 and stopped.stderr.count("\nstopped: saved after step 2") == 1
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    train(*RUN, *after, *where)
    assert_same_curve(tmp_path, root / "one")


@pytest.mark.slow
def test_an_error_of_all_ranks_is_said_once(root, tmp_path):
    """Found while the ranks run: the one that types it has gone."""
    wrong = [*RUN, *TWO, "data.phases=[{max_length: 8, epochs: 1, lr: [1, 1]}]", f"paths.root={root}"]
    refused = train(*wrong, f"paths.output_dir={tmp_path}", check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr.count("samples fits into a pack of 8 tokens") == 1, refused.stderr


@pytest.mark.slow
def test_torchrun_typed_by_hand(root, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    command = [*torchrun, *RUN, *TWO, f"paths.root={root}", f"paths.output_dir={tmp_path}"]
    done = run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_same_curve(tmp_path, root / "one")
    sweep = run(
        [*torchrun, "-m", "seed=1,2", *RUN, *TWO, f"paths.root={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert sweep.returncode and sweep.stderr.count("each rank would run the whole sweep") == 1
