"""bf16 parameters (trainer.precision=bf16-true): what must not be bf16, and the optimiser in the backward pass."""

import json
from functools import partial
from typing import Any

import pytest
import torch
from command import history
from forked import train
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from kimivl.config import compose_run, validate
from kimivl.tasks.digits import write

QUIET = ["debug=miniature", "logger=none", "test=false", "evaluation.max_new_tokens=2", "evaluation.samples=1"]
IN_BACKWARD = ["optimizer=muon_in_backward", "trainer.gradient_clip_val=null"]
SHORT = ["data.phases=[{epochs: 1, lr: [1e-3, 1e-3], max_length: 512}]"]
SMALL = ["model.text_config.num_hidden_layers=2", "model.vision_config.num_hidden_layers=1"]
RL = ["data.phases=[{epochs: 1, lr: [1e-3, 1e-3]}]", "data.problems=4", "data.responses=2", "data.updates=1"]
# four steps; the third ends within an epoch
FEW = {
    "sft": ["data.phases=[{epochs: 2, lr: [1e-2, 1e-3], max_length: 256}]", *SMALL],
    "rl": [
        "data.phases=[{epochs: 2, lr: [1e-3, 1e-3]}]",
        "data.problems=4",
        "data.responses=2",
        "data.updates=2",
        *SMALL,
    ],
}


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


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_the_reference_of_rl_keeps_its_bits(fit, precision):
    """A policy is its own reference at the first update, also where log-probabilities are sums of hundreds."""
    _, trainer = fit("rl", *RL, precision=precision)
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


class Losses(Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.of: dict[int, float] = {}

    def on_train_batch_end(self, trainer, *args) -> None:
        self.of[trainer.global_step] = float(trainer.callback_metrics["train/loss"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("sft", []),
        ("sft", IN_BACKWARD),
        ("sft", ["optimizer.rounding=master"]),
        ("rl", []),
        ("rl", ["optimizer.rounding=master"]),
    ],
)
def test_resumed_in_bf16_is_uninterrupted_to_the_bit(fit, tmp_path, stage, settings):
    write(tmp_path / "few", sft=12, long_cot=1, rl=16, val=1, test=1, vocab_size=340)
    few = f"data.shards={tmp_path}/few/{stage}-*.tar"
    run = partial(fit, stage, few, *FEW[stage], *settings, momentum=None, precision="bf16-true")
    whole, rest = Losses(), Losses()
    save = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=3)
    expected, trainer = run(callbacks=[whole, save], enable_checkpointing=True)
    assert trainer.global_step == 4 and not all(map(shows_bf16, whole.of.values()))
    resumed, _ = run(callbacks=[rest], ckpt_path=tmp_path / "saved.ckpt")
    assert rest.of == {4: whole.of[4]}
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


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
