"""Solve rates and the hardest problems, with their pictures, in W&B; nothing where it is off."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from kimivl import tracking
from kimivl.callbacks import Problems
from kimivl.callbacks.problems import hardest_problems
from kimivl.data.sample import Sample
from kimivl.rl.sampler import ProblemSampler
from kimivl.rl.types import Problem
from kimivl.runtime import ranks
from kimivl.tracking.wandb_run import WandbRun


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def problem(number: int) -> Problem:
    images = () if number == 2 else (png(10 * number),)
    content = [{"type": "text", "text": f"What is {number}?"}]
    message = {"role": "user", "content": [*([{"type": "image"}] if images else []), *content]}
    return Problem(number, Sample(f"p{number}", [message], images, str(number)), prompt=None)


class Data:
    """A datamodule of six problems, of which four were visited."""

    index = "index"

    def __init__(self):
        self.sampler = ProblemSampler({"difficulty": np.arange(6)})
        self.read: list[int] = []
        for rates in ([1.0, 0.5, 0.0, 0.0], [1.0, 0.5, 0.0]):
            self.sampler.update(np.arange(len(rates)), np.array(rates), 0)

    def read_problems(self, index, numbers):
        self.read += numbers
        return [problem(number) for number in numbers]


def epoch_end(callback: Problems, loggers, epoch: int, datamodule=None, rank: int = 0) -> Data:
    datamodule = datamodule or Data()
    trainer = SimpleNamespace(
        current_epoch=epoch,
        max_epochs=5,
        global_step=4 * epoch,
        is_global_zero=rank == 0,
        loggers=loggers,
        datamodule=datamodule,
    )
    callback.on_train_epoch_end(trainer, None)
    return datamodule


@pytest.fixture
def wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbRun(str(tmp_path / "run"), project="test", group="g", job_type="rl")
    yield logger
    tracking.close([logger], "success")


def test_the_table_shows_the_hardest_with_their_pictures(wandb_run, monkeypatch):
    tables = []
    monkeypatch.setattr(wandb_run, "show_table", lambda name, rows, step: tables.append(rows))
    datamodule = epoch_end(Problems(every_n_iterations=2, hardest=3), [wandb_run], epoch=1)
    assert datamodule.read == [2, 3, 1]  # never solved, the more visited first; then half solved
    [rows] = tables
    assert [(row["key"], row["solve_rate"], row["visits"], row["ever_solved"]) for row in rows] == [
        ("p2", 0.0, 2, False),
        ("p3", 0.0, 1, False),
        ("p1", 0.5, 2, True),
    ]
    assert rows[0]["image"] is None and rows[1]["question"] == "[image] What is 3?" and rows[1]["expected"] == "3"
    assert [row["image"].small().getpixel((0, 0))[0] for row in rows[1:]] == [30, 10]


def test_the_table_reaches_the_run(wandb_run):
    epoch_end(Problems(every_n_iterations=1, hardest=2), [wandb_run], epoch=0)
    wandb_run.save()
    [table] = (Path(wandb_run.experiment.dir) / "media" / "table").rglob("*.table.json")
    assert table.name.startswith("hardest") and len(json.loads(table.read_text())["data"]) == 2


def test_the_histogram_counts_the_visited(wandb_run):
    epoch_end(Problems(every_n_iterations=1), [wandb_run], epoch=0)
    wandb_run.save()
    counts = np.array(wandb_run.experiment.summary._as_dict()["sampler/solve_rate"]["values"])
    assert counts.sum() == 4 and counts[0] == 2 and counts[-1] == 1


@pytest.mark.parametrize(("epoch", "due"), [(0, False), (1, False), (2, True), (3, False), (4, True)])
def test_every_few_iterations_and_at_the_end(monkeypatch, epoch, due):
    logged = []
    monkeypatch.setattr(tracking, "shows_media", lambda loggers: True)
    monkeypatch.setattr(tracking, "log_histogram", lambda *args: logged.append("histogram"))
    monkeypatch.setattr(tracking, "log_table", lambda *args: logged.append("table"))
    epoch_end(Problems(every_n_iterations=3), [], epoch)
    assert logged == (["histogram", "table"] if due else [])


def test_without_wandb_nothing_is_read_or_written(tmp_path):
    history = tracking.History(tmp_path)
    assert epoch_end(Problems(1), [history], epoch=0).read == []
    assert not history.path.exists()
    assert tracking.shows_media([history]) is False
    tracking.log_histogram([history], "a", np.zeros(3), (0, 1))
    tracking.log_table([history], "b", [{"image": tracking.Picture(b"")}])
    assert not history.path.exists()


def test_other_ranks_and_other_stages_leave_nothing(monkeypatch):
    monkeypatch.setattr(tracking, "shows_media", lambda loggers: True)
    monkeypatch.setattr(tracking, "log_histogram", lambda *args: pytest.fail("it was shown"))
    monkeypatch.setattr(ranks, "is_first", lambda: False)
    assert epoch_end(Problems(1), [], epoch=0, rank=1).read == []
    epoch_end(Problems(1), [], epoch=0, datamodule=SimpleNamespace())


def test_the_hardest():
    rate, visits = np.array([0.5, 0.1, np.nan, 0.1, 0.0]), np.array([1, 2, 0, 5, 1])
    assert hardest_problems(rate, visits, 3).tolist() == [4, 3, 1]
    assert hardest_problems(rate, visits, 9).tolist() == [4, 3, 1, 0]
    assert hardest_problems(np.full(2, np.nan), np.zeros(2), 3).tolist() == []
