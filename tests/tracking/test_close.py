"""The end of a run's loggers, and the group of a sweep."""

import logging
from pathlib import Path

import pytest
import wandb
from omegaconf import OmegaConf
from tracking.test_wandb_run import process

from kimivl import tracking
from kimivl.tracking.local import TensorBoardRun
from kimivl.tracking.wandb_run import WandbRun, end_service


class Broken(tracking.History):
    """What ends it fails, as that of a logger does whose disk is full."""

    def __init__(self, folder, fails):
        super().__init__(folder)
        self.fails, self.ended = fails, []

    def end(self, how, outcome):
        self.ended.append((how, outcome))
        if how == self.fails:
            raise OSError(28, "No space left on device")

    def finalize(self, outcome):
        self.end("finalize", outcome)

    def close(self, outcome):
        self.end("close", outcome)


@pytest.mark.parametrize("fails", ["finalize", "close"])
def test_a_logger_that_fails_at_the_end_leaves_none_open(tmp_path, offline, caplog, fails):
    run = tmp_path / "one"
    tracking.begin_run(run, {}, False)
    broken, w_and_b = Broken(run, fails), WandbRun(str(run), "kimivl", "g", "sft")
    w_and_b.log_metrics({"train/loss": 1.0}, 0)
    with caplog.at_level(logging.WARNING):
        tracking.close([broken, w_and_b], "failed")
    assert broken.ended == [("finalize", "failed"), ("close", "failed")] and wandb.run is None
    [warning] = [record.message for record in caplog.records if record.name.startswith("kimivl")]
    assert warning.startswith("Broken could not be closed") and "No space left on device" in warning
    assert process(tmp_path / "two", 0, 1) != tracking.read_run(run)["id"]


def test_a_client_of_wandb_that_has_died_leaves_the_next_job_of_the_process_a_run_of_its_own(tmp_path, offline, caplog):
    run = tmp_path / "one"
    tracking.begin_run(run, {}, False)
    loggers = [WandbRun(str(run), "kimivl", "g", "sft"), TensorBoardRun(str(run))]
    for logger in loggers:
        logger.log_metrics({"train/loss": 1.0}, 0)
    end_service()
    with caplog.at_level(logging.WARNING):
        tracking.close(loggers, "failed")
    assert "WandbRun could not be closed" in caplog.text and "TensorBoardRun" not in caplog.text
    second = process(tmp_path / "two", 0, 3)
    assert len(list((tmp_path / "two" / "wandb").glob(f"offline-run-*-{second}"))) == 1


def config(group="a"):
    return OmegaConf.create({"csv": {}, "wandb": {"group": group}})


def test_sweeps_of_two_names_are_two_groups():
    loggers = {name: config(name) for name in ("a", "b")}
    for name, own in loggers.items():
        tracking.join_sweep(own, name, Path("outputs") / name / "sweeps" / "sft-lr_grid")
    groups = {name: own.wandb.group for name, own in loggers.items()}
    assert groups == {"a": "a-sft-lr_grid", "b": "b-sft-lr_grid"}


def test_a_group_that_was_chosen_stays():
    chosen = config("mine")
    tracking.join_sweep(chosen, "a", Path("outputs/a/sweeps/sft-lr_grid"))
    assert chosen == config("mine")


@pytest.mark.parametrize("loggers", [None, {}, {"csv": {}}, {"wandb": None}])
def test_a_sweep_needs_no_wandb(loggers):
    given = None if loggers is None else OmegaConf.create(loggers)
    tracking.join_sweep(given, "a", Path("sweeps/x"))
    assert given == loggers
