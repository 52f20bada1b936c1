"""Who a run is, and what it leaves in its folder."""

import json

import pytest

from kimivl import tracking


def test_a_run_has_one_id_per_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.run_id("a") == tracking.run_id(tmp_path / "a") != tracking.run_id("b")


def test_history_is_appended_to(tmp_path):
    for step in (0, 1):
        tracking.History(tmp_path).log_metrics({"train/loss": 1.5}, step)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == [{"step": 0, "train/loss": 1.5}, {"step": 1, "train/loss": 1.5}]


def test_run_file_round_trip(tmp_path):
    assert tracking.read_run(tmp_path / "new") == {}
    tracking.write_run(tmp_path / "new", "running", {"seed": 1})
    assert tracking.read_run(tmp_path / "new") == {"status": "running", "config": {"seed": 1}}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


@pytest.mark.parametrize("key", ["", "0" * 40])
def test_a_key_is_looked_for(key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert tracking.has_key() is bool(key)


def test_a_closed_run_lets_the_next_one_begin(tmp_path, monkeypatch):
    """Two jobs in one process: each has a W&B run of its own."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for name in ("one", "two"):
        logger = tracking.wandb_logger(str(tmp_path / name), project="test", group="sweep", job_type="sft")
        logger.log_metrics({"train/loss": 1.0}, step=0)
        ids.append(logger.experiment.id)
        tracking.close([logger], "success")
    assert ids == [tracking.run_id(tmp_path / name) for name in ("one", "two")]
    assert all(
        len(list((tmp_path / name / "wandb").glob(f"offline-run-*-{run}"))) == 1
        for name, run in zip(("one", "two"), ids, strict=True)
    )
