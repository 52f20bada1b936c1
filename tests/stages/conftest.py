"""A small digits set, and the objects of a stage as ``train.py`` would make them."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from omegaconf import open_dict

from kimivl.config import compose_run
from kimivl.tasks.digits import write


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root / "digits", sft=60, long_cot=40, rl=32, val=8, test=8, vocab_size=340)
    return root


@pytest.fixture
def fit(data: Path, tmp_path: Path):
    """Train a fresh tiny model as configured, and return its module and trainer.

    With plain SGD, or with the optimiser of the config where ``momentum`` is None; on from ``ckpt_path`` where given.
    """

    def run(
        stage: str,
        *overrides: str,
        accumulate: int = 1,
        momentum: float | None = 0.0,
        ckpt_path: Path | None = None,
        **trainer: Any,
    ) -> tuple[Any, Trainer]:
        cfg = compose_run(f"stage={stage}", f"paths.data={data}", f"paths.output_dir={tmp_path}", *overrides)
        with open_dict(cfg):
            cfg.init_from = None
            cfg.data.prepare = None
            cfg.data.processor = str(data / "digits/tokenizer")
            cfg.data.val_shards = cfg.data.test_shards = None
        seed_everything(1, verbose=False)
        datamodule = instantiate(cfg.data, _convert_="all")
        module = instantiate(cfg.module, _convert_="all")
        if momentum is not None:
            module.make_optimizer = partial(torch.optim.SGD, lr=1.0, momentum=momentum)
        options = {
            "max_epochs": datamodule.max_epochs,
            "accumulate_grad_batches": accumulate,
            "reload_dataloaders_every_n_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        }
        fitted = Trainer(**(options | trainer))
        fitted.fit(module, datamodule, ckpt_path=ckpt_path, weights_only=True)
        return module, fitted

    return run
