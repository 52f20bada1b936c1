"""Stage 3, online reinforcement learning on the final answer."""

from kimivl.stages.rl.datamodule import RLDataModule
from kimivl.stages.rl.module import RLModule

__all__ = ["RLDataModule", "RLModule"]
