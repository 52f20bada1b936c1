"""The steps whose figures are logged, and the row that these go to."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer


def is_log_step(trainer: Trainer, step: int) -> bool:
    """Whether the figures of the optimiser step of this number (from 1) are logged; the same on all ranks."""
    every: int = getattr(trainer, "log_every_n_steps", 1)
    return every > 0 and step % every == 0


def ends_log_step(trainer: Trainer) -> bool:
    """In ``on_train_batch_end``: whether the batch ended an optimiser step whose figures are logged."""
    return not trainer.fit_loop._should_accumulate() and is_log_step(trainer, trainer.global_step)


def log_figures(trainer: Trainer, figures: Mapping[str, float], step: int) -> None:
    """Figures of the optimiser step of this number (from 1), in the row of its loss.

    Not by ``LightningModule.log``: that goes through all figures logged so far at each call, and rounds to float32.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(figures), step=step - 1)
