"""What a trainer's callbacks log, kept by step."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger


class _Rows(Logger):
    name, version = "rows", ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, Any]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class KeptRows(Callback):
    """Logs every ``every`` steps; saves after the step ``save_at`` to ``path``."""

    def __init__(self, every: int = 1, path: Path | None = None, save_at: int = 0) -> None:
        self.every, self.path, self.save_at, self.logger = every, path, save_at, _Rows()

    @property
    def rows(self) -> dict[int, dict[str, Any]]:
        return self.logger.rows

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        trainer.log_every_n_steps, trainer.loggers = self.every, [self.logger]

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        between_steps = not trainer.fit_loop._should_accumulate()
        if self.path is not None and between_steps and trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)
