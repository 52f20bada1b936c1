"""The comparisons of RL: curves over sampled tokens, intervals over seeds, and arms that differ in what they say."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import rl_comparisons
from benchmarks.rl_comparisons import ARMS, SEEDS, main
from benchmarks.rl_curves import Run, estimate, mean_curve, tokens_to_reach
from benchmarks.rl_figure import draw
from benchmarks.rl_report import COMPARISONS, difference, figures, reached, tables
from kimivl.config import compose_run, validate


def make_run(folder: Path, seed: int, gain: float = 0.0, iterations: int = 10) -> Run:
    """A finished run of 2 x 2 responses an iteration, whose figures are known; ``gain`` in accuracy an iteration."""
    (folder / "rollouts").mkdir(parents=True)
    rows = []
    for i in range(iterations):
        responses = [{"tokens": 10 + i, "correct": 1.0}, {"tokens": 30 + i, "correct": None if i == 1 else 0.0}]
        lines = [json.dumps({"rejected": "too_easy" if n else None, "responses": responses}) for n in range(2)]
        (folder / "rollouts" / f"{i:06d}.jsonl").write_text("\n".join(lines) + "\n")
        rows.append({"step": 4 * i + 3, "train/loss": 0.0})
        if i % 5 == 4:
            rows.append({"step": 4 * (i + 1), "val/sampled_accuracy": 0.5 + gain * (i + 1) + 0.01 * seed})
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, rows)))
    test = {"test/accuracy": 0.8, "test/sampled_accuracy": 0.6 + gain + 0.01 * seed, "test/sampled_length": 50.0 + seed}
    (folder / "metrics.json").write_text(json.dumps(test))
    return Run(folder)


@pytest.fixture
def runs(tmp_path):
    return {
        comparison: {
            arm: {seed: make_run(tmp_path / comparison / arm / str(seed), seed, gain) for seed in SEEDS}
            for arm, gain in (("first", 0.01), ("other", 0.02))
        }
        for comparison in COMPARISONS
    }


def test_tokens_are_all_that_were_sampled_those_of_rejected_groups_too(tmp_path):
    run = make_run(tmp_path / "run", 1)
    assert run.tokens[:3].tolist() == [0, 80, 164]
    x, lengths = run.sampled("length", 5)
    assert lengths.tolist() == [22.0, 27.0] and x[0] == pytest.approx(run.tokens[:5].mean())
    # What no verifier has judged is neither right nor wrong.
    assert run.sampled("accuracy", 1)[1][:3].tolist() == [0.5, 1.0, 0.5]


def test_a_validation_stands_at_the_tokens_that_were_sampled_before_it(tmp_path):
    run = make_run(tmp_path / "run", 1, gain=0.01)
    x, values = run.validation("sampled_accuracy")
    assert x.tolist() == run.tokens[[5, 10]].tolist() and values == pytest.approx([0.56, 0.61])
    with pytest.raises(ValueError, match="check_val_every_n_epoch"):
        run.validation("nothing")


def test_intervals_are_those_of_student():
    found = estimate([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.302653 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-5)
    assert math.isnan(estimate([1.0]).half) and estimate([1.0]).text() == "1.0"
    assert estimate([0.5, 0.5]).text("{:+.1f}", 100) == "+50.0 ± 0.0"


def test_a_mean_curve_spans_what_all_seeds_have():
    curve = mean_curve([(np.array([0.0, 10.0]), np.array([0.0, 1.0])), (np.array([2.0, 8.0]), np.array([0.0, 0.0]))])
    assert (curve.tokens[0], curve.tokens[-1]) == (2.0, 8.0)
    assert curve.mean[[0, -1]] == pytest.approx([0.1, 0.4])


def test_a_goal_is_reached_where_the_curve_crosses_it():
    curve = np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.5, 0.4])
    assert tokens_to_reach(curve, 0.25) == pytest.approx(5.0)
    assert tokens_to_reach(curve, 0.0) == 0.0
    assert tokens_to_reach(curve, 0.6) == math.inf


def test_arms_are_compared_seed_by_seed(runs):
    arms = runs["sampler"]
    found = difference(arms, "other", "test/sampled_accuracy")
    assert found.mean == pytest.approx(0.01) and found.half == pytest.approx(0.0, abs=1e-9)
    del arms["first"][2]
    assert len(difference(arms, "other", "test/sampled_accuracy").values) == 2
    goal = reached(arms, COMPARISONS["sampler"].curves[0])
    assert goal.tokens["other"] < goal.tokens["first"] < math.inf


def test_tables_figures_and_picture_show_all_comparisons(runs, tmp_path):
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    for table in tables(runs):
        console.print(table)
    text = console.export_text()
    assert all(about.title in text for about in COMPARISONS.values()) and "64.0 ± 2.5" in text
    draw(runs, tmp_path / "curves.png")
    assert 10_000 < (tmp_path / "curves.png").stat().st_size < 200_000
    written = json.loads(json.dumps(figures(runs)))
    assert written["sampler"]["other"]["seeds"] == list(SEEDS)


def test_a_goal_that_is_not_reached_is_said_in_words_and_as_null(tmp_path):
    arms = {arm: {1: make_run(tmp_path / arm, 1, gain)} for arm, gain in (("first", 0.02), ("other", 0.01))}
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(*tables({"sampler": arms}))
    assert "not reached" in console.export_text()
    assert figures({"sampler": arms})["sampler"]["reached"]["tokens"]["other"] is None


def test_a_single_seed_has_no_interval_but_is_shown(runs, tmp_path):
    one = {"length": {arm: {1: of_seeds[1]} for arm, of_seeds in runs["length"].items()}}
    draw(one, tmp_path / "curves.png")
    assert len(list(tables(one))) == 1


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm.comparison}-{arm.name}")
def test_every_arm_is_a_valid_run(arm, tmp_path):
    command = rl_comparisons._arm(tmp_path, arm, 2)
    cfg = compose_run(*command[2:])
    validate(cfg)
    assert cfg.seed == 2 and cfg.data.phases[0].epochs == arm.iterations
    compose_run(*rl_comparisons._warm_up(tmp_path, arm.warm_up)[2:])


def test_arms_of_a_comparison_start_alike_and_differ_in_their_settings():
    for comparison in COMPARISONS:
        arms = [arm for arm in ARMS if arm.comparison == comparison]
        assert len(arms) == 2 and arms[0].warm_up == arms[1].warm_up and arms[0].overrides != arms[1].overrides


def test_a_run_that_has_ended_is_not_run_again_and_one_that_fails_is_named(tmp_path, capsys):
    console = Console(quiet=True)
    failing = [sys.executable, "-c", "print('the last word'); raise SystemExit(3)"]
    make_run(tmp_path / "done", 1)
    assert rl_comparisons._run(tmp_path / "done", failing, console) is None
    line = rl_comparisons._run(tmp_path / "new", failing, console)
    assert line is not None and "exit code 3: the last word" in line
    ending = [sys.executable, "-c", f"open(r'{tmp_path / 'new' / 'metrics.json'}', 'w').write('{{}}')"]
    assert rl_comparisons._run(tmp_path / "new", ending, console) is None
    assert Run(tmp_path / "new").ended


def test_the_command_says_what_it_does_not_know(tmp_path, capsys):
    assert main(["--only", "lenght", "--out", str(tmp_path)]) == 2
    assert "choose from length, sampler, objective" in capsys.readouterr().err
    # A comparison is shown once each of its arms has a run.
    make_run(tmp_path / "runs" / "length" / "without" / "seed_1", 1)
    assert main(["--no-runs", "--out", str(tmp_path)]) == 0
    assert "Length reward" not in capsys.readouterr().out
    make_run(tmp_path / "runs" / "length" / "length_reward" / "seed_1", 1)
    assert main(["--no-runs", "--out", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    assert "Length reward" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out.json").read_text())) == ["length"]
