"""A validation that a signal has ended is done anew by the run that goes on, which is then an uninterrupted one."""

import signal
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import open_dict

from kimivl.callbacks import Preemption
from kimivl.config import Interrupted, compose_run
from kimivl.runtime.interruption import listening

STAGES = {
    "sft": ["data.phases=[{max_length: 512, epochs: 2, lr: [1e-2, 1e-3]}]"],
    "rl": [
        "data.phases=[{epochs: 2, lr: [0.1, 0.1]}]",
        "data.problems=4",
        "data.responses=2",
        "data.max_new_tokens=6",
        "data.updates=2",
        "reward._target_=even_reward.EvenReward",
    ],
}


class Watched(Callback):
    """Keeps the figures of each validation by its step; ``stop``: the validation in which a signal comes."""

    def __init__(self, figures: dict, stop: int | None = None) -> None:
        self.figures, self.stop = figures, stop

    def on_validation_batch_start(self, *args) -> None:
        if self.stop is not None:
            self.stop -= 1
            if self.stop == 0:
                signal.raise_signal(signal.SIGUSR1)

    def on_validation_end(self, trainer, *args) -> None:
        self.figures[trainer.global_step] = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        }


def train(stage: str, data: Path, folder: Path, figures: dict, stop: int | None = None) -> torch.Tensor:
    """One start of a run in ``folder``, and the sum of its final weights."""
    cfg = compose_run(f"stage={stage}", f"paths.data={data}", f"paths.output_dir={folder}", *STAGES[stage])
    with open_dict(cfg):
        cfg.init_from, cfg.data.prepare, cfg.data.test_shards = None, None, None
        cfg.data.processor = str(data / "digits/tokenizer")
        cfg.evaluation.samples, cfg.evaluation.max_new_tokens = 1, 5
    last = folder / "last.ckpt"
    seed_everything(1, verbose=False)
    datamodule, module = (instantiate(cfg[name], _convert_="all") for name in ("data", "module"))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=datamodule.max_epochs,
        callbacks=[Watched(figures, stop), Preemption(str(last))],
        plugins=[LightningEnvironment()],
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with listening(folder):
        trainer.fit(module, datamodule, ckpt_path=last if last.exists() else None, weights_only=True)
    return torch.stack([weight.detach().double().sum() for weight in module.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_validation_that_was_left_is_done_anew(data, tmp_path, stage):
    whole: dict = {}
    weights = train(stage, data, tmp_path / "whole", whole)
    assert len(whole) == 2 and all(figures["val/problems"] == 8 for figures in whole.values())
    for stop in (1, 2):
        figures: dict = {}
        with pytest.raises(Interrupted, match="saved after step"):
            train(stage, data, tmp_path / f"{stop}", figures, stop)
        assert len(figures) == stop - 1
        assert torch.equal(train(stage, data, tmp_path / f"{stop}", figures), weights) and figures == whole
