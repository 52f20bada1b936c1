"""What `kimivl sweep` says of a folder: made up here, without running anything."""

import fcntl
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from kimivl.cli import main
from kimivl.sweep.folder import read_sweep
from kimivl.sweep.picture import _COLOURS as COLOURS
from kimivl.sweep.picture import _scale, _short, plt
from kimivl.sweep.summary import fold, half_interval, shown
from kimivl.tracking.names import METRICS


class Folder:
    """A sweep's folder; ``metric`` is a function of a point's values, as text."""

    def __init__(self, path, params, metric, sweeper=None, hydra=()):
        self.path, self.params, self.metric = path, params, metric
        path.mkdir(parents=True)
        given = {key: ",".join(values) for key, values in params.items()}
        typed = {"task": ["stage=rl", "name=a b"], "hydra": ["hydra.mode=MULTIRUN", *hydra]}
        config = {"sweeper": sweeper or {"params": given}, "job": {"name": "train"}, "overrides": typed}
        (path / "multirun.yaml").write_text(yaml.safe_dump({"optimized_metric": "val/accuracy", "hydra": config}))
        self.points = [dict(zip(params, point, strict=True)) for point in itertools.product(*params.values())]

    def run(self, status="finished", error=None, folder=None, **point):
        """The run of a point, whose values come with dots as underscores."""
        values = {key: point[key.replace(".", "_")] for key in self.params}
        run = self.path / (folder or "_".join(f"{key}-{value}" for key, value in values.items()))
        (run / ".hydra").mkdir(parents=True)
        overrides = [f"{key}={value}" for key, value in values.items()]
        (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([*overrides, "stage=rl", r"name=a\ b"]))
        told = {"status": status, "config": {"optimized_metric": "val/accuracy"}} | ({"error": error} if error else {})
        (run / "run.json").write_text(json.dumps(told))
        if status == "finished":
            (run / "metrics.json").write_text(json.dumps({"val/accuracy": self.metric(*values.values()), "seconds": 2}))
        return run

    def run_all(self, but=()):
        for number, point in enumerate(self.points):
            if number not in but:
                self.run(**{key.replace(".", "_"): value for key, value in point.items()})


def weights(path, **more):
    """A grid of two weights and three seeds: accuracy is the weight and a hundredth of the seed."""
    params = {"reward.length.weight": ["0", "0.5"], "seed": ["1", "2", "3"]}
    return Folder(path, params, lambda weight, seed: float(weight) + int(seed) / 100, **more)


def stages(path):
    """The runs of the stages of one model."""
    runs = [path / "digits" / stage for stage in ("sft", "rl")]
    for run in runs:
        (run / ".hydra").mkdir(parents=True)
        (run / ".hydra" / "overrides.yaml").write_text(f"[stage={run.name}]")
        (run / "run.json").write_text(json.dumps({"status": "finished", "config": {"stage": run.name, "seed": 1}}))
        (run / "metrics.json").write_text('{"val/accuracy": 0.5}')
    return runs


def summary(folder):
    return json.loads((folder.path / "summary.json").read_text())


def said(capsys, *arguments):
    """Exit code and output of ``kimivl sweep``, with what rich folds unfolded."""
    code = main(["sweep", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_a_finished_grid_is_one_row_for_each_point(tmp_path, capsys):
    folder = weights(tmp_path / "grid")
    folder.run_all()
    code, out = said(capsys, folder.path)
    assert code == 0
    assert "0.520 ± 0.025" in out and "0.020 ± 0.025" in out  # 4.303 * 0.01 / sqrt(3)
    assert "best: reward.length.weight=0.5: 0.520 ± 0.025" in out and "6 runs: 6 finished" in out
    assert "what has not finished" not in out
    low, high = summary(folder)["points"]
    assert (low["values"], high["values"]) == ({"reward.length.weight": "0"}, {"reward.length.weight": "0.5"})
    assert high["seeds"] == {"1": 0.51, "2": 0.52, "3": 0.53} and high["interval"] == pytest.approx(0.0248, abs=1e-4)
    assert Image.open(folder.path / "sweep.png").width > 500


def test_the_interval_is_students():
    assert half_interval([0.5, 0.6, 0.7]) == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert half_interval([0.5]) is None and half_interval([]) is None and half_interval([1.0, 1.0]) == 0


def test_what_is_not_finished_is_listed_with_its_reason_and_the_command(tmp_path, capsys):
    folder = weights(tmp_path / "a, grid", hydra=["hydra/launcher=local", "hydra.sweep.dir=/elsewhere"])
    at = "reward_length_weight"
    folder.run(**{at: "0", "seed": "1"})
    folder.run("failed", "the loss is nan", **{at: "0", "seed": "2"})
    folder.run("interrupted", **{at: "0", "seed": "3"})
    cut = folder.run(**{at: "0.5", "seed": "1"})
    (cut / "metrics.json").write_text('{"val/accuracy": 0.')  # as it was when the disk was full
    held = folder.run("running", **{at: "0.5", "seed": "2"})
    (held / "history.jsonl").write_text('{"step": 4}\n{"step": 7}\n{"st')  # it is being written
    dead = folder.run("running", folder="of another name", **{at: "0.5", "seed": "9"})
    (dead / ".lock").write_text("process 1 on a")
    (folder.path / "junk").mkdir()
    (folder.path / "notes.txt").write_text("mine")

    code, out = said(capsys, folder.path)
    assert code == 1
    assert "failed  reward.length.weight=0 seed=2: the loss is nan\n" in out
    assert "interrupted  reward.length.weight=0 seed=3: before its first step\n" in out
    told = f"at step 7 (or gone: {held}/.lock cannot be read)"
    assert f"running  reward.length.weight=0.5 seed=2: {told}\n" in out
    assert "killed  reward.length.weight=0.5 seed=9: its process is gone; before its first step\n" in out
    assert "missing  reward.length.weight=0.5 seed=3\n" in out
    assert "python train.py -m stage=rl 'name=a b' hydra/launcher=local" in out
    assert f"""hydra.sweep.dir='"'"'{folder.path}'"'"''""" in out and "/elsewhere" not in out
    assert len(summary(folder)["missing"]) == 1


def test_a_run_whose_process_holds_it_is_running(tmp_path):
    folder = weights(tmp_path / "grid")
    run = folder.run("running", reward_length_weight="0", seed="1")
    hold = f"import fcntl, sys; f = open({str(run / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        [job] = read_sweep(folder.path).jobs
        assert (job.status, job.reason) == ("running", "before its first step")
        process.communicate(b"\n")
    assert read_sweep(folder.path).jobs[0].status == "killed"
    with (run / ".lock").open("r+") as file:  # reading has not kept it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_metric_that_is_no_number_or_was_not_measured(tmp_path, capsys):
    folder = Folder(tmp_path / "grid", {"lr": ["1", "9"]}, lambda lr: 0.5 if lr == "1" else math.nan)
    folder.run_all()
    code, out = said(capsys, folder.path)
    assert code == 1 and "diverged  lr=9: val/accuracy is nan" in out and "what has not finished" not in out
    (folder.path / "lr-1" / "metrics.json").write_text('{"val/loss": 1.0, "seconds": 2}')
    code, out = said(capsys, folder.path, "--metric", "val/loss")
    assert code == 1 and "val/loss was not measured; there is: seconds, val/accuracy" in out
    code, out = said(capsys, folder.path, "--metric", "seconds")
    assert code == 0 and "seconds (less is better)" in out
    code, out = said(capsys, folder.path, "--metric", "seconds", "--direction", "max")
    assert "seconds (more is better)" in out


@pytest.mark.parametrize(("value", "told"), [("null", "null"), ('"high"', "high"), ("Infinity", "inf")])
def test_a_value_that_is_no_number_is_said_as_it_is(tmp_path, capsys, value, told):
    folder = Folder(tmp_path / "grid", {"lr": ["1"]}, float)
    folder.run_all()
    (folder.path / "lr-1" / "metrics.json").write_text(f'{{"val/accuracy": {value}, "seconds": 2}}')
    code, out = said(capsys, folder.path)
    assert code == 1 and f"diverged  lr-1: val/accuracy is {told}\n" in out


MINE = {"perf/samples_per_s": "max", "perf/rollout_slot_use": "max", "perf/step_s": "min"}
MINE |= {"val/verifier_failures": "min", "policy/nonfinite_tokens": "min", "policy/kl": "min", "eval/kl_2": "min"}
KNOWN = {name: metric.best for name, metric in METRICS.items() if metric.best and "*" not in name}


@pytest.mark.parametrize(("metric", "direction"), [*MINE.items(), *KNOWN.items()])
def test_the_direction_of_a_metric_is_told_by_its_name(tmp_path, metric, direction):
    folder = weights(tmp_path / "grid")
    run = folder.run(reward_length_weight="0", seed="1")
    (run / "metrics.json").write_text(json.dumps({metric: 1.0}))
    assert read_sweep(folder.path, metric).direction == direction


def test_a_search_shows_the_best_first_and_how_many_are_left(tmp_path, capsys):
    settings = {"n_trials": 5, "direction": "minimize", "params": {"lr": "interval(0,1)"}}
    folder = Folder(tmp_path / "search", {"lr": ["0.512345678912", "0.1", "0.9"]}, float, sweeper=settings)
    folder.run_all()
    code, out = said(capsys, folder.path)
    assert code == 1 and "5 trials: 3 finished, 2 missing" in out
    assert out.index("│    0.1") < out.index("│ 0.5123") < out.index("│    0.9")
    assert summary(folder)["trials_left"] == 2
    assert "seconds (less is better)" in said(capsys, folder.path, "--metric", "seconds")[1]


def test_the_studys_direction_is_of_its_own_metric(tmp_path):
    settings = {"n_trials": 3, "direction": "maximize", "params": {"lr": "interval(0,1)"}}
    folder = Folder(tmp_path / "search", {"lr": ["0.5", "0.1", "0.9"]}, float, sweeper=settings)
    for point in folder.points:
        run = folder.run(**point)
        (run / "metrics.json").write_text(json.dumps({"val/accuracy": 0.5, "val/loss": float(point["lr"])}))
    loss, accuracy = read_sweep(folder.path, "val/loss"), read_sweep(folder.path)
    assert (loss.direction, accuracy.direction) == ("min", "max")
    assert fold(loss)[0].values == {"lr": "0.1"}


@pytest.mark.parametrize("content", [b"", b"no database at all, but long enough to be taken for one" * 9])
def test_a_study_that_cannot_be_read_is_said_and_the_runs_are_counted(tmp_path, capsys, content):
    settings = {"n_trials": 5, "direction": "maximize", "study_name": "lr"}
    folder = Folder(tmp_path / "search", {"lr": ["0.5", "0.1", "0.9"]}, float, sweeper=settings)
    folder.run_all()
    (folder.path / "study.db").write_bytes(content)
    code, out = said(capsys, folder.path)
    assert code == 1 and "5 trials: 3 finished, 2 missing" in out
    assert f"{folder.path}/study.db cannot be read (" in out


def test_each_point_and_seed_counts_once(tmp_path, capsys):
    """However often it was run: copied, in a sweep of its own inside, or typed before there were seeds."""
    folder = weights(tmp_path / "grid")
    folder.run_all()
    run = folder.path / "reward.length.weight-0_seed-1"
    shutil.copytree(run, folder.path / "backup of 1")
    before = folder.run(reward_length_weight="0", seed="1", folder="reward.length.weight-0")
    (before / ".hydra" / "overrides.yaml").write_text(r"[reward.length.weight=0, stage=rl, name=a\ b]")
    (before / "run.json").write_text('{"status": "finished", "config": {"seed": 1}}')
    (before / "metrics.json").write_text('{"val/accuracy": 0.9}')
    weights(folder.path / "inner").run_all()
    code, out = said(capsys, folder.path)
    assert code == 0 and "6 runs: 6 finished" in out
    assert summary(folder)["points"][0]["seeds"] == {"1": 0.01, "2": 0.02, "3": 0.03}
    assert f"{before} is left out: its point and seed are those of {run.name}\n" in out
    assert f"{folder.path}/backup of 1 is left out" in out
    shutil.rmtree(run)
    shutil.rmtree(folder.path / "backup of 1")
    assert {job.seed: job.metric for job in fold(read_sweep(folder.path))[0].jobs} == {"1": 0.9, "2": 0.02, "3": 0.03}


@pytest.mark.parametrize(
    ("space", "missing", "more"),
    [("none,default", ["default"], {}), ("glob(*)", [], {}), ("choice(none,default)", [], {"n_trials": 3})],
)
def test_what_a_sweep_varies_tells_points_apart_even_where_it_makes_no_other_point(tmp_path, space, missing, more):
    sweeper = {"params": {"callbacks": space, "seed": "1,2"}} | more
    params = {"callbacks": ["none", "default"], "seed": ["1", "2"]}
    folder = Folder(tmp_path / "grid", params, lambda _, seed: 0.5, sweeper)
    folder.run_all(but=[3])
    sweep = read_sweep(folder.path)
    assert sweep.varied == ["callbacks"] and [point["callbacks"] for point in sweep.missing] == missing
    assert [len(point.metrics) for point in fold(sweep)] == [1, 2]


def test_values_with_brackets_are_shown_as_they_are(tmp_path, capsys):
    folder = Folder(tmp_path / "grid", {"data.shards": ["[/data/a]", "[red]"]}, lambda shards: len(shards))
    for name, point in zip("ab", folder.points, strict=True):
        folder.run(folder=name, data_shards=point["data.shards"])
    code, out = said(capsys, folder.path)
    assert code == 0 and "│ [/data/a] │" in out and "│     [red] │" in out
    assert "best: data.shards=[/data/a]: 9" in out


def test_a_key_that_a_point_lacks_is_not_named(tmp_path, capsys):
    folder = weights(tmp_path / "grid")
    folder.run_all()
    run = folder.run(reward_length_weight="9", seed="1", folder="plain")
    (run / ".hydra" / "overrides.yaml").write_text("[sampler=uniform, seed=1]")
    assert "best: sampler=uniform: 9.01" in said(capsys, folder.path)[1]


def test_what_a_glob_stands_for_is_not_known(tmp_path, capsys):
    folder = Folder(
        tmp_path / "grid", {"objective": ["a", "b"]}, lambda name: 0.5, {"params": {"objective": "glob(*)"}}
    )
    folder.run_all()
    code, out = said(capsys, folder.path)
    assert "2 runs: 2 finished" in out and "what is missing is not known: a key was swept over glob(...)" in out


def test_points_are_told_apart_by_what_matters(tmp_path):
    folder = weights(tmp_path / "grid")
    folder.run_all()
    for number, path in enumerate(sorted(folder.path.glob("*/.hydra/overrides.yaml"))):
        path.write_text(
            yaml.safe_dump([*yaml.safe_load(path.read_text()), f"logger={'none' if number % 2 else 'csv'}"])
        )
    sweep = read_sweep(folder.path)
    assert sweep.varied == ["reward.length.weight"] and not sweep.missing


def test_a_sweep_that_was_moved_is_read_where_it_is(tmp_path):
    folder = weights(tmp_path / "grid")
    folder.run_all(but=[5])
    moved = folder.path.rename(tmp_path / "moved")
    sweep = read_sweep(moved)
    assert sweep.counts == {"finished": 5, "missing": 1}
    assert sweep.command and f"hydra.sweep.dir={moved}" in sweep.command


@pytest.mark.parametrize(("typed_in", "named"), [(".", "outputs/grid"), ("elsewhere", "{}/outputs/grid")])
def test_the_command_works_where_the_sweep_was_typed(tmp_path, monkeypatch, typed_in, named):
    folder = weights(tmp_path / "outputs" / "grid")
    asked = yaml.safe_load((folder.path / "multirun.yaml").read_text())
    asked["hydra"]["runtime"] = {"cwd": str(tmp_path / typed_in)}
    (folder.path / "multirun.yaml").write_text(yaml.safe_dump(asked))
    monkeypatch.chdir(folder.path)
    command = read_sweep(Path()).command
    assert command and command.endswith(f" hydra.sweep.dir={named.format(tmp_path)}")


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"lr": ["0.001", "0.01", "0.1"]},
        {"objective": ["grpo", "dapo"]},
        {"lr": ["0.1", "1"], "objective": ["grpo", "dapo"]},
        {"sampler": ["uniform", "curriculum"], "objective": ["grpo", "dapo"]},
        {"lr": ["1", "2"], "decay": ["0", "1"], "objective": ["grpo", "dapo"]},
    ],
    ids=lambda params: "-".join(params) or "none",
)
def test_every_kind_of_grid_has_a_picture(tmp_path, capsys, params):
    seeds = {"seed": ["1", "2"]}
    folder = Folder(tmp_path / "grid", params | seeds, lambda *values: len("".join(values)) / 10 + int(values[-1]) / 50)
    folder.run_all()
    assert said(capsys, folder.path)[0] == 0
    picture = Image.open(folder.path / "sweep.png").convert("L")
    assert sum(picture.histogram()[:128]) > 1000  # something is drawn
    points = math.prod(map(len, params.values()))
    assert len(fold(read_sweep(folder.path))) == points


def test_lines_that_are_equal_are_all_seen(tmp_path, capsys):
    folder = Folder(tmp_path / "grid", {"lr": ["0", "0.001", "1"], "sampler": ["a", "b", "c"]}, lambda lr, _: float(lr))
    folder.run_all()
    said(capsys, folder.path)
    pixels = Image.open(folder.path / "sweep.png").convert("RGB").getcolors(1 << 20)
    seen = [count for count, colour in pixels if f"#{bytes(colour).hex()}" in COLOURS[:3]]
    assert len(seen) == 3 and min(seen) > 0.5 * max(seen)


@pytest.mark.parametrize("values", [["0", "0.001", "0.5"], ["1", "2", "3", "3.01"], ["0.1", "1", "3"], ["0"]])
def test_the_ticks_of_a_grid_do_not_cover_one_another(values):
    figure, axes = plt.subplots()
    axes.plot([float(value) for value in values], [0.5] * len(values))
    _scale(axes, values)
    figure.canvas.draw()
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    spans = [label.get_window_extent() for label in labels]
    plt.close(figure)
    assert [label.get_text() for label in labels] == values[:3]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(spans))


def test_a_long_value_is_drawn_without_what_all_have():
    paths = [f"/data/models/long_cot/run-{name}/checkpoints/model" for name in ("ab", "ac")]
    assert _short(paths) == ["run-ab", "run-ac"]
    assert _short(["grpo", "dapo"]) == ["grpo", "dapo"] and len(_short(["x" * 99])[0]) == 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none", "no such folder"),
        (lambda path: path, "no sweep there"),
        (lambda path: weights(path / "sweeps" / "one").path.parent, "is no sweep, but holds some; give one of: "),
        (lambda path: weights(path / "name" / "sweeps" / "one").path.parents[1], "is no sweep, but holds some"),
        (
            lambda path: weights(path / "a").run(reward_length_weight="0", seed="1"),
            "is a single run, not a sweep; give ",
        ),
        (lambda path: stages(path)[0], "is a single run, not a sweep; try kimivl report "),
        (lambda path: stages(path)[0].parent, "holds the stages of a model, not a sweep; try kimivl report "),
    ],
    ids=["none", "empty", "above", "far above", "run", "stage", "stages"],
)
def test_a_wrong_folder_is_one_sentence(tmp_path, capsys, make, message):
    assert main(["sweep", str(make(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("summary.json"))


def test_a_torn_multirun_file_is_one_sentence(tmp_path, capsys):
    folder = weights(tmp_path / "sweep")
    (folder.path / "multirun.yaml").write_text("hydra: [")
    assert main(["sweep", str(folder.path)]) == 2
    assert "multirun.yaml cannot be read; type the sweep again with hydra.sweep.dir=" in capsys.readouterr().err


def test_values_are_shown_short():
    assert [shown(value) for value in ("0.6824078427098833", "3", "1e-05", "mirror_descent")] == [
        "0.6824",
        "3",
        "1e-05",
        "mirror_descent",
    ]


def test_a_metric_that_no_run_has_is_one_sentence(tmp_path, capsys):
    folder = weights(tmp_path / "sweep")
    folder.run_all()
    assert main(["sweep", str(folder.path), "--metric", "val/acuracy"]) == 2
    error = capsys.readouterr().err
    assert "no run has measured it; there is: seconds, val/accuracy" in error and error.count("\n") == 1
