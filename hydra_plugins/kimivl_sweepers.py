"""Hydra's sweepers with an end: a sweep that is typed again does what is missing, and one failure is only one.

Hydra finds plugins in the package ``hydra_plugins`` and nowhere else; what they do stands in ``kimivl.sweep``.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(BasicSweeper):
    """All combinations of the values: conf/hydra/sweeper/grid.yaml."""

    def sweep(self, arguments: list[str]) -> Any:
        from kimivl.sweep.grid import run_grid

        return run_grid(self, [*self._parse_config(), *arguments])


class SearchSweeper(Sweeper):
    """Optuna over intervals and choices: conf/hydra/sweeper/search.yaml."""

    def __init__(self, **settings: Any) -> None:
        from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl

        self.optuna = OptunaSweeperImpl(**settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        Plugins.instance()
        self.optuna.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        from kimivl.sweep.search import run_search

        return run_search(self.optuna, arguments)
