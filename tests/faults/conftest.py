"""A small digits set, and a trainer with the callbacks of a test on a fresh tiny model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from omegaconf import open_dict

from kimivl.config import compose_run
from kimivl.tasks.digits import write

STEPS = "data.phases=[{max_length: 700, epochs: 1, lr: [1e-2, 1e-3]}]"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root / "digits", sft=48, long_cot=40, rl=32, val=8, test=8, vocab_size=340)
    return root


@pytest.fixture
def fit(data: Path, tmp_path: Path):
    """Train as configured (``stage=sft`` in steps of 700 tokens) under ``callbacks``; the trainer, ended or not."""

    def run(*overrides: str, callbacks: Sequence[Callback] = (), packs: int = 1) -> Trainer:
        stage = [] if any(one.startswith("stage=") for one in overrides) else ["stage=sft", STEPS]
        cfg = compose_run(*stage, f"paths.data={data}", f"paths.output_dir={tmp_path}", *overrides)
        with open_dict(cfg):
            cfg.init_from = cfg.data.prepare = cfg.data.val_shards = cfg.data.test_shards = None
            cfg.data.processor = str(data / "digits/tokenizer")
        seed_everything(1, verbose=False)
        datamodule: Any = instantiate(cfg.data, _convert_="all")
        trainer = Trainer(
            max_epochs=datamodule.max_epochs,
            accumulate_grad_batches=packs,
            gradient_clip_val=None if "optimizer=muon_in_backward" in overrides else 1.0,
            gradient_clip_algorithm=cfg.trainer.get("gradient_clip_algorithm"),
            reload_dataloaders_every_n_epochs=1,
            callbacks=list(callbacks),
            logger=False,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        trainer.fit(instantiate(cfg.module, _convert_="all"), datamodule)
        return trainer

    return run
