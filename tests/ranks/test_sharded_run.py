"""A run on two ranks that share the model, stopped in the middle, goes on as if it had not been."""

from pathlib import Path

import pytest
import torch
from command import history, train

from kimivl.checkpoint_folder import read_whole

SFT = ["stage=sft", "debug=miniature", "trainer.devices=2", "strategy=fsdp", "logger=none", "test=false"]
SFT += ["data.val_shards=null", "callbacks.checkpoint.every_n_train_steps=1000", "optimized_metric=train/loss"]
STOP = "+callbacks.stop={_target_: stop_at.StopAt, step: 1, signal_name: SIGTERM}"


@pytest.mark.slow
def test_a_stopped_run_of_a_shared_model_ends_bit_equal(tmp_path: Path):
    data = f"paths.data={tmp_path}/data"
    train(*SFT, data, f"paths.root={tmp_path}/whole")
    stopped = train(*SFT, data, f"paths.root={tmp_path}/stopped", STOP, check=False)
    assert "saved after step 2; the same command goes on" in stopped.stderr and stopped.returncode == 130
    train(*SFT, data, f"paths.root={tmp_path}/stopped")
    whole, resumed = (tmp_path / name / "miniature/sft" for name in ("whole", "stopped"))
    assert history(resumed, "train/loss") == history(whole, "train/loss")
    states = [read_whole(run / "checkpoints/last.ckpt") for run in (whole, resumed)]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    files = [(run / "model/model.safetensors").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1]
