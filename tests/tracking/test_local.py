"""CSV and TensorBoard files: whole, in order, and continued by the process that goes on."""

import csv
import resource
from contextlib import contextmanager

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kimivl import tracking
from kimivl.tracking.local import CsvRun, TensorBoardRun


def read_csv(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def read_events(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    events.Reload()
    return events


def log_losses(logger, steps):
    for step in steps:
        logger.log_metrics({"train/loss": float(10 - step)}, step)
        logger.save()


@pytest.mark.parametrize("kill", [False, True])
def test_csv_goes_on_where_it_was(tmp_path, kill):
    logger = CsvRun(str(tmp_path))
    log_losses(logger, range(4))
    if kill:  # in the middle of a row
        with (tmp_path / "metrics.csv").open("a") as file:
            file.write("4,6.")
    else:
        tracking.close([logger], "interrupted")
    logger = CsvRun(str(tmp_path))  # goes on from a checkpoint after step 2
    log_losses(logger, range(2, 6))
    logger.log_metrics({"val/accuracy": 0.5}, 5)
    tracking.close([logger], "success")
    rows = read_csv(tmp_path)
    assert [(row["step"], row["train/loss"]) for row in rows[:6]] == [(f"{n}", f"{10.0 - n}") for n in range(6)]
    assert rows[6:] == [{"step": "5", "val/accuracy": "0.5"}]


@contextmanager
def full_disk(size):
    """No file can have more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("column", ["train/loss", "val/accuracy"])  # one of the file's, and a new one
def test_a_full_disk_takes_no_row_from_csv(tmp_path, column):
    file, logger = tmp_path / "metrics.csv", CsvRun(str(tmp_path))
    log_losses(logger, range(4))
    before = file.read_bytes()
    with full_disk(len(before) + 3), pytest.raises(OSError):
        logger.log_metrics({column: 0.25}, 4)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    log_losses(logger, [5])
    rows = read_csv(tmp_path)
    assert rows[:4] == [{"step": f"{n}", "train/loss": f"{10.0 - n}"} for n in range(4)]
    assert rows[4:] == [{"step": "4", column: "0.25"}, {"step": "5", "train/loss": "5.0"}]


def test_tensorboard_goes_on_where_it_was(tmp_path):
    for steps in (range(4), range(2, 6)):
        logger = TensorBoardRun(str(tmp_path))
        logger.log_hyperparams({"data": {"seed": 1}})
        log_losses(logger, steps)
        tracking.close([logger], "success")
    events = read_events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(n, 10.0 - n) for n in range(6)]
    [config] = events.Tensors("config/text_summary")
    assert b"data.seed: 1" in config.tensor_proto.string_val[0]


def test_tensorboard_shows_tables_with_pictures_and_histograms(tmp_path, picture):
    logger = TensorBoardRun(str(tmp_path))
    assert tracking.shows_media([logger])
    rows = [{"key": "a|b", "image": tracking.Picture(picture)}, {"key": "c\nd", "image": None}]
    tracking.log_table([logger], "val/transcripts", rows, 3)
    tracking.log_histogram([logger], "sampler/solve_rate", np.array([0.0, 0.5, 1.0]), (0, 1), 3)
    tracking.close([logger], "success")
    events = read_events(tmp_path)
    [table] = events.Tensors("val/transcripts/text_summary")
    assert table.step == 3 and rb"| a\|b |" in table.tensor_proto.string_val[0]
    assert b"| c d |" in table.tensor_proto.string_val[0]
    assert events.Images("val/transcripts/0")[0].width == 448
    assert events.Histograms("sampler/solve_rate")[0].histogram_value.num == 3
