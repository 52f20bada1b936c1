"""How evenly the routed experts are used."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from kimivl.callbacks.log_steps import ends_log_step, log_figures
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

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        # the step's number is known on all ranks alike: they sum their counts together
        if not ends_log_step(trainer) or not pl_module.router.layers:
            return
        metrics = load_metrics(pl_module.router.step_load())
        figures = {f"experts/{name}": (min if name == "entropy" else max)(values) for name, values in metrics.items()}
        if self.layers:
            first = pl_module.model.config.text_config.first_k_dense_replace
            for name, values in metrics.items():
                figures |= {f"experts/{name}/layer_{n:02d}": value for n, value in enumerate(values, first)}
        log_figures(trainer, figures, trainer.global_step)
