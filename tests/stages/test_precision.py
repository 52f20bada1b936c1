"""bf16 parameters (trainer.precision=bf16-true): what must not be bf16, and the optimiser in the backward pass."""

import json
from typing import Any

import pytest
import torch
from command import history, train

from kimivl.config import compose_run, validate

QUIET = ["debug=miniature", "logger=none", "test=false", "evaluation.max_new_tokens=2", "evaluation.samples=1"]
IN_BACKWARD = ["optimizer=muon_in_backward", "trainer.gradient_clip_val=null"]
SHORT = ["data.phases=[{epochs: 1, lr: [1e-3, 1e-3], max_length: 512}]"]
RL = ["data.phases=[{epochs: 1, lr: [1e-3, 1e-3]}]", "data.problems=4", "data.responses=2", "data.updates=1"]


def shows_bf16(value: Any) -> bool:
    """Whether bf16 has this very number: one in 65,536 float32 numbers, if it is none by its nature."""
    return float(torch.tensor(float(value)).bfloat16()) == float(value)


def test_bf16_parameters_log_float32_figures_and_say_when_updates_are_lost(fit, caplog):
    module, trainer = fit("sft", *SHORT, precision="bf16-true", gradient_clip_val=1.0)
    assert {weight.dtype for weight in module.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in module.buffers() if buffer.is_floating_point()} == {torch.float32}
    assert not shows_bf16(trainer.callback_metrics["train/loss"])
    assert not shows_bf16(trainer.callback_metrics["train/grad_norm"])
    assert "SGD rounds bf16 parameters to nearest" in caplog.text and "optimizer=muon" in caplog.text


def test_float32_parameters_are_not_warned_about(fit, caplog):
    _, trainer = fit("sft", *SHORT, gradient_clip_val=1e-3)
    assert trainer.callback_metrics["train/grad_norm"] > 1e-3  # before clipping
    assert "rounds" not in caplog.text


def test_the_reference_of_rl_keeps_its_bits(fit):
    """A policy is its own reference at the first update, also where log-probabilities are sums of hundreds."""
    _, trainer = fit("rl", *RL, precision="bf16-true")
    assert float(trainer.callback_metrics["policy/log_ratio_squared"]) < 1e-6
    assert abs(float(trainer.callback_metrics["policy/nll_per_token"])) > 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.gradient_clip_val=1.0", "trainer.gradient_clip_val=1.0: optimizer=muon_in_backward needs"),
        ("trainer.accumulate_grad_batches=2", "needs trainer.accumulate_grad_batches=1"),
    ],
)
def test_in_backward_refuses_what_would_be_wrong(override: str, message: str):
    validate(compose_run("stage=sft", *IN_BACKWARD))
    with pytest.raises(ValueError, match=message):
        validate(compose_run("stage=sft", *IN_BACKWARD, override))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], IN_BACKWARD, ["optimizer.rounding=master"]])
def test_resumed_in_bf16_is_uninterrupted_to_the_bit(tmp_path, settings):
    overrides = ["stage=sft", *QUIET, "trainer.precision=bf16-true", *settings, f"paths.root={tmp_path}"]
    stop = ["+callbacks.stop._target_=stop_at.StopAt", "+callbacks.stop={step: 3, signal_name: SIGKILL}"]
    train(*overrides, f"paths.output_dir={tmp_path / 'whole'}")
    killed = [*overrides, f"paths.output_dir={tmp_path / 'killed'}"]
    assert train(*killed, *stop, check=False).returncode == -9
    train(*killed, "ckpt_path=last")
    whole, resumed = tmp_path / "whole", tmp_path / "killed"
    assert history(resumed, "train/loss") == history(whole, "train/loss")
    assert not any(map(shows_bf16, history(whole, "train/loss").values()))
    assert (resumed / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.mark.slow
def test_in_backward_is_the_ordinary_run(tmp_path):
    """The same losses and norms, each logged once, from one pass more."""
    overrides = ["stage=sft", *QUIET, f"paths.root={tmp_path}"]
    train(*overrides, f"paths.output_dir={tmp_path / 'outside'}")
    train(*overrides, *IN_BACKWARD, f"paths.output_dir={tmp_path / 'inside'}")
    for name in ("train/loss", "train/grad_norm"):
        ours, theirs = (history(tmp_path / run, name) for run in ("inside", "outside"))
        assert list(ours) == list(theirs) == list(range(6))
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "inside/history.jsonl").read_text().splitlines()]
    assert sum("train/loss" in row for row in rows) == 6
