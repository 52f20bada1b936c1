"""What ``kimivl sync`` sends of a run, or of the runs of a folder, and what it refuses."""

import subprocess
import sys
import time

from tracking.test_wandb_run import WHOLE, begin, fail_after_the_first_answer, log_steps, process, sync

from kimivl import tracking
from kimivl.cli import main
from kimivl.sweep.points import note_failure

HOLD = """
import sys
from pathlib import Path
from kimivl.runtime.lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    print(flush=True)
    input()
"""


def test_sync_says_what_it_needs(tmp_path, monkeypatch, capsys):
    assert main(["sync", str(tmp_path)]) == 2 and "no run.json" in capsys.readouterr().err
    tracking.write_run(tmp_path, "finished", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["sync", str(tmp_path)]) == 2 and "wandb login" in capsys.readouterr().err


def test_a_run_that_has_not_ended_is_left_alone(tmp_path, server, capsys):
    run = tmp_path / "a run"
    tracking.write_run(run, "running", {})
    log = run / "wandb" / "offline-run-20261122_104852-x" / "run-x.wandb"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"half a record")
    with subprocess.Popen([sys.executable, "-c", HOLD, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert main(["sync", str(run)]) == 2
        holder.communicate(b"\n")
    assert f"in use by its run; when that has ended, type: kimivl sync '{run}'" in capsys.readouterr().err
    assert log.read_bytes() == b"half a record"


def test_a_run_that_never_began_is_named_with_its_error(tmp_path, server, capsys):
    note_failure(tmp_path, ["seed=1"], "the node has gone")
    assert main(["sync", str(tmp_path)]) == 2
    said = f"error: {tmp_path} has nothing to send: its run failed before it began: the node has gone\n"
    assert capsys.readouterr().err == said


def test_a_sync_whose_server_goes_ends(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setattr("kimivl.tracking.sync.SYNC_TIMEOUT", 6.0)
    process(tmp_path, 0, 2)
    fail_after_the_first_answer(server, monkeypatch)
    assert main(["sync", str(tmp_path)]) == 2
    assert "try again later" in capsys.readouterr().err


def test_a_curve_that_was_synced_in_part_is_completed(tmp_path, server, monkeypatch, capsys):
    """By ``wandb sync`` while the run went on, after it was preempted once."""
    with monkeypatch.context() as patched:
        patched.setenv("WANDB_MODE", "offline")
        run = process(tmp_path, 0, 4, "interrupted")
        tracking.begin_run(tmp_path, {"seed": 1}, True)
        loggers = begin(tmp_path)
        log_steps(loggers, 4, 6)
        time.sleep(2.0)  # it writes once a second
        sync(tmp_path)
        sent = server.runs[run]
        assert sent.curve("train/loss") == WHOLE[:6]
        log_steps(loggers, 6, 9)
        tracking.write_run(tmp_path, "finished", {"seed": 1})
        tracking.close(loggers, "success")
    for rows in (3, 0):
        assert main(["sync", str(tmp_path)]) == 0
        assert f": {rows} rows" in capsys.readouterr().out
        assert sent.curve("train/loss") == WHOLE and sent.exit_code == 0
    assert sent.curve("val/accuracy") == [(2, 0.2), (5, 0.5), (8, 0.8)]


def test_the_runs_of_a_sweep_are_sent_one_after_another(tmp_path, server, capsys):
    """They were logged to CSV; what W&B's logger would have said of them is said."""
    sweep, config = tmp_path / "sft-lr_grid", {"name": "digits", "stage": "sft", "logger": {"csv": {}}}
    for seed in (1, 3):
        run = sweep / f"seed-{seed}"
        tracking.begin_run(run, {}, False)
        tracking.History(run).log_metrics({"train/loss": 1.0 / seed}, 0)
        tracking.write_run(run, "finished", config)
    note_failure(sweep / "seed-2", ["seed=2"], "the node has gone")
    (sweep / "multirun.yaml").touch()
    assert main(["sync", str(sweep)]) == 1
    said = capsys.readouterr()
    assert [line.partition(": ")[0] for line in said.out.splitlines()] == [f"{sweep}/seed-1", f"{sweep}/seed-3"]
    assert f"{sweep}/seed-2 has nothing to send" in said.err and "the node has gone" in said.err
    assert [run.curve("train/loss") for run in server.runs.values()] == [[(0, 1.0)], [(0, 1 / 3)]]
    for run, name in zip(server.runs.values(), ("seed-1", "seed-3"), strict=True):
        about = [run.about[key] for key in ("displayName", "groupName", "jobType", "project")]
        assert about == [name, "digits-sft-lr_grid", "sft", "kimivl"]
