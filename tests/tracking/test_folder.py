"""Who a run is, and what it leaves in its folder."""

import json

import pytest

from kimivl import tracking
from kimivl.history import read_history


def test_a_run_keeps_its_id_where_its_folder_is_moved(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    tracking.begin_run(old, {}, goes_on=False)
    before = tracking.read_run(old)["id"]
    tracking.write_run(old, "interrupted", {})
    old.rename(new)
    tracking.begin_run(new, {}, goes_on=True)
    tracking.begin_run(old, {}, goes_on=False)  # another run, where that one was
    assert tracking.read_run(new)["id"] == before != tracking.read_run(old)["id"]


def test_history_is_appended_to(tmp_path):
    for step in (0, 1):
        tracking.History(tmp_path).log_metrics({"train/loss": 1.5}, step)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == [{"step": 0, "train/loss": 1.5}, {"step": 1, "train/loss": 1.5}]


def test_half_a_row_that_a_lost_machine_left_is_taken_away(tmp_path):
    tracking.History(tmp_path).log_metrics({"train/loss": 1.5}, 0)
    file = tmp_path / "history.jsonl"
    file.write_text(file.read_text() + '{"step": 1, "train/lo')
    assert read_history(file) == [{"step": 0, "train/loss": 1.5}]
    tracking.History(tmp_path).log_metrics({"train/loss": 1.25}, 1)
    assert [row["train/loss"] for row in read_history(file)] == [1.5, 1.25]


def test_a_run_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "run.json").write_text("")
    with pytest.raises(ValueError, match=rf"{tmp_path}/run\.json cannot be read .*; remove {tmp_path}, or bring"):
        tracking.read_run(tmp_path)


def test_run_file_round_trip(tmp_path):
    assert tracking.read_run(tmp_path / "new") == {}
    tracking.write_run(tmp_path / "new", "failed", {"seed": 1}, "the disk is full")
    about = tracking.read_run(tmp_path / "new")
    assert about.pop("id") and about == {"status": "failed", "error": "the disk is full", "config": {"seed": 1}}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("status", "config", "goes_on", "same"),
    [
        ("interrupted", {"seed": 1}, True, True),  # requeued
        ("finished", {"seed": 1}, True, True),  # gone on with from its own checkpoint
        ("running", {"seed": 1}, False, True),  # killed before it left a checkpoint
        ("finished", {"seed": 1}, False, False),  # the same command once more, after its end
        ("failed", {"seed": 2}, False, False),  # another run in the folder of one that failed
    ],
)
def test_a_run_that_begins_anew_is_another_one(tmp_path, status, config, goes_on, same):
    tracking.write_run(tmp_path, status, config)
    before = tracking.read_run(tmp_path)["id"]
    for name in ("history.jsonl", "metrics.csv"):
        (tmp_path / name).write_text("{}\n")
    tracking.begin_run(tmp_path, {"seed": 1}, goes_on)
    about = tracking.read_run(tmp_path)
    assert about["status"] == "running" and (about["id"] == before) is same
    assert (tmp_path / "history.jsonl").exists() is (tmp_path / "metrics.csv").exists() is goes_on
    tracking.write_run(tmp_path, "finished", {"seed": 1})
    assert tracking.read_run(tmp_path)["id"] == about["id"]


def test_the_parent_is_the_run_whose_model_it_is(tmp_path):
    tracking.write_run(tmp_path / "sft", "finished", {})
    assert tracking.parent_of(str(tmp_path / "sft" / "model")) == tracking.read_run(tmp_path / "sft")
    assert tracking.parent_of(str(tmp_path / "published")) == tracking.parent_of(None) == {}
