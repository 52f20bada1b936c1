"""The benchmark of whole RL iterations: equal work on all sides, turns, and a table that says what was measured."""

import json
import threading

import numpy as np
import pytest
from rich.console import Console

from benchmarks import rl_step
from benchmarks.iterations import PHASES, Door, Iteration, Ours, Workload
from benchmarks.rl_step import main, ratios, spread, table, targets

WORK = {"model": "tiny", "problems": 4, "responses": 3, "updates": 2, "median": 6, "longest": 12}


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    workload = Workload(tmp_path_factory.mktemp("rl-step"), **WORK)
    workload.prepare()
    return workload


def iteration(tokens: int, cpu: float, generate: float = 1.0) -> Iteration:
    return Iteration(
        tokens, (tokens // 2, tokens - tokens // 2), 4.0, cpu, dict.fromkeys(PHASES, 0.5) | {"generate": generate}
    )


def test_lengths_are_the_same_for_all_sides_new_in_each_iteration_and_have_a_tail(tmp_path):
    work = Workload(tmp_path, **(WORK | {"problems": 64, "median": 48, "longest": 256}))
    lengths = work.lengths(3)
    assert np.array_equal(lengths, work.lengths(3)) and not np.array_equal(lengths, work.lengths(4))
    assert lengths.shape == (64 * 3,) and lengths.min() >= 2 and lengths.max() <= 256
    assert 40 < np.median(lengths) < 58 and lengths.max() > 3 * np.median(lengths)


def test_a_trainer_behind_a_door_does_one_iteration_at_a_time():
    door, done = Door(), []

    def train() -> None:
        for number in range(3):
            door.enter()
            with door.phase("generate"):
                done.append(number)
            door.lengths = [number + 1, 1]
            door.leave()
        raise RuntimeError("out of problems")

    door.run(train)
    assert done == []
    found = [door.iterate() for _ in range(2)]
    assert done == [0, 1] and [i.tokens for i in found] == [2, 3] and found[1].lengths == (1, 2)
    assert found[0].phases["generate"] > 0 and sum(found[0].phases.values()) == pytest.approx(found[0].wall_s)
    with pytest.raises(RuntimeError, match="out of problems"):
        for _ in range(2):
            door.iterate()


def test_our_side_ends_each_response_where_it_is_told_to(workload):
    side = Ours(workload, ["optimizer=adamw"])
    for number in range(2):
        found = side.iterate()
        assert found.lengths == tuple(sorted(workload.lengths(number).tolist()))
        assert found.tokens == workload.lengths(number).sum()
        assert all(found.phases[name] > 0 for name in ("generate", "score", "reference", "train"))
    experience = side.datamodule.experience
    assert experience.correct.mean() not in (0, 1)
    assert sum(thread.daemon for thread in threading.enumerate()) >= 1  # it waits at its door, and holds nobody up


def test_ratios_are_taken_turn_by_turn_and_held_against_the_target():
    measured = {
        "kimivl": [iteration(100, 2.0), iteration(200, 2.0)],
        "TRL": [iteration(100, 6.0), iteration(200, 3.0)],
    }
    an_hour = rl_step.FIGURES["iterations an hour"]
    assert ratios(measured, an_hour) == [3.0, 1.5]
    assert an_hour(measured["kimivl"][0]) == 1800
    assert rl_step.FIGURES["sampled tokens/s"](measured["kimivl"][0]) == pytest.approx(100 / (2.0 * 1.0 / 4.0))
    assert [line.split(":")[0] for line in targets(measured)] == ["met", "met"]
    measured["TRL"] = [iteration(100, 2.0), iteration(200, 2.0)]
    assert [line.split(":")[0] for line in targets(measured)] == ["MISSED", "MISSED"]
    console = Console(width=120, record=True, quiet=False)
    console.print(table(measured))
    assert all(f"{phase}, s" in console.export_text(clear=False) for phase in PHASES)
    assert spread([1.0, 3.0, 2.0]) == "2 (1..3)"


@pytest.mark.slow
def test_without_trl_the_command_measures_our_side_and_says_why(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(rl_step, "find_spec", lambda name: None)
    small = ["--problems", "4", "--responses", "2", "--updates", "2", "--median", "4", "--longest", "8"]
    assert main([*small, "--iterations", "1", "--warmup", "0", "--json", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().out
    assert "pip install trl" in said and "iterations an hour" in said and "MISSED" not in said
    assert list(json.loads((tmp_path / "out.json").read_text())["iterations"]) == ["kimivl"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["--responses", "1"], "--responses"), (["--updates", "7"], "--updates"), (["--median", "0"], "--median")],
)
def test_settings_that_cannot_be_measured_are_refused(arguments, name, capsys):
    assert main(arguments) == 2
    assert name in capsys.readouterr().err
