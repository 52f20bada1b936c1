"""The table of samples that a run leaves out."""

import io
import json
import tarfile
from types import SimpleNamespace

import pytest

from kimivl.callbacks import Rejected
from kimivl.tracking import Picture, Shows


class Tables(Shows):
    def __init__(self) -> None:
        self.shown = []

    def show_table(self, name, rows, step):
        self.shown.append((name, rows, step))

    def show_histogram(self, *args):
        raise AssertionError


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("one.json", b"{}"), ("one.0.png", b"picture"), ("one1.0.png", b"another's")):
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return str(path)


def start(tmp_path, faults, loggers, first=True, rows=64):
    dropped = tmp_path / "index.dropped.jsonl"
    dropped.write_text("".join(json.dumps(fault) + "\n" for fault in faults))
    datamodule = SimpleNamespace(index=SimpleNamespace(dropped_file=dropped))
    trainer = SimpleNamespace(is_global_zero=first, loggers=loggers, datamodule=datamodule, global_step=7)
    callback = Rejected(str(tmp_path / "audit"), rows)
    callback.on_train_start(trainer, None)
    return callback, trainer


def test_each_sample_with_its_reason_and_its_picture(tmp_path, shard):
    gone = {"reason": "truncated_shard", "key": "two", "shard": str(tmp_path / "gone.tar"), "detail": "cut"}
    faults = [{"reason": "bad_json", "key": "one", "shard": shard, "detail": "no brace"}, gone]
    logger = Tables()
    start(tmp_path, faults, [logger])
    [(name, rows, step)] = logger.shown
    assert (name, step) == ("data/rejected", 0) and rows[0]["image"] == Picture(b"picture")
    assert [(row["key"], row["reason"], row["detail"]) for row in rows] == [
        ("one", "bad_json", "no brace"),
        ("two", "truncated_shard", "cut"),
    ]
    assert rows[1]["image"] is None


def test_what_could_not_be_read_since_comes_at_the_end(tmp_path, shard):
    logger = Tables()
    callback, trainer = start(tmp_path, [], [logger])
    (tmp_path / "audit").mkdir()
    hole = {"sample": 3, "reason": "bad_image", "key": "one", "shard": shard, "detail": "?", "epoch": 0, "step": 5}
    (tmp_path / "audit" / "quarantine.jsonl").write_text(json.dumps(hole) + "\n")
    callback.on_fit_end(trainer, None)
    [_, (_, [row], step)] = logger.shown if len(logger.shown) > 1 else [None, *logger.shown]
    assert (row["step"], row["reason"], step) == (5, "bad_image", 7)


def test_a_long_list_is_shown_in_part_and_only_where_it_can_be_shown(tmp_path):
    faults = [{"reason": "bad_json", "key": f"{n}", "shard": "x", "detail": ""} for n in range(9)]
    logger = Tables()
    start(tmp_path, faults, [logger], rows=4)
    assert len(logger.shown[0][1]) == 4
    start(tmp_path, faults, [other := Tables()], first=False)
    start(tmp_path, faults, [])
    assert other.shown == []
