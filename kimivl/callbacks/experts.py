"""How evenly the routed experts are used."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from kimivl.model.router import load_metrics


class Experts(Callback):
    """Logs the experts' load in an optimiser step, all packs and ranks together, of each layer with experts.

    ``experts/max_over_mean/layer_01``, ``experts/entropy/layer_01`` and ``experts/dead/layer_01`` (see
    ``kimivl.model.router.load_metrics``; a layer's number is its place in the decoder), and their worst over the layers
    as ``experts/max_over_mean``, ``experts/entropy``, ``experts/dead``. The counts are read at log steps only.

    Args:
        layers: log each layer; otherwise only the worst.
    """

    def __init__(self, layers: bool = True) -> None:
        self.layers = layers
        self._every = 1

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._every = max(1, int(getattr(trainer, "log_every_n_steps", 1)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        # the step's number is known on all ranks alike: they sum their counts together
        stepped = not trainer.fit_loop._should_accumulate()
        if not stepped or trainer.global_step % self._every or not pl_module.router.layers:
            return
        metrics = load_metrics(pl_module.router.step_load())
        figures = {f"experts/{name}": (min if name == "entropy" else max)(values) for name, values in metrics.items()}
        if self.layers:
            first = pl_module.model.config.text_config.first_k_dense_replace
            for name, values in metrics.items():
                figures |= {f"experts/{name}/layer_{n:02d}": value for n, value in enumerate(values, first)}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step - 1)  # the row of the step's loss
