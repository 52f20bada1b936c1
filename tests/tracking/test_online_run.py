"""``train.py`` with every logger at once, W&B online, against the local server."""

import json
import threading
import time

import pytest
from command import history, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tracking.test_local import read_csv

from kimivl.cli import main

pytestmark = pytest.mark.slow

STOP = ["+callbacks.stop._target_=stop_at.StopAt", "+callbacks.stop={step: 5, signal_name: SIGKILL}"]


@pytest.fixture
def runs(server, tmp_path):
    """The server after stage 1 was killed and gone on with, and stage 2 whose W&B server fails after its beginning."""
    settings = ["debug=miniature", f"paths.root={tmp_path}", "logger=[wandb,csv,tensorboard]", "test=false"]
    assert train("stage=sft", *settings, *STOP, check=False, WANDB_MODE="online").returncode == -9
    train("stage=sft", *settings, WANDB_MODE="online")

    def fail() -> None:
        while len(server.runs) < 2:
            time.sleep(0.05)
        time.sleep(1)
        server.mood = "failing"

    threading.Thread(target=fail, daemon=True).start()
    done = train("stage=long_cot", *settings, "logger.wandb.finish_timeout=3", WANDB_MODE="online")
    server.mood = "well"
    return tmp_path / "miniature", done


def steps_once(curve):
    """A curve as a dict; no step may stand in it twice."""
    assert len(dict(curve)) == len(curve)
    return dict(curve)


def test_a_run_tells_its_story(runs, server, capsys):
    root, done = runs
    ids = {stage: json.loads((root / stage / "run.json").read_text())["id"] for stage in ("sft", "long_cot")}
    sft = server.runs[ids["sft"]]
    losses = sorted(history(root / "sft", "train/loss").items())
    assert steps_once(sft.curve("train/loss")) == pytest.approx(dict(losses))
    assert len(losses) == 6 and sft.exit_code == 0
    assert [(int(row["step"]), float(row["train/loss"])) for row in read_csv(root / "sft") if "train/loss" in row] == [
        pytest.approx(pair) for pair in losses
    ]
    events = EventAccumulator(str(root / "sft" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [step for step, _ in losses]
    assert {"data/tokens_seen", "train/loss"} <= sft.history[0].keys()
    assert any(name.endswith(".jpg") for name in server.blobs), "the transcripts have no pictures"
    assert f"model-{ids['sft']}:v0" in sft.made

    assert f"kimivl sync {root / 'long_cot'}" in done.stdout + done.stderr
    chains, whole = server.runs[ids["long_cot"]], history(root / "long_cot", "train/loss")
    assert main(["sync", str(root / "long_cot")]) == 0
    assert "sent" in capsys.readouterr().out
    assert steps_once(chains.curve("train/loss")) == pytest.approx(whole)
    assert chains.config["parent_run"]["value"] == sft.name
