"""Searches through the command line: killed and typed again, they go on with the trials that are missing."""

import json
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf
from swept import launched, sweep

from kimivl.config import CONF, register
from kimivl.sweep.folder import read_sweep
from kimivl.sweep.points import folder_name
from kimivl.sweep.summary import fold

optuna = pytest.importorskip("optuna")
from kimivl.sweep.search import _go_on, _study, _told  # noqa: E402

FIRST, SECOND, THIRD = "0.68", "2.75", "0.1"
"""How the first values that the search draws begin: its seed is fixed."""


def trials(folder):
    with closing(sqlite3.connect(folder / "study.db")) as study:
        return study.execute("SELECT number, state FROM trials ORDER BY number").fetchall()


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_with_what_is_missing(tmp_path):
    folder = tmp_path / "digits" / "sweeps" / "sft-lr"
    typed = ["sweep=lr", "hydra.sweeper.n_trials=4"]
    killed = sweep(tmp_path, *typed, **{f"lr_{SECOND}": "kill"})
    first, second = launched(tmp_path)
    assert killed.returncode == -9
    assert trials(folder) == [(0, "COMPLETE"), (1, "RUNNING")]
    left = read_sweep(folder)
    assert left.counts == {"finished": 1, "running": 1, "missing": 2}

    again = sweep(tmp_path, *typed)
    assert again.returncode == 0, again.stderr
    resumed, *others = launched(tmp_path)
    assert resumed == second and len({first, second, *others}) == 4
    assert trials(folder) == [(number, "COMPLETE") for number in range(4)]
    assert read_sweep(folder).counts == {"finished": 4}
    best = fold(read_sweep(folder))[0]
    assert f"Best value: {best.mean}" in again.stdout

    assert sweep(tmp_path, *typed).returncode == 0
    assert launched(tmp_path) == [] and len(trials(folder)) == 4

    other = sweep(tmp_path, *typed, "seed=7")
    assert other.returncode == 1 and launched(tmp_path) == [] and "Traceback" not in other.stderr
    assert "holds a search with no seed, and this one has seed=7" in other.stderr
    assert "hydra.sweeper.study_name=NAME" in other.stderr


@pytest.mark.slow
def test_failures_do_not_end_a_search_and_diverging_counts_as_the_worst(tmp_path):
    folder = tmp_path / "digits" / "sweeps" / "sft-lr"
    events = {f"lr_{FIRST}": "nan", f"lr_{SECOND}": "fail", f"lr_{THIRD}": "unmeasured"}
    done = sweep(tmp_path, "sweep=lr", "hydra.sweeper.n_trials=4", **events)
    assert done.returncode == 0, done.stderr
    assert [state for _, state in trials(folder)] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    with closing(sqlite3.connect(folder / "study.db")) as study:
        assert study.execute("SELECT value FROM trial_values ORDER BY trial_id").fetchone() == (float("-inf"),)
    now = read_sweep(folder)
    assert now.counts == {"finished": 2, "diverged": 1, "failed": 1}
    assert {job.reason for job in now.jobs} >= {"", "the disk is full", "val/accuracy is nan"}

    # Typed with more trials, none of these is run again.
    sweep(tmp_path, "sweep=lr", "hydra.sweeper.n_trials=5")
    assert len(launched(tmp_path)) == 1


@pytest.mark.slow
def test_a_trial_that_was_stopped_is_run_again_as_another(tmp_path):
    pytest.importorskip("submitit")
    folder = tmp_path / "digits" / "sweeps" / "sft-lr"
    typed = ["sweep=lr", "hydra.sweeper.n_trials=2", "hydra/launcher=local"]
    sweep(tmp_path, *typed, **{f"lr_{FIRST}": "stop"})
    stopped, _ = launched(tmp_path)
    assert [state for _, state in trials(folder)] == ["FAIL", "COMPLETE"]
    assert json.loads((folder / stopped / "run.json").read_text())["status"] == "interrupted"
    assert read_sweep(folder).counts == {"finished": 1, "interrupted": 1}
    sweep(tmp_path, *typed)
    assert launched(tmp_path) == [stopped]
    assert read_sweep(folder).counts == {"finished": 2}
    sweep(tmp_path, *typed)
    assert launched(tmp_path) == []


@pytest.mark.slow
def test_a_search_in_which_nothing_works_says_so(tmp_path):
    done = sweep(tmp_path, "sweep=search", "data.lr_scale=interval(1,2)", "hydra.sweeper.n_trials=2", lr_1="fail")
    assert done.returncode == 1 and len(launched(tmp_path)) == 2
    assert "error: no trial has a value; why: kimivl sweep" in done.stderr
    assert "Traceback" not in done.stderr
    other = sweep(tmp_path, "sweep=search", "optimizer.weight_decay=interval(0,1)")
    assert "holds a search of data.lr_scale, not of optimizer.weight_decay" in other.stderr


REFUSED = {
    "nothing varies": ([], "nothing to search"),
    "two directions": (
        ["seed=1,2", "hydra.sweeper.direction=[maximize,minimize]"],
        "hydra.sweeper.direction=maximize,minimize: a run returns one metric",
    ),
    "a glob": (["kernels=glob(*)"], "kernels=glob(*): a search takes choices by name, as in kernels=A,B"),
    "no study": (["seed=1,2"], "study.db cannot be read or written (file is not a database)"),
}


@pytest.mark.parametrize(("typed", "said"), REFUSED.values(), ids=REFUSED)
def test_a_search_that_cannot_begin_says_why(tmp_path, typed, said):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "study.db").write_text("no database")
    done = sweep(tmp_path, "sweep=search", f"hydra.sweep.dir={tmp_path}/own", *typed)
    assert done.returncode == 1 and launched(tmp_path) == []
    assert said in done.stderr and done.stderr.startswith("error: ")


@pytest.mark.slow
def test_a_second_search_beside_the_first_leaves_it_alone(tmp_path):
    folder = tmp_path / "digits" / "sweeps" / "sft-lr"
    done = sweep(tmp_path, "sweep=lr", "hydra.sweeper.n_trials=3", **{f"lr_{SECOND}": "beside"})
    assert done.returncode == 0, done.stderr
    assert trials(folder) == [(number, "COMPLETE") for number in range(3)] and len(launched(tmp_path)) == 3
    [said] = folder.glob("*/beside")
    assert f"error: {folder} is in use by process " in said.read_text()
    assert "hydra.sweeper.n_jobs=2 hydra/launcher=local" in said.read_text()


def test_a_study_that_another_process_holds_is_said_in_one_sentence(tmp_path):
    sweeper = sweeper_of(tmp_path, trials=1)
    optuna.create_study(storage=sweeper.storage, study_name="x")
    sweeper.storage += "?timeout=0.1"
    with closing(sqlite3.connect(tmp_path / "study.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        said = "/study.db cannot be read or written .database is locked.: end the process"
        with pytest.raises(CompactHydraException, match=said), _told(sweeper.storage):
            _study(sweeper)


SAMPLERS = {
    "own": ([], {"_target_": "optuna.samplers.TPESampler", "seed": 1, "n_startup_trials": 5}),
    "random": (["hydra/sweeper/sampler=random"], {"_target_": "optuna.samplers.RandomSampler"}),
    "grid": (["hydra/sweeper/sampler=grid"], {"_target_": "optuna.samplers.GridSampler"}),
}


@pytest.mark.parametrize(("typed", "settings"), SAMPLERS.values(), ids=SAMPLERS)
def test_a_search_takes_any_sampler(typed, settings):
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["hydra/sweeper=search", *typed], return_hydra_config=True)
    assert settings.items() <= dict(config.hydra.sweeper.sampler).items()


@pytest.mark.slow
def test_a_search_that_cannot_go_on_says_why(tmp_path):
    folder = tmp_path / "digits" / "sweeps" / "sft-lr"
    sweep(tmp_path, "sweep=lr", "hydra.sweeper.n_trials=1")
    (folder / "study.db").unlink()
    other = sweep(tmp_path, "sweep=lr", "hydra.sweeper.n_trials=1", "seed=7")
    assert other.returncode == 1 and "Traceback" not in other.stderr
    assert "holds a finished run with no seed, and this sweep has seed=7: give it a folder of its own" in other.stderr


def sweeper_of(tmp_path, trials):
    """What the sweeper of hydra-optuna-sweeper has of a search."""
    sampler = {"_target_": "optuna.samplers.RandomSampler", "seed": 1}
    config = OmegaConf.create({"hydra": {"sweeper": {"sampler": sampler}}})
    storage = f"sqlite:///{tmp_path}/study.db"
    return SimpleNamespace(n_trials=trials, job_idx=0, config=config, storage=storage, study_name="x", sampler=None)


def ask(sweeper, sampler):
    study = optuna.create_study(sweeper.storage, sampler, study_name="x", direction="maximize", load_if_exists=True)
    trial = study.ask()
    return study, trial, trial.suggest_uniform("lr", 0, 1)


def test_a_trial_that_was_stopped_is_missing_once(tmp_path):
    """By the study it has failed, and by its run it goes on: of four trials one is done, one stopped, one to come."""
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="x")
    for status in ("finished", "interrupted", "failed"):
        trial = study.ask()
        values = {
            "lr": trial.suggest_float("lr", 1e-9, 1, log=True),
            "rank": trial.suggest_int("rank", 1, 64),
            "objective": trial.suggest_categorical("objective", ["grpo", "dapo", "gspo"]),
            "warm": trial.suggest_categorical("warm", [True, False]),
        }
        study.tell(trial, **({"values": 0.5} if status == "finished" else {"state": optuna.trial.TrialState.FAIL}))
        overrides = [f"{key}={value}" for key, value in values.items()]
        run = tmp_path / folder_name(overrides)
        (run / ".hydra").mkdir(parents=True)
        (run / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
        (run / "run.json").write_text(json.dumps({"status": status}))
        if status == "finished":
            (run / "metrics.json").write_text('{"val/accuracy": 0.5}')
    other = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="y")
    other.tell(other.ask(), 0.5)
    (tmp_path / "multirun.yaml").write_text(
        "hydra: {sweeper: {n_trials: 4, study_name: x}, job: {name: train}, overrides: {task: [], hydra: []}}"
    )
    assert read_sweep(tmp_path).counts == {"finished": 1, "interrupted": 1, "failed": 1, "missing": 1}


def test_a_trial_that_was_under_way_is_taken_up_with_its_values(tmp_path):
    sweeper = sweeper_of(tmp_path, trials=5)
    study, done, first = ask(sweeper, optuna.samplers.RandomSampler(seed=1))
    study.tell(done, 0.5)
    study, killed, second = ask(sweeper, study.sampler)
    study, stopped, third = ask(sweeper, study.sampler)
    study.tell(stopped, state=optuna.trial.TrialState.FAIL)
    folder = tmp_path / folder_name([f"lr={third}"])
    folder.mkdir()
    (folder / "run.json").write_text('{"status": "interrupted"}')

    for _ in range(2):  # also when the search is stopped before it has asked for any
        sweeper.n_trials = 5
        _go_on(_study(sweeper), sweeper, tmp_path)
        assert sweeper.n_trials == 4 and sweeper.job_idx == 1
    asked = [ask(sweeper, sweeper.sampler) for _ in range(3)]
    assert [value for *_, value in asked[:2]] == [second, third]
    assert asked[0][1].number == killed.number
    assert asked[2][2] not in (first, second, third)
