"""One run: config -> objects -> fit -> hand-over -> metric."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf

from kimivl import ranks, tracking
from kimivl.checkpoint import LAST, MODEL, check_init_from, export_model, resume_path
from kimivl.config import AUDIT, HISTORY_FILE, METRICS_FILE, Interrupted, validate
from kimivl.launch import check_launch, joined
from kimivl.memory.check import check_memory

log = logging.getLogger(__name__)

_MAY_DIFFER = {
    "ckpt_path",
    "callbacks",
    "logger",
    # What runs out of memory, or lacks a kernel on another machine, goes on with others: equal up to rounding.
    "activation_checkpointing",
    "module.activation_checkpointing",
    "kernels",
    "module.kernels",
    "test",
    "data.num_workers",
    "data.max_dropped",
    "data.cache",
    "data.cache_gb",
    # The packs of a step may be dealt to other ranks; the datamodules check that they are the same packs.
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accumulate_grad_batches",
    "trainer.log_every_n_steps",
    "trainer.check_val_every_n_epoch",
}
_SERVICES = {
    "rollout": "max_rows prefill_tokens kv_cache_gb enforce_eager sleep url in_flight timeout retries backoff sync_dir "
    "sync_timeout",
    "reward": "workers timeout memory_gb",
}
"""Where and with what means responses are drawn and judged, not which or how."""
_MAY_DIFFER |= {
    f"{owner}{group}.{key}" for group, keys in _SERVICES.items() for key in keys.split() for owner in ("", "module.")
}
"""Keys that a run may change when it goes on from its own checkpoint."""


def run(cfg: DictConfig) -> float | None:
    """Run the stage that ``cfg`` describes; returns ``optimized_metric``.

    Raises:
        ValueError: for anything wrong in the config, the data or the checkpoint, in one sentence.
        Interrupted: when a signal stopped the run; what was trained is saved.
    """
    hydra_cfg = HydraConfig.get()
    multirun = hydra_cfg.mode == RunMode.MULTIRUN
    output_dir = Path(hydra_cfg.runtime.output_dir)
    cfg.paths.output_dir = str(output_dir)
    if multirun and cfg.logger and "wandb" in cfg.logger:
        cfg.logger.wandb.group = Path(hydra_cfg.sweep.dir).name
    check_init_from(cfg.stage, cfg.init_from, cfg.name)
    validate(cfg)
    place = check_launch(cfg.trainer, multirun)
    with joined(place, cfg.trainer.get("accelerator"), timedelta(minutes=30)):
        return _run(cfg, output_dir, hydra_cfg.overrides.task)


def _run(cfg: DictConfig, output_dir: Path, overrides: list[str]) -> float | None:
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    check_memory(config, overrides)
    resume = ranks.share(lambda: _begin(output_dir, cfg.ckpt_path, config))
    _quiet()
    seed_everything(cfg.seed, verbose=False)
    loggers = [tracking.History(output_dir), *_instantiated(cfg.logger)]
    status = "failed"
    try:
        metrics = _fit_and_hand_over(cfg, output_dir, loggers, config, resume)
        status = "success"
        tracking.write_run(output_dir, "finished", config)
        tracking.write_metrics(output_dir, metrics)
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        tracking.write_run(output_dir, "interrupted" if stopped else "failed", config)
        raise
    finally:
        tracking.close(loggers, status)
    return _optimized(metrics, cfg.optimized_metric)


def _begin(output_dir: Path, ckpt_path: str | None, config: dict[str, Any]) -> Path | None:
    """What to go on from; the folder is made ready for it, and says that the run is running."""
    resume = _resume(output_dir, ckpt_path, config)
    tracking.write_run(output_dir, "running", config)
    own = resume is not None and resume.resolve() == (output_dir / LAST).resolve()
    for file in (METRICS_FILE, *(() if own else (HISTORY_FILE, LAST))):
        (output_dir / file).unlink(missing_ok=True)  # an earlier run's, which this one does not go on from
    if not own:
        shutil.rmtree(output_dir / AUDIT, ignore_errors=True)
        if resume is not None and (elsewhere := resume.parents[1] / AUDIT).is_dir():
            shutil.copytree(elsewhere, output_dir / AUDIT)  # the proof goes on where that run's steps end
    return resume


def _fit_and_hand_over(
    cfg: DictConfig, output_dir: Path, loggers: list[Any], config: dict[str, Any], resume: Path | None
) -> dict[str, float]:
    datamodule = instantiate(cfg.data, _convert_="all")
    module = instantiate(cfg.module, _convert_="all")
    callbacks = _instantiated(cfg.callbacks)
    trainer: Trainer = instantiate(
        {"max_epochs": datamodule.max_epochs} | OmegaConf.to_container(cfg.trainer),  # type: ignore[operator]
        callbacks=callbacks,
        logger=loggers,
        plugins=_plugins(cfg.trainer.strategy),
        use_distributed_sampler=False,  # the datamodules deal their data to the ranks themselves
        reload_dataloaders_every_n_epochs=1,
        enable_progress_bar=any(hasattr(callback, "get_metrics") for callback in callbacks),
        _convert_="all",
    )
    tracking.log_config(loggers, config)
    with closing(module):
        return _train_and_test(cfg, output_dir, trainer, module, datamodule, resume)


def _train_and_test(
    cfg: DictConfig, output_dir: Path, trainer: Trainer, module: Any, datamodule: Any, resume: Path | None
) -> dict[str, float]:
    trainer.fit(module, datamodule, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(output_dir / LAST)
    metrics = _floats(trainer)
    every = trainer.check_val_every_n_epoch
    if datamodule.held_out["val"] and (cfg.optimized_metric not in metrics or every and trainer.current_epoch % every):
        trainer.validate(module, datamodule, verbose=False)  # the fit did not end with a validation
        metrics |= _floats(trainer)
    if trainer.is_global_zero:
        export_model(module.model, datamodule.processor, output_dir / MODEL)
    if cfg.test:
        trainer.test(module, datamodule, verbose=False)
        metrics |= _floats(trainer)
    metrics["seconds"] = module.train_seconds
    if trainer.is_global_zero:
        print(f"\n{cfg.stage}: model in {output_dir / MODEL}, {module.train_seconds:.0f} s of training")
        if dropped := datamodule.dropped:
            print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items())))
    return metrics


def _plugins(strategy: Any) -> list[Any]:
    """Ranks are where ``kimivl.launch`` has found them, whatever else the environment says."""
    place = LightningEnvironment() if ranks.world_size() == 1 else TorchElasticEnvironment()
    return [place] if isinstance(strategy, DictConfig) else [place, CheckpointFiles()]


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints to the disk tensor by tensor, whole or not at all.

    Lightning's own puts the file together in memory first: 70 GB and more of the host's for Kimi-VL-A3B.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        try:
            torch.save(checkpoint, part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return None


def _instantiated(group: DictConfig | None) -> list[Any]:
    """The objects of a group of named targets; an entry that is null is left out."""
    return [instantiate(node, _convert_="all") for node in (group or {}).values() if node is not None]


def _resume(output_dir: Path, ckpt_path: str | None, config: dict[str, Any]) -> Path | None:
    """What to go on from; an unfinished run of this folder goes on, but only with the settings that it began with."""
    before = tracking.read_run(output_dir)
    unfinished = before.get("status") in ("running", "interrupted", "failed")
    resume = resume_path(output_dir, ckpt_path, unfinished)
    if resume is None:
        return None
    if unfinished and resume == output_dir / LAST:
        # What `module` refers to differs there too: the shortest key is the one that a user types.
        for key, how in sorted(_differences(before["config"], config), key=lambda found: found[0].count(".")):
            raise ValueError(
                f"{output_dir} holds an unfinished run with another {key} ({how}); go on with its settings, "
                f"or remove {resume} to start anew"
            )
    log.info("going on from %s", resume)
    return resume


def _differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The keys in which two configs differ, apart from those that may, and how."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        if before != after:
            yield path, f"{before!r}, now {after!r}"
        return
    for key in sorted(before.keys() | after.keys()):
        inner = f"{path}.{key}".strip(".")
        if inner not in _MAY_DIFFER:
            yield from _differences(before.get(key), after.get(key), inner)


def _floats(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _optimized(metrics: dict[str, float], name: str) -> float | None:
    if name in metrics:
        return metrics[name]
    measured = ", ".join(
        sorted(metric for metric in metrics if "difficulty" not in metric and metric.startswith("val/"))
    )
    log.warning(
        "optimized_metric=%s was not measured in this run; of validation there is: %s", name, measured or "nothing"
    )
    return None


def _quiet() -> None:
    """Silence what Lightning says about things that are so by design here."""
    for pattern in (
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",  # the loaders start at the right pack themselves
        ".*smaller than the logging interval.*",
        ".*Total length of `list` across ranks is zero.*",  # no validation set: as the config says
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*LeafSpec.*is deprecated.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
