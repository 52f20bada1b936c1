"""W&B: one run with one curve, offline and online, interrupted, killed, and where the server fails."""

import json
import logging
import shutil
import subprocess
import sys
import time

import pytest
import wandb

from kimivl import tracking
from kimivl.cli import main
from kimivl.tracking.wandb_run import WandbRun, has_key

SOON = {"init_timeout": 4.0, "finish_timeout": 3.0}
"""For a server that does not answer; one that does may need longer on a busy machine."""
WHOLE = [(step, 1 / (step + 1)) for step in range(9)]


def begin(folder, **settings):
    settings = {"init_timeout": 15.0, "finish_timeout": 15.0} | settings
    return [tracking.History(folder), WandbRun(str(folder), "kimivl", "sweep", "sft", **settings)]


def log_steps(loggers, first, last):
    for step in range(first, last):
        for logger in loggers:
            logger.log_metrics({"train/loss": 1 / (step + 1), "perf/step_s": time.time()}, step)
            if step % 3 == 2:
                logger.log_metrics({"val/accuracy": step / 10}, step)
            logger.save()


def process(folder, first, last, outcome="success", **settings):
    """One process of a run, which does steps ``first`` to ``last`` - 1."""
    goes_on = first > 0
    tracking.begin_run(folder, {"seed": 1}, goes_on)
    loggers = begin(folder, **settings)
    tracking.log_config(loggers, {"seed": 1, "init_from": None})
    log_steps(loggers, first, last)
    tracking.write_run(folder, {"success": "finished"}.get(outcome, outcome), {"seed": 1})
    tracking.close(loggers, outcome)
    time.sleep(1.05)  # W&B names its folders by the second
    return tracking.read_run(folder)["id"]


def forget_the_end(folder, share):
    """What a killed process leaves: a log that ends in the middle of a record."""
    log = max(folder.glob("wandb/*run-*/run-*.wandb"))
    log.write_bytes(log.read_bytes()[: int(log.stat().st_size * share)])


def sync(folder):
    runs = sorted(map(str, folder.glob("wandb/offline-run-*")))
    command = [sys.executable, "-m", "wandb", "sync", *runs]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "ERROR" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("key", ["", "0" * 40])
def test_a_key_is_looked_for(key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert has_key() is bool(key)


def test_a_closed_run_lets_the_next_one_begin(tmp_path, offline):
    """Two jobs in one process: each has a W&B run of its own."""
    for name in ("one", "two"):
        run = process(tmp_path / name, 0, 1)
        assert len(list((tmp_path / name / "wandb").glob(f"offline-run-*-{run}"))) == 1
    assert len({tracking.read_run(tmp_path / name)["id"] for name in ("one", "two")}) == 2


def test_offline_runs_of_a_run_sync_into_one_curve(tmp_path, server, monkeypatch):
    """Preempted once, killed once: from a checkpoint that is older than what is logged, and with a log cut short."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    process(tmp_path, 0, 4, "interrupted")
    process(tmp_path, 4, 7, "failed")
    forget_the_end(tmp_path, 0.75)
    run = process(tmp_path, 5, 9)
    assert not server.runs
    sync(tmp_path)
    assert list(server.runs) == [run]
    sent = server.runs[run]
    assert sent.curve("train/loss") == WHOLE
    assert sent.curve("val/accuracy") == [(2, 0.2), (5, 0.5), (8, 0.8)]
    assert [row["_step"] for row in sent.history] == list(range(len(sent.history)))
    assert sent.exit_code == 0 and sent.about["groupName"] == "sweep" and sent.about["jobType"] == "sft"


def test_a_run_online_goes_on_as_itself(tmp_path, server):
    first = process(tmp_path, 0, 6, "interrupted")
    assert server.runs[first].exit_code == 130
    assert process(tmp_path, 4, 9) == first  # its checkpoint was two steps old
    sent = server.runs[first]
    assert list(server.runs) == [first] and sent.exit_code == 0
    assert sent.curve("train/loss") == WHOLE and sent.curve("val/accuracy") == [(2, 0.2), (5, 0.5), (8, 0.8)]
    assert sent.config["seed"]["value"] == 1
    assert sent.summary["train/loss"] == {"last": WHOLE[-1][1], "min": WHOLE[-1][1]}
    assert process(tmp_path, 0, 1) != first and len(server.runs) == 2  # typed again after its end: another run


def test_a_run_whose_folder_is_moved_goes_on_as_itself(tmp_path, server):
    first = process(tmp_path / "old", 0, 6, "interrupted")
    (tmp_path / "old").rename(tmp_path / "new")
    assert process(tmp_path / "new", 4, 9) == first
    assert list(server.runs) == [first] and server.runs[first].curve("train/loss") == WHOLE
    assert process(tmp_path / "old", 0, 1) != first  # another run, where that one was


@pytest.mark.parametrize("mood", ["failing", "silent"])
def test_a_server_that_stops_answering_stops_nothing(tmp_path, server, picture, caplog, capsys, mood):
    tracking.begin_run(tmp_path, {"seed": 1}, False)
    loggers = begin(tmp_path, **SOON)
    log_steps(loggers, 0, 4)
    deadline = time.monotonic() + 40
    [run] = server.runs
    while not server.runs[run].history and time.monotonic() < deadline:
        time.sleep(0.2)
    server.mood = mood
    started = time.perf_counter()
    log_steps(loggers, 4, 9)
    tracking.log_table(loggers, "val/transcripts", [{"image": tracking.Picture(picture), "text": "a"}], 9)
    (tmp_path / "model").mkdir()
    tracking.log_model(loggers, tmp_path / "model", {})
    assert time.perf_counter() - started < 10
    tracking.write_run(tmp_path, "finished", {"seed": 1})
    with caplog.at_level(logging.WARNING):
        tracking.close(loggers, "success")
    assert time.perf_counter() - started < 60
    assert [record.message for record in caplog.records if f"kimivl sync {tmp_path}" in record.message]
    server.mood = "well"
    had = len(server.runs[run].history)
    assert 0 < had < 9 and main(["sync", str(tmp_path)]) == 0
    assert f"{10 - had} rows" in capsys.readouterr().out
    sent = server.runs[run]
    assert sent.curve("train/loss") == WHOLE and sent.exit_code == 0 and f"model-{run}:v0" in sent.made
    assert [step for step, _ in sent.curve("val/transcripts")] == [9]
    assert len(pictures(server, "val/transcripts")) == 1


def pictures(server, name):
    """The pictures of the only table of this name that the server has."""
    [table] = [json.loads(blob) for path, blob in server.blobs.items() if path.endswith(f"{name}.table.json")]
    paths = [cell["path"] for row in table["data"] for cell in row if isinstance(cell, dict)]
    return [blob for path, blob in server.blobs.items() if path.endswith(tuple(paths))] if paths else []


def fail_after_the_first_answer(server, monkeypatch):
    init = wandb.init

    def init_and_fail(**settings):
        run = init(**settings)
        server.mood = "failing"
        return run

    monkeypatch.setattr(wandb, "init", init_and_fail)


def test_a_server_that_fails_after_the_first_answer_stops_nothing(tmp_path, server, monkeypatch, caplog):
    with monkeypatch.context() as patched:
        fail_after_the_first_answer(server, patched)
        started = time.perf_counter()
        with caplog.at_level(logging.WARNING):
            process(tmp_path, 0, 9, **SOON)
        assert time.perf_counter() - started < 60
    assert any(f"kimivl sync {tmp_path}" in record.message for record in caplog.records)
    server.mood = "well"
    assert main(["sync", str(tmp_path)]) == 0
    [sent] = server.runs.values()
    assert sent.curve("train/loss") == WHOLE and sent.config["seed"]["value"] == 1


def test_what_was_written_offline_needs_the_folder_of_the_run_alone(tmp_path, server, monkeypatch, picture):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    tracking.begin_run(run, {"seed": 1}, False)
    loggers = begin(run)
    tracking.log_table(loggers, "val/transcripts", [{"image": tracking.Picture(picture), "text": "a"}], 9)
    tracking.write_run(run, "finished", {"seed": 1})
    tracking.close(loggers, "success")
    wandb.teardown()
    monkeypatch.setenv("HOME", str(tmp_path / "on another machine"))
    assert main(["sync", str(run)]) == 0 and len(pictures(server, "val/transcripts")) == 1


def test_pictures_that_are_lost_are_counted(tmp_path, server, picture, caplog):
    tracking.begin_run(tmp_path, {"seed": 1}, False)
    loggers = begin(tmp_path, **SOON)
    _ = loggers[1].experiment
    server.mood = "failing"
    tracking.log_table(loggers, "val/transcripts", [{"image": tracking.Picture(picture), "text": "a"}], 9)
    tracking.write_run(tmp_path, "finished", {"seed": 1})
    tracking.close(loggers, "success")
    shutil.rmtree(tmp_path / "wandb" / "data")
    server.mood = "well"
    with caplog.at_level(logging.WARNING):
        assert main(["sync", str(tmp_path)]) == 0
    assert "1 pictures of a table val/transcripts" in caplog.text and not pictures(server, "val/transcripts")


def test_what_a_killed_process_has_not_sent_is_sent_by_the_next(tmp_path, server):
    run = process(tmp_path, 0, 6, "failed")
    lines = server.runs[run].files["wandb-history.jsonl"]
    for number in [number for number in lines if number > 2]:
        del lines[number]  # the server never got these
    last = server.runs[run].files["wandb-summary.json"]
    last[max(last)] = json.dumps(json.loads(last[max(last)]) | {"_step": 2})
    process(tmp_path, 6, 9)
    assert server.runs[run].curve("train/loss") == WHOLE


@pytest.mark.parametrize(("mood", "said"), [("gone", "connect"), ("silent", ""), ("refusing", "")])
def test_no_answer_at_the_start_means_offline(tmp_path, server, monkeypatch, caplog, mood, said):
    if mood == "gone":
        server.shutdown()
        server.server_close()
    else:
        server.mood = mood
    started = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        process(tmp_path, 0, 3, **SOON)
    assert time.perf_counter() - started < 60
    [message] = [record.message for record in caplog.records if "W&B" in record.message]
    assert "kimivl sync" in message and len(message) < 600 and "\n" not in message, message
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_rows_of_a_step_are_one_row(tmp_path, server):
    tracking.begin_run(tmp_path, {}, False)
    _, logger = begin(tmp_path)
    logger.log_metrics({"perf/step_s": 0.5, "data/tokens_seen": 64}, 3)
    logger.log_metrics({"train/loss": 1.0, "epoch": 0}, 3)
    logger.save()
    logger.log_metrics({"train/loss": 0.5}, 4)
    run = tracking.read_run(tmp_path)["id"]
    tracking.close([logger], "success")
    rows = [{name: value for name, value in row.items() if name[0] != "_"} for row in server.runs[run].history]
    assert rows == [
        {"perf/step_s": 0.5, "data/tokens_seen": 64, "train/loss": 1.0, "epoch": 0, "trainer/global_step": 3},
        {"train/loss": 0.5, "data/tokens_seen": 64, "trainer/global_step": 4},
    ]


def test_tables_with_pictures_reach_the_server(tmp_path, server, picture):
    tracking.begin_run(tmp_path, {}, False)
    loggers = begin(tmp_path)
    rows = [{"image": tracking.Picture(picture), "text": "x" * 30_000}, {"image": tracking.Picture(b"?"), "text": ""}]
    tracking.log_table(loggers, "val/transcripts", rows, 3)
    tracking.close(loggers, "success")
    [table] = [json.loads(blob) for name, blob in server.blobs.items() if name.endswith("val/transcripts.table.json")]
    (image, text), (unreadable, _) = table["data"]
    assert (image["width"], image["height"]) == (448, 149) and image["path"].endswith(".jpg") and unreadable is None
    assert text.endswith("and 10,000 characters more")
    assert any(name.endswith(image["path"]) for name in server.blobs)


def test_stages_are_linked_by_the_model_that_goes_from_one_to_the_next(tmp_path, server, monkeypatch):
    """Online the first stage, offline the second: the link comes with the sync."""
    model = tmp_path / "sft" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(bytes(1000))
    tracking.begin_run(tmp_path / "sft", {}, False)
    loggers = begin(tmp_path / "sft")
    tracking.log_config(loggers, {"init_from": None})
    tracking.log_model(loggers, model, {"stage": "sft", "step": 9, "metrics": {"val/accuracy": 0.5}})
    tracking.close(loggers, "success")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    tracking.begin_run(tmp_path / "rl", {}, False)
    loggers = begin(tmp_path / "rl")
    tracking.log_config(loggers, {"init_from": str(model)})
    tracking.close(loggers, "success")
    sync(tmp_path / "rl")
    sft, rl = (server.runs[tracking.read_run(tmp_path / stage)["id"]] for stage in ("sft", "rl"))
    assert sft.made == rl.used == [f"model-{sft.name}:v0"] and rl.made == sft.used == []
    assert rl.config["parent_run"]["value"] == sft.name
    about = json.loads(server.artifacts[sft.made[0]]["metadata"])
    assert (about["stage"], about["step"], about["metrics"]) == ("sft", 9, {"val/accuracy": 0.5})
    assert not any(len(blob) == 1000 for blob in server.blobs.values())  # by reference


def test_a_mode_that_there_is_not_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ValueError, match="WANDB_MODE=ofline: set it to one of online, offline"):
        begin(tmp_path)
