"""``train.py stage=rl`` on two ranks: the run of one process, stopped on one rank, gone on with by two and by one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import history, train

from kimivl.checkpoint_folder import read_whole

COMMON = ["debug=miniature", "logger=none", "test=false"]
RUN = ["stage=rl", *COMMON, "init_from=${paths.root}/miniature/sft/model", "data.updates=2", "data.budget=4"]
RUN += [
    "reward._target_=even_reward.EvenReward",
    "data.max_new_tokens=12",
    "data.problems=4",
    "data.responses=3",
    "module.freeze=[]",
]
RUN += ["data.phases=[{epochs: 3, lr: [1e-2, 1e-2]}]"]
ONE = ["trainer.devices=1", "trainer.accumulate_grad_batches=2"]
TWO = ["trainer.devices=2", "trainer.accumulate_grad_batches=1"]
STOP = ["+callbacks.stop={_target_: stop_at.StopAt, step: 2, signal_name: SIGUSR1, rank: 1}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of one process, ``one``, and one that was stopped in mid-iteration, ``stopped``."""
    root = tmp_path_factory.mktemp("runs")
    train("stage=sft", *COMMON, "data.val_shards=null", "optimized_metric=train/loss", f"paths.root={root}")
    train(*RUN, *ONE, f"paths.root={root}", f"paths.output_dir={root / 'one'}")
    stopped = train(*RUN, *TWO, *STOP, f"paths.root={root}", f"paths.output_dir={root / 'stopped'}", check=False)
    assert stopped.returncode == 130, stopped.stdout + stopped.stderr
    assert stopped.stderr.count("\nstopped: saved after step 3") == 1, stopped.stderr
    return root


def assert_same_run(run: Path, reference: Path) -> None:
    """The same problems, to the bit the same responses, and curves that differ by rounding at most."""
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    files = sorted(path.name for path in (reference / "rollouts").glob("*.jsonl"))
    assert len(files) > 1
    for name in files:
        records = [_said(folder / "rollouts" / name) for folder in (run, reference)]
        assert records[0] == records[1], name
    for name in ("train/loss", "train/grad_norm", "rollout/accuracy", "rollout/waiting", "val/accuracy", "val/length"):
        expected = history(reference, name)
        assert expected and history(run, name) == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    metrics = [set(json.loads((folder / "metrics.json").read_text())) for folder in (run, reference)]
    assert metrics[0] ^ metrics[1] <= {"perf/rollout_balance"}  # between ranks, where there are several


def _said(record: Path) -> list[tuple]:
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    return [
        (
            row["number"],
            row["rejected"],
            [(r["text"], r["seed"], r["correct"], r["written_in"]) for r in row["responses"]],
        )
        for row in rows
    ]


def whole_model(run: Path) -> dict[str, torch.Tensor]:
    path = run / "checkpoints/last.ckpt"
    return (read_whole(path) if path.is_dir() else torch.load(path, weights_only=True))["state_dict"]


@pytest.mark.slow
def test_the_run_is_one_with_problems_to_learn_from(runs):
    """Or the tests below prove nothing."""
    assert any(value > 0 for value in history(runs / "one", "train/grad_norm").values())
    assert any(0 < value < 1 for value in history(runs / "one", "rollout/accuracy").values())
    waiting = history(runs / "one", "rollout/waiting")
    assert any(value > 0 for value in waiting.values()), waiting


@pytest.mark.slow
@pytest.mark.parametrize("devices", [TWO, ONE], ids=["on two", "on one"])
def test_stopped_on_one_rank_in_mid_iteration_it_goes_on(runs, devices):
    kept, folder = runs / "kept", runs / "stopped"  # its config names its own folders
    if not kept.exists():
        shutil.copytree(folder, kept)
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    train(*RUN, *devices, f"paths.root={runs}", f"paths.output_dir={folder}")
    assert_same_run(folder, runs / "one")


@pytest.mark.slow
def test_a_rank_that_is_killed_costs_the_steps_since_the_checkpoint_alone(runs, tmp_path):
    fault = "+callbacks.fault={_target_: fault_at.FaultAt, what: kill, step: 4, rank: 1}"
    command = [*RUN, *TWO, f"paths.root={runs}", f"paths.output_dir={tmp_path}"]
    killed = train(*command, fault, "callbacks.checkpoint.every_n_train_steps=2", check=False)
    assert killed.returncode and "rank 1" in killed.stderr and "Traceback" not in killed.stderr, killed.stderr
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
    train(*command)
    assert_same_run(tmp_path, runs / "one")


@pytest.mark.slow
def test_sharded_and_evaluated_by_the_model_itself_it_is_the_same_run(runs, tmp_path):
    train(*RUN, *TWO, "strategy=fsdp", f"paths.root={runs}", f"paths.output_dir={tmp_path}")
    assert_same_run(tmp_path, runs / "one")
    for name, value in whole_model(runs / "one").items():
        torch.testing.assert_close(whole_model(tmp_path)[name], value, rtol=1e-4, atol=1e-5, msg=name)
