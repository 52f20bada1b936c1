"""What curves are drawn over, as the server gets it."""

import time
from fnmatch import fnmatchcase

import pytest
from tracking.test_wandb_run import begin, fail_after_the_first_answer

from kimivl import tracking
from kimivl.cli import main
from kimivl.tracking.names import AXES, ITERATION, METRICS, STEP, TOKENS


def one_iteration(loggers, number):
    """Two steps of RL with a validation behind them; of the second the training logs nothing."""
    step = 2 * number
    rows = (
        {
            ITERATION: number,
            "rollout/accuracy": 0.5,
            "reward/total": 0.5,
            "sampler/seen": 0.1,
            TOKENS: 64 * number + 64,
        },
        {"train/loss": 1.0, "epoch": number},
        {"val/accuracy": 0.25},
    )
    for row, at in zip(rows, (step, step, step + 1), strict=True):
        for logger in loggers:
            logger.log_metrics(row, at)
            logger.save()


def run_of(folder, numbers, goes_on=False):
    tracking.begin_run(folder, {}, goes_on)
    loggers = begin(folder)
    for number in numbers:
        one_iteration(loggers, number)
    tracking.write_run(folder, "interrupted", {})
    return loggers


def test_every_figure_has_one_axis_and_rl_its_iterations(tmp_path, server):
    loggers = run_of(tmp_path, range(2))
    loggers[1].log_metrics({"mine/own": 1.0}, 4)
    tracking.close(loggers, "success")
    [sent] = server.runs.values()
    assert {axis: sent.axes[axis] for axis in AXES} == dict.fromkeys(AXES)
    logged = {name for row in sent.history for name in row if name[0] != "_"} - {*AXES}
    for name in (logged | METRICS.keys()) - {*AXES}:
        fitting = {axis for defined, axis in sent.axes.items() if fnmatchcase(name, defined)}
        in_iterations = name.startswith(("rollout/", "reward/", "sampler/"))
        if name[0] != "*":  # of val/ and test/
            assert fitting == {ITERATION if in_iterations else STEP}, name
    assert {sent.axes[name] for name in ("val/*", "test/*", "mine/*")} == {STEP}
    assert {"rollout/accuracy", "reward/total"} <= sent.axes.keys()
    assert sent.curve("reward/total", ITERATION) == [(0, 0.5), (1, 0.5)]


def test_what_the_machine_does_is_followed(tmp_path, server):
    loggers = run_of(tmp_path, range(1))
    [sent] = server.runs.values()
    deadline = time.monotonic() + 30
    while not any("system.cpu" in row for row in sent.machine) and time.monotonic() < deadline:
        time.sleep(0.2)
    tracking.close(loggers, "success")
    assert any({"system.cpu", "system.proc.memory.rssMB"} <= row.keys() for row in sent.machine)


def test_losses_and_validations_can_be_drawn_over_tokens_and_iterations(tmp_path, server):
    tracking.close(run_of(tmp_path, range(2)), "interrupted")
    time.sleep(1.05)  # W&B names its folders by the second
    tracking.begin_run(tmp_path, {}, True)
    loggers = begin(tmp_path)
    loggers[1].log_metrics({"val/length": 7.0}, 3)  # stopped in the middle of a validation
    loggers[1].save()
    one_iteration(loggers, 2)
    tracking.close(loggers, "success")
    [sent] = server.runs.values()
    assert sent.curve("train/loss", TOKENS) == [(64, 1.0), (128, 1.0), (192, 1.0)]
    assert sent.curve("val/accuracy", TOKENS) == [(64, 0.25), (128, 0.25), (192, 0.25)]
    assert sent.curve("val/length", TOKENS) == [(128, 7.0)] and sent.curve("val/length", ITERATION) == [(1, 7.0)]
    assert sent.curve("train/loss", ITERATION) == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert sent.curve("val/accuracy", ITERATION) == [(0, 0.25), (1, 0.25), (2, 0.25)]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_run_that_is_sent_later_has_its_axes(tmp_path, server, monkeypatch, mode):
    with monkeypatch.context() as patched:
        if mode == "offline":
            patched.setenv("WANDB_MODE", "offline")
        else:
            fail_after_the_first_answer(server, patched)
        tracking.close(run_of(tmp_path, range(2)), "success")
    server.mood = "well"
    assert main(["sync", str(tmp_path)]) == 0
    [sent] = server.runs.values()
    assert sent.axes["reward/*"] == ITERATION and sent.axes["train/*"] == STEP
    assert sent.curve("val/accuracy", TOKENS) == [(64, 0.25), (128, 0.25)]
    assert sent.curve("val/accuracy", ITERATION) == [(0, 0.25), (1, 0.25)]
