"""One run: config -> objects -> fit -> hand-over -> metric."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from kimivl import tracking
from kimivl.callbacks import CheckpointFiles, Watchdog
from kimivl.callbacks.preemption import TRAINED
from kimivl.checkpoint import LAST, MODEL, check_init_from, hand_over
from kimivl.config import Interrupted, validate
from kimivl.memory.check import check_memory
from kimivl.resume import begin, done_before
from kimivl.runtime import interruption, ranks
from kimivl.runtime.faults import explained
from kimivl.runtime.launch import Place, find_place, joined
from kimivl.runtime.lock import only_run_in
from kimivl.runtime.watch import Watch

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float | None:
    """Run the stage that ``cfg`` describes on the ranks that there are; returns ``optimized_metric``.

    Raises:
        ValueError: for anything wrong in the config, the data or the checkpoint, in one sentence.
        Interrupted: when a signal stopped the run; what was trained is saved.
    """
    hydra_cfg = HydraConfig.get()
    multirun = hydra_cfg.mode == RunMode.MULTIRUN
    output_dir = Path(hydra_cfg.runtime.output_dir)
    cfg.paths.output_dir = str(output_dir)
    if multirun:
        tracking.join_sweep(cfg.logger, cfg.name, Path(hydra_cfg.sweep.dir))
    place = find_place()
    cfg.trainer.devices = place.tasks_per_node
    group = joined(place, cfg.trainer.get("accelerator"), timedelta(days=1))
    with group, _one_voice(place), Watch(output_dir) as watch, ExitStack() as held:
        rank_zero_only.rank = place.rank  # type: ignore[attr-defined]
        output_dir = ranks.share(lambda: output_dir)  # a name with the time in it differs between ranks
        cfg.paths.output_dir = str(output_dir)
        check_init_from(cfg.stage, cfg.init_from, cfg.name)
        validate(cfg)
        ranks.share(lambda: held.enter_context(only_run_in(output_dir)))
        return _run(cfg, output_dir, hydra_cfg.overrides.task, watch)


@contextmanager
def _one_voice(place: Place) -> Iterator[None]:
    """Let rank 0 say what all ranks fail of. The tasks of submitit have a file each, and a result to hand over."""
    try:
        yield
    except (Exception, Interrupted) as error:
        if place.world_size == 1 or place.launcher == "submitit":
            raise
        if isinstance(error, Interrupted):  # rank 0 says how the run ends, and puts the job back into the queue
            raise error if ranks.is_first() else SystemExit(0) from error
        if ranks.said_elsewhere(str(error)):
            raise SystemExit(2 if isinstance(error, ValueError | InstantiationException) else 1) from error
        if not ranks.is_first() and not isinstance(error, ranks.PeerFailed):
            print(f"\nrank {place.rank}:", end="", file=sys.stderr)  # the message follows
        raise


def _run(cfg: DictConfig, output_dir: Path, overrides: list[str], watch: Watch) -> float | None:
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    check_memory(config, overrides)
    if HydraConfig.get().mode == RunMode.MULTIRUN and (done := ranks.share(lambda: done_before(output_dir, config))):
        log.info("%s has finished before", output_dir)
        return _optimized(done, cfg.optimized_metric)
    resume = ranks.share(lambda: begin(output_dir, cfg.ckpt_path, config))
    _quiet()
    seed_everything(cfg.seed, verbose=False)
    loggers: list[Any] = [tracking.History(output_dir)]
    watch.on_end = lambda text: tracking.write_run(output_dir, "failed", config, text)
    outcome = "failed"
    try:
        for logger in _instantiated(cfg.logger):
            loggers.append(logger)  # each is closed, also when the next cannot be made
        metrics = _fit_and_hand_over(cfg, output_dir, loggers, config, resume, watch)
        outcome = "success"
        tracking.write_run(output_dir, "finished", config)
        tracking.write_metrics(output_dir, metrics)
    except BaseException as caught:
        interruption.hear_of_others()
        error = watch.leave(explained(caught, watch.doing, config, overrides, output_dir))
        stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        outcome = "interrupted" if stopped else "failed"
        with suppress(OSError):  # a full disk must not hide what happened
            said = None if stopped else str(error) or type(error).__name__
            tracking.write_run(output_dir, outcome, config, said)
        if error is not None and error is not caught:
            raise error from caught
        raise
    finally:
        tracking.close(loggers, outcome)
    return _optimized(metrics, cfg.optimized_metric)


def _fit_and_hand_over(
    cfg: DictConfig,
    output_dir: Path,
    loggers: list[Any],
    config: dict[str, Any],
    resume: Path | None,
    watch: Watch,
) -> dict[str, float]:
    datamodule = instantiate(cfg.data, _convert_="all")
    module = instantiate(cfg.module, _convert_="all")
    callbacks = list(_instantiated(cfg.callbacks))
    for callback in callbacks:
        if isinstance(callback, Watchdog):
            callback.watch = watch
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
        with _in_the_row_of_its_last_step(trainer):
            trainer.validate(module, datamodule, verbose=False)  # the fit did not end with a validation
        metrics |= _floats(trainer)
    hand_over(module.model, datamodule.processor, output_dir / MODEL)
    if interruption.agreed():
        raise Interrupted(TRAINED)
    if cfg.test:
        trainer.test(module, datamodule, verbose=False)
        metrics |= _floats(trainer)
    about = {"stage": cfg.stage, "step": trainer.global_step, "metrics": metrics}
    tracking.log_model(trainer.loggers, output_dir / MODEL, about)
    metrics["seconds"] = module.train_seconds
    if trainer.is_global_zero:
        print(f"\n{cfg.stage}: model in {output_dir / MODEL}, {module.train_seconds:.0f} s of training")
        if dropped := datamodule.dropped:
            print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items())))
    return metrics


@contextmanager
def _in_the_row_of_its_last_step(trainer: Trainer) -> Iterator[None]:
    """Figures of this block are logged where a validation that ends the fit has its own: a run that was stopped behind
    that one and goes on validates again, and has no point more than a run that was not."""
    loop = trainer.fit_loop.epoch_loop
    step = loop._batches_that_stepped
    loop._batches_that_stepped = max(step - 1, 0)
    try:
        yield
    finally:
        loop._batches_that_stepped = step


def _plugins(strategy: Any) -> list[Any]:
    """Ranks are where ``kimivl.runtime.launch`` has found them, whatever else the environment says."""
    place = LightningEnvironment() if ranks.world_size() == 1 else TorchElasticEnvironment()
    return [place] if isinstance(strategy, DictConfig) else [place, CheckpointFiles()]


def _instantiated(group: DictConfig | None) -> Iterator[Any]:
    """The objects of a group of named targets, one by one; an entry that is null is left out."""
    for node in (group or {}).values():
        if node is not None:
            yield instantiate(node, _convert_="all")


def _floats(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _optimized(metrics: dict[str, float], name: str) -> float | None:
    if name in metrics:
        return metrics[name]
    if not ranks.is_first():
        return None
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
        ".*`srun` command is available.*",
        ".*all_gather_into_tensor. is deprecated.*",  # the oldest torch that we run on has no other
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # figures are put together before they are logged
    ):
        warnings.filterwarnings("ignore", pattern)
    if not ranks.is_first():
        warnings.simplefilter("ignore")  # rank 0 gives the same
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
